# SPDX-License-Identifier: GPL-2.0-or-later
"""The documents that are made of a survey: nodes, processes, and what of it a report has (docs/json.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from ksmd_ctl.codec import encode_fields
from ksmd_ctl.errors import KsmdError
from ksmd_ctl.host.knobs import RUN_OFFLINE
from ksmd_ctl.host.memory import PAGE_ITEM_BYTES, Process, ProcessList, Survey, Unmergeable, UnmergeDemand
from ksmd_ctl.host.sample import HostIdentity, Sample
from ksmd_ctl.reports.saving import CURRENT, NOBODY_SAW, Counters

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
    :ivar saved_bytes: what merging saves, less ksmd's metadata; None where it isn't known of all
    :ivar remote_pages: merged pages that lie on another node than where they belong; None where it isn't known of all
    :ivar related: how many of its processes look like forks, for which saved_bytes says too much
    """

    group: str
    processes: int = 0
    merging_pages: int = 0
    saved_bytes: int | None = 0
    remote_pages: int | None = 0
    related: int = 0

    def plus(self, other: Group) -> Group:
        """Both together, under the first one's name."""
        return Group(
            self.group,
            self.processes + other.processes,
            self.merging_pages + other.merging_pages,
            _sum(self.saved_bytes, other.saved_bytes),
            _sum(self.remote_pages, other.remote_pages),
            self.related + other.related,
        )


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


def process_saved_bytes(process: Process, page_size_bytes: int) -> int | None:
    """What merging saves for a process: the kernel's ksm_process_profit, else by its formula; None before 6.1."""
    if process.profit_bytes is not None:
        return process.profit_bytes
    if process.rmap_items is None:
        return None
    pages = process.merged_pages + (process.zero_pages or 0)
    return pages * page_size_bytes - process.rmap_items * PAGE_ITEM_BYTES


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
        )
        found[name] = found.get(name, Group(name)).plus(one)
    return found


def largest_by(groups: Iterable[Group]) -> Callable[[Group], int]:
    """How large groups are: what they save (docs/saving.md); by merged pages where that isn't known of all."""
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

        def weight(group: Group) -> tuple[float, str]:
            amount = size(group)
            ahead = _AHEAD if group.group in self._shown and amount > 0 else 1.0
            # The name decides between equals, so that the same groups give the same choice.
            return -amount * ahead, group.group

        named = [group for group in groups.values() if group.group != OTHER]
        known = [group for group in named if group.merging_pages or size(group) > 0]
        chosen = sorted(sorted(known, key=weight)[: self._kept], key=lambda group: (-size(group), group.group))
        self._shown = frozenset(group.group for group in chosen)
        rest = Group(OTHER)
        for group in groups.values():
            if group.group not in self._shown:
                rest = rest.plus(group)
        return tuple(chosen), rest


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
) -> dict[str, object]:
    """Who gains how much, and of which class it is; the one with the most merged pages first.

    :param sample: of now
    :param survey: where the processes are from, None for a look of its own
    :param counters: whether the host's counters say what is merged; those of each process stand still with them
    """
    processes = listed.processes
    run = sample.number("run")
    stopped = run is not None and int(run) & ~RUN_OFFLINE != 1
    if counters is NOBODY_SAW and not (stopped and any(process.merged_pages for process in processes)):
        counters = CURRENT
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
        "processes": [_process(process, page) for process in order],
        "groups": [encode_fields(group) for group in groups],
        "skipped": [encode_fields(one) for one in listed.skipped[:_MOST_SKIPPED]],
        "denied": list(listed.denied),
        "unmergeable": [_named(one) for one in listed.unmergeable],
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
    return {
        "error": error,
        "cpu_seconds": survey.cpu_seconds,
        **_census(survey),
        "going_offline": survey.topology.going_offline,
        "forked_pages": sum(process.merged_pages for process in survey.processes if process.relatives),
        "nodes": {str(node): found for node, found in _nodes(survey).items()},
        "groups": [encode_fields(group) for group in groups],
        "other": encode_fields(other),
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
        "witness": None if census is None else census.detection.value,
        "lacking": survey.lacking,
    }


def _facts(now: float, survey: Survey) -> dict[str, object]:
    age = max(0.0, now - survey.time_seconds)
    return {"age_seconds": age, "cpu_seconds": survey.cpu_seconds, **_census(survey)}


def _exposure(item: UnmergeDemand) -> dict[str, object]:
    return {**encode_fields(item), "over_bytes": item.over_bytes}


def _named(process: Unmergeable | Process) -> dict[str, object]:
    return {
        **encode_fields(process.id),
        "name": process.name,
        "unit": process.unit,
        "classes": sorted(kind.value for kind in process.classes),
        "reason": process.reason,
    }


def _process(process: Process, page_size_bytes: int) -> dict[str, object]:
    seen = sum(process.nodes.values())
    remote = process.remote_pages
    return {
        **_named(process),
        "group": process.group,
        "merging_pages": process.merged_pages,
        "zero_pages": process.zero_pages,
        "rmap_items": process.rmap_items,
        "saved_bytes": process_saved_bytes(process, page_size_bytes),
        "relatives": process.relatives,
        "nodes": {str(node): pages for node, pages in process.nodes.items()},
        "home": process.home,
        "remote_pages": remote,
        "remote_ratio": remote / seen if remote is not None and seen else None,
        "huge_bytes": process.huge_bytes,
        "split_blocks": process.split_blocks,
        "walked_bytes": process.walked_bytes,
        "resident_bytes": process.resident_bytes,
        "swapped_bytes": process.swapped_bytes,
        "file_bytes": process.file_bytes,
        "mergeable_mappings": process.mergeable_mappings,
        "zero_mapped_pages": process.zero_mapped_pages,
    }


def error_document(error: KsmdError) -> dict[str, object]:
    """An error inside of a document."""
    return {"what": error.what, "why": error.why, "hint": error.hint, "exit_code": int(error.exit_code)}
