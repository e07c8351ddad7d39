# SPDX-License-Identifier: GPL-2.0-or-later
"""TOML as people write it, read within limits: whatever stands in a file, what comes is a document or a reason."""

from __future__ import annotations

import datetime
from typing import Any, Final

# More than anybody needs, and few enough that everything that walks through a document by recursion can.
_MAX_DEPTH: Final = 32
# TOML's integers have 64 bits, and some knobs are unsigned (unsigned long).
_LEAST, _MOST = -(1 << 63), (1 << 64) - 1


def parse(data: bytes) -> dict[str, Any]:
    """The document in a text.

    :raises ValueError: it is none; the text says why, as in "is not TOML: ..."
    """
    # Only here: who has a configuration without a file, as `status` does, needs no parser.
    import tomllib

    try:
        document = tomllib.loads(data.decode())
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError as error:
        # Also invalid UTF-8, and a number of more digits than Python reads.
        raise ValueError(f"is not TOML: {error}") from error
    left: list[tuple[object, int]] = [(document, 0)]
    while left:
        part, depth = left.pop()
        if depth > _MAX_DEPTH:
            raise ValueError("is nested too deeply")
        if isinstance(part, dict):
            left += [(inner, depth + 1) for inner in part.values()]
        elif isinstance(part, list):
            left += [(inner, depth + 1) for inner in part]
        elif isinstance(part, int) and not _LEAST <= part <= _MOST:
            raise ValueError("is not TOML: an integer has more than 64 bits")
    return document


def shown(value: object) -> str:
    """A value as a file has it, for people who look for it there."""
    match value:
        case bool():
            return "true" if value else "false"
        case list():
            return f"[{', '.join(map(shown, value))}]"
        case dict():
            return f"{{ {', '.join(f'{key} = {shown(inner)}' for key, inner in value.items())} }}" if value else "{}"
        case datetime.date() | datetime.time():
            return value.isoformat()
        case _:
            return repr(value)
