# SPDX-License-Identifier: GPL-2.0-or-later

from __future__ import annotations

import errno
import os
import tempfile
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.errors import Cancelled, NoSuchProcess, Rejected
from ksmd_ctl.host.memory import ProcessId, Range
from ksmd_ctl.host.operation import Move, Progress
from ksmd_ctl.kernel import migrate
from ksmd_ctl.kernel.libnuma import NOT_ATTEMPTED, PageMover
from ksmd_ctl.kernel.migrate import BatchSizer
from ksmd_ctl.kernel.pagemap import EXCLUSIVE, FILE, PRESENT
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.scenario.regions import spawn
from tests.kernel.test_processes import stat
from tests.kernel.trees import meminfo, write_tree, zone

START = 0x100000
ME = ProcessId(os.getpid(), 500)
PLENTY = 1 << 20


@dataclass
class Frame:
    """A frame, and what the kernel does with it: how often it is busy first, or a status that stays."""

    number: int
    node: int
    mapped: int
    busy: int = 0
    status: int = 0
    silent: bool = False
    file: bool = False


class FakeKernel(PageMover):
    """move_pages(2) over a table of frames; where it is told of a tree, pagemap shows what was moved."""

    def __init__(self, table: dict[int, Frame], capacity: int = PLENTY, root: Path | None = None) -> None:
        super().__init__()
        self.table = table
        self.capacity = capacity
        self.root = root
        self.asked: list[list[int]] = []

    def query(self, pid: int, addresses: Sequence[int]) -> array[int]:
        return array("i", [self.table[a].node if a in self.table else -errno.ENOENT for a in addresses])

    def move(self, pid: int, addresses: Sequence[int], node: int, *, shared: bool) -> array[int]:
        self.asked.append(list(addresses))
        found = array("i")
        for address in addresses:
            frame = self.table[address]
            if frame.node != node:
                if frame.mapped > 1 and not shared:
                    found.append(-errno.EACCES)
                    continue
                if frame.busy:
                    frame.busy -= 1
                    found.append(NOT_ATTEMPTED if frame.silent else -errno.EBUSY)
                    continue
                if frame.status:
                    found.append(frame.status)
                    continue
                if not self.capacity:
                    raise Rejected("move_pages", "no memory", errno=errno.ENOMEM)
                self.capacity -= 1
                frame.node = node
            found.append(node)
        if self.root:
            write_pagemap(self.root, self.table)
        return found


