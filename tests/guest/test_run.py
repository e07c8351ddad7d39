# SPDX-License-Identifier: GPL-2.0-or-later
"""The runner of guests without one, or with one that is ended early. What takes a whole one is in test_kernels.py."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.guest.boot import Console, Frames, Node
from tests.guest.cli import layout

RUN = Path(__file__).with_name("run")


def guest(
    *words: str | Path, timeout: float = 240, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, RUN, *words]
    return subprocess.run(command, capture_output=True, timeout=timeout, env=env, check=False)


# -- without a guest


@pytest.mark.parametrize(
    "words",
    [
        ["--kernel", "6.1"],
        ["--kernel", "2.2", "--", "true"],
        ["--kernel", "6.1", "--nodes", "5", "--", "true"],
        ["--kernel", "6.1", "--memory", "512,256,128", "--", "true"],
        ["--kernel", "6.1", "--share", "/nonexistent", "--", "true"],
        ["--kernel", "6.1", "--system", "trixie", "--", "true"],
        ["--", "true"],
    ],
)
def test_wrong_usage_exits_2(words: list[str]) -> None:
    assert guest(*words).returncode == 2


def test_a_machine_that_lacks_something_exits_4_in_two_lines(tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path), "KSMD_CTL_GUEST_CACHE": str(tmp_path)}
    done = guest("--kernel", "6.1", "--", "true", env=environment)
    assert done.returncode == 4
    what, hint = done.stderr.decode().splitlines()
    assert "apt-get" in what
    assert hint.startswith("hint: apt-get install ")


def test_cpus_are_on_the_first_two_nodes_unless_told_otherwise() -> None:
    assert layout(3, "256", None) == [Node(256, 1), Node(256, 1), Node(256, 0)]
    assert layout(2, "256,512", "2,0") == [Node(256, 2), Node(512, 0)]
    assert layout(2, "256", None, "0,128") == [Node(256, 1), Node(256, 1, removable=128)]


def test_frames_arrive_whole_however_the_stream_is_cut() -> None:
    stream = b"O\0\0\0\3abc" + b"E\0\0\0\0" + b"X\0\0\0\1" + b"7"
    frames = Frames()
    got = [frame for byte in stream for frame in frames.add(bytes([byte]))]
    assert got == [(b"O", b"abc"), (b"E", b""), (b"X", b"7")]


def test_the_panic_is_what_a_lost_guest_is_remembered_for() -> None:
    console = Console()
    for part in (b"booting\r\n[ 1.0] Kernel pan", b"ic - not syncing: x\r\n[ 1.1] CPU: 0\r\n"):
        console.add(part)
    assert console.last_words() == "[ 1.0] Kernel panic - not syncing: x"


# -- with one


@pytest.mark.guest
def test_a_guest_that_takes_too_long_is_lost() -> None:
    done = guest("--kernel", "6.12", "--timeout", "3", "--", "true")
    assert done.returncode == 128
    what, _hint = done.stderr.decode().splitlines()
    assert "no exit status in time" in what


@pytest.mark.guest
def test_ending_the_runner_ends_its_guest() -> None:
    with subprocess.Popen([sys.executable, RUN, "--kernel", "6.12", "--", "true"]) as runner:
        below = wait_for_qemu(psutil.Process(runner.pid))
        runner.send_signal(signal.SIGTERM)
        assert runner.wait(timeout=60) == 128 + signal.SIGTERM
    _gone, alive = psutil.wait_procs(below, timeout=30)
    assert not alive


def wait_for_qemu(runner: psutil.Process) -> list[psutil.Process]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        below = runner.children(recursive=True)
        if any(process.name().startswith("qemu") for process in below):
            return below
        time.sleep(0.05)
    pytest.fail("QEMU was not started")
