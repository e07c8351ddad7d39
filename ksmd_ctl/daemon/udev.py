# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory, nodes and CPUs that come and go, as the kernel tells (its uevents over netlink, through pyudev).

The kernel's own messages and not udev's: nothing of udev's database is needed, and a host without a running udevd
has them too. pyudev's observer thread dies of a burst of events (POLLERR, its issue 194), so there is none: the event
loop reads, and what was lost in an overflow is made up for by looking at everything again.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Final

SUBSYSTEMS: Final = ("memory", "node", "cpu")

_BUFFER_BYTES: Final = 1 << 20
# Offlining one DIMM is dozens of events: they are one change.
_SETTLE_SECONDS: Final = 0.5
# So many in one turn of the loop; a burst must not keep the watchdog waiting.
_EVENTS_A_TURN: Final = 256

_log = logging.getLogger(__name__)


class KernelEvents:
    """The kernel's events of `SUBSYSTEMS`.

    :raises OSError, ImportError: they can't be had
    """

    def __init__(self) -> None:
        # Only here: libudev and pyudev take memory that a command, and a test, has no use for.
        import pyudev

        monitor = pyudev.Monitor.from_netlink(pyudev.Context(), source="kernel")
        for subsystem in SUBSYSTEMS:
            monitor.filter_by(subsystem)
        try:
            monitor.set_receive_buffer_size(_BUFFER_BYTES)
        except OSError as error:
            # Not root: then it is the host's default, and an overflow is the sooner noticed.
            _log.debug("the buffer for events stays as it is: %s", error)
        monitor.start()
        self._monitor = monitor
        self._socket = socket.socket(fileno=monitor.fileno())

    def fileno(self) -> int:
        """A descriptor that is readable when there are any."""
        return self._socket.fileno()

    def read(self) -> str | None:
        """One event in words, None where there are no more.

        :raises OSError: some were lost (ENOBUFS), or it can't be read
        """
        # An error on the socket makes pyudev's poll fail before anything is read. Asking for it takes it away.
        number = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            raise OSError(number, "events were lost")
        device = self._monitor.poll(0)
        return None if device is None else f"{device.subsystem} {device.action} {device.sys_name}"

    def close(self) -> None:
        """Stop listening."""
        # The descriptor is libudev's, which closes it with the monitor.
        self._socket.detach()


class TopologyWatch:
    """Says when the topology may have changed.

    :param changed: is called on the loop, once for all that happens within a moment
    :ivar events: how many there were
    :ivar overflows: how often some were lost
    """

    def __init__(self, source: KernelEvents, changed: Callable[[], None]) -> None:
        self._source = source
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._descriptor = source.fileno()
        self.events = 0
        self.overflows = 0
        self._loop.add_reader(self._descriptor, self._readable)

    def close(self) -> None:
        self._loop.remove_reader(self._descriptor)
        if self._timer is not None:
            self._timer.cancel()
        self._source.close()

    def _readable(self) -> None:
        seen = False
        for _ in range(_EVENTS_A_TURN):
            try:
                event = self._source.read()
            except OSError as error:
                self.overflows += 1
                seen = True
                _log.debug("events of memory and CPUs were lost: %s", error)
                break
            if event is None:
                break
            self.events += 1
            seen = True
            _log.debug("%s", event)
        # Events of other subsystems wake this up too; they are no change.
        if seen and self._timer is None:
            self._timer = self._loop.call_later(_SETTLE_SECONDS, self._settled)

    def _settled(self) -> None:
        self._timer = None
        self._changed()
