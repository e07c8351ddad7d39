# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory of our own in processes of our own: test regions, and what a lab host does things with.

The processes are fresh interpreters that run `ksmd_ctl.scenario.region_child`, so nothing of the caller's memory is in
them. They end with the caller: each holds one end of a socket whose other end only the caller has, and those
that the caller starts itself also have PR_SET_PDEATHSIG.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ksmd_ctl
from ksmd_ctl.errors import CheckFailed, NoSuchProcess, Rejected, TimedOut
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.operation import readable
from ksmd_ctl.kernel import syscalls
from ksmd_ctl.kernel.proc_pid import start_time_ticks
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.scenario.region_child import Failure, receive, send

_PACKAGE = str(Path(ksmd_ctl.__file__).resolve().parent.parent)
_CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
from ksmd_ctl.scenario.region_child import main
main(**json.loads(sys.argv[2]))
"""
# What a process executes that is told to; the name that it had goes with the old program.
_EXECUTED = """
import sys
sys.path.insert(0, sys.argv[1])
from ksmd_ctl.scenario.region_child import serve
with open("/proc/self/comm", "w") as file:
    file.write(sys.argv[2])
serve(int(sys.argv[3]))
"""


def spawn(name: str, prefer: int | None = None, timeout_seconds: float = 60.0) -> RegionProcess:
    """A process without any map, registered with nothing.

    It gets SIGKILL when the *thread* that called this ends (prctl(2), PR_SET_PDEATHSIG): call it from one that
    lasts.

    :param name: what /proc/PID/comm shows, cut to 15 bytes
    :param prefer: the node that its memory comes from where no policy says otherwise
    """
    ours, theirs = socket.socketpair()
    arguments = {"descriptor": theirs.fileno(), "parent": os.getpid(), "name": name, "prefer": prefer}
    try:
        # Another interpreter may have other defaults: -I and -S keep it from the environment and from site.
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CHILD, _PACKAGE, json.dumps(arguments)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
    return RegionProcess(ours, child.pid, child, timeout_seconds)


def can_collapse() -> bool:
    """Whether this kernel has MADV_COLLAPSE."""
    try:
        # Of no byte: only the advice is looked at.
        syscalls.madvise(0, 0, syscalls.MADV_COLLAPSE)
    except OSError:
        return False
    return True


class RegionProcess:
    """A process whose memory can be arranged. Addresses are bytes, lengths pages.

    :ivar id: what it is to everybody else
    """

    def __init__(
        self, connection: socket.socket, pid: int, child: subprocess.Popen[bytes] | None, timeout_seconds: float
    ) -> None:
        self._connection = connection
        self._connection.settimeout(timeout_seconds)
        self._timeout = timeout_seconds
        self._child = child
        self._pid = pid
        self._pidfd = -1
        try:
            try:
                self._pidfd = os.pidfd_open(pid)
            except ProcessLookupError as error:
                raise self._ended("start") from error
            if child is not None:
                self._answer("start")
            self.id = ProcessId(pid, start_time_ticks(pid))
        except BaseException:
            if child is not None:
                child.kill()
            self.exit()
            raise

    def __enter__(self) -> RegionProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.exit()

    def _answer(self, what: str) -> Any:
        try:
            answer, _ = receive(self._connection)
        except TimeoutError as error:
            raise TimedOut(f"{what} in process {self._pid}", f"no answer for {self._timeout:g} s") from error
        except (EOFError, ConnectionError) as error:
            raise self._ended(what) from error
        if isinstance(answer, Failure):
            raise Rejected(f"{what} in process {self._pid}", answer.text, errno=answer.errno)
        return answer

    def _ended(self, what: str) -> NoSuchProcess:
        hint = "somebody killed it; dmesg shows whether the kernel did"
        return NoSuchProcess(f"{what} in process {self._pid}", "it has ended", hint=hint)

    def _ask(self, what: str, *arguments: object, descriptor: int | None = None) -> None:
        try:
            send(self._connection, (what, arguments), descriptor)
        except OSError as error:
            raise self._ended(what) from error

    def _do(self, what: str, *arguments: object) -> Any:
        self._ask(what, *arguments)
        return self._answer(what)

    def map(self, pages: int, node: int | None = None) -> int:
        """Private anonymous memory without huge pages, at an address above all others; bound to a node if given.

        :raises Rejected: with the kernel's errno, as for a node without memory
        """
        return int(self._do("map", pages, node))

    def bind(self, node: int) -> None:
        """set_mempolicy: its memory, and that of what it forks, comes from this node alone where no policy says else.

        :raises Rejected: its cpuset does not have the node, or it has no memory
        """
        self._do("bind", node)

    def advise(self, start: int, pages: int, *, mergeable: bool) -> None:
        """MADV_MERGEABLE or MADV_UNMERGEABLE."""
        self._do("advise", start, pages, mergeable)

    def store(self, start: int, contents: Sequence[bytes | None]) -> None:
        """Write whole pages from `start` on; None leaves a page alone. Equal contents are sent once."""
        table: dict[bytes, int] = {}
        numbers = [None if content is None else table.setdefault(content, len(table)) for content in contents]
        wrong = [len(content) for content in table if len(content) != PAGE_SIZE]
        if wrong:
            raise ValueError(f"a page has {PAGE_SIZE} bytes, not {wrong[0]}")
        self._do("store", start, tuple(table), numbers)

    def load(self, start: int, pages: int) -> tuple[bytes, ...]:
        """What the pages hold; b"" for one that is neither present nor swapped out, which stays so."""
        return tuple(self._do("load", start, pages))

    def read(self, start: int, pages: int) -> None:
        """Read a byte of each page: swaps in, or maps the zero page where nothing was."""
        self._do("read", start, pages)

    def swap_out(self, start: int, pages: int) -> None:
        """MADV_PAGEOUT."""
        self._do("swap_out", start, pages)

    def collapse(self, start: int, pages: int) -> tuple[bool, ...]:
        """MADV_COLLAPSE of each block that can be a huge page; which are one now. khugepaged makes none of them."""
        return tuple(self._do("collapse", start, pages))

    def discard(self, start: int, pages: int) -> None:
        """MADV_DONTNEED."""
        self._do("discard", start, pages)

    def unmap(self, start: int, pages: int) -> None:
        """munmap."""
        self._do("unmap", start, pages)

    def protect(self, start: int, pages: int, *, writable: bool) -> None:
        """mprotect: readable, and writable or not."""
        self._do("protect", start, pages, writable)

    def split(self, start: int, pages: int, *, on: bool) -> None:
        """Make each page a mapping of its own, so that smaps tells of each, or join them again (MADV_DONTDUMP)."""
        self._do("split", start, pages, on)

    def merge(self, on: bool) -> None:
        """prctl(PR_SET_MEMORY_MERGE).

        :raises Rejected: EINVAL before kernel 6.4
        """
        self._do("merge", on)

    def mremap(self, start: int, pages: int) -> int:
        """mremap: move what is mapped there to an address above all others, which is returned; holes stay holes."""
        return int(self._do("mremap", start, pages))

    def exec(self) -> None:
        """execve: the process goes on, without any map, and with what an exec hands on."""
        pid = self._do("exec", (sys.executable, "-I", "-S", "-c", _EXECUTED, _PACKAGE))
        if pid != self._pid:
            raise CheckFailed("exec", f"process {self._pid} says that it is {pid}")

    def begin_churn(self, start: int, pages: int) -> None:
        """Write to all these pages over and over until `end_churn`; nothing else can be asked meanwhile."""
        self._ask("churn", start, pages)

    def end_churn(self) -> tuple[int, int]:
        """How often every page was written to, and how many writes were not there when looked at again."""
        self._ask("stop")
        rounds, lost = self._answer("churn")
        return int(rounds), int(lost)

    def fork(self) -> RegionProcess:
        """A child with all of its memory at the same addresses. It outlives this one, not the caller."""
        ours, theirs = socket.socketpair()
        try:
            self._ask("fork", descriptor=theirs.fileno())
            pid = self._answer("fork")
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.settimeout(self._timeout)
        try:
            said, _ = receive(ours)
        except (EOFError, OSError) as error:
            ours.close()
            raise self._ended("fork") from error
        if said != pid:
            raise CheckFailed("fork", f"two processes say that they are the child: {said} and {pid}")
        return RegionProcess(ours, int(pid), None, self._timeout)

    def exit(self) -> None:
        """End it and wait until it, with all its memory, is gone. Does nothing the second time."""
        self._connection.close()
        if self._pidfd >= 0:
            # Readable once it has exited, when exit_mm() is over, whoever its parent is (pidfd_open(2)).
            if not readable(self._pidfd, self._timeout):
                raise TimedOut(f"ending process {self._pid}", f"it is there after {self._timeout:g} s")
            os.close(self._pidfd)
            self._pidfd = -1
        if self._child is not None:
            self._child.wait()
            self._child = None
