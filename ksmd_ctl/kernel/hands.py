# SPDX-License-Identifier: GPL-2.0-or-later
"""The child's side of `ksmd_ctl.kernel.regions`: does with its own memory what its socket says.

A message is two big-endian 32-bit lengths, a JSON object and raw bytes. Memory is private, anonymous and
without huge pages. It ends when its socket closes, whoever held the other end and however that one ended.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import sys
from array import array
from typing import Any

from ksmd_ctl.errors import HostError
from ksmd_ctl.kernel import libnuma, syscalls
from ksmd_ctl.kernel.syscalls import PAGE_SIZE

__all__ = ["HEADER", "main", "receive", "send"]

HEADER = struct.Struct(">II")

# Below every address that the kernel hands out by itself, on 39-bit address spaces too.
_FIRST_ADDRESS = 1 << 36
# Between two maps, so that no two of them become one mapping in the kernel.
_GAP = 16 * PAGE_SIZE
_COUNTER = struct.Struct("=Q")

_Message = dict[str, Any]


def send(connection: socket.socket, message: _Message, payload: bytes = b"", descriptor: int | None = None) -> None:
    """Send one message; a descriptor goes along with its header."""
    text = json.dumps(message).encode()
    header = HEADER.pack(len(text), len(payload))
    if descriptor is None:
        connection.sendall(header)
    else:
        socket.send_fds(connection, [header], [descriptor])
    connection.sendall(text)
    connection.sendall(payload)


def _exactly(connection: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = connection.recv(min(length - len(parts), 1 << 20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def receive(connection: socket.socket) -> tuple[_Message, bytes, list[int]]:
    """The next message, its raw bytes and the descriptors that came with it.

    :raises EOFError: the other end is closed
    """
    header, descriptors, _, _ = socket.recv_fds(connection, HEADER.size, 1)
    if not header:
        raise EOFError
    header += _exactly(connection, HEADER.size - len(header))
    lengths = HEADER.unpack(header)
    text = _exactly(connection, lengths[0])
    return json.loads(text), _exactly(connection, lengths[1]), list(descriptors)


class _Hands:
    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.maps: list[tuple[int, int]] = []
        self.next = _FIRST_ADDRESS
        self.merging = False

    def serve(self) -> None:
        while True:
            message, payload, descriptors = receive(self.connection)
            name = message.pop("do")
            try:
                if name == "fork":
                    answer, data = self.fork(descriptors[0]), b""
                else:
                    answer, data = getattr(self, f"do_{name}")(payload=payload, **message)
            except HostError as error:
                answer, data = {"errno": error.errno, "error": str(error)}, b""
            except OSError as error:
                answer, data = {"errno": error.errno, "error": str(error)}, b""
            except ValueError as error:
                answer, data = {"errno": None, "error": str(error)}, b""
            if self.merging:
                self.only_maps()
            send(self.connection, answer, data)

    def own(self, start: int, pages: int) -> int:
        end = start + pages * PAGE_SIZE
        if not any(first <= start and end <= last for first, last in self.maps):
            raise ValueError(f"{start:#x}..{end:#x} is not in one of the maps")
        return pages * PAGE_SIZE

    def do_map(self, pages: int, node: int | None, payload: bytes) -> tuple[_Message, bytes]:
        length = pages * PAGE_SIZE
        protection = syscalls.PROT_READ | syscalls.PROT_WRITE
        flags = syscalls.MAP_PRIVATE | syscalls.MAP_FIXED_NOREPLACE | syscalls.MAP_NORESERVE
        start = syscalls.mmap(self.next, length, protection, flags)
        try:
            syscalls.madvise(start, length, syscalls.MADV_NOHUGEPAGE)
            if node is not None:
                libnuma.mbind(start, length, libnuma.Policy(libnuma.PolicyMode.BIND, frozenset({node})))
        except (OSError, HostError):
            syscalls.munmap(start, length)
            raise
        self.maps.append((start, start + length))
        self.next = start + length + _GAP
        return {"start": start}, b""

    def do_advise(self, start: int, pages: int, mergeable: bool, payload: bytes) -> tuple[_Message, bytes]:
        advice = syscalls.MADV_MERGEABLE if mergeable else syscalls.MADV_UNMERGEABLE
        syscalls.madvise(start, self.own(start, pages), advice)
        return {}, b""

    def do_store(self, start: int, contents: list[int | None], payload: bytes) -> tuple[_Message, bytes]:
        self.own(start, len(contents))
        for page, content in enumerate(contents):
            if content is not None:
                syscalls.store(start + page * PAGE_SIZE, payload[content * PAGE_SIZE : (content + 1) * PAGE_SIZE])
        return {}, b""

    def do_load(self, start: int, pages: int, payload: bytes) -> tuple[_Message, bytes]:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            entries = array("Q", os.pread(file.fileno(), pages * 8, start // PAGE_SIZE * 8))
        # Bits 63 and 62: present, swapped. Anything else would be faulted in by looking at it.
        there = [bool(entry >> 62) for entry in entries]
        data = b"".join(
            syscalls.load(start + page * PAGE_SIZE, PAGE_SIZE) for page, present in enumerate(there) if present
        )
        return {"present": there}, data

    def do_discard(self, start: int, pages: int, payload: bytes) -> tuple[_Message, bytes]:
        syscalls.madvise(start, self.own(start, pages), syscalls.MADV_DONTNEED)
        return {}, b""

    def do_unmap(self, start: int, pages: int, payload: bytes) -> tuple[_Message, bytes]:
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
        return {}, b""

    def do_protect(self, start: int, pages: int, writable: bool, payload: bytes) -> tuple[_Message, bytes]:
        protection = syscalls.PROT_READ | (syscalls.PROT_WRITE if writable else 0)
        syscalls.mprotect(start, self.own(start, pages), protection)
        return {}, b""

    def do_apart(self, start: int, pages: int, on: bool, payload: bytes) -> tuple[_Message, bytes]:
        # A flag of the mapping that is of no consequence to its pages, on every other one of them.
        length = self.own(start, pages)
        if on:
            for address in range(start, start + length, 2 * PAGE_SIZE):
                syscalls.madvise(address, PAGE_SIZE, syscalls.MADV_DONTDUMP)
        else:
            syscalls.madvise(start, length, syscalls.MADV_DODUMP)
        return {}, b""

    def do_merge(self, on: bool, payload: bytes) -> tuple[_Message, bytes]:
        syscalls.prctl(syscalls.PR_SET_MEMORY_MERGE, int(on))
        self.merging = on
        return {}, b""

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

    def do_churn(self, start: int, pages: int, payload: bytes) -> tuple[_Message, bytes]:
        # Counts up in the first word of every page until the next message is there, and looks each time
        # whether the page still holds what was last written: a lost write would show.
        view = memoryview(syscalls.view(start, self.own(start, pages))).cast("B")
        offsets = range(0, pages * PAGE_SIZE, PAGE_SIZE)
        seen = {offset: _COUNTER.unpack_from(view, offset)[0] for offset in offsets}
        rounds = lost = 0
        while not select.select([self.connection], [], [], 0)[0]:
            rounds += 1
            for offset in offsets:
                lost += _COUNTER.unpack_from(view, offset)[0] != seen[offset]
                seen[offset] = rounds
                _COUNTER.pack_into(view, offset, rounds)
        view.release()
        # The message that ended it asks for nothing.
        receive(self.connection)
        return {"rounds": rounds, "lost": lost}, b""

    def fork(self, descriptor: int) -> _Message:
        pid = os.fork()
        if pid:
            os.close(descriptor)
            return {"pid": pid}
        self.connection.close()
        self.connection = socket.socket(fileno=descriptor)
        return {"pid": os.getpid()}


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
    connection = socket.socket(fileno=descriptor)
    try:
        send(connection, {"pid": os.getpid()})
        _Hands(connection).serve()
    except (EOFError, ConnectionError):
        os._exit(0)
