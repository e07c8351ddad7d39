# SPDX-License-Identifier: GPL-2.0-or-later
"""The codec: typed values as JSON documents and back, for messages between processes and for files of state.

Decoding is strict, because root decodes documents of other users. Nothing is converted or ignored, and only fields with
a default may be missing.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from enum import StrEnum
from typing import TYPE_CHECKING, TypeVar, overload

from ksmd_ctl import errors
from ksmd_ctl.errors import ConfigError, HostError, KsmdError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

JSON = None | bool | int | float | str | list["JSON"] | dict[str, "JSON"]

T = TypeVar("T")

_ERRORS: dict[str, type[KsmdError]] = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, KsmdError) and kind is not ConfigError
}


class DecodeError(ValueError):
    """A document is not of the expected type.

    :ivar field: the field of the outermost object that is wrong; empty if the document as a whole is
    """

    def __init__(self, where: _Where, text: str) -> None:
        super().__init__(f"{_path(where)} {text}")
        field: str | int = ""
        parent, step = where
        while parent is not None:
            field, (parent, step) = step, parent
        self.field = str(field).removeprefix(".")


def dump(document: JSON) -> bytes:
    """A document as one line of ASCII."""
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"


def load(data: bytes) -> JSON:
    """Read a document.

    :raises ValueError: it is not JSON, or has a key twice
    """
    try:
        document: JSON = json.loads(data.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return document


def encode(value: object) -> JSON:
    """The document for a value: dataclasses and mappings as objects, sequences and sets as arrays.

    :raises TypeError: it contains a value of another type
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
        return encode_fields(value)
    raise TypeError(f"{type(value).__name__} has no form as a document")


def encode_fields(value: DataclassInstance) -> dict[str, JSON]:
    """The object for a dataclass: its fields by name."""
    return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}


@overload
def decode(kind: type[T], document: object, where: str = "it") -> T: ...


@overload
def decode(kind: object, document: object, where: str = "it") -> object: ...


def decode(kind: object, document: object, where: str = "it") -> object:
    """The value of a document of this type.

    :param kind: a dataclass, StrEnum, str, int, float, bool, None, object (any document), or a tuple, frozenset,
        Mapping or union of them; or ``Annotated`` with functions that raise ValueError for other values
    :param where: the name of the document in errors
    :raises DecodeError: the document is not of that type; the text says where
    """
    return _decoder(kind)(typing.cast(JSON, document), (None, where))


def between(least: float, most: float) -> Callable[[float], None]:
    """For ``Annotated``: a number in this range."""

    def check(number: float) -> None:
        if not least <= number <= most:
            raise ValueError(f"is not between {least} and {most}")

    return check


# The place of a document: that of the document that contains it, and the step from there. Errors make a text of it.
_Where = tuple["_Where | None", "str | int"]
_Decoder = Callable[[JSON, _Where], object]


def _path(where: _Where) -> str:
    parts = []
    at: _Where | None = where
    while at is not None:
        at, step = at
        parts.append(f"[{step}]" if isinstance(step, int) else step)
    return "".join(reversed(parts))


def _wrong(kind: object, document: JSON, where: _Where) -> DecodeError:
    return DecodeError(where, f"is {_shown(document)}, not {_named(kind)}")


