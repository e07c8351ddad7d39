# SPDX-License-Identifier: GPL-2.0-or-later
"""What every command has: its options, its output and its errors.

Imported at every start, so it imports nothing of weight.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, NoReturn, TextIO, TypeAlias

from ksmd_ctl.errors import ConfigError, KsmdError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

# argparse has no public name for what add_subparsers() returns.
Parsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

PROGRAM = "ksmd-ctl"

#: The default of the setting socket in [service]; a test holds that they agree.
DEFAULT_SOCKET = "/run/ksmd-ctl/socket"

#: The least share of a CPU that anything can be kept to.
LEAST_CPU_SHARE: Final = 0.001

#: Ctrl-C; what `kill` and the end of a login session send; what a terminal sends that is closed.
ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


# Without an address nobody listens.
_MAY_BE_EMPTY: Final = frozenset({"metrics_listen"})


@contextmanager
def handling(signals: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Have signals handled for as long as this lasts, also those that whoever started this process has blocked."""
    before = {number: signal.signal(number, handler) for number in signals}
    blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, before)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, earlier in before.items():
            signal.signal(number, earlier)


def interrupt(*_: object) -> None:
    """The handler for signals that end a command as Ctrl-C does."""
    raise KeyboardInterrupt


class HelpFormatter(argparse.HelpFormatter):
    """argparse makes one for each option that is added, and each would import shutil to find the width."""

    def __init__(self, prog: str) -> None:
        columns = os.environ.get("COLUMNS", "")
        super().__init__(prog, width=max(int(columns) if columns.isdecimal() else 100, 40) - 2)


class Parser(argparse.ArgumentParser):
    """A parser that raises `UsageError`."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Take KNOB=VALUE after options, too: argparse takes no more of these words once an option came."""
        found, rest = super().parse_known_args(args, namespace)
        if isinstance(getattr(found, "words", None), list) and not any(word.startswith("-") for word in rest):
            found.words += rest
            rest = []
        return found, rest

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Take no empty value: where a script has an unset variable, it would be as if nobody had given the option."""
        # A type says by itself what it takes.
        text = action.option_strings and action.type is None and action.choices is None
        if text and "" in arg_strings and action.dest not in _MAY_BE_EMPTY:
            self.error(f"argument {'/'.join(action.option_strings)}: the value is empty")
        return super()._get_values(action, arg_strings)

    def error(self, message: str) -> NoReturn:
        hint = f"{self.prog} --help"
        if message.endswith("expected one argument"):
            # Of what begins with a minus argparse takes only a number for one.
            hint = f"a value that begins with - goes after =, as in --option=-1; {hint}"
        raise UsageError("reading the command line", message, hint=hint)


def add_command(
    parsers: Parsers,
    name: str,
    text: str,
    *,
    hosts: tuple[str, ...] = ("kernel", "engine"),
    host_help: str = "this machine's kernel, or a simulated host (default: what the service runs on, else the kernel)",
) -> argparse.ArgumentParser:
    """The parser of a command, with the options that all have.

    :param hosts: kinds of hosts that it works on; none for a command that needs no host
    """
    parser: argparse.ArgumentParser = parsers.add_parser(
        name, help=text, description=text, allow_abbrev=False, formatter_class=HelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print a JSON document instead of text (docs/json.md)")
    if hosts:
        parser.add_argument(
            "--host",
            choices=hosts,
            help=host_help,
        )
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    return parser


def share_options(parser: argparse.ArgumentParser, action: argparse.ArgumentParser) -> None:
    """Let the options that a command and its action both have be given before the action, too."""
    names = {option.dest for option in parser._actions}
    for option in action._actions:
        if option.dest in names and option.dest != "help":
            # argparse would let the action's default replace what was given to the command.
            option.default = argparse.SUPPRESS


def add_source(parser: argparse.ArgumentParser) -> None:
    """The options of commands that ask the service, or look at the host themselves where none runs."""
    parser.add_argument(
        "--socket",
        metavar="PATH",
        help=f"the control socket of the service (default: $KSMD_CTL_SOCKET, else {DEFAULT_SOCKET})",
    )
    parser.add_argument("--root", default="/", help=argparse.SUPPRESS)


def add_config(parser: argparse.ArgumentParser) -> None:
    """The option of commands that go by the configuration."""
    parser.add_argument("--config", metavar="FILE", help="the configuration (default: /etc/ksmd-ctl/ksmd-ctl.toml)")


def add_process(parser: argparse.ArgumentParser, pid_help: str, unit_help: str, *, required: bool) -> None:
    """The options for one process or the processes of one unit."""
    whose = parser.add_mutually_exclusive_group(required=required)
    whose.add_argument("--pid", type=whole_number(1), metavar="P", help=pid_help)
    whose.add_argument("--unit", default="", metavar="U", help=unit_help)


def write_json(document: object, out: TextIO) -> None:
    """Write a document, indented so that people can read it too."""
    json.dump(document, out, indent=2, allow_nan=False)
    out.write("\n")


def whole_number(least: int = 0, most: int = 2**31 - 1) -> Callable[[str], int]:
    """The type of an option that takes a whole number from `least` to `most`."""

    def number(text: str) -> int:
        # Not int() alone: it takes "+1", " 1", "1_0" and the digits of other scripts.
        digits = text.isascii() and text.isdigit() and len(text) <= len(str(most))
        if not (digits and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from {least} to {most}")
        return int(text)

    return number


def file_name(text: str) -> Path:
    """The type of an option that takes the name of a file."""
    if not text:
        raise argparse.ArgumentTypeError("the name of a file is empty")
    if text == "-":
        raise argparse.ArgumentTypeError("- is not taken for stdin or stdout; a file of that name is ./-")
    # Only here: whoever asks a service needs none.
    from pathlib import Path

    return Path(text)


def seconds(most: int, least: float = 0.1) -> Callable[[str], float]:
    """The type of an option that takes a length of time, from `least` seconds to `most`."""
    return _decimal("a number of seconds", least, most)


def share(least: float, most: int = 1) -> Callable[[str], float]:
    """The type of an option that takes a share, from `least` to `most`."""
    return _decimal("a share", least, most)


def _decimal(kind: str, least: float, most: int) -> Callable[[str], float]:
    def decimal(text: str) -> float:
        # Not float() alone: it takes "+1", " 1", "1_0", "nan" and the digits of other scripts.
        digits = text.isascii() and text.replace(".", "", 1).isdigit()
        if not (digits and least <= float(text) <= most):
            how = "" if digits else ", written with digits alone, as 0.25"
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {kind} from {least} to {most}{how}")
        return float(text)

    return decimal


def error_text(error: KsmdError) -> str:
    """What failed and why, and what to do about it. A configuration's problems get a line each."""
    if isinstance(error, ConfigError) and len(error.problems) > 1:
        lines = [f"{PROGRAM}: {error.what}: {len(error.problems)} problems", *(f"  {item}" for item in error.problems)]
    else:
        lines = [f"{PROGRAM}: {error.what}: {error.why}"]
    if error.hint:
        lines.append(f"hint: {error.hint}")
    return "\n".join(lines) + "\n"
