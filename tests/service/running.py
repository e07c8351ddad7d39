# SPDX-License-Identifier: GPL-2.0-or-later
"""The service and memory to merge, as processes of their own for tests on this host."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

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
    """What `look` gives as soon as it gives something that is not None."""
    end = time.monotonic() + limit_seconds
    while True:
        found = look()
        if found is not None:
            return found
        assert time.monotonic() < end, f"waited {limit_seconds} s for {what}"
        time.sleep(0.05)


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
        result = subprocess.run(
            [PROGRAM, "status", "--json", "--socket", str(self.folder / "socket")],
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            check=True,
        )
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
