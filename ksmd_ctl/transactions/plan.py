# SPDX-License-Identifier: GPL-2.0-or-later
"""What a change of knobs would do, calculated from a sample and an inventory before anything is changed.

`merge_across_nodes` and `max_page_sharing` can only be changed while nothing is merged (mm/ksm.c,
merge_across_nodes_store). Un-merging takes memory: on each process's home node, on the host, and in every memory
cgroup above it, where it may be new (findings F10). All that a plan says is an upper bound.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from ksmd_ctl.config.model import Config
from ksmd_ctl.errors import Absent, ReadError, Refused, UsageError
from ksmd_ctl.host.knobs import KNOBS, Knob, KnobValue
from ksmd_ctl.host.memory import HomeRange, Inventory, ProcessClass, ProcessId, ProcessMemory, UnmergeDemand
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.knobs.reconcile import Write, found_value, ordered
from ksmd_ctl.policies.counters import TRACKED

# What else takes as long as un-merging so many pages: a call, and the looks at a process before and after it.
_CALL_PAGES: Final = 32
_PROCESS_PAGES: Final = 600
#: What run = 2 takes for each GiB of mergeable address space with pages in it, merged or not (findings F11).
SPARSE_SECONDS_PER_GIB: Final = 0.015
#: Ranges of one batch, so that it fits into a request to the broker.
MAXIMUM_RANGES: Final = 1024
#: run = 2 is chosen where it takes at most this share of what is free anywhere.
_RUN_2_SHARE: Final = 0.5
#: What a page takes ksmd that it has to compare with others (findings F18).
_PAGE_SECONDS: Final = 5e-6
_TELLING_BATCHES: Final = 5
#: Processes that can't be read, anybody can make many.
_MOST_SKIPPED: Final = 100
#: Un-merging these from outside could wait for their handler, or disturb what is under way (findings F8).
LEFT_ALONE: Final = {
    ProcessClass.USERFAULTFD: "userfaultfd watches its memory",
    ProcessClass.MIGRATING: "it is being migrated or snapshotted",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """How far a transaction may go; the settings of ``[limits]``.

    :ivar headroom_share: how much of what is free above the floor one batch may take
    :ivar latency_seconds: how long one call may keep a process from its memory
    :ivar max_pressure: the share of time that some task may wait for memory
    """

    floor_bytes: int
    headroom_share: float
    latency_seconds: float
    max_pressure: float


@dataclass(frozen=True, slots=True)
class UnmergeRates:
    """How fast this host un-merged last time.

    :ivar page_by_page: `work_pages` a second; `run_2` pages a second by run = 2
    :ivar fixed_seconds: the time of a transaction without un-merging
    """

    page_by_page: float = 150_000.0
    run_2: float = 250_000.0
    fixed_seconds: float = 0.7


#: Where nothing was measured yet.
ASSUMED_RATES: Final = UnmergeRates()


def limits_of(config: Config) -> Limits:
    """The limits that a configuration sets."""
    return Limits(config.floor_bytes, config.headroom_share, config.batch_latency, config.max_pressure)


@dataclass(frozen=True, slots=True)
class Batch:
    """Memory of one process that is un-merged, or moved, to one node.

    :ivar to: None where it has no single home: then each page stays on its node
    :ivar pages: how many are expected
    """

    process: ProcessId
    to: int | None
    ranges: tuple[tuple[int, int], ...]
    pages: int


@dataclass(frozen=True, slots=True)
class Belonging:
    """The home of a range, and how many pages it had, as it was before anything was un-merged."""

    process: ProcessId
    start: int
    end: int
    home: int
    pages: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """A change that could be made.

    :ivar writes: what has to be written, in this order; knobs that are so already are not among them
    :ivar found: what these knobs, and `run`, are at now
    :ivar run_after: what `run` shall be at the end
    :ivar unmerge: everything has to be un-merged for it
    :ivar merged_pages: mappings that are merged now
    :ivar read_only_pages: how many of these lie in mappings that are not writable: run = 2 un-merges them
    :ivar calls: into how many calls un-merging the others page by page is divided at least
    :ivar at_once: run = 2 un-merges everything, as safely as page by page: `batches` is empty then
    :ivar one_tree: there is one stable tree: once nothing is left that is merged, one look of ksmd's empties it
    :ivar nodes: how many nodes with memory there are
    :ivar homes: of every range that has one
    :ivar cgroups: the memory cgroups with a limit above the processes
    :ivar skipped: processes whose pages are left to the final run = 2, and why
    :ivar demands: what un-merging takes and what is free above the floor; what is most over comes first
    :ivar at_home: pages at home, of pages that have one
    :ivar homeless_pages: merged pages that have no single home
    :ivar leave_pages: up to so many pages a plain run = 2 could take from home, by whoever writes it
    :ivar seconds: how long it may take, and `sparse_seconds` longer where run = 2 has to walk all address space
    :ivar remerge_seconds: how long ksmd may take to merge again; None where that can't be told
    """

    writes: tuple[Write, ...]
    found: Mapping[Knob, KnobValue]
    run_after: int
    unmerge: bool = False
    merged_pages: int = 0
    read_only_pages: int = 0
    calls: int = 0
    processes: int = 0
    at_once: bool = False
    one_tree: bool = False
    nodes: int = 0
    homes: tuple[Belonging, ...] = ()
    cgroups: tuple[str, ...] = ()
    batches: tuple[Batch, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    demands: tuple[UnmergeDemand, ...] = ()
    at_home: tuple[int, int] = (0, 0)
    homeless_pages: int = 0
    leave_pages: int = 0
    seconds: float = 0.0
    sparse_seconds: float = 0.0
    remerge_seconds: float | None = None

    @property
    def fits(self) -> bool:
        """Whether there is room for it everywhere."""
        return not any(item.over_bytes for item in self.demands)


def make_plan(
    wanted: Mapping[Knob, KnobValue],
    sample: Sample,
    inventory: Inventory | None,
    limits: Limits,
    *,
    run_after: int | None = None,
    rates: UnmergeRates = ASSUMED_RATES,
    before: Sample | None = None,
) -> Plan:
    """The plan of a change.

    :param inventory: needed only where something is merged and a knob of `wanted` can't be changed then
    :param run_after: what `run` shall be at the end, where `wanted` doesn't say; None for what it is now
    :param rates: as they were measured on this host
    :param before: an earlier sample, for how quick ksmd is
    :raises Absent: this host lacks a knob
    :raises ReadError: a knob can't be read
    :raises UsageError: `wanted` contradicts itself
    """
    found = {knob: _found(sample, knob) for knob in (*wanted, Knob.RUN)}
    if wanted.get(Knob.RUN) == 2 and len(wanted) > 1:
        raise UsageError("setting run to 2", "it un-merges everything, so it stands alone", hint="set it by itself")
    now = int(found[Knob.RUN])
    after = int(wanted.get(Knob.RUN, now if run_after is None else run_after))
    writes = ordered([Write(knob, value) for knob, value in wanted.items() if found[knob] != value])
    if not needs_unmerge(wanted, sample):
        return Plan(writes, found, after)
    if inventory is None:
        raise ValueError("a change that un-merges is planned with an inventory")
    pages = sum(memory.merged_pages for memory in inventory.memories)
    measured = inventory.sparse_seconds_per_gib
    sparse_seconds = inventory.mapped_bytes / (1 << 30) * (SPARSE_SECONDS_PER_GIB if measured is None else measured)
    nodes = [node.number for node in inventory.topology.with_memory()]
    at_once = (
        len(nodes) == 1 and not sparse_seconds > limits.latency_seconds and _safe_at_once(inventory, limits, rates)
    )
    batches = () if at_once else batches_of(inventory)
    read_only = 0 if at_once else sum(memory.read_only_pages for memory in inventory.memories)
    calls = 0 if at_once else sum(memory.calls for memory in inventory.memories)
    processes = sum(1 for memory in inventory.memories if memory.merged_pages)
    by_home: Counter[int | None] = Counter()
    for memory in inventory.memories:
        for item in memory.ranges:
            by_home[item.home] += item.merged_pages
    homeless = by_home.pop(None, 0)
    belongings = _belongings(inventory)
    return Plan(
        # `run` is stopped before and set afterwards in any case.
        tuple(write for write in writes if write.knob is not Knob.RUN or write.value == 2),
        found,
        after,
        unmerge=True,
        merged_pages=pages,
        read_only_pages=read_only,
        calls=calls,
        processes=processes,
        at_once=at_once,
        nodes=len(nodes),
        # Else there is a tree for each node, and a look at one page empties only one. Nor would the items in the
        # unstable trees be taken out of their own tree after a change to 1 (mm/ksm.c:remove_rmap_item_from_tree).
        one_tree=wanted.get(Knob.RUN) != 2 and (len(nodes) < 2 or sample.knob(Knob.MERGE_ACROSS_NODES) != 0),
        homes=belongings,
        cgroups=tuple(sorted({path for memory in inventory.memories for path in memory.cgroups})),
        batches=batches,
        skipped=_skipped(inventory),
        demands=inventory.demands,
        at_home=at_home(inventory, belongings),
        homeless_pages=homeless,
        leave_pages=by_home.total() - min((by_home[node] for node in nodes), default=0),
        seconds=rates.fixed_seconds
        + (
            pages / rates.run_2
            if at_once
            else work_pages(pages - read_only, calls, processes) / rates.page_by_page + read_only / rates.run_2
        ),
        sparse_seconds=sparse_seconds,
        remerge_seconds=remerge_seconds(sample, before) if after == 1 else None,
    )


def work_pages(pages: int, calls: int, processes: int) -> int:
    """What un-merging page by page takes, in pages of one long run of one process."""
    return pages + _CALL_PAGES * calls + _PROCESS_PAGES * processes


def needs_unmerge(wanted: Mapping[Knob, KnobValue], sample: Sample) -> bool:
    """Whether the kernel refuses a change because something is merged."""
    if wanted.get(Knob.RUN) == 2:
        return found_value(sample, Knob.RUN) != 2
    held = any(KNOBS[knob].needs_unmerge and _found(sample, knob) != value for knob, value in wanted.items())
    # Beside pages_shared, leftovers of processes that have ended keep the knobs from changing (engine.md 11.4);
    # then it is EBUSY that says so.
    return held and (sample.number("pages_shared") or 0) > 0


def lacking_room(plan: Plan, floor_bytes: int) -> tuple[str, ...]:
    """The places that have too little room for a plan, as phrases with figures."""
    return tuple(item.text(floor_bytes) for item in plan.demands if item.over_bytes)


def need_room(plan: Plan, floor_bytes: int) -> None:
    """See that there is room for a plan.

    :raises Refused: with the figures of each place that has too little
    """
    over = lacking_room(plan, floor_bytes)
    if over:
        raise Refused(
            "un-merging everything",
            "; ".join(over[:4]) + (" and more" if len(over) > 4 else ""),
            hint="free memory there, end or move a tenant, raise the cgroup's limit, or lower [limits] floor_bytes. "
            "--force overrides this check. Going below 16 MiB free needs root and a stopped service. "
            "Nothing was changed.",
        )


def room_for(
    inventory: Inventory, memories: Iterable[ProcessMemory], to: int | None, page_size: int
) -> tuple[UnmergeDemand, ...]:
    """What un-merging some of the processes takes at most, where there is a limit; what is most over comes first.

    :param to: the node that all pages go to; None for the home of each
    """
    free = {item.where: item.free_bytes for item in inventory.demands}
    growth: Counter[str] = Counter()
    for memory in memories:
        for item in memory.ranges:
            size = item.merged_pages * page_size
            home = item.home if to is None else to
            nodes = inventory.topology.with_memory() if home is None else ()
            places = [f"node {node.number}" for node in nodes] or [f"node {home}"]
            growth.update(dict.fromkeys(("host", *places, *memory.cgroups), size))
    found = [UnmergeDemand(where, size, free[where]) for where, size in growth.items() if where in free and size]
    return tuple(sorted(found, key=lambda item: (-item.over_bytes, item.free_bytes - item.growth_bytes)))


def room_document(rooms: Iterable[UnmergeDemand]) -> list[dict[str, object]]:
    """The JSON of rooms, in a plan's document and in that of what is un-merged (docs/json.md)."""
    return [
        {
            "where": item.where,
            "takes_bytes": item.growth_bytes,
            "free_bytes": item.free_bytes,
            "over_bytes": item.over_bytes,
            "upper_bound": item.upper_bound,
        }
        for item in rooms
    ]


