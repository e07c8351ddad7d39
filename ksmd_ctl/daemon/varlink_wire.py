# SPDX-License-Identifier: GPL-2.0-or-later
"""Varlink messages: calls, replies, and the parameters of the methods and errors of io.ksmd-ctl.

The service and the client use the same dataclasses.

Source: https://varlink.org/Method-Call and https://varlink.org/Service. A message is a JSON object and a NUL.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TypeVar

from ksmd_ctl.codec import DecodeError, decode, encode, load
from ksmd_ctl.history.model import Kind

T = TypeVar("T")

INTERFACE = "io.ksmd-ctl"
SERVICE_NAME = "org.varlink.service"

# An error repeats at most this many characters of a client's own words.
_ECHO = 200


@dataclass(frozen=True, slots=True)
class NoParameters:
    """Of a method that takes none."""


@dataclass(frozen=True, slots=True)
class InterfaceParameters:
    interface: str


@dataclass(frozen=True, slots=True)
class AddressRange:
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class MigrateParameters:
    to: int
    pid: int | None = None
    unit: str | None = None
    ranges: tuple[AddressRange, ...] | None = None
    everything: bool | None = None
    dry_run: bool | None = None
    latency_seconds: float | None = None
    keep: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class PlanParameters:
    knobs: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class SetParameters:
    knobs: Mapping[str, object]
    wait_seconds: float | None = None
    force: bool | None = None


@dataclass(frozen=True, slots=True)
class SharingParameters:
    by: str | None = None
    budget_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class HistoryParameters:
    since_seconds: float | None = None
    until_seconds: float | None = None
    kinds: tuple[Kind, ...] | None = None
    limit: int | None = None
    follow: bool | None = None


@dataclass(frozen=True, slots=True)
class UnmergeParameters:
    pid: int | None = None
    unit: str | None = None
    to: int | None = None
    dry_run: bool | None = None
    keep: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class MergeParameters:
    on: bool
    pid: int | None = None
    unit: str | None = None
    vm: str | None = None
    ranges: tuple[AddressRange, ...] | None = None
    method: str | None = None
    dry_run: bool | None = None


@dataclass(frozen=True, slots=True)
class CollapseParameters:
    pid: int | None = None
    unit: str | None = None
    keep_pages: int | None = None
    dry_run: bool | None = None


@dataclass(frozen=True, slots=True)
class PermissionDenied:
    needs: str


@dataclass(frozen=True, slots=True)
class ConfigProblem:
    path: str
    key: str
    text: str


@dataclass(frozen=True, slots=True)
class ReloadFailed:
    problems: tuple[ConfigProblem, ...]


@dataclass(frozen=True, slots=True)
class TooManyClients:
    limit: int


@dataclass(frozen=True, slots=True)
class Failed:
    what: str
    why: str
    hint: str
    exit_code: int


#: The errors of io.ksmd-ctl.
OwnError = PermissionDenied | ReloadFailed | TooManyClients | Failed


class BadMessage(Exception):
    """A message is not a Varlink call, so it can't be answered."""


class CallError(Exception):
    """An error reply."""

    def __init__(self, name: str, **parameters: object) -> None:
        super().__init__(name)
        self.name = name
        self.parameters = parameters

    @classmethod
    def of(cls, error: OwnError) -> CallError:
        parameters = encode(error)
        assert isinstance(parameters, dict)
        return cls(f"{INTERFACE}.{type(error).__name__}", **parameters)

    @classmethod
    def invalid_parameter(cls, name: str) -> CallError:
        return cls(f"{SERVICE_NAME}.InvalidParameter", parameter=name[:_ECHO])

    @classmethod
    def no_interface(cls, name: str) -> CallError:
        return cls(f"{SERVICE_NAME}.InterfaceNotFound", interface=name[:_ECHO])

    @classmethod
    def no_method(cls, name: str) -> CallError:
        return cls(f"{SERVICE_NAME}.MethodNotFound", method=name[:_ECHO])


@dataclass(frozen=True, slots=True)
class Call:
    """A method call.

    :ivar interface: the method's name without its last part
    :ivar oneway: the client wants no reply
    :ivar more: the client takes several replies
    """

    interface: str
    method: str
    parameters: Mapping[str, object]
    oneway: bool = False
    more: bool = False

    @property
    def name(self) -> str:
        return f"{self.interface}.{self.method}"

    def take(self, kind: type[T]) -> T:
        """The parameters as a dataclass.

        :raises CallError: they are of another form
        """
        try:
            return decode(kind, self.parameters)
        except DecodeError as error:
            raise CallError.invalid_parameter(error.field) from error


@dataclass(frozen=True, slots=True)
class _Message:
    method: str
    parameters: Mapping[str, object] | None = None
    oneway: bool | None = None
    more: bool | None = None
    upgrade: bool | None = None


def parse_call(message: bytes | bytearray) -> Call:
    """The call in a message, without its NUL.

    :raises BadMessage: it is not one
    """
    try:
        document = load(bytes(message))
        if isinstance(document, dict):
            # Later versions of Varlink may have more keys than these.
            document = {field.name: document[field.name] for field in fields(_Message) if field.name in document}
        found = decode(_Message, document)
    except ValueError as error:
        raise BadMessage(f"not a call: {error}") from error
    interface, _, name = found.method.rpartition(".")
    if not interface:
        raise BadMessage("no method")
    if found.upgrade or (found.oneway and found.more):
        raise BadMessage("flags that can't be together, or upgrade")
    return Call(interface, name, found.parameters or {}, bool(found.oneway), bool(found.more))


def encode_reply(
    parameters: Mapping[str, object] | None = None, *, error: str | None = None, continues: bool = False
) -> bytes:
    """A reply with its NUL.

    :raises ValueError: a number in it is not finite
    """
    reply: dict[str, object] = {"parameters": parameters or {}}
    if error is not None:
        reply["error"] = error
    if continues:
        reply["continues"] = True
    return json.dumps(reply, separators=(",", ":"), allow_nan=False).encode() + b"\0"
