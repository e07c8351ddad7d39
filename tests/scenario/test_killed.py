# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl verify`` killed at any moment: the next start, of whichever program, leaves everything as it was."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from ksmd_ctl.kernel.ksmfs import KsmFs
from ksmd_ctl.scenario import lab_restore
from ksmd_ctl.scenario.format import LIBRARY
from tests.scenario.test_kernel_lab import children
from tests.service.running import PROGRAM, knobs, service, until

pytestmark = pytest.mark.ksm

RECORD = lab_restore.DIRECTORY / lab_restore.FILE
SMALL = sorted((LIBRARY / "seed").glob("*.toml"))[0]
# From its start, long enough for all it does: looking, finding the profile, scenarios.
LONGEST_SECONDS = 2.5


def lives(pid: int) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/exe") != ""
    except OSError:
        return False


@contextmanager
def verify(seed: int) -> Iterator[subprocess.Popen[bytes]]:
    command = [PROGRAM, "verify", "--random", str(seed), "--count", "1000000"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()


def killed(seed: int) -> None:
    """A run that was killed some time after its start, and whose processes are gone."""
    with verify(seed) as process:
        time.sleep(random.Random(seed).uniform(0, LONGEST_SECONDS))
        others = children(process.pid)
        process.kill()
    # Nobody waits for them here: they may still be ending when the next program starts.
    ended = time.monotonic() + 30
    while any(map(lives, others)):
        assert time.monotonic() < ended, f"seed {seed}: {others} are still there"
        time.sleep(0.01)


def killed_and_started_again(ksm_host: Path, folder: Path, starter: str, seed: int) -> None:
    """Kill a run, start something, and see that everything is as it was."""
    ksm = KsmFs()
    before, files = lab_restore.Before.look(ksm), knobs(ksm_host)
    killed(seed)
    if starter == "verify":
        done = subprocess.run([PROGRAM, "verify", str(SMALL)], capture_output=True, text=True, timeout=120, check=False)
        # It may need more nodes than there are here: then it was skipped, and has started all the same.
        assert done.returncode in (0, 4), (seed, done.stdout, done.stderr)
    elif starter == "unit":
        # What ExecStartPre= runs, as root, before a service that has no privilege.
        done = subprocess.run([PROGRAM, "daemon", "--repair"], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, (seed, done.stdout, done.stderr)
    else:
        holds = "" if starter == "observe" else "[knobs]\npages_to_scan = 1234\n"
        with service(folder, f"policy = '{starter}'\n{holds}") as running:
            held = knobs(ksm_host)
            wanted = files if starter == "observe" else files | {"pages_to_scan": "1234\n"}
            assert held == wanted, f"seed {seed}: {sorted(set(held.items()) ^ set(wanted.items()))}"
            assert running.end() == 0
    assert knobs(ksm_host) == files, f"seed {seed}"
    assert lab_restore.Before.look(ksm) == before, f"seed {seed}"
    assert not RECORD.exists()
    ksm.close()


@pytest.mark.parametrize("starter", ["observe", "fixed", "verify", "unit"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_what_a_killed_run_left_is_put_back(ksm_host: Path, tmp_path: Path, starter: str, seed: int) -> None:
    killed_and_started_again(ksm_host, tmp_path, starter, seed)


def kill_one(pids: set[int], chance: random.Random) -> None:
    """They come and go: one that has just ended is as good as none."""
    with suppress(IndexError, ProcessLookupError):
        os.kill(chance.choice(sorted(pids)), signal.SIGKILL)


def ended_by_a_kill(process: subprocess.Popen[bytes], chance: random.Random) -> int | None:
    """Its exit code, or None: one that it was ending itself at that moment is nothing to notice."""
    kill_one(children(process.pid), chance)
    with suppress(subprocess.TimeoutExpired):
        return process.wait(10)
    return None


def child_killed(ksm_host: Path, seed: int) -> None:
    """Kill one of a run's processes: it ends with an error, and everything is as it was."""
    ksm = KsmFs()
    before = lab_restore.Before.look(ksm)
    chance = random.Random(seed)
    with verify(seed) as process:
        until("the run to begin", lambda: RECORD.exists() or None)
        time.sleep(chance.uniform(0, LONGEST_SECONDS / 2))
        code = until("it to end because one of its processes was killed", lambda: ended_by_a_kill(process, chance))
        assert process.stderr is not None
        said = process.stderr.read().decode()
    assert code == 1, (seed, said)
    assert any(why in said for why in ("it has ended", "it is gone", "has just exited")), (seed, said)
    assert lab_restore.Before.look(ksm) == before, f"seed {seed}"
    assert not RECORD.exists()
    ksm.close()


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_a_run_whose_process_is_killed_ends_and_puts_back(ksm_host: Path, seed: int) -> None:
    child_killed(ksm_host, seed)


def told_to_stop(ksm_host: Path, seed: int) -> None:
    """Ask a run to stop, at any moment and twice: it puts everything back by itself."""
    ksm = KsmFs()
    before = lab_restore.Before.look(ksm)
    chance = random.Random(seed)
    with verify(seed) as process:
        if chance.random() < 0.5:
            # Where it begins to change things, there are the most moments that matter.
            until("the run to begin", lambda: RECORD.exists() or None)
            time.sleep(chance.uniform(0, 0.05))
        else:
            time.sleep(chance.uniform(0, LONGEST_SECONDS))
        process.send_signal(chance.choice((signal.SIGTERM, signal.SIGINT, signal.SIGHUP)))
        time.sleep(chance.uniform(0, 0.02))
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    # Before it listens to signals it has changed nothing.
    assert code in (130, -signal.SIGTERM, -signal.SIGHUP), f"seed {seed}: {code}"
    assert lab_restore.Before.look(ksm) == before, f"seed {seed}"
    assert not RECORD.exists(), f"seed {seed}"
    ksm.close()


@pytest.mark.parametrize("seed", range(6))
def test_a_run_that_is_told_to_stop_puts_back(ksm_host: Path, seed: int) -> None:
    told_to_stop(ksm_host, seed)
