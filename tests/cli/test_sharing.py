# SPDX-License-Identifier: GPL-2.0-or-later
"""sharing: its document, what people read, and the way to the service or past it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from ksmd_ctl.cli import host, sharing
from ksmd_ctl.cli.main import main
from ksmd_ctl.errors import Denied, ExitCode
from ksmd_ctl.host.operation import finish
from ksmd_ctl.reports.sharing import grouping, sharing_document
from tests.cli.fakes import listening, reply
from tests.cli.test_numa import contract, shape
from tests.fakes.host import FakeHost, process

PAGE = 4096


def machine(groups: int = 3) -> FakeHost:
    """Each shares 1000 frames with the next, and 50 with itself."""
    found = FakeHost()
    found.running = [process(pid, f"web-{pid}", 5000) for pid in range(1, groups + 1)]
    found.frames = [{pid: 1, pid + 1: 1} for pid in range(1, groups) for _ in range(1000)]
    found.frames += [{pid: 2} for pid in range(1, groups + 1) for _ in range(50)]
    return found


def text(there: FakeHost, limit: int = 20) -> list[str]:
    groups = grouping(there.running, "unit")
    found = finish(there.sharing(groups.members, 1.0))
    return list(sharing.lines(sharing_document(there.identity, groups, found, there.now), limit))


def estimate(there: FakeHost, share: float) -> Any:
    groups = grouping(there.running, "unit")
    found = finish(there.sharing(groups.members, 1.0))
    sampled = type(found)(0.0, found.sets, found.alone, share, False, found.detection)
    return sharing_document(there.identity, groups, sampled, 1.0)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    there = machine()
    monkeypatch.setattr(host, "open_host", lambda *_, **__: nullcontext(there))

    def command(*words: str) -> tuple[int, str, str]:
        code = main(["sharing", *words, "--socket", str(tmp_path / "s")])
        said = capsys.readouterr()
        return code, said.out, said.err

    command.host = there  # type: ignore[attr-defined]
    return command


def test_the_document_has_the_form_of_the_example() -> None:
    there = machine()
    groups = grouping(there.running, "unit")
    found = sharing_document(there.identity, groups, finish(there.sharing(groups.members, 1.0)), there.now)
    assert shape(found) == shape(contract("sharing"))


def test_a_few_groups_have_a_matrix() -> None:
    lines = text(machine())
    assert re.split("  +", lines[0]) == [
        *("group", "merged", "shared with others", "saved alone", "saved in all", "leaving costs")
    ]
    # The one in the middle shares with both.
    assert lines[1].split() == ["web-2", "8.2", "MiB", "7.8", "MiB", "200.0", "KiB", "4.1", "MiB", "7.8", "MiB"]
    at = lines.index("memory that two of them share, and what only one maps:")
    assert [line.split() for line in lines[at + 2 : at + 5]] == [
        ["1", "web-2", "200", "KiB", "3.9", "MiB", "3.9", "MiB"],
        ["2", "web-1", "3.9", "MiB", "200", "KiB", "-"],
        ["3", "web-3", "3.9", "MiB", "-", "200", "KiB"],
    ]
    assert lines[-1] == "looked just now, all frames counted, 20 ms of CPU"


def test_many_groups_have_the_largest_pairs_and_say_how_many_more_there_are() -> None:
    lines = text(machine(30), limit=5)
    assert sum(line.startswith("web-") for line in lines) == 10
    assert [line for line in lines if "more" in line] == [
        "25 more groups; --json has more",
        "24 more pairs; --json has more",
    ]
    assert max(map(len, lines)) <= 100
    assert max(map(len, text(machine(8)))) <= 100


def test_where_not_all_was_counted_nothing_is_said_to_be_shared_by_nobody() -> None:
    there = machine(2)
    there.frames = [{1: 2}, {2: 2}]
    assert "no two of them share a frame" in text(there)
    said = list(sharing.lines(estimate(there, 0.25)))
    assert "no frame was found that two of them share" in said


def test_an_estimate_has_its_interval_and_no_matrix() -> None:
    document = estimate(machine(), 0.25)
    said = "\n".join(sharing.lines(document))
    assert "4,000 (3," in said
    assert "estimated from 25.0 % of all frames (95 % interval in brackets)" in said
    assert "only one maps" not in said


def test_what_fork_shares_has_columns_where_there_is_any() -> None:
    document = estimate(machine(), 1.0)
    assert "fork" not in "\n".join(sharing.lines(document))
    document["groups"][0]["forked_bytes"] = 8192
    assert "fork" in "\n".join(sharing.lines(document))


def test_what_is_left_out_is_said() -> None:
    document = estimate(machine(), 1.0)
    document["look"] |= {"unseen_frames": 7, "unread": [11, 12], "gone": [13], "left_out": 2}
    said = "\n".join(sharing.lines(document))
    for part in (
        "7 merged frames are also mapped by somebody who is not among these",
        "2 processes could not be looked at, or there was no time (--budget): pid 11, 12",
        "1 process ended meanwhile: pid 13",
        "2 processes with few merged pages left out",
    ):
        assert part in said


def test_without_merged_pages_there_is_nothing_to_show() -> None:
    there = machine()
    there.running, there.frames = [], []
    assert text(there) == ["nobody has merged pages"]


def test_without_a_service_it_looks_itself(run: Any) -> None:
    code, out, _ = run("--by", "process", "--budget", "2")
    assert code == ExitCode.DONE
    assert "no service runs" in out
    assert "p2[2]" in out
    assert run.host.sharing_looks == [([[1], [2], [3]], 2.0)]
    document = json.loads(run("--json")[1])
    assert (document["by"], len(document["groups"]), len(document["pairs"])) == ("unit", 3, 2)
    document = json.loads(run("--json", "--limit", "1")[1])
    assert (len(document["groups"]), len(document["pairs"])) == (1, 1)


@pytest.mark.parametrize("words", [["--by", "user"], ["--limit", "0"], ["--budget", "0"], ["--budget", "61"], ["x"]])
def test_words_that_it_does_not_take(run: Any, words: list[str]) -> None:
    assert run(*words)[0] == ExitCode.USAGE


def test_without_permission_it_says_so(run: Any) -> None:
    run.host.sharing_outcome = Denied("looking", "it needs CAP_SYS_ADMIN", hint="run as root")
    code, out, err = run("--json")
    assert (code, out) == (ExitCode.DENIED, "")
    assert "CAP_SYS_ADMIN" in err


def test_the_service_is_asked_with_what_was_asked_for(run: Callable[..., Any], tmp_path: Path) -> None:
    document = estimate(machine(), 1.0)
    with listening(tmp_path / "s", lambda _: reply(sharing=document)) as requests:
        code, out, _ = run("--by", "process")
        assert (code, "web-2" in out) == (ExitCode.DONE, True)
        # It changes nothing: one answer, with a deadline.
        assert requests == [
            {"method": "io.ksmd-ctl.Sharing", "parameters": {"by": "process", "budget_seconds": 5.0}},
        ]
