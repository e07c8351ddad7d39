# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line: finds the command, runs it, and turns errors into two lines and an exit code."""

from __future__ import annotations

import argparse
import importlib
import os
import select
import sys
from collections.abc import Iterable, Sequence
from typing import TextIO

from ksmd_ctl import __version__
from ksmd_ctl.cli.common import PROGRAM, HelpFormatter, Parser, error_text
from ksmd_ctl.errors import ExitCode, KsmdError, UsageError, did_you_mean

__all__ = ["COMMANDS", "main", "make_parser"]

#: Each is a module of this package with ``add_parser(parsers)`` and ``run(args, out) -> int``.
COMMANDS = (
    "daemon",
    "status",
    "set",
    "unmerge",
    "nodes",
    "processes",
    "migrate",
    "metrics",
    "verify",
    "doctor",
    "broker",
)
#: The broker is for systemd, not for people.
VISIBLE = COMMANDS[:-1]
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
    named = words[:1] if words and words[0] in COMMANDS else list(COMMANDS)
    debug = "--debug" in words
    try:
        _check_command(words)
        args = make_parser(named).parse_args(words)
        code = _run(args, sys.stdout)
        sys.stdout.flush()
        return code
    except KsmdError as error:
        if debug:
            _show_traceback()
        sys.stderr.write(error_text(error))
        return error.exit_code
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            # Whoever read us has seen enough. Python would complain when it flushes at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return ExitCode.DONE
        if debug:
            _show_traceback()
        why = f"{type(error).__name__}: {error}"
        hint = f"this is a bug of {PROGRAM}; --debug shows where it happened"
        sys.stderr.write(error_text(KsmdError(words[0] if words else PROGRAM, why, hint=hint)))
        return ExitCode.CHECK_FAILED


def _check_command(words: Sequence[str]) -> None:
    """See that the first word is a command or an option that stands without one.

    :raises UsageError: it is neither; argparse would list the hidden command
    """
    command = next((word for word in words if not word.startswith("-")), "")
    if command and command not in COMMANDS:
        why = f"there is no command {command[:40]!r}{did_you_mean(command, VISIBLE)}"
        raise UsageError("reading the command line", why, hint=f"{PROGRAM} --help")
    if command and words[0] not in (command, *_ALONE):
        why = f"{words[0][:40]!r} stands before the command"
        raise UsageError("reading the command line", why, hint=f"give it after {command}: {PROGRAM} {command} --help")


def _nobody_reads() -> bool:
    """Whether it is the other end of stdout that is gone, and not that of some other pipe or socket."""
    poller = select.poll()
    poller.register(sys.stdout, 0)
    return bool(poller.poll(0))


def _run(args: argparse.Namespace, out: TextIO) -> int:
    code: int = importlib.import_module(f"ksmd_ctl.cli.{args.command}").run(args, out)
    return code


def _show_traceback() -> None:
    import traceback

    traceback.print_exc()


if __name__ == "__main__":
    sys.exit(main())
