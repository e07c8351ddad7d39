# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads scenario files: TOML in, `Scenario` out, or every mistake at once with file, step and key."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ksmd_ctl import tomltext
from ksmd_ctl.errors import ConfigError, Problem, UsageError
from ksmd_ctl.host.knobs import KNOBS, Knob, parse_wanted
from ksmd_ctl.scenario.check import check
from ksmd_ctl.scenario.model import (
    FORMAT,
    KINDS,
    SETTABLE,
    UNTOUCHED,
    WRITABLE,
    Expect,
    KnobSetting,
    Region,
    Scenario,
    Set,
    Step,
    Type,
    Write,
    arguments,
)

#: The shipped library: a folder an origin (docs/scenarios.md).
LIBRARY = Path(__file__).parent / "library"

#: Small scenarios that tell one kernel's behaviour from another's; not part of the library.
PROBES = Path(__file__).parent / "probes"

#: More than any test needs; a typing error must not eat all memory.
MAX_PAGES = 1 << 16
MAX_NODES = 64

NAME = r"[A-Za-z0-9_-]{1,32}"
_NAME = re.compile(NAME)
_SPAN = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")
_TOP = {"format", "name", "text", "nodes", "knobs", "region", "step", "expect"}
_REGION_KEYS = {"process", "name", "node", "mergeable", "pages"}
_REPEAT_KEYS = {"label", "count", "numbered"}
_EXPECT_KEYS = {"at", "profile", "groups", "nodes"}
_COUNTER = re.compile(r"[a-z_]+")
_RANGES = {
    Type.COUNT: (1, 2**32 - 1),
    Type.MILLISECONDS: (1, 60_000),
    Type.PAGE: (0, MAX_PAGES - 1),
    Type.NODE: (0, MAX_NODES - 1),
}


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


def parse(text: str | bytes, file: str = "") -> Scenario:
    """The scenario in a text.

    :raises ConfigError: it is wrong; carries every problem
    """
    try:
        document = tomltext.parse(text.encode() if isinstance(text, str) else text)
    except ValueError as error:
        raise ConfigError("reading a scenario", [Problem(file, "", str(error))]) from error
    reading = _Reading(file)
    scenario = reading.scenario(document)
    if not reading.problems:
        reading.problems += [Problem(file, key, what) for key, what in check(scenario)]
    if reading.problems:
        raise ConfigError("reading a scenario", reading.problems, hint="docs/scenarios.md describes the format")
    return scenario


