# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that outlive a process."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ksmd_ctl.errors import Refused, Unreadable
from ksmd_ctl.statefiles import (
    LOCK,
    MALFORMED,
    became_of,
    holder,
    host_locked,
    parse_json,
    put_aside,
    read_file,
    replace_file,
)


def test_what_is_not_there_is_none(tmp_path: Path) -> None:
    assert read_file(tmp_path / "state.json", "reading", 100) is None


def test_what_cannot_be_read_says_path_and_errno(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "state.json"
    with pytest.raises(Unreadable, match="reading the state") as caught:
        read_file(path, "reading the state", 100)
    assert (caught.value.path, caught.value.errno) == (str(path), errno.ENOTDIR)


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    for content in (b"first", b"second, and longer", b""):
        replace_file(path, content)
        assert read_file(path, "reading", 100) == content
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_link_in_the_way_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "state.json.new").symlink_to(victim)
    replace_file(tmp_path / "state.json", b"new")
    assert victim.read_text() == "mine"


def test_what_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    replace_file(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state.json"]


def test_what_nobody_understands_is_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(b"\xff")
    damaged = put_aside(path)
    assert (damaged, became_of(path, damaged)) == (f"{path}.damaged", f"was put aside as {path}.damaged")
    assert (path.exists(), Path(f"{path}.damaged").read_bytes()) == (False, b"\xff")


def test_what_can_not_be_put_aside_is_said_to_stay(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(b"\xff")
    Path(f"{path}.damaged").mkdir()
    damaged = put_aside(path)
    assert (damaged, became_of(path, damaged)) == (str(path), f"stays at {path}")
    assert path.read_bytes() == b"\xff"


@pytest.mark.parametrize(
    "text", ["NaN", "[Infinity]", '{"a": 1e400}', "-1e999", '"\\ud800"', '{"\\udfff": 1}', "1" * 5000, "[" * 100_000]
)
def test_what_python_reads_and_nobody_can_write_is_not_taken(text: str) -> None:
    with pytest.raises(MALFORMED):
        parse_json(text.encode())


def folders(path: Path, *names: str) -> list[str]:
    return [str(path / name) for name in names]


def test_who_has_another_runtime_directory_is_refused_by_the_state_directory(tmp_path: Path) -> None:
    here, pod, state = folders(tmp_path, "run", "pod", "state")
    with host_locked(here, state, "ksmd-ctl daemon"):
        with pytest.raises(Refused) as caught, host_locked(pod, state, "another"):
            pass
        assert caught.value.why == f"ksmd-ctl daemon (pid {os.getpid()}) holds {state}/lock"
        assert "pod" in (caught.value.hint or "")
        # What it had taken before is free again.
        with host_locked(pod, *folders(tmp_path, "other"), "another") as lock:
            assert lock.path == tmp_path / "pod" / LOCK
    with host_locked(pod, state, "another"):
        assert holder(tmp_path / "state" / LOCK) == f"another (pid {os.getpid()})"


def test_a_state_directory_that_cannot_be_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    with host_locked(*folders(tmp_path, "run", "state"), "ksmd-ctl daemon") as lock:
        assert lock.path == tmp_path / "run" / LOCK
