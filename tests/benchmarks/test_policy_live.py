# SPDX-License-Identifier: GPL-2.0-or-later
"""The policy benchmark on this host's KSM, with tenants of a few MiB: its ruler against frames in page tables."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from array import array
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from benchmarks.policy import guests, stage, thp, traces, watch
from benchmarks.policy.__main__ import main
from benchmarks.policy.cgroups import Group
from benchmarks.policy.contenders import Contender, Place
from benchmarks.policy.figures import Sample, end_share
from benchmarks.policy.host import Alone, guarded
from benchmarks.policy.oracle import HugePages
from benchmarks.policy.pages import PAGE
from benchmarks.policy.script import Event, Kind, Script
from benchmarks.policy.thp import HUGE_PAGES, Memory
from benchmarks.policy.traces import Recipe, Trace
from ksmd_ctl.kernel.pagemap import FILE, FRAME, PRESENT, Pagemap, zero_frame
from ksmd_ctl.kernel.ranges import mappings

pytestmark = pytest.mark.ksm

FILLED = 100
REWRITTEN = 50
FAST = {"run": "1", "pages_to_scan": "2000", "sleep_millisecs": "10", "smart_scan": "0"}


def trace(name: str, *blocks: list[int]) -> Trace:
    """A trace of these contents by number; 0 is that of zeroes."""
    numbers = array("I", [number for block in blocks for number in block])
    contents = [number.to_bytes(8, "little") * (PAGE // 8) for number in range(max(numbers) + 1)]
    return Trace(name, "program", numbers, b"".join(contents))


def block(first: int, equal: int, zeroes: int) -> list[int]:
    """A huge page's contents, of which all but these are unique."""
    return [*range(1, equal + 1), *[0] * zeroes, *range(first, first + HUGE_PAGES - equal - zeroes)]


TRACES = [
    # Half a huge page that is filled up with zeroes, one with much to merge, one with nothing.
    trace("a", block(1000, 300, 100), block(2000, 0, 0), [0] * FILLED),
    trace("b", block(3000, 300, 100), block(4000, 0, 0)),
]
EVENTS = (
    Event(0.5, 0, Kind.ARRIVE, 0, 0),
    Event(1.0, 0, Kind.ARRIVE, 1, 1),
    # What is left after the splits is written with zeroes.
    Event(4.0, 1, Kind.REWRITE, 1, None, tuple(range(REWRITTEN)), (0,) * REWRITTEN),
)


