# SPDX-License-Identifier: GPL-2.0-or-later
"""Clients within limits: what the control socket and the HTTP endpoint have in common.

Nothing that a client does may cost more than its limits: the bytes of a request, the number of clients, the time
without a complete request, the bytes that wait to be read. One request is answered a turn of the loop, so a
client that sends thousands at once takes turns with everything else.

Sockets are used as they are. asyncio's streams and transports take six turns of the loop to accept a connection,
answer and close, and most of a scrape's CPU time.
"""

from __future__ import annotations

import asyncio
import logging
import select
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass

# What one read takes in; it belongs to all connections together, as only one is read at a time.
_READ_BYTES = 16 * 1024

# How long nobody is accepted after the kernel refused to (no descriptors left, say).
_ACCEPT_AGAIN_SECONDS = 1.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """What the clients of one listening socket may cost.

    :ivar request_bytes: a request is no longer than this
    :ivar clients: at the same time; for one more the idlest one goes, and where all are being served it is refused
    :ivar clients_of_user: of one user at the same time, likewise; whoever is privileged is not limited by this
    :ivar reserved: places beyond `clients` for whoever is privileged
    :ivar request_seconds: from connecting to the first complete request
    :ivar idle_seconds: from one complete request to the next
    :ivar unread_bytes: beyond this many the client's requests wait until it has read
    """

    request_bytes: int
    clients: int = 64
    clients_of_user: int = 16
    reserved: int = 8
    request_seconds: float = 5.0
    idle_seconds: float = 5.0
    unread_bytes: int = 64 * 1024


class Connections:
    """A listening socket and its clients.

    :param make: makes the connection of a socket that was accepted
    :ivar refused: how many were turned away because there were too many
    """

    def __init__(self, limits: Limits, make: Callable[[Connections, socket.socket], Connection]) -> None:
        self.limits = limits
        self.open: set[Connection] = set()
        self.refused = 0
        self.scratch = memoryview(bytearray(_READ_BYTES))
        self.loop = asyncio.get_running_loop()
        self._make = make
        self._socket: socket.socket | None = None
        self._again: asyncio.TimerHandle | None = None

    def listen(self, sock: socket.socket) -> None:
        """Accept clients of a bound socket, which belongs to this object from now on."""
        sock.setblocking(False)
        sock.listen()
        self._socket = sock
        self.loop.add_reader(sock.fileno(), self._accept, sock)

    def close(self) -> None:
        """Stop listening and end all clients at once; what they have not read is lost."""
        if self._again is not None:
            self._again.cancel()
        if self._socket is not None:
            self.loop.remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
        for connection in tuple(self.open):
            connection.abort()

    def _accept(self, listening: socket.socket) -> None:
        try:
            sock, _ = listening.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            # The client stays in the queue, so the socket stays readable: without a pause this would be a busy loop.
            _log.error("a client can't be accepted: %s", error)
            self.loop.remove_reader(listening.fileno())
            self._again = self.loop.call_later(_ACCEPT_AGAIN_SECONDS, self.listen, listening)
            return
        sock.setblocking(False)
        connection = self._make(self, sock)
        limit = self._make_room(connection)
        if limit is None:
            connection.begin()
        else:
            self.refused += 1
            connection.refuse(limit)
            connection.abort()

    def _make_room(self, newcomer: Connection) -> int | None:
        """Have somebody idle go where that is needed; None, or how many there may be where nobody is idle."""
        # Nobody makes whoever is privileged go.
        others = [client for client in self.open if not client.privileged]
        most = self.limits.clients
        if newcomer.privileged:
            most += self.limits.reserved
        else:
            own = [client for client in others if client.user is not None and client.user == newcomer.user]
            if len(own) >= self.limits.clients_of_user and not _drop_idlest(own):
                return self.limits.clients_of_user
        if len(self.open) >= most and not _drop_idlest(others):
            return most
        return None


def _drop_idlest(clients: Iterable[Connection]) -> bool:
    """End the connection of the client that has asked for nothing for the longest time; False where all are served."""
    idle = [client for client in clients if not client.waits()]
    if idle:
        min(idle, key=lambda client: client.asked_at).abort()
    return bool(idle)


