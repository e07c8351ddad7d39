# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes shell completions from the parser:   python3 packaging/completion/completions.py OUTDIR

Nothing of it is needed at run time: no Python starts at a TAB.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import shtab

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ksmd_ctl.cli.main import COMMANDS, make_parser

__all__ = ["SHELLS", "completion"]

SHELLS = ("bash", "zsh")

_FILES = re.compile(r"FILE|PATH|DIR")


def completion(shell: str) -> str:
    """The completion script for a shell."""
    return shtab.complete(_marked(make_parser(_for_people())), shell=shell)


def _for_people() -> list[str]:
    """The commands that have a help; the privileged part is no command for people."""
    found = []
    for action in make_parser(COMMANDS)._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [shown.dest for shown in action._choices_actions]
    return found


def _marked(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The same parser, with shtab told which values are files."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action.choices.values():
                _marked(choice)
        elif isinstance(action.metavar, str) and _FILES.search(action.metavar):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return parser


def main() -> None:
    """Make all of them."""
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for shell in SHELLS:
        (out / shell).write_text(completion(shell), encoding="utf-8")


if __name__ == "__main__":
    main()
