# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading a report document (docs/json.md), which may have come over a socket: what is not of its form is not there."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from ksmd_ctl.figures import over_text, room_text

_NOTHING: Mapping[str, object] = {}


def part(document: Mapping[str, object], *path: str) -> Mapping[str, object]:
    """The object at a path, empty where there is none."""
    found: object = document
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else _NOTHING


def parts(document: Mapping[str, object], name: str) -> list[Mapping[str, object]]:
    """The objects of the list of that name, empty where there is none."""
    found = document.get(name)
    return [item for item in found if isinstance(item, Mapping)] if isinstance(found, list | tuple) else []


def number(document: Mapping[str, object], name: str) -> int | float | None:
    """The number of that name, None where there is none. True and false are none."""
    found = document.get(name)
    return found if isinstance(found, int | float) and not isinstance(found, bool) else None


def text(document: Mapping[str, object], name: str, otherwise: str = "") -> str:
    """The text of that name."""
    found = document.get(name)
    return found if isinstance(found, str) else otherwise


def room_said(room: Mapping[str, object], floor_bytes: float | None = None, *, over: bool = True) -> str:
    """A room of a plan or an exposure of a survey (docs/json.md), as a phrase with figures.

    :param floor_bytes: what has to stay free on the host and on nodes; None where no floor counts
    :param over: also by how much it is more than there is, if it is
    """
    takes = number(room, "takes_bytes" if "takes_bytes" in room else "growth_bytes") or 0
    free, more = number(room, "free_bytes") or 0, number(room, "over_bytes")
    most = room.get("upper_bound") is not False
    said = room_text(text(room, "where"), takes, free, upper_bound=most, floor_bytes=floor_bytes)
    return f"{said}: {over_text(more, upper_bound=most)}" if more and over else said


def restore_command(left: Mapping[str, object]) -> str:
    """The command that puts back what a service left (docs/json.md, ``left_by_service``)."""
    config = text(left, "config")
    return "ksmd-ctl daemon --restore" + (f" --config {shlex.quote(config)}" if config.isprintable() and config else "")


def doubted(said: str, stale_text: str) -> str:
    """What merging saves, as it is said, with a mark where KSM's counters may be out of date.

    :param stale_text: why they may be, as a report has it (docs/json.md); empty where they are right
    """
    return f"{said} (may be out of date)" if stale_text else said
