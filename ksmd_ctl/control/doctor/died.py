# SPDX-License-Identifier: GPL-2.0-or-later
"""A service that ended without a stop, and the knobs that it left changed."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Final

from ksmd_ctl.control.doctor.finding import Code, Figure, Finding, Severity
from ksmd_ctl.control.doctor.look import Look
from ksmd_ctl.control.document import number, part, text

__all__ = ["service_died"]

_JOURNAL: Final = "journal of the knobs"


def service_died(look: Look) -> Iterator[Finding]:
    """No service runs, and one has left knobs changed: nobody holds them or puts them back."""
    left = part(look.after, "left_by_service")
    if not left:
        return
    soon = left.get("may_be_restarted") is True
    figures = [Figure("pid", str(number(left, "pid")), _JOURNAL)]
    for name, what in (("started_age_seconds", "started"), ("seen_age_seconds", "last seen")):
        seconds = number(left, name)
        if seconds is not None:
            figures.append(Figure(what, seconds, _JOURNAL, "seconds ago"))
    knobs = part(left, "knobs")
    for name in knobs:
        before = part(knobs, name).get("at_start")
        figures.append(Figure(f"{name} was {before} before it, is now", str(part(knobs, name).get("found")), _JOURNAL))
    config = text(left, "config")
    yield Finding(
        Code.SERVICE_DIED,
        Severity.NOTE if soon else Severity.COSTS,
        "A service ended without a stop and left knobs changed"
        + ("; systemd may be starting it again" if soon else "; nobody holds them or puts them back"),
        tuple(figures),
        "Start the service again: it holds them again and puts them back when it stops. Or put back the first state "
        "of this boot now.",
        "ksmd-ctl daemon --restore" + (f" --config {shlex.quote(config)}" if config and config.isprintable() else ""),
    )
