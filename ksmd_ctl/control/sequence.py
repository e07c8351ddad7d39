# SPDX-License-Identifier: GPL-2.0-or-later
"""Operations one after the other as one: a search for what there is to do, then one thing after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from ksmd_ctl.errors import KsmdError
from ksmd_ctl.host.operation import Operation, outcome

__all__ = ["Sequence"]

S = TypeVar("S")
T = TypeVar("T")


class Sequence(ABC, Generic[S, T]):
    """What an `Operation` of several parts has of them all; progress and result are its own.

    :param search: finds what there is to do; None where that is known
    """

    def __init__(self, search: Operation[S] | None) -> None:
        self._search = search
        self._current: Operation[T] | None = None
        self._error: KsmdError | None = None
        self._over = False

    @abstractmethod
    def _found(self, found: S) -> None:
        """Take in what the search has found.

        :raises KsmdError: nothing can be done; `_error` is that from then on
        """

    @abstractmethod
    def _next(self) -> Operation[T] | None:
        """Begin with the next part; None where it is over."""

    @abstractmethod
    def _came(self, came: T | KsmdError) -> None:
        """Take in what came of the part that was begun last."""

    def fileno(self) -> int:
        """As `Operation.fileno`; another one after each `poll`."""
        running = self._search or self._current
        return -1 if running is None else running.fileno()

    def poll(self) -> bool:
        """Take in what has happened, and go on with the next part; True once it is over."""
        while not self._over:
            if self._search is not None:
                if not self._search.poll():
                    break
                search, self._search = self._search, None
                try:
                    self._found(search.result())
                except KsmdError as error:
                    self._error, self._over = error, True
            elif self._current is not None:
                if not self._current.poll():
                    break
                current, self._current = self._current, None
                self._came(outcome(current))
            else:
                self._current = self._next()
                self._over = self._current is None
        return self._over

    def cancel(self) -> None:
        """Ask the part that it is at to stop; whoever inherits says what is done about the others."""
        running = self._search or self._current
        if running is not None:
            running.cancel()
