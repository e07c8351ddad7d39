# SPDX-License-Identifier: GPL-2.0-or-later
"""Who shares frames with whom, in fake trees: what is counted is what the page tables say."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksmd_ctl.errors import Cancelled, Denied
from ksmd_ctl.host.memory import KsmDetection, ProcessId
from ksmd_ctl.host.sharing import SharedBy, Sharing, SharingTally, figures, interval, pairs
from ksmd_ctl.kernel import sharing as kernel_sharing
from ksmd_ctl.kernel.detection import PageReader
from ksmd_ctl.kernel.kpageflags import Bit
from ksmd_ctl.kernel.pagemap import EXCLUSIVE, FILE, PRESENT
from ksmd_ctl.kernel.sharing import count_shared
from tests.kernel.trees import write_tree

PAGE = 4096
START = 0x100000
ANON = 1 << Bit.ANON | 1 << Bit.MMAP
KSM = ANON | 1 << Bit.KSM | 1 << Bit.DIRTY
ZERO_PAGE = 3
SERVICE = 990


@dataclass
class Tree:
    """Processes that map frames; `merged` are KSM pages, the others are shared by fork where they are shared.

    :ivar lying: every anonymous page is called a KSM page, as 6.12 does
    :ivar hidden: mappings by nobody who is there
    """

    root: Path
    frames: int = 64
    processes: dict[int, list[int]] = field(default_factory=dict)
    merged: set[int] = field(default_factory=set)
    hidden: Counter[int] = field(default_factory=Counter)
    stacks: dict[int, int] = field(default_factory=dict)
    uids: dict[int, int] = field(default_factory=dict)
    lying: bool = False
    tells_ksm: bool = True

    def mapped(self) -> Counter[int]:
        found = Counter(frame for frames in self.processes.values() for frame in frames)
        found.update(self.hidden)
        return found

    def write(self) -> Path:
        mapped = self.mapped()
        files = {}
        for pid, frames in self.processes.items():
            size = len(frames) * 4
            ksm = f"KSM: {4 * sum(frame in self.merged for frame in frames)} kB\n" if self.tells_ksm else ""
            files[f"proc/{pid}/smaps"] = (
                f"{START:x}-{START + max(1, len(frames)) * PAGE:x} rw-p 00000000 00:00 0 \n"
                f"Rss: {size} kB\nAnonymous: {size} kB\n{ksm}VmFlags: rd wr mg \n"
            )
            stack = self.stacks.get(pid, 0x7000000 + pid)
            files[f"proc/{pid}/stat"] = f"{pid} (p) S 1{' 0' * 17} {100 * pid}{' 0' * 5} {stack}{' 0' * 24}\n"
            uid = self.uids.get(pid, 0)
            files[f"proc/{pid}/status"] = f"Name:\tp\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\n"
        write_tree(self.root, files)
        for pid, frames in self.processes.items():
            entries = array("Q", bytes(8 * (START // PAGE)))
            for frame in frames:
                once = mapped[frame] == 1 and frame != ZERO_PAGE
                entries.append(PRESENT | frame | (EXCLUSIVE if once else 0))
            (self.root / f"proc/{pid}/pagemap").write_bytes(entries.tobytes())
        flags, counts = array("Q", bytes(8 * self.frames)), array("Q", bytes(8 * self.frames))
        for frame, times in mapped.items():
            counts[frame] = times
            flags[frame] = KSM if frame in self.merged else ANON | (1 << Bit.KSM if self.lying else 0)
        flags[ZERO_PAGE], counts[ZERO_PAGE] = 1 << 24, 0
        (self.root / "proc/kpageflags").write_bytes(flags.tobytes())
        (self.root / "proc/kpagecount").write_bytes(counts.tobytes())
        return self.root

    def count(self, groups: Sequence[Sequence[int]], budget: float = 60.0, **more: object) -> Sharing:
        self.write()
        detection = KsmDetection.PAGEMAP if self.lying else KsmDetection.KPAGEFLAGS
        ids = [[ProcessId(pid, 100 * pid) for pid in group] for group in groups]
        with PageReader(detection, self.root) as reader:
            return count_shared(ids, budget, reader=reader, root=self.root, **more)  # type: ignore[arg-type]

    def expected(self, groups: Sequence[Sequence[int]]) -> tuple[tuple[SharedBy, ...], tuple[int, ...]]:
        """Counted one by one."""
        tally, mapped = SharingTally(), self.mapped()
        for frame in sorted(mapped):
            times = {
                number: sum(self.processes[pid].count(frame) for pid in group) for number, group in enumerate(groups)
            }
            times = {number: count for number, count in times.items() if count}
            if times and frame != ZERO_PAGE:
                tally.add(times, unseen=mapped[frame] - sum(times.values()), merged=frame in self.merged)
        return tally.sets(), tuple(tally.alone.get(number, 0) for number in range(len(groups)))


@st.composite
def machines(draw: st.DrawFn) -> tuple[dict[int, list[int]], set[int], list[list[int]], list[int]]:
    frames = st.lists(st.sampled_from([ZERO_PAGE, *range(10, 30)]), max_size=25)
    processes = {pid: draw(frames) for pid in range(1, draw(st.integers(1, 6)) + 1)}
    labels = [draw(st.integers(0, 2)) for _ in processes]
    groups = [[pid for pid, label in zip(processes, labels, strict=True) if label == number] for number in range(2)]
    merged = draw(st.sets(st.integers(10, 29)))
    return processes, merged, groups, draw(st.lists(st.integers(10, 29), max_size=4))


@given(machines())
@settings(max_examples=60)
def test_what_is_counted_is_what_page_tables_say(
    tmp_path_factory: pytest.TempPathFactory,
    machine: tuple[dict[int, list[int]], set[int], list[list[int]], list[int]],
) -> None:
    processes, merged, groups, hidden = machine
    tree = Tree(tmp_path_factory.getbasetemp() / "sharing", processes=processes, merged=merged, hidden=Counter(hidden))
    found = tree.count(groups)
    sets, alone = tree.expected(groups)
    assert [(one.groups, one.frames, one.pages, one.single, one.merged, one.unseen) for one in found.sets] == [
        (one.groups, one.frames, one.pages, one.single, one.merged, one.unseen) for one in sets
    ]
    for one, other in zip(found.sets, sets, strict=True):
        assert one.parts == pytest.approx(other.parts)
    assert found.alone == alone
    assert (found.share, found.complete, found.gone, found.unread) == (1.0, True, (), ())


def test_where_flags_lie_who_is_no_fork_shares_what_was_merged(tmp_path: Path) -> None:
    # 7 and 8 are forks of one another, 9 is a stranger.
    tree = Tree(tmp_path, lying=True, stacks={7: 1, 8: 1})
    tree.processes = {7: [10, 11, 12, 13], 8: [10, 11, 12], 9: [12, 20, 20, ZERO_PAGE]}
    tree.merged = {12, 20}
    found = tree.count([[7], [8], [9]])
    assert found.detection is KsmDetection.PAGEMAP
    assert [(one.groups, one.merged, one.frames) for one in found.sets] == [
        ((0, 1), False, 2),
        ((0, 1, 2), True, 1),
        ((2,), True, 1),
    ]


def test_what_only_forks_map_is_decided_by_the_counts_of_smaps(tmp_path: Path) -> None:
    tree = Tree(tmp_path, lying=True, stacks={7: 1, 8: 1})
    tree.processes, tree.merged = {7: [10, 11], 8: [10, 11]}, {10, 11}
    (one,) = tree.count([[7], [8]]).sets
    assert (one.groups, one.merged, one.frames) == ((0, 1), True, 2)


def test_before_smaps_counts_them_pages_that_are_mapped_once_are_not_known(tmp_path: Path) -> None:
    tree = Tree(tmp_path, tells_ksm=False, processes={7: [10, 11, 12], 8: [10]}, merged={10, 11})
    found = tree.count([[7], [8]])
    assert (found.alone, [one.groups for one in found.sets]) == ((0, 0), [(0, 1)])


def test_pages_of_files_and_those_that_are_not_present_do_not_count(tmp_path: Path) -> None:
    Tree(tmp_path, processes={7: [10, 11], 8: [10, 11]}, merged={10, 11}).write()
    entries = array("Q", bytes(8 * (START // PAGE))) + array("Q", [PRESENT | FILE | 10, 11])
    (tmp_path / "proc/7/pagemap").write_bytes(entries.tobytes())
    with PageReader(KsmDetection.KPAGEFLAGS, tmp_path) as reader:
        ids = [[ProcessId(7, 700)], [ProcessId(8, 800)]]
        found = count_shared(ids, 60.0, reader=reader, root=tmp_path)
    assert [(one.groups, one.unseen) for one in found.sets] == [((1,), 2)]


def test_where_nothing_is_shared_page_tables_are_not_read(tmp_path: Path) -> None:
    Tree(tmp_path, processes={7: [10, 11]}, merged={10}).write()
    smaps = tmp_path / "proc/7/smaps"
    smaps.write_text(smaps.read_text().replace("Rss: 8 kB", "Rss: 8 kB\nPss: 8 kB"))
    (tmp_path / "proc/7/pagemap").unlink()
    with PageReader(KsmDetection.KPAGEFLAGS, tmp_path) as reader:
        found = count_shared([[ProcessId(7, 700)]], 60.0, reader=reader, root=tmp_path)
    assert (found.sets, found.alone, found.complete) == ((), (1,), True)


# -- who is left out -----------------------------------------------------------------------------------------


def test_who_is_gone_or_another_by_now_is_named(tmp_path: Path) -> None:
    tree = Tree(tmp_path, processes={7: [10], 8: [10, 10]}, merged={10})
    tree.write()
    ids = [[ProcessId(7, 700)], [ProcessId(8, 801)], [ProcessId(9, 900)]]
    with PageReader(KsmDetection.KPAGEFLAGS, tmp_path) as reader:
        found = count_shared(ids, 60.0, reader=reader, root=tmp_path)
    assert (found.gone, found.unread, found.complete) == ((8, 9), (), True)
    # What a later process with the pid maps is unseen.
    assert [(one.groups, one.unseen) for one in found.sets] == [((0,), 2)]


def test_a_process_whose_pid_goes_to_another_meanwhile_tells_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = Tree(tmp_path, processes={7: [10], 8: [10]}, merged={10})
    read = PageReader.read

    def replaced(self: PageReader, *arguments: object) -> object:
        yield from read(self, *arguments)  # type: ignore[arg-type]
        stat = tmp_path / "proc/8/stat"
        stat.write_text(stat.read_text().replace(" 800 ", " 801 "))

    monkeypatch.setattr(PageReader, "read", replaced)
    found = tree.count([[7], [8]])
    assert (found.gone, [(one.groups, one.unseen) for one in found.sets]) == ((8,), [((0,), 1)])


def test_what_the_asking_user_maps_takes_no_part(tmp_path: Path) -> None:
    tree = Tree(tmp_path, processes={7: [10], 8: [10]}, merged={10}, uids={8: SERVICE})
    found = tree.count([[7], [8]], uid=SERVICE)
    assert (found.unread, found.complete, pairs(found)) == ((8,), False, ())
    assert found.unseen_frames == 1
    assert len(pairs(tree.count([[7], [8]]))) == 1
    tree.uids[7] = SERVICE
    with pytest.raises(Denied):
        tree.count([[7], [8]], uid=SERVICE)


def test_it_can_be_stopped(tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        Tree(tmp_path, processes={7: [10]}).count([[7]], stop=lambda: True)


# -- within a budget -----------------------------------------------------------------------------------------


def many(root: Path, frames: int = 20_000) -> Tree:
    """Two with frames in common, and two that have others."""
    common = list(range(100, 100 + frames))
    tree = Tree(root, frames=2 * frames + 200)
    tree.processes = {7: common, 8: common, 9: common[: frames // 2], 10: [100 + frames + 1] * 10}
    tree.merged = {*common, 100 + frames + 1}
    return tree


def steps(seconds: float) -> Callable[[], float]:
    """A clock that goes on by so much whenever it is read."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += seconds
        return now

    return clock