def _found(sample: Sample, knob: Knob) -> KnobValue:
    value = found_value(sample, knob)
    if value is None:
        reading = sample.readings.get(knob)
        if isinstance(reading, ReadError):
            raise reading
        raise Absent(f"setting {knob}", "this kernel does not have it")
    return value


def _belongings(inventory: Inventory) -> tuple[Belonging, ...]:
    return tuple(
        Belonging(memory.process, start, end, home, pages)
        for memory in inventory.memories
        for start, end, home, pages in _joined(
            (item.start, item.end, item.home, sum(item.nodes.values())) for item in memory.ranges
        )
        if home is not None
    )


def _skipped(inventory: Inventory) -> dict[str, str]:
    found = {
        f"{memory.name} (pid {memory.process.pid})": reason
        for memory in inventory.memories
        for kind, reason in LEFT_ALONE.items()
        if kind in memory.classes and memory.merged_pages
    }
    unread = {f"{one.name} (pid {one.pid})": one.why for one in inventory.skipped[:_MOST_SKIPPED]}
    if len(inventory.skipped) > _MOST_SKIPPED:
        unread[f"{len(inventory.skipped) - _MOST_SKIPPED} more"] = "they can't be read either"
    return found | unread


def at_home(inventory: Inventory, homes: Iterable[Belonging]) -> tuple[int, int]:
    """Pages that are where they belong, and all pages of the ranges that have a home and are still there."""
    there = total = 0
    recorded = _by_process(homes)
    for memory in inventory.memories:
        for item in memory.ranges:
            belonging = _recorded(recorded.get(memory.process, ()), item)
            if belonging is not None:
                there += item.nodes.get(belonging.home, 0)
                total += sum(item.nodes.values())
    return there, total


