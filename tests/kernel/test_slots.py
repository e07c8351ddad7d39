# SPDX-License-Identifier: GPL-2.0-or-later
"""Which request of the broker may begin, and what processes that nothing can end do to the others."""

from __future__ import annotations

import pytest

from ksmd_ctl.errors import Busy
from ksmd_ctl.kernel.requests import TakeInventory, WriteKnob
from ksmd_ctl.kernel.slots import Slots
from ksmd_ctl.knobs import Knob

LOOK = TakeInventory(0)
STOP, MERGE = WriteKnob(Knob.RUN, 0), WriteKnob(Knob.RUN, 1)


class Asker:
    """Notes whether it may begin, or what it is refused with."""

    def __init__(self) -> None:
        self.began = 0
        self.refused = ""

    def begin(self) -> None:
        self.began += 1

    def refuse(self, where: str) -> None:
        self.refused = where

    def enter(self, slots: Slots, request: TakeInventory | WriteKnob) -> bool:
        return slots.enter(request, 0, self.begin, self.refuse)


def test_what_cannot_be_ended_gives_its_slot_back() -> None:
    slots = Slots(most=1, most_left=2)
    for _ in range(2):
        assert Asker().enter(slots, LOOK)
        with pytest.raises(Busy, match="too many"):
            Asker().enter(slots, LOOK)
        slots.leave_behind(LOOK, "process 7 can't be ended")
    assert slots.left_behind == 2
    with pytest.raises(Busy, match="can't be ended"):
        Asker().enter(slots, LOOK)
    assert Asker().enter(slots, STOP)
    slots.ended(LOOK)
    assert Asker().enter(slots, LOOK)


def test_one_write_of_a_knob_may_be_outstanding() -> None:
    slots = Slots(most=1, most_left=1)
    waiting = Asker()
    assert Asker().enter(slots, STOP)
    assert not waiting.enter(slots, MERGE)
    slots.leave_behind(STOP, "process 7 writes run = 0 once ksmd lets it")
    assert waiting.refused == "process 7 writes run = 0 once ksmd lets it"
    for _ in range(20):
        with pytest.raises(Busy, match="an earlier write has not ended: process 7 writes run = 0 once ksmd lets it"):
            Asker().enter(slots, MERGE)
    assert slots.left_behind == 1
    # Other knobs, and those who look, know nothing of it.
    assert Asker().enter(slots, WriteKnob(Knob.PAGES_TO_SCAN, 1))
    assert Asker().enter(slots, LOOK)
    slots.ended(STOP)
    assert Asker().enter(slots, MERGE)
    assert waiting.began == 0


def test_the_next_one_begins_when_the_first_has_ended() -> None:
    slots = Slots(most=0, most_left=0)
    first, second, third = Asker(), Asker(), Asker()
    assert first.enter(slots, STOP)
    assert not second.enter(slots, MERGE)
    assert not third.enter(slots, MERGE)
    slots.withdraw(MERGE, second.begin)
    slots.leave(STOP)
    assert (second.began, third.began) == (0, 1)
    slots.leave(MERGE)
    assert first.enter(slots, STOP)
