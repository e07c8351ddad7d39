# SPDX-License-Identifier: GPL-2.0-or-later
"""The types of values in a scenario file: how each is read, and how it is written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

from ksmd_ctl.figures import ranges_text

#: The label of a page that is all zeroes, and that of one that nobody has touched.
ZERO = "0"
UNTOUCHED = "-"

#: More than any test needs; a typing error must not eat all memory.
MAX_PAGES = 1 << 16
MAX_NODES = 64

NAME_PATTERN = r"[A-Za-z0-9_-]{1,32}"
_SPAN = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")
# More equal labels in a row than this are written as one entry with a count.
_MOST_LABELS = 16
_MOST_LABEL_BYTES = 255


def text(value: str) -> str:
    """A string in TOML."""
    # A JSON string is a TOML basic string, but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def plain(value: object) -> str:
    """A string, a number or a boolean in TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int) else text(str(value))


def inline_table(values: Mapping[str, str]) -> str:
    """A table on one line, from values that are TOML already."""
    return "{ " + ", ".join(f"{_key(key)} = {value}" for key, value in values.items()) + " }"


def _key(key: str) -> str:
    bare = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if bare else text(key)


def whole(value: object, least: int, most: int) -> bool:
    """Whether a value is a whole number in a range."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


@dataclass(frozen=True, slots=True)
class Type:
    """What a value in a file has to be.

    :ivar what: the same in words
    :ivar read: the value of what the file has; raises ValueError with what is wrong
    :ivar write: the TOML of a value
    """

    what: str
    read: Callable[[object], Any]
    write: Callable[[Any], str] = plain


def _type(what: str, good: Callable[[Any], bool]) -> Type:
    def read(given: object) -> object:
        if not good(given):
            raise ValueError(f"{given!r} is not {what}")
        return given

    return Type(what, read)


def _number(what: str, least: int, most: int) -> Type:
    return _type(what, lambda given: whole(given, least, most))


def _string(what: str, good: Callable[[str], object]) -> Type:
    return _type(what, lambda given: isinstance(given, str) and bool(good(given)))


COUNT: Final = _number("a whole number from 1 on", 1, 2**32 - 1)
MILLISECONDS: Final = _number("a whole number of milliseconds, 1 to 60000", 1, 60_000)
NODE: Final = _number("the index of a node, from 0 on", 0, MAX_NODES - 1)
NODES: Final = _number(f"a number of nodes, 1 to {MAX_NODES}", 1, MAX_NODES)
NAME: Final = _string("a name: letters, digits, _ and -", re.compile(NAME_PATTERN).fullmatch)
TEXT: Final = _string("text that is not empty", str.strip)
ANY_TEXT: Final = _string("text", lambda given: True)
FLAG: Final = _type("true or false", lambda given: isinstance(given, bool))
TRUE: Final = _type("true", lambda given: given is True)
LABEL: Final = _string(
    f"a label: text without NUL, not empty and not -, of at most {_MOST_LABEL_BYTES} bytes",
    lambda given: given not in ("", UNTOUCHED) and "\0" not in given and len(given.encode()) <= _MOST_LABEL_BYTES,
)


# -- pages ---------------------------------------------------------------------------------------------------------


def parse_pages(given: object) -> tuple[int, ...]:
    """Pages out of "3" or "0-2,5", ascending.

    :raises ValueError: it doesn't look like that
    """
    found: set[int] = set()
    for part in given.split(",") if isinstance(given, str) else [""]:
        match = _SPAN.fullmatch(part.strip())
        if not match:
            raise ValueError(f"{str(given)[:40]!r} is not {PAGES.what}")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < MAX_PAGES:
            raise ValueError(f"{part.strip()} is not an ascending range of pages below {MAX_PAGES}")
        found.update(range(first, last + 1))
    return tuple(sorted(found))


PAGES: Final = Type('pages as in "3" or "0-2,5"', parse_pages, lambda pages: text(ranges_text(pages)))


def _read_node_set(given: object) -> tuple[int, ...]:
    try:
        found = parse_pages(given)
    except ValueError:
        found = (MAX_NODES,)
    if found[-1] >= MAX_NODES:
        raise ValueError(f"{str(given)[:40]!r} is not {NODE_SET.what}")
    return found


#: Written as pages are.
NODE_SET: Final = Type(f'nodes below {MAX_NODES}, as in "0" or "0-2,5"', _read_node_set, PAGES.write)

_ONE_PAGE: Final = _number("the number of a page, from 0 on", 0, MAX_PAGES - 1)
#: One page where others may stand, too.
PAGE: Final = Type(_ONE_PAGE.what, lambda given: (_ONE_PAGE.read(given),))


def _read_labels(given: object) -> tuple[str, ...]:
    if not isinstance(given, list) or not given:
        raise ValueError(f"has to be {LABELS.what}")
    found: list[str] = []
    for entry in given:
        found += _read_repeat(entry) if isinstance(entry, dict) else [_read_label(entry)]
        if len(found) > MAX_PAGES:
            raise ValueError(f"{len(found)} pages, more than {MAX_PAGES}")
    return tuple(found)


def _read_label(given: object) -> str:
    return UNTOUCHED if given == UNTOUCHED else str(LABEL.read(given))


def _read_repeat(entry: Mapping[str, object]) -> list[str]:
    for key in entry.keys() - {"label", "count", "numbered"}:
        raise ValueError(f"{key} is unknown")
    count = entry.get("count")
    if not isinstance(count, int) or not whole(count, 1, MAX_PAGES):
        raise ValueError(f"count: {count!r} is not a number from 1 to {MAX_PAGES}")
    if FLAG.read(entry.get("numbered", False)):
        label = LABEL.read(entry.get("label"))
        return [f"{label}{number}" for number in range(count)]
    return [_read_label(entry.get("label"))] * count


def _labels_text(labels: tuple[str, ...]) -> str:
    entries: list[str] = []
    for label, same in groupby(labels):
        count = len(list(same))
        if count > _MOST_LABELS:
            entries.append(inline_table({"label": text(label), "count": str(count)}))
        else:
            entries += [text(label)] * count
    return f"[{', '.join(entries)}]"


LABELS: Final = Type("a list of labels, one a page, at least one", _read_labels, _labels_text)


# -- what is expected ----------------------------------------------------------------------------------------------


def _strings(given: object) -> tuple[str, ...]:
    if not isinstance(given, list) or not all(isinstance(name, str) and name for name in given):
        raise ValueError(f"{given!r} is not a list of names")
    return tuple(given)


def _read_names(given: object) -> tuple[str, ...]:
    found = tuple(map(NAME.read, _strings(given)))
    if len(set(found)) < max(1, len(found)):
        raise ValueError(f"{given!r} is not {NAMES.what}")
    return found


def _names_text(names: tuple[str, ...]) -> str:
    return f"[{', '.join(map(text, names))}]"


NAMES: Final = Type("a list of names, at least one and each once", _read_names, _names_text)


def _read_profiles(given: object) -> tuple[str, ...]:
    return _strings([given] if isinstance(given, str) else given)


def _profiles_text(names: tuple[str, ...]) -> str:
    return text(names[0]) if len(names) == 1 else _names_text(names)


def _read_groups(given: object) -> tuple[tuple[str, ...], ...]:
    if not isinstance(given, list) or not all(given):
        raise ValueError(f"has to be {GROUPS.what}")
    return tuple(map(_strings, given))


def _groups_text(groups: tuple[tuple[str, ...], ...]) -> str:
    return "[" + ", ".join(f"[{', '.join(map(text, group))}]" for group in groups) + "]"


def _read_places(given: object) -> dict[str, int]:
    if not isinstance(given, dict):
        raise ValueError(f"has to be {PLACES.what}")
    return {page: NODE.read(node) for page, node in given.items()}


PROFILES: Final = Type("a profile's name, or a list of them", _read_profiles, _profiles_text)
GROUPS: Final = Type("a list of lists of pages", _read_groups, _groups_text)
PLACES: Final = Type(
    "a table of pages and nodes",
    _read_places,
    lambda places: inline_table({page: str(node) for page, node in places.items()}),
)
