# SPDX-License-Identifier: GPL-2.0-or-later
"""The format as a JSON Schema (draft 2020-12) for editors, made from the annotations of the steps.

It says what form can say; that a process lives and a page is mapped only the loader checks.
``python -m tests.scenario.schema >docs/scenario.schema.json`` writes it.
"""

from __future__ import annotations

import json
from typing import Any

from ksmd_ctl.host.knobs import KNOBS, Knob
from ksmd_ctl.scenario import values
from ksmd_ctl.scenario.check import COUNTERS
from ksmd_ctl.scenario.host_steps import WRITABLE, Set
from ksmd_ctl.scenario.memory_steps import Write
from ksmd_ctl.scenario.model import FORMAT, SETTABLE, Domain, Step, arguments
from ksmd_ctl.scenario.steps import KINDS
from ksmd_ctl.scenario.values import MAX_NODES, MAX_PAGES, NAME_PATTERN, Type

_SPANS = "^ *[0-9]{1,6}(-[0-9]{1,6})? *(, *[0-9]{1,6}(-[0-9]{1,6})? *)*$"
_TYPES: dict[Type, dict[str, Any]] = {
    values.COUNT: {"type": "integer", "minimum": 1, "maximum": 2**32 - 1},
    values.MILLISECONDS: {"type": "integer", "minimum": 1, "maximum": 60_000},
    values.NAME: {"type": "string", "pattern": f"^{NAME_PATTERN}$"},
    values.LABEL: {"type": "string", "minLength": 1, "maxLength": 255, "not": {"const": "-"}},
    values.TEXT: {"type": "string", "minLength": 1},
    values.PAGE: {"type": "integer", "minimum": 0, "maximum": MAX_PAGES - 1},
    values.PAGES: {"type": "string", "pattern": _SPANS},
    values.NODE_SET: {"type": "string", "pattern": _SPANS},
    values.NAMES: {
        "type": "array",
        "minItems": 1,
        "items": {"type": "string", "pattern": f"^{NAME_PATTERN}$"},
    },
    values.NODE: {"type": "integer", "minimum": 0, "maximum": MAX_NODES - 1},
    values.FLAG: {"type": "boolean"},
    values.TRUE: {"const": True},
}


def schema() -> dict[str, Any]:
    """The whole schema."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A scenario of ksmd-ctl verify",
        "type": "object",
        "required": ["format", "name", "region", "step"],
        "additionalProperties": False,
        "properties": {
            "format": {"const": FORMAT},
            "name": {"type": "string", "minLength": 1},
            "text": {"type": "string", "description": "what it is about"},
            "nodes": {
                "type": "integer",
                "minimum": 1,
                "maximum": MAX_NODES,
                "description": "nodes with memory that it needs",
            },
            "knobs": {"type": "object", "additionalProperties": False, "properties": _start_knobs()},
            "domain": {"type": "array", "items": _table(Domain)},
            "region": {"type": "array", "minItems": 1, "items": _region()},
            "step": {"type": "array", "minItems": 1, "items": {"oneOf": [_step(kind) for kind in KINDS.values()]}},
            "expect": {"type": "array", "items": _expect()},
        },
    }


def _value(knob: Knob) -> dict[str, Any]:
    spec = KNOBS[knob]
    if spec.choices:
        return {"enum": list(spec.choices)}
    number = {"type": "integer", "minimum": spec.minimum, "maximum": spec.maximum}
    return {"anyOf": [number, {"type": "boolean"}]} if spec.maximum == 1 else number


def _start_knobs() -> dict[str, Any]:
    return {
        knob.value: {
            "anyOf": [
                _value(knob),
                {
                    "type": "object",
                    "required": ["value"],
                    "additionalProperties": False,
                    "properties": {"value": _value(knob), "optional": {"type": "boolean"}},
                },
            ]
        }
        for knob in sorted(SETTABLE)
    }


def _region() -> dict[str, Any]:
    label = {"type": "string", "minLength": 1, "maxLength": 255}
    many = {
        "type": "object",
        "required": ["label", "count"],
        "additionalProperties": False,
        "properties": {
            "label": label,
            "count": {"type": "integer", "minimum": 1, "maximum": MAX_PAGES},
            "numbered": {"type": "boolean"},
        },
    }
    return {
        "type": "object",
        "required": ["process", "name", "pages"],
        "additionalProperties": False,
        "properties": {
            "process": _TYPES[values.NAME],
            "name": _TYPES[values.NAME],
            "node": _TYPES[values.NODE],
            "mergeable": _TYPES[values.FLAG],
            "huge": _TYPES[values.FLAG],
            "pages": {"type": "array", "minItems": 1, "items": {"anyOf": [label, many]}},
        },
    }


def _step(kind: type[Step]) -> dict[str, Any]:
    properties: dict[str, Any] = {kind.kind: {**_takes(kind), "description": kind.__doc__}}
    if kind is Set:
        properties["fails"] = {"type": "string", "description": 'the name of an errno, or "any"'}
    return {"type": "object", "required": [kind.kind], "additionalProperties": False, "properties": properties}


def _takes(kind: type[Step]) -> dict[str, Any]:
    keys = arguments(kind)
    if kind is Set:
        knobs = {knob.value: {"type": ["integer", "string", "boolean"]} for knob in sorted(WRITABLE)}
        return {"type": "object", "minProperties": 1, "additionalProperties": False, "properties": knobs}
    if kind.bare:
        return _TYPES[keys[0].type if keys else values.TRUE]
    found = _table(kind)
    if kind is Write:
        found["not"] = {"required": ["page", "pages"]}
    return found


def _table(kind: type[Any]) -> dict[str, Any]:
    keys = arguments(kind)
    return {
        "type": "object",
        "required": [argument.key for argument in keys if argument.required],
        "additionalProperties": False,
        "properties": {argument.key: {**_TYPES[argument.type], "description": argument.text} for argument in keys},
    }


def _expect() -> dict[str, Any]:
    page = {"type": "string"}
    names = {"type": "array", "items": {"type": "string", "minLength": 1}}
    return {
        "type": "object",
        "required": ["at"],
        "additionalProperties": False,
        "properties": {
            "at": _TYPES[values.TEXT],
            "profile": {"anyOf": [{"type": "string", "minLength": 1}, names]},
            "groups": {"type": "array", "items": {"type": "array", "minItems": 1, "items": page}},
            "nodes": {"type": "object", "additionalProperties": _TYPES[values.NODE]},
            **{name: {"type": "integer"} for name in COUNTERS},
        },
    }


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))
