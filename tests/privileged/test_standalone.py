# SPDX-License-Identifier: GPL-2.0-or-later
"""The broker without systemd: a program of its own, as it runs in a container."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ksmd_ctl.errors import Denied, UsageError
from ksmd_ctl.privileged import standalone
from ksmd_ctl.statefiles import LOCK, HostLock

PATIENCE_SECONDS = 15.0
SERVICE_UID = 19753


@contextmanager
def broker(folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A broker whose socket is there."""
    path = folder / "broker.socket"
    words = [sys.executable, "-m", "ksmd_ctl.cli.main", "broker", f"--user={os.getuid()}", f"--socket={path}"]
    words += ["--standalone", f"--state-directory={folder / 'state'}", *options]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        try:
            until = time.monotonic() + PATIENCE_SECONDS
            while not answers(path):
                assert process.poll() is None, "it has ended"
                assert time.monotonic() < until, "it does not listen"
                time.sleep(0.02)
            yield process
        finally:
            process.kill()


def answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def test_it_stays_without_work_and_ends_with_sigterm(tmp_path: Path) -> None:
    with broker(tmp_path, "--idle-seconds=0.1") as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.7)
        assert answers(tmp_path / "broker.socket")
        process.terminate()
        assert process.wait(PATIENCE_SECONDS) == 0


def test_it_serves_until_the_service_has_ended_whichever_is_stopped_first(tmp_path: Path) -> None:
    with broker(tmp_path) as process:
        with HostLock(tmp_path / LOCK, "ksmd-ctl daemon"):
            process.terminate()
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
            assert answers(tmp_path / "broker.socket")
        assert process.wait(PATIENCE_SECONDS) == 0


def test_a_service_that_was_killed_is_not_waited_for(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    (tmp_path / "lock.holder").write_text(f"{gone.pid} ksmd-ctl daemon\n")
    with broker(tmp_path) as process:
        process.terminate()
        assert process.wait(5) == 0


def test_the_next_one_takes_the_socket_of_one_that_was_killed(tmp_path: Path) -> None:
    with broker(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE_SECONDS)
    assert (tmp_path / "broker.socket").is_socket()
    with broker(tmp_path):
        assert answers(tmp_path / "broker.socket")


def test_what_is_no_socket_stays_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "broker.socket"
    path.write_text("mine")
    with pytest.raises(UsageError, match="no socket"):
        standalone.clear(path)
    assert path.read_text() == "mine"


def test_it_takes_a_socket_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    from ksmd_ctl.privileged.broker import main

    assert main(["--standalone", "--user=0"]) == 2
    assert "a socket of its own" in capsys.readouterr().err


def owner(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_uid, found.st_gid, found.st_mode & 0o7777


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give directories away")
def test_directories_that_the_runtime_made_become_the_services(tmp_path: Path) -> None:
    state, runtime = tmp_path / "state", tmp_path / "run"
    for folder in (state, runtime):
        folder.mkdir(0o700)
    standalone.prepare(state, runtime, SERVICE_UID, tmp_path)
    assert owner(state) == (SERVICE_UID, SERVICE_UID, 0o755)
    # Root makes its socket there without CAP_DAC_OVERRIDE.
    assert owner(runtime) == (0, SERVICE_UID, 0o775)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give directories away")
def test_directories_that_the_service_can_write_already_stay_as_they_are(tmp_path: Path) -> None:
    state, runtime = tmp_path / "state", tmp_path / "run"
    for folder in (state, runtime):
        folder.mkdir()
    os.chown(state, 4711, 4711)
    runtime.chmod(0o777)
    before = owner(state), owner(runtime)
    standalone.prepare(state, runtime, SERVICE_UID, tmp_path)
    assert (owner(state), owner(runtime)) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give directories away")
def test_a_volume_that_the_service_had_first_becomes_roots_and_stays_writable_for_it(tmp_path: Path) -> None:
    state, runtime = tmp_path / "state", tmp_path / "run"
    for folder in (state, runtime):
        folder.mkdir()
        os.chown(folder, SERVICE_UID, SERVICE_UID)
    standalone.prepare(state, runtime, SERVICE_UID, tmp_path)
    assert owner(state) == (SERVICE_UID, SERVICE_UID, 0o755)
    assert owner(runtime) == (0, SERVICE_UID, 0o775)


def test_a_directory_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "state").symlink_to("/etc")
    before = owner(Path("/etc"))
    with pytest.raises(Denied, match="giving"):
        standalone.prepare(tmp_path / "state", tmp_path / "run", SERVICE_UID, tmp_path)
    assert owner(Path("/etc")) == before


def test_what_is_hidden_from_it_is_said_and_it_serves_all_the_same(tmp_path: Path) -> None:
    with broker(tmp_path, f"--root={tmp_path}") as process:
        process.terminate()
        _, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert "hint: share the host's: hostPID: true" in said
    assert "sys/kernel/mm/ksm" in said
