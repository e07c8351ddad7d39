# SPDX-License-Identifier: GPL-2.0-or-later
"""What is left merged where only a part is to be un-merged; the rest is in tests/cli and tests/service."""

from __future__ import annotations

import pytest

from ksmd_ctl.engine.host import EngineHost
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.operation import finish
from ksmd_ctl.transactions.plan import Limits
from ksmd_ctl.transactions.unmerging import UnmergeOrder, Unmerging
from tests.engine.scenario_runner import content
from tests.engine.test_host import lab, scan

LIMITS = Limits(0, 1.0, 0.01, 1.0)


def across(host: EngineHost, pages: int = 4) -> tuple[ProcessId, list[int]]:
    """A process that has merged pages on two nodes, and where."""
    process = host.spawn("p")
    starts = [host.map(process, pages, node) for node in range(2)]
    for start in starts:
        host.advise(process, start, pages, mergeable=True)
        host.store(process, start, [content("x")] * pages)
    scan(host, 3)
    return process, starts


@pytest.mark.parametrize(("keep", "pages"), [((), 8), ((0,), 4), ((1,), 4), ((0, 1), 0)])
def test_pages_on_some_nodes_stay_merged(keep: tuple[int, ...], pages: int) -> None:
    host = lab()
    process, starts = across(host)
    order = UnmergeOrder(process.pid, keep=keep)
    planned = finish(Unmerging(host, UnmergeOrder(process.pid, dry_run=True, keep=keep), LIMITS)).document()
    assert planned["processes"][0]["merged"] == pages  # type: ignore[index]
    result = finish(Unmerging(host, order, LIMITS))
    (one,) = result.processes.values()
    assert (one.merged_pages, one.unshared_pages, one.left) == (pages, pages, {})
    for node, start in enumerate(starts):
        assert {page.ksm for page in host.pages(process, start, 4)} == {node in keep}
