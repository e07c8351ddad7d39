# SPDX-License-Identifier: GPL-2.0-or-later
"""Scripts of the policy benchmark, and the oracle over them."""

from __future__ import annotations

from array import array
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.policy.oracle import FEW, Hold, HugePages, huge_pages, replay, saving
from benchmarks.policy.script import LAST, REWRITTEN, Event, Kind, draw

contents = st.lists(st.integers(0, 20), min_size=4, max_size=40).map(lambda numbers: array("I", numbers))
libraries = st.lists(contents, min_size=1, max_size=14)
seeds = st.integers(0, 2**32)
lengths = st.floats(20, 600)


@given(seeds, lengths, libraries)
def test_one_seed_gives_one_script(seed: int, seconds: float, library: list[array[int]]) -> None:
    assert draw(seed, seconds, library) == draw(seed, seconds, library)


@given(seeds, lengths, libraries)
def test_a_script_makes_sense(seed: int, seconds: float, library: list[array[int]]) -> None:
    script = draw(seed, seconds, library)
    live: dict[int, int] = {}
    ever: set[int] = set()
    for event in script.events:
        if event.kind is Kind.ARRIVE:
            assert event.tenant not in ever
            assert event.trace is not None
            assert event.trace not in live.values()
            live[event.tenant] = event.trace
            ever.add(event.tenant)
            continue
        trace = live[event.tenant]
        if event.kind is Kind.LEAVE:
            del live[event.tenant]
        else:
            count = len(library[trace])
            assert len(set(event.places)) == len(event.places) == len(event.contents)
            assert set(event.places) <= set(range(count))
            assert 1 <= len(event.places) <= max(1, round(count * REWRITTEN[1]))
    assert live


@given(seeds, lengths)
def test_most_of_the_time_nothing_happens(seed: int, seconds: float) -> None:
    library = [array("I", range(50))] * 13
    script = draw(seed, seconds, library)
    times = [event.at for event in script.events]
    assert times == sorted(times)
    moments = {event.moment for event in script.events}
    assert moments == set(range(len(moments)))
    for event in script.events:
        # Events of one moment are near each other, and the end is quiet.
        assert event.at <= LAST * seconds + 4
        assert event.at < script.window_end(event) <= seconds
    assert {event.moment for event in script.events if event.kind is Kind.ARRIVE} >= {0}


def test_other_seeds_give_other_scripts() -> None:
    library = [array("I", range(50))] * 13
    assert len({draw(seed, 120, library).events for seed in range(20)}) == 20


@pytest.mark.parametrize(
    ("counts", "limit", "saved"),
    [
        ([1, 1, 1], 256, 0),
        ([2], 256, 1),
        ([256], 256, 255),
        ([257], 256, 255),  # a second frame, for the one that finds no room
        ([512], 256, 510),
        ([10], 2, 5),
        ([0, 3], 256, 2),
    ],
)
def test_a_frame_takes_so_many_mappings(counts: list[int], limit: int, saved: int) -> None:
    assert saving(dict(enumerate(counts)), limit) == saved


def test_zeroes_take_no_frame_where_a_split_frees_them() -> None:
    assert saving({0: 600, 1: 3}) == 597 + 2
    assert saving({0: 600, 1: 3}, free=0) == 600 + 2


@given(st.lists(st.integers(1, 1000)), st.integers(2, 300))
def test_what_is_left_are_frames_that_are_full_but_for_the_last(numbers: list[int], limit: int) -> None:
    counts = dict(enumerate(numbers))
    frames = 0
    for count in numbers:
        left = count
        while left > 0:
            frames, left = frames + 1, left - limit
    assert sum(numbers) - saving(counts, limit) == frames


@given(seeds, libraries, st.sampled_from([None, 0]))
def test_the_oracle_follows_every_event(seed: int, library: list[array[int]], free: int | None) -> None:
    """Against a count from nothing after each event."""
    script = draw(seed, 120, library)
    hold = Hold(library)
    for event, state in zip(script.events, replay(script, Hold(library, free)), strict=True):
        hold.apply(event)
        pages = [page for own in hold.tenants.values() for page in own]
        assert state == (len(pages), saving(Counter(pages), free=free))


def test_rewriting_leaves_the_trace_alone() -> None:
    library = [array("I", [1, 1, 2, 3])]
    hold = Hold(library)
    hold.apply(Event(0, 0, Kind.ARRIVE, 0, 0))
    assert hold.saving() == 1
    hold.apply(Event(1, 0, Kind.REWRITE, 0, None, (2, 3), (1, 1)))
    assert hold.saving() == 3
    assert list(library[0]) == [1, 1, 2, 3]


def test_huge_pages_that_are_left() -> None:
    unique = range(1000, 1000 + 512)
    contents = {
        (1, 0): [0] * 512,
        (1, 1): [*unique[FEW - 1 :], *[0] * (FEW - 1)],  # few mergeable pages
        (1, 2): [*range(5000, 5512 - FEW), *[7] * FEW],  # just not few
        (2, 0): range(9000, 9512),
        (2, 1): range(7000, 7512),
        (2, 2): [7],  # never a huge page
    }
    end = {(1, 1), (2, 1), (2, 2), (3, 0)}  # process 3 has left
    assert huge_pages(contents, end, zero=0, size=512) == HugePages(5, 2, 3, 2, FEW - 1)


places = st.tuples(st.integers(1, 2), st.integers(0, 3))


@given(st.dictionaries(places, st.lists(st.integers(0, 60), min_size=38, max_size=40)), st.sets(places))
def test_huge_pages_that_are_left_are_of_those_before(
    contents: dict[tuple[int, int], list[int]], end: set[tuple[int, int]]
) -> None:
    found = huge_pages(contents, end, zero=0, size=40)
    assert 0 <= found.few_end <= found.end <= found.before <= len(contents)
    assert found.few_end <= found.few_before <= found.before
    assert found.few_mergeable <= found.few_before * (FEW - 1)
    assert found.end - found.few_end <= found.before - found.few_before
    everything = huge_pages(contents, contents.keys(), zero=0, size=40)
    assert (everything.end, everything.few_end) == (found.before, found.few_before)
