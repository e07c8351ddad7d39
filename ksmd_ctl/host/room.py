# SPDX-License-Identifier: GPL-2.0-or-later
"""Room for what un-merging takes, in words."""

from __future__ import annotations

from ksmd_ctl.host.memory import Exposure

__all__ = ["room_text"]


def room_text(item: Exposure, floor_bytes: int) -> str:
    """What un-merging takes somewhere and what is there, as a phrase with figures."""
    where = f"in the memory cgroup {item.where}" if item.where.startswith("/") else f"on {_the(item.where)}"
    above = "above its reserve" if item.where.startswith("/") else f"above the floor of {_mib(floor_bytes)}"
    most = "up to " if item.upper_bound else ""
    return f"{where} it takes {most}{_mib(item.growth_bytes)} more, and {_mib(item.free_bytes)} are free {above}"


def _the(where: str) -> str:
    return "the host" if where == "host" else where


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.1f} MiB"