def write_pagemap(root: Path, table: dict[int, Frame]) -> None:
    """Frames up to 1000 are on node 0, from there on node 1."""
    entries = array("Q", [0] * (START // 4096 + 200))
    for address, frame in table.items():
        bits = PRESENT | (EXCLUSIVE if frame.mapped == 1 else 0) | (FILE if frame.file else 0)
        entries[address // 4096] = bits | frame.number + 1000 * frame.node
    (root / f"proc/{ME.pid}/pagemap").write_bytes(entries.tobytes())


def tree(root: Path, pages: Sequence[Frame | None], free_kib: int = PLENTY) -> dict[int, Frame]:
    """A process of our own pid with one mergeable mapping of these pages, and a mapping that isn't mergeable."""
    process = f"proc/{ME.pid}"
    present = sum(frame is not None for frame in pages)
    end = START + len(pages) * 4096
    smaps = f"{START:x}-{end:x} rw-p 00000000 00:00 0 \nRss: {present * 4} kB\nVmFlags: rd wr mg \n"
    smaps += f"{end + 4096:x}-{end + 8192:x} rw-p 00000000 00:00 0 \nRss: 4 kB\nVmFlags: rd wr \n"
    write_tree(
        root,
        {
            f"{process}/stat": stat(ME.pid, "x"),
            f"{process}/smaps": smaps,
            "sys/devices/system/node/node0/meminfo": meminfo(0, PLENTY, PLENTY),
            "sys/devices/system/node/node1/meminfo": meminfo(1, PLENTY, free_kib),
            "sys/devices/system/node/node2/meminfo": meminfo(2, 0, 0),
            "proc/zoneinfo": zone(0, "Normal", 0, 1000) + zone(1, "Normal", 1000, 1000),
        },
    )
    table = {START + index * 4096: frame for index, frame in enumerate(pages) if frame}
    write_pagemap(root, table)
    return table


@st.composite
def layouts(draw: st.DrawFn) -> list[Frame | None]:
    frames = draw(
        st.lists(
            st.builds(
                Frame,
                number=st.just(0),
                node=st.integers(0, 1),
                mapped=st.integers(1, 3),
                busy=st.integers(0, 5),
                status=st.sampled_from([0, 0, 0, -errno.EFAULT]),
                silent=st.booleans(),
            ),
            min_size=1,
            max_size=15,
        )
    )
    for number, frame in enumerate(frames, 1):
        frame.number = number
    once = [frame for frame in frames if frame.mapped == 1]
    often = [frame for frame in frames if frame.mapped > 1]
    pages: list[Frame | None] = [*once]
    if draw(st.booleans()):
        pages.append(None)
    if often:
        pages += draw(st.lists(st.sampled_from(often), max_size=15))
    return draw(st.permutations(pages))


@given(layouts(), st.booleans())
def test_every_frame_is_accounted_for_once_and_asked_for_by_one_address(
    pages: list[Frame | None], shared: bool
) -> None:
    before = {frame.number: (frame.node, frame.busy, frame.status) for frame in pages if frame}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        table = tree(root, pages)
        kernel = FakeKernel(table, root=root)
        request = Move(ME, to=1, latency_seconds=1e-6)
        result = migrate.move(request, root=root, mover=kernel, shared=shared)
    frames = {frame.number: frame for frame in pages if frame}
    assert result.already == sum(node == 1 for node, _, _ in before.values())
    assert result.moved == sum(frame.node == 1 != before[number][0] for number, frame in frames.items())
    assert result.moved + result.already + sum(result.left.values()) == len(frames)
    times = Counter(table[address].number for batch in kernel.asked for address in batch)
    assert all(count <= 1 + 3 for count in times.values())
    assert all(len({table[address].number for address in batch}) == len(batch) for batch in kernel.asked)
    for number, frame in frames.items():
        _, busy, status = before[number]
        if frame.mapped > 1 and not shared:
            assert frame.node == before[number][0]
        elif busy <= 3 and not status:
            assert frame.node == 1
    if not shared:
        refused = sum(frame.mapped > 1 and frame.node != 1 for frame in frames.values())
        assert sum(count for cause, count in result.left.items() if cause.startswith("shared: mapped more")) == refused


def test_pages_on_nodes_that_keep_theirs_stay(tmp_path: Path) -> None:
    pages = [Frame(1, 0, 1), Frame(2, 1, 1), Frame(3, 2, 1), Frame(4, 0, 2)]
    kernel = FakeKernel(tree(tmp_path, pages))
    planned = migrate.plan(Move(ME, to=1, keep=(0,)), root=tmp_path)
    assert (planned.already, planned.shared) == (3, 0)
    result = migrate.move(Move(ME, to=1, keep=(0,)), root=tmp_path, mover=kernel, shared=True)
    assert (result.moved, result.already, result.left) == (1, 3, {})
    assert [frame.node for frame in pages if frame] == [0, 1, 1, 0]


def test_without_a_limit_of_time_a_window_is_one_call(tmp_path: Path) -> None:
    kernel = FakeKernel(tree(tmp_path, [Frame(n, 0, 1) for n in range(1, 151)]))
    result = migrate.move(Move(ME, to=1, latency_seconds=0), root=tmp_path, mover=kernel, shared=True)
    assert result.moved == 150
    assert [len(batch) for batch in kernel.asked] == [150]


def test_the_cause_of_each_page_that_stays(tmp_path: Path) -> None:
    pages = [
        Frame(1, 0, 1, busy=99),
        Frame(2, 0, 1, busy=99, silent=True),
        Frame(3, 0, 1, status=-errno.EFAULT),
        Frame(4, 0, 1, status=1),
        Frame(5, 0, 1),
    ]
    kernel = FakeKernel(tree(tmp_path, pages))
    result = migrate.move(Move(ME, to=1, latency_seconds=1e-6), root=tmp_path, mover=kernel, shared=True)
    assert result.moved == 1
    causes = {cause.partition(":")[0]: count for cause, count in result.left.items()}
    assert causes == {"busy": 1, "not attempted": 1, "not movable": 1, "it was moved, and is elsewhere again": 1}


def test_a_node_that_runs_full_under_the_call(tmp_path: Path) -> None:
    kernel = FakeKernel(tree(tmp_path, [Frame(n, 0, 1) for n in range(1, 101)]), capacity=40)
    result = migrate.move(Move(ME, to=1), root=tmp_path, mover=kernel, shared=True)
    assert (result.moved, result.left) == (40, {"no memory on the target node": 60})


def test_headroom_is_looked_at_before_every_batch(tmp_path: Path) -> None:
    # Room for 10 pages above the floor, and then none is left.
    table = tree(tmp_path, [Frame(n, 0, 1) for n in range(1, 101)], free_kib=100 + 40)
    path = tmp_path / "sys/devices/system/node/node1/meminfo"

    class Filling(FakeKernel):
        def move(self, pid: int, addresses: Sequence[int], node: int, *, shared: bool) -> array[int]:
            found = super().move(pid, addresses, node, shared=shared)
            path.write_text(meminfo(1, PLENTY, 140 - 4 * sum(map(len, self.asked))))
            return found

    result = migrate.move(Move(ME, to=1, floor_bytes=100 * 1024), root=tmp_path, mover=Filling(table), shared=True)
    assert result.moved == 10
    assert result.left == {"no memory on node 1 above the floor of 100.0 KiB": 90}


def test_it_stops_when_it_is_told_to_and_says_how_far_it_is(tmp_path: Path) -> None:
    kernel = FakeKernel(tree(tmp_path, [Frame(n, 0, 1) for n in range(1, 101)]))
    seen: list[Progress] = []
    with pytest.raises(Cancelled, match="32 pages have been moved"):
        migrate.move(
            Move(ME, to=1), root=tmp_path, mover=kernel, shared=True, progress=seen.append, stop=lambda: bool(seen)
        )
    assert seen == [Progress(32, 100, "pages")]


def test_only_mergeable_memory_unless_told_otherwise(tmp_path: Path) -> None:
    table = tree(tmp_path, [Frame(1, 0, 1), None, Frame(2, 0, 2), Frame(3, 1, 1)])
    plain = START + 5 * 4096
    table[plain] = Frame(4, 0, 1)
    write_pagemap(tmp_path, table)
    kernel = FakeKernel(table, root=tmp_path)
    found = migrate.plan(Move(ME, to=1), root=tmp_path)
    assert (found.nodes, found.shared, found.already, found.left) == ({0: 2}, 1, 1, {})
    assert migrate.move(Move(ME, to=1), root=tmp_path, mover=kernel, shared=True).moved == 2
    only = Move(ME, to=1, ranges=((plain, plain + 4096),))
    assert migrate.move(only, root=tmp_path, mover=kernel, shared=True).left == {migrate.NOT_MERGEABLE: 1}
    assert migrate.move(Move(ME, to=1, everything=True), root=tmp_path, mover=kernel, shared=True).moved == 1
    assert table[plain].node == 1


def test_cached_files_stay_where_they_are_unless_everything_is_meant(tmp_path: Path) -> None:
    pages = [Frame(1, 0, 1), *(Frame(number, 0, 1, file=True) for number in range(2, 12))]
    table = tree(tmp_path, pages)
    kernel = FakeKernel(table, root=tmp_path)
    assert migrate.plan(Move(ME, to=1), root=tmp_path).nodes == {0: 1}
    assert migrate.move(Move(ME, to=1), root=tmp_path, mover=kernel).moved == 1
    assert [frame.node for frame in table.values()] == [1] + [0] * 10
    assert migrate.move(Move(ME, to=1, everything=True), root=tmp_path, mover=kernel).moved == 10


def test_ranges_may_overlap_and_be_parts(tmp_path: Path) -> None:
    table = tree(tmp_path, [Frame(n, 0, 1) for n in range(1, 11)])
    part = Move(ME, to=1, ranges=((START + 4096, START + 4 * 4096), (START + 2 * 4096, START + 5 * 4096)))
    assert migrate.move(part, root=tmp_path, mover=FakeKernel(table), shared=True).moved == 4
    assert [frame.node for frame in table.values()] == [0, 1, 1, 1, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("request_", "error", "why"),
    [
        (Move(ME, to=2), Rejected, "that node has no memory"),
        (Move(ME, to=7), Rejected, "no such node"),
        (Move(ME, to=1, ranges=((0x10, 0x20),)), Rejected, "nothing is mapped in 0x10-0x20"),
        (Move(ProcessId(ME.pid, 499), to=1), NoSuchProcess, "belongs to another process"),
    ],
)
def test_bad_requests(tmp_path: Path, request_: Move, error: type[Exception], why: str) -> None:
    tree(tmp_path, [Frame(1, 0, 1)])
    kernel = FakeKernel({})
    with pytest.raises(error, match=why):
        migrate.move(request_, root=tmp_path, mover=kernel)
    with pytest.raises(error, match=why):
        migrate.plan(request_, root=tmp_path)
    assert not kernel.asked


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 10), st.booleans()), max_size=6),
    st.lists(st.tuples(st.integers(0, 100), st.integers(1, 20)), max_size=5),
)
def test_selected_parts_cover_what_is_meant_once(
    mappings: list[tuple[int, int, bool]], wanted: list[tuple[int, int]]
) -> None:
    found, at = [], 0
    for gap, length, mergeable in mappings:
        at += gap
        found.append(Range(at, at + length, frozenset({"mg"} if mergeable else ()), resident_pages=length))
        at += length
    ranges = tuple((start, start + length) for start, length in wanted)
    meant = {
        page
        for item in found
        if item.mergeable
        for page in range(item.start, item.end)
        if not ranges or any(start <= page < end for start, end in ranges)
    }
    touched = [any(start < item.end and item.start < end for item in found) for start, end in ranges]
    if not all(touched):
        with pytest.raises(Rejected):
            migrate.select(found, ranges, everything=False, what="x")
        return
    parts, _ = migrate.select(found, ranges, everything=False, what="x")
    pages = [page for start, end in parts for page in range(start, end)]
    assert len(pages) == len(set(pages))
    assert set(pages) == meant


