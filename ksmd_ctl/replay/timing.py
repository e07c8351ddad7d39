# SPDX-License-Identifier: GPL-2.0-or-later
"""When pages of a recording changed, as far as looks tell. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from ksmd_ctl.errors import Unparsable
from ksmd_ctl.recording.reader import PageChange, Recording

# What may have happened at any time between two looks is spread over that time in so many parts.
_PARTS: Final = 8

#: Changes of pages by the process.
Changes = Mapping[int, Sequence[PageChange]]


class PageHistory(NamedTuple):
    """The pages of a recording.

    :ivar places: by process: of each page that is ever in the sample, which of them it is by its address
    :ivar changes: by time
    """

    places: Mapping[int, Mapping[int, int]]
    changes: Mapping[float, Changes]


def read_pages(recording: Recording) -> PageHistory:
    """The pages of a recording.

    :raises Unparsable: it is damaged
    """
    began = {one.process: one.began for one in recording.processes()}
    looks = {one.look: one for one in recording.looks()}
    seen: dict[tuple[int, int], tuple[float, float]] = {}
    last: dict[int, float] = {}
    for one in recording.process_looks():
        before = looks.get(one.look - 1)
        since = last.get(one.process, max(0.0, began.get(one.process, 0.0), before.began if before else 0.0))
        first = before is None and began.get(one.process, 0.0) <= 0
        seen[one.look, one.process] = (0.0, 0.0) if first else (min(since, one.seconds), one.seconds)
        last[one.process] = one.seconds
    pages: dict[int, set[int]] = {}
    changes: dict[float, dict[int, list[PageChange]]] = {}
    for row in recording.changes():
        if row.process not in began or row.look not in looks or row.page < 0:
            why = f"it is damaged: there is no process {row.process} or look {row.look}"
            raise Unparsable("reading the recording", why, hint="copy it again from where it was recorded")
        pages.setdefault(row.process, set()).add(row.page)
        since, until = seen.get((row.look, row.process), (looks[row.look].ended,) * 2)
        part = (row.page * 0x9E3779B1 >> 12) % _PARTS + 1
        changes.setdefault(since + (until - since) * part / _PARTS, {}).setdefault(row.process, []).append(row)
    places = {number: {page: place for place, page in enumerate(sorted(found))} for number, found in pages.items()}
    return PageHistory(places, changes)
