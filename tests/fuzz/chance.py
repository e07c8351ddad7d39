# SPDX-License-Identifier: GPL-2.0-or-later
"""Made-up input by the hundred thousand: each item follows from a seed and its number alone, and has a deadline.

hypothesis is for properties; a million of its examples would take a day.
"""

from __future__ import annotations

import datetime
import json
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

from ksmd_ctl.errors import ConfigError

#: An item takes milliseconds. On a busy machine it may take longer, but not for ever.
DEADLINE_SECONDS = 30.0

# Every byte that some reader of text treats in a way of its own.
_BYTES = b'\0\t\n\r "\\#=[]{},.:-+_eE0179aZ\x7f\x80\xbf\xc0\xed\xa0\xef\xbb\xf0\xf4\xff'
_WORDS = (
    "x 0 1 -1 1_0 +1 0x10 1e3 ٣ é true null - any EBUSY errorcode / /a a/b /../.. %s%n {0} <b> p.a.0 0-1 1-0 0,0 "
    "127.0.0.1:1 [::1]:0 ::1 : h:99999 root a:b 0-99999 run policy fixed observe restore scan-time"
)
_TEXTS = (
    *("", " ", "\0", "/a\0b", "\u2028", "\ufeff", "\x1b[2J", "\r\n", "\U0001d7d9", "x" * 300, "x" * 5000),
    *_WORDS.split(" "),
)
_NUMBERS: tuple[int | float, ...] = (
    *(0, 1, 2, 3, 7, 100, 255, 256, 257, 4096, 65535, 65536, -1, -2, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**50),
    *(2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400, 0.0, -0.0, 0.1, 0.5, 1.5, 1e-9, 1e9, 1e308),
    *(math.inf, -math.inf, math.nan),
)
_MOMENTS = (datetime.date(1999, 2, 28), datetime.time(23, 59, 59), datetime.datetime(2026, 1, 1))


class Raw(str):
    """What stands in the text as it is, whatever it means there."""

    __slots__ = ()


RAW = tuple(
    map(
        Raw,
        (
            *("9" * 5000, "-" + "9" * 5000, "1." + "0" * 5000, "0x" + "f" * 5000, "0b" + "1" * 300, "01", "1e999"),
            *("[" * depth + "]" * depth for depth in (20, 40, 300, 450, 800, 950)),
            *("[" * 5000, '{"a":' * 3000, "{a" + ".a" * 2000 + " = 1}", "NaN", "-Infinity", "", "'''", '"""'),
            *(
                '"\\ud800"',
                '"\\udc00\\ud800"',
                '"' + "\\u0000" * 20 + '"',
                "{value = 1, optional = true}",
                "2000-99-99",
            ),
        ),
    )
)


