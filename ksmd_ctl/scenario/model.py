# SPDX-License-Identifier: GPL-2.0-or-later
"""What a scenario file says, as values: regions, steps and expectations (docs/scenarios.md).

A step is one class a kind. The annotations of its fields say what the file may have there: the reader, the writer and
the JSON Schema are made from them. Pages are numbers within their region; None stands for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from enum import StrEnum
from typing import Annotated, ClassVar, get_type_hints

from ksmd_ctl.host.knobs import KNOBS, Knob

#: The version of the format that this code reads and writes.
FORMAT = 1

#: The label of a page that is all zeroes, and that of one that nobody has touched.
ZERO = "0"
UNTOUCHED = "-"

# The runner steps ksmd with the first three; the advisor's effects depend on ksmd's CPU time.
_NOT_AT_START = {Knob.RUN, Knob.PAGES_TO_SCAN, Knob.SLEEP_MILLISECS}
_ADVISOR = {knob for knob in KNOBS if knob.value.startswith("advisor_")}

#: Knobs that a scenario may have at its start.
SETTABLE = frozenset(KNOBS) - _NOT_AT_START - _ADVISOR

#: Knobs that a `set` step with `fails` may write: not the advisor's mode, which would undo pages_to_scan.
WRITABLE = frozenset(KNOBS) - {Knob.ADVISOR_MODE}


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


class Type(StrEnum):
    """What a value in a file has to be."""

    COUNT = "a whole number from 1 on"
    MILLISECONDS = "a whole number of milliseconds, 1 to 60000"
    NAME = "a name: letters, digits, _ and -"
    LABEL = "a label: text without NUL, not empty and not -"
    TEXT = "text that is not empty"
    PAGE = "the number of a page, from 0 on"
    PAGES = 'pages as in "3" or "0-2,5"'
    NODE = "the index of a node, from 0 on"
    FLAG = "true or false"
    TRUE = "true"
    KNOBS = "a table of knobs and their values"


@dataclass(frozen=True, slots=True)
class Argument:
    """A key of a step's table.

    :ivar key: empty in an annotation: the field's name
    :ivar attribute: the step's field; this and `required` are filled in by `arguments`
    """

    type: Type
    text: str
    key: str = ""
    required: bool = True
    attribute: str = ""


Process = Annotated[str, Argument(Type.NAME, "the process")]
RegionName = Annotated[str, Argument(Type.NAME, "its region")]
Pages = Annotated[tuple[int, ...] | None, Argument(Type.PAGES, "pages of the region; all of them where left out")]


@dataclass(frozen=True, slots=True)
class Step:
    """What all steps have in common.

    :cvar kind: the key that names it in a file
    :cvar bare: it takes one value, not a table of arguments
    """

    kind: ClassVar[str]
    bare: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class Scan(Step):
    """So many full scans; one that is under way is finished first, and counts."""

    kind: ClassVar[str] = "scan"
    bare: ClassVar[bool] = True
    times: Annotated[int, Argument(Type.COUNT, "how many")]


@dataclass(frozen=True, slots=True)
class Batch(Step):
    """One batch of so many pages: a scan stopped in the middle."""

    kind: ClassVar[str] = "batch"
    bare: ClassVar[bool] = True
    size: Annotated[int, Argument(Type.COUNT, "pages_to_scan")]


@dataclass(frozen=True, slots=True)
class RegionStep(Step):
    """What steps about pages of a region have in common."""

    process: Process
    region: RegionName
    pages: Pages = field(default=None, kw_only=True)


@dataclass(frozen=True, slots=True)
class Migrate(RegionStep):
    """move_pages(2), one address a frame."""

    kind: ClassVar[str] = "migrate"
    to: Annotated[int, Argument(Type.NODE, "the node that they go to")]
    shared: Annotated[bool, Argument(Type.FLAG, "MPOL_MF_MOVE_ALL (default), or plain MPOL_MF_MOVE")] = True


@dataclass(frozen=True, slots=True)
class Write(RegionStep):
    """Write whole pages."""

    kind: ClassVar[str] = "write"
    label: Annotated[str, Argument(Type.LABEL, "their content")]
    pages: Annotated[
        tuple[int, ...] | None, Argument(Type.PAGES, "or several pages; all of them where both are left out")
    ] = field(default=None, kw_only=True)


@dataclass(frozen=True, slots=True)
class Discard(RegionStep):
    """MADV_DONTNEED."""

    kind: ClassVar[str] = "discard"


@dataclass(frozen=True, slots=True)
class Unmap(RegionStep):
    """munmap."""

    kind: ClassVar[str] = "unmap"


@dataclass(frozen=True, slots=True)
class Break(RegionStep):
    """Unshare, from outside, those of the pages that are KSM pages at that moment."""

    kind: ClassVar[str] = "break"
    node: Annotated[int | None, Argument(Type.NODE, "the caller's policy; where left out, the first node")] = None


@dataclass(frozen=True, slots=True)
class Advise(RegionStep):
    """MADV_MERGEABLE or MADV_UNMERGEABLE."""

    kind: ClassVar[str] = "advise"
    mergeable: Annotated[bool, Argument(Type.FLAG, "which of the two")]


@dataclass(frozen=True, slots=True)
class Protect(RegionStep):
    """mprotect: read only, or readable and writable again."""

    kind: ClassVar[str] = "protect"
    writable: Annotated[bool, Argument(Type.FLAG, "which of the two")]


@dataclass(frozen=True, slots=True)
class Merge(Step):
    """prctl(PR_SET_MEMORY_MERGE); of the process's memory only the regions are left mergeable."""

    kind: ClassVar[str] = "prctl"
    process: Process
    on: Annotated[bool, Argument(Type.FLAG, "on or off")]