def test_without_time_for_all_a_sample_is_counted_alike_in_all(tmp_path: Path) -> None:
    tree = many(tmp_path)
    groups = [[7], [8], [9], [10]]
    found = tree.count(groups, 0.04, cpu_clock=steps(0.001), chance=random.Random(1))
    assert 0 < found.share < 1
    assert (found.complete, found.unread, found.gone) == (False, (), ())
    sets = {one.groups: one.frames for one in found.sets}
    assert set(sets) <= {(0, 1), (0, 1, 2), (3,)}
    for both in ((0, 1), (0, 1, 2)):
        assert sets[both] == pytest.approx(10_000 * found.share, abs=4 * (10_000 * found.share) ** 0.5)
        low, high = interval(sets[both], found.share)
        assert high - low < 10_000
    # What smaps counts is no estimate, but for what is shared.
    assert figures(found)[0].merged_pages == pytest.approx(20_000, rel=0.05)


def test_the_sample_is_even_whatever_the_frames_numbers(tmp_path: Path) -> None:
    sample = kernel_sharing._Sample(random.Random(5))
    everything = array("Q", range(1 << 16))
    assert sample.taken(everything) is everything
    before = set(everything)
    for _ in range(5):
        sample.chances //= 2
        taken = sample.taken(everything)
        assert set(taken) <= before
        before = set(taken)
        # Entries have further bits.
        assert {entry & 0xFFFF for entry in sample.taken(array("Q", (PRESENT | one for one in everything)))} == before
        for step in (1, 2, 256, 512):
            some = len(sample.taken(array("Q", range(0, 4000 * step, step))))
            assert some == pytest.approx(4000 * sample.share, abs=6 * (4000 * sample.share) ** 0.5)


