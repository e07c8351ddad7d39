# SPDX-License-Identifier: GPL-2.0-or-later
"""What a change of knobs would do, before anything is done: pure, out of a sample and an inventory.

`merge_across_nodes` and `max_page_sharing` can only be changed while nothing is merged (mm/ksm.c,
merge_across_nodes_store). Un-merging takes memory: on each process's home node, on the host, and in every memory
cgroup above it, where it may be new (findings F10). All that a plan says is an upper bound.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from ksmd_ctl.config.model import Config
from ksmd_ctl.control.policies.change import TRACKED
from ksmd_ctl.control.reconcile import Write, found_value, ordered
from ksmd_ctl.errors import Absent, ReadError, Refused, UsageError
from ksmd_ctl.host.memory import Exposure, HomeRange, Inventory, ProcessClass, ProcessId
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.knobs import KNOBS, Knob, KnobValue

__all__ = [
    "LEFT_ALONE",
    "Batch",
    "Belonging",
    "Limits",
    "Plan",
    "at_home",
    "away",
    "batches_of",
    "limits_of",
    "make_plan",
    "need_room",
    "needs_unmerge",
    "remerge_seconds",
    "room_text",
]

#: Where nothing was measured yet: pages un-merged in a second by batches of their own. Findings F15 saw 250,000 and
#: more in one process without the looking before and after.
ASSUMED_PAGES_PER_SECOND: Final = 50_000.0
#: What run = 2 takes for each GiB of mergeable address space with pages in it, merged or not (findings F11).
SPARSE_SECONDS_PER_GIB: Final = 0.015
#: At most so many pages in one batch: between two of them room and pressure are looked at.
MAXIMUM_BATCH_PAGES: Final = 16_384
_MINIMUM_BATCH_PAGES: Final = 64
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

    floor_bytes: int = 128 << 20
    headroom_share: float = 0.25
    latency_seconds: float = 0.01
    max_pressure: float = 0.2


def limits_of(config: Config) -> Limits:
    """The limits that a configuration sets."""
    return Limits(config.floor_bytes, config.headroom_share, config.batch_latency, config.max_pressure)


@dataclass(frozen=True, slots=True)
class Batch:
    """Memory of one process that is un-merged, or moved, at once.

    :ivar to: None where it has no single home: then each page stays on its node
    :ivar pages: how many are expected
    """

    process: ProcessId
    to: int | None
    ranges: tuple[tuple[int, int], ...]
    pages: int


@dataclass(frozen=True, slots=True)
class Belonging:
    """The home of a range, as it was before anything was un-merged."""

    process: ProcessId
    start: int
    end: int
    home: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A change that could be made.

    :ivar writes: what has to be written, in this order; knobs that are so already are not among them
    :ivar found: what these knobs, and `run`, are at now
    :ivar run_after: what `run` shall be at the end
    :ivar unmerge: everything has to be un-merged for it
    :ivar merged_pages: mappings that are merged now
    :ivar one_tree: there is one stable tree: once nothing is left that is merged, one look of ksmd's empties it
    :ivar homes: of every range that has one
    :ivar skipped: processes whose pages are left to the final run = 2, and why
    :ivar exposures: what un-merging takes and what is free above the floor; what is most over comes first
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
    processes: int = 0
    one_tree: bool = False
    homes: tuple[Belonging, ...] = ()
    batches: tuple[Batch, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    exposures: tuple[Exposure, ...] = ()
    at_home: tuple[int, int] = (0, 0)
    homeless_pages: int = 0
    leave_pages: int = 0
    seconds: float = 0.0
    sparse_seconds: float = 0.0
    remerge_seconds: float | None = None

    @property
    def fits(self) -> bool:
        """Whether there is room for it everywhere."""
        return not any(item.over_bytes for item in self.exposures)


def make_plan(
    wanted: Mapping[Knob, KnobValue],
    sample: Sample,
    inventory: Inventory | None,
    limits: Limits,
    *,
    run_after: int | None = None,
    pages_per_second: float | None = None,
    page_size: int = 4096,
) -> Plan:
    """The plan of a change.

    :param inventory: needed only where something is merged and a knob of `wanted` can't be changed then
    :param run_after: what `run` shall be at the end, where `wanted` doesn't say; None for what it is now
    :param pages_per_second: as it was measured, None for the first time
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
    pages = sum(stock.merged_pages for stock in inventory.stocks)
    sparse = sum(item.end - item.start for stock in inventory.stocks for item in stock.ranges)
    sparse_seconds = sparse / (1 << 30) * SPARSE_SECONDS_PER_GIB
    batches = batches_of(inventory, limits, page_size)
    by_home: Counter[int | None] = Counter()
    for item in _ranges(inventory):
        by_home[item.home] += item.merged_pages
    homeless = by_home.pop(None, 0)
    nodes = [node.number for node in inventory.topology.with_memory()]
    belongings = _belongings(inventory)
    return Plan(
        # `run` is stopped before and set afterwards in any case.
        tuple(write for write in writes if write.knob is not Knob.RUN or write.value == 2),
        found,
        after,
        unmerge=True,
        merged_pages=pages,
        processes=sum(1 for stock in inventory.stocks if stock.merged_pages),
        # Else there is a tree for each node, and a look at one page empties only one. Nor would the items in the
        # unstable trees be taken out of their own tree after a change to 1 (mm/ksm.c:remove_rmap_item_from_tree).
        one_tree=wanted.get(Knob.RUN) != 2 and (len(nodes) < 2 or sample.knob(Knob.MERGE_ACROSS_NODES) != 0),
        homes=belongings,
        batches=batches,
        skipped=_skipped(inventory),
        exposures=inventory.exposures,
        at_home=at_home(inventory, belongings),
        homeless_pages=homeless,
        leave_pages=by_home.total() - min((by_home[node] for node in nodes), default=0),
        # Each batch is a process of its own, which takes a while to start.
        seconds=pages / (pages_per_second or ASSUMED_PAGES_PER_SECOND) + 0.3 * (len(batches) + 4),
        sparse_seconds=sparse_seconds,
        remerge_seconds=remerge_seconds(sample) if after == 1 else None,
    )


