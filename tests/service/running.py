# SPDX-License-Identifier: GPL-2.0-or-later
"""The service and memory to merge, as processes of their own for tests on this host."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

from ksmd_ctl.cli.main import COMMANDS, main
from ksmd_ctl.host.operation import readable

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
PROGRAM = str(Path(sys.executable).parent / "ksmd-ctl")
#: Far more than anything here takes, also in an emulated guest on a busy machine: there the service starts in 10 s
#: to a minute.
LIMIT_SECONDS = 120.0


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def until(what: str, look: Callable[[], T | None], limit_seconds: float = LIMIT_SECONDS) -> T:
    """What `look` gives as soon as it gives something that is not None; it looks less often after a while."""
    begun = time.monotonic()
    while True:
        found = look()
        if found is not None:
            return found
        waited = time.monotonic() - begun
        assert waited < limit_seconds, f"waited {limit_seconds} s for {what}"
        time.sleep(0.05 if waited < 5 else 0.2)


def run_command(*words: str, timeout: float = LIMIT_SECONDS) -> subprocess.CompletedProcess[str]:
    """``ksmd-ctl`` with these words, as a process of its own that is forked from this one.

    It has to start no interpreter, which takes seconds in an emulated guest.

    :raises TimeoutError: it has not ended in time, and was killed
    """
    for name in COMMANDS:
        importlib.import_module(f"ksmd_ctl.cli.{name}")
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        pid = os.fork()
        if not pid:
            _become(words, out.fileno(), err.fileno())
        ended = os.pidfd_open(pid)
        try:
            if not readable(ended, timeout):
                raise TimeoutError(f"ksmd-ctl {' '.join(words)} has not ended in {timeout} s")
        finally:
            os.close(ended)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(["ksmd-ctl", *words], code, out.read(), err.read())


def _become(words: Sequence[str], out: int, err: int) -> NoReturn:
    """Be the program, in a process that was forked for it, with nothing of this one open."""
    code = 70
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        sys.stdin, sys.stderr = os.fdopen(0), os.fdopen(2, "w", buffering=1)
        sys.stdout = sys.__stdout__ = os.fdopen(1, "w")
        code = main(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def metrics(port: int) -> dict[str, float]:
    """The exposition, by series."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        lines = response.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {series: float(value) for series, value in pairs}


class Service:
    """A running service. Its files are below `folder`."""

    def __init__(self, process: subprocess.Popen[str], folder: Path, port: int) -> None:
        self.process = process
        self.folder = folder
        self.port = port

    def status(self) -> dict[str, Any]:
        """``ksmd-ctl status --json`` as another process sees it."""
        result = run_command("status", "--json", "--socket", str(self.folder / "socket"))
        result.check_returncode()
        document: dict[str, Any] = json.loads(result.stdout)
        return document

    def answers(self) -> dict[str, float] | None:
        if self.process.poll() is not None:
            raise AssertionError(f"the service ended with {self.process.returncode}")
        try:
            return metrics(self.port)
        except OSError:
            return None

    def has(self, name: str, value: object) -> bool | None:
        """True once a reading has this value."""
        return True if self.status()["readings"].get(name) == value else None

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=LIMIT_SECONDS)


def configure(folder: Path, text: str, **settings: str) -> Path:
    """A configuration whose files are all below `folder`, with further settings of [service]."""
    path = folder / "ksmd-ctl.toml"
    paths = {"socket": f"{folder}/socket", "state_directory": str(folder), "runtime_directory": str(folder)}
    lines = [f"{key} = {value!r}" for key, value in (paths | settings).items()]
    path.write_text("\n".join([text, "[service]", "sample_interval = 0.5", *lines, ""]))
    return path


@contextmanager
def service(
    folder: Path,
    configuration: str,
    program: Sequence[str] = (PROGRAM,),
    options: Sequence[str] = (),
    stderr: IO[str] | None = None,
    **settings: str,
) -> Iterator[Service]:
    """The service with a configuration; killed at the end if it still runs.

    :param program: what is started with the arguments of `ksmd-ctl daemon`
    :param options: further ones of these
    """
    port = free_port()
    path = configure(folder, configuration, **settings)
    listen = f"127.0.0.1:{port}"
    command = [*program, "daemon", "--config", str(path), "--metrics-listen", listen, *options]
    with subprocess.Popen(command, stderr=stderr, text=True, cwd=ROOT) as process:
        try:
            running = Service(process, folder, port)
            until("the first metrics", running.answers)
            yield running
        finally:
            if process.poll() is None:
                process.kill()


@contextmanager
def healthy_service(folder: Path, configuration: str, host: str) -> Iterator[Service]:
    """The service on a kind of host: whatever is done to it, it ends when it is told to, and never speaks of a bug."""
    log = folder / "log"
    with log.open("w") as stderr, service(folder, configuration, options=("--host", host), stderr=stderr) as running:
        yield running
        assert running.process.poll() is None
        assert running.end() == 0
    said = log.read_text()
    assert "Traceback" not in said, said[-3000:]
    assert "bug" not in said, said[-3000:]


@contextmanager
def equal_pages(pages: int) -> Iterator[int]:
    """A process with so many equal mergeable pages; its pid."""
    command = [sys.executable, str(ROOT / "examples/equal_pages.py"), str(pages)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert "mergeable" in process.stdout.readline()
            yield process.pid
        finally:
            process.kill()


def knobs(folder: Path) -> dict[str, str]:
    """Every file of /sys/kernel/mm/ksm that root may write."""
    return {path.name: path.read_text() for path in folder.iterdir() if os.stat(path).st_mode & 0o200}
