# SPDX-License-Identifier: GPL-2.0-or-later
"""Un-merging pages of one process: what is asked for, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping

from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.operation import Unshare, UnsharedPart, UnsharePart, UnshareResult


def unshare_one(
    process: ProcessId,
    ranges: tuple[tuple[int, int], ...] = (),
    to: int | None = None,
    latency_seconds: float = 0.01,
    floor_bytes: int = 0,
) -> Unshare:
    """A request with a single part."""
    return Unshare((UnsharePart(process, ranges, to),), latency_seconds, floor_bytes)


def unshared_one(unshared: int, left: Mapping[str, int], stopped: str = "") -> UnshareResult:
    """The result of a single part."""
    return UnshareResult((UnsharedPart(unshared, left),), stopped)
