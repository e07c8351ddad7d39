# SPDX-License-Identifier: GPL-2.0-or-later
"""What all tests share: skips that turn into failures, and the right to use this host's KSM."""

from __future__ import annotations

import fcntl
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from ksmd_ctl.kernel.procfs import find_ksmd

KSM = Path("/sys/kernel/mm/ksm")
CGROUPS = Path("/sys/fs/cgroup")
FORCE = bool(os.environ.get("KSMD_CTL_FORCE"))

settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("dev"), derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell without job control has what it starts with `&` ignore it, and what that starts as well: no Ctrl-C would
    # reach a command that is tested.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def signals_blocked_as_before() -> Iterator[None]:
    """The service blocks signals for the rest of its process's life: the next test would find what waits for it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if FORCE and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, and KSMD_CTL_FORCE makes that a failure: {report.longrepr}"
    return report


def _registered() -> list[str]:
    """Processes that ksmd has items of, where the kernel tells."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/ksm_stat"):
        try:
            items = int(stat.read_text().split()[1])
            if items:
                found.append(f"{stat.parent.name} ({(stat.parent / 'comm').read_text().strip()})")
        except (OSError, ValueError, IndexError):
            continue
    return found


@contextmanager
def ksm_lock() -> Iterator[None]:
    """This host's KSM for one test alone."""
    with open(Path(tempfile.gettempdir()) / "ksmd-ctl-ksm.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def ksm_host() -> Iterator[Path]:
    """This host's KSM for one test alone: its folder in /sys, every knob and ksmd's scheduling put back afterwards.

    Fails where somebody else's memory is registered: its pages would be in every figure.
    """
    if not KSM.is_dir():
        pytest.skip("this kernel has no KSM (/sys/kernel/mm/ksm)")
    if not os.access(KSM / "run", os.W_OK):
        pytest.skip("needs root to write /sys/kernel/mm/ksm")
    with ksm_lock():
        foreign = _registered()
        if foreign:
            pytest.fail(f"other processes are registered with KSM: {', '.join(foreign)}")
        before = {path.name: path.read_text() for path in KSM.iterdir() if os.stat(path).st_mode & 0o200}
        ksmd = find_ksmd(Path("/proc"))
        cpus, policy = os.sched_getaffinity(ksmd), os.sched_getscheduler(ksmd)
        nice = os.getpriority(os.PRIO_PROCESS, ksmd)
        try:
            yield KSM
        finally:
            restore(before)
            os.sched_setaffinity(ksmd, cpus)
            os.sched_setscheduler(ksmd, policy, os.sched_param(0))
            os.setpriority(os.PRIO_PROCESS, ksmd, nice)


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A fresh memory cgroup, of whichever version this host has."""
    for mount, limit in ((CGROUPS / "memory", "memory.limit_in_bytes"), (CGROUPS, "memory.max")):
        folder = mount / "ksmd-ctl-test"
        try:
            if mount == CGROUPS:
                (mount / "cgroup.subtree_control").write_text("+memory")
            folder.mkdir(exist_ok=True)
        except OSError:
            continue
        if (folder / limit).exists():
            yield folder
            folder.rmdir()
            return
        folder.rmdir()
    pytest.skip("no memory cgroup can be made here")


def restore(knobs: dict[str, str]) -> None:
    """Un-merge everything, then write the knobs back; pages_to_scan after the advisor, which changes it."""
    (KSM / "run").write_text("0")
    (KSM / "run").write_text("2")
    last = ["pages_to_scan", "run"]
    for name in sorted(knobs, key=lambda name: last.index(name) + 1 if name in last else 0):
        text = knobs[name]
        if name == "advisor_mode":
            text = text[text.index("[") + 1 : text.index("]")]
        (KSM / name).write_text(text)
