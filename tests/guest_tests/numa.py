# SPDX-License-Identifier: GPL-2.0-or-later
"""What only a machine with several nodes can show. Runs inside a guest:

tests/guest/run --kernel 6.12 --nodes 2 -- python -m pytest tests/guest_tests/numa.py
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from ksmd_ctl.errors import KsmdError, NoSuchProcess, Rejected
from ksmd_ctl.host.memory import KsmDetection, Node, ProcessId
from ksmd_ctl.host.operation import Move, Progress
from ksmd_ctl.kernel import census, libnuma, migrate, unshare
from ksmd_ctl.kernel.detection import PageReader, State, choose, probe
from ksmd_ctl.kernel.headroom import node_available_bytes
from ksmd_ctl.kernel.inventory import inventory_of
from ksmd_ctl.kernel.libnuma import PageMover
from ksmd_ctl.kernel.processes import Surveyor
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.topology import memory_blocks, read_frame_map, read_topology
from ksmd_ctl.scenario.regions import RegionProcess, spawn
from tests.fakes.unsharing import unshare_one
from tests.kernel.test_detection import _usable, filled, scan, states
from tests.service.programs import program

pytestmark = pytest.mark.ksm

TOPOLOGY = read_topology(numa=libnuma.available())
NODES = [node.number for node in TOPOLOGY.with_memory()]

if len(NODES) < 2:
    pytest.skip(f"needs two nodes with memory, and there is {len(NODES)}", allow_module_level=True)

FIRST, SECOND = NODES[:2]


@pytest.fixture
def ksm(ksm_host: Path) -> Path:
    """KSM with a tree for each node."""
    (ksm_host / "merge_across_nodes").write_text("0")
    return ksm_host


@pytest.fixture
def detection() -> KsmDetection:
    return choose(probe())


def counter(ksm: Path, name: str) -> int:
    return int((ksm / name).read_text())


def mergeable(process: RegionProcess, contents: Sequence[bytes | None], node: int | None) -> int:
    start = process.map(len(contents), node)
    process.advise(start, len(contents), mergeable=True)
    process.store(start, contents)
    return start


class Placed:
    """Where the pages of some processes are, found out in every way that there is; the ways must agree."""

    def __init__(self, ksm: Path, processes: Sequence[RegionProcess]) -> None:
        frame_map = read_frame_map()
        mover = PageMover()
        self.nodes: dict[tuple[ProcessId, int], int] = {}
        self.merged: set[int] = set()
        for detection in _usable(probe()):
            merged: set[int] = set()
            with PageReader(detection) as reader:
                for process in processes:
                    found = states(reader, process)
                    addresses = sorted(found)
                    asked = mover.query(process.id.pid, addresses)
                    for address, node in zip(addresses, asked, strict=True):
                        frame, state = found[address]
                        assert state != State.UNDECIDED
                        # The frame's node by the memory map is the address's node by move_pages' query.
                        assert frame_map.node(frame) == node
                        self.nodes[process.id, address] = node
                        if state == State.KSM:
                            merged.add(frame)
            with PageReader(detection) as reader:
                counted = census.take(60.0, reader=reader, frames=frame_map)
            by_node = Counter(frame_map.node(frame) for frame in merged)
            assert counted.complete, detection
            assert counted.pages == {node: by_node[node] for node in NODES}, detection
            assert counted.low == counted.high == counted.pages
            assert not self.merged or merged == self.merged
            self.merged = merged
            self.by_node = by_node
        assert len(self.merged) == counter(ksm, "pages_shared")

    def of(self, process: RegionProcess, start: int, pages: int) -> list[int]:
        return [self.nodes[process.id, start + page * PAGE_SIZE] for page in range(pages)]


def test_pages_are_placed_merged_moved_and_found_where_they_are(ksm: Path, detection: KsmDetection) -> None:
    with spawn("test-a", FIRST) as one, spawn("test-b", FIRST) as other:
        contents = [filled(number // 4) for number in range(200)]
        here = mergeable(one, contents, FIRST)
        there = mergeable(one, contents, SECOND)
        also = mergeable(other, contents, FIRST)
        loose = mergeable(other, [filled(9000 + number) for number in range(30)], FIRST)
        scan(ksm, 4)
        placed = Placed(ksm, [one, other])
        # 50 contents, merged on each node by itself.
        assert placed.by_node == {FIRST: 50, SECOND: 50}
        assert placed.of(one, here, 200) == placed.of(other, also, 200) == [FIRST] * 200
        assert placed.of(one, there, 200) == [SECOND] * 200
        assert counter(ksm, "pages_sharing") == 550 - 50

        request = Move(one.id, to=SECOND, ranges=((here, here + 200 * PAGE_SIZE),))
        plan = migrate.plan(request)
        assert (plan.nodes, plan.shared, plan.already, plan.left) == ({FIRST: 50}, 50, 0, {})

        # Without MPOL_MF_MOVE_ALL nothing that is shared moves, and the cause is told.
        refused = migrate.move(request, shared=False)
        assert (refused.moved, refused.already) == (0, 0)
        ((cause, pages),) = refused.left.items()
        assert cause == libnuma.status_cause(-errno.EACCES)
        assert "MPOL_MF_MOVE_ALL and CAP_SYS_NICE" in cause
        assert pages == 50
        assert Placed(ksm, [one, other]).by_node == {FIRST: 50, SECOND: 50}

        asked: Counter[int] = Counter()

        class Watched(PageMover):
            def move(self, pid: int, addresses: Sequence[int], node: int, *, shared: bool) -> object:  # type: ignore[override]
                asked.update(addresses)
                return super().move(pid, addresses, node, shared=shared)

        result = migrate.move(request, mover=Watched())
        assert (result.moved, result.already, result.left) == (50, 0, {})
        # Each of 50 pages once, though 400 addresses map them.
        assert len(asked) == 50
        placed = Placed(ksm, [one, other])
        assert placed.by_node == {SECOND: 100}
        assert placed.of(one, here, 200) == placed.of(other, also, 200) == [SECOND] * 200
        assert placed.of(other, loose, 30) == [FIRST] * 30
        assert one.load(here, 200) == other.load(also, 200) == tuple(contents)

        # Moved once more there is nothing to do; and the other's own pages go along when it is moved.
        assert migrate.move(request).already == 50
        result = migrate.move(Move(other.id, to=SECOND))
        assert (result.moved, result.already, result.left) == (30, 50, {})


def test_the_survey_tells_home_and_what_is_away(ksm: Path, detection: KsmDetection) -> None:
    with spawn("test-survey", FIRST) as one:
        here = mergeable(one, [filled(number // 2) for number in range(100)], FIRST)
        mergeable(one, [filled(1000 + number // 2) for number in range(40)], FIRST)
        scan(ksm, 4)
        migrate.move(Move(one.id, to=SECOND, ranges=((here, here + 100 * PAGE_SIZE),)))
        with PageReader(detection) as reader:
            found = Surveyor(TOPOLOGY, read_frame_map(), reader).one(one.id.pid)
    assert found
    assert found.home == FIRST
    assert found.nodes == {FIRST: 40, SECOND: 100}
    assert found.remote_pages == 100


def test_many_pages_in_a_random_layout_are_found_page_by_page(ksm: Path) -> None:
    chance = random.Random(7)
    with ExitStack() as stack:
        processes = [stack.enter_context(spawn(f"test-{number}", FIRST)) for number in range(3)]
        starts = [
            (process, mergeable(process, [filled(chance.randrange(60)) for _ in range(120)], node))
            for process in processes
            for node in NODES
        ]
        scan(ksm, 4)
        before = Placed(ksm, processes)
        for process, start in starts:
            first = chance.randrange(100)
            part = (start + first * PAGE_SIZE, start + (first + 20) * PAGE_SIZE)
            target = chance.choice(NODES)
            result = migrate.move(Move(process.id, to=target, ranges=(part,)))
            assert not result.left
            placed = Placed(ksm, processes)
            assert placed.of(process, part[0], 20) == [target] * 20
        assert before.nodes.keys() == placed.nodes.keys()


def test_unsharing_puts_each_page_where_it_should_be(ksm: Path, detection: KsmDetection) -> None:
    with spawn("test-unshare", FIRST) as one:
        contents = [filled(number // 5) for number in range(100)]
        free = mergeable(one, contents, None)
        bound = mergeable(one, [filled(500 + number // 5) for number in range(50)], FIRST)
        scan(ksm, 4)
        assert Placed(ksm, [one]).by_node == {FIRST: 30}

        def run(to: int | None, start: int, pages: int) -> tuple[int, dict[str, int]]:
            with PageReader(detection) as reader:
                request = unshare_one(one.id, ranges=((start, start + pages * PAGE_SIZE),), to=to)
                result = unshare.unshare(request, reader=reader)
            return result.unshared, dict(result.left)

        assert run(SECOND, free, 60) == (60, {})
        # The range has a policy of its own: asked for another node, its pages say so.
        assert run(SECOND, bound, 20) == (0, {unshare.ELSEWHERE: 20})
        assert run(None, bound + 20 * PAGE_SIZE, 30) == (30, {})
        assert run(None, free + 60 * PAGE_SIZE, 40) == (40, {})
        scan(ksm, 0)
        found = PageMover().query(one.id.pid, [free + page * PAGE_SIZE for page in range(100)])
        assert list(found) == [SECOND] * 60 + [FIRST] * 40
        found = PageMover().query(one.id.pid, [bound + page * PAGE_SIZE for page in range(50)])
        assert list(found) == [FIRST] * 50
        assert one.load(free, 100) == tuple(contents)


def test_breaking_a_twin_heals_what_a_migration_left_apart(ksm: Path, detection: KsmDetection) -> None:
    with spawn("test-twins", FIRST) as one:
        contents = [filled(number // 4) for number in range(16)]
        here = mergeable(one, contents, FIRST)
        there = mergeable(one, contents, SECOND)
        scan(ksm, 4)
        assert (counter(ksm, "pages_shared"), counter(ksm, "pages_sharing")) == (8, 24)
        migrate.move(Move(one.id, to=SECOND, ranges=((here, here + 16 * PAGE_SIZE),)))
        scan(ksm, 8)
        # Findings F1: on one node now, and never merged onto each other.
        assert (counter(ksm, "pages_shared"), counter(ksm, "pages_sharing")) == (8, 24)
        # The mapping's own policy would put the copies on the first node again; so the other twins are broken.
        with PageReader(detection) as reader:
            request = unshare_one(one.id, ranges=((there, there + 16 * PAGE_SIZE),), to=SECOND)
            assert unshare.unshare(request, reader=reader).unshared == 16
        scan(ksm, 6)
        assert (counter(ksm, "pages_shared"), counter(ksm, "pages_sharing")) == (4, 28)


def test_a_process_that_exits_in_the_middle(ksm: Path) -> None:
    with spawn("test-exit", FIRST) as one:
        mergeable(one, [filled(number) for number in range(2000)], FIRST)

        def end(progress: Progress) -> None:
            if progress.done >= 200:
                one.exit()

        with pytest.raises(NoSuchProcess, match="exited half way") as caught:
            migrate.move(Move(one.id, to=SECOND, latency_seconds=1e-6), progress=end)
        assert "2" in caught.value.why
    with pytest.raises(NoSuchProcess):
        migrate.move(Move(one.id, to=SECOND))


def test_a_pid_that_another_process_has_now(ksm: Path) -> None:
    last = Path("/proc/sys/kernel/ns_last_pid")
    if not last.exists():
        pytest.skip("this kernel lets nobody choose a pid (/proc/sys/kernel/ns_last_pid)")
    with spawn("test-first", FIRST) as one:
        first = one.id
    for _ in range(20):
        last.write_text(str(first.pid - 1))
        second = spawn("test-second", FIRST)
        if second.id.pid == first.pid:
            break
        second.exit()
    with second:
        assert second.id.pid == first.pid, "20 times another process was quicker"
        start = mergeable(second, [filled(number) for number in range(20)], FIRST)
        with pytest.raises(NoSuchProcess, match="belongs to another process now"):
            migrate.move(Move(first, to=SECOND))
        found = PageMover().query(second.id.pid, [start + page * PAGE_SIZE for page in range(20)])
        assert list(found) == [FIRST] * 20


@pytest.fixture
def full_node(ksm: Path) -> Iterator[Callable[[int], None]]:
    """Fills the second node but for so many bytes, with memory that can't give way."""
    with spawn("test-filler", FIRST) as filler:

        def fill(left_bytes: int) -> None:
            # In steps, for page cache gives way on the way.
            while (spare := node_available_bytes(SECOND) - left_bytes) > 1 << 20:
                pages = min(4096, spare // PAGE_SIZE)
                filler.store(filler.map(pages, SECOND), [b"\1" * PAGE_SIZE] * pages)

        yield fill


def test_a_target_node_that_is_full(full_node: Callable[[int], None]) -> None:
    floor, room, pages = 48 << 20, 16 << 20, 12_000
    with spawn("test-move", FIRST) as one:
        start = mergeable(one, [filled(number) for number in range(pages)], FIRST)
        full_node(floor + room)
        result = migrate.move(Move(one.id, to=SECOND, floor_bytes=floor))
        # There is room for some 4000. What others on the node take or give back meanwhile counts, and no page cache of
        # theirs, nor per-CPU lists of free pages, have half of what doesn't fit.
        assert 500 < result.moved < pages - (pages - room // PAGE_SIZE) // 2
        assert sum(result.left.values()) == pages - result.moved
        assert all(f"no memory on node {SECOND} above the floor" in cause for cause in result.left)
        found = PageMover().query(one.id.pid, [start + page * PAGE_SIZE for page in range(pages)])
        assert found.count(SECOND) == result.moved
        assert found.count(FIRST) == pages - result.moved


@pytest.mark.parametrize("node", [node for node in TOPOLOGY.with_memory() if not node.cpus] or [None])
def test_a_node_that_has_memory_only(ksm: Path, node: Node | None, detection: KsmDetection) -> None:
    if node is None:
        pytest.skip("every node has CPUs here (tests/guest/run --nodes 4)")
    with spawn("test-memory-only", FIRST) as one:
        contents = [filled(number // 2) for number in range(60)]
        start = mergeable(one, contents, FIRST)
        scan(ksm, 4)
        result = migrate.move(Move(one.id, to=node.number))
        assert (result.moved, result.left) == (30, {})
        assert Placed(ksm, [one]).by_node == {node.number: 30}
        assert one.load(start, 60) == tuple(contents)
    with pytest.raises(Rejected, match="no such node"):
        migrate.move(Move(ProcessId(os.getpid(), 0), to=900))


def test_a_memory_block_goes_offline_and_comes_back(ksm: Path) -> None:
    before = read_frame_map().frames
    memory = {node.number: node.memory_bytes for node in read_topology(numa=True).nodes}
    with spawn("test-offline", FIRST) as one:
        contents = [filled(number // 4) for number in range(400)]
        start = mergeable(one, contents, SECOND)
        scan(ksm, 4)
        frames = Placed(ksm, [one]).merged
        taken = None
        # The blocks that hold merged pages first: these then have to move.
        blocks = [block for block in memory_blocks() if block.nodes == {SECOND} and block.state == "online"]
        for block in sorted(blocks, key=lambda block: -sum(block.first <= frame < block.last for frame in frames)):
            state = Path(f"/sys/devices/system/memory/memory{block.number}/state")
            try:
                state.write_text("offline")
            except OSError:
                # It holds something that can't move.
                continue
            taken = block
            break
        if taken is None:
            pytest.skip("no memory block of the second node can be taken offline")
        try:
            assert [block.state for block in memory_blocks() if block.number == taken.number] == ["offline"]
            frame_map = read_frame_map()
            assert frame_map.node(taken.first) is None
            assert frame_map.frames == before - (taken.last - taken.first)
            now = {node.number: node.memory_bytes for node in read_topology(numa=True).nodes}
            assert now[SECOND] < memory[SECOND]
            assert not read_topology(numa=True).going_offline
            scan(ksm, 3)
            placed = Placed(ksm, [one])
            assert not any(taken.first <= frame < taken.last for frame in placed.merged)
            assert one.load(start, 400) == tuple(contents)
        finally:
            state.write_text("online")
        assert read_frame_map().frames == before
        assert Placed(ksm, [one]).nodes.keys() == placed.nodes.keys()


# Writes a file, or maps it privately and writes some of its pages, with CPUs and so memory of one node.
CACHE = """
import os, sys
os.sched_setaffinity(0, eval(sys.argv[2]))
with open(sys.argv[1], "wb") as file:
    file.write(os.urandom(16 << 20))
"""
MAP = """
os.sched_setaffinity(0, eval(sys.argv[2]))
file = open(sys.argv[1], "r+b")
area = mmap.mmap(file.fileno(), 16 << 20, flags=mmap.MAP_PRIVATE)
area.madvise(mmap.MADV_MERGEABLE)
for page in range(4096):
    area[page * PAGE]
for page in range(0, 4000, 8):
    area[page * PAGE : (page + 1) * PAGE] = content(1 + page)
"""


def test_a_file_that_is_cached_on_another_node_is_nobodys_home(
    ksm: Path, detection: KsmDetection, tmp_path: Path
) -> None:
    cpus = {node.number: sorted(node.cpus) for node in TOPOLOGY.nodes}
    image = str(tmp_path / "image")
    subprocess.run([sys.executable, "-c", CACHE, image, str(cpus[SECOND])], check=True)
    words = (image, str(cpus[FIRST]))
    with program(MAP, arguments=words) as one, program(MAP, arguments=words) as other:
        scan(ksm, 4)
        frames = read_frame_map()
        with PageReader(detection) as reader:
            surveyor = Surveyor(TOPOLOGY, frames, reader)
            found = [process for pid in (one.pid, other.pid) if (process := surveyor.one(pid)) is not None]
            inventory = inventory_of(found, surveyor, TOPOLOGY, None, 0, Path("/"))
        text = "".join(Path(f"/proc/{one.pid}/numa_maps").read_text().partition("image")[1:])
        assert f"N{SECOND}=" in text.partition("\n")[0]
    assert [(process.home, process.resident_bytes, process.remote_pages) for process in found] == [
        (FIRST, 500 * PAGE_SIZE, 0)
    ] * 2
    for memory in inventory.memories:
        assert [(item.home, dict(item.nodes), item.merged_pages) for item in memory.ranges] == [
            (FIRST, {FIRST: 500}, 500)
        ]


def test_pages_of_zeroes_are_counted_whatever_the_kernel_counts(ksm: Path, detection: KsmDetection) -> None:
    (ksm / "use_zero_pages").write_text("1")
    with spawn("test-zeroes", FIRST) as one:
        start = mergeable(one, [bytes(PAGE_SIZE)] * 1000 + [filled(1 + number) for number in range(100)], FIRST)
        scan(ksm, 4)
        assert one.load(start, 1) == (bytes(PAGE_SIZE),)
        with PageReader(detection) as reader:
            found = Surveyor(TOPOLOGY, read_frame_map(), reader).one(one.id.pid)
    assert found is not None
    assert (found.zero_mapped_pages, found.resident_bytes) == (1000, 100 * PAGE_SIZE)


def test_bad_input_is_refused_with_its_cause(ksm: Path) -> None:
    with spawn("test-bad", FIRST) as one:
        start = mergeable(one, [filled(1)] * 4, FIRST)
        for request, why in (
            (Move(one.id, to=max(NODES) + 1), "no such node"),
            (Move(one.id, to=SECOND, ranges=((0x1000, 0x2000),)), "nothing is mapped"),
            (Move(ProcessId(one.id.pid, 1), to=SECOND), "belongs to another"),
            (Move(ProcessId(4_000_000, 1), to=SECOND), "gone"),
        ):
            with pytest.raises(KsmdError, match=why):
                migrate.move(request)
        plain = one.map(4, FIRST)
        one.store(plain, [filled(2)] * 4)
        result = migrate.move(Move(one.id, to=SECOND, ranges=((plain, plain + 4 * PAGE_SIZE),)))
        assert (result.moved, result.left) == (0, {migrate.NOT_MERGEABLE: 4})
        everything = Move(one.id, to=SECOND, ranges=((plain, plain + 4 * PAGE_SIZE),), everything=True)
        assert migrate.move(everything).moved == 4
        assert list(PageMover().query(one.id.pid, [start])) == [FIRST]
