# SPDX-License-Identifier: GPL-2.0-or-later
"""Errors that reach people, and the exit codes that they end with.

Every error says what failed, why, and what to do about it; it carries the path, value and errno that it
came from, so that a program can tell what a person reads.
"""

from __future__ import annotations

import errno as errno_names
import os
from collections.abc import Iterable
from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """What a command's exit status means."""

    DONE = 0
    CHECK_FAILED = 1
    USAGE = 2
    DENIED = 3
    LACKING = 4
    UNREACHABLE = 5
    REFUSED = 6
    TIMED_OUT = 7
    UNWRITABLE = 8
    INTERRUPTED = 130


def errno_text(number: int) -> str:
    """The name and the text of an errno, as in ``EBUSY (Device or resource busy)``."""
    return f"{errno_names.errorcode.get(number, number)} ({os.strerror(number)})"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """What somebody may have had in mind who wrote a word that is not known, as the end of a sentence; or nothing."""
    # Only who made a mistake waits for this import.
    import difflib

    close = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""


class KsmdError(Exception):
    """Something failed that a person or a program has to know about.

    :ivar what: what failed, as a phrase without a full stop
    :ivar why: the cause, as a phrase
    :ivar hint: what to do about it, empty where nothing can be
    """

    exit_code: ClassVar[ExitCode] = ExitCode.CHECK_FAILED

    def __init__(self, what: str, why: str, *, hint: str = "") -> None:
        super().__init__(what, why)
        self.what = what
        self.why = why
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what}: {self.why}"


class UsageError(KsmdError):
    """The command line asks for something that can't be."""

    exit_code = ExitCode.USAGE


def _short(text: str, most: int) -> str:
    """What quotes a value that somebody wrote is as long as that; its beginning and its end say enough."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 3 :]}"


class Problem:
    """One thing that is wrong in a file: where (file and key) and what."""

    __slots__ = ("key", "path", "text")

    def __init__(self, path: str, key: str, text: str) -> None:
        self.path = path
        self.key = _short(key, 100)
        self.text = _short(text, 600)

    def __str__(self) -> str:
        return ": ".join(part for part in (self.path, self.key, self.text) if part)


class ConfigError(KsmdError):
    """The configuration is wrong; carries every problem that was found, not only the first."""

    exit_code = ExitCode.USAGE

    def __init__(self, what: str, problems: list[Problem], *, hint: str = "") -> None:
        super().__init__(what, "; ".join(map(str, problems)), hint=hint)
        self.problems = tuple(problems)


class Unreachable(KsmdError):
    """The daemon doesn't answer."""

    exit_code = ExitCode.UNREACHABLE


class Unwritable(KsmdError):
    """What the command prints can't be written."""

    exit_code = ExitCode.UNWRITABLE


class Refused(KsmdError):
    """Not done on purpose, and nothing changed."""

    exit_code = ExitCode.REFUSED


class Busy(Refused):
    """Too much is going on now: it may be asked for again."""


class CheckFailed(KsmdError):
    """It was carried out, and what should hold afterwards doesn't."""


class TimedOut(KsmdError):
    """A deadline passed; the text says what state things are in."""

    exit_code = ExitCode.TIMED_OUT


class Cancelled(TimedOut):
    """Somebody asked to stop before it was done."""


class HostError(KsmdError):
    """The host said no: carries the path (or the call), the value and the errno."""

    def __init__(
        self,
        what: str,
        why: str,
        *,
        hint: str = "",
        path: str = "",
        value: object = None,
        errno: int | None = None,
    ) -> None:
        super().__init__(what, why, hint=hint)
        self.path = path
        self.value = value
        self.errno = errno


class ReadError(HostError):
    """A value that can't be had: absent, unreadable or unparsable, which are never the same as 0."""


class Absent(ReadError):
    """This kernel or host does not have it."""

    exit_code = ExitCode.LACKING


class Unreadable(ReadError):
    """It is there, and reading it failed."""

    exit_code = ExitCode.DENIED


class Unparsable(ReadError):
    """It was read, and does not look as it should."""


class Denied(HostError):
    """A privilege is missing; the text says which."""

    exit_code = ExitCode.DENIED


class Rejected(HostError):
    """The kernel refused the value or the call (EBUSY, EINVAL, ...)."""

    exit_code = ExitCode.REFUSED


class Unmapped(Rejected):
    """Nothing is mapped there: it was given back, or the process has replaced its memory (execve)."""


class NotRecorded(HostError):
    """What has to be on disk before anything is changed can't be written, so nothing is."""

    exit_code = ExitCode.REFUSED


class NoSuchProcess(HostError):
    """The process is gone, or its pid belongs to another one now."""
