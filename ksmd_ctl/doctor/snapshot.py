# SPDX-License-Identifier: GPL-2.0-or-later
"""What the doctor sees: two reports some seconds apart, nodes, processes, contents, and what it advised before."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from ksmd_ctl.codec import decode, dump, encode, load
from ksmd_ctl.doctor.finding import Figure, Unknown
from ksmd_ctl.errors import Denied, HostError, Unparsable, errno_text
from ksmd_ctl.figures import HUGE_PAGE_PAGES
from ksmd_ctl.host.container import Container
from ksmd_ctl.host.duplicates import DuplicatePages
from ksmd_ctl.host.fields import FIELDS_BY_NAME
from ksmd_ctl.host.knobs import RUN_OFFLINE, Knob
from ksmd_ctl.host.memory import Attempts, ProcessClass
from ksmd_ctl.host.sample import Writer
from ksmd_ctl.reports.document import doubted, number, part, parts, text
from ksmd_ctl.statefiles import make_directory, read_file, replace_file
from ksmd_ctl.switch.persist import MemoryKsm, MemoryKsmUnit

T = TypeVar("T")

#: Where figures are from that are no fields of a sample.
CONTENTS: Final = "contents of memory"
NODES: Final = "ksmd-ctl nodes"
PROCESSES: Final = "ksmd-ctl processes"
ATTEMPTS: Final = "tracepoint ksm:ksm_merge_with_ksm_page"
SERVICE: Final = "ksmd-ctl status"
WRITERS: Final = "processes by name"


#: The file in the state directory that keeps what was advised.
FILE: Final = "doctor.json"
_FORMAT: Final = 1
_MOST_BYTES: Final = 1 << 16


def _decoded(kind: type[T], document: Mapping[str, object]) -> T:
    # Only what this version knows: the service may be of another one.
    names = {field.name for field in fields(cast(Any, kind))}
    return decode(kind, {name: value for name, value in document.items() if name in names and value is not None})


@dataclass(frozen=True, slots=True)
class ProcessView:
    """One process of a processes document (docs/json.md); counts are 0 where this kernel doesn't tell."""

    pid: int
    name: str = ""
    group: str = ""
    unit: str = ""
    classes: frozenset[str] = frozenset()
    reason: str = ""
    merging_pages: int = 0
    saved_bytes: int | None = None
    relatives: int = 0
    huge_bytes: int = 0
    split_blocks: int = 0
    low_yield_blocks: int = 0
    low_yield_pages: int = 0
    walked_bytes: int = 0
    resident_bytes: int = 0
    swapped_bytes: int = 0
    file_bytes: int = 0
    mergeable_mappings: int = 0
    adjacent_mappings: int = 0
    page_mappings: int | None = None
    zero_pages: int = 0
    zero_mapped_pages: int = 0
    split_zero_pages: int = 0

    @classmethod
    def all_of(cls, document: Mapping[str, object]) -> tuple[ProcessView, ...]:
        """The processes of a document.

        :raises Unparsable: it is not of that form
        """
        try:
            return tuple(_decoded(cls, one) for one in parts(document, "processes"))
        except ValueError as error:
            raise Unparsable("reading what the service says of processes", str(error)) from error

    @property
    def mergeable(self) -> bool:
        return ProcessClass.MERGEABLE in self.classes

    @property
    def hole_bytes(self) -> int:
        """Mergeable address space in which nothing is."""
        return max(0, self.walked_bytes - self.resident_bytes - self.swapped_bytes)

    def __str__(self) -> str:
        label = self.name if self.group in ("", self.name) else f"{self.name} of {self.group}"
        return f"{label} (pid {self.pid})"


