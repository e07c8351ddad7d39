# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

from pathlib import Path

import pytest

from ksmd_ctl.errors import NoSuchProcess, Refused
from ksmd_ctl.kernel import threads
from ksmd_ctl.kernel.threads import Thread, choose


def tree(root: Path, *found: Thread) -> Path:
    """A /proc with process 7."""
    for thread in found:
        folder = root / f"proc/7/task/{thread.tid}"
        folder.mkdir(parents=True)
        (folder / "status").write_text(
            f"Name:\tx\nState:\t{thread.state} (whatever)\nTracerPid:\t{thread.tracer}\nSeccomp:\t{thread.seccomp}\n"
        )
    return root


def test_the_first_one_without_a_filter(tmp_path: Path) -> None:
    root = tree(tmp_path, Thread(9, "S", 0, 0), Thread(7, "S", 0, 2), Thread(8, "D", 0, 0), Thread(10, "R", 0, 0))
    assert [thread.tid for thread in threads.threads(7, root)] == [7, 8, 9, 10]
    assert choose(7, "a call", root).tid == 9


def test_all_are_filtered(tmp_path: Path) -> None:
    assert choose(7, "a call", tree(tmp_path, Thread(8, "S", 0, 2), Thread(7, "R", 0, 2))).tid == 7


def test_none_can_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree(tmp_path, Thread(7, "D", 0, 0), Thread(8, "Z", 0, 0))
    monkeypatch.setattr(threads, "_PAUSE_SECONDS", 0)
    with pytest.raises(Refused, match="state D"):
        choose(7, "a call", root)


def test_a_moment_later_one_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree(tmp_path, Thread(7, "D", 0, 0))
    status = root / "proc/7/task/7/status"
    monkeypatch.setattr(threads.time, "sleep", lambda _: status.write_text(status.read_text().replace("D", "S")))
    assert choose(7, "a call", root) == Thread(7, "S", 0, 0)


def test_all_have_ended(tmp_path: Path) -> None:
    with pytest.raises(NoSuchProcess, match="it has exited"):
        choose(7, "a call", tree(tmp_path, Thread(7, "Z", 0, 0)))
    with pytest.raises(NoSuchProcess, match="it is gone"):
        choose(8, "a call", tmp_path)


def test_who_traces_it_is_named(tmp_path: Path) -> None:
    root = tree(tmp_path, Thread(7, "t", 42, 0))
    with pytest.raises(Refused, match="process 42 traces it"):
        choose(7, "a call", root)
    (root / "proc/42").mkdir()
    (root / "proc/42/stat").write_text("42 (g d) b) S " + " ".join(["1"] * 40))
    with pytest.raises(Refused, match=r"g d\) b \(pid 42\) traces it"):
        choose(7, "a call", root)
