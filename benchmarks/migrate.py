# SPDX-License-Identifier: GPL-2.0-or-later
"""Moving unshared pages to another node, beside `migratepages` (package numactl).

It takes two nodes: on a host that has one, it runs itself in an emulated guest, where only the ratio means anything.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from pathlib import Path

from ksmd_ctl.host.operation import Move
from ksmd_ctl.kernel import migrate
from ksmd_ctl.scenario.regions import RegionProcess, spawn

PAGES = 30_000
ROUNDS = 7
ROOT = Path(__file__).parents[1]


def filled(name: str) -> RegionProcess:
    process = spawn(name, 0)
    start = process.map(PAGES)
    for first in range(0, PAGES, 5000):
        contents = [number.to_bytes(4096, "little") for number in range(first, first + 5000)]
        process.store(start + first * 4096, contents)
    process.advise(start, PAGES, mergeable=True)
    return process


def ours(latency_seconds: float) -> float:
    with filled("ours") as process:
        start = time.monotonic()
        result = migrate.move(Move(process.id, 1, latency_seconds=latency_seconds))
        seconds = time.monotonic() - start
    assert result.moved >= PAGES, result
    return PAGES / seconds


def theirs() -> float:
    with filled("theirs") as process:
        start = time.monotonic()
        subprocess.run(["migratepages", str(process.id.pid), "0", "1"], check=True)
        return PAGES / (time.monotonic() - start)


def pair(latency_seconds: float, *, first: bool) -> tuple[float, float]:
    """Pages a second of ours and of theirs, which take turns at being first."""
    if first:
        return ours(latency_seconds), theirs()
    other = theirs()
    return ours(latency_seconds), other


def run() -> None:
    if not Path("/sys/devices/system/node/node1").is_dir():
        guest = [str(ROOT / "tests/guest/run"), "--kernel", "6.12", "--nodes", "2", "--memory", "768"]
        subprocess.run([*guest, "--timeout", "1200", "--", "python", "-m", "benchmarks", "migrate"], check=True)
        return
    for latency_seconds, mark in ((0.0, " (mark 1)"), (0.01, ""), (0.1, "")):
        pairs = [pair(latency_seconds, first=number % 2 == 0) for number in range(ROUNDS)]
        ratio = statistics.median(mine / other for mine, other in pairs)
        name = "no latency budget" if not latency_seconds else f"latency budget {latency_seconds * 1000:.0f} ms"
        mine, other = (statistics.median(column) for column in zip(*pairs, strict=True))
        each = ", ".join(f"{mine / other:.2f}" for mine, other in pairs)
        print(f"{name}: {mine:,.0f} pages/s, migratepages {other:,.0f}; ratio {ratio:.2f}{mark} ({each})")
