# SPDX-License-Identifier: GPL-2.0-or-later
"""F1 on a real kernel: thousands of merged pages meet their twins, and what the service makes of it. Inside a guest:

tests/guest/run --kernel 6.12 --nodes 2 -- python -m pytest tests/guest_tests/twins.py
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest

from ksmd_ctl.engine.host import EngineHost, open_engine_host
from ksmd_ctl.engine.memory import PAGE_SIZE
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.operation import Move, finish
from ksmd_ctl.kernel import libnuma
from ksmd_ctl.kernel.topology import read_topology
from ksmd_ctl.privileged.host import open_kernel_host
from ksmd_ctl.scenario.regions import RegionProcess, spawn
from tests.service.running import Service, configure, metrics, service, until

pytestmark = pytest.mark.ksm

NODES = [node.number for node in read_topology(numa=libnuma.available()).with_memory()]

if len(NODES) < 2:
    pytest.skip(f"needs two nodes with memory, and there is {len(NODES)}", allow_module_level=True)

FIRST, SECOND = NODES[:2]
#: Contents that two processes on each of two nodes have: four times as many pages.
CONTENTS = int(os.environ.get("KSMD_CTL_CONTENTS", "4000"))
FEW = 100
#: Emulated, under load.
LIMIT_SECONDS = 900.0
KSM = Path("/sys/kernel/mm/ksm")

FIXED = "policy = 'fixed'\n[knobs]\nrun = 1\npages_to_scan = 5000\nsleep_millisecs = 200\nmerge_across_nodes = 0\n"
ADAPTIVE = "policy = 'adaptive'\n[knobs]\nmerge_across_nodes = 0\n"
LOOKING = "[census]\ninterval = 5\ncpu_share = 0.5\n"
HEALING = "[healing]\ntwins = true\n"


def page(number: int) -> bytes:
    return b"%015d\n" % number * 256


PAGES = [page(number) for number in range(CONTENTS)]


def counts() -> tuple[int, int]:
    return int((KSM / "pages_shared").read_text()), int((KSM / "pages_sharing").read_text())


def scans(count: int) -> None:
    """So many full scans, ksmd running on."""
    wanted = int((KSM / "full_scans").read_text()) + count
    until(f"{count} full scans", lambda: int((KSM / "full_scans").read_text()) >= wanted or None, LIMIT_SECONDS)


@cache
def meant() -> tuple[int, int]:
    """pages_shared and pages_sharing at the end of the same on the engine, by the patch that brought migrate_nodes.

    The engine does it with fewer contents: it has no interpreter's speed to spare in an emulated guest.
    """
    host: EngineHost = open_engine_host("seed", 2, demo=False, source=None)
    host.set(Knob.MERGE_ACROSS_NODES, 0)
    processes = []
    for node in (None, None, 1, 1):
        process = host.spawn("p")
        start = host.map(process, FEW, node)
        host.advise(process, start, FEW, mergeable=True)
        host.store(process, start, PAGES[:FEW])
        processes.append((process, start))
    for step in range(7):
        host.batch(1 << 20)
        if step == 3:
            process, start = processes[0]
            addresses = [start + PAGE_SIZE * number for number in range(FEW)]
            host.move_pages(process, addresses, 1, shared=True)
    sample = host.sample()
    shared, sharing = int(sample.number("pages_shared") or 0), int(sample.number("pages_sharing") or 0)
    assert (shared, sharing) == (FEW, 3 * FEW)
    return CONTENTS, 3 * CONTENTS


class Scene:
    """Four processes with the same contents, two on each of two nodes; all that was merged is on the second now."""

    def __init__(self, stack: ExitStack) -> None:
        self.processes: list[tuple[RegionProcess, int]] = []
        for number, node in enumerate((None, None, SECOND, SECOND)):
            process = stack.enter_context(spawn(f"twin-{number}", FIRST if node is None else node))
            start = process.map(CONTENTS, node)
            process.advise(start, CONTENTS, mergeable=True)
            process.store(start, list(PAGES))
            self.processes.append((process, start))

    def intact(self) -> bool:
        return all(process.load(start, CONTENTS) == tuple(PAGES) for process, start in self.processes)


@pytest.fixture
def scene() -> Iterator[Scene]:
    (KSM / "run").write_text("2")
    (KSM / "merge_across_nodes").write_text("0")
    for name, text in (("pages_to_scan", "5000"), ("sleep_millisecs", "100"), ("smart_scan", "0")):
        if (KSM / name).exists():
            (KSM / name).write_text(text)
    host = open_kernel_host()
    with ExitStack() as stack:
        found = Scene(stack)
        (KSM / "run").write_text("1")
        until("everything to be merged", lambda: counts() == (2 * CONTENTS, 2 * CONTENTS) or None, LIMIT_SECONDS)
        moved = finish(host.move(Move(found.processes[0][0].id, SECOND), LIMIT_SECONDS), LIMIT_SECONDS)
        assert moved.moved == CONTENTS
        until(
            "ksmd to come upon the twins",
            lambda: int((KSM / "stable_node_dups").read_text()) == 2 * CONTENTS or None,
            LIMIT_SECONDS,
        )
        if (KSM / "smart_scan").exists():
            (KSM / "smart_scan").write_text("1")
        yield found
        (KSM / "run").write_text("2")
    host.close()


def unrealised(running: Service) -> float | None:
    return metrics(running.port).get('ksm_unrealised_pages{reason="twins"}')


def test_the_service_alone_brings_what_was_meant(scene: Scene, tmp_path: Path) -> None:
    scans(20)
    # Without it, it never comes.
    assert counts() == (2 * CONTENTS, 2 * CONTENTS)
    with service(tmp_path, FIXED + LOOKING) as running:
        until("the twins to be counted", lambda: unrealised(running) == CONTENTS or None, LIMIT_SECONDS)
        scans(3)
        report = running.status()
        assert report["healing"]["unmerged_pages"] == 0
        assert counts() == (2 * CONTENTS, 2 * CONTENTS)

        begun = time.monotonic()
        configure(tmp_path, FIXED + LOOKING + HEALING)
        running.process.send_signal(signal.SIGHUP)
        until("what was meant", lambda: counts() == meant() or None, LIMIT_SECONDS)
        took = time.monotonic() - begun
        until("the service to know", lambda: unrealised(running) == 0 or None, LIMIT_SECONDS)
        healing = running.status()["healing"]
        assert healing["healed_pages"] == CONTENTS
        scans(3)
        assert counts() == meant()
        assert running.end() == 0
    assert scene.intact()
    chains, dups = ((KSM / name).read_text().strip() for name in ("stable_node_chains", "stable_node_dups"))
    print(
        f"\nF1, {4 * CONTENTS} pages: shared and sharing {2 * CONTENTS, 2 * CONTENTS} -> {counts()}, chains {chains}, "
        f"dups {dups}; {healing['unmerged_pages']} pages un-merged in {healing['rounds']} rounds, {took:.0f} s, "
        f"the last look took {healing['looked_cpu_seconds']:.2f} s of CPU"
    )


def test_it_does_so_under_the_adaptive_policy(scene: Scene, tmp_path: Path) -> None:
    # The policy is to begin with it.
    (KSM / "run").write_text("0")
    with service(tmp_path, ADAPTIVE + LOOKING + HEALING) as running:
        until("what was meant", lambda: counts() == meant() or None, LIMIT_SECONDS)
        until("the service to know", lambda: unrealised(running) == 0 or None, LIMIT_SECONDS)
        healing = running.status()["healing"]
        assert healing["healed_pages"] == CONTENTS
        assert running.end() == 0
    print(f"\nadaptive: {counts()}, {healing['unmerged_pages']} pages un-merged in {healing['rounds']} rounds")
    assert scene.intact()
