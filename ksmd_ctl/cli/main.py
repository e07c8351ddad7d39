# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line: finds the command, runs it, and turns errors into two lines and an exit code."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from ksmd_ctl import __version__
from ksmd_ctl.cli.common import PROGRAM, HelpFormatter, Parser, error_text
from ksmd_ctl.errors import ExitCode, KsmdError, Unwritable, UsageError, did_you_mean, errno_text

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: Each is a module of this package with ``add_parser(parsers)`` and ``run(args, out) -> int``.
COMMANDS = (
    "daemon",
    "status",
    "history",
    "watch",
    "set",
    "unmerge",
    "collapse",
    "merge",
    "nodes",
    "domains",
    "processes",
    "sharing",
    "estimate",
    "migrate",
    "metrics",
    "verify",
    "doctor",
    "record",
    "report",
    "replay",
)
#: Options that stand without a command.
_ALONE = ("-h", "--help", "--version")


def make_parser(commands: Iterable[str] = COMMANDS) -> argparse.ArgumentParser:
    """The parser of the command line. It only builds: manual page and completion are made from it, too.

    :param commands: the commands that it knows; `main` asks for the one that it needs
    """
    parser = Parser(
        prog=PROGRAM,
        description="Runs the kernel's same-page merging (KSM) on NUMA hosts.",
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    # With prog given, argparse does not have to format a usage line to find it (which imports a lot).
    parsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, prog=PROGRAM)
    for name in commands:
        importlib.import_module(f"ksmd_ctl.cli.{name}").add_parser(parsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not _ready_streams():
        why = "stdout is closed"
        return _fail(
            Unwritable("writing the output", why, hint="nothing was done; use >/dev/null to discard the output")
        )
    try:
        code = _outcome(words)
    except SystemExit as end:
        # argparse has printed help, or the version.
        if code := _written(ExitCode.DONE):
            raise SystemExit(code) from end
        raise
    return _written(code)


def _outcome(words: Sequence[str]) -> int:
    named = words[:1] if words and words[0] in COMMANDS else list(COMMANDS)
    debug = "--debug" in words
    try:
        if words[:1] == ["broker"]:
            # For systemd, not for people: no help shows it, and it reads its own options.
            from ksmd_ctl.privileged.broker import main as serve

            return serve(list(words[1:]), _allowed)
        _check_command(words)
        args = make_parser(named).parse_args(words)
        code: int = importlib.import_module(f"ksmd_ctl.cli.{args.command}").run(args, sys.stdout)
        return code
    except KsmdError as error:
        return _fail(error, debug=debug)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except Exception as error:
        if isinstance(error, OSError) and _output_error() is not None:
            return ExitCode.DONE
        why = f"{type(error).__name__}: {error}"
        hint = f"this is a bug of {PROGRAM}; --debug shows where it happened"
        return _fail(KsmdError(words[0] if words else PROGRAM, why, hint=hint), debug=debug)


def _allowed(request: str) -> bool:
    """Whether the configuration allows the service a request that only root may make otherwise."""
    from ksmd_ctl.config.loader import load

    return request == "switch_merging" and load().switch_allow


def _fail(error: KsmdError, *, debug: bool = False) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    # Where nobody can be told, the exit code says it.
    with suppress(OSError):
        sys.stderr.write(error_text(error))
        sys.stderr.flush()
    return error.exit_code


class _Output(io.FileIO):
    """Stdout's descriptor, which remembers why a write has failed: the layers above it may drop what they had."""

    error: OSError | None = None

    def write(self, data: Buffer, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


def _ready_streams() -> bool:
    """See that errors can be written, to nowhere where stderr is closed; whether stdout is there."""
    streams: tuple[TextIO | None, TextIO | None] = sys.stdout, sys.stderr
    out, err = streams
    if err is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if out is None:
        return False
    if isinstance(out, io.TextIOWrapper) and out is sys.__stdout__:
        raw = _Output(out.fileno(), "w", closefd=False)
        lines = out.isatty() or "PYTHONUNBUFFERED" in os.environ
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(raw), out.encoding, out.errors, line_buffering=lines)
    return True


def _output_error() -> OSError | None:
    """Why what was printed can't be written, or could not be, if so."""
    try:
        sys.stdout.flush()
    except OSError as error:
        return error
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.error if isinstance(raw, _Output) else None


def _written(code: int) -> int:
    """The exit code of a command whose code would be this one, after all that it has printed is written."""
    error = _output_error()
    if error is None:
        return code
    # Python would complain when it flushes at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError) or code not in (ExitCode.DONE, ExitCode.CHECK_FAILED):
        # Whoever read us has seen enough; or what is worse has been said.
        return code
    why = errno_text(error.errno or 0)
    hint = f"the command may still have done its work; check with {PROGRAM} status"
    return _fail(Unwritable("writing the output", why, hint=hint))


def _check_command(words: Sequence[str]) -> None:
    """See that the first word is a command or an option that stands without one.

    :raises UsageError: it is neither
    """
    command = next((word for word in words if not word.startswith("-")), "")
    if command and command not in COMMANDS:
        why = f"unknown command {command[:40]!r}{did_you_mean(command, COMMANDS)}"
        raise UsageError("reading the command line", why, hint=f"{PROGRAM} --help")
    if command and words[0] not in (command, *_ALONE):
        why = f"{words[0][:40]!r} is given before the command"
        raise UsageError("reading the command line", why, hint=f"give it after {command}: {PROGRAM} {command} --help")


if __name__ == "__main__":
    sys.exit(main())
