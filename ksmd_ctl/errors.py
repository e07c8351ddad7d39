# SPDX-License-Identifier: GPL-2.0-or-later
"""Errors that are shown to people, and the exit codes of commands.

Every error says what failed, why, and what to do about it. An error of the host has the path, value and errno, too, for
programs.
"""

from __future__ import annotations

import errno as errno_names
import os
from collections.abc import Iterable
from enum import IntEnum
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from pathlib import Path


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
    """The known word that is closest to an unknown one, as the end of a sentence; empty if none is close."""
    # Imported here, because it is needed after a mistake only.
    import difflib

    close = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""


class KsmdError(Exception):
    """The base of all errors.

    :ivar what: what failed, as a phrase without a full stop
    :ivar why: the cause, as a phrase
    :ivar hint: what to do about it; empty if nothing can be done
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
    """What was asked for makes no sense: a mistake on the command line or in a request."""

    exit_code = ExitCode.USAGE


def _short(text: str, most: int) -> str:
    """A text of at most about this length: its beginning and its end. It may quote a long value of a user."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 3 :]}"


class Problem:
    """One mistake in a file: where (file and key) and what."""

    __slots__ = ("key", "path", "text")

    def __init__(self, path: str, key: str, text: str) -> None:
        self.path = path
        self.key = _short(key, 100)
        self.text = _short(text, 600)

    def __str__(self) -> str:
        return ": ".join(part for part in (self.path, self.key, self.text) if part)


class ConfigError(KsmdError):
    """The configuration is wrong. It has every problem that was found, not only the first."""

    exit_code = ExitCode.USAGE

    def __init__(self, what: str, problems: list[Problem], *, hint: str = "") -> None:
        super().__init__(what, "; ".join(map(str, problems)), hint=hint)
        self.problems = tuple(problems)


class Unreachable(KsmdError):
    """The service or the broker does not answer."""

    exit_code = ExitCode.UNREACHABLE


class Unwritable(KsmdError):
    """The output of a command can't be written."""

    exit_code = ExitCode.UNWRITABLE
    #: What to do where there is no space.
    FULL: ClassVar[str] = "make room, or name a file on another disk"

    @classmethod
    def of(cls, what: str, path: Path, error: OSError) -> Unwritable:
        """What the kernel said of a file that was to be made."""
        if error.errno == errno_names.ENOENT and not path.parent.exists():
            return cls(what, f"there is no folder {path.parent}", hint="make it, or name a file in one that exists")
        full = error.errno in (errno_names.ENOSPC, errno_names.EDQUOT)
        return cls(what, errno_text(error.errno or 0), hint=cls.FULL if full else "name a file where you may write")


class Refused(KsmdError):
    """It was not done, on purpose. Nothing has changed."""

    exit_code = ExitCode.REFUSED


class Busy(Refused):
    """Too many requests are being served; the same request may succeed later."""


class CheckFailed(KsmdError):
    """It was done, but a check of its effect failed."""


class TimedOut(KsmdError):
    """A deadline passed; the text says what state was left."""

    exit_code = ExitCode.TIMED_OUT


class Cancelled(TimedOut):
    """It was stopped on request before it was done."""


class HostError(KsmdError):
    """A file or call of the host failed. It has the path (or the call), the value and the errno."""

    #: What to do where nothing else is said.
    default_hint: ClassVar[str] = ""

    def __init__(
        self,
        what: str,
        why: str,
        *,
        hint: str | None = None,
        path: str = "",
        value: object = None,
        errno: int | None = None,
    ) -> None:
        super().__init__(what, why, hint=self.default_hint if hint is None else hint)
        self.path = path
        self.value = value
        self.errno = errno


class ReadError(HostError):
    """A value is absent, unreadable or unparsable. That is never the same as 0."""


class Absent(ReadError):
    """This kernel or host does not have it."""

    exit_code = ExitCode.LACKING


class Unreadable(ReadError):
    """It exists, but reading it failed."""

    exit_code = ExitCode.DENIED


class Unparsable(ReadError):
    """It was read, but its content is not as expected."""


class Denied(HostError):
    """A privilege is missing; the text says which."""

    exit_code = ExitCode.DENIED


class Rejected(HostError):
    """The kernel refused the value or the call (EBUSY, EINVAL, ...)."""

    exit_code = ExitCode.REFUSED


class Unmapped(Rejected):
    """Nothing is mapped there: the process unmapped it, or replaced its memory (execve)."""


class NotRecorded(HostError):
    """A record that must be on disk before a change can't be written. Nothing was changed."""

    exit_code = ExitCode.REFUSED


class NoSuchProcess(HostError):
    """The process has ended, or its pid belongs to another one now."""

    default_hint = "`ksmd-ctl processes` lists those with mergeable memory"
