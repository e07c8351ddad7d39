# SPDX-License-Identifier: GPL-2.0-or-later
"""As much of JSON Schema as the scenarios' schema uses; an unknown keyword is an error, so nothing passes unseen."""

from __future__ import annotations

import re
from typing import Any

_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "boolean": bool,
}
_KNOWN = {
    "$schema",
    "title",
    "description",
    "type",
    "required",
    "additionalProperties",
    "properties",
    "const",
    "enum",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "pattern",
    "not",
    "anyOf",
    "oneOf",
    "items",
    "minItems",
    "minProperties",
}


def mistakes(schema: dict[str, Any], value: Any, where: str = "") -> list[str]:
    """What of a value doesn't fit."""
    unknown = schema.keys() - _KNOWN
    assert not unknown, unknown
    found: list[str] = []
    types = schema.get("type", [])
    names = [types] if isinstance(types, str) else types
    if names and not any(_is(value, name) for name in names):
        return [f"{where}: not {names}"]
    if "const" in schema and (value != schema["const"] or type(value) is not type(schema["const"])):
        found.append(f"{where}: not {schema['const']!r}")
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{where}: not one of {schema['enum']}")
    if isinstance(value, int) and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        found.append(f"{where}: out of range")
    if isinstance(value, str):
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
            found.append(f"{where}: length")
        if "pattern" in schema and not re.search(schema["pattern"], value):
            found.append(f"{where}: pattern")
    if "not" in schema and not mistakes(schema["not"], value, where):
        found.append(f"{where}: excluded")
    if "anyOf" in schema and all(mistakes(each, value, where) for each in schema["anyOf"]):
        found.append(f"{where}: none of them")
    if "oneOf" in schema and sum(not mistakes(each, value, where) for each in schema["oneOf"]) != 1:
        found.append(f"{where}: not exactly one of them")
    if isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            found.append(f"{where}: too few")
        for number, item in enumerate(value):
            found += mistakes(schema.get("items", {}), item, f"{where}[{number}]")
    if isinstance(value, dict):
        found += _object(schema, value, where)
    return found


def _object(schema: dict[str, Any], value: dict[str, Any], where: str) -> list[str]:
    found = [f"{where}: no {key}" for key in schema.get("required", []) if key not in value]
    if len(value) < schema.get("minProperties", 0):
        found.append(f"{where}: empty")
    properties = schema.get("properties", {})
    for key, item in value.items():
        rest = schema.get("additionalProperties", {})
        if key in properties:
            found += mistakes(properties[key], item, f"{where}.{key}")
        elif rest is False:
            found.append(f"{where}: {key} is unknown")
        elif isinstance(rest, dict):
            found += mistakes(rest, item, f"{where}.{key}")
    return found


def _is(value: Any, name: str) -> bool:
    if name == "integer":
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, _TYPES[name])
