# SPDX-License-Identifier: GPL-2.0-or-later
"""The terminal of ``ksmd-ctl watch``: its screen, its keys, and the signals that come from it."""

from __future__ import annotations

import os
import re
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Final

from rich.console import Console

from ksmd_ctl.cli.client import wait
from ksmd_ctl.cli.common import ENDING, handling
from ksmd_ctl.cli.feed import Feed
from ksmd_ctl.figures import seconds_text
from ksmd_ctl.render.live import View, screen
from ksmd_ctl.render.live_events import Events
from ksmd_ctl.render.live_figures import Sort, Trends

# A policy may sample more often than anybody can read.
_DRAW_SECONDS: Final = 0.25
# The clock goes on without reports, too.
_REDRAW_SECONDS: Final = 1.0
_KEYS: Final = {"s": Sort.SAVING, "c": Sort.COST, "h": Sort.SHARING}
_QUIT: Final = "q"
# What a terminal sends for keys without a character.
_SEQUENCE: Final = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|O.|.)?")


class LiveView:
    """The view, and what keys and signals do to it.

    :param report: the first one
    """

    def __init__(self, feed: Feed, console: Console, sort: Sort, report: Mapping[str, object]) -> None:
        self._feed = feed
        self._console = console
        self._sort = sort
        self._trends = Trends()
        self._events = Events()
        self._report = report
        self._note = feed.note
        self._stdin = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else -1
        self._drawn_at = 0.0
        self._changed = self._ended = self._stopped = False
        self._add(report)

    def run(self) -> None:
        """Show reports until somebody has seen enough."""
        woken, wake = os.pipe()
        os.set_blocking(wake, False)
        before = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        try:
            with (
                handling(ENDING, _interrupt),
                handling((signal.SIGTSTP,), self._stop),
                handling((signal.SIGWINCH,), _wake),
            ):
                while not self._ended:
                    if self._stopped:
                        self._stopped = False
                        os.kill(os.getpid(), signal.SIGSTOP)
                    with self._screen():
                        self._show(woken)
        finally:
            signal.set_wakeup_fd(before)
            os.close(woken)
            os.close(wake)

    def _stop(self, *_: object) -> None:
        # The terminal is given back first.
        self._stopped = True

    @contextmanager
    def _screen(self) -> Iterator[None]:
        """A screen of its own, without a cursor, and keys without Enter."""
        settings = termios.tcgetattr(self._stdin) if self._stdin >= 0 else None
        try:
            if settings is not None:
                tty.setcbreak(self._stdin)
            self._console.set_alt_screen(True)
            self._console.show_cursor(False)
            yield
        finally:
            # Where the terminal is gone, there is nothing to give back.
            with suppress(OSError):
                self._console.show_cursor(True)
                self._console.set_alt_screen(False)
            if settings is not None:
                with suppress(termios.error):
                    termios.tcsetattr(self._stdin, termios.TCSANOW, settings)

    def _show(self, woken: int) -> None:
        self._draw()
        while not (self._ended or self._stopped):
            drawing = _DRAW_SECONDS if self._changed else _REDRAW_SECONDS
            rest = max(0.0, self._drawn_at + drawing - time.monotonic())
            ready = wait(min(rest, self._feed.wait_seconds()), self._feed.fileno(), woken, self._stdin)
            if woken in ready:
                os.read(woken, 64)
                self._drawn_at = 0.0
            if self._stdin in ready:
                self._press()
            while report := self._feed.poll():
                self._add(report)
            self._hear()
            self._tell()
            if time.monotonic() >= self._drawn_at + (_DRAW_SECONDS if self._changed else _REDRAW_SECONDS):
                self._draw()

    def _press(self) -> None:
        try:
            pressed = os.read(self._stdin, 64)
        except OSError:
            pressed = b""
        if not pressed:
            self._stdin = -1
        for key in _SEQUENCE.sub("", pressed.decode(errors="replace")).lower():
            self._ended |= key == _QUIT
            self._sort = _KEYS.get(key, self._sort)
        self._drawn_at = 0.0

    def _add(self, report: Mapping[str, object]) -> None:
        now = time.time()
        self._report, self._changed = report, True
        self._trends.add(report, now)
        self._events.add(report, now)

    def _hear(self) -> None:
        for history, anew in self._feed.events():
            self._events.hear(history, anew=anew)
            self._changed = True

    def _tell(self) -> None:
        """Tell if reports are not from where they were from."""
        note = self._feed.note
        if bool(note) != bool(self._note):
            self._events.tell(time.time(), f"the service {'does not answer' if note else 'answers'}", bad=bool(note))
        self._changed |= note != self._note
        self._note = note

    def _draw(self) -> None:
        late, notice = self._feed.late_seconds, self._note
        if late and not notice:
            notice = f"no report has come for {seconds_text(round(late))}"
        old = bool(late) or self._feed.stopped
        if old:
            self._trends.add(None, time.time())
        width, height = self._console.size
        ascii_only = not self._console.encoding.startswith("utf")
        keys, now = self._stdin >= 0, time.time()
        view = View(self._report, self._trends, self._events, now, self._sort, notice, old, keys, ascii_only)
        self._console.update_screen(screen(view, width, height))
        self._drawn_at, self._changed = time.monotonic(), False


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _wake(*_: object) -> None:
    # The number of the signal goes to the descriptor that is waited for.
    pass
