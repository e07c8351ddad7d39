# SPDX-License-Identifier: GPL-2.0-or-later
"""A recording that is replayed: exactly where all is known, and nearly where contents are sampled."""

from __future__ import annotations

from pathlib import Path

import pytest

from ksmd_ctl.config.model import Config, PolicyName, Want
from ksmd_ctl.engine.memory import page_content
from ksmd_ctl.errors import UsageError
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.recording.reader import Recording
from ksmd_ctl.replay.player import Choices, Player, Point
from tests.replay.recordings import Stage, contents, replayed

COUNTERS = ("pages_shared", "pages_sharing", "pages_unshared", "full_scans", "pages_scanned", "stable_node_chains")


def differing(points: list[Point]) -> list[tuple[float, str, object, object]]:
    return [
        (point.recorded.time_seconds, name, point.recorded.number(name), point.replayed.number(name))
        for point in points
        for name in COUNTERS
        if point.recorded.number(name) != point.replayed.number(name)
    ]


@pytest.mark.parametrize(
    "knobs",
    [{}, {Knob.SMART_SCAN: 1}, {Knob.MERGE_ACROSS_NODES: 0}, {Knob.USE_ZERO_PAGES: 1}, {Knob.MAX_PAGE_SHARING: 4}],
)
def test_everything_that_is_known_is_replayed_exactly(tmp_path: Path, knobs: dict[Knob, int]) -> None:
    stage = Stage(tmp_path / "r.ksm")
    for knob, value in ({Knob.PAGES_TO_SCAN: 15} | knobs).items():
        stage.host.set(knob, value)
    pids = [stage.spawn(contents(number, 300), number % 2) for number in range(3)]
    stage.change(lambda: stage.host.set(Knob.RUN, 1))
    stage.pass_time(2)
    stage.change(lambda: pids.append(stage.spawn(contents(3, 300), 1)))
    stage.pass_time(2)
    stage.change(lambda: [stage.write(pids[1], page, page_content(f"written {page}")) for page in range(0, 300, 7)])
    stage.pass_time(2)
    stage.change(lambda: stage.host.set(Knob.PAGES_TO_SCAN, 50))
    stage.pass_time(1)
    stage.change(lambda: stage.host.machine.exit(pids[0]))
    stage.pass_time(2)
    points = replayed(stage.end())
    assert points[-1].recorded.number("pages_sharing") > 150  # type: ignore[operator]
    assert differing(points) == []


