# SPDX-License-Identifier: GPL-2.0-or-later
"""Figures in the words of a reason."""

from __future__ import annotations

__all__ = ["count", "percent", "seconds"]


def count(amount: float) -> str:
    """A number of things: ``12,345``, and no more digits than anybody reads."""
    return f"{amount:,.0f}" if abs(amount) < 10_000_000 else f"{amount / 1e6:,.1f} million"


def percent(ratio: float) -> str:
    """``1.2 %``."""
    amount = 100 * ratio
    return f"{amount:.0f} %" if amount >= 10 else f"{amount:.1f} %" if amount >= 1 else f"{amount:.2g} %"


def seconds(amount: float) -> str:
    """``0.4 s``, ``12 s``, ``3.5 min``, ``2.1 h``."""
    if amount < 10:
        return f"{amount:.1f} s"
    if amount < 120:
        return f"{amount:.0f} s"
    return f"{amount / 60:.1f} min" if amount < 7200 else f"{amount / 3600:.1f} h"
