# SPDX-License-Identifier: GPL-2.0-or-later
"""What a scenario file says, as values: regions, steps and expectations (docs/scenarios.md).

A step is one class a kind. Pages are numbers within their region; None stands for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from ksmd_ctl.knobs import Knob

__all__ = [
    "FORMAT",
    "UNTOUCHED",
    "ZERO",
    "Advise",
    "Batch",
    "Break",
    "Discard",
    "Exit",
    "Expect",
    "Fork",
    "KnobSetting",
    "Merge",
    "Migrate",
    "Observe",
    "Protect",
    "Region",
    "Scan",
    "Scenario",
    "Set",
    "Sleep",
    "Step",
    "Unmap",
    "Unmerge",
    "Write",
    "page_content",
    "runs",
]

#: The version of the format that this code reads and writes.
FORMAT = 1

#: The label of a page that is all zeroes, and that of one that nobody has touched.
ZERO = "0"
UNTOUCHED = "-"


def page_content(label: str, size: int) -> bytes:
    """A page with a label's content: its UTF-8 bytes and one NUL, repeated and cut; so pages compare as labels do."""
    if label == ZERO:
        return bytes(size)
    unit = label.encode() + b"\0"
    return (unit * (size // len(unit) + 1))[:size]


def runs(pages: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Pages as runs of neighbours: (first, count)."""
    found: list[tuple[int, int]] = []
    for page in pages:
        if found and sum(found[-1]) == page:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((page, 1))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class KnobSetting:
    """A knob's value at the start; an optional one is left out on a kernel that lacks the knob."""

    value: int | str
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Region:
    """Private anonymous memory of one process, a label a page.

    :ivar node: an index among the nodes with memory, None for no VMA policy
    """

    process: str
    name: str
    pages: tuple[str, ...]
    node: int | None = None
    mergeable: bool = True


@dataclass(frozen=True, slots=True)
class Step:
    """What all steps have in common.

    :cvar kind: the key that names it in a file
    """

    kind: ClassVar[str]


@dataclass(frozen=True, slots=True)
class Scan(Step):
    """So many full scans; one that is under way is finished first, and counts."""

    kind: ClassVar[str] = "scan"
    times: int


@dataclass(frozen=True, slots=True)
class Batch(Step):
    """One batch with pages_to_scan = `size`."""

    kind: ClassVar[str] = "batch"
    size: int


@dataclass(frozen=True, slots=True)
class Migrate(Step):
    """move_pages(2), one address a frame; with MPOL_MF_MOVE_ALL where `shared`."""

    kind: ClassVar[str] = "migrate"
    process: str
    region: str
    to: int
    pages: tuple[int, ...] | None = None
    shared: bool = True


@dataclass(frozen=True, slots=True)
class Write(Step):
    """Write whole pages with a label's content."""

    kind: ClassVar[str] = "write"
    process: str
    region: str
    label: str
    pages: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Discard(Step):
    """MADV_DONTNEED."""

    kind: ClassVar[str] = "discard"
    process: str
    region: str
    pages: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Unmap(Step):
    """munmap."""

    kind: ClassVar[str] = "unmap"
    process: str
    region: str
    pages: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Break(Step):
    """Unshare those of the pages that are KSM pages at that moment; `node`: the caller's policy."""

    kind: ClassVar[str] = "break"
    process: str
    region: str
    pages: tuple[int, ...] | None = None
    node: int | None = None


@dataclass(frozen=True, slots=True)
class Advise(Step):
    """MADV_MERGEABLE or MADV_UNMERGEABLE."""

    kind: ClassVar[str] = "advise"
    process: str
    region: str
    mergeable: bool
    pages: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Protect(Step):
    """mprotect: readable, and writable or not."""

    kind: ClassVar[str] = "protect"
    process: str
    region: str
    writable: bool
    pages: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Merge(Step):
    """prctl(PR_SET_MEMORY_MERGE), on this scenario's regions of the process alone."""

    kind: ClassVar[str] = "prctl"
    process: str
    on: bool


@dataclass(frozen=True, slots=True)
class Fork(Step):
    """A child with all of a process's memory."""

    kind: ClassVar[str] = "fork"
    process: str
    child: str


@dataclass(frozen=True, slots=True)
class Exit(Step):
    """End a process."""

    kind: ClassVar[str] = "exit"
    process: str


@dataclass(frozen=True, slots=True)
class Set(Step):
    """Write knobs; with `fails` the write has to end with that errno's name."""

    kind: ClassVar[str] = "set"
    knobs: Mapping[Knob, int | str]
    fails: str = ""


@dataclass(frozen=True, slots=True)
class Unmerge(Step):
    """run=2, then run=0."""

    kind: ClassVar[str] = "unmerge"


@dataclass(frozen=True, slots=True)
class Sleep(Step):
    """Let time pass on the host's clock: for what hangs on it, as pruning does."""

    kind: ClassVar[str] = "sleep"
    milliseconds: int


@dataclass(frozen=True, slots=True)
class Observe(Step):
    """Look at counters and page tables."""

    kind: ClassVar[str] = "observe"
    label: str


@dataclass(frozen=True, slots=True)
class Expect:
    """What an observation has to show, on each host by itself.

    :ivar at: the observation's label
    :ivar profiles: only where the host behaves like one of these engine profiles; empty: everywhere
    :ivar counters: by name; one that a kernel lacks is not checked there
    :ivar groups: sets of pages that share a frame, and share it with no other page
    """

    at: str
    profiles: tuple[str, ...] = ()
    counters: Mapping[str, int] = field(default_factory=dict)
    groups: tuple[tuple[str, ...], ...] = ()
    nodes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scenario:
    """One file.

    :ivar file: where it came from, empty for one that was made up
    :ivar text: what it is about
    :ivar nodes: how many nodes with memory it needs
    """

    name: str
    regions: tuple[Region, ...]
    steps: tuple[Step, ...]
    nodes: int = 1
    text: str = ""
    knobs: Mapping[Knob, KnobSetting] = field(default_factory=dict)
    expects: tuple[Expect, ...] = ()
    file: str = ""

    def processes(self) -> tuple[str, ...]:
        """The processes that are there from the start, in order of first appearance."""
        return tuple(dict.fromkeys(region.process for region in self.regions))

    def observed(self) -> tuple[str, ...]:
        """The labels of its observations, in order."""
        return tuple(step.label for step in self.steps if isinstance(step, Observe))