def test_a_process_that_exits_half_way() -> None:
    with spawn("test-migrate") as process:
        start = process.map(64)
        process.advise(start, 64, mergeable=True)
        # With a hole, for pagemap tells at once that all of a full range is there already.
        process.store(start, [bytes([number]) * PAGE_SIZE if number != 9 else None for number in range(64)])

        class Ending(FakeKernel):
            def move(self, pid: int, addresses: Sequence[int], node: int, *, shared: bool) -> array[int]:
                process.exit()
                return array("i", [NOT_ATTEMPTED] * len(addresses))

            def query(self, pid: int, addresses: Sequence[int]) -> array[int]:
                return array("i", [99] * len(addresses))

        with pytest.raises(NoSuchProcess, match="exited half way; 0 pages"):
            migrate.move(Move(process.id, to=0), mover=Ending({}), shared=False)


@pytest.mark.parametrize("hole", [False, True])
def test_a_large_range_is_moved_without_looking_at_each_page(tmp_path: Path, hole: bool) -> None:
    pages: list[Frame | None] = [Frame(number + 1, 0, 1) for number in range(150)]
    if hole:
        pages[70] = None

    class Silent(FakeKernel):
        queries = 0

        def query(self, pid: int, addresses: Sequence[int]) -> array[int]:
            self.queries += 1
            return super().query(pid, addresses)

    kernel = Silent(tree(tmp_path, pages), root=tmp_path)
    assert migrate.move(Move(ME, to=1), root=tmp_path, mover=kernel).moved == 150 - hole
    assert bool(kernel.queries) is hole
    asked = len(kernel.asked)
    assert migrate.move(Move(ME, to=1), root=tmp_path, mover=kernel).already == 150 - hole
    assert len(kernel.asked) == asked