def needs_unmerge(wanted: Mapping[Knob, KnobValue], sample: Sample) -> bool:
    """Whether a change is one that the kernel takes only while nothing is merged, and something is."""
    if wanted.get(Knob.RUN) == 2:
        return found_value(sample, Knob.RUN) != 2
    held = any(KNOBS[knob].needs_unmerge and _found(sample, knob) != value for knob, value in wanted.items())
    # Beside pages_shared, leftovers of processes that have ended keep the knobs from changing (semantics 11.4);
    # then it is EBUSY that says so.
    return held and (sample.number("pages_shared") or 0) > 0


def need_room(plan: Plan, floor_bytes: int) -> None:
    """See that there is room for a plan.

    :raises Refused: with the figures of each place that has too little
    """
    over = [item for item in plan.exposures if item.over_bytes]
    if over:
        raise Refused(
            "un-merging everything",
            "; ".join(room_text(item, floor_bytes) for item in over[:4]) + (" and more" if len(over) > 4 else ""),
            hint="free memory there, end or move a tenant, raise the cgroup's limit, or lower [limits] floor_bytes; "
            "nothing was changed",
        )


def room_text(item: Exposure, floor_bytes: int) -> str:
    """What un-merging takes somewhere and what is there, as a phrase with figures."""
    where = f"in the memory cgroup {item.where}" if item.where.startswith("/") else f"on {_the(item.where)}"
    above = "above its reserve" if item.where.startswith("/") else f"above the floor of {_mib(floor_bytes)}"
    return f"{where} it takes up to {_mib(item.growth_bytes)} more, and {_mib(item.free_bytes)} are free {above}"


def _the(where: str) -> str:
    return "the host" if where == "host" else where


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.1f} MiB"


def _found(sample: Sample, knob: Knob) -> KnobValue:
    value = found_value(sample, knob)
    if value is None:
        reading = sample.readings.get(knob)
        if isinstance(reading, ReadError):
            raise reading
        raise Absent(f"setting {knob}", "this kernel does not have it")
    return value


def _ranges(inventory: Inventory) -> Iterable[HomeRange]:
    return (item for stock in inventory.stocks for item in stock.ranges)


def _belongings(inventory: Inventory) -> tuple[Belonging, ...]:
    return tuple(
        Belonging(stock.process, item.start, item.end, item.home)
        for stock in inventory.stocks
        for item in stock.ranges
        if item.home is not None
    )


