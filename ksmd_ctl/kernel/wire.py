# SPDX-License-Identifier: GPL-2.0-or-later
"""Typed values as JSON documents, and back: how requests, results and errors get from process to process.

Decoding is strict, because root decodes what others send: nothing is converted, nothing is ignored, nothing is
filled in but a field's default.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from enum import StrEnum

from ksmd_ctl import errors
from ksmd_ctl.errors import ConfigError, HostError, KsmdError, Problem

__all__ = ["JSON", "decode", "decode_error", "dump", "encode", "encode_error", "load"]

JSON = None | bool | int | float | str | list["JSON"] | dict[str, "JSON"]

_ERRORS: dict[str, type[KsmdError]] = {
    name: kind
    for name in errors.__all__
    if isinstance(kind := getattr(errors, name), type) and issubclass(kind, KsmdError)
}


def dump(document: JSON) -> bytes:
    """A document as one line of ASCII."""
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"


def load(data: bytes) -> JSON:
    """The document in a message.

    :raises ValueError: it is not JSON, or says a thing twice
    """
    try:
        document: JSON = json.loads(data.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return document


def encode(value: object) -> JSON:
    """The document for a value: dataclasses and mappings as objects, sequences and sets as arrays.

    :raises TypeError: it holds something that has no form here
    """
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, AbstractSet):
        return [encode(item) for item in sorted(value)]
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    raise TypeError(f"{type(value).__name__} has no form as a document")


def decode(kind: object, document: JSON, where: str = "it") -> object:
    """The value of a type that a document stands for.

    :param kind: a dataclass, StrEnum, str, int, float, bool, None, or a tuple, frozenset, Mapping or union of them
    :param where: what the document is called in errors
    :raises ValueError: the document is not of that type; the text says where
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType or origin is typing.Union:
        for member in arguments:
            try:
                return decode(member, document, where)
            except ValueError:
                continue
    elif kind is None or kind is types.NoneType:
        if document is None:
            return None
    elif kind is float:
        # 1e999 is JSON, and infinite.
        if isinstance(document, int | float) and not isinstance(document, bool):
            try:
                number = float(document)
            except OverflowError:
                number = math.inf
            if math.isfinite(number):
                return number
    elif kind is int or kind is bool or kind is str:
        if type(document) is kind:
            return document
    elif origin is tuple:
        if isinstance(document, list):
            if arguments[-1] is not Ellipsis and len(arguments) != len(document):
                raise ValueError(f"{where} does not have {len(arguments)} parts")
            kinds = (arguments[0],) * len(document) if arguments[-1] is Ellipsis else arguments
            return tuple(
                decode(part, item, f"{where}[{at}]")
                for at, (part, item) in enumerate(zip(kinds, document, strict=True))
            )
    elif origin is frozenset:
        if isinstance(document, list):
            return frozenset(decode(arguments[0], item, f"{where}[{at}]") for at, item in enumerate(document))
    elif origin is Mapping:
        if isinstance(document, dict):
            return {
                _key(arguments[0], key, where): decode(arguments[1], item, f"{where}.{key[:40]}")
                for key, item in document.items()
            }
    elif isinstance(kind, type) and issubclass(kind, StrEnum):
        if isinstance(document, str) and document in kind.__members__.values():
            return kind(document)
    elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if isinstance(document, dict):
            return _dataclass(kind, document, where)
    else:
        raise TypeError(f"{kind!r} can't be decoded")
    raise ValueError(f"{where} is {_shown(document)}, not {_named(kind)}")


def encode_error(error: KsmdError) -> JSON:
    """The document for an error."""
    document: dict[str, JSON] = {"class": type(error).__name__, "what": error.what, "hint": error.hint}
    if isinstance(error, ConfigError):
        document["problems"] = [[problem.path, problem.key, problem.text] for problem in error.problems]
        return document
    document["why"] = error.why
    if isinstance(error, HostError):
        value = error.value
        document["path"] = error.path
        document["value"] = value if value is None or isinstance(value, bool | int | float | str) else str(value)
        document["errno"] = error.errno
    return document


def decode_error(document: JSON) -> KsmdError:
    """The error that a document stands for: of the same class, with the same fields.

    :raises ValueError: it stands for none
    """
    if not isinstance(document, dict):
        raise ValueError(f"an error is {_shown(document)}")
    rest = dict(document)
    kind = _ERRORS.get(str(rest.pop("class", "")))
    if kind is None:
        raise ValueError(f"{_shown(document.get('class'))} is not a class of errors")
    what, hint = str(rest.pop("what", "")), str(rest.pop("hint", ""))
    if issubclass(kind, ConfigError):
        found = decode(tuple[tuple[str, str, str], ...], rest.get("problems"), "problems")
        problems = typing.cast("tuple[tuple[str, str, str], ...]", found)
        return kind(what, [Problem(*parts) for parts in problems], hint=hint)
    why = str(rest.pop("why", ""))
    if not issubclass(kind, HostError):
        return kind(what, why, hint=hint)
    errno = rest.get("errno")
    return kind(
        what,
        why,
        hint=hint,
        path=str(rest.get("path", "")),
        value=rest.get("value"),
        errno=errno if isinstance(errno, int) else None,
    )


def _once(pairs: list[tuple[str, JSON]]) -> dict[str, JSON]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a key stands there twice")
    return document


def _no_constant(name: str) -> JSON:
    raise ValueError(f"{name} is not a number")


def _key(kind: object, key: str, where: str) -> object:
    if kind is int:
        if not (key.isascii() and key.isdigit() and len(key) < 20):
            raise ValueError(f"{where} has the key {key[:40]!a}, which is not a number")
        return int(key)
    return decode(kind, key, f"a key of {where}")


def _dataclass(kind: type, document: dict[str, JSON], where: str) -> object:
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in document:
        if key not in fields:
            raise ValueError(f"{where} has no {key[:40]!a}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in document:
            raise ValueError(f"{where} lacks {name}")
    return kind(**{name: decode(hints[name], item, f"{where}.{name}") for name, item in document.items()})


def _named(kind: object) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)


def _shown(document: object) -> str:
    text = ascii(document)
    return text if len(text) <= 60 else text[:57] + "..."