class Connection:
    """One client: subclasses take requests off `buffer` and answer them with `write`.

    :ivar user: the number of the user, None where that can't be known
    :ivar privileged: there is always a place for it
    :ivar asked_at: when the last complete request came, or the client, on the loop's clock
    :ivar buffer: what has come in and was not taken yet
    :ivar unsent: what was written and the client has not read yet
    """

    def __init__(self, connections: Connections, sock: socket.socket) -> None:
        self.connections = connections
        self.limits = connections.limits
        self.socket = sock
        self.buffer = bytearray()
        self.unsent = bytearray()
        self.closed = False
        self.user: int | None = None
        self.privileged = False
        self.asked_at = connections.loop.time()
        self._loop = connections.loop
        self._reading = False
        self._closing = False
        self._eof = False
        self._turn: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._deadline = 0.0

    # -- for subclasses ------------------------------------------------------------------------------------

    def refuse(self, limit: int) -> None:
        """Tell the client that there are too many: as many as this."""

    def take(self) -> bool:
        """Take one request off `buffer` and answer it; False where none is complete."""
        raise NotImplementedError

    def waits(self) -> bool:
        """The client waits for us and not we for it: no limit of time applies."""
        return False

    def stays(self) -> bool:
        """The client has said everything, and now and then an answer is still to come: then True."""
        return False

    def resume(self) -> None:
        """What `waits` said is over: go on with what has come in meanwhile."""
        if not self.closed:
            self._extend(self.limits.idle_seconds)
            self._work()

    def lost(self) -> None:
        """The connection has ended, in whichever way."""

    def write(self, data: bytes) -> None:
        """Send something, now or when the client has read what was sent before."""
        if self.closed or self._closing:
            return
        if not self.unsent:
            try:
                sent = self.socket.send(data)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError:
                self.abort()
                return
            if sent == len(data):
                return
            data = data[sent:]
            self._loop.add_writer(self.socket.fileno(), self._writable)
        self.unsent += data

    def close(self) -> None:
        """End the connection once everything is sent; the limit of time still applies."""
        if self.unsent:
            self._closing = True
            self._read(False)
        else:
            self.abort()

    def abort(self) -> None:
        """End the connection now."""
        if self.closed:
            return
        self.closed = True
        self.connections.open.discard(self)
        self._read(False)
        if self.unsent:
            self._loop.remove_writer(self.socket.fileno())
        for handle in (self._timer, self._turn):
            if handle is not None:
                handle.cancel()
        self.socket.close()
        self.lost()

    # -- reading and writing -------------------------------------------------------------------------------

    def begin(self) -> None:
        """Take requests from now on."""
        self.connections.open.add(self)
        self._extend(self.limits.request_seconds)
        self._read(True)

    def _readable(self) -> None:
        scratch = self.connections.scratch
        try:
            count = self.socket.recv_into(scratch)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.abort()
            return
        # Somebody who has said everything may still want to read the answers.
        self._eof = not count
        self.buffer += scratch[:count]
        self._work()

    def _writable(self) -> None:
        try:
            sent = self.socket.send(self.unsent)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.abort()
            return
        del self.unsent[:sent]
        if self.unsent:
            return
        self._loop.remove_writer(self.socket.fileno())
        if self._closing:
            self.abort()
        else:
            self._work()

    def _read(self, wanted: bool) -> None:
        if wanted == self._reading:
            return
        self._reading = wanted
        if wanted:
            self._loop.add_reader(self.socket.fileno(), self._readable)
        else:
            self._loop.remove_reader(self.socket.fileno())

    # -- taking turns --------------------------------------------------------------------------------------

    def _work(self) -> None:
        if self.closed or self._closing:
            return
        if self._turn is not None or len(self.unsent) > self.limits.unread_bytes:
            self._read(False)
        elif self.take():
            self.asked_at = self._loop.time()
            self._extend(self.limits.idle_seconds)
            again = bool(self.buffer) or self._eof
            if again and not self.closed:
                self._turn = self._loop.call_soon(self._next)
            self._read(not again and not self.closed and not self._closing)
        elif len(self.buffer) > self.limits.request_bytes:
            self.abort()
        elif self._eof:
            if self._hung_up():
                # Nobody is there to be told: a place that others can have.
                self.abort()
            elif self.stays():
                # What is at its end stays readable for ever.
                self._read(False)
            else:
                self.close()
        else:
            self._read(True)

    def _hung_up(self) -> bool:
        """Whether the other side has closed, where that can be told from having said everything (unix(7))."""
        poller = select.poll()
        poller.register(self.socket, 0)
        return bool(poller.poll(0))

    def _next(self) -> None:
        self._turn = None
        self._work()

    def _extend(self, seconds: float) -> None:
        self._deadline = self._loop.time() + seconds
        if self._timer is None and not self.closed:
            self._timer = self._loop.call_at(self._deadline, self._expire)

    def _expire(self) -> None:
        # One timer a connection, set anew only when it rings: requests don't have to move it.
        if self.waits():
            self._deadline = self._loop.time() + self.limits.idle_seconds
        if self._loop.time() >= self._deadline:
            self.abort()
        else:
            self._timer = self._loop.call_at(self._deadline, self._expire)
