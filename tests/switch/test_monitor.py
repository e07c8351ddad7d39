# SPDX-License-Identifier: GPL-2.0-or-later
"""Machines are switched by their monitor, and their mappings tell whether they were: a real QEMU, and made-up ones."""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ksmd_ctl.errors import (
    Absent,
    Cancelled,
    CheckFailed,
    HostError,
    KsmdError,
    NoSuchProcess,
    Refused,
    Rejected,
    TimedOut,
)
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.switching import Method
from ksmd_ctl.kernel.monitors import Monitor, connect
from ksmd_ctl.kernel.proc_pid import start_time_ticks
from ksmd_ctl.switch import qmp
from ksmd_ctl.switch.monitor import Marked, monitored, passthrough, switch_by_monitor
from ksmd_ctl.switch.qmp import Qmp
from tests.conftest import ksm_lock
from tests.fakes.qemu import FIRMWARE_BYTES, SIZES, qemu

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_MERGEABLE"), reason="needs a kernel and Python with KSM")


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Mergeable memory of others would be in the figures of tests that have this host's KSM."""
    with ksm_lock():
        yield


def test_off_and_on(tmp_path: Path) -> None:
    with qemu(tmp_path, "events") as process:
        assert monitored(process)
        came = switch_by_monitor(process, on=False)
        assert (came.method, came.before, came.after) == (Method.QMP, True, None)
        assert came.how == "qom-set merge=false of ram0, ram1 (QEMU 7.2.22)"
        # What no backend has is told, and stays.
        assert came.mergeable_bytes == FIRMWARE_BYTES
        assert "1.0 MiB that are no backend's" in came.left[0]
        assert Marked.of(process).sizes == (FIRMWARE_BYTES,)
        again = switch_by_monitor(process, on=False)
        assert (again.before, again.after, again.left) == (None, None, came.left)
        came = switch_by_monitor(process, on=True)
        assert (came.before, came.after, came.left) == (None, True, ())
        assert came.mergeable_bytes == FIRMWARE_BYTES + sum(SIZES.values())


def test_a_dry_run_changes_nothing(tmp_path: Path) -> None:
    with qemu(tmp_path) as process:
        before = Marked.of(process)
        came = switch_by_monitor(process, on=False, dry_run=True)
        assert (came.before, came.after, came.left, came.stopped_seconds) == (None, None, (), 0.0)
        assert came.how == f"qom-set merge=false of the machine's memory, by {tmp_path}/qmp"
        assert Marked.of(process) == before


def test_it_is_asked_to_stop(tmp_path: Path) -> None:
    with qemu(tmp_path) as process:
        before = Marked.of(process)
        with pytest.raises(Cancelled):
            switch_by_monitor(process, on=False, stop=lambda: True)
        assert Marked.of(process) == before


def test_a_dry_run_does_not_connect(tmp_path: Path) -> None:
    with qemu(tmp_path, "silent", "-object", "memory-backend-ram,id=m0") as process:
        assert "merge=true of m0, by" in switch_by_monitor(process, on=True, dry_run=True).how


def test_what_qemu_believes_is_off_and_is_on(tmp_path: Path) -> None:
    """merge=off of a backend with mem-merge=on of the machine: both values have to be set."""
    with qemu(tmp_path, "unaware") as process:
        came = switch_by_monitor(process, on=False)
        assert (came.before, came.mergeable_bytes) == (True, FIRMWARE_BYTES)


def test_a_qemu_that_calls_no_madvise(tmp_path: Path) -> None:
    """QEMU 9.1: only the mappings tell."""
    with qemu(tmp_path, "9.1") as process:
        before = Marked.of(process)
        with pytest.raises(CheckFailed, match="merge of ram0, ram1 is false, and the memory is as before") as caught:
            switch_by_monitor(process, on=False)
        assert "--method inject" in caught.value.hint
        assert Marked.of(process) == before


@pytest.mark.parametrize(
    ("behaviour", "kind", "said"),
    [
        ("refuses", Rejected, "Couldn't change property"),
        ("shared", Absent, "no memory backend that is private"),
        ("none", Absent, "no memory backend"),
        ("silent", TimedOut, "does not answer"),
        ("hangs", TimedOut, "does not answer"),
        ("hangs-up", HostError, "hung up|ECONNRESET|EPIPE"),
        ("nonsense", HostError, "no QMP monitor"),
        ("endless", HostError, "longer than"),
    ],
)
def test_monitors_that_are_of_no_use(
    tmp_path: Path, behaviour: str, kind: type[KsmdError], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmp, "_ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(qmp.Qmp.__init__, "__defaults__", (0.5,))
    with qemu(tmp_path, behaviour) as process:
        before = Marked.of(process)
        with pytest.raises(kind, match=said):
            switch_by_monitor(process, on=False)
        assert Marked.of(process) == before


def test_a_monitor_that_somebody_else_talks_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp.Qmp.__init__, "__defaults__", (0.5,))
    with qemu(tmp_path) as process, socket.socket(socket.AF_UNIX) as other:
        other.connect(str(tmp_path / "qmp"))
        with pytest.raises(TimedOut, match="one connection at a time"):
            switch_by_monitor(process, on=False)
        other.close()
        assert switch_by_monitor(process, on=False).how