def parse_pages(text: str) -> tuple[int, ...]:
    """Pages out of "3" or "0-2,5", ascending.

    :raises ValueError: it doesn't look like that
    """
    found: set[int] = set()
    for part in text.split(","):
        match = _SPAN.fullmatch(part.strip())
        if not match:
            raise ValueError(f"{text[:40]!r} is not {Type.PAGES}")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < MAX_PAGES:
            raise ValueError(f"{part.strip()} is not an ascending range of pages below {MAX_PAGES}")
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def _whole(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


class _Reading:
    """One document; collects problems and goes on with something in place of what was wrong."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []

    def wrong(self, where: str, text: str) -> None:
        self.problems.append(Problem(self.file, where, text))

    def unknown(self, where: str, table: Mapping[str, Any], known: Iterable[str]) -> None:
        for key in table.keys() - set(known):
            self.wrong(f"{where}{key}", "unknown")

    def scenario(self, document: dict[str, Any]) -> Scenario:
        self.unknown("", document, _TOP)
        if document.get("format") != FORMAT or isinstance(document.get("format"), bool):
            self.wrong("format", f"{document.get('format', 'missing')!r}, and this is a reader of format {FORMAT}")
        name = document.get("name")
        if not isinstance(name, str) or not name.strip():
            self.wrong("name", "a scenario needs one")
        nodes = document.get("nodes", 1)
        if not _whole(nodes, 1, MAX_NODES):
            self.wrong("nodes", f"{nodes!r} is not a number of nodes, 1 to {MAX_NODES}")
            nodes = MAX_NODES
        text = document.get("text", "")
        if not isinstance(text, str):
            self.wrong("text", f"{text!r} is not text")
        knobs = self.knobs(document.get("knobs", {}))
        regions = [self.region(where, table) for where, table in self.tables(document, "region")]
        steps = [self.step(where, table) for where, table in self.tables(document, "step")]
        expects = [self.expect(where, table) for where, table in self.tables(document, "expect")]
        return Scenario(
            name=str(name),
            nodes=nodes,
            text=str(text),
            knobs=knobs,
            regions=tuple(region for region in regions if region),
            steps=tuple(step for step in steps if step),
            expects=tuple(expect for expect in expects if expect),
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
                if not isinstance(optional, bool):
                    self.wrong(f"{where}.optional", f"{optional!r} is not true or false")
            if key not in SETTABLE:
                self.wrong(where, f"is not one of {', '.join(sorted(SETTABLE))}")
                continue
            try:
                found[Knob(key)] = KnobSetting(parse_wanted(Knob(key), value), bool(optional))
            except ValueError as error:
                self.wrong(where, str(error))
        return found

    def region(self, where: str, table: dict[str, Any]) -> Region | None:
        before = len(self.problems)
        self.unknown(f"{where}: ", table, _REGION_KEYS)
        process = self.value(f"{where}: process", Type.NAME, table.get("process"))
        name = self.value(f"{where}: name", Type.NAME, table.get("name"))
        node = self.value(f"{where}: node", Type.NODE, table["node"]) if "node" in table else None
        mergeable = self.value(f"{where}: mergeable", Type.FLAG, table.get("mergeable", True))
        pages = self.labels(f"{where}: pages", table.get("pages"))
        if len(self.problems) > before:
            return None
        return Region(process=process, name=name, pages=pages, node=node, mergeable=mergeable)

    def labels(self, where: str, given: object) -> tuple[str, ...]:
        if not isinstance(given, list) or not given:
            self.wrong(where, "a label a page, at least one")
            return ()
        found: list[str] = []
        for entry in given:
            if isinstance(entry, dict):
                self.unknown(f"{where}: ", entry, _REPEAT_KEYS)
                label, count = entry.get("label"), entry.get("count")
                numbered = entry.get("numbered", False)
                if not _whole(count, 1, MAX_PAGES):
                    self.wrong(f"{where}: count", f"{count!r} is not a number from 1 to {MAX_PAGES}")
                elif not isinstance(numbered, bool):
                    self.wrong(f"{where}: numbered", f"{numbered!r} is not true or false")
                elif self.label(f"{where}: label", label, untouched=not numbered):
                    found += [f"{label}{number}" if numbered else str(label) for number in range(int(str(count)))]
            elif self.label(where, entry, untouched=True):
                found.append(str(entry))
        if len(found) > MAX_PAGES:
            self.wrong(where, f"{len(found)} pages, more than {MAX_PAGES}")
        return tuple(found)

    def label(self, where: str, given: object, *, untouched: bool = False) -> bool:
        if isinstance(given, str) and untouched and given == UNTOUCHED:
            return True
        good = isinstance(given, str) and given not in ("", UNTOUCHED) and "\0" not in given
        if not good or len(str(given).encode()) > 255:
            self.wrong(where, f"{given!r} is not {Type.LABEL}, of at most 255 bytes")
            return False
        return True

    def step(self, where: str, table: dict[str, Any]) -> Step | None:
        kinds = [key for key in table if key in KINDS]
        if len(kinds) != 1:
            found = " and ".join(kinds) or ", ".join(table) or "nothing"
            self.wrong(where, f"a step is one of {', '.join(KINDS)}; here is {found}")
            return None
        kind = KINDS[kinds[0]]
        where = f"{where} ({kind.kind})"
        before = len(self.problems)
        self.unknown(f"{where}: ", table, {kind.kind, "fails"} if kind is Set else {kind.kind})
        given = table[kind.kind]
        values: dict[str, Any]
        if not kind.bare:
            values = self.arguments(where, kind, given)
        elif kind is Set:
            values = self.setting(where, given, table.get("fails", ""))
        elif arguments(kind):
            (argument,) = arguments(kind)
            values = {argument.attribute: self.value(where, argument.type, given)}
        else:
            self.value(where, Type.TRUE, given)
            values = {}
        return kind(**values) if len(self.problems) == before else None

    def arguments(self, where: str, kind: type[Step], given: object) -> dict[str, Any]:
        keys = {argument.key: argument for argument in arguments(kind)}
        if not isinstance(given, dict):
            self.wrong(where, f"takes a table with {', '.join(keys)}")
            return {}
        self.unknown(f"{where}: ", given, keys)
        for argument in keys.values():
            if argument.required and argument.key not in given:
                self.wrong(f"{where}: {argument.key}", f"missing: {argument.text}")
        if kind is Write and "page" in given and "pages" in given:
            self.wrong(where, "takes one of page and pages, not both")
        values: dict[str, Any] = {}
        for key, argument in keys.items():
            if key in given:
                value = self.value(f"{where}: {key}", argument.type, given[key])
                values[argument.attribute] = (value,) if argument.type is Type.PAGE else value
        return values

    def setting(self, where: str, given: object, fails: object) -> dict[str, Any]:
        if not isinstance(given, dict) or not given:
            self.wrong(where, f"takes {Type.KNOBS}")
            return {}
        if fails and fails != "any" and fails not in errno.errorcode.values():
            self.wrong(f"{where}: fails", f"{fails!r} is not the name of an errno")
        knobs: dict[Knob, int | str] = {}
        for key, value in given.items():
            # What the kernel has to refuse can be any knob and any value.
            allowed = WRITABLE if fails else SETTABLE
            if key not in allowed:
                self.wrong(f"{where}: {key}", f"is not one of {', '.join(sorted(allowed))}")
            elif fails and (_whole(value, -(2**63), 2**63) or isinstance(value, str)):
                knobs[Knob(key)] = value
            elif fails:
                self.wrong(f"{where}: {key}", f"{value!r} is not a number or text")
            else:
                try:
                    knobs[Knob(key)] = parse_wanted(Knob(key), value)
                except ValueError as error:
                    self.wrong(f"{where}: {key}", str(error))
        return {"knobs": knobs, "fails": fails}

    def value(self, where: str, kind: Type, given: object) -> Any:
        """A value of a type, or None and a problem."""
        if kind is Type.LABEL:
            return given if self.label(where, given) else None
        if kind is Type.PAGES and isinstance(given, str):
            try:
                return parse_pages(given)
            except ValueError as error:
                self.wrong(where, str(error))
                return None
        good = (
            (kind in _RANGES and _whole(given, *_RANGES[kind]))
            or (kind is Type.NAME and isinstance(given, str) and _NAME.fullmatch(given))
            or (kind is Type.TEXT and isinstance(given, str) and given.strip())
            or (kind is Type.FLAG and isinstance(given, bool))
            or (kind is Type.TRUE and given is True)
        )
        if not good:
            self.wrong(where, f"{given!r} is not {kind}")
            return None
        return given

    def expect(self, where: str, table: dict[str, Any]) -> Expect | None:
        before = len(self.problems)
        at = self.value(f"{where}: at", Type.TEXT, table.get("at"))
        profile = table.get("profile", [])
        profiles = [profile] if isinstance(profile, str) else profile
        if not isinstance(profiles, list) or not all(isinstance(name, str) and name for name in profiles):
            self.wrong(f"{where}: profile", f"{profile!r} is not a profile's name, nor a list of them")
        groups = table.get("groups", [])
        if not isinstance(groups, list) or not all(
            isinstance(group, list) and group and all(isinstance(page, str) for page in group) for group in groups
        ):
            self.wrong(f"{where}: groups", "has to be a list of lists of pages")
        nodes = table.get("nodes", {})
        if not isinstance(nodes, dict) or not all(_whole(node, 0, MAX_NODES - 1) for node in nodes.values()):
            self.wrong(f"{where}: nodes", "has to be a table of pages and nodes")
        counters = {key: value for key, value in table.items() if key not in _EXPECT_KEYS}
        for key, value in counters.items():
            if not _COUNTER.fullmatch(key) or key in KNOBS or not _whole(value, -(2**63), 2**63):
                self.wrong(f"{where}: {key}", f"{value!r} is not a counter's value")
        if len(self.problems) > before:
            return None
        return Expect(at, tuple(profiles), counters, tuple(tuple(group) for group in groups), nodes)
