# SPDX-License-Identifier: GPL-2.0-or-later
"""Recovery of duplicates as decisions: when it searches, how much it un-merges, and how it judges the gain."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ksmd_ctl.config.model import Config, PolicyName
from ksmd_ctl.errors import Absent, Cancelled, Denied, NoSuchProcess
from ksmd_ctl.host.duplicates import DuplicateKsmPages
from ksmd_ctl.host.memory import KsmDetection, ProcessId
from ksmd_ctl.host.operation import UnsharePart
from ksmd_ctl.host.sample import Reading, Sample
from ksmd_ctl.transactions.duplicates import (
    MOST_PAGES,
    MOST_SCANS,
    PAGES_PER_SECOND,
    SCANS,
    SLICE_PAGES,
    SLICE_RANGES,
    TRIAL_PAGES,
    DuplicatesRecovery,
    RecoveryPhase,
    SearchDuplicates,
    spare_dups,
    suspicious,
    unexplained,
)
from ksmd_ctl.transactions.transaction import UnshareStep
from tests.fakes.unsharing import unshared_one

PAGE = 4096
GIB = 1 << 30
WHO = ProcessId(7, 70)

CONFIG = replace(
    Config(),
    policy=PolicyName.FIXED,
    heal_twins=True,
    census_interval=100.0,
    census_cpu_share=0.01,
    floor_bytes=GIB,
    headroom_share=0.25,
    batch_latency=0.01,
)
COUNTED = replace(CONFIG, heal_twins=False)


def sample(now: float, dups: int | None = 0, chains: int | None = 0, **more: Reading) -> Sample:
    readings: dict[str, Reading] = {
        "run": 1,
        "merge_across_nodes": 0,
        "max_page_sharing": 256,
        "pages_shared": 8000,
        "pages_sharing": 8000,
        "full_scans": 10,
        "mem_available_bytes": 64 * GIB,
    }
    if dups is not None and chains is not None:
        readings |= {"stable_node_dups": dups, "stable_node_chains": chains}
    return Sample(now, readings | more)


def duplicates(
    reclaimable: int = 4000, pages: int = TRIAL_PAGES, frames: int | None = None, **more: Any
) -> DuplicateKsmPages:
    part = UnsharePart(WHO, ((PAGE, PAGE + pages * PAGE),), 1)
    fields: dict[str, Any] = {
        "time_seconds": 0.0,
        "frames": 8000,
        "reclaimable": reclaimable,
        "left": {},
        "parts": (part,) if pages else (),
        "part_pages": pages,
        "part_frames": pages // 2 if frames is None else frames,
        "complete": True,
        "detection": KsmDetection.KPAGEFLAGS,
        "cpu_seconds": 0.1,
    }
    return DuplicateKsmPages(**(fields | more))


class Course:
    """A recovery, the time, and the counters that go with it."""

    def __init__(self, config: Config = CONFIG, *, busy: bool = False) -> None:
        self.now = 0.0
        self.config = config
        self.busy = busy
        self.state = DuplicatesRecovery(0.0, PAGE)
        self.counters: dict[str, Any] = {"dups": 8000, "chains": 4000}

    def sample(self) -> Sample:
        return sample(self.now, **self.counters)

    def tick(self, seconds: float = 1.0) -> SearchDuplicates | UnshareStep | None:
        self.now += seconds
        return self.state.step(self.sample(), self.config, self.busy)

    def look(self, within: float = 20.0) -> SearchDuplicates:
        end = self.now + within
        while self.now < end:
            action = self.tick()
            if isinstance(action, SearchDuplicates):
                return action
            assert action is None
        raise AssertionError(f"no look within {within} s")

    def quiet(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            assert self.tick(min(10.0, end - self.now)) is None

    def took(self, came: Any) -> None:
        """The result of what is under way."""
        self.state.on_result(came, self.config, self.busy)

    def unmerge(self) -> list[UnshareStep]:
        """All slices, each carried out in full."""
        steps = []
        while self.state.phase is RecoveryPhase.UNMERGING:
            action = self.tick()
            if isinstance(action, UnshareStep):
                steps.append(action)
                self.took(unshared_one(pages(action), {}))
        return steps

    def scans(self, count: int) -> None:
        self.counters["full_scans"] = self.counters.get("full_scans", 10) + count
        self.tick()


def pages(step: UnshareStep) -> int:
    return sum(end - start for start, end in ranges(step)) // PAGE


def ranges(step: UnshareStep) -> list[tuple[int, int]]:
    return [range_ for part in step.request.parts for range_ in part.ranges]


# -- the counters ----------------------------------------------------------------------------------------------


def test_a_chain_with_one_dup_is_nothing_to_look_for() -> None:
    assert spare_dups(sample(0, 4, 4)) == 0
    assert spare_dups(sample(0, 8, 4)) == 4
    assert spare_dups(sample(0, None)) is None


def test_dups_that_the_limit_explains() -> None:
    # A hundred dups of one content, all but the last full.
    full = sample(0, 100, 1, pages_shared=100, pages_sharing=99 * 255 + 10)
    assert (spare_dups(full), unexplained(full)) == (99, 0)
    assert unexplained(sample(0, 8000, 4000)) == 4000 - 16000 // 256
    assert unexplained(sample(0, 8, 4, max_page_sharing=Absent("x", "y"))) == 4


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (sample(0, 0, 0), False),
        (sample(0, 8, 4), True),
        # Across nodes nothing that moves becomes a duplicate: only what the limit surely doesn't explain counts.
        (sample(0, 8, 4, merge_across_nodes=1), False),
        (sample(0, 8000, 4000, merge_across_nodes=1), True),
        # Before 4.13.
        (sample(0, None, pages_volatile=0), False),
        (sample(0, None, pages_volatile=5), True),
        (sample(0, None, pages_volatile=5, merge_across_nodes=1), False),
    ],
)
def test_what_makes_it_look(found: Sample, expected: bool) -> None:
    assert suspicious(found, spare_dups(found)) is expected


# -- looking ---------------------------------------------------------------------------------------------------


def test_without_duplicates_it_never_looks_and_says_that_there_are_none() -> None:
    course = Course()
    course.counters = {"dups": 5, "chains": 5}
    course.quiet(100_000)
    assert course.state.unrealised == 0
    assert course.state.looks == 0


def test_before_the_first_look_nothing_is_known() -> None:
    course = Course()
    course.tick()
    assert course.state.section(1.0, CONFIG, {})["unrealised"] == {"twins": None}


def test_where_it_may_not_un_merge_it_counts_and_looks_again_ever_less() -> None:
    course = Course(COUNTED)
    assert course.look() == SearchDuplicates(1.0, 0)
    course.took(duplicates(pages=0))
    assert (course.state.phase, course.state.unrealised) == (RecoveryPhase.IDLE, 4000)
    for pause in (100, 200, 400, 800, 1600, 3200, 3600, 3600):
        course.quiet(pause - 1)
        course.look(12)
        course.took(duplicates(pages=0))
    assert course.state.looks == 9


def test_where_the_limit_explains_all_it_looks_once_a_day_in_the_end() -> None:
    course = Course()
    looks = 0
    for _ in range(20 * 24):
        if isinstance(course.tick(3600), SearchDuplicates):
            looks += 1
            course.took(duplicates(0, 0))
    assert looks <= 30


def test_news_make_it_look_at_once_but_never_beyond_its_share() -> None:
    course = Course(COUNTED)
    course.look()
    course.took(duplicates(pages=0, cpu_seconds=0.5))
    course.counters["dups"] = 9000
    # ksmd files them; the half second takes 50 s at this share.
    course.quiet(48)
    assert course.look(4)
    course.took(duplicates(5000, 0))
    course.counters["dups"] = 9100
    course.quiet(98)


def test_while_ksmd_comes_upon_more_of_them_it_waits() -> None:
    course = Course()
    for _ in range(30):
        course.counters["dups"] += 100
        assert course.tick() is None
    assert course.look(3)


@pytest.mark.parametrize("course", [Course(busy=True), Course(replace(CONFIG, census_cpu_share=0.0))])
def test_it_does_not_look_while_pages_are_moved_or_where_it_may_not(course: Course) -> None:
    course.quiet(10_000)


def test_a_look_that_was_too_short_is_followed_by_a_longer_one() -> None:
    course = Course(COUNTED)
    found = []
    for _ in range(6):
        found.append(course.look(4000).budget_cpu_seconds)
        course.took(duplicates(10, 0, complete=False))
    assert found == [1.0, 4.0, 16.0, 60.0, 60.0, 60.0]


def test_a_look_that_fails_is_told_of_and_tried_less_and_less() -> None:
    course = Course()
    course.look()
    course.took(Denied("pages of process 1", "not ours"))
    assert (course.state.failures, course.state.unrealised) == (1, None)
    assert "not ours" in course.state.text
    course.quiet(98)
    course.look(5)
    course.took(Cancelled("looking", "somebody else"))
    assert course.state.failures == 1
    course.quiet(98)


# -- un-merging ------------------------------------------------------------------------------------------------


def test_a_round_and_what_it_brings() -> None:
    course = Course()
    assert course.look() == SearchDuplicates(1.0, TRIAL_PAGES)
    course.took(duplicates())
    (step,) = course.unmerge()
    (part,) = step.request.parts
    assert (part.process, part.to, pages(step)) == (WHO, 1, TRIAL_PAGES)
    assert (step.request.floor_bytes, step.request.latency_seconds) == (GIB, 0.01)
    assert course.state.phase is RecoveryPhase.WAITING
    course.tick()
    course.counters |= {"pages_shared": 8000 - 512, "pages_sharing": 8000 + 512}
    course.scans(SCANS - 1)
    assert course.state.phase is RecoveryPhase.WAITING
    course.scans(1)
    state = course.state
    assert (state.phase, state.rounds, state.unmerged_pages, state.healed_pages) == (
        RecoveryPhase.IDLE,
        1,
        TRIAL_PAGES,
        512,
    )
    assert state.unrealised == 4000 - 512
    assert state.text == "un-merging 1,024 pages brought 512 of 512 pages"
    last: Any = state.section(course.now, CONFIG, {})["last"]
    assert last["pages_shared"] == {"before": 8000, "after": 7488}
    assert last["pages_sharing"] == {"before": 8000, "after": 8512}


def test_rounds_that_bring_something_grow_and_follow_one_another_as_looking_is_paid_for() -> None:
    course = Course()
    course.counters["pages_shared"] = 10**6
    asked = []
    for _ in range(5):
        found = course.look(30)
        asked.append(found.most_pages)
        course.took(duplicates(10**6, found.most_pages))
        course.unmerge()
        course.tick()
        course.counters["pages_shared"] -= found.most_pages // 2
        course.scans(SCANS)
    assert asked == [TRIAL_PAGES, 4 * TRIAL_PAGES, 16 * TRIAL_PAGES, MOST_PAGES, MOST_PAGES]
    assert course.state.healed_pages == sum(asked) // 2


def test_slices_are_bounded_in_pages_in_ranges_and_in_time() -> None:
    course = Course()
    course.look()
    single = tuple((PAGE * 2 * number, PAGE * (2 * number + 1)) for number in range(1, 1200))
    whole = ((PAGE << 20, (PAGE << 20) + 3 * SLICE_PAGES * PAGE),)
    course.took(duplicates(parts=(UnsharePart(WHO, single, 0), UnsharePart(WHO, whole, 1))))
    begun, steps = course.now, course.unmerge()
    # The third has what is left of the first part, and the second part begins.
    assert [pages(step) for step in steps] == [512, 512, SLICE_PAGES, SLICE_PAGES, SLICE_PAGES, 175]
    assert [len(step.request.parts) for step in steps] == [1, 1, 2, 1, 1, 1]
    assert max(len(ranges(step)) for step in steps) == SLICE_RANGES
    done = {range_ for step in steps for range_ in ranges(step)}
    assert sum(end - start for start, end in done) == PAGE * (1199 + 3 * SLICE_PAGES)
    total = sum(map(pages, steps[:-1]))
    assert course.now - begun >= total / PAGES_PER_SECOND


def test_small_slices_follow_one_another_at_once_until_they_are_a_seconds_worth() -> None:
    course = Course()
    course.look()
    size = SLICE_RANGES
    singles = tuple((PAGE * 2 * number, PAGE * (2 * number + 1)) for number in range(1, size + 1))
    parts = tuple(UnsharePart(ProcessId(pid, 1), singles, 0) for pid in range(20))
    course.took(duplicates(parts=parts))
    done = []
    for _ in range(50):
        step = course.tick(0.0)
        if step is None:
            break
        done.append(step)
        course.took(unshared_one(size, {}))
    assert len(done) == SLICE_PAGES // size
    assert course.tick(0.5) is None
    assert course.tick(0.5) is not None


def test_what_is_un_merged_leaves_the_host_its_floor_and_more() -> None:
    course = Course()
    course.counters["mem_available_bytes"] = GIB + 400 * PAGE
    assert course.look().most_pages == 100
    course = Course()
    course.counters["mem_available_bytes"] = GIB // 2
    assert course.look().most_pages == 0
    course = Course()
    course.counters["run"] = 0
    assert course.look().most_pages == 0


def test_what_brings_nothing_is_stopped_and_said() -> None:
    course = Course()
    course.counters["smart_scan"] = 1
    for number, pause in enumerate((200, 400, 800, 1600)):
        assert course.look(30).most_pages == TRIAL_PAGES
        course.took(duplicates())
        course.unmerge()
        course.tick()
        course.scans(MOST_SCANS - 1)
        assert course.state.phase is RecoveryPhase.WAITING
        course.scans(1)
        assert (course.state.phase, course.state.fruitless) == (RecoveryPhase.IDLE, number + 1)
        assert course.state.text.startswith("un-merging 1,024 pages brought 0 of 512 pages: smart_scan may skip them")
        # Not even for news.
        course.counters["dups"] += 8000
        course.quiet(pause - 1)
    assert course.state.healed_pages == 0


@pytest.mark.parametrize(
    ("knobs", "left", "word"),
    [
        ({"advisor_mode": "scan-time", "smart_scan": 1}, {}, "the kernel's advisor"),
        ({"smart_scan": 0}, {}, "written to"),
        ({"smart_scan": 1}, {"on another node": 3, "gone": 1}, "on another node"),
    ],
)
def test_why_it_brought_nothing(knobs: dict[str, Any], left: dict[str, int], word: str) -> None:
    course = Course()
    course.counters |= knobs
    course.look()
    course.took(duplicates())
    while course.state.phase is RecoveryPhase.UNMERGING:
        if course.tick() is not None:
            course.took(unshared_one(1000, left))
    course.tick()
    course.scans(MOST_SCANS)
    assert word in course.state.text


def test_processes_that_end_are_passed_over_and_a_refusal_ends_the_round() -> None:
    course = Course()
    course.look()
    whole = ((PAGE, (SLICE_PAGES + 1) * PAGE),)
    parts = tuple(UnsharePart(ProcessId(pid, 1), whole, 0) for pid in (1, 2, 3, 4))
    course.took(duplicates(parts=parts))
    came = iter([NoSuchProcess("p", "it is gone"), unshared_one(4, {}), Denied("p", "no access")])
    while course.state.phase is RecoveryPhase.UNMERGING:
        if course.tick() is not None:
            course.took(next(came))
    assert (course.state.unmerged_pages, course.state.failures) == (4, 1)
    assert course.state.phase is RecoveryPhase.WAITING


def test_nothing_that_was_un_merged_is_no_round_to_wait_for() -> None:
    course = Course()
    course.look()
    course.took(duplicates())
    assert course.tick() is not None
    course.took(Denied("p", "no access to its memory"))
    for _ in range(3):
        assert course.tick() is None
    assert (course.state.phase, course.state.fruitless) == (RecoveryPhase.IDLE, 1)
    assert "no access to its memory" in course.state.text


@pytest.mark.parametrize(("config", "busy"), [(CONFIG, True), (COUNTED, False)])
def test_it_makes_way(config: Config, busy: bool) -> None:
    course = Course()
    course.look()
    course.took(duplicates(parts=(UnsharePart(WHO, ((PAGE, PAGE * 3 * SLICE_PAGES),), 0),)))
    assert course.tick() is not None
    course.config, course.busy = config, busy
    assert course.tick(5) is None
    assert course.state.phase is RecoveryPhase.UNMERGING
    course.took(Cancelled("un-merging", "stopped"))
    assert course.tick() is None
    assert (course.state.phase, course.state.rounds) == (RecoveryPhase.IDLE, 0)
    course.quiet(90)
    assert "somebody else" in course.state.text or not busy


def test_an_un_merge_in_between_ends_the_round_without_a_verdict() -> None:
    course = Course()
    course.look()
    course.took(duplicates())
    course.unmerge()
    course.tick()
    course.counters["full_scans"] = 0
    course.tick()
    assert (course.state.phase, course.state.rounds, course.state.fruitless) == (RecoveryPhase.IDLE, 0, 0)


def test_other_reasons_stand_beside_it() -> None:
    state = DuplicatesRecovery(0.0, PAGE)
    state.unrealised = 12
    section = state.section(5.0, COUNTED, {"smart_scan": 7})
    assert section["unrealised"] == {"twins": 12, "smart_scan": 7}
    assert section["allowed"] is False
    assert section["looked_age_seconds"] is None
