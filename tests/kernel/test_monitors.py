# SPDX-License-Identifier: GPL-2.0-or-later
"""QMP monitors by command lines as QEMU, libvirt and Proxmox VE write them, and connections to whoever listens."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.errors import Absent, KsmdError, NoSuchProcess, Refused
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.kernel.monitors import Monitor, backend_names, connect, libvirt_domain, monitors
from ksmd_ctl.kernel.proc_pid import start_time_ticks

PROXMOX = (
    "/usr/bin/kvm -id 100 -name web,debug-threads=on -no-shutdown "
    "-chardev socket,id=qmp,path=/var/run/qemu-server/100.qmp,server=on,wait=off -mon chardev=qmp,mode=control "
    "-chardev socket,id=qmp-event,path=/var/run/qmeventd.sock,reconnect=5 -mon chardev=qmp-event,mode=control "
    "-pidfile /var/run/qemu-server/100.pid -daemonize -m 2048 -object memory-backend-ram,id=ram-node0,size=2048M"
)
LIBVIRT = (
    "/usr/bin/qemu-system-x86_64 -name guest=web-1,debug-threads=on -S -machine pc-q35-7.2,memory-backend=pc.ram "
    """-object '{"qom-type":"memory-backend-ram","id":"pc.ram","size":1073741824}' """
    "-chardev socket,id=charmonitor,fd=25,server=on,wait=off -mon chardev=charmonitor,id=monitor,mode=control"
)


TCP = Monitor("", unusable="it is at tcp, where nobody can tell whose it is")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("qemu -qmp unix:/run/q.sock,server=on,wait=off", [Monitor("/run/q.sock")]),
        ("qemu --qmp unix:q.sock,server,nowait", [Monitor("q.sock")]),
        ("qemu -qmp-pretty unix:/run/a,,b,server=on", [Monitor("/run/a,b")]),
        ("qemu -qmp unix:/run/q.sock", [Monitor("/run/q.sock", unusable="QEMU connects to it itself (no server=on)")]),
        ("qemu -qmp unix:name,abstract=on,server=on", [Monitor("name", abstract=True)]),
        ("qemu -qmp tcp:127.0.0.1:4444,server=on", [TCP]),
        ("qemu -qmp stdio", [Monitor("", unusable="it is at stdio, where nobody can tell whose it is")]),
        (
            "qemu -chardev socket,id=a,path=/run/a,server=on -qmp chardev:a -mon a,mode=control -mon a,mode=readline",
            [Monitor("/run/a")],
        ),
        ("qemu -mon chardev=b,mode=control", [Monitor("", unusable="it has no socket in the file system")]),
        ("qemu -monitor unix:/run/m.sock,server=on -qmp", []),
        ("qemu", []),
        (
            PROXMOX,
            [
                Monitor("/var/run/qemu-server/100.qmp"),
                Monitor("/var/run/qmeventd.sock", unusable="QEMU connects to it itself (no server=on)"),
            ],
        ),
        (LIBVIRT, [Monitor("", unusable="another program has opened its socket, and keeps the connection")]),
    ],
)  # fmt: skip
def test_monitors_of_command_lines(line: str, found: list[Monitor]) -> None:
    assert list(monitors(shlex.split(line))) == found


def test_who_runs_it_and_what_its_backends_are_called() -> None:
    assert libvirt_domain(shlex.split(LIBVIRT)) == "web-1"
    assert libvirt_domain(shlex.split(PROXMOX)) == ""
    assert backend_names(shlex.split(LIBVIRT)) == ("pc.ram",)
    assert backend_names(shlex.split(PROXMOX)) == ("ram-node0",)
    assert backend_names(["qemu", "-object", "{no json", "-object", "rng-random,id=r", "-object", "[]"]) == ()


@given(st.lists(st.sampled_from(["-qmp", "-mon", "-chardev", "-object", "socket,id=a", "unix:", "{", ","]) | st.text()))
def test_any_command_line_is_read(words: list[str]) -> None:
    for monitor in monitors(words):
        assert monitor.path or monitor.unusable
    libvirt_domain(words)
    backend_names(words)


def me() -> ProcessId:
    return ProcessId(os.getpid(), start_time_ticks(os.getpid()))


def listening(path: Path | str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    return sock


def test_a_connection_to_the_process_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Longer than an address may be.
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    monkeypatch.chdir(folder)
    with listening("q.sock"):
        for path in ("q.sock", str(folder / "q.sock")):
            connect(me(), Monitor(path)).close()
    name = f"ksmd-ctl-{os.getpid()}"
    with listening(f"\0{name}"):
        connect(me(), Monitor(name, abstract=True)).close()


def test_a_socket_of_another_process_is_refused(tmp_path: Path) -> None:
    """A command line may name another machine's monitor."""
    program = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); print(flush=True)"
    )
    path = tmp_path / "q.sock"
    words = [sys.executable, "-c", f"{program}; sys.stdin.read()", str(path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(Refused, match=f"not process {os.getpid()} listens at .*, but process {other.pid}"):
            connect(me(), Monitor(str(path)))
        other.kill()


def test_what_is_no_socket(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    with listening(tmp_path / "gone"):
        pass
    for name in ("file", "fifo", "gone", "none"):
        with pytest.raises(Absent, match=name):
            connect(me(), Monitor(str(tmp_path / name)))
    with pytest.raises(Absent, match="no server=on"):
        connect(me(), Monitor("/run/q", unusable="QEMU connects to it itself (no server=on)"))


def test_a_process_that_is_gone(tmp_path: Path) -> None:
    with listening(tmp_path / "q"), pytest.raises(NoSuchProcess):
        connect(ProcessId(os.getpid(), 1), Monitor(str(tmp_path / "q")))


def test_a_full_queue_of_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ksmd_ctl.kernel.monitors.CONNECT_SECONDS", 0.2)
    path = tmp_path / "q"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen(0)
        opened: list[socket.socket] = []

        def connect_often() -> None:
            for _ in range(16):
                opened.append(connect(me(), Monitor(str(path))))

        with pytest.raises(KsmdError, match="takes one connection at a time"):
            connect_often()
        for one in opened:
            one.close()