def test_for_whom_there_is_no_time_is_named(tmp_path: Path) -> None:
    found = many(tmp_path, 100).count([[7], [8], [9]], 0.0)
    assert (found.sets, found.unread, found.complete) == ((), (7, 8, 9), False)


def test_no_fewer_frames_are_counted_where_only_reading_takes_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, read = 0.0, PageReader.read

    def slow(*given: Any) -> Any:
        nonlocal now
        now += 1.0
        return read(*given)

    monkeypatch.setattr(PageReader, "read", slow)
    found = many(tmp_path, 100).count([[7], [8], [9]], 1.5, cpu_clock=lambda: now)
    assert (found.share, found.unread) == (1.0, (9,))


def test_with_too_many_sets_of_groups_a_sample_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree, chance = Tree(tmp_path, frames=600), random.Random(3)
    frames = list(range(100, 400))
    tree.processes = {pid: sorted(chance.sample(frames, 150)) for pid in range(1, 13)}
    tree.merged = set(frames)
    monkeypatch.setattr(kernel_sharing, "MOST_SETS", 50)
    found = tree.count([[pid] for pid in tree.processes], chance=chance)
    assert len(found.sets) <= 50
    assert (found.share < 1, found.complete) == (True, False)


@given(st.lists(st.integers(0, (1 << 64) - 1), max_size=20), st.sets(st.integers(0, 63), min_size=1), st.data())
def test_bits_of_many_words_at_once_are_those_of_each(words: list[int], bits: set[int], data: st.DataObject) -> None:
    mask = sum(1 << bit for bit in bits)
    value = sum(1 << bit for bit in data.draw(st.sets(st.sampled_from(sorted(bits)))))
    words += [value, value | ~mask & (1 << 64) - 1]
    having = kernel_sharing.having(array("Q", words), mask, value)
    assert list(having) == [word & mask == value for word in words]
    other = bytes(data.draw(st.lists(st.integers(0, 1), min_size=len(words), max_size=len(words))))
    pairs_ = list(zip(having, other, strict=True))
    assert list(kernel_sharing.both(having, other)) == [one & two for one, two in pairs_]
    assert list(kernel_sharing.both(having, other, without=True)) == [one & (1 - two) for one, two in pairs_]