@functools.cache
def _decoder(kind: object) -> _Decoder:
    """The decoder of a type. It is cached, because an answer may have 100,000 values of one type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType or origin is typing.Union:
        return _union(kind, arguments)
    if origin is typing.Annotated:
        return _checked(*arguments)
    if kind is object:
        return _anything
    if kind is None or kind is types.NoneType:
        return _exactly(kind, types.NoneType)
    if kind is float:
        return _float
    if kind is int or kind is bool or kind is str:
        return _exactly(kind, typing.cast(type, kind))
    if origin is frozenset or (origin is tuple and arguments[-1] is Ellipsis):
        return _each(kind, arguments[0], origin)
    if origin is tuple:
        return _tuple(kind, arguments)
    if origin is Mapping:
        return _mapping(kind, *arguments)
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return _enum(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _dataclass(kind)
    raise TypeError(f"{kind!r} can't be decoded")


def _union(kind: object, members: tuple[object, ...]) -> _Decoder:
    def decoded(document: JSON, where: _Where) -> object:
        for member in members:
            try:
                return _decoder(member)(document, where)
            except DecodeError:
                continue
        raise _wrong(kind, document, where)

    return decoded


def _checked(kind: object, *checks: Callable[[object], None]) -> _Decoder:
    plain = _decoder(kind)

    def decoded(document: JSON, where: _Where) -> object:
        value = plain(document, where)
        for check in checks:
            try:
                check(value)
            except ValueError as error:
                raise DecodeError(where, str(error)) from error
        return value

    return decoded


def _exactly(kind: object, plain: type) -> _Decoder:
    def decoded(document: JSON, where: _Where) -> object:
        if type(document) is not plain:
            raise _wrong(kind, document, where)
        return document

    return decoded


def _anything(document: JSON, _where: _Where) -> object:
    return document


def _float(document: JSON, where: _Where) -> object:
    # 1e999 is JSON, but infinite.
    if isinstance(document, int | float) and not isinstance(document, bool):
        try:
            number = float(document)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise _wrong(float, document, where)


def _tuple(kind: object, members: tuple[object, ...]) -> _Decoder:
    def decoded(document: JSON, where: _Where) -> object:
        if not isinstance(document, list):
            raise _wrong(kind, document, where)
        if len(members) != len(document):
            raise DecodeError(where, f"does not have {len(members)} parts")
        pairs = zip(members, document, strict=True)
        return tuple(_decoder(member)(item, (where, at)) for at, (member, item) in enumerate(pairs))

    return decoded


def _each(kind: object, member: object, collect: Callable[[list[object]], object]) -> _Decoder:
    def decoded(document: JSON, where: _Where) -> object:
        if not isinstance(document, list):
            raise _wrong(kind, document, where)
        one = _decoder(member)
        return collect([one(item, (where, at)) for at, item in enumerate(document)])

    return decoded


def _mapping(kind: object, key_kind: object, item_kind: object) -> _Decoder:
    def decoded(document: JSON, where: _Where) -> object:
        if not isinstance(document, dict):
            raise _wrong(kind, document, where)
        one = _decoder(item_kind)
        return {_key(key_kind, key, where): one(item, (where, f".{key[:40]}")) for key, item in document.items()}

    return decoded


def _key(kind: object, key: str, where: _Where) -> object:
    if kind is int:
        if not (key.isascii() and key.isdigit() and len(key) < 20):
            raise DecodeError(where, f"has the key {key[:40]!a}, which is not a number")
        return int(key)
    return _decoder(kind)(key, (None, f"a key of {_path(where)}"))


def _enum(kind: type[StrEnum]) -> _Decoder:
    members = {str(member.value): member for member in kind}

    def decoded(document: JSON, where: _Where) -> object:
        if not isinstance(document, str) or document not in members:
            raise _wrong(kind, document, where)
        return members[document]

    return decoded


def _dataclass(kind: type) -> _Decoder:
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = dataclasses.fields(kind)
    known = {field.name: (hints[field.name], f".{field.name}") for field in fields}
    required = [
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]

    def decoded(document: JSON, where: _Where) -> object:
        if not isinstance(document, dict):
            raise _wrong(kind, document, where)
        for key in document:
            if key not in known:
                raise DecodeError((where, f".{key[:40]}"), "is not known")
        for name in required:
            if name not in document:
                raise DecodeError((where, f".{name}"), "is missing")
        found = {}
        for name, item in document.items():
            member, step = known[name]
            found[name] = _decoder(member)(item, (where, step))
        return kind(**found)

    return decoded


@dataclasses.dataclass(frozen=True, slots=True)
class _Error:
    kind: str
    what: str
    why: str
    hint: str
    path: str = ""
    value: bool | int | float | str | None = None
    errno: int | None = None


def encode_error(error: KsmdError) -> JSON:
    """The document for an error, but not for ConfigError, which never leaves its process."""
    found = _Error(type(error).__name__, error.what, error.why, error.hint)
    if isinstance(error, HostError):
        value = error.value if isinstance(error.value, None | bool | int | float | str) else str(error.value)
        found = dataclasses.replace(found, path=error.path, value=value, errno=error.errno)
    return encode(found)


def decode_error(document: object) -> KsmdError:
    """The error of a document: of the same class, with the same fields.

    :raises ValueError: it is not the document of an error
    """
    found = decode(_Error, document, "an error")
    kind = _ERRORS.get(found.kind)
    if kind is None:
        raise ValueError(f"{_shown(found.kind)} is not a class of errors")
    if issubclass(kind, HostError):
        return kind(found.what, found.why, hint=found.hint, path=found.path, value=found.value, errno=found.errno)
    return kind(found.what, found.why, hint=found.hint)


def _once(pairs: list[tuple[str, JSON]]) -> dict[str, JSON]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a key is given twice")
    return document


def _no_constant(name: str) -> JSON:
    raise ValueError(f"{name} is not a number")


def _named(kind: object) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _named(arguments[0])
    if origin is types.UnionType or origin is typing.Union:
        return " | ".join("None" if member is types.NoneType else _named(member) for member in arguments)
    return kind.__name__ if isinstance(kind, type) else str(kind)


def _shown(document: object) -> str:
    try:
        text = ascii(document)
    except RecursionError:
        return "nested too deeply"
    return text if len(text) <= 60 else text[:57] + "..."
