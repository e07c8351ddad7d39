# SPDX-License-Identifier: GPL-2.0-or-later
"""Recordings of this host's ksmd at work, replayed: how far the engine's pages_sharing is from the kernel's.

Processes with pages in common come, rewrite some of their pages, and leave. They are recorded three times at once, at
sampling 1:1, 1:8 and 1:64, under each case's knobs. Then each recording is replayed. At last the speed: a made-up hour
of a host of 64 GiB at 1:64.

Uses this host's KSM, alone, and puts every knob back. In a guest with two nodes it has a case for
merge_across_nodes = 0 as well.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

from benchmarks.engine import KSM, ksm_alone
from ksmd_ctl.engine.memory import PAGE_SIZE
from ksmd_ctl.host.fields import FIELDS
from ksmd_ctl.host.knobs import KNOBS
from ksmd_ctl.host.memory import ProcessId, Topology
from ksmd_ctl.host.page_sample import PageLook, ProcessPages, SampledPage
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.recording.reader import Recording
from ksmd_ctl.recording.writer import Writer
from ksmd_ctl.replay.player import Choices, Player

PAGES = int(os.environ.get("KSMD_CTL_BENCH_PAGES", str(1 << 18)))
SECONDS = int(os.environ.get("KSMD_CTL_BENCH_SECONDS", "60"))
RATIOS = tuple(map(int, os.environ.get("KSMD_CTL_BENCH_RATIOS", "1,8,64").split(",")))
#: Seconds between samples; an emulated guest needs more.
EVERY = os.environ.get("KSMD_CTL_BENCH_EVERY", "0.25")
#: Only cases whose name has this.
CASE = os.environ.get("KSMD_CTL_BENCH_CASE", "")
#: Recordings are kept here, and those that are here are replayed again.
KEPT = os.environ.get("KSMD_CTL_BENCH_RECORDINGS", "")
#: What of a CPU each recording's looks may take.
CPU = os.environ.get("KSMD_CTL_BENCH_CPU", "0.3")
#: Pages of the hour, of which the recording has a 64th.
HOUR_PAGES = int(os.environ.get("KSMD_CTL_BENCH_HOUR_PAGES", str(1 << 24)))
TENANTS = 16
MARKS = {"median": 0.03, "largest": 0.10, "hour": 120.0}


@contextmanager
def ended(processes: list[subprocess.Popen[str]]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def tenants(nodes: int) -> Iterator[subprocess.Popen[str]]:
    for number in range(TENANTS):
        node = number % nodes if nodes > 1 else None
        program = f"from benchmarks._tenant import tenant; tenant({number}, {PAGES // TENANTS}, {node})"
        yield subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)


def record(folder: Path, knobs: Mapping[str, int], nodes: int) -> dict[int, Path]:
    """Recordings of ksmd at work under these knobs, by ratio."""
    found = {ratio: folder / f"{ratio}.ksm" for ratio in RATIOS}
    if all(path.exists() for path in found.values()):
        return found
    folder.mkdir(parents=True, exist_ok=True)
    running: list[subprocess.Popen[str]] = []
    with ksm_alone(), ended(running):
        for name, value in knobs.items():
            (KSM / name).write_text(str(value))
        arriving = tenants(nodes)
        for _ in range(TENANTS // 2):
            running.append(next(arriving))
        for process in running:
            assert process.stdout is not None
            process.stdout.readline()
        command = [sys.executable, "-m", "ksmd_ctl.cli.main", "record", "--host", "kernel"]
        command += ["--cpu", CPU, "--every", EVERY]
        recorders = [
            subprocess.Popen([*command, "--for", str(SECONDS), "--sample", f"1:{ratio}", "-o", str(path)])
            for ratio, path in found.items()
        ]
        time.sleep(SECONDS / 8)
        (KSM / "run").write_text("1")
        for _ in range(TENANTS // 2):
            time.sleep(SECONDS / 20)
            running.append(next(arriving))
        time.sleep(SECONDS / 8)
        running[0].terminate()
        running[0].wait()
        for recorder in recorders:
            if recorder.wait():
                raise RuntimeError("a recording failed")
    return found


def difference(path: Path) -> tuple[float, float, float, float]:
    """Of pages_sharing, as a share of the greatest recorded: the median, the largest and when that was.

    And how long the replay took.
    """
    before = time.perf_counter()
    with Recording(path) as recording:
        points = list(Player(recording, Choices({})).play())
    found = [
        (
            int(point.recorded.number("pages_sharing") or 0),
            int(point.replayed.number("pages_sharing") or 0),
            point.recorded.time_seconds,
        )
        for point in points
    ]
    most = max(1, *(recorded for recorded, _, _ in found))
    errors = sorted((abs(recorded - replayed) / most, seconds) for recorded, replayed, seconds in found)
    return errors[len(errors) // 2][0], *errors[-1], time.perf_counter() - before


def made_up_hour(path: Path) -> None:
    """A recording of an hour at 1:64: half of the pages have equals, one of 200 is written from look to look."""
    one_in, chance = 64, random.Random(1)
    pages = HOUR_PAGES // one_in
    processes = [ProcessId(number + 1, 1) for number in range(64)]
    each = pages // len(processes)
    with Writer(path, 0) as writer:
        facts = {"program": "0", "kind": "kernel", "release": "6.18", "profile": "7.2", "page_size_bytes": PAGE_SIZE}
        writer.facts({**facts, "begun": 0.0, "one_in": one_in, "keyed": False, "anonymous": False, "numa": False})
        writer.facts({"seconds": 3600.0, "service": None})
        writer.topology(Topology((), numa=False))
        knobs = {"run": 1, "pages_to_scan": 1000, "sleep_millisecs": 20, "smart_scan": 1}
        readings = {field.name: None for field in FIELDS} | {name: spec.default for name, spec in KNOBS.items()} | knobs
        for second in range(3601):
            counters = {
                "pages_scanned": second * 48_000,
                "ksmd_cpu_seconds": second * 0.05,
                "full_scans": second // 350,
            }
            writer.sample(float(second), Sample(float(second), readings | counters | {"pages_sharing": 0}, {}))  # type: ignore[arg-type]
        memory = {
            process: {
                page << 12: SampledPage(1 + (page % (each // 2) if page < each // 2 else chance.getrandbits(60)), 0)
                for page in range(each)
            }
            for process in processes
        }
        for look in range(60):
            for sampled in memory.values():
                for page in chance.sample(sorted(sampled), each // 200 if look else 0):
                    sampled[page] = SampledPage(chance.getrandbits(60), 0)
            at = look * 60.0
            found = tuple(
                ProcessPages(one, "qemu", at, each * one_in, 0, None, None, dict(memory[one])) for one in processes
            )
            writer.look(PageLook(at, at, 0.0, found), float, lambda _: -1.0)


def run() -> None:
    nodes = len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))
    base = {"pages_to_scan": max(100, PAGES // 400), "sleep_millisecs": 20, "merge_across_nodes": 1}
    cases = {"fixed knobs, smart_scan off": base | {"smart_scan": 0}, "smart_scan on": base | {"smart_scan": 1}}
    if nodes > 1:
        cases["merge_across_nodes = 0"] = base | {"smart_scan": 0, "merge_across_nodes": 0}
    for number, (case, knobs) in enumerate(cases.items()):
        if CASE not in case:
            continue
        if not os.access(KSM / "run", os.W_OK):
            print("no KSM here, or no right to use it: only the speed is shown")
            break
        known = {name: value for name, value in knobs.items() if (KSM / name).exists()}
        with nullcontext(f"{KEPT}/{number}") if KEPT else tempfile.TemporaryDirectory() as folder:
            for ratio, path in record(Path(folder), known, nodes).items():
                median, largest, at, seconds = difference(path)
                print(
                    f"{case}, {PAGES:,} pages at 1:{ratio}: pages_sharing differs by {median:.1%} in the median (mark "
                    f"{MARKS['median']:.0%}), {largest:.1%} at most, at {at:.1f} s (mark {MARKS['largest']:.0%}); "
                    f"{SECONDS} s replayed in {seconds:.1f} s"
                )
    with tempfile.TemporaryDirectory() as folder:
        made_up_hour(Path(folder) / "hour.ksm")
        *_, seconds = difference(Path(folder) / "hour.ksm")
        print(f"an hour of {HOUR_PAGES >> 18} GiB at 1:64: replayed in {seconds:.0f} s (mark {MARKS['hour']:.0f})")
