# SPDX-License-Identifier: GPL-2.0-or-later
"""The documents that are made of a survey: nodes, processes, and what of it a report has (docs/json.md)."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

from ksmd_ctl.codec import encode_fields
from ksmd_ctl.errors import KsmdError
from ksmd_ctl.host.memory import (
    PAGE_ITEM_BYTES,
    Process,
    ProcessClass,
    ProcessList,
    SplitBlocks,
    Survey,
    Unmergeable,
    UnmergeDemand,
)
from ksmd_ctl.host.sample import HostIdentity, Sample
from ksmd_ctl.reports.saving import NOBODY_SAW, Counters, CountersWatch, saved_frames_bytes, saving

#: How many groups have figures of their own.
KEPT: Final = 20
#: What all the rest is called; a group that has this very name is counted in it.
OTHER: Final = "other"
# How much larger one that is not shown must be to take the place of one that is.
_AHEAD: Final = 1.25


@dataclass(frozen=True, slots=True)
class Group:
    """Processes that belong together.

    :ivar merging_pages: mappings that were merged
    :ivar saved_bytes: what un-merging it alone takes, less ksmd's metadata; None where it isn't known of all
    :ivar split_zero_pages: pages of zeroes that splits of huge pages freed; None where it isn't known of all
    :ivar share_bytes: its part of what the host saves in frames; None where it isn't known of all
    :ivar remote_pages: merged pages that lie on another node than where they belong; None where it isn't known of all
    :ivar related: how many of its processes look like forks, for which saved_bytes says too much
    :ivar huge_bytes: huge pages in mergeable memory; None where it isn't known of all
    :ivar split: blocks that could be huge pages and hold merged or freed pages; None where it isn't known of all
    """

    group: str
    processes: int = 0
    merging_pages: int = 0
    saved_bytes: int | None = 0
    remote_pages: int | None = 0
    related: int = 0
    split_zero_pages: int | None = 0
    share_bytes: int | None = 0
    huge_bytes: int | None = 0
    split: SplitBlocks | None = field(default_factory=SplitBlocks)

    def plus(self, other: Group) -> Group:
        """Both together, under the first one's name."""
        return Group(
            self.group,
            self.processes + other.processes,
            self.merging_pages + other.merging_pages,
            _sum(self.saved_bytes, other.saved_bytes),
            _sum(self.remote_pages, other.remote_pages),
            self.related + other.related,
            _sum(self.split_zero_pages, other.split_zero_pages),
            _sum(self.share_bytes, other.share_bytes),
            _sum(self.huge_bytes, other.huge_bytes),
            None if self.split is None or other.split is None else self.split.plus(other.split),
        )

    def document(self) -> dict[str, object]:
        """As JSON (docs/json.md)."""
        found = encode_fields(self)
        del found["split"]
        return {**found, **_split_document(self.split)}


def _split_document(split: SplitBlocks | None) -> dict[str, object]:
    return {
        "split_blocks": None if split is None else split.count,
        "split_block_pages": None if split is None else split.pages,
        "low_yield_blocks": None if split is None else split.low,
        "low_yield_pages": None if split is None else split.low_pages,
    }


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


def process_saved_bytes(process: Process, page_size_bytes: int) -> int | None:
    """What un-merging a process alone takes: the kernel's ksm_process_profit, else by its formula; None before 6.1.

    The kernel counts pages that are not merged any more until ksmd comes by (never while it is stopped); these are
    left out where smaps shows it.
    """
    profit = process.profit_bytes
    if profit is None:
        if process.rmap_items is None:
            return None
        pages = process.merged_pages + (process.zero_pages or 0)
        profit = pages * page_size_bytes - process.rmap_items * PAGE_ITEM_BYTES
    return profit - process.gone_pages * page_size_bytes


def process_share_bytes(process: Process, page_size_bytes: int) -> int | None:
    """A process's part of what the host saves in frames: the parts of all make the whole (docs/saving.md)."""
    sharing, split, records = process.sharing_bytes, process.split_zero_pages, process.rmap_items
    if sharing is None or split is None or records is None:
        return None
    zeroes = max(0, process.zero_pages or 0) + split
    return sharing + zeroes * page_size_bytes - records * PAGE_ITEM_BYTES


