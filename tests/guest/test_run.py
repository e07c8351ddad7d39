# SPDX-License-Identifier: GPL-2.0-or-later
"""The runner of guests keeps its word: status, output, nodes, and what it says of a loss."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.guest.boot import Console, Frames, Node
from tests.guest.cli import layout

RUN = Path(__file__).with_name("run")
# Files in /sys/kernel/mm/ksm: the smart scan and the advisor came after 6.1.
KSM_FILES = {"6.1": 14, "6.12": 24}


def guest(
    *words: str | Path, timeout: float = 240, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, RUN, *words]
    return subprocess.run(command, capture_output=True, timeout=timeout, env=env, check=False)


def facts(*words: str | Path) -> dict[str, Any]:
    done = guest(*words, "--", "python3", "tests/guest/probe.py")
    assert (done.returncode, done.stderr) == (0, b"")
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


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
def test_two_nodes_and_ksm_on_an_older_kernel() -> None:
    found = facts("--kernel", "6.1")
    assert found["release"].startswith("6.1.")
    assert found["cpus"] == {"node0": "0", "node1": "1"}
    check(found, KSM_FILES["6.1"])


@pytest.mark.guest
def test_four_nodes_of_which_two_have_memory_only_and_one_can_lose_it() -> None:
    found = facts("--kernel", "6.12", "--nodes", "4", "--memory", "256,256,256,0", "--removable", "0,0,0,256")
    assert found["removed"] == {"node3": 256}
    assert found["cpus"] == {"node0": "0", "node1": "1", "node2": "", "node3": ""}
    check(found, KSM_FILES["6.12"])


def check(found: dict[str, Any], ksm_files: int) -> None:
    # What the kernel keeps for itself lies on whichever node it was put on at random.
    assert all(memory > 100 for memory in found["nodes"].values())
    assert found["libnuma"] == len(found["nodes"]) - 1
    assert found["kpageflags"]
    assert {"cpuset", "memory"} <= set(found["controllers"])
    assert found["ksm_files"] == ksm_files
    assert found["merged"] == 63


AWKWARD = ["a b", "it's", 'a "quote"', "$HOME `id`", "", "two\nlines", "\\", "é", "--nodes"]
SAY = """
import sys, os, pathlib
share, *words = sys.argv[1:]
pathlib.Path(share, "from-guest").write_text("\\0".join(words))
pathlib.Path("scratch-of-guest").touch()
sys.stdout.buffer.write(bytes(range(256)) * 1000)
sys.stderr.write("one\\ntwo\\r\\nthree")
print(len(list(pathlib.Path("/sys/devices/system/node").glob("node[0-9]*"))), os.environ["PATH"], file=sys.stderr)
sys.exit(77)
"""


@pytest.mark.guest
def test_status_output_arguments_and_shares_come_through(tmp_path: Path) -> None:
    done = guest(
        "--kernel", "6.12", "--nodes", "1", "--share", tmp_path, "--", "python3", "-c", SAY, tmp_path, *AWKWARD
    )
    assert done.returncode == 77
    assert done.stdout == bytes(range(256)) * 1000
    assert done.stderr.startswith(b"one\ntwo\r\nthree1 ")
    assert (tmp_path / "from-guest").read_text() == "\0".join(AWKWARD)
    checkout = RUN.parents[2]
    assert not (checkout / "scratch-of-guest").exists()
    if (checkout / ".venv").is_dir():
        assert f"{checkout}/.venv/bin:".encode() in done.stderr


@pytest.mark.guest
def test_a_guest_that_panics_is_lost() -> None:
    done = guest("--kernel", "6.12", "--nodes", "1", "--", "sh", "-c", "echo c > /proc/sysrq-trigger")
    assert done.returncode == 128
    what, hint = done.stderr.decode().splitlines()
    assert "lost: " in what
    assert "Kernel panic" in what
    assert "Kernel panic" in Path(hint.split()[-1]).read_text()


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


@pytest.mark.system
@pytest.mark.skipif(os.geteuid() != 0, reason="building the image needs root")
def test_a_system_is_up_before_the_command_runs(tmp_path: Path) -> None:
    probe = "systemctl is-active multi-user.target && python3 tests/guest/probe.py && touch $1/written && exit 9"
    done = guest("--system", "trixie", "--share", tmp_path, "--", "sh", "-c", probe, "sh", tmp_path, timeout=400)
    assert done.returncode == 9
    assert (tmp_path / "written").exists()
    state, printed = done.stdout.decode().splitlines()
    assert state == "active"
    check(json.loads(printed), KSM_FILES["6.12"])
