# SPDX-License-Identifier: GPL-2.0-or-later
"""The file of the history as the service has it: opened when it is needed, put aside where it can't be understood.

A disk may take seconds for a write, so threads use it, one at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ksmd_ctl.errors import KsmdError, Unparsable

if TYPE_CHECKING:
    from ksmd_ctl.history.file import HistoryFile

T = TypeVar("T")


class HistoryStore:
    """The file, not opened yet.

    :param most_bytes: gives how large it may become
    :ivar put_aside: in words what was put aside, for whoever tells it and then empties this
    """

    def __init__(self, path: Path, most_bytes: Callable[[], int]) -> None:
        self.path = path
        self.put_aside: list[str] = []
        self._most_bytes = most_bytes
        self._file: HistoryFile | None = None
        self._turn = threading.Lock()

    def use(self, work: Callable[[HistoryFile], T]) -> T:
        """Do something with the file; with a new one where that one is damaged, or of a newer version.

        :raises KsmdError: it can't be done
        """
        with self._turn:
            try:
                return work(self._opened())
            except Unparsable as error:
                with suppress(KsmdError):
                    self._close()
                if not self._move_away(error):
                    raise
            return work(self._opened())

    def _opened(self) -> HistoryFile:
        # Not imported before: it takes memory.
        from ksmd_ctl.history.file import HistoryFile

        if self._file is None:
            self._file = HistoryFile(self.path, self._most_bytes())
        return self._file

    def _move_away(self, error: Unparsable) -> bool:
        from ksmd_ctl.history.file import put_aside

        aside = put_aside(self.path)
        if aside == str(self.path):
            return False
        self.put_aside.append(f"the history could not be understood and was put aside as {aside}: {error.why}")
        return True

    def wait(self) -> None:
        """Wait until nobody uses the file."""
        with self._turn:
            pass

    def close(self) -> None:
        """Close the file, when whoever uses it has done so.

        :raises KsmdError: the disk is full or fails
        """
        with self._turn:
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()
