# SPDX-License-Identifier: GPL-2.0-or-later
"""Verdicts: what is isolated, what is not and why, and what nobody can say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.config.domains import Domain, DomainMode, Domains
from ksmd_ctl.domains.audit import Audit, Cause, DomainAudit, Verdict, auditing
from ksmd_ctl.domains.documents import domains_document, domains_section
from ksmd_ctl.errors import Absent, Unreadable
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.memory import KsmDetection, Node, Process, Skipped
from ksmd_ctl.host.operation import finish
from ksmd_ctl.host.sharing import SharedBy, Sharing
from tests.fakes.host import FakeHost, process

GOLD = Domain("gold", frozenset({0}), units=("gold",))
SILVER = Domain("silver", frozenset({1}), units=("silver",))
BOTH = Domains((GOLD, SILVER), DomainMode.NODES)


def member(pid: int, unit: str, node: int, pages: int = 100, **more: Any) -> Process:
    facts: dict[str, Any] = {"unit": unit, "mergeable_mappings": 1, "resident_nodes": {node: pages}, **more}
    return process(pid, unit, pages, **facts)


def sound(config: Domains = BOTH) -> FakeHost:
    """Two domains with nodes of their own that nothing is wrong with."""
    found = FakeHost({Knob.MERGE_ACROSS_NODES: 0})
    found.running = [member(1, "gold", 0), member(2, "gold", 0), member(3, "silver", 1)]
    found.confined = {one.id: frozenset({min(one.resident_nodes)}) for one in found.running}
    return found


def look(host: FakeHost, config: Domains = BOTH) -> Audit:
    return finish(auditing(host, config, host.seen(), 1.0))


def verdicts(audit: Audit) -> dict[str, str]:
    return {one.name: one.verdict.value for one in audit.domains}


def causes(one: DomainAudit) -> list[Cause]:
    return [reason.cause for reason in one.reasons]


def named(audit: Audit, name: str) -> DomainAudit:
    return next(one for one in audit.domains if one.name == name)


def counted(*sets: SharedBy, groups: int = 2, **facts: Any) -> Sharing:
    return Sharing(0.0, sets, (0,) * groups, **{"share": 1.0, "complete": True, "detection": DETECTION, **facts})


DETECTION = KsmDetection.KPAGEFLAGS


def test_domains_with_nodes_of_their_own_that_nobody_leaves_are_isolated() -> None:
    host = sound()
    host.sharing_outcomes = [counted(SharedBy((0,), 50, (200,), (50.0,), (0,)))]
    audit = look(host)
    assert verdicts(audit) == {"gold": "isolated", "silver": "isolated"}
    assert audit.isolated
    gold = named(audit, "gold")
    assert (gold.processes, gold.resident_pages, gold.shared_frames, gold.elsewhere_pages) == (2, 200, 0, 0)
    assert gold.figures is not None
    assert (gold.figures.merged_pages, gold.figures.frames, gold.figures.saved_pages) == (200, 50, 150.0)
    # Each domain is a group.
    assert host.sharing_looks == [([[1, 2], [3]], 1.0)]


def test_frames_that_two_domains_map_are_told_whatever_else_is_right() -> None:
    host = sound()
    host.sharing_outcomes = [counted(SharedBy((0, 1), 7, (14, 7), (4.7, 2.3), (0, 7)))]
    audit = look(host)
    assert verdicts(audit) == {"gold": "not isolated", "silver": "not isolated"}
    gold = named(audit, "gold")
    assert causes(gold) == [Cause.SHARED_FRAMES]
    assert gold.reasons[0].text == "merged frames are shared with other domains"
    assert (gold.shared_frames, gold.shared_with) == (7, {"silver": 7})


def test_frames_that_fork_shares_are_no_merging() -> None:
    host = sound()
    host.sharing_outcomes = [counted(SharedBy((0, 1), 9, (9, 9), (4.5, 4.5), (9, 9), merged=False))]
    audit = look(host)
    assert audit.isolated
    assert named(audit, "gold").shared_with == {}
    figures = named(audit, "gold").figures
    assert figures is not None
    assert figures.forked_frames == 9


def test_who_is_seen_at_the_second_look_was_not_unseen() -> None:
    host = sound()
    unseen = SharedBy((0,), 3, (3,), (1.5,), (3,), unseen=3)
    host.sharing_outcomes = [counted(unseen), counted(SharedBy((0,), 3, (6,), (3.0,), (0,)))]
    assert look(host).isolated
    assert len(host.sharing_looks) == 2
    host.sharing_outcomes = [counted(unseen), counted(unseen)]
    audit = look(host)
    assert causes(named(audit, "gold")) == [Cause.UNSEEN_MAPPINGS]
    assert verdicts(audit)["silver"] == "isolated"


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({Knob.MERGE_ACROSS_NODES: 1}, "merge_across_nodes is 1: pages of all nodes are merged"),
        ({Knob.USE_ZERO_PAGES: 1}, "use_zero_pages is 1: the zero page is one for all nodes"),
    ],
)
def test_a_knob_that_joins_what_is_apart(knobs: Mapping[Knob, int], said: str) -> None:
    host = sound()
    host.knobs.update(knobs)
    audit = look(host)
    assert verdicts(audit) == {"gold": "not isolated", "silver": "not isolated"}
    assert [reason.text for reason in named(audit, "silver").reasons] == [said]


def test_kernels_without_these_knobs() -> None:
    host = sound()
    del host.knobs[Knob.USE_ZERO_PAGES]
    assert look(host).isolated
    del host.knobs[Knob.MERGE_ACROSS_NODES]
    (reason,) = named(look(host), "gold").reasons
    assert reason.text == "this kernel has no merge_across_nodes: it merges pages of all nodes"


def test_a_knob_that_can_not_be_read_is_not_taken_for_good() -> None:
    host = sound()
    host.broken["merge_across_nodes"] = Unreadable("reading merge_across_nodes", "no permission")
    (reason,) = named(look(host), "gold").reasons
    assert reason.text == "merge_across_nodes can't be read: no permission"


def test_a_member_that_may_allocate_elsewhere() -> None:
    host = sound()
    host.confined[host.running[0].id] = frozenset({0, 1})
    audit = look(host)
    gold, silver = named(audit, "gold"), named(audit, "silver")
    assert [reason.text for reason in gold.reasons] == ["1 process may allocate on node 1 as well: p1 (pid 1)"]
    assert [(one.process.pid, one.allowed, one.pages) for one in gold.strays] == [(1, frozenset({1}), {})]
    # And so it is on the other domain's nodes.
    assert causes(silver) == [Cause.OTHERS_ON_ITS_NODES]
    assert silver.reasons[0].text == "others may allocate on its nodes: p1 (pid 1) of gold"
    assert [(one.process.pid, one.domain) for one in silver.intruders] == [(1, "gold")]


def test_pages_elsewhere_are_told_of_who_may_not_allocate_there_any_more() -> None:
    host = sound()
    host.running[0] = member(1, "gold", 0, resident_nodes={0: 90, 1: 10})
    audit = look(host)
    gold, silver = named(audit, "gold"), named(audit, "silver")
    assert [reason.text for reason in gold.reasons] == ["10 pages of 1 process on node 1: p1 (pid 1)"]
    assert gold.elsewhere_pages == 10
    assert silver.reasons[0].text == "others have 10 pages on its nodes: p1 (pid 1) of gold"


def test_strangers_on_a_domain_s_nodes_belong_to_the_reasons() -> None:
    host = sound()
    host.running.append(member(9, "stranger", 1))
    audit = look(host)
    # It may allocate everywhere.
    assert verdicts(audit) == {
        "gold": "not isolated",
        "silver": "not isolated",
        "stranger": "nothing is shared now",
    }
    assert causes(named(audit, "gold")) == [Cause.OTHERS_ON_ITS_NODES]
    # It shares nothing, but a domain without nodes is never isolated by construction.
    assert named(audit, "stranger").reasons == ()


def test_only_memory_that_may_merge_counts() -> None:
    host = sound()
    host.running.append(process(9, "other", mergeable_mappings=0, machine=True))
    assert verdicts(look(host)) == {"gold": "isolated", "silver": "isolated"}


def test_many_strays_are_counted_not_listed() -> None:
    host = sound()
    host.running += [member(pid, "gold", 0) for pid in range(10, 20)]
    (reason, *_) = named(look(host), "gold").reasons
    said = "10 processes may allocate on node 1 as well: p10 (pid 10), p11 (pid 11), p12 (pid 12) and 7 more"
    assert reason.text == said


def test_a_host_without_cpusets_says_so() -> None:
    host = sound()
    host.confined.clear()
    host.cpusets = False
    audit = look(host)
    assert not audit.cpusets
    assert (
        named(audit, "gold")
        .reasons[0]
        .text.endswith("; this host has no cpuset controller, which confines processes to nodes")
    )


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ({0, 1, 5}, ["this host has no node 5, but 0-1"]),
        ({0, 1, 5, 6}, ["this host has no nodes 5-6, but 0-1"]),
        ({0, 1}, []),
    ],
)
def test_nodes_that_are_not_there(nodes: set[int], said: list[str]) -> None:
    host = sound()
    host.running = host.running[:2]
    audit = look(host, Domains((Domain("gold", frozenset(nodes), units=("gold",)),)))
    assert [reason.text for reason in named(audit, "gold").reasons] == said


def test_a_node_without_memory() -> None:
    host = sound()
    host.nodes = (host.nodes[0], Node(1, frozenset({1}), 0, {0: 20, 1: 10}))
    audit = look(host)
    assert causes(named(audit, "silver"))[0] is Cause.NODES
    assert named(audit, "silver").reasons[0].text == "there is no memory on node 1"


def test_one_node_can_not_hold_two_domains() -> None:
    host = sound()
    host.nodes = host.nodes[:1]
    said = named(look(host), "silver").reasons[0].text
    assert said == ("this host has no node 1, but 0; numa=fake= divides its one node into several (docs/domains.md)")


def test_a_domain_without_members_is_told_and_what_is_wrong_with_its_nodes_too() -> None:
    host = sound()
    host.running = host.running[2:]
    audit = look(host, Domains((Domain("gold", frozenset({7}), units=("gone.service",)), SILVER)))
    assert verdicts(audit) == {"gold": "no members", "silver": "isolated"}
    assert causes(named(audit, "gold")) == [Cause.NODES]
    assert audit.isolated


def test_who_has_ended_since_the_survey_is_nobody_s_stray() -> None:
    host = sound()
    host.running.append(member(9, "gold", 1))
    host.gone.add(host.running[-1].id)
    assert named(look(host), "gold").strays == ()


def test_frames_that_there_was_no_time_to_count_leave_a_domain_with_nodes_isolated() -> None:
    host = sound()
    # Frames of the first are mapped by the second, which was not counted.
    unseen = SharedBy((0,), 3, (3,), (1.5,), (3,), unseen=3)
    host.sharing_outcomes = [counted(unseen, unread=(2,))]
    audit = look(host)
    assert audit.isolated
    assert len(host.sharing_looks) == 1
    assert audit.uncounted == 1
    host.sharing_outcomes = [counted(unread=(2,))]
    audit = look(host, Domains((Domain("gold", units=("gold",)), SILVER)))
    assert [reason.text for reason in named(audit, "gold").reasons] == [
        "frames of 1 process were not counted: they are too many"
    ]


@pytest.mark.parametrize("what", ["skipped", "denied", "unread", "count"])
def test_what_could_not_be_looked_at_is_not_taken_for_isolated(what: str) -> None:
    host = sound()
    said = "1 process could not be looked at: "
    if what == "skipped":
        host.skipped = [Skipped(9, "stuck", "it keeps its readers waiting")]
        said += "stuck (pid 9)"
    elif what == "denied":
        host.unseen = [9]
        said += "pid 9"
    elif what == "unread":
        host.sharing_outcomes = [counted(unread=(9,))]
        said += "pid 9"
    else:
        host.sharing_outcomes = [Absent("reading kpageflags", "it is not there")]
        said = "which frames are shared could not be counted: reading kpageflags: it is not there"
    audit = look(host)
    assert verdicts(audit) == {"gold": "not isolated", "silver": "not isolated"}
    assert [(reason.cause, reason.text) for reason in named(audit, "silver").reasons] == [(Cause.NOT_LOOKED_AT, said)]
    assert (audit.share is None) == (what == "count")


def test_without_nodes_nothing_more_is_said_than_that_nothing_is_shared_now() -> None:
    host = sound()
    host.knobs[Knob.MERGE_ACROSS_NODES] = 1
    config = Domains((Domain("gold", units=("gold",)), Domain("silver", units=("silver",))))
    assert verdicts(look(host, config)) == dict.fromkeys(("gold", "silver"), "nothing is shared now")
    host.sharing_outcomes = [counted(SharedBy((0, 1), 1, (1, 1), (0.5, 0.5), (1, 1)))]
    assert verdicts(look(host, config)) == dict.fromkeys(("gold", "silver"), "not isolated")


@given(st.lists(st.tuples(st.integers(0, 3), st.sets(st.integers(0, 3), min_size=1), st.integers(0, 3)), max_size=6))
def test_isolated_domains_have_nothing_in_common(placed: Iterable[tuple[int, set[int], int]]) -> None:
    """Whoever is where: if two domains are isolated, no page of theirs can ever be on one node."""
    host = FakeHost({Knob.MERGE_ACROSS_NODES: 0})
    host.nodes = tuple(Node(number, frozenset({number}), 2**30, {}) for number in range(4))
    config = Domains(tuple(Domain(f"d{number}", frozenset({number}), units=(f"u{number}",)) for number in range(4)))
    where: dict[int, set[int]] = {}
    for pid, (domain, allowed, node) in enumerate(placed, 1):
        host.running.append(member(pid, f"u{domain}", node))
        host.confined[host.running[-1].id] = frozenset(allowed)
        where.setdefault(domain, set()).update(allowed, {node})
    for one in look(host, config).domains:
        number = int(one.name[1:])
        others = set().union(*(nodes for domain, nodes in where.items() if domain != number))
        separate = where.get(number, set()) <= {number} and number not in others
        assert one.verdict is (
            Verdict.NO_MEMBERS if number not in where else Verdict.ISOLATED if separate else Verdict.NOT_ISOLATED
        )


# -- documents ---------------------------------------------------------------------------------------------


def test_for_all_but_root_counts_are_rounded_and_nothing_shared_is_hidden() -> None:
    host = sound()
    host.sharing_outcomes = [counted(SharedBy((0, 1), 7, (14, 7), (4.7, 2.3), (0, 7)))]
    audit = look(host)
    exact: Any = domains_document(host.identity, audit, host.now)
    rounded: Any = domains_document(host.identity, audit, host.now, round_pages=256)
    assert [one["shared_frames"] for one in exact["domains"]] == [7, 7]
    for one in rounded["domains"]:
        assert one["shared_frames"] == one["merged_pages"] == 256
        # Who has the same page nobody can find out by making one.
        assert one["shared_with"] == {}
        assert one["reasons"] == [{"cause": "shared frames", "text": one["reasons"][0]["text"]}]
        assert not any(letter.isdigit() for letter in one["reasons"][0]["text"])


def test_of_a_domain_that_was_not_counted_no_figures_are_told() -> None:
    host = sound()
    host.sharing_outcomes = [counted(unread=(3,), complete=False)]
    audit = look(host)
    assert verdicts(audit)["silver"] == "isolated"
    assert (audit.uncounted, named(audit, "silver").figures) == (1, None)
    assert named(audit, "gold").figures is not None


def test_with_whom_much_is_shared_everybody_is_told() -> None:
    host = sound()
    host.sharing_outcomes = [counted(SharedBy((0, 1), 300, (300, 300), (150.0, 150.0), (300, 300)))]
    audit = look(host)
    assert named(audit, "gold").reasons[0].text == "merged frames are shared with silver"
    rounded: Any = domains_document(host.identity, audit, host.now, round_pages=256)
    assert [one["shared_with"] for one in rounded["domains"]] == [{"silver": 256}, {"gold": 256}]


def test_a_report_has_the_configured_domains_and_the_others_together() -> None:
    host = sound()
    host.running += [member(8, "b", 0), member(9, "c", 0)]
    host.sharing_outcomes = [counted(SharedBy((2, 3), 300, (300, 300), (150, 150), (300, 300)), groups=4)]
    audit = look(host)
    section: Any = domains_section(BOTH, audit, host.now + 3, 4096, 256)
    assert [one["domain"] for one in section["domains"]] == ["gold", "silver"]
    assert section["others"] == {"domains": 2, "not_isolated": 2, "shared_frames": 768}
    assert (section["age_seconds"], section["isolated"], section["mode"]) == (3.0, False, "nodes")
    assert "strays" not in section["domains"][0]
    before: Any = domains_section(BOTH, None, host.now, 4096, 256)
    assert (before["age_seconds"], before["isolated"], before["domains"]) == (None, None, [])
    assert before.keys() == section.keys()