class Late(BaseException):
    """An item has not come to an end."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Within, no more than so long."""

    def ring(_number: int, _frame: object) -> None:
        raise Late(f"no end after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def every(count: int, seed: int, item: Callable[[Random], None]) -> None:
    """So many items of a seed. Of one that fails the number is said: ``item(Random(f"{seed}/{number}"))`` is it."""
    for number in range(count):
        try:
            with deadline(DEADLINE_SECONDS):
                item(Random(f"{seed}/{number}"))
        except (Exception, Late) as error:
            raise AssertionError(f"item {number} of seed {seed}: {type(error).__name__}: {error}") from error


def well_said(error: ConfigError) -> None:
    """See that what is wrong can be printed and read, and is somewhere."""
    assert error.problems
    assert all(problem.path and problem.text for problem in error.problems)
    text = str(error).encode()
    assert len(text) < 1000 * (1 + len(error.problems)), f"{len(text)} bytes for {len(error.problems)} problems"


def value(chance: Random, depth: int = 0) -> Any:
    """A value of any type; of a few it is known that somebody has trouble with them."""
    kind = chance.randrange(12 if depth < 3 else 8)
    if kind < 3:
        return chance.choice(_NUMBERS)
    if kind < 6:
        return chance.choice(_TEXTS)
    if kind == 6:
        return chance.choice((True, False))
    if kind == 7:
        return chance.choice(RAW) if chance.random() < 0.5 else chance.choice(_MOMENTS)
    if kind < 10:
        return [value(chance, depth + 1) for _ in range(chance.randrange(4))]
    return {chance.choice(_TEXTS): value(chance, depth + 1) for _ in range(chance.randrange(4))}


def mutated(chance: Random, document: Any) -> Any:
    """A document with one thing in it changed: replaced, left out, doubled or called something else."""
    places: list[tuple[Any, Any]] = []

    def walk(part: Any) -> None:
        items = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
        for key, inner in items:
            places.append((part, key))
            walk(inner)

    # A copy, whatever is in it.
    document = _copy(document)
    walk(document)
    if not places:
        return value(chance)
    part, key = chance.choice(places)
    there = part[key]
    match chance.randrange(7):
        case 0:
            del part[key]
        case 1 if isinstance(part, list):
            part.insert(key, _copy(part[chance.randrange(len(part))]))
        case 1:
            part[chance.choice(_TEXTS)] = part.pop(key)
        case 2 if isinstance(part, list):
            chance.shuffle(part)
        case 3 | 4 if type(there) is int:
            part[key] = max(0, there + chance.choice((-1, 1, 2)))
        case 2 | 3 | 4:
            # Something else out of the same document: of the right type as often as not.
            other, at = chance.choice(places)
            part[key] = _copy(other[at])
        case _:
            part[key] = value(chance)
    return document


def _copy(part: Any) -> Any:
    if isinstance(part, dict):
        return {key: _copy(inner) for key, inner in part.items()}
    return [_copy(inner) for inner in part] if isinstance(part, list) else part


def noise(chance: Random, data: bytes) -> bytes:
    """Bytes with a few of them changed, lost, doubled or made up."""
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + chance.choice((1, 1, 2, 8, 100)))
        match chance.randrange(6):
            case 0:
                data = data[:at] + data[end:]
            case 1:
                data = data[:at] + bytes((chance.choice(_BYTES),)) + data[end:]
            case 2:
                data = data[:at] + bytes(chance.choices(_BYTES, k=chance.randrange(1, 9))) + data[at:]
            case 3:
                data = data[:end] + data[at:]
            case 4:
                data = data[:at]
            case 5:
                data = data[:at] + chance.randbytes(chance.randrange(1, 20)) + data[at:]
    return data


def to_json(document: Any) -> bytes:
    """A document as JSON, or as what is nearly so."""
    if isinstance(document, Raw):
        return document.encode()
    if isinstance(document, dict):
        inner = b",".join(_json_text(key) + b":" + to_json(item) for key, item in document.items())
        return b"{" + inner + b"}"
    if isinstance(document, list):
        return b"[" + b",".join(map(to_json, document)) + b"]"
    if isinstance(document, datetime.date | datetime.time):
        return b'"%s"' % document.isoformat().encode()
    return _json_text(document)


def _json_text(part: Any) -> bytes:
    return json.dumps(part, ensure_ascii=False).encode()


def to_toml(document: dict[str, Any]) -> str:
    """A document as TOML, all of it on the lines of its top-level keys, or as what is nearly so."""
    return "".join(f"{_toml_key(key)} = {_toml(item)}\n" for key, item in document.items())


def _toml(part: Any) -> str:
    if isinstance(part, Raw):
        return str(part)
    if isinstance(part, bool):
        return "true" if part else "false"
    if isinstance(part, str):
        return '"' + "".join(map(_toml_letter, part)) + '"'
    if isinstance(part, int):
        return str(part) if abs(part) < 10**1000 else hex(part)
    if isinstance(part, float):
        return repr(part) if math.isfinite(part) else "nan" if math.isnan(part) else "inf" if part > 0 else "-inf"
    if isinstance(part, list):
        return f"[{', '.join(map(_toml, part))}]"
    if isinstance(part, dict):
        return "{" + ", ".join(f"{_toml_key(key)} = {_toml(item)}" for key, item in part.items()) + "}"
    return str(part.isoformat())


def _toml_letter(letter: str) -> str:
    return letter if letter.isprintable() and letter not in '"\\' else f"\\U{ord(letter):08x}"


def _toml_key(key: str) -> str:
    plain = key and key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if plain else _toml(key)
