# SPDX-License-Identifier: GPL-2.0-or-later
"""The log: records with fields in systemd's journal, or plain lines on stderr without a journal.

Each kind of event has a MESSAGE_ID for ``journalctl MESSAGE_ID=...`` and the message catalogue. Frequent events are
rate-limited.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, TextIO

IDENTIFIER: Final = "ksmd-ctl"

#: At most this many records of one event about one knob in this time.
BURST: Final = 10
BURST_SECONDS: Final = 600.0


class Event(StrEnum):
    """Kinds of events; the values are MESSAGE_IDs and never change (sd-id128(3))."""

    STARTED = "c51c6b732dcb40f1bdd2f9fed18e5381"
    STOPPED = "df6015816e1645dfb447c8cb65f3d3f7"
    RELOADED = "48ad65fed29e4828a1004c4163afdfdb"
    RELOAD_FAILED = "5e2eca9b3f354beaa5ad8e8f9840183d"
    DRIFT = "fb0401c01b474ec69f6afbf8d1da4e97"
    GIVEN_UP = "4076153911554c998f70a14c9abafc4a"
    PENDING = "3710e521f9ba45bbbe1f02d7e986b118"
    LACKING = "ffb2de4364914a12869a88b49425b581"
    FAILED = "2e8ffe28293b41fbbcc0cd0f3ffafb43"
    HELD = "7ee1c0d5408d441f939fb5877c519aee"
    RESTORED = "8628131bceff45cfa4449786554fd730"
    NOT_RESTORED = "cfb563d50fea4249b9b5be68cc5c1dd5"
    STATE_DAMAGED = "f971a4e889594934be05abbb363ad61b"
    NO_EVENTS = "0b5d5c2f6b7445f09a4f3b1a2c7e9d84"
    TRANSACTION = "14fcdfaeeeab41b0b51efb271da4efea"
    TRANSACTION_FAILED = "00f154212b8a44f0b20ec7fd96527634"
    CHANGED = "cf007ba89e1d408b842b988b51f07606"
    HEALED = "5f1d8c3b9ae24c6f8d0e7a62b4c9135e"
    DOMAIN_NOT_ISOLATED = "3d0b6c1f8e524a7d9c85b2f04e617a93"
    DOMAIN_ISOLATED = "a86e2f57d0c94b31b7f4c9e1085d3a62"
    DOMAIN_MEASURES = "7a25e90bc4d84f3e9c61d3b8f0427a15"
    MERGING_STOPPED = "e4b71c02d95f4e6c8a3f60d27b915c48"
    MERGING_RESUMED = "91d6f83a2c7b4b05b7e2a4c85f1063de"
    KILLED = "6b1f0e9a3d7c4c58a2f4d18e70b95c36"
    REBOOTED = "2f7a94c1e0d84b63b85d6c3a19f7e240"
    NO_HISTORY = "d40c8b7e6a1f49f2913be52c07a8d61f"
    SWITCHED = "e1d29dbb47034750a2fe50328e845226"
    SWITCH_FAILED = "c91a08e336514037881267f33015eb9f"
    STARTED_AGAIN = "e95a0659c46c427faf9a837bc95846fd"


class Level(StrEnum):
    """Priorities of syslog(3)."""

    ERROR = "3"
    WARNING = "4"
    INFO = "6"


_LEVELS: Final = {
    Event.RELOAD_FAILED: Level.WARNING,
    Event.DRIFT: Level.WARNING,
    Event.GIVEN_UP: Level.ERROR,
    Event.PENDING: Level.WARNING,
    Event.FAILED: Level.ERROR,
    Event.NOT_RESTORED: Level.WARNING,
    Event.STATE_DAMAGED: Level.ERROR,
    Event.NO_EVENTS: Level.WARNING,
    Event.TRANSACTION_FAILED: Level.WARNING,
    Event.DOMAIN_NOT_ISOLATED: Level.WARNING,
    Event.MERGING_STOPPED: Level.WARNING,
    Event.KILLED: Level.WARNING,
    Event.NO_HISTORY: Level.WARNING,
    Event.SWITCH_FAILED: Level.WARNING,
    Event.STARTED_AGAIN: Level.WARNING,
}

Sink = Callable[[str, Mapping[str, str]], None]


@dataclass(frozen=True, slots=True)
class Record:
    """An event as it was logged.

    :ivar fields: by the names that `Log.event` was given
    """

    event: Event
    text: str
    fields: Mapping[str, str]
    level: Level

    @property
    def bad(self) -> bool:
        """Whether it is a warning or worse."""
        return self.level is not Level.INFO


class Log:
    """Writes events.

    :param sink: takes the text and the fields for the journal
    """

    def __init__(self, sink: Sink, clock: Callable[[], float] = time.monotonic) -> None:
        self._sink = sink
        self._clock = clock
        self._bursts: dict[tuple[str, str], tuple[float, int]] = {}
        self._listeners: list[Callable[[Record], None]] = []

    def listen(self, listener: Callable[[Record], None]) -> None:
        """Call a function with each event that is logged."""
        self._listeners.append(listener)

    def event(self, event: Event, text: str, **fields: object) -> None:
        """Log an event; fields are KSMD_NAME in the journal."""
        suppressed = self._suppressed(event, str(fields.get("knob", "")))
        if suppressed is None:
            return
        if suppressed:
            text = f"{text} ({suppressed} more like this were not logged)"
        given = {name: str(value) for name, value in fields.items()}
        named = {f"KSMD_{name.upper()}": value for name, value in given.items()}
        level = _LEVELS.get(event, Level.INFO)
        self._sink(text, {"MESSAGE_ID": event.value, "PRIORITY": level.value, **named})
        record = Record(event, text, given, level)
        for listener in self._listeners:
            listener(record)

    def plain(self, level: Level, text: str) -> None:
        """Log a text without a MESSAGE_ID."""
        self._sink(text, {"PRIORITY": level.value})

    def _suppressed(self, event: Event, knob: str) -> int | None:
        """How many were suppressed before this one, None if this one is."""
        now = self._clock()
        begun, count = self._bursts.get((event, knob), (now, 0))
        if now - begun >= BURST_SECONDS:
            self._bursts[event, knob] = (now, 1)
            return max(0, count - BURST)
        self._bursts[event, knob] = (begun, count + 1)
        return 0 if count < BURST else None


class _Bridge(logging.Handler):
    """Forwards records of the logging module: text and level."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
        except Exception:
            self.handleError(record)
            return
        self._log.plain(Level.ERROR if record.levelno >= logging.ERROR else Level.WARNING, text)


