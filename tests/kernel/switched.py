# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs that check themselves while their memory is switched (switched.c), and what is done to them."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.kernel.proc_pid import start_time_ticks

SECONDS = 180


SOURCE = Path(__file__).with_suffix(".c")


def compiled(folder: Path, *options: str, source: Path = SOURCE) -> Path:
    """The program; skips where there is no compiler, or not for these options.

    KSMD_CTL_COMPILED is a folder with programs for a guest that has no compiler.
    """
    ready = Path(os.environ.get("KSMD_CTL_COMPILED", "/nonexistent")) / "-".join((source.stem, *options))
    if ready.exists():
        return ready
    if os.uname().machine not in ("x86_64", "aarch64"):
        pytest.skip("the programs that check themselves are for x86_64 and aarch64")
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc and libc6-dev")
    program = folder / "-".join((source.stem, *options))
    if not program.exists():
        command = ["gcc", "-O1", "-w", "-pthread", "-o", str(program), str(source), *options]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"gcc {' '.join(options)}: {made.stderr[-200:]}")
    return program


@dataclass
class Target:
    """A program that runs.

    :ivar process: its first thread
    """

    process: ProcessId
    program: subprocess.Popen[str]

    def ask(self, text: str, length: int = 0) -> str:
        """Write to it: its answer, of the same length if none is given."""
        assert self.program.stdin
        os.write(self.program.stdin.fileno(), text.encode())
        return self.answer(length or len(text))

    def answer(self, length: int) -> str:
        assert self.program.stdout
        descriptor, found = self.program.stdout.fileno(), b""
        while len(found) < length:
            assert select.select([descriptor], [], [], SECONDS)[0], f"it answered {found!r} and no more"
            more = os.read(descriptor, length - len(found))
            assert more, f"it answered {found!r} and ended"
            found += more
        return found.decode()

    def end(self) -> str:
        """Have it end: what it says, after the first word of which come errors."""
        os.kill(self.process.pid, signal.SIGUSR2)
        out, _ = self.program.communicate(timeout=SECONDS)
        return out

    def status(self, key: str) -> str:
        """A line of /proc/PID/status."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(line.split(":\t", 1)[1] for line in text.splitlines() if line.startswith(f"{key}:"))


@contextmanager
def started(*command: str | Path, before: tuple[str, ...] = ()) -> Iterator[Target]:
    """Start a program that says its pid in its first line, and kill it in the end."""
    program = subprocess.Popen(
        [*before, *map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=0
    )
    try:
        assert program.stdout
        line = program.stdout.readline()
        pid = program.pid if not before else child_of(program.pid)
        assert line.strip().isdigit()
        yield Target(ProcessId(pid, start_time_ticks(pid)), program)
    finally:
        program.kill()
        program.wait()
        for stream in (program.stdin, program.stdout):
            if stream:
                stream.close()


def child_of(pid: int) -> int:
    """The youngest descendant of a process."""
    while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        pid = int(children[-1])
    return pid


def in_child(work: Callable[[], object], kill_after: float | None = None) -> int:
    """Do work in a process of its own: its exit status as waitpid has it; an error's text goes to stderr.

    :param kill_after: seconds until it gets SIGKILL
    """
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            work()
            status = 0
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(status)
    if kill_after is not None:
        descriptor = os.pidfd_open(pid)
        select.select([descriptor], [], [], kill_after)
        os.close(descriptor)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
