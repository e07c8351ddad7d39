# SPDX-License-Identifier: GPL-2.0-or-later
"""Which request of the broker may begin, and what processes that nothing can end do to the others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from ksmd_ctl.errors import Busy, Denied
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.privileged.broker import Broker, Limits, Slots, need_leave
from ksmd_ctl.privileged.requests import Context, ListProcesses, Request, TakeInventory, WriteKnob

LOOK = TakeInventory(0)
STOP, MERGE = WriteKnob(Knob.RUN, 0), WriteKnob(Knob.RUN, 1)
WRITES = "process 7 writes run = 0 once ksmd lets it"


def test_what_cannot_be_ended_gives_its_slot_back() -> None:
    slots = Slots(Limits(children=1, left_behind=2))
    for pidfd in (7, 8):
        slots.begin(LOOK, 0)
        with pytest.raises(Busy, match="too many"):
            slots.begin(LOOK, 0)
        slots.leave(LOOK, pidfd, "process 7 can't be ended")
    assert slots.left.keys() == {7, 8}
    with pytest.raises(Busy, match="can't be ended"):
        slots.begin(LOOK, 0)
    slots.begin(STOP, 0)
    del slots.left[7]
    slots.begin(LOOK, 0)


def test_one_write_of_a_knob_may_be_outstanding() -> None:
    slots = Slots(Limits(children=1, left_behind=1))
    slots.begin(STOP, 0)
    assert not slots.is_turn(MERGE)
    slots.leave(STOP, 7, WRITES)
    # Who has waited is refused as well.
    assert slots.is_turn(MERGE)
    for _ in range(20):
        with pytest.raises(Busy, match=f"an earlier write has not ended: {WRITES}"):
            slots.begin(MERGE, 0)
    assert slots.left.keys() == {7}
    # Other knobs, and those who look, know nothing of it.
    slots.begin(WriteKnob(Knob.MERGE_ACROSS_NODES, 1), 0)
    slots.begin(LOOK, 0)
    del slots.left[7]
    slots.begin(MERGE, 0)


def test_the_next_one_begins_when_the_first_has_ended() -> None:
    slots = Slots(Limits(children=0, left_behind=0))
    assert slots.is_turn(STOP)
    slots.begin(STOP, 0)
    assert not slots.is_turn(MERGE)
    slots.end(STOP)
    assert slots.is_turn(MERGE)
    slots.begin(MERGE, 0)
    assert not slots.is_turn(STOP)


@dataclass(frozen=True, slots=True)
class _RootsOwn(Request[None]):
    name: ClassVar[str] = "switch_merging"
    dry_run: bool = False

    def run(self, context: Context) -> None: ...


@pytest.mark.parametrize(
    ("uid", "allowed", "dry_run", "served"),
    [(0, False, False, True), (7, False, False, False), (7, True, False, True), (7, False, True, True)],
)
def test_what_only_root_may_ask_for(uid: int, allowed: bool, dry_run: bool, served: bool) -> None:
    asked: list[str] = []

    def leave(name: str) -> bool:
        asked.append(name)
        return allowed

    request = _RootsOwn(dry_run)
    if served:
        need_leave(request, uid, leave)
    else:
        with pytest.raises(Denied, match="does not allow it to uid 7"):
            need_leave(request, uid, leave)
    assert asked == ([] if uid == 0 or dry_run else ["switch_merging"])
    # Everything else is everybody's.
    need_leave(ListProcesses(), uid, leave)


def test_a_broker_allows_it_to_nobody_by_itself() -> None:
    assert not Broker(Path("/")).allowed("switch_merging")
