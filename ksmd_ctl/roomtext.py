# SPDX-License-Identifier: GPL-2.0-or-later
"""Room for what un-merging takes, in the same words wherever it is told."""

from __future__ import annotations

__all__ = ["over_text", "room_text"]


def room_text(
    where: str, growth_bytes: float, free_bytes: float, *, upper_bound: bool, floor_bytes: float | None = None
) -> str:
    """What un-merging takes somewhere and what is there, as a phrase with figures.

    :param where: ``host``, ``node N``, or the path of a memory cgroup
    :param free_bytes: above the floor, and in a memory cgroup above its reserve
    :param upper_bound: it takes at most so much
    :param floor_bytes: what has to stay free on the host and on nodes; None where no floor counts
    """
    cgroup = where.startswith("/")
    place = f"in the memory cgroup {where}" if cgroup else f"on {'the host' if where == 'host' else where}"
    above = "" if floor_bytes is None else f" above the floor of {_mib(floor_bytes)}"
    most = "up to " if upper_bound else ""
    free = f"{_mib(free_bytes)} are free{' above its reserve' if cgroup else above}"
    return f"{place} it takes {most}{_mib(growth_bytes)} more, and {free}"


def over_text(over_bytes: float, *, upper_bound: bool) -> str:
    """By how much that is more than there is."""
    return f"over by {'up to ' if upper_bound else ''}{_mib(over_bytes)}"


def _mib(size: float) -> str:
    return f"{size / (1 << 20):,.1f} MiB"
