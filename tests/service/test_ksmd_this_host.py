# SPDX-License-Identifier: GPL-2.0-or-later
"""[ksmd] on this host's ksmd: held, changed by somebody else, restored at the stop and after a kill, refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ksmd_ctl.kernel.procfs import find_ksmd
from tests.service.running import PROGRAM, Service, configure, run_command, service, until

pytestmark = pytest.mark.ksm

HELD = "policy = 'fixed'\n[ksmd]\ncpus = '{cpu}'\nscheduling = 'idle'\nnice = 11\n"


class Scheduling:
    """How this host's ksmd is scheduled, by the system calls themselves."""

    def __init__(self) -> None:
        self.pid = find_ksmd(Path("/proc"))

    def now(self) -> tuple[set[int], int, int]:
        nice = os.getpriority(os.PRIO_PROCESS, self.pid)
        return os.sched_getaffinity(self.pid), os.sched_getscheduler(self.pid), nice

    def is_now(self, *wanted: object) -> bool | None:
        return self.now() == wanted or None


@pytest.fixture
def ksmd(ksm_host: Path) -> Scheduling:
    return Scheduling()


@pytest.fixture
def cpu() -> int:
    return min(os.sched_getaffinity(0))


def knob(running: Service, name: str) -> dict[str, Any]:
    found: dict[str, Any] = running.status()["knobs"][name]
    return found


def foreign_change(running: Service, name: str) -> dict[str, Any] | None:
    """What somebody else changed, or None as long as it isn't told."""
    changes: list[dict[str, Any]] = running.status()["foreign_changes"]
    return next((one for one in changes if one["knob"] == name), None)


def test_it_is_held_and_put_back_at_the_stop(ksmd: Scheduling, cpu: int, tmp_path: Path) -> None:
    before = ksmd.now()
    with service(tmp_path, HELD.format(cpu=cpu)) as running:
        until("ksmd as configured", lambda: ksmd.is_now({cpu}, os.SCHED_IDLE, 11))
        until("the report of it", lambda: knob(running, "ksmd_nice")["state"] == "held" or None)
        found = {name: running.status()["knobs"][f"ksmd_{name}"]["found"] for name in ("cpus", "scheduling", "nice")}
        assert found == {"cpus": str(cpu), "scheduling": "idle", "nice": 11}
        figures = running.answers()
        assert figures is not None
        assert figures[f'ksm_ksmd_cpus{{ksm_ksmd_cpus="{cpu}"}}'] == 1
        assert figures['ksm_ksmd_scheduling{ksm_ksmd_scheduling="idle"}'] == 1
        assert figures["ksm_ksmd_nice"] == 11
        text = run_command("status", "--socket", str(tmp_path / "socket")).stdout
        assert f"held       ksmd_cpus {cpu}, ksmd_scheduling idle, ksmd_nice 11" in text
        assert running.end() == 0
    assert ksmd.now() == before


def test_what_somebody_else_changes_is_named_and_put_right(ksmd: Scheduling, cpu: int, tmp_path: Path) -> None:
    before = ksmd.now()
    log = tmp_path / "log"
    with log.open("w") as stderr, service(tmp_path, HELD.format(cpu=cpu), stderr=stderr) as running:
        until("ksmd as configured", lambda: ksmd.is_now({cpu}, os.SCHED_IDLE, 11))
        # Not before the service has seen that it is as wanted: what comes earlier is no drift.
        until("the report of it", lambda: knob(running, "ksmd_cpus")["state"] == "held" or None)
        os.sched_setaffinity(ksmd.pid, before[0])
        os.sched_setscheduler(ksmd.pid, os.SCHED_BATCH, os.sched_param(0))
        until("both again", lambda: ksmd.is_now({cpu}, os.SCHED_IDLE, 11))
        until("the drift", lambda: knob(running, "ksmd_cpus")["drift_total"] == 1 or None)
        figures = running.answers()
        assert figures is not None
        assert figures['ksmd_ctl_drift_total{knob="ksmd_scheduling"}'] == 1
        # They are told of once the programs that might have done it were looked for.
        change = until("the change", lambda: foreign_change(running, "ksmd_scheduling"))
        assert (change["from"], change["to"], change["held"]) == ("idle", "batch", True)
        assert running.end() == 0
    assert ksmd.now() == before
    assert "ksmd_scheduling was changed from idle to batch by somebody else" in log.read_text()


def test_with_on_drift_observe_it_is_left(ksmd: Scheduling, cpu: int, tmp_path: Path) -> None:
    with service(tmp_path, HELD.format(cpu=cpu), on_drift="observe") as running:
        until("ksmd as configured", lambda: knob(running, "ksmd_nice")["state"] == "held" or None)
        os.setpriority(os.PRIO_PROCESS, ksmd.pid, 3)
        until("the drift", lambda: knob(running, "ksmd_nice")["state"] == "drifted" or None)
        assert running.end() == 0
    # It was taken over, so the stop leaves it alone as well.
    assert os.getpriority(os.PRIO_PROCESS, ksmd.pid) == 3


