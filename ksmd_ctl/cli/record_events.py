# SPDX-License-Identifier: GPL-2.0-or-later
"""What others tell while a recording is made: the kernel, who writes knobs; a service, what happens to it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final

from ksmd_ctl.cli.client import Conversation, NoService, wait
from ksmd_ctl.errors import KsmdError
from ksmd_ctl.kernel.proc_pid import printable
from ksmd_ctl.recording.recorder import Heard, ServiceEvent
from ksmd_ctl.reports.document import number, part, parts, text

if TYPE_CHECKING:
    from ksmd_ctl.kernel.knob_writes import KnobWrite, WriteReader

# A service that is not there, or has ended, is asked again so often.
_AGAIN_SECONDS: Final = 10.0
_CONNECT_SECONDS: Final = 1.0


class Listener:
    """Waits for what they tell.

    :param path: of the service's control socket
    :param serves: whether a service that is asked works on this host
    :param root: of this machine's files
    """

    def __init__(self, path: str, serves: Callable[[], bool], root: Path) -> None:
        self._path = path
        self._serves = serves
        self._since = time.time()
        self._again_at = 0.0
        self._stream: Conversation | None = None
        self._writes = -1
        self._reader: WriteReader | None = None
        from ksmd_ctl.kernel.knob_writes import WriteReader, open_writes

        # Without it knobs are seen to change, and not by whom.
        with suppress(KsmdError):
            self._writes = open_writes(root)
            self._reader = WriteReader(self._writes)

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._writes >= 0:
            os.close(self._writes)
        if self._stream is not None:
            self._stream.close()

    def __call__(self, seconds: float) -> Heard:
        """Wait until somebody tells something, or the time is over."""
        if self._stream is None and time.monotonic() >= self._again_at:
            self._connect()
        found = wait(seconds, self._writes, -1 if self._stream is None else self._stream.fileno())
        writers = {write.knob: write.who for write in self._written()} if self._writes in found else {}
        return Heard(writers, tuple(self._events()))

    def _written(self) -> list[KnobWrite]:
        found: list[KnobWrite] = []
        assert self._reader is not None
        try:
            found.extend(self._reader.read())
        except KsmdError:
            os.close(self._writes)
            self._writes = -1
        return found

    def _connect(self) -> None:
        from ksmd_ctl.daemon.varlink_wire import HistoryParameters

        self._again_at = time.monotonic() + _AGAIN_SECONDS
        # What happens from now on comes by itself; what has happened while nobody listened is asked for.
        parameters = HistoryParameters(since_seconds=self._since, follow=True)
        with suppress(NoService, KsmdError):
            if self._serves():
                self._stream = Conversation(self._path, "History", parameters, timeout_seconds=_CONNECT_SECONDS)

    def _events(self) -> list[ServiceEvent]:
        found: list[ServiceEvent] = []
        try:
            while self._stream is not None and (answer := self._stream.arrived()) is not None:
                for event in parts(part(answer, "history"), "events"):
                    at = number(event, "time_seconds") or self._since
                    found.append(ServiceEvent(at, text(event, "kind"), printable(text(event, "text"))))
                    self._since = max(self._since, at + 1e-6)
        except KsmdError:
            # It has ended, or answers no longer.
            if self._stream is not None:
                self._stream.close()
            self._stream = None
        return found
