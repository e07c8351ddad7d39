# SPDX-License-Identifier: GPL-2.0-or-later
"""The document of the history (docs/json.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ksmd_ctl.codec import encode_fields
from ksmd_ctl.history.model import Entry

FORMAT: Final = 1
# A client takes an answer of 4 MiB; in JSON a character may be six, but few are.
_MOST_CHARACTERS: Final = 1 << 20


def history_document(entries: Sequence[Entry], limit: int) -> dict[str, object]:
    """The latest events, oldest first, and whether there may be more that match.

    :param entries: those that match, oldest first
    :param limit: how many were asked for
    """
    kept: list[dict[str, object]] = []
    room = _MOST_CHARACTERS
    for entry in reversed(entries[-limit:] if limit else ()):
        room -= 250 + len(entry.text) + len(entry.who) + sum(len(key) + len(entry.fields[key]) for key in entry.fields)
        if room < 0:
            break
        kept.append({**encode_fields(entry)})
    return {"format": FORMAT, "events": kept[::-1], "more": len(entries) >= limit or len(kept) < len(entries)}
