# SPDX-License-Identifier: GPL-2.0-or-later
"""What the values of settings look like in a configuration file: each type parses a value, and says what it takes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from ksmd_ctl.tomltext import shown

_HOST_NAME = re.compile(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63}){0,127}")

# sun_path of struct sockaddr_un takes 107 bytes and a NUL (unix(7)).
_SOCKET_PATH_BYTES = 107


@dataclass(frozen=True, slots=True)
class Type:
    """A type of value.

    :ivar parse: gives the checked value; raises ValueError, whose text says what is taken
    :ivar lines: what is taken, for the sample configuration and the manual page
    """

    parse: Callable[[object], object]
    lines: tuple[str, ...]


def choice(meanings: Mapping[StrEnum, str]) -> Type:
    """A member of an enumeration."""

    def parse(value: object) -> StrEnum:
        for member in meanings:
            if value == member.value:
                return member
        raise ValueError(f"{shown(value)} is not one of {', '.join(meanings)}")

    width = max(map(len, meanings)) + 2
    return Type(parse, tuple(f"  {chr(34) + member + chr(34):{width}}  {text}" for member, text in meanings.items()))


def seconds(minimum: float, maximum: float) -> Type:
    """A length of time."""
    return _number(minimum, maximum, "a number of seconds", " seconds", "seconds")


def share(minimum: float, maximum: float = 1) -> Type:
    """A part of a whole."""
    return _number(minimum, maximum, "a number", "", "a share")


def count(minimum: int, maximum: int, unit: str) -> Type:
    """A whole number of something."""
    return _number(minimum, maximum, f"a whole number of {unit}", f" {unit}", unit, whole=True)


def _number(minimum: float, maximum: float, what: str, unit: str, line: str, *, whole: bool = False) -> Type:
    def parse(value: object) -> int | float:
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise ValueError(f"{shown(value)} is not {what}")
        # Written so that nan fails it.
        if not minimum <= value <= maximum:
            raise ValueError(f"{value} is not between {minimum} and {maximum}{unit}")
        return value if whole else float(value)

    return Type(parse, (f"  {line}, {minimum} to {maximum}",))


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{shown(value)} is not true or false")
    return value


def _host_names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{shown(value)} is not a list of host names")
    for name in value:
        if not isinstance(name, str) or not _HOST_NAME.fullmatch(name):
            raise ValueError(f"{shown(name)} is not a host name (without a port)")
    return tuple(name.lower() for name in value)


def _path(value: object) -> str:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise ValueError(f"{shown(value)} is not an absolute path")
    return value


def _socket_path(value: object) -> str:
    path = _path(value)
    if len(path.encode()) > _SOCKET_PATH_BYTES:
        raise ValueError(f"{shown(value)} is too long for a socket: at most {_SOCKET_PATH_BYTES} bytes")
    return path


def _group(value: object) -> str:
    if not isinstance(value, str) or any(letter.isspace() or letter in ":,\0" for letter in value):
        raise ValueError(f"{shown(value)} is not the name of a group")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{shown(value)} is not a text")
    return value


def _address(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{shown(value)} is not a text of the form ADDRESS:PORT")
    if value:
        parse_address(value)
    return value


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of ``ADDRESS:PORT``; an IPv6 address stands in brackets.

    :raises ValueError: the text is not of that form
    """
    host, separator, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not separator or not host or not (port.isascii() and port.isdigit()) or (":" in host and not bracketed):
        raise ValueError(f"{text!r} is not ADDRESS:PORT (an IPv6 address stands in brackets)")
    if len(port) > 5 or int(port) > 65535:
        raise ValueError(f"{port[:40]} is not a port: at most 65535")
    return (host[1:-1] if bracketed else host), int(port)


FLAG = Type(_flag, ("  true or false",))
ADDRESS = Type(_address, ('  "ADDRESS:PORT", "[IPV6]:PORT", or "" for none',))
HOST_NAMES = Type(_host_names, ('  a list of host names, as in ["host.example"]',))
PATH = Type(_path, ("  an absolute path",))
SOCKET_PATH = Type(_socket_path, (f"  an absolute path, at most {_SOCKET_PATH_BYTES} bytes",))
TEXT = Type(_text, ("  a text",))
GROUP = Type(_group, ('  the name of a group, or "" for none',))
