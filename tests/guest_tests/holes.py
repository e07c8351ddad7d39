# SPDX-License-Identifier: GPL-2.0-or-later
"""A kernel whose ksmd looks at every page of a mapping, there or not (findings F11). In a guest:

tests/guest/run --kernel 5.10 --nodes 2 -- python -m pytest tests/guest_tests/holes.py
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ksmd_ctl.errors import TimedOut
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.operation import finish
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.privileged.host import open_kernel_host
from ksmd_ctl.scenario.regions import spawn
from tests.kernel.test_detection import filled
from tests.service.programs import Ksm, visit
from tests.service.running import service, until

pytestmark = pytest.mark.ksm

GIB_PAGES = (1 << 30) // PAGE_SIZE


@pytest.fixture
def ksm(ksm_host: Path) -> Ksm:
    return Ksm(ksm_host)


@contextmanager
def sparse(gib: int) -> Iterator[None]:
    """A process with so much mergeable address space, and one page at its end."""
    with spawn("test-sparse") as process:
        start = process.map(gib * GIB_PAGES)
        process.advise(start, gib * GIB_PAGES, mergeable=True)
        process.store(start + (gib * GIB_PAGES - 1) * PAGE_SIZE, [filled(1)])
        yield


def ksmd_seconds() -> float:
    seconds = open_kernel_host().sample(fresh=True).number("ksmd_cpu_seconds")
    assert seconds is not None
    return seconds


def test_the_doctor_names_it(ksm: Ksm, tmp_path: Path) -> None:
    with sparse(32):
        ksm.merging()
        found = visit(tmp_path, seconds=10)
    assert "holes-walked" in found.codes, found
    assert "dear-scanning" not in found.codes
    assert "test-sparse" in str(found["holes-walked"]["evidence"])
    for finding in found.document["findings"]:
        assert "Scanning is not slower" not in finding["advice"]


def test_a_write_that_waits_for_ksmd_is_done_by_who_is_left_behind(ksm: Ksm) -> None:
    with sparse(256):
        ksm.merging()
        time.sleep(2)
        host = open_kernel_host()
        with pytest.raises(TimedOut, match="it writes run = 0 once ksmd lets it") as caught:
            finish(host.write(Knob.RUN, 0, 0.5), 60)
        assert "run reads 1" in str(caught.value)
        until("it to be written", lambda: True if ksm["run"] == 0 else None)


def test_adaptive_keeps_to_its_share(ksm: Ksm, tmp_path: Path) -> None:
    with sparse(32), service(tmp_path, 'policy = "adaptive"\n'):
        # The first burst is over.
        until("ksmd to rest", lambda: True if ksm["sleep_millisecs"] > 10_000 else None)
        time.sleep(10)
        before, began = ksmd_seconds(), time.monotonic()
        time.sleep(60)
        share = (ksmd_seconds() - before) / (time.monotonic() - began)
    print(f"ksmd took {100 * share:.1f} % of a CPU of {os.cpu_count()}")
    assert share < 0.1
