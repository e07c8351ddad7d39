# SPDX-License-Identifier: GPL-2.0-or-later
"""The scenarios that come with the program, and finding scenario files where somebody says."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ksmd_ctl.errors import ConfigError, Problem, UsageError
from ksmd_ctl.scenario.format import load
from ksmd_ctl.scenario.model import Scenario

__all__ = ["LIBRARY", "PROBES", "find", "load_all"]

#: The shipped library: a folder an origin (docs/scenarios.md).
LIBRARY = Path(__file__).parent / "library"

#: Small scenarios that tell one kernel's behaviour from another's; no part of the library.
PROBES = Path(__file__).parent / "probes"


def find(paths: Iterable[Path]) -> list[Path]:
    """The scenario files among files and folders, in order; a folder stands for all that are below it.

    :raises UsageError: a path is not there, or a folder holds none
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(path.rglob("*.toml"))
            if not inside:
                raise UsageError(f"looking for scenarios in {path}", "there is no .toml file in it")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise UsageError(f"reading {path}", "there is no such file or folder")
    return found


def load_all(paths: Iterable[Path]) -> list[Scenario]:
    """The scenarios of all files.

    :raises ConfigError: with every problem of every file
    """
    scenarios: list[Scenario] = []
    problems: list[Problem] = []
    for path in find(paths):
        try:
            scenarios.append(load(path))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError("reading scenarios", problems, hint="docs/scenarios.md describes the format")
    return scenarios