def away(inventory: Inventory, homes: Iterable[Belonging]) -> tuple[Batch, ...]:
    """What would have to be moved for everything to be at home: a batch or more for each process and home."""
    found: list[Batch] = []
    recorded = _by_process(homes)
    for memory in inventory.memories:
        spans: list[_Span] = []
        for item in memory.ranges:
            belonging = _recorded(recorded.get(memory.process, ()), item)
            home = None if belonging is None else belonging.home
            pages = 0 if home is None else sum(item.nodes.values()) - item.nodes.get(home, 0)
            start = item.start if belonging is None else max(item.start, belonging.start)
            spans.append((start, item.end if belonging is None else min(item.end, belonging.end), home, pages))
        # What lies between two of them may be memory that is not mergeable, which moving would name as left.
        joined = (span for span in _joined(spans, gaps=False) if span[2] is not None and span[3])
        found += _batches(memory.process, joined)
    return tuple(found)


def _by_process(homes: Iterable[Belonging]) -> dict[ProcessId, list[Belonging]]:
    found: dict[ProcessId, list[Belonging]] = {}
    for belonging in sorted(homes, key=lambda item: item.start):
        found.setdefault(belonging.process, []).append(belonging)
    return found


def _recorded(homes: Sequence[Belonging], item: HomeRange) -> Belonging | None:
    at = bisect.bisect_right(homes, item.start, key=lambda home: home.end)
    return homes[at] if at < len(homes) and homes[at].start < item.end else None


