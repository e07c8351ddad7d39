# SPDX-License-Identifier: GPL-2.0-or-later
"""Who writes a knob: a real fanotify(7) group on a folder of our own."""

from __future__ import annotations

import os
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ksmd_ctl.errors import Absent, Denied, HostError
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.kernel import knob_writes
from ksmd_ctl.kernel.knob_writes import WriteReader, open_writes
from tests.fakes.ksmfs import FakeKsmFs

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for fanotify(7)")


@contextmanager
def watched(root: Path) -> Iterator[WriteReader]:
    descriptor = open_writes(root)
    try:
        yield WriteReader(descriptor)
    finally:
        os.close(descriptor)


@needs_root
def test_each_writer_of_a_knob_is_named_in_order(tmp_path: Path) -> None:
    kernel = FakeKsmFs(tmp_path)
    with watched(tmp_path) as reader:
        assert list(reader.read()) == []
        kernel.text("run")
        kernel.set("run", 1)
        # Not a knob.
        kernel.set("pages_shared", 7)
        before = len(os.listdir("/proc/self/fd"))
        with subprocess.Popen(["sh", "-c", f"echo 7 >{kernel.ksm}/pages_to_scan; read wait"], stdin=-1) as writer:
            while not (found := list(reader.read()))[-1:] or found[-1].knob is not Knob.PAGES_TO_SCAN:
                pass
            writer.kill()
        assert found[-1].who.startswith(f"sh (pid {writer.pid}")
        kernel.set("run", 0)
        (own,) = reader.read()
        assert (own.knob, own.pid) == (Knob.RUN, os.getpid())
        assert len(os.listdir("/proc/self/fd")) == before


@needs_root
def test_a_writer_that_has_ended_has_a_pid(tmp_path: Path) -> None:
    kernel = FakeKsmFs(tmp_path)
    with watched(tmp_path) as reader:
        with subprocess.Popen(["sh", "-c", f"echo 2 >{kernel.ksm}/run"]) as writer:
            writer.wait()
        (found,) = reader.read()
    assert (found.knob, found.who) == (Knob.RUN, f"a process that has ended (pid {writer.pid})")


@needs_root
def test_a_writer_has_the_name_under_which_it_opened_the_file(tmp_path: Path) -> None:
    kernel = FakeKsmFs(tmp_path)
    script = f"exec 3>{kernel.ksm}/run; read wait; echo 2 >&3"
    with watched(tmp_path) as reader:
        with subprocess.Popen(["sh", "-c", script], stdin=-1, text=True) as writer:
            limit = time.monotonic() + 30
            while not reader._names:
                assert list(reader.read()) == []
                assert time.monotonic() < limit
            writer.communicate("\n")
        (found,) = reader.read()
    assert found.who.startswith(f"sh (pid {writer.pid}")


@needs_root
def test_whoever_only_reads_is_no_writer_and_few_are_remembered(tmp_path: Path) -> None:
    kernel = FakeKsmFs(tmp_path)
    with watched(tmp_path) as reader:
        readers = [subprocess.Popen(["sh", "-c", f"read it <{kernel.ksm}/run; read wait"], stdin=-1) for _ in range(70)]
        limit = time.monotonic() + 30
        while len(reader._names) < 64:
            assert list(reader.read()) == []
            assert time.monotonic() < limit
        for process in readers:
            process.communicate()
        assert list(reader.read()) == []
        assert len(reader._names) == 64


def test_a_process_is_looked_at_once_though_it_opens_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    clock = [100.0]
    monkeypatch.setattr(knob_writes, "_who", lambda pid: looks.append(pid) or f"it (pid {pid})")  # type: ignore[func-returns-value]
    monkeypatch.setattr(knob_writes.time, "monotonic", lambda: clock[0])
    reading, writing = os.pipe2(os.O_NONBLOCK)
    reader = WriteReader(reading)

    def event(mask: int, pid: int) -> bytes:
        file = os.open(tmp_path / "run", os.O_RDWR | os.O_CREAT)
        return struct.pack("=IBBHQii", 24, 3, 0, 24, mask, file, pid)

    os.write(writing, b"".join(event(0x20, 7) for _ in range(10)) + event(0x22, 7))
    assert [write.who for write in reader.read()] == ["it (pid 7)"]
    assert looks == [7]
    # It writes later.
    clock[0] += 10
    os.write(writing, event(0x2, 7))
    assert len(list(reader.read())) == 1
    assert looks == [7]
    # Another may have its pid by now.
    os.write(writing, event(0x20, 7))
    assert list(reader.read()) == []
    assert looks == [7, 7]
    os.close(reading)
    os.close(writing)


def test_who_has_logged_in_or_else_the_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"comm": "two\nlines\n", "loginuid": "1000\n", "cgroup": "0::/system.slice/cron.service\n"}

    def read(pid: int, name: str) -> str:
        if name not in files:
            raise Absent("reading", "it is not there")
        return files[name]

    monkeypatch.setattr(knob_writes, "read_process_file", read)
    assert knob_writes._who(7) == "two\\nlines (pid 7, login uid 1000)"
    files["loginuid"] = "4294967295\n"
    assert knob_writes._who(7) == "two\\nlines (pid 7, cron.service)"
    del files["loginuid"]
    assert knob_writes._who(7) == "two\\nlines (pid 7, cron.service)"
    files["cgroup"] = "0::/kubepods.slice/x\n"
    assert knob_writes._who(7) == "two\\nlines (pid 7)"
    del files["comm"]
    assert knob_writes._who(7) == ""


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
    reader = WriteReader(reading)
    assert list(reader.read()) == []
    os.close(writing)
    assert list(reader.read()) == []
    os.close(reading)
    with pytest.raises(HostError, match="EBADF"):
        list(reader.read())
