# SPDX-License-Identifier: GPL-2.0-or-later
"""The kinds of steps. Each class is all that there is about its kind: what the file may have, what makes it impossible,
what it does to a host, how a random scenario gets it. A new kind is a new class, last in `_STEPS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ksmd_ctl.scenario.host_steps import Batch, Home, Observe, Offline, Scan, Set, Sleep, Unmerge
from ksmd_ctl.scenario.memory_steps import (
    Advise,
    Break,
    Collapse,
    Discard,
    Exec,
    Exit,
    Fork,
    Merge,
    Migrate,
    Protect,
    Read,
    Remap,
    SwapOut,
    Unmap,
    Write,
)
from ksmd_ctl.scenario.model import Step

if TYPE_CHECKING:
    from ksmd_ctl.scenario.generate import Draw

_STEPS = (
    Migrate,
    Scan,
    Batch,
    Write,
    Discard,
    Unmap,
    Break,
    Advise,
    Protect,
    Fork,
    Exit,
    Set,
    Unmerge,
    Sleep,
    Observe,
    Merge,
    Exec,
    Remap,
    Read,
    SwapOut,
    Collapse,
    Offline,
    Home,
)

#: The classes of steps, by the key that names them in a file. A new one comes last: what a seed makes depends on it.
KINDS: dict[str, type[Step]] = {step.kind: step for step in _STEPS}


def migrations_during_a_scan(draw: Draw) -> Iterator[Step]:
    """Steps for a random scenario: pages move while a scan is stopped in the middle, and each batch is observed."""
    if draw.chance(0.5):
        yield from Batch.random(draw)
    yield from Migrate.random(draw)
    if draw.chance(0.4):
        yield from Migrate.random(draw)
    if draw.chance(0.4):
        yield from Write.random(draw)
    if draw.chance(0.3):
        yield from Fork.random(draw)
    yield from Batch.random(draw)
    yield draw.observe()
    if draw.chance(0.3):
        yield from Exit.random(draw)
    yield Scan(1)
    yield draw.observe()
