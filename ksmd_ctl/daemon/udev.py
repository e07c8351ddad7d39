# SPDX-License-Identifier: GPL-2.0-or-later
"""Events of memory, nodes and CPUs that are added or removed: the kernel's uevents over netlink, through pyudev.

The kernel's own messages are used, not udev's: they need neither udev's database nor a running udevd. pyudev's observer
thread ends at a burst of events (POLLERR, its issue 194), so the event loop reads. After an overflow everything is
read again.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Final

SUBSYSTEMS: Final = ("memory", "node", "cpu")

_BUFFER_BYTES: Final = 1 << 20
# Offlining a DIMM causes dozens of events, which are one change.
_SETTLE_SECONDS: Final = 0.5
# At most this many in one iteration of the event loop, so that a burst does not delay the watchdog.
_EVENTS_A_TURN: Final = 256

_log = logging.getLogger(__name__)


class KernelEvents:
    """The kernel's events of `SUBSYSTEMS`.

    :raises OSError, ImportError: they can't be had
    """

    def __init__(self) -> None:
        # Not imported otherwise, because libudev and pyudev cost memory.
        import pyudev

        monitor = pyudev.Monitor.from_netlink(pyudev.Context(), source="kernel")
        for subsystem in SUBSYSTEMS:
            monitor.filter_by(subsystem)
        try:
            monitor.set_receive_buffer_size(_BUFFER_BYTES)
        except OSError as error:
            # Without root it stays at the default of the host, and overflows are more frequent.
            _log.debug("the buffer for events stays as it is: %s", error)
        monitor.start()
        self._monitor = monitor
        self._socket = socket.socket(fileno=monitor.fileno())

    def fileno(self) -> int:
        """A descriptor that is readable when there are any."""
        return self._socket.fileno()

    def read(self) -> str | None:
        """One event as text, None if there is none.

        :raises OSError: events were lost (ENOBUFS), or it can't be read
        """
        # An error on the socket makes pyudev's poll fail before it reads. getsockopt clears the error.
        number = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            raise OSError(number, "events were lost")
        device = self._monitor.poll(0)
        return None if device is None else f"{device.subsystem} {device.action} {device.sys_name}"

    def close(self) -> None:
        """Stop listening."""
        # libudev closes the descriptor with the monitor.
        self._socket.detach()


class TopologyWatch:
    """Reports when the topology may have changed.

    :param changed: called on the event loop, once for a burst of events
    :ivar events: number of events
    :ivar overflows: how often events were lost
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
        # Events of other subsystems are filtered, but wake this up as well.
        if seen and self._timer is None:
            self._timer = self._loop.call_later(_SETTLE_SECONDS, self._settled)

    def _settled(self) -> None:
        self._timer = None
        self._changed()
