# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import random
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.host.memory import Process, ProcessList
from ksmd_ctl.reports.numa import (
    OTHER,
    Group,
    Largest,
    SplitZeroes,
    grouped,
    largest_by,
    process_saved_bytes,
    process_share_bytes,
    processes_document,
)
from ksmd_ctl.reports.saving import CURRENT
from tests.fakes.host import FakeHost, process

PAGE = 4096

PROCESSES = st.lists(
    st.builds(
        process,
        st.integers(1, 10_000),
        st.sampled_from([OTHER, *(f"vm-{number}" for number in range(40))]),
        st.integers(0, 2000),
        remote_pages=st.none() | st.integers(0, 50),
        relatives=st.none() | st.integers(0, 3),
    ),
    max_size=80,
)


def total(groups: tuple[Group, ...], other: Group) -> tuple[int, int, int]:
    everything = [*groups, other]
    return (
        sum(group.processes for group in everything),
        sum(group.merging_pages for group in everything),
        sum(group.related for group in everything),
    )


@given(st.lists(PROCESSES, min_size=1, max_size=6), st.integers(1, 5))
def test_the_sum_is_always_right_and_labels_do_not_grow(rounds: list[list[Process]], kept: int) -> None:
    largest = Largest(kept)
    for processes in rounds:
        groups, other = largest.choose(grouped(processes, PAGE))
        names = [group.group for group in groups]
        assert len(names) == len(set(names)) <= kept
        assert OTHER not in names
        assert other.group == OTHER
        assert total(groups, other) == (
            len(processes),
            sum(one.merged_pages for one in processes),
            sum(1 for one in processes if one.relatives),
        )
        if all(one.remote_pages is not None for one in processes):
            assert sum(group.remote_pages or 0 for group in (*groups, other)) == sum(
                one.remote_pages or 0 for one in processes
            )
        size = largest_by(grouped(processes, PAGE).values())
        sizes = [size(group) for group in groups]
        assert sizes == sorted(sizes, reverse=True)
        assert all(sizes)
        # None that is left out is clearly larger than one that is shown.
        left = {name: group for name, group in grouped(processes, PAGE).items() if name not in (*names, OTHER)}
        if left and sizes:
            assert max(size(group) for group in left.values()) <= 1.25 * min(sizes)
        assert len(names) == kept or not any(group.merging_pages for group in left.values())


@given(st.integers(2, 6), st.integers(0, 2**32), st.integers(2, 30))
def test_those_of_about_the_same_size_do_not_take_turns(kept: int, seed: int, rounds: int) -> None:
    chance, largest = random.Random(seed), Largest(kept)
    shown = set()
    for _ in range(rounds):
        groups = {f"vm-{number}": Group(f"vm-{number}", 1, 1, chance.randint(1000, 1200)) for number in range(10)}
        shown |= {group.group for group in largest.choose(groups)[0]}
    assert len(shown) == kept


def test_one_that_is_clearly_larger_takes_the_place_of_the_least() -> None:
    largest = Largest(2)
    groups = {name: Group(name, 1, 1, share_bytes=share) for name, share in (("a", 100), ("b", 90), ("c", 10))}
    assert [group.group for group in largest.choose(groups)[0]] == ["a", "b"]
    groups["c"] = Group("c", 1, 1, share_bytes=112)
    assert [group.group for group in largest.choose(groups)[0]] == ["a", "b"]
    groups["c"] = Group("c", 1, 1, share_bytes=113)
    shown, other = largest.choose(groups)
    assert [group.group for group in shown] == ["c", "a"]
    assert other == Group(OTHER, 1, 1, share_bytes=90)


def test_those_that_save_most_are_shown_whatever_is_merged() -> None:
    processes = [
        process(1, "merged", 1000, profit_bytes=100),
        process(2, "zeroes", 0, profit_bytes=5000, zero_pages=2),
        process(3, "loses", 2000, profit_bytes=-700),
        process(4, "idle", 0, profit_bytes=0),
    ]
    groups, other = Largest(2).choose(grouped(processes, PAGE))
    assert [group.group for group in groups] == ["zeroes", "merged"]
    assert (other.processes, other.merging_pages, other.saved_bytes) == (2, 2000, -700)
    document = processes_document(FakeHost().identity, ProcessList(tuple(processes)), FakeHost().sample())
    assert [group["group"] for group in document["groups"]] == ["zeroes", "merged", "idle", "loses"]  # type: ignore[attr-defined]


