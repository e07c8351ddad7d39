# SPDX-License-Identifier: GPL-2.0-or-later
"""Audits of the service on a fake host: when they are made, what is reported and logged, and what a request gets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import pytest

from ksmd_ctl.config.domains import Domain, DomainMode, Domains
from ksmd_ctl.config.loader import load
from ksmd_ctl.config.model import Config
from ksmd_ctl.daemon.domains import DomainsWatch
from ksmd_ctl.daemon.log import Event, Log
from ksmd_ctl.daemon.numa import NumaWatch
from ksmd_ctl.domains.audit import Audit
from ksmd_ctl.errors import TimedOut
from ksmd_ctl.host.knobs import Knob
from tests.daemon.watching import Watching, watched
from tests.domains.test_audit import BOTH, GOLD, SharedBy, counted, sound

SHARED = counted(SharedBy((0, 1), 7, (14, 7), (4.7, 2.3), (0, 7)))


class Bench(Watching):
    def __init__(self, domains: Domains | None = BOTH, interval: float = 100.0, share: float = 0.01) -> None:
        super().__init__(sound())
        base = load("/dev/null")
        self.config: Config = dataclasses.replace(
            base, census_interval=interval, census_cpu_share=share, domains=domains
        )
        self.logged: list[tuple[str, str]] = []
        self.audits: list[Audit] = []
        log = Log(self._log)
        self.numa = NumaWatch(self.host, self.tasks, lambda: self.config, lambda: None)
        self.watch = DomainsWatch(self.host, self.tasks, log, self.numa, lambda: self.config, self.changed)

    def changed(self) -> None:
        super().changed()
        if (audit := self.watch.audit) is not None and audit not in self.audits[-1:]:
            self.audits.append(audit)

    def _log(self, text: str, fields: Mapping[str, str]) -> None:
        self.logged.append((Event(fields["MESSAGE_ID"]).name, text))

    def section(self) -> Any:
        return self.watch.section(self.host.now)


def run(scenario: Callable[[Bench], Coroutine[Any, Any, None]], **settings: Any) -> Bench:
    return watched(lambda: Bench(**settings), scenario, 30)


def test_an_audit_follows_the_start_and_then_each_interval() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.tick(3)
        assert (bench.section()["audits"], bench.section()["isolated"]) == (0, None)
        await bench.tick(2)
        assert (bench.section()["audits"], bench.section()["isolated"]) == (1, True)
        assert bench.section()["age_seconds"] <= 1
        await bench.tick(98)
        assert bench.section()["audits"] == 1
        await bench.tick(3)
        assert bench.section()["audits"] == 2

    bench = run(scenario)
    assert bench.changes == 2
    assert [audit.isolated for audit in bench.audits] == [True, True]
    # In the background a look has the interval's share of a CPU, and a survey too.
    assert [budget for _, budget in bench.host.sharing_looks] == [1.0, 1.0]
    assert bench.host.surveys == [1.0, 1.0]
    assert bench.logged == []


def test_a_dear_audit_is_paid_for_by_waiting() -> None:
    async def scenario(bench: Bench) -> None:
        bench.host.sharing_outcomes = [counted(cpu_seconds=5.0)]
        await bench.tick(5)
        assert bench.section()["audits"] == 1
        await bench.tick(490)
        assert bench.section()["audits"] == 1
        await bench.tick(20)
        assert bench.section()["audits"] == 2

    run(scenario)


def test_who_asks_after_a_reload_is_told_of_its_domains() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.tick(5)
        bench.config = dataclasses.replace(bench.config, domains=Domains((GOLD,)))
        found: Any = (await bench.watch.document(rounded=False))["domains"]
        assert [one["domain"] for one in found["domains"]] == ["gold", "silver"]
        assert [one["configured"] for one in found["domains"]] == [True, False]

    run(scenario)


def test_without_domains_nothing_is_audited_and_without_a_share_only_for_who_asks() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.tick(20)
        assert bench.host.sharing_looks == []

    assert run(scenario, domains=None).section() is None
    assert run(scenario, share=0.0).section()["audits"] == 0


def test_a_violation_is_logged_once_and_its_end() -> None:
    async def scenario(bench: Bench) -> None:
        bench.host.sharing_outcomes = [SHARED, SHARED]
        await bench.tick(5)
        await bench.tick(101)
        assert bench.logged == [
            ("DOMAIN_NOT_ISOLATED", "domain gold is not isolated: merged frames are shared with other domains"),
            ("DOMAIN_NOT_ISOLATED", "domain silver is not isolated: merged frames are shared with other domains"),
        ]
        await bench.tick(101)
        assert bench.logged[2:] == [
            ("DOMAIN_ISOLATED", "domain gold: isolated"),
            ("DOMAIN_ISOLATED", "domain silver: isolated"),
        ]

    run(scenario)


def test_another_reason_is_logged_again() -> None:
    async def scenario(bench: Bench) -> None:
        bench.host.sharing_outcomes = [SHARED, SHARED]
        await bench.tick(5)
        bench.host.knobs[Knob.MERGE_ACROSS_NODES] = 1
        await bench.tick(101)
        assert len(bench.logged) == 4
        assert "merge_across_nodes is 1" in bench.logged[-1][1]

    run(scenario)


def test_of_many_that_are_domains_of_their_own_one_is_named() -> None:
    async def scenario(bench: Bench) -> None:
        bench.host.sharing_outcomes = [SHARED]
        await bench.tick(5)
        assert bench.logged == [
            (
                "DOMAIN_NOT_ISOLATED",
                "2 that are domains of their own are not isolated: gold: merged frames are shared with other domains",
            )
        ]
        await bench.tick(101)
        assert bench.logged[1:] == [("DOMAIN_ISOLATED", "domains of their own: nothing is shared now")]

    bench = run(scenario, domains=Domains())
    assert bench.section()["others"] == {"domains": 2, "not_isolated": 0, "shared_frames": 0}


def test_an_audit_that_fails_is_told_and_the_last_one_stays() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.tick(5)
        bench.host.survey_outcome = TimedOut("looking at nodes and processes", "its deadline passed")
        await bench.tick(101)
        section = bench.section()
        assert (section["audits"], section["failures"], section["isolated"]) == (1, 1, True)
        assert section["error"] == "looking at nodes and processes: its deadline passed"
        assert section["age_seconds"] > 100
        bench.host.survey_outcome = None
        await bench.tick(101)
        assert (bench.section()["audits"], bench.section()["error"]) == (2, "")

    run(scenario)


def test_other_domains_are_audited_at_once_and_nothing_is_said_of_them_before() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.tick(5)
        other = Domains((Domain("all", units=("*",)),))
        bench.config = dataclasses.replace(bench.config, domains=other)
        assert bench.section()["domains"] == []
        await bench.tick(1)
        assert [one["domain"] for one in bench.section()["domains"]] == ["all"]
        bench.config = dataclasses.replace(bench.config, domains=None)
        await bench.tick(200)
        assert bench.section() is None
        assert len(bench.audits) == 2

    run(scenario)


def test_what_is_out_of_date_is_audited_at_the_next_tick() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.tick(5)
        bench.watch.stale()
        await bench.tick(1)
        assert bench.section()["audits"] == 2
        # With a survey of its own.
        assert len(bench.host.surveys) == 2

    run(scenario)


@pytest.mark.parametrize("domains", [BOTH, None])
def test_a_request_gets_an_audit_that_is_new_enough(domains: Domains | None) -> None:
    async def scenario(bench: Bench) -> None:
        first = await bench.watch.document(rounded=False)
        again = await bench.watch.document(rounded=False)
        assert first["domains"]["domains"] == again["domains"]["domains"]
        assert [one["domain"] for one in first["domains"]["domains"]] == ["gold", "silver"]
        assert [budget for _, budget in bench.host.sharing_looks] == [5.0]
        bench.host.now += 10
        await bench.watch.document(rounded=True)
        assert len(bench.host.sharing_looks) == 2

    run(scenario, domains=domains)


def test_a_request_gets_the_error() -> None:
    async def scenario(bench: Bench) -> None:
        bench.host.survey_outcome = TimedOut("looking at nodes and processes", "its deadline passed")
        with pytest.raises(TimedOut):
            await bench.watch.document(rounded=False)

    assert run(scenario).section()["failures"] == 1


def test_the_mode_says_what_a_report_is_of() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.tick(5)

    section = run(scenario).section()
    assert (section["mode"], section["on_violation"]) == (DomainMode.NODES, "report")
