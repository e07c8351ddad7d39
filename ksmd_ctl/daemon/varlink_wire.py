# SPDX-License-Identifier: GPL-2.0-or-later
"""Varlink's messages: a call out of bytes, a reply into bytes, and the errors every service has.

Source: https://varlink.org/Method-Call and https://varlink.org/Service. A message is a JSON object and a NUL.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

__all__ = ["SERVICE_DESCRIPTION", "SERVICE_NAME", "BadMessage", "Call", "CallError", "encode_reply", "parse_call"]

SERVICE_NAME = "org.varlink.service"

SERVICE_DESCRIPTION = """\
# The Varlink Service Interface is provided by every varlink service. It
# describes the service and the interfaces it implements.
interface org.varlink.service

# Get a list of all the interfaces a service provides and information
# about the implementation.
method GetInfo() -> (
  vendor: string,
  product: string,
  version: string,
  url: string,
  interfaces: []string
)

# Get the description of an interface that is implemented by this service.
method GetInterfaceDescription(interface: string) -> (description: string)

# The requested interface was not found.
error InterfaceNotFound (interface: string)

# The requested method was not found
error MethodNotFound (method: string)

# The interface defines the requested method, but the service does not
# implement it.
error MethodNotImplemented (method: string)

# One of the passed parameters is invalid.
error InvalidParameter (parameter: string)

# Client is denied access
error PermissionDenied ()

# Method is expected to be called with 'more' set to true, but wasn't
error ExpectedMore ()
"""

# How much of a client's own words an error gives back.
_ECHO = 200


class BadMessage(Exception):
    """What came is not a Varlink call; nothing can be answered, as nobody knows what was asked."""


class CallError(Exception):
    """An error reply."""

    def __init__(self, name: str, **parameters: object) -> None:
        super().__init__(name)
        self.name = name
        self.parameters = parameters

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

    :ivar interface: all of the method's name but its last part
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


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    # Of two equal keys Python takes the last and others take the first: a call must not depend on who reads it.
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice")
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def parse_call(message: bytes | bytearray) -> Call:
    """The call in a message, without its NUL.

    :raises BadMessage: it is not one
    """
    try:
        found = json.loads(message.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        # ValueError is also invalid UTF-8 and a number of more than 4,300 digits.
        raise BadMessage(f"not JSON: {type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        raise BadMessage("not a JSON object")
    method = found.get("method")
    parameters = found.get("parameters")
    flags = [found.get(name) for name in ("oneway", "more", "upgrade")]
    if not isinstance(method, str) or not method.rpartition(".")[0]:
        raise BadMessage("no method")
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, dict):
        raise BadMessage("parameters are not an object")
    if not all(flag is None or isinstance(flag, bool) for flag in flags):
        raise BadMessage("a flag is neither true nor false")
    oneway, more, upgrade = map(bool, flags)
    if upgrade or (oneway and more):
        raise BadMessage("flags that can't be together, or upgrade")
    interface, _, name = method.rpartition(".")
    return Call(interface, name, parameters, oneway, more)


def encode_reply(
    parameters: Mapping[str, object] | None = None, *, error: str | None = None, continues: bool = False
) -> bytes:
    """A reply as it goes over the wire, with its NUL.

    :raises ValueError: a number in it is not finite, which JSON has no word for
    """
    reply: dict[str, object] = {"parameters": parameters or {}}
    if error is not None:
        reply["error"] = error
    if continues:
        reply["continues"] = True
    return json.dumps(reply, separators=(",", ":"), allow_nan=False).encode() + b"\0"