@dataclass(frozen=True, slots=True)
class SplitZeroes:
    """Pages of zeroes in mergeable memory that splits of huge pages freed, and that nobody has written since.

    :ivar pages: the sum over all processes; None where it is unknown of one
    :ivar low_pages: of forks of one another, which map what was freed once, only those of one
    """

    pages: int | None
    low_pages: int | None

    @classmethod
    def of(cls, processes: Iterable[Process]) -> SplitZeroes:
        """What all processes have together."""
        pages = low = most_related = 0
        for process in processes:
            if process.split_zero_pages is None:
                return cls(None, None)
            pages += process.split_zero_pages
            if process.relatives:
                most_related = max(most_related, process.split_zero_pages)
            else:
                low += process.split_zero_pages
        return cls(pages, low + most_related)


def grouped(processes: Iterable[Process], page_size_bytes: int) -> dict[str, Group]:
    """The groups of processes, by name."""
    found: dict[str, Group] = {}
    for process in processes:
        name = process.group or OTHER
        one = Group(
            name,
            1,
            process.merged_pages,
            process_saved_bytes(process, page_size_bytes),
            process.remote_pages,
            1 if process.relatives else 0,
            process.split_zero_pages,
            process_share_bytes(process, page_size_bytes),
            # One without mergeable memory has none of either.
            process.huge_bytes if process.mergeable_mappings else 0,
            process.split_blocks if process.mergeable_mappings else SplitBlocks(),
        )
        found[name] = found.get(name, Group(name)).plus(one)
    return found


def largest_by(groups: Iterable[Group]) -> Callable[[Group], int]:
    """How large groups are: their share of what the host saves, else what un-merging them takes, else merged pages.

    Which of these is decided by what is known of all of them.
    """
    groups = tuple(groups)
    if all(group.share_bytes is not None for group in groups):
        return lambda group: group.share_bytes or 0
    if all(group.saved_bytes is not None for group in groups):
        return lambda group: group.saved_bytes or 0
    return lambda group: group.merging_pages


class Largest:
    """Chooses the groups that are shown by name.

    :param kept: how many at most
    """

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._shown: frozenset[str] = frozenset()

    def choose(self, groups: Mapping[str, Group]) -> tuple[tuple[Group, ...], Group]:
        """Those that are shown, the one that saves most first, and all others as one."""
        size = largest_by(groups.values())
        named = [group for group in groups.values() if group.group != OTHER]
        known = {group.group: group for group in named if group.merging_pages or size(group) > 0}
        chosen = [known[name] for name in self.names({name: size(group) for name, group in known.items()})]
        rest = Group(OTHER)
        for group in groups.values():
            if group.group not in self._shown:
                rest = rest.plus(group)
        return tuple(chosen), rest

    def names(self, sizes: Mapping[str, int]) -> tuple[str, ...]:
        """Those that are shown, the largest first; one that is not much larger does not take another's place.

        :param sizes: by name
        """

        def weight(name: str) -> tuple[float, str]:
            ahead = _AHEAD if name in self._shown and sizes[name] > 0 else 1.0
            # The name decides between equals, so that the same groups give the same choice.
            return -sizes[name] * ahead, name

        chosen = sorted(sorted(sizes, key=weight)[: self._kept], key=lambda name: (-sizes[name], name))
        self._shown = frozenset(chosen)
        return tuple(chosen)


FORMAT: Final = 1
# Each is a process that somebody made so on purpose, or nearly: some are enough.
_MOST_SKIPPED: Final = 20


def host_document(identity: HostIdentity) -> dict[str, object]:
    """What every document says of the host that it is about."""
    return {**encode_fields(identity), "simulated": identity.simulated}


def nodes_document(identity: HostIdentity, sample: Sample, survey: Survey, floor_bytes: int) -> dict[str, object]:
    """Where KSM pages are, who maps them from where, and what would be over if everything un-merged.

    :param floor_bytes: what has to stay free on the host and on every node
    """
    figures = _nodes(survey)
    nodes: dict[str, object] = {}
    for node in survey.topology.nodes:
        memory = sample.nodes.get(node.number)
        nodes[str(node.number)] = {
            "cpus": sorted(node.cpus),
            "total_bytes": node.memory_bytes,
            "free_bytes": None if memory is None else memory.free_bytes,
            "distances": {str(other): distance for other, distance in node.distances.items()},
            **figures[node.number],
        }
    return {
        "format": FORMAT,
        "host": host_document(identity),
        "survey": _facts(sample.time_seconds, survey),
        "numa": survey.topology.numa,
        "going_offline": survey.topology.going_offline,
        "nodes": nodes,
        "floor_bytes": floor_bytes,
        "exposure": [_exposure(item) for item in _above_floor(survey, floor_bytes)],
    }