def test_a_machine_of_libvirts(tmp_path: Path) -> None:
    more = ("-name", "guest=web-1,debug-threads=on", "-chardev", "socket,id=charmonitor,fd=25,server=on,wait=off")
    backend = ("-object", '{"qom-type":"memory-backend-ram","id":"ram-node0","size":1048576}')
    with qemu(tmp_path, "right", *more, *backend) as process:
        assert not monitored(process)
        with pytest.raises(Refused, match="libvirt keeps the monitor of domain web-1 to itself") as caught:
            switch_by_monitor(process, on=False)
        assert "taints" in caught.value.hint
        assert "virsh qemu-monitor-command web-1 '" in caught.value.hint
        assert '"path": "/objects/ram-node0", "property": "merge", "value": false' in caught.value.hint


def test_names_of_domains_are_quoted() -> None:
    assert passthrough("a; rm -rf /", (), on=True).startswith("virsh qemu-monitor-command 'a; rm -rf /' '{")


def test_a_process_without_a_monitor_and_one_that_is_gone() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        process = ProcessId(child.pid, start_time_ticks(child.pid))
        try:
            with pytest.raises(Absent, match="started without a QMP monitor"):
                switch_by_monitor(process, on=False)
        finally:
            child.kill()
            child.wait()
    with pytest.raises(NoSuchProcess):
        switch_by_monitor(process, on=False)


# -- the real one ----------------------------------------------------------------------------------------------


@contextmanager
def real(folder: Path, *words: str) -> Iterator[ProcessId]:
    """QEMU that is installed, stopped before its first instruction."""
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        pytest.skip("needs qemu-system-x86_64")
    path = folder / "qmp"
    monitor = ["-qmp", f"unix:{path},server=on,wait=off"]
    common = [program, "-S", "-display", "none", "-nodefaults", "-m", "64", *monitor]
    with subprocess.Popen([*common, *words], stderr=subprocess.PIPE, text=True) as process:
        try:
            known = ProcessId(process.pid, start_time_ticks(process.pid))
            # It greets when the machine is there; the socket is before that.
            while not path.exists():
                assert process.poll() is None, process.stderr and process.stderr.read()
                time.sleep(0.02)
            Qmp(connect(known, Monitor(str(path))), 60.0).__exit__()
            yield known
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    "words",
    [
        ("-machine", "q35,accel=tcg,mem-merge=on"),
        ("-machine", "pc,accel=tcg,mem-merge=on"),
        # A backend that is named, mergeable though it says that it is not.
        (
            *("-object", "memory-backend-ram,id=m0,size=64M,merge=off"),
            *("-machine", "q35,accel=tcg,mem-merge=on,memory-backend=m0"),
        ),
        (
            *("-object", "memory-backend-ram,id=m0,size=32M", "-object", "memory-backend-memfd,id=m1,size=32M"),
            *("-numa", "node,memdev=m0", "-numa", "node,memdev=m1", "-machine", "q35,accel=tcg,mem-merge=on"),
        ),
    ],
    ids=lambda words: words[-1] + str(len(words)),
)
def test_a_real_qemu(tmp_path: Path, words: tuple[str, ...]) -> None:
    with real(tmp_path, *words) as process:
        before = Marked.of(process)
        came = switch_by_monitor(process, on=False)
        assert came.before is True
        assert came.after is not True
        # Firmware, and what else is no backend's.
        assert came.mergeable_bytes < 16 << 20
        came = switch_by_monitor(process, on=True)
        assert came.after is True
        assert Marked.of(process).mergeable_bytes == before.mergeable_bytes


def test_a_real_qemu_that_was_started_without_merging(tmp_path: Path) -> None:
    with real(tmp_path, "-machine", "q35,accel=tcg,mem-merge=off") as process:
        assert Marked.of(process).mergeable_bytes == 0
        came = switch_by_monitor(process, on=True)
        assert (came.before, came.after, came.mergeable_bytes) == (False, True, 64 << 20)
        came = switch_by_monitor(process, on=False)
        assert (came.before, came.after, came.left, came.mergeable_bytes) == (True, False, (), 0)


def test_a_real_qemu_with_shared_memory_only(tmp_path: Path) -> None:
    words = ("-object", "memory-backend-memfd,id=m0,size=64M,share=on", "-machine", "q35,accel=tcg,memory-backend=m0")
    with real(tmp_path, *words) as process, pytest.raises(Absent, match="no memory backend that is private"):
        switch_by_monitor(process, on=True)


def test_a_real_qemu_as_proxmox_starts_it(tmp_path: Path) -> None:
    """It makes itself a daemon, and connects to a socket that is somebody else's beside its own."""
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        pytest.skip("needs qemu-system-x86_64")
    words = [
        *("-name", "web,debug-threads=on", "-S", "-display", "none", "-nodefaults", "-m", "64"),
        *("-chardev", f"socket,id=qmp,path={tmp_path}/100.qmp,server=on,wait=off", "-mon", "chardev=qmp,mode=control"),
        *("-chardev", f"socket,id=qmp-event,path={tmp_path}/none.sock,reconnect=5"),
        *("-mon", "chardev=qmp-event,mode=control"),
        *("-machine", "q35,accel=tcg,mem-merge=on", "-pidfile", f"{tmp_path}/100.pid", "-daemonize"),
    ]
    subprocess.run([program, *words], check=True, timeout=120)
    pid = int((tmp_path / "100.pid").read_text())
    try:
        process = ProcessId(pid, start_time_ticks(pid))
        assert switch_by_monitor(process, on=False).after is not True
        assert switch_by_monitor(process, on=True).after is True
    finally:
        os.kill(pid, signal.SIGKILL)