def test_memory_that_is_there_already() -> None:
    with spawn("test-migrate") as process:
        start = process.map(64)
        process.advise(start, 64, mergeable=True)
        process.store(start, [bytes([number]) * PAGE_SIZE for number in range(50)])
        node = PageMover().query(process.id.pid, [start])[0]
        result = migrate.move(Move(process.id, to=node))
    assert (result.moved, result.already, result.left) == (0, 50, {})


SECONDS = st.floats(0, 1000, allow_nan=False)


@given(
    st.floats(1e-6, 10),
    st.lists(st.tuples(st.integers(0, 10000), SECONDS), max_size=30),
    st.integers(1, 50),
    st.integers(0, 50),
    st.integers(0, 5000),
)
def test_a_size_is_always_within_its_bounds(
    latency: float, measured: list[tuple[int, float]], minimum: int, more: int, most: int
) -> None:
    sizer = BatchSizer(latency, first=minimum + more, minimum=minimum, maximum=minimum + more + most)
    for pages, seconds in measured:
        before = sizer.size
        sizer.measured(pages, seconds)
        assert minimum <= sizer.size <= minimum + more + most
        assert sizer.size <= 2 * max(before, pages)


@given(st.floats(1e-4, 1), st.floats(1e-9, 1e-3), st.integers(1, 8192))
def test_where_pages_cost_alike_calls_come_to_fit_and_stay_so(latency: float, cost: float, first: int) -> None:
    sizer = BatchSizer(latency, first=first)
    for _ in range(20):
        sizer.measured(sizer.size, sizer.size * cost)
    for _ in range(10):
        # One page is the least that can be asked for, however long it takes.
        assert sizer.size == 1 or sizer.size * cost <= latency
        assert sizer.size == 8192 or sizer.size * cost * 2 + cost * 2 >= latency * 0.7 or sizer.size == 1
        sizer.measured(sizer.size, sizer.size * cost)


def test_a_slow_call_takes_effect_at_once_and_a_quick_one_by_and_by() -> None:
    sizer = BatchSizer(0.01, first=64)
    sizer.measured(64, 0.0001)
    assert sizer.size == 128
    sizer.measured(128, 1.0)
    assert sizer.size == 1
    sizer.measured(0, 0.0)
    assert sizer.size == 1


@pytest.mark.parametrize("wrong", [{"latency_seconds": 0}, {"latency_seconds": 1, "first": 0}])
def test_what_makes_no_sense_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="minimum"):
        BatchSizer(**wrong)
