# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ksmd_ctl.daemon import varlink_socket
from ksmd_ctl.daemon.varlink_socket import inherit, listen
from ksmd_ctl.errors import Denied, UsageError


def test_mode_and_group_are_set_before_anybody_can_connect(tmp_path: Path) -> None:
    path = tmp_path / "run" / "socket"
    before = os.umask(0)
    try:
        made = listen(path, os.getegid())
        # The process's own umask is as it was.
        assert os.umask(0) == 0
    finally:
        os.umask(before)
    with made.sock:
        found = path.stat()
        assert stat.S_IMODE(found.st_mode) == 0o660
        assert found.st_gid == os.getegid()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    made.remove()
    assert not path.exists()


def test_a_socket_that_nobody_listens_on_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    listen(path).sock.close()
    assert path.exists()
    made = listen(path)
    with made.sock, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_socket_in_use_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with listen(path).sock:
        with pytest.raises(UsageError, match="somebody listens there"):
            listen(path)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    path.write_text("precious")
    with pytest.raises(UsageError, match="no socket"):
        listen(path)
    assert path.read_text() == "precious"


def test_a_file_that_another_service_made_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    first = listen(path)
    first.sock.close()
    path.rename(tmp_path / "aside")
    with listen(path).sock:
        first.remove()
        assert path.exists()


def test_a_link_in_its_place_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.touch(0o600)
    before = victim.stat()
    bind = socket.socket.bind

    def swapped(sock: socket.socket, address: str) -> None:
        bind(sock, address)
        os.unlink(address)
        os.symlink(victim, address)

    monkeypatch.setattr(socket.socket, "bind", swapped)
    # Root may give it to any group.
    listen(tmp_path / "socket", 65534 if os.geteuid() == 0 else os.getegid()).sock.close()
    after = victim.stat()
    assert (after.st_mode, after.st_gid) == (before.st_mode, before.st_gid)


def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too long"):
        listen(tmp_path / ("x" * 200))


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path, what: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(varlink_socket, "_clear", denied)
    with pytest.raises(Denied) as caught:
        listen(tmp_path / "socket")
    assert "EACCES" in caught.value.why


def test_nothing_is_inherited_where_nothing_was_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LISTEN_FDS", raising=False)
    assert inherit() is None


PROGRAM = """
import os, socket, sys
from ksmd_ctl.daemon.varlink_socket import inherit
from ksmd_ctl.errors import UsageError
os.environ["LISTEN_PID"] = str(os.getpid())
try:
    made = inherit()
except UsageError as error:
    print(error.why)
else:
    print(made.sock.getsockname(), made.path)
"""


def inherited(*sockets: socket.socket) -> str:
    """What a process says that gets these as systemd passes them: descriptors from 3 on."""
    shell = " ".join(f"{3 + number}<&{sock.fileno()}" for number, sock in enumerate(sockets))
    result = subprocess.run(
        ["bash", "-c", f'exec "$0" -c "$1" {shell}', sys.executable, PROGRAM],
        pass_fds=[sock.fileno() for sock in sockets],
        env={**os.environ, "LISTEN_FDS": str(len(sockets))},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.strip()


def test_a_socket_from_systemd(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock, socket.socket() as internet:
        sock.bind(str(tmp_path / "socket"))
        sock.listen()
        assert inherited(sock) == f"{tmp_path / 'socket'} None"
        assert "2 were passed" in inherited(sock, internet)
        assert "not a stream socket" in inherited(internet)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_a_group_that_the_service_is_not_in_can_not_be_given_the_socket() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        path = Path(folder) / "socket"
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                listen(path, 0)
            except Denied as error:
                os.write(writing, f"{error.why}; {error.hint}; {path.exists()}".encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        os.close(writing)
        said = os.read(reading, 1000).decode()
        os.close(reading)
    assert said.endswith("; False")
    assert "which this process is not in; SupplementaryGroups= in the unit" in said
