# SPDX-License-Identifier: GPL-2.0-or-later
"""Which contents of a recording were there for so short a time that ksmd has merged none of them. Pure.

A page that is written between any two looks is taken for one that is written all the time: each scan finds another
checksum, and so it is never merged. What a look found mapped more than once has been merged, whatever came later.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Final, NamedTuple

from ksmd_ctl.recording.reader import PageChange, Recording

# Written between so many looks in turn, and it is written all the time.
_TIMES: Final = 2

#: In place of such a content: it is another one at each scan, and equal to none.
REWRITTEN: Final = -1

#: A look, a process and a page.
Place = tuple[int, int, int]


class _State(NamedTuple):
    """A page as it was last seen to change.

    :ivar turn: which of the looks at its process that was
    :ivar row: what was found
    :ivar times: between how many looks in turn until then it was written
    :ivar first: its content before the first of these; None where that has been there for longer
    """

    turn: int
    row: PageChange
    times: int
    first: PageChange | None


def rewritten(recording: Recording) -> frozenset[Place]:
    """Contents of pages that are written all the time, by the look that found them."""
    whole = recording.facts.one_in == 1
    turns: dict[int, dict[int, int]] = {}
    pages: dict[int, list[int]] = {}
    for one in recording.process_looks():
        counted = pages.setdefault(one.process, [])
        turns.setdefault(one.process, {})[one.look] = len(counted)
        counted.append(one.pages)
    found: set[Place] = set()
    states: dict[tuple[int, int], _State] = {}
    for (look, process), group in groupby(recording.changes(), key=lambda row: (row.look, row.process)):
        rows = list(group)
        turn = turns.get(process, {}).get(look)
        if turn is None:
            # All of it is gone, or could not be looked at.
            for row in rows:
                states.pop((process, row.page), None)
            continue
        # In a sample a page that is written comes or goes, as one does that is new or is freed: the count tells.
        grown = abs(pages[process][turn] - pages[process][turn - 1]) if turn else pages[process][turn]
        steady = not whole and 2 * grown <= len(rows) * recording.facts.one_in
        for row in rows:
            state = _next(states.get((process, row.page)), row, turn, steady=steady)
            found.update(_found(states.get((process, row.page)), state))
            states[process, row.page] = state
    for (process, _), state in states.items():
        if state.times >= _TIMES and state.turn == len(pages[process]) - 1:
            found.update(_place(state.row))
    return frozenset(found)


def _next(before: _State | None, row: PageChange, turn: int, *, steady: bool) -> _State:
    if before is None or before.row.content is None:
        return _State(turn, row, int(steady), None)
    written = before.row.content != row.content and (row.content is not None or steady)
    if not written:
        return _State(turn, row, 0, None)
    if before.turn != turn - 1:
        return _State(turn, row, 1, None)
    return _State(turn, row, before.times + 1, before.first if before.times else before.row)


def _found(before: _State | None, state: _State) -> Iterator[Place]:
    if before is not None and state.times >= _TIMES:
        yield from _place(before.row)
        if state.times == _TIMES and state.first is not None:
            yield from _place(state.first)


def _place(row: PageChange) -> Iterator[Place]:
    if row.content is not None and not row.frame:
        yield row.look, row.process, row.page
