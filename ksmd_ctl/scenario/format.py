# SPDX-License-Identifier: GPL-2.0-or-later
"""Scenario files: TOML in, `Scenario` out, or every mistake at once with file, step and key; and the way back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ksmd_ctl import tomltext
from ksmd_ctl.errors import ConfigError, Problem, UsageError
from ksmd_ctl.host.knobs import KNOBS, Knob, parse_wanted
from ksmd_ctl.scenario.check import check
from ksmd_ctl.scenario.model import (
    FORMAT,
    SETTABLE,
    Domain,
    Expect,
    KnobSetting,
    Region,
    Scenario,
    Step,
    arguments,
    written,
)
from ksmd_ctl.scenario.steps import KINDS
from ksmd_ctl.scenario.values import FLAG, Type, inline_table, plain, whole

T = TypeVar("T")

#: The shipped library: a folder an origin (docs/scenarios.md).
LIBRARY = Path(__file__).parent / "library"

#: Small scenarios that tell one kernel's behaviour from another's; not part of the library.
PROBES = Path(__file__).parent / "probes"

_COUNTER = re.compile(r"[a-z_]+")
_HINT = "docs/scenarios.md describes the format"


# -- reading -------------------------------------------------------------------------------------------------------


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
        raise ConfigError("reading scenarios", problems, hint=_HINT)
    return scenarios


def load(path: Path) -> Scenario:
    """The scenario in a file.

    :raises ConfigError: it can't be read or is wrong; carries every problem
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        problem = Problem(str(path), "", f"can't be read: {error.strerror}")
        raise ConfigError("reading a scenario", [problem]) from error
    return parse(data, str(path))


def parse(data: str | bytes, file: str = "") -> Scenario:
    """The scenario in a text.

    :raises ConfigError: it is wrong; carries every problem
    """
    try:
        document = tomltext.parse(data.encode() if isinstance(data, str) else data)
    except ValueError as error:
        raise ConfigError("reading a scenario", [Problem(file, "", str(error))]) from error
    reading = Reading(file)
    scenario = reading.scenario(document)
    if not reading.problems:
        reading.problems += [Problem(file, key, what) for key, what in check(scenario)]
    if reading.problems:
        raise ConfigError("reading a scenario", reading.problems, hint=_HINT)
    return scenario


