# SPDX-License-Identifier: GPL-2.0-or-later
"""From each policy to each, by reload and restart: nothing stays pending that nobody asked for, a stop ends it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import pytest

from ksmd_ctl.config.model import STEERED, AtStop, Config, Heal, PolicyName, Want
from ksmd_ctl.daemon.log import Log
from ksmd_ctl.daemon.restore import at_stop
from ksmd_ctl.host.knobs import Knob, KnobValue
from ksmd_ctl.reports.document import part
from tests.daemon.test_loop import Bench
from tests.fakes.host import FakeHost


def configured(policy: PolicyName, knobs: dict[Knob, KnobValue] | None = None, **more: object) -> Config:
    wanted = {knob: Want(value, True) for knob, value in (knobs or {}).items()}
    settings: dict[str, object] = {"policy": policy, "knobs": wanted, "sample_interval": 3600.0, **more}
    return dataclasses.replace(Config(), **settings)  # type: ignore[arg-type]


CONFIGS = {
    "observe": configured(PolicyName.OBSERVE),
    "fixed": configured(PolicyName.FIXED, {Knob.RUN: 1, Knob.PAGES_TO_SCAN: 1000}),
    "fixed, advised": configured(PolicyName.FIXED, {Knob.RUN: 1, Knob.ADVISOR_MODE: "scan-time"}),
    "fixed, healed": configured(
        PolicyName.FIXED, {Knob.SLEEP_MILLISECS: 5}, heal_smart_scan=Heal.ON, heal_swapin=Heal.ON
    ),
    "adaptive": configured(PolicyName.ADAPTIVE),
    "kernel": configured(PolicyName.KERNEL),
    "kubevirt": configured(PolicyName.KUBEVIRT),
    "ksmtuned": configured(PolicyName.KSMTUNED, {Knob.USE_ZERO_PAGES: 1}),
}
ADVISOR = [knob for knob in Knob if knob.value.startswith("advisor_")]


class Host(FakeHost):
    """A host whose advisor moves pages_to_scan, as the kernel's does at the end of each full scan."""

    scans = 0

    def pass_time(self) -> None:
        self.scans += 1
        self.counters["full_scans"] = self.scans
        if self.knobs.get(Knob.ADVISOR_MODE) == "scan-time":
            self.put(Knob.PAGES_TO_SCAN, 600 + self.scans)


HOSTS: dict[str, tuple[dict[Knob, KnobValue], Iterable[Knob]]] = {
    "as booted": ({}, ()),
    "merging": ({Knob.RUN: 1, Knob.PAGES_TO_SCAN: 222, Knob.SMART_SCAN: 0}, ()),
    "un-merged": ({Knob.RUN: 2}, ()),
    "advised": ({Knob.ADVISOR_MODE: "scan-time"}, ()),
    "old": ({}, [*ADVISOR, Knob.SMART_SCAN]),
}


def ticks(bench: Bench, count: int) -> None:
    assert isinstance(bench.host, Host)
    for _ in range(count):
        bench.host.pass_time()
        bench.tick()


def unasked(bench: Bench) -> dict[str, str]:
    """Knobs that are not as anybody wants them, and what is said of them."""
    knobs = part(bench.loop.document(), "knobs")
    return {
        name: f"{part(knobs, name)['state']}: {part(knobs, name)['reason']}"
        for name in knobs
        if part(knobs, name)["state"] not in ("held", "unmanaged") or part(knobs, name)["drift_total"]
    }


def as_before(host: FakeHost, before: dict[Knob, KnobValue]) -> dict[Knob, KnobValue]:
    """What a knob was, where it is something else now and that can be helped."""
    advised = before.get(Knob.ADVISOR_MODE) == "scan-time"
    return {
        knob: value
        for knob, value in before.items()
        if host.knobs[knob] != value
        and not (knob is Knob.PAGES_TO_SCAN and advised)
        and not (knob is Knob.RUN and value == 2 and host.knobs[knob] == 0)
    }


@pytest.mark.parametrize("how", ["reload", "restart"])
@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize(("first", "then"), list(product(CONFIGS, CONFIGS)))
def test_another_policy_leaves_nothing_pending_and_a_stop_ends_all_of_it(
    tmp_path: Path, first: str, then: str, kind: str, how: str
) -> None:
    knobs, lacks = HOSTS[kind]
    host = Host(lacks=lacks)
    for knob, value in knobs.items():
        host.put(knob, value)
    before = dict(host.knobs)
    bench = Bench(tmp_path, {}, host, CONFIGS[first])

    def reloaded() -> None:
        ticks(bench, 6)
        if how == "reload":
            bench.loaded = CONFIGS[then]
            bench.loop.reload()
            settled(bench)

    def settled(bench: Bench) -> None:
        ticks(bench, 6)
        left = unasked(bench)
        if kind == "advised" and then == "fixed":
            # The advisor was on before, and nobody says that it is to be off.
            assert left.keys() <= {"pages_to_scan"}
        elif kind == "old" and "advised" in then:
            assert left.keys() <= {"advisor_mode"}
        else:
            assert left == {}
        if not CONFIGS[then].policy.writes:
            assert as_before(host, before) == {}
        if not CONFIGS[first].policy.steers and how == "reload":
            return
        # What the policy before steered is as this one wants it, or as it was.
        wanted = part(bench.loop.document(), "knobs")
        own = {knob for knob in STEERED if part(wanted, knob).get("wanted") is not None}
        advised = {Knob.PAGES_TO_SCAN} if host.knobs.get(Knob.ADVISOR_MODE) == "scan-time" else set()
        assert as_before(host, before).keys() & STEERED <= own | advised

    bench.run(reloaded)
    if how == "restart":
        # As a unit is restarted or killed: nothing is done at its end.
        bench = Bench(tmp_path, {}, host, CONFIGS[then])
        bench.run(lambda: settled(bench))
    config = bench.loop.config
    assert at_stop(config, AtStop.RESTORE, host, bench.executor, Log(lambda text, fields: None)).keys() <= {Knob.RUN}
    assert as_before(host, before) == {}
    # Only that run was 2 is still known.
    assert bench.executor.journal.entries.keys() <= {Knob.RUN}
