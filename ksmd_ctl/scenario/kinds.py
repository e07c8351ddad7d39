# SPDX-License-Identifier: GPL-2.0-or-later
"""The one table of step kinds: what each takes in a file. Loader, writer and JSON Schema are made from it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ksmd_ctl.knobs import KNOBS, Knob
from ksmd_ctl.scenario.model import (
    Advise,
    Batch,
    Break,
    Discard,
    Exit,
    Fork,
    Merge,
    Migrate,
    Observe,
    Protect,
    Scan,
    Set,
    Sleep,
    Step,
    Unmap,
    Unmerge,
    Write,
)

__all__ = ["KINDS", "SETTABLE", "WRITABLE", "Argument", "Kind", "Type"]


class Type(StrEnum):
    """What a value has to be."""

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
    """One key of a step's table.

    :ivar field: the step's attribute, where that has another name
    """

    key: str
    type: Type
    text: str
    required: bool = True
    field: str = ""

    @property
    def attribute(self) -> str:
        return self.field or self.key


@dataclass(frozen=True, slots=True)
class Kind:
    """A step kind. It takes a table of arguments, or, with `bare`, one value.

    :ivar make: its class
    :ivar not_both: keys of which one at most may be there
    """

    make: type[Step]
    text: str
    arguments: tuple[Argument, ...] = ()
    bare: Argument | None = None
    not_both: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.make.kind


_PROCESS = Argument("process", Type.NAME, "the process")
_REGION = Argument("region", Type.NAME, "its region")
_PAGES = Argument("pages", Type.PAGES, "pages of the region; all of them where left out", required=False)

_ALL: tuple[Kind, ...] = (
    Kind(
        Scan,
        "So many full scans; one that is under way is finished first, and counts.",
        bare=Argument("times", Type.COUNT, "how many"),
    ),
    Kind(
        Batch,
        "One batch of so many pages: a scan stopped in the middle.",
        bare=Argument("size", Type.COUNT, "pages_to_scan"),
    ),
    Kind(
        Migrate,
        "move_pages(2), one address a frame.",
        (
            _PROCESS,
            _REGION,
            _PAGES,
            Argument("to", Type.NODE, "the node that they go to"),
            Argument("shared", Type.FLAG, "MPOL_MF_MOVE_ALL (default), or plain MPOL_MF_MOVE", required=False),
        ),
    ),
    Kind(
        Write,
        "Write whole pages.",
        (
            _PROCESS,
            _REGION,
            Argument("page", Type.PAGE, "the page", required=False),
            Argument("pages", Type.PAGES, "or several pages; all of them where both are left out", required=False),
            Argument("label", Type.LABEL, "their content"),
        ),
        not_both=("page", "pages"),
    ),
    Kind(Discard, "MADV_DONTNEED.", (_PROCESS, _REGION, _PAGES)),
    Kind(Unmap, "munmap.", (_PROCESS, _REGION, _PAGES)),
    Kind(
        Break,
        "Unshare, from outside, those of the pages that are KSM pages at that moment.",
        (
            _PROCESS,
            _REGION,
            _PAGES,
            Argument("node", Type.NODE, "the caller's policy; where left out, the first node", required=False),
        ),
    ),
    Kind(
        Advise,
        "MADV_MERGEABLE or MADV_UNMERGEABLE.",
        (_PROCESS, _REGION, _PAGES, Argument("mergeable", Type.FLAG, "which of the two")),
    ),
    Kind(
        Protect,
        "mprotect: read only, or readable and writable again.",
        (_PROCESS, _REGION, _PAGES, Argument("writable", Type.FLAG, "which of the two")),
    ),
    Kind(
        Merge,
        "prctl(PR_SET_MEMORY_MERGE); of the process's memory only the regions are left mergeable.",
        (_PROCESS, Argument("on", Type.FLAG, "on or off")),
    ),
    Kind(
        Fork,
        "A child with all of the process's memory.",
        (_PROCESS, Argument("as", Type.NAME, "the child's name", field="child")),
    ),
    Kind(Exit, "End the process.", (_PROCESS,)),
    Kind(Set, "Write knobs.", bare=Argument("knobs", Type.KNOBS, "knobs and values")),
    Kind(Unmerge, "run=2, then run=0.", bare=Argument("", Type.TRUE, "true")),
    Kind(
        Sleep,
        "Let time pass on the host's clock, for pruning of chains.",
        bare=Argument("milliseconds", Type.MILLISECONDS, "how long"),
    ),
    Kind(
        Observe,
        "Look at counters and page tables; the label is for [[expect]] and reports.",
        bare=Argument("label", Type.TEXT, "the observation's label"),
    ),
)

#: By the key that names the step in a file.
KINDS: dict[str, Kind] = {kind.name: kind for kind in _ALL}

# The runner steps ksmd with the first three; what the advisor does hangs on ksmd's CPU time.
_NOT_AT_START = {Knob.RUN, Knob.PAGES_TO_SCAN, Knob.SLEEP_MILLISECS}
_ADVISOR = {knob for knob in KNOBS if knob.value.startswith("advisor_")}

#: Knobs that a scenario may have at its start.
SETTABLE = frozenset(KNOBS) - _NOT_AT_START - _ADVISOR

#: Knobs that a `set` step may write: with `fails`, all but the advisor's mode, which would undo pages_to_scan.
WRITABLE = frozenset(KNOBS) - {Knob.ADVISOR_MODE}