def open_log(environment: Mapping[str, str] = os.environ, stderr: TextIO | None = None) -> Log:
    """The log of this process; it also has the records of this package and of asyncio from the logging module."""
    stream = sys.stderr if stderr is None else stderr
    log = Log(_journal_sink() if journal_takes_stderr(environment, stream) else _stderr_sink(stream))
    for name in ("ksmd_ctl", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers = [_Bridge(log)]
        logger.propagate = False
    return log


def journal_takes_stderr(environment: Mapping[str, str], stderr: TextIO) -> bool:
    """Whether stderr is connected to the journal (systemd.exec(5), JOURNAL_STREAM).

    Without a journal, sending to it succeeds and the message is lost.
    """
    device, separator, inode = environment.get("JOURNAL_STREAM", "").partition(":")
    if not separator:
        return False
    try:
        found = os.fstat(stderr.fileno())
    except (OSError, ValueError):
        return False
    return (device, inode) == (str(found.st_dev), str(found.st_ino))


def _journal_sink() -> Sink:
    # Not imported otherwise, because it costs 2 MiB.
    from systemd import journal

    def sink(text: str, fields: Mapping[str, str]) -> None:
        journal.send(text, SYSLOG_IDENTIFIER=IDENTIFIER, **fields)

    return sink


def _stderr_sink(stream: TextIO) -> Sink:
    def sink(text: str, fields: Mapping[str, str]) -> None:
        try:
            print(f"{IDENTIFIER}: {text}", file=stream, flush=True)
        except (OSError, ValueError):
            # The reader is gone (EPIPE, EIO), or stderr is closed.
            pass

    return sink
