# SPDX-License-Identifier: GPL-2.0-or-later
"""What systemd is told (sd_notify(3)); nothing where nobody listens."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Final

from systemd import daemon

__all__ = ["Notifier"]

# A watchdog gets its word this many times in its interval: often enough for two to be late.
_WATCHDOG_SHARE: Final = 4
# The text is for people; whoever looks doesn't look more often.
_STATUS_SECONDS: Final = 10.0


class Notifier:
    """The service's end of NOTIFY_SOCKET.

    :param send: `systemd.daemon.notify`
    """

    def __init__(
        self, environment: Mapping[str, str] = os.environ, send: Callable[[str], object] = daemon.notify
    ) -> None:
        self.active = bool(environment.get("NOTIFY_SOCKET"))
        self._send = send
        self._every = _watchdog_seconds(environment) / _WATCHDOG_SHARE
        self._alive_at = -1e9
        self._status = ""
        self._status_at = -1e9

    def ready(self, status: str) -> None:
        """The service does what it is for; also after a reload."""
        self._tell("READY=1", f"STATUS={status}")
        self._status = status

    def reloading(self) -> None:
        """The configuration is being read again; `ready` ends it."""
        # MONOTONIC_USEC is for Type=notify-reload (systemd 253); older ones ignore it.
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, status: str) -> None:
        self._tell("STOPPING=1", f"STATUS={status}")

    def progress(self, now: float, status: Callable[[], str], *, news: bool) -> None:
        """A tick got something done: feeds the watchdog, and shows the status if it is time for it.

        :param news: something happened that the status should show at once
        """
        if not self.active:
            return
        lines = []
        # Not at each tick: it wakes up systemd.
        if now >= self._alive_at + self._every:
            self._alive_at = now
            lines.append("WATCHDOG=1")
        if news or now >= self._status_at + _STATUS_SECONDS:
            self._status_at = now
            text = status()
            if text != self._status:
                self._status = text
                lines.append(f"STATUS={text}")
        if lines:
            self._tell(*lines)

    def _tell(self, *lines: str) -> None:
        if self.active:
            self._send("\n".join(lines))


def _watchdog_seconds(environment: Mapping[str, str]) -> float:
    """The interval that systemd asks for, 0 for none; as sd_watchdog_enabled(3), which systemd-python lacks."""
    microseconds, pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
    if not microseconds.isdigit() or (pid and pid != str(os.getpid())):
        return 0
    return int(microseconds) / 1e6
