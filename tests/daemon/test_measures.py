# SPDX-License-Identifier: GPL-2.0-or-later
"""Measures of mode ``nodes`` on a simulated host, with audits that the test makes."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ksmd_ctl.config.domains import Domain, DomainMode, Domains, OnViolation
from ksmd_ctl.config.model import Config, PolicyName
from ksmd_ctl.daemon.log import Event, Log
from ksmd_ctl.daemon.measures import Homing, Measures, homings, unsound
from ksmd_ctl.domains.audit import Audit, Cause, DomainAudit, Stray, Verdict, Violation
from ksmd_ctl.engine.host import EngineHost
from ksmd_ctl.errors import Denied, Refused
from ksmd_ctl.host.knobs import Knob, KnobValue
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.operation import Operation
from ksmd_ctl.render.summary import summary
from ksmd_ctl.transactions.change import check_declared
from tests.daemon.test_loop import Bench as LoopBench
from tests.daemon.watching import Watching, watched
from tests.engine.scenario_runner import content
from tests.engine.test_host import lab, scan
from tests.fakes.host import FakeHost

GOLD, SILVER = frozenset({0}), frozenset({1})
SHARED = Violation(Cause.SHARED_FRAMES, "3 merged frames shared with silver (3)")


def config(on_violation: OnViolation, mode: DomainMode = DomainMode.NODES) -> Config:
    domains = Domains((Domain("gold", GOLD), Domain("silver", SILVER)), mode, on_violation=on_violation)
    return Config(policy=PolicyName.FIXED, domains=domains, census_interval=100.0, floor_bytes=0)


def domain(
    name: str,
    nodes: frozenset[int],
    strays: tuple[Stray, ...] = (),
    intruders: tuple[Stray, ...] = (),
    reasons: tuple[Violation, ...] = (),
    *,
    configured: bool = True,
) -> DomainAudit:
    verdict = Verdict.NOT_ISOLATED if strays or intruders or reasons else Verdict.ISOLATED
    why = reasons or ((Violation(Cause.PAGES_ELSEWHERE, "pages elsewhere"),) if verdict is Verdict.NOT_ISOLATED else ())
    return DomainAudit(name, configured, nodes, 1, (), 1, None, {}, strays, intruders, verdict, why)


def audit(settings: Config, *domains: DomainAudit) -> Audit:
    assert settings.domains is not None
    return Audit(settings.domains, 1.0, domains, 1.0, "", 0, 0.0, True)


def stray(
    process: ProcessId, pages: Mapping[int, int], owner: str = "gold", allowed: frozenset[int] = frozenset()
) -> Stray:
    return Stray(process, "p", "", owner, allowed, pages)


class AuditStub:
    """As much of `DomainsWatch` as measures take.

    :ivar asked: how often another audit was asked for
    """

    def __init__(self) -> None:
        self.audit: Audit | None = None
        self.error = ""
        self.asked = 0

    def stale(self) -> None:
        self.asked += 1


class TransactionsStub:
    """Notes what is said to be done."""

    def __init__(self) -> None:
        self.did: list[str] = []

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        self.did.append(what)
        yield


class Bench(Watching):
    def __init__(self, on_violation: OnViolation = OnViolation.REPORT, nodes: int = 2) -> None:
        host = lab(nodes=nodes)
        host.set(Knob.RUN, 1)
        super().__init__(host)
        self.host: EngineHost
        self.config = config(on_violation)
        self.domains = AuditStub()
        self.transactions = TransactionsStub()
        self.busy = ""
        self.events: list[tuple[Event, str]] = []
        self.watch = Measures(
            host,
            self.tasks,
            Log(self._logged),
            self.domains,  # type: ignore[arg-type]
            self.transactions,  # type: ignore[arg-type]
            lambda: self.busy,
            lambda: self.config,
            self.changed,
        )

    def _logged(self, text: str, fields: Mapping[str, str]) -> None:
        self.events.append((Event(fields["MESSAGE_ID"]), text))

    def seen(self, event: Event) -> list[str]:
        return [text for found, text in self.events if found is event]

    def across(self) -> tuple[ProcessId, list[int]]:
        """A process with two merged pages and one of its own on each of two nodes."""
        process = self.host.spawn("p")
        starts = [self.host.map(process, 3, node) for node in range(2)]
        for node, start in enumerate(starts):
            self.host.advise(process, start, 3, mergeable=True)
            self.host.store(process, start, [content("x"), content("x"), content(f"own{node}")])
        scan(self.host, 3)
        self.host.set(Knob.RUN, 0)
        return process, starts


def play(
    scenario: Callable[[Bench], Coroutine[Any, Any, None]],
    on_violation: OnViolation = OnViolation.REPORT,
    nodes: int = 2,
) -> Bench:
    return watched(lambda: Bench(on_violation, nodes), scenario, 30)


def test_pages_of_a_confined_process_are_unmerged_and_moved_home() -> None:
    async def scenario(bench: Bench) -> None:
        process, starts = bench.across()
        bench.domains.audit = audit(
            bench.config, domain("gold", GOLD, (stray(process, {1: 3}),)), domain("silver", SILVER)
        )
        await bench.tick()
        home, away = (bench.host.pages(process, start, 3) for start in starts)
        assert [(page.node, page.ksm) for page in home] == [(0, True), (0, True), (0, False)]
        # Their mapping is bound to the other node, so un-merging leaves them there, and they are moved.
        assert [(page.node, page.ksm) for page in away] == [(0, False)] * 3
        assert bench.watch.section()["unmerged_pages"] == 2
        assert bench.watch.section()["moved_pages"] == 3
        assert bench.transactions.did == ["bringing memory of domains home"]
        assert bench.seen(Event.DOMAIN_MEASURES) == [
            f"p (pid {process.pid}) of gold: 2 pages un-merged, 3 moved home, 0 left"
        ]
        # The same audit is acted on once.
        await bench.tick()
        assert len(bench.transactions.did) == 1

    play(scenario)


@pytest.mark.parametrize("on_violation", OnViolation)
def test_who_is_not_confined_is_left_alone_where_it_is_only_to_be_reported(on_violation: OnViolation) -> None:
    settings = config(on_violation)
    confined, free = ProcessId(1, 1), ProcessId(2, 2)
    found = homings(
        audit(
            settings,
            domain("gold", GOLD, (stray(confined, {1: 1}), stray(free, {1: 1}, allowed=SILVER))),
            domain("silver", SILVER, (), (stray(confined, {1: 1}), stray(free, {1: 1}, allowed=SILVER))),
        ),
        frozenset({0, 1}),
    )
    expected = [confined] if on_violation is OnViolation.REPORT else [confined, free]
    assert [one.process for one in found] == expected
    assert {one.nodes for one in found} == {GOLD}


def test_who_belongs_to_no_domain_goes_where_no_domain_is() -> None:
    settings = config(OnViolation.UNMERGE)
    other = stray(ProcessId(3, 3), {0: 1}, "else", GOLD)
    found = audit(settings, domain("gold", GOLD, (), (other,)), domain("silver", SILVER))
    assert homings(found, frozenset({0, 1, 2})) == (Homing(other.process, "p (pid 3)", "else", frozenset({2})),)
    assert homings(found, frozenset({0, 1}))[0].nodes == frozenset()


def test_nobody_is_unmerged_for_a_domain_without_members() -> None:
    settings = config(OnViolation.UNMERGE)
    other = stray(ProcessId(3, 3), {0: 1}, "else", GOLD)
    empty = dataclasses.replace(domain("gold", GOLD, (), (other,)), verdict=Verdict.NO_MEMBERS, reasons=(), processes=0)
    assert homings(audit(settings, empty, domain("silver", SILVER)), GOLD | SILVER) == ()


def test_where_the_domains_have_all_nodes_others_are_only_unmerged() -> None:
    async def scenario(bench: Bench) -> None:
        process, starts = bench.across()
        other = stray(process, {0: 3}, "else", GOLD)
        bench.domains.audit = audit(bench.config, domain("gold", GOLD, (), (other,)), domain("silver", SILVER))
        await bench.tick()
        pages = [page for start in starts for page in bench.host.pages(process, start, 3)]
        assert [(page.node, page.ksm) for page in pages] == [(0, False)] * 3 + [(1, False)] * 3

    play(scenario, OnViolation.UNMERGE)


def test_processes_that_have_ended_and_errors() -> None:
    async def scenario(bench: Bench) -> None:
        process, _ = bench.across()
        gone = ProcessId(999, 1)
        bench.domains.audit = audit(bench.config, domain("gold", GOLD, (stray(gone, {1: 3}), stray(process, {1: 3}))))
        bench.host.move = lambda *_: Operation.failed(Denied("moving", "not allowed"))  # type: ignore[method-assign]
        await bench.tick()
        (text,) = bench.seen(Event.DOMAIN_MEASURES)
        assert "2 pages un-merged, 0 moved home" in text
        assert f"p (pid {process.pid}): not allowed" in text
        bench.host.inventory = lambda _: Operation.failed(Denied("looking", "no permission"))  # type: ignore[method-assign]
        bench.domains.audit = audit(bench.config, domain("gold", GOLD, (stray(process, {1: 3}),)))
        await bench.tick()
        assert "no permission" in bench.seen(Event.DOMAIN_MEASURES)[1]

    play(scenario)


def test_nothing_is_moved_while_others_move_or_pages_merge_across_nodes() -> None:
    async def scenario(bench: Bench) -> None:
        process, _ = bench.across()
        bench.busy = "a transaction is under way"
        bench.domains.audit = audit(bench.config, domain("gold", GOLD, (stray(process, {1: 3}),)))
        await bench.tick()
        assert bench.transactions.did == []
        bench.busy = ""
        bench.host.machine.ksm.merge_across_nodes = 1
        await bench.tick()
        assert bench.transactions.did == []
        bench.host.machine.ksm.merge_across_nodes = 0
        await bench.tick()
        assert len(bench.transactions.did) == 1

    play(scenario)


def test_ksmd_is_stopped_until_an_audit_finds_each_domain_isolated() -> None:
    async def scenario(bench: Bench) -> None:
        process, _ = bench.across()
        bench.host.set(Knob.RUN, 1)
        await bench.tick()
        assert bench.watch.stopped == "no audit has found each domain isolated yet"
        sound = audit(bench.config, domain("gold", GOLD), domain("silver", SILVER))
        bench.domains.audit = sound
        await bench.tick()
        assert bench.watch.stopped == ""
        bench.domains.audit = audit(bench.config, domain("gold", GOLD, (stray(process, {1: 3}),), reasons=(SHARED,)))
        await bench.tick()
        assert bench.watch.stopped == f"domain gold is not isolated: {SHARED.text}"
        # Not before ksmd has stopped: it could merge them again.
        assert bench.transactions.did == []
        bench.host.set(Knob.RUN, 0)
        await bench.tick()
        assert len(bench.transactions.did) == 1
        bench.domains.audit = dataclasses.replace(sound)
        bench.domains.error = "looking at processes: no permission"
        await bench.tick()
        assert bench.watch.stopped == "the latest audit of domains failed: looking at processes: no permission"
        bench.domains.error = ""
        await bench.tick()
        assert bench.watch.stopped == ""
        assert len(bench.seen(Event.MERGING_STOPPED)) == len(bench.seen(Event.MERGING_RESUMED)) == 2

    play(scenario, OnViolation.STOP)


@pytest.mark.parametrize("on_violation", [OnViolation.REPORT, OnViolation.UNMERGE])
def test_ksmd_runs_on_where_it_is_not_to_be_stopped(on_violation: OnViolation) -> None:
    async def scenario(bench: Bench) -> None:
        bench.domains.audit = audit(bench.config, domain("gold", GOLD, reasons=(SHARED,)))
        await bench.tick()
        assert bench.watch.stopped == ""
        assert bench.events == []

    play(scenario, on_violation)


@pytest.mark.parametrize(
    "after",
    [
        config(OnViolation.STOP, DomainMode.REPORT),
        config(OnViolation.REPORT),
        dataclasses.replace(config(OnViolation.STOP), domains=None),
        dataclasses.replace(config(OnViolation.STOP), policy=PolicyName.OBSERVE),
    ],
)
def test_another_configuration_lets_it_run_again(after: Config) -> None:
    async def scenario(bench: Bench) -> None:
        bench.domains.audit = audit(bench.config, domain("gold", GOLD, reasons=(SHARED,)))
        await bench.tick()
        assert bench.watch.stopped
        bench.config = after
        await bench.tick()
        assert bench.watch.stopped == ""

    play(scenario, OnViolation.STOP)


def test_while_a_domain_is_not_isolated_audits_come_sooner_and_then_less_often() -> None:
    async def scenario(bench: Bench) -> None:
        times = []
        for second in range(400):
            asked = bench.domains.asked
            if second == 0 or times[-1:] == [second - 1]:
                bench.domains.audit = audit(bench.config, domain("gold", GOLD, reasons=(SHARED,)))
            await bench.tick()
            if bench.domains.asked > asked:
                times.append(second)
        pauses = [after - before for before, after in zip([0, *times], times, strict=False)]
        assert pauses[:5] == [5, 11, 21, 41, 81]
        assert set(pauses[5:]) <= {101}
        asked = bench.domains.asked
        bench.domains.audit = audit(bench.config, domain("gold", GOLD), domain("silver", SILVER))
        await bench.tick(150)
        assert bench.domains.asked == asked

    play(scenario)


def test_what_is_held_is_part_of_the_configuration_for_whoever_changes_knobs() -> None:
    async def scenario(bench: Bench) -> None:
        assert bench.watch.held(bench.config) is bench.config
        await bench.tick()
        want = bench.watch.held(bench.config).knobs[Knob.RUN]
        assert (want.value, want.origin) == (0, bench.watch.stopped)

    play(scenario, OnViolation.STOP)


def test_groups_that_are_their_own_domains_stop_nothing() -> None:
    settings = config(OnViolation.STOP)
    assert unsound(audit(settings, domain("else", frozenset(), reasons=(SHARED,), configured=False))) == ""
    assert unsound(audit(settings, domain("gold", GOLD, reasons=(SHARED,)))).startswith("domain gold is not isolated")


def test_the_service_holds_run_at_0_and_gives_it_back(tmp_path: Path) -> None:
    host = FakeHost({Knob.RUN: 1, Knob.MERGE_ACROSS_NODES: 0})
    settings = dataclasses.replace(config(OnViolation.STOP), census_cpu_share=0.0, sample_interval=3600.0)
    bench = LoopBench(tmp_path, {}, host, settings)
    sound = audit(settings, domain("gold", GOLD), domain("silver", SILVER))
    unsound = audit(settings, domain("gold", GOLD, reasons=(SHARED,)), domain("silver", SILVER))

    def ticks(found: Audit | None = None) -> KnobValue:
        bench.loop.domains.audit = found or bench.loop.domains.audit
        bench.tick()
        bench.tick()
        return host.knobs[Knob.RUN]

    def script() -> None:
        # Nobody knows yet.
        assert host.knobs[Knob.RUN] == 0
        assert ticks(sound) == 1
        assert "run" not in bench.executor.journal.entries
        assert ticks(unsound) == 0
        assert bench.knob(Knob.RUN)["wanted"] == 0
        section: Any = bench.loop.document()["domains"]
        assert section["measures"]["stopped"] == f"domain gold is not isolated: {SHARED.text}"
        assert any("ksmd, by on_violation: domain gold" in str(line) for line in summary(bench.loop.document()))
        host.put(Knob.RUN, 1)
        assert ticks() == 0, "somebody else made it run"
        with pytest.raises(Refused, match="declares 0"):
            check_declared(bench.loop.measures.held(settings), {Knob.RUN: 1})
        assert bench.executor.journal.entries[Knob.RUN].at_start == 1
        bench.loaded = dataclasses.replace(settings, domains=None)
        assert not bench.loop.reload()
        assert ticks() == 1

    assert bench.run(script) == signal.SIGTERM
    assert bench.seen(Event.MERGING_STOPPED)
