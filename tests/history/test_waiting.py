# SPDX-License-Identifier: GPL-2.0-or-later
"""What waits to be written: what was written waits no more, and what is pushed out meanwhile harms nothing."""

from __future__ import annotations

from collections import Counter

from ksmd_ctl.history.model import Entry, Kind, Means, Severity
from ksmd_ctl.history.waiting import MOST, Waiting


def entry(number: int, kind: Kind = Kind.FOREIGN) -> Entry:
    return Entry(float(number), kind, "drift", Severity.INFO, f"event {number}")


def test_what_was_written_waits_no_more() -> None:
    waiting = Waiting()
    for number in range(100):
        waiting.add(entry(number))
        waiting.means.append(Means(number, 1))
    batches = waiting.batches()
    assert [(len(entries), len(means)) for entries, means in batches] == [(32, 32)] * 3 + [(4, 4)]
    waiting.take_off()
    assert len(waiting.entries) == 100
    waiting.written(batches[0])
    waiting.take_off()
    assert ([one.time_seconds for one in waiting.entries], len(waiting.means)) == ([*range(32, 100)], 68)
    for batch in batches[1:]:
        waiting.written(batch)
    waiting.add(entry(100))
    waiting.take_off()
    assert (list(waiting.entries), len(waiting.means)) == ([entry(100)], 0)
    waiting.clear()
    assert not waiting.entries


def test_what_is_pushed_out_while_a_thread_writes_is_no_harm() -> None:
    waiting = Waiting()
    for number in range(MOST):
        waiting.add(entry(number, Kind.POLICY if number % 2 else Kind.FOREIGN))
    batches = waiting.batches()
    for number in range(10):
        waiting.add(entry(1000 + number))
    for batch in batches:
        waiting.written(batch)
    waiting.take_off()
    assert [one.time_seconds for one in waiting.entries] == [1000 + number for number in range(10)]


def test_decisions_go_first_and_then_the_kind_with_most() -> None:
    waiting = Waiting()
    for kind in (Kind.SERVICE, Kind.TRANSACTION, Kind.POLICY):
        for number in range(MOST // 2):
            waiting.add(entry(number, kind))
    assert Counter(one.kind for one in waiting.entries) == {Kind.SERVICE: 249, Kind.TRANSACTION: 250, Kind.POLICY: 1}
    for number in range(2 * MOST):
        waiting.add(entry(number))
    kinds = Counter(one.kind for one in waiting.entries)
    assert len(waiting.entries) == MOST
    assert max(kinds.values()) - min(kinds.values()) <= 2
