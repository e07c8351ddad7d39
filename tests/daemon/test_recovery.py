# SPDX-License-Identifier: GPL-2.0-or-later
"""Recovery of duplicate KSM pages by the service, on the simulated host: the gain, and that nothing is lost by it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksmd_ctl.config.loader import load
from ksmd_ctl.config.model import PolicyName
from ksmd_ctl.daemon.log import Log
from ksmd_ctl.daemon.recovery import DuplicatesWatch
from ksmd_ctl.engine.host import EngineHost, open_engine_host
from ksmd_ctl.engine.memory import PAGE_SIZE
from ksmd_ctl.errors import Denied
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.memory import ProcessId
from tests.daemon.watching import Watching, watched
from tests.engine.lab import CHAINS
from tests.engine.scenario_runner import content
from tests.engine.validate import validate
from tests.fakes.host import FakeHost

Where = tuple[ProcessId, int, int]


def machine(profile: str, limit: int = 256, smart_scan: int = 1) -> EngineHost:
    host = open_engine_host(profile, 2, demo=False, source=None)
    features = host.machine.ksm.profile
    host.set(Knob.MERGE_ACROSS_NODES, 0)
    host.set(Knob.PAGES_TO_SCAN, 20_000)
    host.set(Knob.SLEEP_MILLISECS, 100)
    if features.chains:
        host.set(Knob.MAX_PAGE_SHARING, limit)
    if features.smart_scan:
        host.set(Knob.SMART_SCAN, smart_scan)
    return host


def fill(host: EngineHost, name: str, labels: list[str], node: int | None) -> Where:
    process = host.spawn(name)
    start = host.map(process, len(labels), node)
    host.advise(process, start, len(labels), mergeable=True)
    host.store(process, start, [content(label) for label in labels])
    return process, start, len(labels)


def move(host: EngineHost, where: Where, node: int) -> None:
    """One address for each frame, as everybody has to (findings F4)."""
    process, start, pages = where
    frames: dict[int, int] = {}
    for index, state in enumerate(host.pages(process, start, pages)):
        if state.frame is not None:
            frames.setdefault(state.frame, start + index * PAGE_SIZE)
    host.move_pages(process, list(frames.values()), node, shared=True)


def counts(host: EngineHost) -> tuple[int, int]:
    sample = host.sample()
    return int(sample.number("pages_shared") or 0), int(sample.number("pages_sharing") or 0)


class Bench(Watching):
    """The watch, with a configuration and a log."""

    def __init__(self, host: Any, allowed: bool = True) -> None:
        super().__init__(host)
        self.config = dataclasses.replace(
            load("/dev/null"),
            policy=PolicyName.FIXED,
            heal_twins=allowed,
            census_interval=20.0,
            census_cpu_share=0.01,
            floor_bytes=0,
        )
        self.busy = False
        self.log: list[str] = []
        self.watch = DuplicatesWatch(
            host,
            self.tasks,
            Log(lambda text, _: self.log.append(text)),
            lambda: self.config,
            self.changed,
            lambda: self.busy,
        )

    @property
    def section(self) -> Any:
        return self.watch.section(self.host.clock(), {})


def run(host: Any, scenario: Callable[[Bench], Coroutine[Any, Any, None]], allowed: bool = True) -> Bench:
    return watched(lambda: Bench(host, allowed), scenario, 300)


def met(profile: str, contents: int, smart_scan: int = 1) -> tuple[EngineHost, Where, Where]:
    """F1, larger: each content twice on each node, then all of it on one."""
    host = machine(profile, smart_scan=smart_scan)
    labels = [f"content {number}" for number in range(contents) for _ in range(2)]
    moved = fill(host, "moved", labels, None)
    there = fill(host, "there", labels, 1)
    host.set(Knob.RUN, 1)
    host.advance(3)
    assert counts(host) == (2 * contents, 2 * contents)
    move(host, moved, 1)
    host.advance(3)
    return host, moved, there


@pytest.mark.parametrize("profile", CHAINS)
def test_thousands_of_migrated_twins_come_to_what_the_seed_meant(profile: str) -> None:
    contents = 1100
    seed, _, _ = met("seed", contents)
    seed.advance(10)
    wanted = counts(seed)
    assert wanted == (contents, 3 * contents)
    host, moved, there = met(profile, contents)
    before = [host.load(*where) for where in (moved, there)]
    host.advance(60)
    # By itself it never comes.
    assert counts(host) == (2 * contents, 2 * contents)

    async def scenario(bench: Bench) -> None:
        for _ in range(120):
            await bench.tick()
            if counts(host) == wanted:
                break
        await bench.tick(20)

    bench = run(host, scenario)
    assert counts(host) == wanted
    assert [host.load(*where) for where in (moved, there)] == before
    section = bench.section
    assert (section["unrealised"], section["healed_pages"]) == ({"twins": 0}, contents)
    assert section["unmerged_pages"] == 2 * contents
    assert section["rounds"] >= 2
    assert bench.log[0] == "duplicate KSM pages: un-merging 1,024 pages brought 512 of 512 pages"
    validate(host.machine)
    # And that is the end of it: a chain with one dup that older kernels keep is no twin.
    looks = section["looks"]

    async def later(again: Bench) -> None:
        await again.tick(100)

    assert run(host, later).section["looks"] <= 1
    assert looks <= section["rounds"] + 1


def test_a_page_that_two_processes_map_leaves_both_before_ksmd_comes_by_again() -> None:
    """Else it merges who was first onto the page that the other one still maps, and nothing comes free."""
    host = machine("7.2")
    labels = [f"content {number}" for number in range(300)]
    moved, *_ = [fill(host, f"p{number}", labels, number % 2 or None) for number in range(4)]
    host.set(Knob.RUN, 1)
    host.advance(3)
    move(host, moved, 1)
    host.advance(3)
    assert counts(host) == (600, 600)

    async def scenario(bench: Bench) -> None:
        await bench.tick(30)

    section = run(host, scenario).section
    assert counts(host) == (300, 900)
    assert (section["rounds"], section["unmerged_pages"], section["healed_pages"]) == (1, 600, 300)


def test_where_it_is_not_allowed_the_loss_is_counted_and_stays() -> None:
    host, _, _ = met("6.12", 300)

    async def scenario(bench: Bench) -> None:
        await bench.tick(60)

    bench = run(host, scenario, allowed=False)
    assert bench.section["unrealised"] == {"twins": 300}
    assert bench.section["unmerged_pages"] == 0
    assert bench.changes >= 1
    assert counts(host) == (600, 600)


def test_full_pages_are_left_alone() -> None:
    host = machine("7.2", limit=2)
    fill(host, "p", ["x"] * 500, None)
    host.set(Knob.RUN, 1)
    host.advance(5)
    before = counts(host)

    async def scenario(bench: Bench) -> None:
        await bench.tick(300)

    section = run(host, scenario).section
    assert (section["unrealised"], section["unmerged_pages"], counts(host)) == ({"twins": 0}, 0, before)


def test_it_stops_while_somebody_else_moves_pages() -> None:
    host, _, _ = met("6.12", 1000)

    async def scenario(bench: Bench) -> None:
        bench.busy = True
        await bench.tick(60)
        assert bench.section["looks"] == 0
        bench.busy = False
        await bench.tick(60)

    assert run(host, scenario).section["healed_pages"] == 1000


def test_pages_written_to_meanwhile_are_no_harm() -> None:
    host, moved, _there = met("7.2", 1000)
    process, start, pages = moved

    async def scenario(bench: Bench) -> None:
        for number in range(60):
            await bench.tick()
            host.store(process, start + PAGE_SIZE * (number % pages), [content(f"own {number}")])

    run(host, scenario)
    found = host.load(process, start, pages)
    assert found[:60] == tuple(content(f"own {number}") for number in range(60))
    assert found[60:] == tuple(content(f"content {number // 2}") for number in range(60, pages))
    validate(host.machine)


Steps = list[tuple[str, int, int]]


@settings(max_examples=40)
@given(
    st.sampled_from(CHAINS),
    st.integers(2, 20),
    st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=12), min_size=2, max_size=4),
    st.lists(
        st.tuples(st.sampled_from(["move", "discard", "write", "fork", "wait"]), st.integers(0, 3), st.integers(0, 11)),
        max_size=10,
    ),
)
def test_healing_never_changes_contents_and_never_ends_with_more_frames(
    profile: str, limit: int, regions: list[list[int]], steps: Steps
) -> None:
    ends = []
    for allowed in (False, True):
        host = machine(profile, limit=limit, smart_scan=0)
        places = [
            fill(host, f"p{number}", [f"content {label}" for label in labels], number % 2 or None)
            for number, labels in enumerate(regions)
        ]
        host.set(Knob.RUN, 1)
        host.advance(2)
        move(host, places[0], 1)
        host.advance(2)
        for kind, which, index in steps:
            where = places[which % len(places)]
            process, start, pages = where
            address = start + PAGE_SIZE * (index % pages)
            match kind:
                case "move":
                    move(host, where, index % 2)
                case "discard":
                    host.discard(process, address, 1)
                case "write":
                    host.store(process, address, [content(f"content {index % 4}")])
                case "fork":
                    places.append((host.fork(process, "child"), start, pages))
                case "wait":
                    host.advance(1)
        before = [host.load(*where) for where in places]

        async def scenario(bench: Bench, host: EngineHost = host) -> None:
            await bench.tick(120)

        bench = run(host, scenario, allowed=allowed)
        host.advance(20)
        validate(host.machine)
        assert [host.load(*where) for where in places] == before
        frames = {state.frame for where in places for state in host.pages(*where)} - {None, -1}
        ends.append((len(frames), bench.section))
    (without, counted), (with_healing, healed) = ends
    assert with_healing <= without
    assert counted["unmerged_pages"] == 0
    if healed["healed_pages"]:
        assert healed["unmerged_pages"]


# -- a host that fails -----------------------------------------------------------------------------------------


def test_a_host_that_can_not_look_is_told_of() -> None:
    host = FakeHost({Knob.MERGE_ACROSS_NODES: 0, Knob.RUN: 1})
    host.counters |= {"stable_node_dups": 8, "stable_node_chains": 4}
    host.duplicate_ksm_pages_outcomes = [Denied("pages of process 1", "not ours", hint="be root")] * 2

    async def scenario(bench: Bench) -> None:
        await bench.tick(40)

    section = run(host, scenario).section
    assert (section["failures"], section["unrealised"]) == (2, {"twins": None})
    assert "not ours" in section["text"]
    assert host.duplicate_ksm_pages_looks == [(0.2, 1024)] * 2