def processes_document(
    identity: HostIdentity,
    listed: ProcessList,
    sample: Sample,
    survey: Survey | None = None,
    counters: Counters = NOBODY_SAW,
    switched: Sequence[Mapping[str, object]] | None = None,
) -> dict[str, object]:
    """Who gains how much, and of which class it is; the one with the most merged pages first.

    :param sample: of now
    :param survey: where the processes are from, None for a look of its own just before the sample
    :param counters: whether the host's counters say what is merged; those of each process are stale with them
    :param switched: who was switched on or off (`ksmd_ctl.switch.keep`); None where that isn't known
    """
    processes = listed.processes
    if counters is NOBODY_SAW and survey is None:
        watch = CountersWatch()
        watch.add(sample)
        mapped = listed.total(lambda process: process.ksm_mapped_pages)
        counters = watch.counters(sample.time_seconds, mapped_pages=mapped)
    page = identity.page_size_bytes
    order = sorted(processes, key=lambda process: (-process.merged_pages, process.id))
    found = grouped(order, page).values()
    size = largest_by(found)
    groups = sorted(found, key=lambda group: (-size(group), group.group))
    return {
        "format": FORMAT,
        "host": host_document(identity),
        "survey": None if survey is None else _facts(sample.time_seconds, survey),
        "stale_text": counters.text,
        "total": _total(processes, sample, counters, page),
        "processes": [encode_fields(_process(process, page)) for process in order],
        "groups": [group.document() for group in groups],
        "skipped": [encode_fields(one) for one in listed.skipped[:_MOST_SKIPPED]],
        "denied": list(listed.denied),
        "unmergeable": [encode_fields(_named(one)) for one in listed.unmergeable],
        "switched": switched,
    }


def _total(processes: Iterable[Process], sample: Sample, counters: Counters, page: int) -> dict[str, object]:
    """What the host saves in frames, what of it is the share of these processes, and what is left over."""
    processes = tuple(processes)
    zeroes = SplitZeroes.of(processes)
    shares = [process_share_bytes(process, page) for process in processes]
    known = [share for share in shares if share is not None]
    share = sum(known) if len(known) == len(shares) else None
    frames = saved_frames_bytes(saving(sample, page), counters, zeroes.pages, page)
    return {
        "split_zero_pages": zeroes.pages,
        "share_bytes": share,
        "saved_frames_bytes": frames,
        "other_bytes": None if share is None or frames is None else frames - share,
    }


def numa_section(
    survey: Survey | None, groups: Iterable[Group], other: Group, error: str, floor_bytes: int
) -> dict[str, object]:
    """What a report has of the latest survey, without what changes by itself (its age).

    :param error: why the latest try failed, empty where it didn't
    :param floor_bytes: what has to stay free on the host and on every node
    """
    if survey is None:
        return {
            "error": error,
            "forked_pages": None,
            "split_zero_pages": None,
            "split_zero_low_pages": None,
            "huge_bytes": None,
            **_split_document(None),
            "nodes": {},
            "groups": [],
            "other": None,
            "floor_bytes": floor_bytes,
            "exposure": [],
            "cgroups_over": None,
        }
    # In one order whatever they say: who renders them keeps what doesn't change.
    demands = _above_floor(survey, floor_bytes)
    places = sorted((item for item in demands if _is_place(item)), key=lambda item: item.where)
    over = [item for item in demands if item.over_bytes and not _is_place(item)]
    zeroes = SplitZeroes.of(survey.processes)
    total = functools.reduce(Group.plus, groups, other)
    return {
        "error": error,
        "cpu_seconds": survey.cpu_seconds,
        **_census(survey),
        "going_offline": survey.topology.going_offline,
        "forked_pages": sum(process.merged_pages for process in survey.processes if process.relatives),
        "split_zero_pages": zeroes.pages,
        "split_zero_low_pages": zeroes.low_pages,
        "huge_bytes": total.huge_bytes,
        **_split_document(total.split),
        "nodes": {str(node): found for node, found in _nodes(survey).items()},
        "groups": [group.document() for group in groups],
        "other": other.document(),
        "floor_bytes": floor_bytes,
        # Of cgroups there may be thousands; those that fit say nothing here.
        "exposure": [_exposure(item) for item in places + over[:_CGROUPS]],
        "cgroups_over": len(over),
    }


# A report is made each second: it names the worst only.
_CGROUPS: Final = 5


