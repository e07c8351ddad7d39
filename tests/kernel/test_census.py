# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import random
from array import array
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksmd_ctl.errors import Cancelled
from ksmd_ctl.host.memory import Census, KsmDetection
from ksmd_ctl.kernel import census
from ksmd_ctl.kernel.detection import PageReader, probe
from ksmd_ctl.kernel.kpageflags import Bit, FrameFlags
from ksmd_ctl.kernel.topology import FrameMap, Span, read_frame_map
from ksmd_ctl.scenario.regions import spawn
from tests.kernel.test_detection import FORKED_AND_MOVED, LIE, MERGED, PLAIN, _usable, filled, scan

MARK = 1 << Bit.KSM | 1 << Bit.MMAP | 1 << Bit.ANON


class FakeFlags(FrameFlags):
    """Flags of so many frames, each of which takes a microsecond."""

    def __init__(self, flags: array[int]) -> None:
        self._flags = flags.tobytes()
        self.microseconds = 0.0

    def raw(self, first: int, count: int) -> bytes:
        self.microseconds += count
        return self._flags[first * 8 : (first + count) * 8]

    def clock(self) -> float:
        return self.microseconds / 1e6

    def close(self) -> None:
        pass


def take(flags: FakeFlags, frames: FrameMap, budget: float, **more: object) -> Census:
    return census.take(
        budget,
        reader=PageReader(KsmDetection.KPAGEFLAGS, flags=flags),
        frames=frames,
        cpu_clock=flags.clock,
        chance=random.Random(5),
        **more,  # type: ignore[arg-type]
    )


@settings(max_examples=30)
@given(st.sets(st.integers(0, 99_999), max_size=3000), st.integers(1, 50_000))
def test_a_complete_census_counts_every_frame_where_there_is_memory(marked: set[int], border: int) -> None:
    flags = array("Q", [0]) * 100_000
    for frame in marked:
        flags[frame] = MARK
    # Nothing that lies in the hole is anybody's.
    frames = FrameMap([Span(0, border, 0), Span(border + 100, 100_000, 3)])
    found = take(FakeFlags(flags), frames, 1.0)
    expected = {0: sum(frame < border for frame in marked), 3: sum(frame >= border + 100 for frame in marked)}
    assert found.complete
    assert found.pages == found.low == found.high == expected
    assert found.detection is KsmDetection.KPAGEFLAGS