@dataclass(frozen=True, slots=True)
class Advised:
    """An advice, by what it was given for.

    :ivar pages: that it was to bring
    :ivar change: the last change of knobs before it, by its id; empty for none
    :ivar vain: it was followed, and brought nothing
    """

    pages: int
    change: str
    vain: bool = False


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that the doctor goes by.

    :ivar before: a report, and `after` one that is `seconds` younger; only the latter has a healing or decision
    :ivar nodes: a nodes document, None where it could not be had
    :ivar listed: the processes that matter to KSM, None where they could not be had
    :ivar duplicates: equal contents, None where they were not compared
    :ivar attempts: what ksmd tried to merge between the reports, None where that could not be counted
    :ivar advised: what was advised before, by the finding
    :ivar unknown: what could not be looked at
    :ivar holder: what holds the lock of this host now, where no service runs; empty for nothing
    :ivar sparse_seconds_per_gib: how long run = 2 takes for a GiB of empty address space, measured on this kernel; None
        where that was not asked, or could not be told
    :ivar memory_ksm: what comes of ``MemoryKSM=`` in units here; None where that was not looked at
    :ivar systemd: the version of the systemd that runs; empty where there is none
    :ivar memory_ksm_units: the units that have that setting
    :ivar container: the container that the doctor is in, None outside of any
    """

    before: Mapping[str, object]
    after: Mapping[str, object]
    seconds: float
    nodes: Mapping[str, object] | None = None
    listed: tuple[ProcessView, ...] | None = None
    duplicates: DuplicatePages | None = None
    attempts: Attempts | None = None
    advised: Mapping[str, Advised] = field(default_factory=dict)
    unknown: tuple[Unknown, ...] = ()
    holder: str = ""
    sparse_seconds_per_gib: float | None = None
    memory_ksm: MemoryKsm | None = None
    systemd: str = ""
    memory_ksm_units: tuple[MemoryKsmUnit, ...] = ()
    container: Container | None = None

    @property
    def processes(self) -> tuple[ProcessView, ...]:
        return self.listed or ()

    # -- what the reports say ----------------------------------------------------------------------------------

    def reading(self, name: str) -> int | float | None:
        """A field's value, None where there is none."""
        return number(part(self.after, "readings"), name)

    def delta(self, name: str) -> int | float | None:
        """By how much a counter has risen between the reports; None where that isn't known."""
        first, last = number(part(self.before, "readings"), name), self.reading(name)
        return None if first is None or last is None or last < first else last - first

    def grown(self, name: str) -> int | float:
        """How a figure has changed between the reports; 0 where that isn't known."""
        first, last = number(part(self.before, "readings"), name), self.reading(name)
        return 0 if first is None or last is None else last - first

    @property
    def brought(self) -> int | float:
        """Pages that ksmd has merged, replaced by the zero page or split off huge pages between the reports.

        What khugepaged made huge again meanwhile is no progress.
        """
        again = (self.delta("thp_collapse_alloc") or 0) * HUGE_PAGE_PAGES
        split = max(0, self.grown("split_folio_pages") - again)
        return self.grown("pages_sharing") + self.grown("ksm_zero_pages") + split

    @property
    def run(self) -> int | None:
        """0, 1 or 2; None where that isn't known."""
        found = self.reading("run")
        return None if found is None else int(found) & ~RUN_OFFLINE

    @property
    def merging(self) -> bool:
        return self.run == 1

    @property
    def page(self) -> int:
        return int(number(part(self.after, "host"), "page_size_bytes") or 4096)

    @property
    def tracked(self) -> int:
        """Pages that ksmd keeps something about."""
        names = ("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile")
        return sum(int(self.reading(name) or 0) for name in names)

    @property
    def mergeable_pages(self) -> int:
        """Pages that a full scan has to look at: those of mergeable memory, else those that ksmd knows."""
        return max(self.tracked, sum(one.resident_bytes for one in self.processes) // self.page)

    @property
    def merged_pages(self) -> int:
        """Mappings that are merged."""
        return int(self.reading("pages_shared") or 0) + int(self.reading("pages_sharing") or 0)

    @property
    def saved_bytes(self) -> int | None:
        found = number(part(self.after, "derived"), "saved_bytes")
        return None if found is None else int(found)

    @property
    def stale_text(self) -> str:
        """Why what is merged and saved is out of date, or may be, in words; empty where it is not."""
        return text(part(self.after, "derived"), "stale_text")

    def saved_figure(self, name: str) -> Figure:
        """What is saved as evidence, marked where it may be out of date."""
        if self.saved_bytes is None:
            return Figure(name, "unknown", SERVICE)
        return Figure(name, self.saved_bytes, doubted(SERVICE, self.stale_text), "bytes")

    @property
    def zeroes_uncounted(self) -> bool:
        """Whether ksmd replaces pages of zeroes, and this kernel counts none of them (before 6.6)."""
        lacks = text(part(self.after, "errors", "ksm_zero_pages"), "kind") == "absent"
        return lacks and self.reading(Knob.USE_ZERO_PAGES) == 1

    @property
    def split_zero_bytes(self) -> int:
        """What splits of huge pages gave back, and no counter of KSM has; 0 where it isn't known."""
        return sum(one.split_zero_pages for one in self.processes) * self.page

    @property
    def service(self) -> bool:
        """Whether a service runs."""
        return bool(part(self.after, "daemon"))

    @property
    def policy(self) -> str:
        """The service's policy, empty without one."""
        return text(self.after, "policy")

    @property
    def manages(self) -> bool:
        """Whether the service may write knobs."""
        return self.service and self.policy not in ("", "observe")

    @property
    def begun(self) -> Mapping[str, object]:
        """The change of knobs that was begun and is not over, during which ksmd may be stopped."""
        return part(self.after, "transaction", "running")

    @property
    def changing(self) -> bool:
        """Whether somebody is at it."""
        return bool(self.begun) and (self.service or bool(self.holder))

    @property
    def last_change(self) -> Mapping[str, object]:
        """The last change of knobs by ksmd-ctl that is over."""
        return part(self.after, "transaction", "last")

    def unmerged(self, reason: str) -> int | None:
        """How many pages could be merged and are not, by the service's count; None where it has none."""
        found = number(part(self.after, "healing", "unrealised"), reason)
        return None if found is None else int(found)

    def wanted(self, name: str) -> object:
        """What the service wants of a knob, None where it wants nothing."""
        return part(self.after, "knobs", name).get("wanted")

    def knobs(self, state: str) -> Iterator[tuple[str, Mapping[str, object]]]:
        """The knobs that are in a state."""
        for name in part(self.after, "knobs"):
            knob = part(self.after, "knobs", name)
            if text(knob, "state") == state:
                yield name, knob

    @property
    def writers(self) -> list[Writer]:
        """Who else is known to write the knobs."""
        found = []
        for one in parts(self.after, "writers"):
            with suppress(ValueError):
                found.append(_decoded(Writer, one))
        return found

    # -- figures -------------------------------------------------------------------------------------------

    def figure(self, name: str, unit: str = "") -> Figure:
        """A field as evidence."""
        found = part(self.after, "readings").get(name)
        value = found if isinstance(found, int | float | str) else "unknown"
        return Figure(name, value, source_of(name), unit)

    def rise(self, name: str) -> Figure:
        """By how much a field rose, as evidence."""
        return Figure(f"{name} in {self.seconds:.0f} s", f"{self.grown(name):+,}", source_of(name))

    # -- processes -----------------------------------------------------------------------------------------

    def of_class(self, kind: ProcessClass) -> list[ProcessView]:
        """The processes of a class."""
        return [one for one in self.processes if kind in one.classes]

    def set_command(self, **knobs: int | str) -> str:
        """The command that gives knobs a value: for good where the service declares them, else at once.

        What a policy steers nobody should set beside it: then it is the command that shows the policy's reasons.
        """
        words = [f"{name}={value}" for name, value in knobs.items()]
        if not any(self.wanted(name) is not None for name in knobs):
            return f"ksmd-ctl set {' '.join(words)}"
        if self.policy != "fixed":
            return "ksmd-ctl status --explain"
        return self.configure_command({f"knobs.{name}": value for name, value in knobs.items()})

    def pulse_command(self, knob: Knob, value: int, seconds: int) -> str:
        """The command that gives a switch a value for some seconds."""
        begin, end = (self.set_command(**{knob: one}) for one in (value, 1 - value))
        return begin if begin == end else f"{begin} && sleep {seconds} && {end}"

    def configure_command(self, settings: Mapping[str, int | str | bool]) -> str:
        """The command that gives the service further settings, in a file of their own."""
        # A text, a number or a flag reads the same in JSON and in TOML.
        text = "".join(f"{name} = {json.dumps(value)}\\n" for name, value in settings.items())
        first = next(iter(settings)).rpartition(".")[2]
        return f"printf '{text}' > /etc/ksmd-ctl/conf.d/{first}.toml && systemctl reload ksmd-ctl"


def source_of(name: str) -> str:
    """Where a field is read."""
    field = FIELDS_BY_NAME.get(name)
    return field.source.value.partition(" (")[0] if field else SERVICE


def largest(processes: Iterable[ProcessView], by: str, most: int = 3) -> list[ProcessView]:
    """Those with the most of something, for evidence."""
    return sorted(processes, key=lambda one: (-getattr(one, by), one.pid))[:most]


def figures_of(
    processes: Iterable[ProcessView], by: str, unit: str, what: str = "{}", most: int = 3
) -> tuple[Figure, ...]:
    """What those have that have the most of something, as evidence.

    :param by: the field of `ProcessView`
    :param what: what the figure is called, with ``{}`` for the process
    """
    worst = largest(processes, by, most)
    return tuple(Figure(what.format(one), getattr(one, by), PROCESSES, unit) for one in worst)


def stop_command(writer: Writer) -> str:
    """The command that ends a program that writes the knobs; empty for the kernel's advisor."""
    if writer.units:
        names = shlex.join(unit.removesuffix(".service") for unit in writer.units)
        return f"systemctl disable --now {names}"
    return f"kill {writer.pid}" if writer.pid is not None else ""


@dataclass(frozen=True, slots=True)
class _Kept:
    """What was advised, as the file has it."""

    format: int
    boot_id: str
    advised: Mapping[str, Advised]


def read_advised(directory: Path, boot_id: str) -> Mapping[str, Advised]:
    """What was advised since this boot, by the finding's code. A file that makes no sense says nothing.

    :raises Unreadable: there is one, and it can't be read
    """
    content = read_file(directory / FILE, "reading what was advised before", _MOST_BYTES)
    try:
        kept = decode(_Kept, load(content or b""))
    except ValueError:
        return {}
    return kept.advised if (kept.format, kept.boot_id) == (_FORMAT, boot_id) else {}


def write_advised(directory: Path, boot_id: str, advised: Mapping[str, Advised]) -> None:
    """Keep what was advised.

    :raises HostError: it can't be written
    """
    try:
        make_directory(directory)
        replace_file(directory / FILE, dump(encode(_Kept(_FORMAT, boot_id, advised))))
    except OSError as error:
        kind = Denied if isinstance(error, PermissionError) else HostError
        why = f"{directory / FILE}: {errno_text(error.errno or 0)}"
        raise kind("keeping what was advised", why, path=str(directory / FILE), errno=error.errno) from error