class Reading:
    """One document; collects problems and goes on without what was wrong."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []

    def wrong(self, where: str, what: str) -> None:
        """Remember a problem."""
        self.problems.append(Problem(self.file, where, what))

    def unknown(self, where: str, table: Mapping[str, Any], known: Iterable[str]) -> None:
        """Every key that is not a known one is a problem."""
        for key in table.keys() - set(known):
            self.wrong(f"{where}{key}", "unknown")

    def value(self, where: str, kind: Type, given: object) -> Any:
        """A value of a type, or None and a problem."""
        try:
            return kind.read(given)
        except ValueError as error:
            self.wrong(where, str(error))
            return None

    def fields(self, where: str, kind: type[Any], given: object) -> dict[str, Any]:
        """The values of a dataclass's fields, from a table with a key for each.

        :param where: empty for the document itself
        """
        keys = arguments(kind)
        if not isinstance(given, dict):
            self.wrong(where, f"takes a table with {', '.join(argument.key for argument in keys)}")
            return {}
        prefix = f"{where}: " if where else ""
        self.unknown(prefix, given, (argument.key for argument in keys))
        found: dict[str, Any] = {}
        used: dict[str, str] = {}
        for argument in keys:
            if argument.key in given:
                if argument.attribute in used:
                    self.wrong(where, f"takes one of {argument.key} and {used[argument.attribute]}, not both")
                used[argument.attribute] = argument.key
                found[argument.attribute] = self.value(f"{prefix}{argument.key}", argument.type, given[argument.key])
            elif argument.required:
                self.wrong(f"{prefix}{argument.key}", f"missing: {argument.text}")
        return found

    def scenario(self, document: dict[str, Any]) -> Scenario:
        if document.get("format") != FORMAT or isinstance(document.get("format"), bool):
            self.wrong("format", f"{document.get('format', 'missing')!r}, and this is a reader of format {FORMAT}")
        parts = {"format", "knobs", "domain", "region", "step", "expect"}
        head = self.fields("", Scenario, {key: value for key, value in document.items() if key not in parts})
        knobs = self.knobs(document.get("knobs", {}))
        domains = [self.item(Domain, where, table) for where, table in self.tables(document, "domain")]
        regions = [self.item(Region, where, table) for where, table in self.tables(document, "region")]
        steps = [self.step(where, table) for where, table in self.tables(document, "step")]
        expects = [self.expect(where, table) for where, table in self.tables(document, "expect")]
        return Scenario(
            **{"name": "", **head},
            knobs=knobs,
            regions=tuple(region for region in regions if region),
            steps=tuple(step for step in steps if step),
            expects=tuple(expect for expect in expects if expect),
            domains=tuple(domain for domain in domains if domain),
            file=self.file,
        )

    def tables(self, document: Mapping[str, Any], key: str) -> list[tuple[str, dict[str, Any]]]:
        found = document.get(key, [])
        if not isinstance(found, list) or not all(isinstance(table, dict) for table in found):
            self.wrong(key, f"has to be tables: [[{key}]]")
            return []
        return [(f"{key} {number}", table) for number, table in enumerate(found, 1)]

    def knobs(self, table: object) -> dict[Knob, KnobSetting]:
        if not isinstance(table, dict):
            self.wrong("knobs", "has to be a table: [knobs]")
            return {}
        found: dict[Knob, KnobSetting] = {}
        for key, given in table.items():
            where = f"knobs.{key}"
            value, optional = given, False
            if isinstance(given, dict):
                self.unknown(f"{where}.", given, {"value", "optional"})
                value, optional = given.get("value"), given.get("optional", False)
                self.value(f"{where}.optional", FLAG, optional)
            if key not in SETTABLE:
                self.wrong(where, f"is not one of {', '.join(sorted(SETTABLE))}")
                continue
            try:
                found[Knob(key)] = KnobSetting(parse_wanted(Knob(key), value), bool(optional))
            except ValueError as error:
                self.wrong(where, str(error))
        return found

    def item(self, kind: type[T], where: str, table: dict[str, Any]) -> T | None:
        before = len(self.problems)
        found = self.fields(where, kind, table)
        return kind(**found) if len(self.problems) == before else None

    def step(self, where: str, table: dict[str, Any]) -> Step | None:
        kinds = [key for key in table if key in KINDS]
        if len(kinds) != 1:
            here = " and ".join(kinds) or ", ".join(table) or "nothing"
            self.wrong(where, f"a step is one of {', '.join(KINDS)}; here is {here}")
            return None
        kind = KINDS[kinds[0]]
        before = len(self.problems)
        found = kind.read(self, f"{where} ({kind.kind})", table)
        return kind(**found) if len(self.problems) == before else None

    def expect(self, where: str, table: dict[str, Any]) -> Expect | None:
        before = len(self.problems)
        keys = {argument.key for argument in arguments(Expect)}
        found = self.fields(where, Expect, {key: value for key, value in table.items() if key in keys})
        counters = {key: value for key, value in table.items() if key not in keys}
        for key, value in counters.items():
            if not _COUNTER.fullmatch(key) or key in KNOBS or not whole(value, -(2**63), 2**63):
                self.wrong(f"{where}: {key}", f"{value!r} is not a counter's value")
        return Expect(**found, counters=counters) if len(self.problems) == before else None


# -- writing -------------------------------------------------------------------------------------------------------


def text_of(scenario: Scenario, comment: str = "") -> str:
    """A file that reads back as the same scenario.

    :param comment: lines for its head
    """
    lines = [f"# {line}".rstrip() for line in comment.splitlines()]
    lines += [f"format = {FORMAT}", *_lines(written(scenario))]
    if scenario.knobs:
        lines += ["[knobs]", *(f"{knob} = {_knob(setting)}" for knob, setting in scenario.knobs.items())]
    for domain in scenario.domains:
        lines += ["[[domain]]", *_lines(written(domain))]
    for region in scenario.regions:
        lines += ["[[region]]", *_lines(written(region))]
    for step in scenario.steps:
        lines += ["[[step]]", *step.write()]
    for expect in scenario.expects:
        counters = {name: str(value) for name, value in expect.counters.items()}
        lines += ["[[expect]]", *_lines(written(expect) | counters)]
    return "\n".join(lines) + "\n"


def _lines(values: Mapping[str, str]) -> Iterator[str]:
    return (f"{key} = {value}" for key, value in values.items())


def _knob(setting: KnobSetting) -> str:
    value = plain(setting.value)
    return inline_table({"value": value, "optional": "true"}) if setting.optional else value