def test_where_savings_are_unknown_those_with_the_most_merged_pages_are_shown() -> None:
    processes = [process(1, "a", 5, rmap_items=None), process(2, "b", 9, rmap_items=None), process(3, "c", 7)]
    assert [group.group for group in Largest(2).choose(grouped(processes, PAGE))[0]] == ["b", "c"]


def test_a_figure_that_one_lacks_is_not_known_of_the_group() -> None:
    found = grouped([process(1, "a", 5), process(2, "a", 6, remote_pages=None, rmap_items=None)], PAGE)
    assert found == {"a": Group("a", 2, 11, None, None, 0, None, None)}


def test_what_a_process_saves() -> None:
    assert process_saved_bytes(process(1, "a", 10, profit_bytes=-64), PAGE) == -64
    assert process_saved_bytes(process(1, "a", 10, rmap_items=20, zero_pages=5), PAGE) == 15 * PAGE - 20 * 64
    assert process_saved_bytes(process(1, "a", 10, rmap_items=None), PAGE) is None


def test_what_is_not_mapped_any_more_would_not_be_taken_by_un_merging() -> None:
    gone = process(1, "a", 10, profit_bytes=9 * PAGE, ksm_mapped_pages=4)
    assert (gone.gone_pages, process_saved_bytes(gone, PAGE)) == (6, 3 * PAGE)
    # A fork maps KSM pages that nobody has counted.
    more = process(1, "a", 10, profit_bytes=9 * PAGE, ksm_mapped_pages=40)
    assert (more.gone_pages, process_saved_bytes(more, PAGE)) == (0, 9 * PAGE)


@given(
    st.lists(st.integers(2, 9), max_size=30),
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(0, 500)), min_size=9, max_size=9),
)
def test_the_shares_of_all_processes_are_what_the_host_saves(mappings: list[int], each: list[tuple[int, ...]]) -> None:
    """Each KSM page is mapped by so many processes, the first of nine."""
    sharing = [sum(Fraction(count - 1, count) for count in mappings if count > index) * PAGE for index in range(9)]
    merged = [sum(count > index for count in mappings) for index in range(9)]
    processes = [
        process(
            index + 1,
            pages=merged[index],
            rmap_items=items,
            zero_pages=zeroes,
            split_zero_pages=freed,
            sharing_bytes=round(sharing[index]),
        )
        for index, (zeroes, freed, items) in enumerate(each)
    ]
    pages_sharing, zeroes, freed, items = sum(mappings) - len(mappings), *map(sum, zip(*each, strict=True))
    host = FakeHost()
    profit = (pages_sharing + zeroes) * PAGE - items * 64
    host.counters.update(pages_sharing=pages_sharing, ksm_zero_pages=zeroes, general_profit=profit)
    found = processes_document(host.identity, ProcessList(tuple(processes)), host.sample(), counters=CURRENT)["total"]
    assert isinstance(found, dict)
    assert found["split_zero_pages"] == freed
    assert found["saved_frames_bytes"] == profit + freed * PAGE
    assert abs(found["other_bytes"]) <= 9
    assert found["share_bytes"] + found["other_bytes"] == found["saved_frames_bytes"]


def test_a_share_that_is_not_known_makes_no_total_and_no_rest() -> None:
    known = {"rmap_items": 9, "split_zero_pages": 0, "sharing_bytes": 5 * PAGE}
    assert process_share_bytes(process(1, **known), PAGE) == 5 * PAGE - 9 * 64  # type: ignore[arg-type]
    for lacking in known:
        processes = (process(1, **known), process(2, **known | {lacking: None}))  # type: ignore[arg-type]
        assert process_share_bytes(processes[1], PAGE) is None
        document = processes_document(FakeHost().identity, ProcessList(processes), FakeHost().sample())
        total = document["total"]
        assert isinstance(total, dict)
        assert (total["share_bytes"], total["other_bytes"]) == (None, None)
        assert (total["split_zero_pages"] is None) is (lacking == "split_zero_pages")


def test_forks_map_what_a_split_freed_once() -> None:
    def found(*each: tuple[int | None, int]) -> SplitZeroes:
        return SplitZeroes.of(
            process(pid, split_zero_pages=pages, relatives=related) for pid, (pages, related) in enumerate(each, 1)
        )

    assert found() == SplitZeroes(0, 0)
    assert found((100, 0), (50, 1), (70, 1)) == SplitZeroes(220, 170)
    assert found((100, 0), (None, 0)) == SplitZeroes(None, None)


def test_a_kernel_that_does_not_count_has_them_from_the_nodes() -> None:
    assert process(1, "a", 0, merging_pages=None, nodes={0: 3, 2: 4}).merged_pages == 7
