# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes a scenario as a file that reads back as the same scenario."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby

from ksmd_ctl.scenario.model import (
    FORMAT,
    Expect,
    KnobSetting,
    Region,
    Scenario,
    Set,
    Step,
    Type,
    arguments,
    runs,
)

# More equal labels in a row than this are written as one entry with a count.
_MOST_LABELS = 16


def text_of(scenario: Scenario, comment: str = "") -> str:
    """The file's text.

    :param comment: lines for its head
    """
    lines = [f"# {line}".rstrip() for line in comment.splitlines()]
    lines += [f"format = {FORMAT}", f"name = {_string(scenario.name)}"]
    if scenario.text:
        lines.append(f"text = {_string(scenario.text)}")
    if scenario.nodes != 1:
        lines.append(f"nodes = {scenario.nodes}")
    if scenario.knobs:
        lines += ["[knobs]", *(f"{knob} = {_knob(setting)}" for knob, setting in scenario.knobs.items())]
    for region in scenario.regions:
        lines += ["[[region]]", *_region(region)]
    for step in scenario.steps:
        lines += ["[[step]]", *step_text(step)]
    for expect in scenario.expects:
        lines += ["[[expect]]", *_expect(expect)]
    return "\n".join(lines) + "\n"


def pages_text(pages: Iterable[int]) -> str:
    """Pages as in "0-2,5"."""
    spans = runs(tuple(sorted(pages)))
    return ",".join(str(first) if count == 1 else f"{first}-{first + count - 1}" for first, count in spans)


def step_text(step: Step) -> Iterator[str]:
    """The lines of a step's table."""
    if isinstance(step, Set):
        yield f"set = {_table({knob.value: _plain(value) for knob, value in step.knobs.items()})}"
        if step.fails:
            yield f"fails = {_string(step.fails)}"
    elif step.bare:
        values = [_plain(getattr(step, argument.attribute)) for argument in arguments(type(step))]
        yield f"{step.kind} = {values[0] if values else 'true'}"
    else:
        yield f"{step.kind} = {_table(dict(_arguments(step)))}"


def _arguments(step: Step) -> Iterator[tuple[str, str]]:
    for argument in arguments(type(step)):
        value = getattr(step, argument.attribute)
        # `pages` says all that `page` can; `shared` is true where it is left out.
        if argument.type is Type.PAGE or value is None or (argument.key == "shared" and value is True):
            continue
        yield argument.key, _string(pages_text(value)) if argument.type is Type.PAGES else _plain(value)


def _string(text: str) -> str:
    # A JSON string is a TOML basic string, but for DEL, which TOML wants escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int) else _string(str(value))


def _table(values: Mapping[str, str]) -> str:
    return "{ " + ", ".join(f"{_key(key)} = {value}" for key, value in values.items()) + " }"


def _key(key: str) -> str:
    bare = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if bare else _string(key)


def _knob(setting: KnobSetting) -> str:
    value = _plain(setting.value)
    return _table({"value": value, "optional": "true"}) if setting.optional else value


def _region(region: Region) -> Iterator[str]:
    yield f"process = {_string(region.process)}"
    yield f"name = {_string(region.name)}"
    if region.node is not None:
        yield f"node = {region.node}"
    if not region.mergeable:
        yield "mergeable = false"
    entries: list[str] = []
    for label, same in groupby(region.pages):
        count = len(list(same))
        if count > _MOST_LABELS:
            entries.append(_table({"label": _string(label), "count": str(count)}))
        else:
            entries += [_string(label)] * count
    yield f"pages = [{', '.join(entries)}]"


def _expect(expect: Expect) -> Iterator[str]:
    yield f"at = {_string(expect.at)}"
    if expect.profiles:
        names = [_string(name) for name in expect.profiles]
        yield f"profile = {names[0] if len(names) == 1 else '[' + ', '.join(names) + ']'}"
    for name, value in expect.counters.items():
        yield f"{name} = {value}"
    if expect.groups:
        groups = ("[" + ", ".join(map(_string, group)) + "]" for group in expect.groups)
        yield f"groups = [{', '.join(groups)}]"
    if expect.nodes:
        yield f"nodes = {_table({page: str(node) for page, node in expect.nodes.items()})}"
