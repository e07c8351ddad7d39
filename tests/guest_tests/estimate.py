# SPDX-License-Identifier: GPL-2.0-or-later
"""What merging would save on two nodes, told with KSM off, is what ksmd then reaches. Inside a guest:

tests/guest/run --kernel 6.12 --nodes 2 -- python -m pytest tests/guest_tests/estimate.py
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from ksmd_ctl.host.estimate import Rules
from ksmd_ctl.kernel import libnuma
from ksmd_ctl.kernel.estimate import Look
from ksmd_ctl.kernel.estimate_targets import find_targets
from ksmd_ctl.kernel.pace import Pace
from ksmd_ctl.kernel.proc_pid import LeftOut
from ksmd_ctl.kernel.topology import read_topology
from ksmd_ctl.scenario.regions import spawn
from tests.kernel.test_detection import filled, scan

pytestmark = pytest.mark.ksm

NODES = [node.number for node in read_topology(numa=libnuma.available()).with_memory()]

if len(NODES) < 2:
    pytest.skip(f"needs two nodes with memory, and there is {len(NODES)}", allow_module_level=True)


@pytest.mark.parametrize("across", [True, False])
def test_ksmd_reaches_it_on_two_nodes(ksm_host: Path, across: bool) -> None:
    (ksm_host / "merge_across_nodes").write_text(str(int(across)))
    with ExitStack() as stack:
        for number, node in enumerate((NODES[0], NODES[0], NODES[1], NODES[1])):
            process = stack.enter_context(spawn(f"test-{number}"))
            start = process.map(300, node)
            process.advise(start, 300, mergeable=True)
            # A hundred that all have, a hundred that both of a node have, and others.
            process.store(
                start,
                [
                    *(filled(1 + page) for page in range(100)),
                    *(filled(1000 * (1 + node) + page) for page in range(100)),
                    *(filled(100_000 * (1 + number) + page) for page in range(100)),
                ],
            )
        targets = find_targets(lambda _: True, left_out := LeftOut(), more=False)
        look = Look(targets, Rules(256, across, nodes=2), Pace(1.0), interval_seconds=0.1, left_out=left_out)
        *_, final = look.estimates()
        outcomes = {one.merge_across_nodes: one for one in final.outcomes if not one.use_zero_pages}
        assert {key: one.freed.found for key, one in outcomes.items()} == {True: 500, False: 400}
        assert sum(owner.freed for owner in final.owners) == pytest.approx(outcomes[across].freed.found)
        scan(ksm_host, 4)
        found = [int((ksm_host / name).read_text()) for name in ("pages_shared", "pages_sharing")]
        assert found == [outcomes[across].pages_shared, outcomes[across].pages_sharing]
