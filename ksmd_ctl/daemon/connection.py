# SPDX-License-Identifier: GPL-2.0-or-later
"""Client connections with limits, for the control socket and the HTTP endpoint.

Limited are the bytes of a request, the number of clients, the time without a complete request, and the bytes that wait
to be read by the client. One request is answered in each iteration of the event loop, so a client that sends thousands
does not delay everything else.

Plain sockets are used. asyncio's streams and transports take six iterations of the event loop to accept a connection,
answer and close, and most of the CPU time of a scrape.
"""

from __future__ import annotations

import asyncio
import logging
import select
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass

# All connections share one buffer of this size, because only one is read at a time.
_READ_BYTES = 16 * 1024

# No client is accepted for this long after accept(2) failed (no descriptors left, for example).
_ACCEPT_AGAIN_SECONDS = 1.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one listening socket.

    :ivar request_bytes: the longest request
    :ivar clients: at the same time; a further client replaces the one that is idle longest, or is refused if none is
    :ivar clients_of_user: the same for one user; privileged users are not limited
    :ivar reserved: places beyond `clients` for privileged users
    :ivar request_seconds: from connecting to the first complete request
    :ivar idle_seconds: from one complete request to the next
    :ivar unread_bytes: with more unread bytes than this, requests of the client wait
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

    :param make: makes the connection object of an accepted socket
    :ivar refused: number of clients that were refused because there were too many
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
        """Accept clients of a bound socket, and own the socket from now on."""
        sock.setblocking(False)
        sock.listen()
        self._socket = sock
        self.loop.add_reader(sock.fileno(), self._accept, sock)

    def close(self) -> None:
        """Stop listening and disconnect all clients; what they have not read is lost."""
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
            # The client stays in the queue and the socket stays readable: without a pause this would be a busy loop.
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
        """Disconnect an idle client if there are too many; None, or the limit if no client is idle."""
        # Privileged clients are never disconnected for others.
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
    """Disconnect the client that has been idle longest; False if none is idle."""
    idle = [client for client in clients if not client.is_served()]
    if idle:
        min(idle, key=lambda client: client.asked_at).abort()
    return bool(idle)


class Connection:
    """One client. Subclasses take requests from `buffer` and answer them with `write`.

    :ivar user: the uid, None if unknown
    :ivar privileged: it is never refused
    :ivar asked_at: when the last complete request arrived, or the client connected, on the event loop's clock
    :ivar buffer: received bytes that were not taken yet
    :ivar unsent: written bytes that the client has not read yet
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
        """Tell the client that there are too many clients already (`limit`)."""

    def take(self) -> bool:
        """Take one request from `buffer` and answer it; False if none is complete."""
        raise NotImplementedError

    def is_served(self) -> bool:
        """Whether a request is being carried out; no time limit applies meanwhile."""
        return False

    def awaits_answer(self) -> bool:
        """The client has closed its sending side: whether an answer is still to be sent."""
        return False

    def resume(self) -> None:
        """The request was carried out: continue with what was received meanwhile."""
        if not self.closed:
            self._extend(self.limits.idle_seconds)
            self._work()

    def lost(self) -> None:
        """The connection is closed."""

    def write(self, data: bytes) -> None:
        """Send data, now or when the client has read what was sent before."""
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
        """Close the connection after everything is sent; the time limit still applies."""
        if self.unsent:
            self._closing = True
            self._read(False)
        else:
            self.abort()

    def abort(self) -> None:
        """Close the connection now."""
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
        """Start to take requests."""
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
        # A client that has closed its sending side may still read the answers.
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
            if self._is_closed_by_peer():
                # Nobody reads an answer any more.
                self.abort()
            elif self.awaits_answer():
                # At its end a socket is always readable.
                self._read(False)
            else:
                self.close()
        else:
            self._read(True)

    def _is_closed_by_peer(self) -> bool:
        """Whether the other side has closed the socket, and not only its sending side (unix(7))."""
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
        # One timer for each connection, rearmed only when it expires: a request only moves the deadline.
        if self.is_served():
            self._deadline = self._loop.time() + self.limits.idle_seconds
        if self._loop.time() >= self._deadline:
            self.abort()
        else:
            self._timer = self._loop.call_at(self._deadline, self._expire)
