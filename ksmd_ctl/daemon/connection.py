# SPDX-License-Identifier: GPL-2.0-or-later
"""Clients within limits: what the control socket and the HTTP endpoint have in common.

Nothing that a client does may cost more than its limits: the bytes of a request, the number of clients, the time
without a complete request, the bytes that wait to be read. One request is answered a turn of the loop, so a
client that sends thousands at once takes turns with everything else.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

__all__ = ["Connection", "Connections", "Limits"]

# What one read takes in; it belongs to all connections together, as only one is read at a time.
_READ_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """What the clients of one listening socket may cost.

    :ivar request_bytes: a request is no longer than this
    :ivar clients: at the same time; more are refused
    :ivar request_seconds: from connecting to the first complete request
    :ivar idle_seconds: from one complete request to the next
    :ivar unread_bytes: beyond this many the client's requests wait until it has read
    """

    request_bytes: int
    clients: int = 32
    request_seconds: float = 5.0
    idle_seconds: float = 5.0
    unread_bytes: int = 64 * 1024


class Connections:
    """The clients of one listening socket.

    :ivar refused: how many were turned away because there were too many
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.open: set[Connection] = set()
        self.refused = 0
        self.scratch = bytearray(_READ_BYTES)

    def close(self) -> None:
        """End all of them at once; what they have not read is lost."""
        for connection in tuple(self.open):
            connection.transport.abort()


class Connection(asyncio.BufferedProtocol):
    """One client: subclasses take requests off `buffer` and answer them.

    :ivar buffer: what has come in and was not taken yet
    """

    transport: asyncio.Transport

    def __init__(self, connections: Connections) -> None:
        self.connections = connections
        self.limits = connections.limits
        self.buffer = bytearray()
        self._reading = True
        self._eof = False
        self._unread = False
        self._turn: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._deadline = 0.0

    # -- for subclasses ------------------------------------------------------------------------------------

    def refuse(self) -> None:
        """Tell the client that there are too many."""

    def take(self) -> bool:
        """Take one request off `buffer` and answer it; False where none is complete."""
        raise NotImplementedError

    def waits(self) -> bool:
        """The client waits for us and not we for it: no limit of time applies."""
        return False

    # -- what asyncio calls --------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        if len(self.connections.open) >= self.limits.clients:
            self.connections.refused += 1
            self.refuse()
            transport.abort()
            return
        self.connections.open.add(self)
        transport.set_write_buffer_limits(high=self.limits.unread_bytes)
        self._extend(self.limits.request_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self.connections.open.discard(self)
        for handle in (self._timer, self._turn):
            if handle is not None:
                handle.cancel()

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.connections.scratch

    def buffer_updated(self, nbytes: int) -> None:
        self.buffer += memoryview(self.connections.scratch)[:nbytes]
        self._work()

    def eof_received(self) -> bool:
        # Somebody who has said everything may still want to read the answers.
        self._eof = True
        self._work()
        return True

    def pause_writing(self) -> None:
        self._unread = True

    def resume_writing(self) -> None:
        self._unread = False
        self._work()

    # -- taking turns --------------------------------------------------------------------------------------

    def _work(self) -> None:
        if self._turn is not None or self._unread or self.transport.is_closing():
            self._read(self._turn is None)
            return
        if self.take():
            self._extend(self.limits.idle_seconds)
            if self.buffer or self._eof:
                self._read(False)
                self._turn = asyncio.get_running_loop().call_soon(self._next)
            else:
                self._read(True)
        elif len(self.buffer) > self.limits.request_bytes:
            self.transport.abort()
        elif self._eof:
            self.transport.close()
        else:
            self._read(True)

    def _next(self) -> None:
        self._turn = None
        self._work()

    def _read(self, wanted: bool) -> None:
        wanted = wanted and not self._unread and not self._eof
        if wanted != self._reading and not self.transport.is_closing():
            self._reading = wanted
            if wanted:
                self.transport.resume_reading()
            else:
                self.transport.pause_reading()

    def _extend(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self._deadline = loop.time() + seconds
        if self._timer is None:
            self._timer = loop.call_at(self._deadline, self._expire)

    def _expire(self) -> None:
        # One timer a connection, set anew only when it rings: requests don't have to move it.
        loop = asyncio.get_running_loop()
        if self.waits():
            self._deadline = loop.time() + self.limits.idle_seconds
        if loop.time() >= self._deadline:
            self.transport.abort()
        else:
            self._timer = loop.call_at(self._deadline, self._expire)