def batches_of(inventory: Inventory) -> tuple[Batch, ...]:
    """All merged pages that can be un-merged from outside: a batch or more for each process and home."""
    found: list[Batch] = []
    for memory in inventory.memories:
        if any(kind in memory.classes for kind in LEFT_ALONE):
            continue
        # Only merged pages are touched: what lies between two ranges that have some may be part of one range.
        spans = _joined(
            (item.start, item.end, item.home, item.merged_pages) for item in memory.ranges if item.merged_pages
        )
        found += _batches(memory.process, spans)
    return tuple(found)


_Span = tuple[int, int, int | None, int]


def _joined(spans: Iterable[_Span], *, gaps: bool = True) -> list[_Span]:
    """Start, end, home and pages of ranges, ascending; neighbours that have one home are joined.

    :param gaps: whatever lies between two of them is no matter
    """
    found: list[_Span] = []
    for start, end, home, pages in spans:
        if found and found[-1][2] == home and (gaps or found[-1][1] == start):
            found[-1] = (found[-1][0], end, home, found[-1][3] + pages)
        else:
            found.append((start, end, home, pages))
    return found


def _batches(process: ProcessId, spans: Iterable[_Span]) -> Iterator[Batch]:
    by_home: dict[int | None, list[_Span]] = {}
    for span in spans:
        by_home.setdefault(span[2], []).append(span)
    for home, found in by_home.items():
        for at in range(0, len(found), MAXIMUM_RANGES):
            part = found[at : at + MAXIMUM_RANGES]
            ranges = tuple((start, end) for start, end, _, _ in part)
            yield Batch(process, home, ranges, sum(pages for _, _, _, pages in part))