def test_after_a_kill_it_can_be_restored(ksmd: Scheduling, cpu: int, tmp_path: Path) -> None:
    before = ksmd.now()
    with service(tmp_path, HELD.format(cpu=cpu)) as running:
        until("ksmd as configured", lambda: ksmd.is_now({cpu}, os.SCHED_IDLE, 11))
        running.end(signal.SIGKILL)
    assert ksmd.now() == ({cpu}, os.SCHED_IDLE, 11)
    path = configure(tmp_path, HELD.format(cpu=cpu))
    done = subprocess.run([PROGRAM, "daemon", "--restore", "--config", str(path)], check=True, capture_output=True)
    assert b"ksmd_scheduling = other (was idle)" in done.stderr + done.stdout
    assert ksmd.now() == before


def test_killed_and_started_again_it_still_knows_how_ksmd_was(ksmd: Scheduling, cpu: int, tmp_path: Path) -> None:
    before = ksmd.now()
    with service(tmp_path, HELD.format(cpu=cpu)) as running:
        until("ksmd as configured", lambda: ksmd.is_now({cpu}, os.SCHED_IDLE, 11))
        running.end(signal.SIGKILL)
    with service(tmp_path, HELD.format(cpu=cpu)) as running:
        until("the report of it", lambda: knob(running, "ksmd_cpus")["state"] == "held" or None)
        assert running.end() == 0
    assert ksmd.now() == before


def test_a_cpu_that_does_not_exist_is_a_finding_and_the_rest_is_held(ksmd: Scheduling, tmp_path: Path) -> None:
    before = ksmd.now()
    with service(tmp_path, "policy = 'fixed'\n[ksmd]\ncpus = '0,8000'\nnice = 7\n") as running:
        until("the refusal", lambda: knob(running, "ksmd_cpus")["state"] == "failed" or None)
        assert "this host has no CPU 8000" in knob(running, "ksmd_cpus")["reason"]
        until("the other", lambda: ksmd.is_now(before[0], before[1], 7))
        said = run_command("doctor", "--interval", "2", "--socket", str(tmp_path / "socket")).stdout
        assert "ksmd_cpus can't be set (ksmd-refused)" in said, said
        assert "this host has no CPU 8000" in said
        assert running.end() == 0
    assert ksmd.now() == before


def test_without_the_right_to_it_the_service_runs_and_says_so(ksmd: Scheduling, cpu: int, tmp_path: Path) -> None:
    before = ksmd.now()
    os.sched_setscheduler(ksmd.pid, os.SCHED_IDLE, os.sched_param(0))
    text = "policy = 'fixed'\n[knobs]\nsleep_millisecs = 44\n[ksmd]\nscheduling = 'other'\n"
    # Root owns ksmd; but whoever takes it out of SCHED_IDLE needs CAP_SYS_NICE, too (sched(7)).
    program = ("setpriv", "--bounding-set=-sys_nice", "--inh-caps=-sys_nice", PROGRAM)
    with service(tmp_path, text, program) as running:
        until("the refusal", lambda: knob(running, "ksmd_scheduling")["state"] == "failed" or None)
        assert "EPERM" in knob(running, "ksmd_scheduling")["reason"]
        until("the knob", lambda: running.has("sleep_millisecs", 44))
        assert running.end() == 0
    os.sched_setscheduler(ksmd.pid, before[1], os.sched_param(0))


@contextmanager
def machine(cpu: int) -> Iterator[None]:
    """A process that is called like QEMU, with a virtual CPU that is pinned."""
    command = [sys.executable, "-c", f"from {__name__} import be_machine; be_machine({cpu})"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "pinned\n"
            yield
        finally:
            process.kill()


def be_machine(cpu: int) -> None:
    Path("/proc/self/comm").write_text("qemu-system-x86")

    def virtual_cpu() -> None:
        Path("/proc/thread-self/comm").write_text("CPU 0/KVM")
        os.sched_setaffinity(0, {cpu})
        print("pinned", flush=True)
        threading.Event().wait()

    threading.Thread(target=virtual_cpu, daemon=True).start()
    sys.stdin.read()


def test_housekeeping_leaves_out_the_cpu_of_a_pinned_virtual_cpu(ksmd: Scheduling, tmp_path: Path) -> None:
    before = ksmd.now()
    all_cpus = sorted(os.sched_getaffinity(0))
    if len(all_cpus) < 2:
        pytest.skip("needs two CPUs")
    text = "policy = 'fixed'\n[ksmd]\ncpus = 'housekeeping'\n"
    with machine(all_cpus[-1]), service(tmp_path, text) as running:
        until("ksmd on the others", lambda: ksmd.is_now(set(all_cpus[:-1]), *before[1:]))
        until("the report of it", lambda: knob(running, "ksmd_cpus")["state"] == "held" or None)
        assert running.end() == 0
    assert ksmd.now() == before