def test_a_large_host_is_sampled_within_the_budget() -> None:
    chance = random.Random(1)
    size = 2_000_000
    flags = array("Q", [0]) * size
    for _ in range(100):
        first = chance.randrange(size - 3000)
        for frame in range(first, first + 3000):
            flags[frame] = MARK
    frames = FrameMap([Span(0, size // 2, 0), Span(size // 2, size, 1)])
    expected = {0: 0, 1: 0}
    for frame, flag in enumerate(flags):
        expected[frame >= size // 2] += bool(flag)
    fake = FakeFlags(flags)
    found = take(fake, frames, 0.5)
    assert not found.complete
    assert 0.3 <= found.cpu_seconds <= 0.5
    assert found.cpu_seconds == fake.clock()
    for node in (0, 1):
        assert found.low[node] <= expected[node] <= found.high[node]
        assert found.high[node] - found.low[node] < size / 8
    # A budget for all of it makes it complete, at little more than that.
    fake = FakeFlags(flags)
    found = take(fake, frames, 2.5)
    assert found.complete
    assert found.pages == expected
    assert found.cpu_seconds <= 2.5


def test_a_budget_of_nothing_still_gives_an_honest_answer() -> None:
    flags = array("Q", [MARK]) * 200_000
    found = take(FakeFlags(flags), FrameMap([Span(0, 200_000, 0)]), 0.0)
    assert not found.complete
    assert found.low[0] <= 200_000 == found.high[0]
    assert found.pages[0] == 200_000


def test_it_can_be_stopped() -> None:
    flags = FakeFlags(array("Q", [0]) * 1000)
    with pytest.raises(Cancelled):
        take(flags, FrameMap([Span(0, 1000, 0)]), 1.0, stop=lambda: True)


# -- detection by pagemap ---------------------------------------------------------------------------------------


def by_candidates(root: Path, flags: FakeFlags, frames: FrameMap, budget: float, shared: int | None) -> Census:
    (root / "proc").mkdir(exist_ok=True)
    return census.take(
        budget,
        reader=PageReader(KsmDetection.PAGEMAP, root, flags),
        frames=frames,
        pages_shared=shared,
        root=root,
        cpu_clock=flags.clock,
        chance=random.Random(5),
    )


@pytest.mark.parametrize(
    ("shared", "low", "high"),
    [
        # 300 candidates on node 0, 100 on node 1, of which 250 are KSM pages: at least 150 of these on node 0.
        (250, {0: 150, 1: 0}, {0: 300, 1: 100}),
        (400, {0: 300, 1: 100}, {0: 300, 1: 100}),
        (None, {0: 0, 1: 0}, {0: 300, 1: 100}),
        # More than there can be: the counter has pages that are gone.
        (900, {0: 300, 1: 100}, {0: 300, 1: 100}),
    ],
)
def test_where_processes_are_too_dear_frames_bound_it(
    tmp_path: Path, shared: int | None, low: dict[int, int], high: dict[int, int]
) -> None:
    flags = array("Q", [PLAIN | LIE]) * 2000
    for frame in [*range(300), *range(1000, 1100)]:
        flags[frame] = MERGED | LIE

    class Dear(FakeFlags):
        """Looking at processes takes all of the time that there is for it."""

        def clock(self) -> float:
            self.microseconds += 1e6
            return super().clock()

    (tmp_path / "proc/7").mkdir(parents=True)
    fake = Dear(flags)
    found = by_candidates(tmp_path, fake, FrameMap([Span(0, 1000, 0), Span(1000, 2000, 1)]), 1e-6, shared)
    assert (found.low, found.high) == (low, high)
    assert all(low[node] <= found.pages[node] <= high[node] for node in (0, 1))
    if shared is not None:
        assert sum(found.pages.values()) == pytest.approx(min(shared, 400), abs=1)


def test_every_process_is_looked_at_where_that_fits(tmp_path: Path) -> None:
    # Frames 1..10 merged; 20..29 only look so; both kinds in one mapping of process 7, the latter alone in 8.
    flags = array("Q", [0]) * 2000
    for frame in range(1, 11):
        flags[frame] = MERGED | LIE
    for frame in range(20, 30):
        flags[frame] = FORKED_AND_MOVED | LIE
    flags[1500] = MERGED | LIE

    def process(pid: int, pages: list[int], merged: int) -> None:
        folder = tmp_path / f"proc/{pid}"
        folder.mkdir(parents=True)
        words = array("Q", [0] * 16 + [1 << 63 | frame for frame in pages])
        (folder / "pagemap").write_bytes(words.tobytes())
        (folder / "smaps").write_text(
            f"10000-{0x10000 + len(pages) * 4096:x} rw-p 00000000 00:00 0 \nRss: {len(pages) * 4} kB\n"
            f"KSM: {merged * 4} kB\nVmFlags: rd wr mg \n"
        )

    process(7, [*range(1, 11), *range(20, 30), 1500], 11)
    process(9, [*range(20, 26)], 0)
    frames = FrameMap([Span(0, 1000, 0), Span(1000, 2000, 1)])
    found = by_candidates(tmp_path, FakeFlags(flags), frames, 1.0, None)
    # Six of the ten are known not to be; of the 15 that are left 11 are.
    assert found.complete
    assert (found.low, found.high) == ({0: 0, 1: 0}, {0: 14, 1: 1})
    assert found.pages == {0: 10, 1: 1}
    process(10, [*range(26, 30)], 0)
    found = by_candidates(tmp_path, FakeFlags(flags), frames, 1.0, None)
    assert found.pages == found.low == found.high == {0: 10, 1: 1}


@pytest.mark.ksm
def test_this_machine_by_each_detection_and_the_kernels_own_count(ksm_host: Path) -> None:
    usable = _usable(probe())
    if not usable:
        pytest.skip("neither kpageflags nor smaps tell of KSM pages on this kernel")
    frames = read_frame_map()
    with spawn("test-census") as process:
        start = process.map(400)
        process.advise(start, 400, mergeable=True)
        process.store(start, [filled(number // 4) for number in range(400)])
        process.store(process.map(50), [filled(number) for number in range(50)])
        with process.fork():
            scan(ksm_host, 4)
            for detection in usable:
                with PageReader(detection) as reader:
                    found = census.take(30.0, reader=reader, frames=frames)
                assert found.complete, detection
                assert found.pages == found.low == found.high
                assert sum(found.pages.values()) == int((ksm_host / "pages_shared").read_text()) == 100
                assert found.cpu_seconds > 0
    assert Counter(found.pages).keys() == frames.nodes()