def _above_floor(survey: Survey, floor_bytes: int) -> list[UnmergeDemand]:
    """What is free on the host and on nodes less what has to stay free there, as a plan has it; most over comes first.

    In memory cgroups a reserve is kept instead, which the survey counts.
    """
    found = [
        replace(item, free_bytes=max(0, item.free_bytes - floor_bytes)) if _is_place(item) else item
        for item in survey.demands
    ]
    return sorted(found, key=lambda item: -item.over_bytes)


def _is_place(item: UnmergeDemand) -> bool:
    return not item.where.startswith("/")


def _nodes(survey: Survey) -> dict[int, dict[str, object]]:
    """By node: KSM pages (frames) on it, and mappings of them, in all and by those who belong elsewhere."""
    mapped: Counter[int] = Counter()
    remote: Counter[int] = Counter()
    for process in survey.processes:
        mapped.update(process.nodes)
        remote.update(process.remote_nodes)
    # Where one process's pages could not be looked at, a sum would leave them out without a word.
    known = all(process.remote_pages is not None or not process.merged_pages for process in survey.processes)
    census = survey.census
    return {
        node.number: {
            "ksm_pages": None if census is None else census.pages.get(node.number, 0),
            "ksm_pages_low": None if census is None else census.low.get(node.number, 0),
            "ksm_pages_high": None if census is None else census.high.get(node.number, 0),
            "mapped_pages": mapped[node.number] if known else None,
            "remote_pages": remote[node.number] if known else None,
        }
        for node in survey.topology.nodes
    }


def _census(survey: Survey) -> dict[str, object]:
    census = survey.census
    return {
        "complete": None if census is None else census.complete,
        "detection": None if census is None else census.detection.value,
        "witness": None if census is None else census.detection.value,  # its name before, deprecated
        "lacking": survey.lacking,
    }


def _facts(now: float, survey: Survey) -> dict[str, object]:
    age = max(0.0, now - survey.time_seconds)
    return {"age_seconds": age, "cpu_seconds": survey.cpu_seconds, **_census(survey)}


def _exposure(item: UnmergeDemand) -> dict[str, object]:
    return {**encode_fields(item), "over_bytes": item.over_bytes}


@dataclass(frozen=True, slots=True)
class NamedProcess:
    """What a document has of every process."""

    pid: int
    start_time_ticks: int
    name: str
    unit: str
    classes: frozenset[ProcessClass]
    reason: str


@dataclass(frozen=True, slots=True)
class ProcessReport(NamedProcess):
    """What a document has of a process with mergeable memory (docs/json.md)."""

    group: str
    merging_pages: int
    zero_pages: int | None
    rmap_items: int | None
    saved_bytes: int | None
    relatives: int | None
    nodes: Mapping[int, int]
    home: int | None
    remote_pages: int | None
    remote_ratio: float | None
    huge_bytes: int | None
    split_blocks: int | None
    split_block_pages: int | None
    low_yield_blocks: int | None
    low_yield_pages: int | None
    walked_bytes: int | None
    resident_bytes: int | None
    swapped_bytes: int | None
    file_bytes: int | None
    mergeable_mappings: int | None
    adjacent_mappings: int | None
    page_mappings: int | None
    zero_mapped_pages: int | None
    split_zero_pages: int | None
    share_bytes: int | None
    ksm_mapped_pages: int | None


def _named(process: Unmergeable) -> NamedProcess:
    id = process.id
    return NamedProcess(id.pid, id.start_time_ticks, process.name, process.unit, process.classes, process.reason)


def _process(process: Process, page_size_bytes: int) -> ProcessReport:
    seen, remote, split = sum(process.nodes.values()), process.remote_pages, process.split_blocks
    told: dict[str, Any] = {
        "pid": process.id.pid,
        "start_time_ticks": process.id.start_time_ticks,
        "merging_pages": process.merged_pages,
        "saved_bytes": process_saved_bytes(process, page_size_bytes),
        "remote_ratio": remote / seen if remote is not None and seen else None,
        "share_bytes": process_share_bytes(process, page_size_bytes),
        **_split_document(split),
    }
    # All others are as they are.
    names = (each.name for each in fields(ProcessReport))
    return ProcessReport(**{name: told[name] if name in told else getattr(process, name) for name in names})


def error_document(error: KsmdError) -> dict[str, object]:
    """An error inside of a document."""
    return {"what": error.what, "why": error.why, "hint": error.hint, "exit_code": int(error.exit_code)}