@dataclass(frozen=True, slots=True)
class Fork(Step):
    """A child with all of the process's memory."""

    kind: ClassVar[str] = "fork"
    process: Process
    child: Annotated[str, Argument(Type.NAME, "the child's name", key="as")]


@dataclass(frozen=True, slots=True)
class Exit(Step):
    """End the process."""

    kind: ClassVar[str] = "exit"
    process: Process


@dataclass(frozen=True, slots=True)
class Set(Step):
    """Write knobs."""

    kind: ClassVar[str] = "set"
    bare: ClassVar[bool] = True
    knobs: Annotated[Mapping[Knob, int | str], Argument(Type.KNOBS, "knobs and values")]
    fails: str = ""


@dataclass(frozen=True, slots=True)
class Unmerge(Step):
    """run=2, then run=0."""

    kind: ClassVar[str] = "unmerge"
    bare: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class Sleep(Step):
    """Let time pass on the host's clock, for pruning of chains."""

    kind: ClassVar[str] = "sleep"
    bare: ClassVar[bool] = True
    milliseconds: Annotated[int, Argument(Type.MILLISECONDS, "how long")]


@dataclass(frozen=True, slots=True)
class Observe(Step):
    """Look at counters and page tables; the label is for [[expect]] and reports."""

    kind: ClassVar[str] = "observe"
    bare: ClassVar[bool] = True
    label: Annotated[str, Argument(Type.TEXT, "the observation's label")]


# The other key for `Write.pages`.
_PAGE = Argument(Type.PAGE, "the page", "page", required=False, attribute="pages")


def arguments(step: type[Step]) -> tuple[Argument, ...]:
    """The keys of a step's table."""
    hints = get_type_hints(step, include_extras=True)
    found = []
    for each in fields(step):
        if hasattr(hints[each.name], "__metadata__"):
            (argument,) = hints[each.name].__metadata__
            required = each.default is MISSING
            found.append(replace(argument, key=argument.key or each.name, required=required, attribute=each.name))
    return (*found, _PAGE) if step is Write else tuple(found)


_REGION_STEPS = (Migrate, Write, Discard, Unmap, Break, Advise, Protect)
_STEPS = (Scan, Batch, *_REGION_STEPS, Merge, Fork, Exit, Set, Unmerge, Sleep, Observe)

#: The classes of steps, by the key that names them in a file.
KINDS: dict[str, type[Step]] = {step.kind: step for step in _STEPS}


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

    :ivar file: where it came from, empty for one that was generated
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
