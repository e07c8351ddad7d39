# SPDX-License-Identifier: GPL-2.0-or-later
"""Who writes a knob: a real fanotify(7) group on a folder of our own."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ksmd_ctl.errors import Absent, Denied, HostError
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.kernel.knob_writes import open_writes, read_writes
from tests.fakes.ksmfs import FakeKsmFs

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for fanotify(7)")


@contextmanager
def watched(root: Path) -> Iterator[int]:
    descriptor = open_writes(root)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@needs_root
def test_each_writer_of_a_knob_is_named_in_order(tmp_path: Path) -> None:
    kernel = FakeKsmFs(tmp_path)
    with watched(tmp_path) as descriptor:
        assert list(read_writes(descriptor)) == []
        kernel.text("run")
        kernel.set("run", 1)
        # Not a knob.
        kernel.set("pages_shared", 7)
        before = len(os.listdir("/proc/self/fd"))
        with subprocess.Popen(["sh", "-c", f"echo 7 >{kernel.ksm}/pages_to_scan; read wait"], stdin=-1) as writer:
            while not (found := list(read_writes(descriptor)))[-1:] or found[-1].knob is not Knob.PAGES_TO_SCAN:
                pass
            writer.kill()
        assert found[-1].who.startswith(f"sh (pid {writer.pid}")
        kernel.set("run", 0)
        (own,) = read_writes(descriptor)
        assert (own.knob, own.pid) == (Knob.RUN, os.getpid())
        assert len(os.listdir("/proc/self/fd")) == before


@needs_root
def test_a_writer_that_has_ended_has_a_pid(tmp_path: Path) -> None:
    kernel = FakeKsmFs(tmp_path)
    with watched(tmp_path) as descriptor:
        with subprocess.Popen(["sh", "-c", f"echo 2 >{kernel.ksm}/run"]) as writer:
            writer.wait()
        (found,) = read_writes(descriptor)
    assert (found.knob, found.who) == (Knob.RUN, f"a process that has ended (pid {writer.pid})")


@needs_root
def test_a_host_without_ksm(tmp_path: Path) -> None:
    with pytest.raises(Absent, match="ENOENT"):
        open_writes(tmp_path)


@needs_root
def test_without_the_privilege(tmp_path: Path) -> None:
    FakeKsmFs(tmp_path)
    os.seteuid(65534)
    try:
        with pytest.raises(Denied, match=r"EPERM|EACCES"):
            open_writes(tmp_path)
    finally:
        os.seteuid(0)


def test_lost_events_and_an_end_are_no_writes() -> None:
    reading, writing = os.pipe2(os.O_NONBLOCK)
    # FAN_Q_OVERFLOW has no file.
    os.write(writing, struct.pack("=IBBHQii", 24, 3, 0, 24, 0x4000, -1, 0))
    assert list(read_writes(reading)) == []
    os.close(writing)
    assert list(read_writes(reading)) == []
    os.close(reading)
    with pytest.raises(HostError, match="EBADF"):
        list(read_writes(reading))
