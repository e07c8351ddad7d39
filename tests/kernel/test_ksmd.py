# SPDX-License-Identifier: GPL-2.0-or-later
"""Counting what ksmd tries to merge."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ksmd_ctl.errors import Absent, Denied
from ksmd_ctl.host.memory import Attempts
from ksmd_ctl.kernel.ksmd import AttemptCounter
from tests.fakes.ksmfs import FakeKsmFs
from tests.service.programs import Ksm, equal, program
from tests.service.running import until
from tests.service.test_doctor_memory import HELD


def counter() -> AttemptCounter:
    try:
        return AttemptCounter()
    except (Absent, Denied) as error:
        pytest.skip(str(error))


@pytest.mark.ksm
def test_what_merges_is_tried_and_what_is_held_is_refused(ksm_host: Path) -> None:
    ksm = Ksm(ksm_host)
    with counter() as counted:
        with program(equal(500)), program(equal(500)):
            ksm.merging(sleep_millisecs=100)
            until("them to be merged", lambda: True if ksm["pages_sharing"] >= 500 else None)
            found = counted.read()
            assert found.tried >= 1000
            # Somebody else's machines may be merged beside.
            assert found.refused < found.tried / 10
        with program(HELD), program(equal(2000)):
            before = counted.read()
            ksm.scanned(6)
            found = counted.read()
        assert found.refused - before.refused >= 2000


def test_elsewhere_there_is_no_such_tracepoint(tmp_path: Path) -> None:
    fake = FakeKsmFs(tmp_path)
    with pytest.raises(Absent, match="tracepoint"):
        AttemptCounter(fake.root)


def test_nothing_is_left_open() -> None:
    with counter() as counted:
        assert isinstance(counted.read(), Attempts)
        held = set(os.listdir("/proc/self/fd"))
    assert len(set(os.listdir("/proc/self/fd"))) == len(held) - 2