def _skipped(inventory: Inventory) -> dict[str, str]:
    return {
        f"{stock.name} (pid {stock.process.pid})": reason
        for stock in inventory.stocks
        for kind, reason in LEFT_ALONE.items()
        if kind in stock.classes and stock.merged_pages
    }


def at_home(inventory: Inventory, homes: Iterable[Belonging]) -> tuple[int, int]:
    """Pages that are where they belong, and all pages of the ranges that have a home and are still there."""
    there = total = 0
    for belonging, item in _still(inventory, homes):
        there += item.nodes.get(belonging.home, 0)
        total += sum(item.nodes.values())
    return there, total


def away(inventory: Inventory, homes: Iterable[Belonging]) -> tuple[Batch, ...]:
    """What would have to be moved for everything to be at home: a batch for each process and home."""
    found: dict[tuple[ProcessId, int], tuple[list[tuple[int, int]], int]] = {}
    for belonging, item in _still(inventory, homes):
        pages = sum(item.nodes.values()) - item.nodes.get(belonging.home, 0)
        if pages:
            ranges, count = found.get((belonging.process, belonging.home), ([], 0))
            ranges.append((max(item.start, belonging.start), min(item.end, belonging.end)))
            found[belonging.process, belonging.home] = ranges, count + pages
    return tuple(Batch(process, home, tuple(ranges), pages) for (process, home), (ranges, pages) in found.items())


def _still(inventory: Inventory, homes: Iterable[Belonging]) -> Iterable[tuple[Belonging, HomeRange]]:
    """Mappings that are there now, each with what was recorded of the place where it begins or else lies."""
    recorded: dict[ProcessId, list[Belonging]] = {}
    for belonging in homes:
        recorded.setdefault(belonging.process, []).append(belonging)
    for stock in inventory.stocks:
        for item in stock.ranges:
            for belonging in recorded.get(stock.process, ()):
                if belonging.start < item.end and item.start < belonging.end:
                    yield belonging, item
                    break


def batches_of(inventory: Inventory, limits: Limits, page_size: int) -> tuple[Batch, ...]:
    """All merged pages in batches that fit into a share of the room, each of one process and home."""
    least = min((item.free_bytes for item in inventory.exposures), default=0)
    size = int(least * limits.headroom_share) // page_size
    size = max(_MINIMUM_BATCH_PAGES, min(MAXIMUM_BATCH_PAGES, size))
    found: list[Batch] = []
    for stock in inventory.stocks:
        if any(kind in stock.classes for kind in LEFT_ALONE):
            continue
        homes: dict[int | None, list[tuple[int, int, int]]] = {}
        for item in stock.ranges:
            if item.merged_pages:
                homes.setdefault(item.home, []).extend(_pieces(item, size, page_size))
        for home, pieces in homes.items():
            found += _packed(stock.process, home, pieces, size)
    return tuple(found)


def _pieces(item: HomeRange, size: int, page_size: int) -> list[tuple[int, int, int]]:
    """A range in parts of about `size` merged pages each: start, end, pages."""
    count = -(-item.merged_pages // size)
    whole = (item.end - item.start) // page_size
    cuts = [item.start + whole * number // count * page_size for number in range(count)] + [item.end]
    each = -(-item.merged_pages // count)
    return [(start, end, each) for start, end in itertools.pairwise(cuts) if start < end]


def _packed(process: ProcessId, home: int | None, pieces: list[tuple[int, int, int]], size: int) -> list[Batch]:
    found: list[Batch] = []
    ranges: list[tuple[int, int]] = []
    pages = 0
    for start, end, count in pieces:
        if ranges and pages + count > size:
            found.append(Batch(process, home, tuple(ranges), pages))
            ranges, pages = [], 0
        ranges.append((start, end))
        pages += count
    return [*found, Batch(process, home, tuple(ranges), pages)] if ranges else found


def remerge_seconds(sample: Sample) -> float | None:
    """How long ksmd takes to merge everything again: two scans of all that it knows, at the speed that is set.

    A page is merged at the earliest when it is seen a second time (mm/ksm.c:cmp_and_merge_page).
    """
    pages = sum(sample.number(name) or 0 for name in TRACKED)
    at_once, sleep = sample.number(Knob.PAGES_TO_SCAN), sample.number(Knob.SLEEP_MILLISECS)
    if not at_once or sleep is None:
        return None
    # About 5 microseconds a page on top of the sleep (findings F18).
    return 2 * pages / at_once * (sleep / 1000 + at_once * 5e-6)