@dataclass
class Quick(Contender):
    """ksmd at full speed; in the end it counts the frames that tenants have."""

    held: int = 0
    frames: int = 0

    def may_be(self, sample: Sample) -> bool:
        return True

    def stop(self, place: Place) -> None:
        found: set[int] = set()
        for pid in map(int, (place.host.tenants.path / "cgroup.procs").read_text().split()):
            with Pagemap(pid) as pagemap:
                for item in mappings(pid):
                    if item.mergeable:
                        for entry in pagemap.read(item.start, (item.end - item.start) // PAGE):
                            if entry & PRESENT and not entry & FILE:
                                self.held += 1
                                found.add(entry & FRAME)
        self.frames = len(found - {zero_frame()})
        super().stop(place)


@pytest.fixture
def needs_ksm() -> None:
    if not os.access("/sys/kernel/mm/ksm/run", os.W_OK):
        pytest.skip("needs root and a kernel with KSM")


@pytest.mark.parametrize("memory", Memory)
def test_what_is_saved_are_frames(
    ksm_host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: Memory
) -> None:
    monkeypatch.setattr(watch, "LEAD_SECONDS", 0.0)
    contender = Quick("quick", "ksmd at full speed", FAST)
    before = thp.settings()
    with guarded(memory) as host:
        assert thp.settings()["enabled"] == ("always" if memory is Memory.ALWAYS else "madvise")
        run = stage.play(contender, Script(1, 8.0, EVENTS), stage.Library(TRACES), Place(host, tmp_path, 8.0, busy=1))
    assert thp.settings() == before

    # A request each 2 ms on each CPU, beside the work of another.
    assert run.latency.requests == 4000 * len(os.sched_getaffinity(0))
    assert 0 < run.latency.p50 <= run.latency.p99 <= run.latency.worst
    assert not host.neighbours.path.exists()

    zeroes = 100 + 100 + HUGE_PAGES + REWRITTEN
    equal = 300 - REWRITTEN
    could = equal + (zeroes if host.zeroes_free else zeroes - -(-zeroes // 256))
    assert (run.steps[-1].pages, run.steps[-1].saving) == (5 * HUGE_PAGES, could)
    assert contender.held == run.steps[-1].pages
    exact = contender.held - contender.frames
    # Another frame or two where zeroes were merged before the rest of the huge page was split, or after.
    assert could - 2 <= exact <= could
    # The interpreters allocate a little meanwhile.
    assert abs(run.samples[-1].saved - exact) <= 64
    assert end_share(run.samples, run.steps) > 0.9
    if memory is Memory.SMALL:
        assert run.huge_pages == HugePages(0, 0, 0, 0)
    else:
        assert run.huge_pages == HugePages(5, 2, 2, 2)
        assert (run.samples[0].huge_pages, run.samples[-1].huge_pages) == (0, 2)


def test_guests_are_measured_in_the_same_way(ksm_host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tenants in their place, as these would take minutes to boot."""
    library = stage.Library(TRACES)

    class Machine:
        def __init__(self, system: object, group: Group, console: Path) -> None:
            tenant = stage.Tenant(library.pool, cast(Alone, SimpleNamespace(memory=Memory.QEMU, tenants=group)))
            tenant.tell(b"F", library.traces[int(console.name[-1])])
            self.process = tenant.process

        def up(self) -> bool:
            return True

    monkeypatch.setattr(watch, "LEAD_SECONDS", 0.0)
    monkeypatch.setattr(guests, "Guest", Machine)
    monkeypatch.setattr(guests, "GUESTS", 2)
    monkeypatch.setattr(guests.image, "fetch", lambda: None)
    with guarded(Memory.QEMU) as host:
        run = guests.play(Quick("quick", "ksmd at full speed", FAST), 8.0, Place(host, tmp_path, 8.0))
    zeroes = 100 + 100 + HUGE_PAGES
    could = 300 + (zeroes if host.zeroes_free else zeroes - -(-zeroes // 256))
    assert [(step.pages, step.saving) for step in run.steps][-1] == (5 * HUGE_PAGES, could)
    assert abs(run.samples[-1].saved - could) <= 64
    assert run.huge_pages == HugePages(5, 2, 2, 2)
    assert len(run.arrivals) == 2


def test_who_is_killed_leaves_the_host_as_it_was(ksm_host: Path) -> None:
    before = thp.settings()
    program = (
        "import sys, time\n"
        "from benchmarks.policy.host import guarded\n"
        "from benchmarks.policy.thp import Memory\n"
        "with guarded(Memory.ALWAYS) as host:\n"
        "    host.ksm.write('pages_to_scan', 77)\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert thp.settings()["enabled"] == "always"
        os.kill(process.pid, signal.SIGKILL)
        # The guardian has it as well, so it ends with that.
        assert process.stdout.read() == ""
    assert thp.settings() == before
    assert (ksm_host / "pages_to_scan").read_text() == "100\n"


@pytest.mark.usefixtures("needs_ksm")
def test_a_comparison_and_its_continuation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole program; it takes the lock itself."""
    monkeypatch.setattr(watch, "LEAD_SECONDS", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tiny = [Recipe("program", "tiny", (f"data = bytes({size} << 20)",), 0) for size in (1, 2)]
    monkeypatch.setattr(traces, "RECIPES", tiny)
    arguments = ["--seconds", "20", "--memory", "qemu", "--output", str(tmp_path / "out"), "--policies"]

    assert main([*arguments, "defaults"]) == 0
    told = capsys.readouterr().out
    assert "runs: 1, 20 s each; about 1 min, until " in told
    assert "before that 2 traces are recorded" in told
    assert "done before" not in told

    assert main([*arguments, "defaults,off", "--resume"]) == 0
    told = capsys.readouterr().out
    assert told.count("done before") == 1
    assert "1 of these runs are done already" in told
    assert "traces are recorded" not in told
    summary = (tmp_path / "out/summary.md").read_text()
    assert summary in told
    assert "\n| off |" in summary
    assert "\n| defaults |" in summary
    assert {path.name for path in (tmp_path / "out").rglob("*")} == {
        *("seed-1-qemu-busy-0", "off.json", "defaults.json"),
        *("seed-1-qemu-busy-0.svg", "summary.md", "summary.json"),
    }
