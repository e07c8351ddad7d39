# SPDX-License-Identifier: GPL-2.0-or-later
"""Audits of the simulated host: what it merges is what is found."""

from __future__ import annotations

import pytest

from ksmd_ctl.config.domains import Domain, Domains
from ksmd_ctl.domains.audit import Audit, Cause, Verdict, auditing
from ksmd_ctl.engine.host import EngineHost, open_engine_host
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.operation import finish


def merged(names: tuple[str, str], across: int) -> EngineHost:
    """Two processes with the same pages, each on a node of its own, after ksmd has merged what it merges."""
    host = open_engine_host(nodes=2, demo=False, source=None)
    host.set(Knob.MERGE_ACROSS_NODES, across)
    for node, name in enumerate(names):
        process = host.spawn(name)
        start = host.map(process, 20, node)
        host.advise(process, start, 20, mergeable=True)
        host.store(process, start, [bytes([1 + page // 2]) * 4096 for page in range(20)])
    for _ in range(6):
        host.batch(1000)
    return host


def audited(host: EngineHost, config: Domains) -> Audit:
    return finish(auditing(host, config, finish(host.survey(1.0)), 1.0))


@pytest.mark.parametrize("across", [0, 1])
def test_frames_of_two_nodes_are_shared_only_where_there_is_one_tree(across: int) -> None:
    audit = audited(merged(("one", "two"), across), Domains())
    for one, other in zip(audit.domains, reversed(audit.domains), strict=True):
        assert one.figures is not None
        assert (one.figures.merged_pages, one.figures.frames) == (20, 10)
        assert one.shared_with == ({other.name: 10} if across else {})
        assert one.verdict is (Verdict.NOT_ISOLATED if across else Verdict.NOTHING_SHARED)


@pytest.mark.parametrize("across", [0, 1])
def test_within_a_domain_everything_may_be_shared(across: int) -> None:
    (one,) = audited(merged(("same", "same"), across), Domains()).domains
    assert one.figures is not None
    assert (one.figures.merged_pages, one.figures.frames) == (40, 10 if across else 20)
    assert one.verdict is Verdict.NOTHING_SHARED


def test_without_cpusets_a_domain_with_nodes_is_never_isolated() -> None:
    config = Domains((Domain("all", frozenset({0})),), unmatched="all")
    (one,) = audited(merged(("one", "two"), 0), config).domains
    assert one.elsewhere_pages == 20
    assert [reason.cause for reason in one.reasons] == [Cause.MAY_ALLOCATE_ELSEWHERE, Cause.PAGES_ELSEWHERE]
