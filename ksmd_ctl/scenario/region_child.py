# SPDX-License-Identifier: GPL-2.0-or-later
"""The child's side of `ksmd_ctl.scenario.regions`: does with its own memory what its socket says.

A message is a big-endian 32-bit length and that many bytes of pickle: the name of a method of `_RegionChild` and its
arguments, and what it returns, or a `Failure`. Memory is private, anonymous and without huge pages. The child ends when
its socket closes, whoever held the other end and however that one ended.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import struct
import sys
from array import array
from collections.abc import Sequence
from typing import Any

from ksmd_ctl.errors import HostError
from ksmd_ctl.host.operation import readable
from ksmd_ctl.kernel import libnuma, syscalls
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE

_HEADER = struct.Struct(">I")

# Below every address that the kernel hands out by itself, on 39-bit address spaces too.
_FIRST_ADDRESS = 1 << 36
# Between two maps, so that no two of them become one mapping in the kernel.
_GAP = 16 * PAGE_SIZE
# Of a huge page, on x86-64.
_HUGE_SIZE = 1 << 21
_COUNTER = struct.Struct("=Q")


class Failure:
    """The answer that a method failed."""

    def __init__(self, text: str, errno: int | None) -> None:
        self.text = text
        self.errno = errno


def send(connection: socket.socket, message: object, descriptor: int | None = None) -> None:
    """Send one message; a descriptor goes along with its header."""
    data = pickle.dumps(message)
    header = _HEADER.pack(len(data))
    if descriptor is None:
        connection.sendall(header)
    else:
        socket.send_fds(connection, [header], [descriptor])
    connection.sendall(data)


def receive(connection: socket.socket) -> tuple[Any, list[int]]:
    """The next message, and the descriptors that came with it.

    :raises EOFError: the other end is closed
    """
    header, descriptors, _, _ = socket.recv_fds(connection, _HEADER.size, 1)
    if len(header) < _HEADER.size:
        raise EOFError
    (length,) = _HEADER.unpack(header)
    data = bytearray()
    while len(data) < length:
        part = connection.recv(min(length - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return pickle.loads(data), list(descriptors)


class _RegionChild:
    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.maps: list[tuple[int, int]] = []
        self.next = _FIRST_ADDRESS
        self.merging = _merging()

    def serve(self) -> None:
        while True:
            (name, arguments), descriptors = receive(self.connection)
            answer: object
            try:
                answer = getattr(self, f"do_{name}")(*arguments, *descriptors)
            except (HostError, OSError) as error:
                answer = Failure(str(error), error.errno)
            except ValueError as error:
                answer = Failure(str(error), None)
            if self.merging:
                self.only_maps()
            send(self.connection, answer)

    def own(self, start: int, pages: int) -> int:
        end = start + pages * PAGE_SIZE
        if not any(first <= start and end <= last for first, last in self.maps):
            raise ValueError(f"{start:#x}..{end:#x} is not in one of the maps")
        return pages * PAGE_SIZE

    # The next address, one that may hold huge pages as another does for ranges that hold any.
    def address(self, other: int, pages: int) -> int:
        return self.next if pages * PAGE_SIZE < _HUGE_SIZE else self.next + (other - self.next) % _HUGE_SIZE

    def do_map(self, pages: int, node: int | None) -> int:
        length = pages * PAGE_SIZE
        protection = syscalls.PROT_READ | syscalls.PROT_WRITE
        flags = syscalls.MAP_PRIVATE | syscalls.MAP_FIXED_NOREPLACE | syscalls.MAP_NORESERVE
        start = syscalls.mmap(self.address(0, pages), length, protection, flags)
        try:
            syscalls.madvise(start, length, syscalls.MADV_NOHUGEPAGE)
            if node is not None:
                libnuma.mbind(start, length, libnuma.Policy(libnuma.PolicyMode.BIND, frozenset({node})))
        except (OSError, HostError):
            syscalls.munmap(start, length)
            raise
        self.maps.append((start, start + length))
        self.next = start + length + _GAP
        return start

    def do_bind(self, node: int) -> None:
        libnuma.set_mempolicy(libnuma.Policy(libnuma.PolicyMode.BIND, frozenset({node})))

    def do_advise(self, start: int, pages: int, mergeable: bool) -> None:
        advice = syscalls.MADV_MERGEABLE if mergeable else syscalls.MADV_UNMERGEABLE
        syscalls.madvise(start, self.own(start, pages), advice)

    def do_store(self, start: int, table: Sequence[bytes], contents: Sequence[int | None]) -> None:
        self.own(start, len(contents))
        for page, content in enumerate(contents):
            if content is not None:
                syscalls.store(start + page * PAGE_SIZE, table[content])

    def do_load(self, start: int, pages: int) -> tuple[bytes, ...]:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            entries = array("Q", os.pread(file.fileno(), pages * 8, start // PAGE_SIZE * 8))
        # Bits 63 and 62: present, swapped. Anything else would be faulted in by looking at it.
        addresses = range(start, start + pages * PAGE_SIZE, PAGE_SIZE)
        return tuple(
            syscalls.load(address, PAGE_SIZE) if entry >> 62 else b""
            for address, entry in zip(addresses, entries, strict=True)
        )

    def do_read(self, start: int, pages: int) -> None:
        for address in range(start, start + self.own(start, pages), PAGE_SIZE):
            syscalls.load(address, 1)

    def do_swap_out(self, start: int, pages: int) -> None:
        syscalls.madvise(start, self.own(start, pages), syscalls.MADV_PAGEOUT)

    def do_collapse(self, start: int, pages: int) -> list[bool]:
        length = self.own(start, pages)
        found = []
        # khugepaged leaves alone what has MADV_NOHUGEPAGE, and so would MADV_COLLAPSE.
        syscalls.madvise(start, length, syscalls.MADV_HUGEPAGE)
        for block in range(start + -start % _HUGE_SIZE, start + length - _HUGE_SIZE + 1, _HUGE_SIZE):
            try:
                syscalls.madvise(block, _HUGE_SIZE, syscalls.MADV_COLLAPSE)
                found.append(True)
            except OSError:
                found.append(False)
        syscalls.madvise(start, length, syscalls.MADV_NOHUGEPAGE)
        return found

    def do_discard(self, start: int, pages: int) -> None:
        syscalls.madvise(start, self.own(start, pages), syscalls.MADV_DONTNEED)

    def do_unmap(self, start: int, pages: int) -> None:
        length = self.own(start, pages)
        syscalls.munmap(start, length)
        left = []
        for first, last in self.maps:
            left += [
                piece
                for piece in ((first, min(last, start)), (max(first, start + length), last))
                if piece[0] < piece[1]
            ]
        self.maps = left

    def do_mremap(self, start: int, pages: int) -> int:
        # Before 6.17 one call takes one mapping. What is a hole stays one.
        end, to = start + pages * PAGE_SIZE, self.address(start, pages)
        with open("/proc/self/maps") as file:
            spans = [[int(word, 16) for word in line.split(" ", 1)[0].split("-")] for line in file]
        for first, last in ((max(first, start), min(last, end)) for first, last in spans):
            if first < last:
                syscalls.mremap(first, last - first, to + first - start)
        moved = [(first, last) for first, last in self.maps if start <= first and last <= end]
        self.maps = [each for each in self.maps if each not in moved]
        self.maps += [(to + first - start, to + last - start) for first, last in moved]
        self.next = to + pages * PAGE_SIZE + _GAP
        return to

    def do_protect(self, start: int, pages: int, writable: bool) -> None:
        protection = syscalls.PROT_READ | (syscalls.PROT_WRITE if writable else 0)
        syscalls.mprotect(start, self.own(start, pages), protection)

    def do_split(self, start: int, pages: int, on: bool) -> None:
        # A flag of the mapping that is of no consequence to its pages, on every other one of them.
        length = self.own(start, pages)
        if on:
            for address in range(start, start + length, 2 * PAGE_SIZE):
                syscalls.madvise(address, PAGE_SIZE, syscalls.MADV_DONTDUMP)
        else:
            syscalls.madvise(start, length, syscalls.MADV_DODUMP)

    def do_merge(self, on: bool) -> None:
        syscalls.prctl(syscalls.PR_SET_MEMORY_MERGE, int(on))
        self.merging = on

    def only_maps(self) -> None:
        # PR_SET_MEMORY_MERGE is for all memory, also for what the interpreter maps from now on. What is no test
        # memory has to be out of it again before ksmd looks, or nobody could say what is merged with what.
        with open("/proc/self/maps") as file:
            spans = [line.split(" ", 1)[0].split("-") for line in file]
        for first, last in spans:
            start, end = int(first, 16), int(last, 16)
            if not any(start < stop and begin < end for begin, stop in self.maps):
                try:
                    syscalls.madvise(start, end - start, syscalls.MADV_UNMERGEABLE)
                except OSError:
                    # The kernel's own mappings take no advice, and are never merged.
                    continue

    def do_churn(self, start: int, pages: int) -> tuple[int, int]:
        # Counts up in the first word of every page until the next message is there, and looks each time
        # whether the page still holds what was last written: a lost write would show.
        view = memoryview(syscalls.view(start, self.own(start, pages))).cast("B")
        offsets = range(0, pages * PAGE_SIZE, PAGE_SIZE)
        seen = {offset: _COUNTER.unpack_from(view, offset)[0] for offset in offsets}
        rounds = lost = 0
        while not readable(self.connection.fileno(), 0):
            rounds += 1
            for offset in offsets:
                lost += _COUNTER.unpack_from(view, offset)[0] != seen[offset]
                seen[offset] = rounds
                _COUNTER.pack_into(view, offset, rounds)
        view.release()
        # The message that ended it asks for nothing.
        receive(self.connection)
        return rounds, lost

    def do_fork(self, descriptor: int) -> int:
        pid = os.fork()
        if pid:
            os.close(descriptor)
            return pid
        self.connection.close()
        self.connection = socket.socket(fileno=descriptor)
        return os.getpid()

    def do_exec(self, command: Sequence[str]) -> None:
        with open("/proc/self/comm") as file:
            name = file.read().rstrip("\n")
        descriptor = self.connection.detach()
        os.set_inheritable(descriptor, True)
        os.execv(command[0], [*command, name, str(descriptor)])


def main(descriptor: int, parent: int, name: str, prefer: int | None) -> None:
    """Serve until the socket closes.

    :param parent: the process that started this one; ends at once if that one is gone already
    :param prefer: the node that memory without a policy comes from
    """
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
    # Forked children are nobody's to wait for but the kernel's.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open("/proc/self/comm", "w") as file:
        file.write(name)
    if prefer is not None and libnuma.available():
        libnuma.set_mempolicy(libnuma.Policy(libnuma.PolicyMode.PREFERRED, frozenset({prefer})))
    serve(descriptor)


def serve(descriptor: int) -> None:
    """Serve in a program that has just been started, until the socket closes."""
    connection = socket.socket(fileno=descriptor)
    try:
        child = _RegionChild(connection)
        if child.merging:
            child.only_maps()
        send(connection, os.getpid())
        child.serve()
    except (EOFError, ConnectionError):
        os._exit(0)


def _merging() -> bool:
    # From 6.7 on, an exec hands PR_SET_MEMORY_MERGE on.
    try:
        return bool(syscalls.prctl(syscalls.PR_GET_MEMORY_MERGE))
    except OSError:
        return False
