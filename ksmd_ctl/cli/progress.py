# SPDX-License-Identifier: GPL-2.0-or-later
"""How far something is: one line on a terminal that is written over and over, and nothing elsewhere."""

from __future__ import annotations

from typing import TextIO

from ksmd_ctl.metrics.figures import count_text, ratio_text

__all__ = ["ProgressLine"]


class ProgressLine:
    """The line; it is gone when this is left."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._on = out.isatty()
        self._shown = ""

    def at(self, done: int | float, total: int | float, unit: str) -> None:
        """Show how far it is; without a total only what is done."""
        if not self._on or not (done or total):
            return
        text = f"{count_text(done)} of {count_text(total)}" if total else count_text(done)
        share = f" ({ratio_text(min(1.0, done / total))})" if total else ""
        self._show(f"{text} {unit}{share}")

    def _show(self, text: str) -> None:
        if text != self._shown:
            self._shown = text
            self._out.write(f"\r\x1b[K{text}")
            self._out.flush()

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def clear(self) -> None:
        """Take the line away."""
        if self._shown:
            self._shown = ""
            self._out.write("\r\x1b[K")
            self._out.flush()
