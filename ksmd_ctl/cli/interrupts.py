# SPDX-License-Identifier: GPL-2.0-or-later
"""Signals while a command changes the host: they are counted, and interrupt nothing that has to come to its end."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Final

__all__ = ["ENDING", "Interrupts"]

#: Ctrl-C; what `kill` and the end of a login session send; what a terminal sends that is closed.
ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Counts the signals of `ENDING` while it is entered; called, it says how many there were.

    They come in twos: a login session that ends sends SIGTERM and SIGHUP at once.
    """

    def __init__(self) -> None:
        self._count = 0

    def __call__(self) -> int:
        return self._count

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._count += 1

    def __enter__(self) -> Interrupts:
        self._before = {number: signal.signal(number, self._note) for number in ENDING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