def worked(path: Path, *, one_in: int = 1, pages: int = 400, key: bytes | None = None, first: int = 0) -> Path:
    """Three processes while ksmd is at work, which has merged for some seconds before."""
    stage = Stage(path, one_in=one_in, key=key)
    stage.host.set(Knob.PAGES_TO_SCAN, pages // 20)
    for number in range(3):
        stage.spawn(contents(number, pages), number % 2)
    stage.host.set(Knob.RUN, 1)
    stage.host.advance(first)
    stage.change(lambda: None)
    stage.pass_time(6)
    return stage.end()


def test_a_sample_behaves_as_the_whole(tmp_path: Path) -> None:
    points = replayed(worked(tmp_path / "r.ksm", one_in=8, pages=8000, key=bytes(range(16))))
    last = points[-1]
    for name in ("pages_shared", "pages_sharing", "pages_scanned", "ksmd_cpu_seconds"):
        assert last.replayed.number(name) == pytest.approx(last.recorded.number(name), rel=0.06), name
    assert last.replayed.number("full_scans") == pytest.approx(last.recorded.number("full_scans"), abs=1)


def test_what_was_merged_before_the_recording_is_merged_from_the_beginning(tmp_path: Path) -> None:
    points = replayed(worked(tmp_path / "r.ksm", first=20))
    assert points[0].recorded.number("pages_sharing") > 100  # type: ignore[operator]
    for point in (points[0], points[-1]):
        assert point.replayed.number("pages_sharing") == point.recorded.number("pages_sharing")
    # What counts up begins with the replay.
    assert points[0].replayed.number("pages_scanned") == 0
    assert points[0].replayed.number("ksmd_cpu_seconds") == 0


def test_a_chosen_knob_has_its_value_all_the_time(tmp_path: Path) -> None:
    path = worked(tmp_path / "r.ksm", first=20)
    across = replayed(path)[-1].replayed
    points = replayed(path, Choices({Knob.MERGE_ACROSS_NODES: 0}))
    assert {point.replayed.number("merge_across_nodes") for point in points} == {0}
    assert {point.recorded.number("merge_across_nodes") for point in points} == {1}
    apart = points[-1].replayed
    assert 0 < apart.number("pages_sharing") < across.number("pages_sharing")  # type: ignore[operator]


def test_ksmd_that_is_stopped_merges_nothing(tmp_path: Path) -> None:
    points = replayed(worked(tmp_path / "r.ksm"), Choices({Knob.RUN: 0}))
    assert {point.replayed.number("pages_sharing") for point in points} == {0}


def test_a_policy_decides_in_place_of_the_recorded_knobs(tmp_path: Path) -> None:
    path = worked(tmp_path / "r.ksm")
    points = replayed(path, Choices({}, Config(policy=PolicyName.ADAPTIVE)))
    assert points[-1].replayed.number("pages_to_scan") != points[-1].recorded.number("pages_to_scan")
    assert points[-1].replayed.number("run") == 1
    saved = [point.replayed.number("general_profit") or 0 for point in points]
    assert saved[-1] > 0.9 * (points[-1].recorded.number("general_profit") or 0)
    # It writes nothing: others write as they did.
    watched = replayed(path, Choices({}, Config(policy=PolicyName.OBSERVE)))
    assert {point.replayed.number("run") for point in watched} == {1}
    assert differing(watched) == []


def test_knobs_that_no_policy_holds_are_as_recorded(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "r.ksm")
    stage.spawn(contents(0, 100))
    stage.host.set(Knob.RUN, 1)
    stage.change(lambda: None)
    stage.pass_time(2)
    stage.change(lambda: [stage.host.set(Knob.SLEEP_MILLISECS, 55), stage.host.set(Knob.PAGES_TO_SCAN, 500)])
    stage.pass_time(2)
    held = Config(policy=PolicyName.FIXED, knobs={Knob.PAGES_TO_SCAN: Want(77)})
    last = replayed(stage.end(), Choices({}, held))[-1].replayed
    assert (last.number("sleep_millisecs"), last.number("pages_to_scan"), last.number("run")) == (55, 77, 1)


def test_a_knob_that_could_only_change_with_nothing_merged_is_changed_as_on_the_host(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "r.ksm")
    stage.host.set(Knob.PAGES_TO_SCAN, 50)
    for number in range(2):
        stage.spawn(contents(number, 300), number)
    stage.host.set(Knob.RUN, 1)
    stage.change(lambda: None)
    stage.pass_time(3)

    def transaction() -> None:
        stage.host.set(Knob.RUN, 2)
        stage.host.set(Knob.MERGE_ACROSS_NODES, 0)
        stage.host.set(Knob.RUN, 1)

    stage.change(transaction)
    stage.pass_time(3)
    with Recording(stage.end()) as recording:
        player = Player(recording, Choices({}))
        points = list(player.play())
    assert player.refused == {}
    last = points[-1]
    assert last.replayed.number("merge_across_nodes") == 0
    assert last.replayed.number("pages_sharing") == last.recorded.number("pages_sharing")


def test_a_process_that_ends_between_two_looks(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "r.ksm")
    pids = [stage.spawn(contents(number, 200)) for number in range(2)]
    stage.host.set(Knob.RUN, 1)
    stage.change(lambda: None)
    stage.pass_time(8)
    stage.host.machine.exit(pids[0])
    stage.pass_time(8)
    points = replayed(stage.end())
    assert points[-1].replayed.number("pages_unshared") == points[-1].recorded.number("pages_unshared")


@pytest.mark.parametrize("first", [0, 6])
def test_what_fork_shares_is_one_page(tmp_path: Path, first: int) -> None:
    """The parent forks before the recording begins, and then once more."""
    stage = Stage(tmp_path / "r.ksm")
    stage.host.set(Knob.PAGES_TO_SCAN, 20)
    stage.host.set(Knob.RUN, 1)
    parent = stage.spawn([page_content(f"own {page}") for page in range(100)])
    stage.spawn([page_content(f"own {page}") for page in range(30)])
    stage.host.machine.fork(parent, "child")
    stage.host.advance(first)
    stage.change(lambda: None)
    stage.pass_time(4)
    stage.change(lambda: stage.host.machine.fork(parent, "second"))
    stage.pass_time(4)
    last = replayed(stage.end())[-1]
    for name in ("pages_shared", "pages_sharing"):
        assert last.replayed.number(name) == last.recorded.number(name) > 0, name  # type: ignore[operator]


def test_an_unknown_profile_and_a_knob_that_it_lacks(tmp_path: Path) -> None:
    path = worked(tmp_path / "r.ksm")
    with pytest.raises(UsageError, match="is not one of"):
        replayed(path, Choices({}, profile="2.0"))
    with pytest.raises(UsageError, match=r"profile 4\.10 does not have smart_scan"):
        replayed(path, Choices({Knob.SMART_SCAN: 1}, profile="4.10"))
    assert replayed(path, Choices({}, profile="4.10"))[-1].replayed.number("smart_scan") is None


def test_a_recording_without_samples_can_not_be_replayed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="it has no samples"):
        replayed(Stage(tmp_path / "r.ksm").end())