def _safe_at_once(inventory: Inventory, limits: Limits, rates: UnmergeRates) -> bool:
    """Whether run = 2 stops no process for longer than a call may, and there is more than enough room for it."""
    # It is not known for how long it would stop processes that can't be read.
    return (
        not inventory.skipped
        and all(
            memory.merged_pages <= limits.latency_seconds * rates.run_2
            and not any(k in memory.classes for k in LEFT_ALONE)
            for memory in inventory.memories
        )
        and all(item.growth_bytes <= _RUN_2_SHARE * item.free_bytes for item in inventory.demands)
    )


def remerge_seconds(sample: Sample, before: Sample | None = None) -> float | None:
    """How long ksmd takes to merge everything again: two scans of all that it knows, at the speed that is set.

    A page is merged at the earliest when it is seen a second time (mm/ksm.c:cmp_and_merge_page).

    :param before: an earlier sample; between the two ksmd shows how long it waits for a CPU
    """
    at_once, sleep = sample.number(Knob.PAGES_TO_SCAN), sample.number(Knob.SLEEP_MILLISECS)
    if not at_once or sleep is None:
        return None
    # With a CPU to itself.
    batch_seconds = sleep / 1000 + at_once * _PAGE_SECONDS
    pages = sum(sample.number(name) or 0 for name in TRACKED)
    earlier = None if before is None else before.number("pages_scanned")
    scanned = sample.number("pages_scanned")
    if before is not None and earlier is not None and scanned is not None:
        batches = (scanned - earlier) / at_once
        if batches >= _TELLING_BATCHES:
            batch_seconds = max(batch_seconds, (sample.time_seconds - before.time_seconds) / batches)
    return 2 * pages / at_once * batch_seconds
