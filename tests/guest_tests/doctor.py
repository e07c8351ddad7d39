# SPDX-License-Identifier: GPL-2.0-or-later
"""What the doctor says where there are several nodes, and on a kernel whose kpageflags can't be trusted. In a guest:

tests/guest/run --kernel 6.12 --nodes 2 -- python -m pytest tests/guest_tests/doctor.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ksmd_ctl.host.operation import Move
from ksmd_ctl.kernel import libnuma, migrate
from ksmd_ctl.kernel.regions import spawn
from ksmd_ctl.kernel.syscalls import PAGE_SIZE
from ksmd_ctl.kernel.topology import read_topology
from ksmd_ctl.kernel.witness import probe
from tests.kernel.test_witness import filled
from tests.service.patients import Ksm, visit

pytestmark = pytest.mark.ksm

NODES = [node.number for node in read_topology(numa=libnuma.available()).with_memory()]

if len(NODES) < 2:
    pytest.skip(f"needs two nodes with memory, and there is {len(NODES)}", allow_module_level=True)

FIRST, SECOND = NODES[:2]
#: What is said of this kernel whatever else there is.
KERNEL = ["kpageflags"] if probe().bit_lies else []


@pytest.fixture
def ksm(ksm_host: Path) -> Ksm:
    return Ksm(ksm_host)


def test_migrated_twins_and_pages_far_from_home(ksm: Ksm, tmp_path: Path) -> None:
    ksm.set(merge_across_nodes=0)
    with spawn("test-doctor", FIRST) as one:
        contents = [filled(1 + number // 4) for number in range(400)]
        here, there = one.map(400, FIRST), one.map(400, SECOND)
        for start in (here, there):
            one.advise(start, 400, mergeable=True)
            one.store(start, contents)
        ksm.merging(sleep_millisecs=2000)
        ksm.scanned(4)
        assert (ksm["pages_shared"], ksm["pages_sharing"]) == (200, 600)
        found = visit(tmp_path)
        assert (found.codes, found.code) == (KERNEL, 0)
        ksm.set(run=0)
        request = Move(one.id, to=SECOND, ranges=((here, here + 400 * PAGE_SIZE),))
        assert migrate.move(request, page_size=PAGE_SIZE).moved == 100
        ksm.merging(sleep_millisecs=2000)
        ksm.scanned(4)
        found = visit(tmp_path)
        assert found.codes == ["twins", "remote-pages", *KERNEL]
        # By the counters alone the limit may account for three.
        assert found.figure("twins", "kept too many at least") == 97
        assert found.figure("remote-pages", "away from home") == 400


def test_merged_across_nodes(ksm: Ksm, tmp_path: Path) -> None:
    with spawn("test-doctor", FIRST) as one, spawn("test-doctor", FIRST) as other:
        for process, node in ((one, FIRST), (other, SECOND)):
            start = process.map(400, node)
            process.advise(start, 400, mergeable=True)
            process.store(start, [filled(1 + number) for number in range(400)])
        ksm.merging(sleep_millisecs=2000)
        ksm.scanned(4)
        found = visit(tmp_path)
        assert found.codes == ["remote-pages", *KERNEL]
        assert found.figure("remote-pages", "away from home") == 400
        assert found["remote-pages"]["command"] == "ksmd-ctl set merge_across_nodes=0 --dry-run"
