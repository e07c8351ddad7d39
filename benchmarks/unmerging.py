# SPDX-License-Identifier: GPL-2.0-or-later
"""How long un-merging takes: by `ksmd-ctl set` and `ksmd-ctl unmerge`, beside run=2 on the same contents.

Three shapes: every third page of a few processes (what guests look like), many small processes, and pages in a row.
Merged again before each. Uses this host's KSM; every knob is put back.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.transaction import KSM, PROGRAM, knob, ksm

ROUNDS = int(os.environ.get("KSMD_CTL_BENCH_ROUNDS", "3"))

# Each process has PAGES merged pages, STRIDE apart; what lies between has contents of its own.
LOAD = """
import mmap, os, sys
pages, stride = int(sys.argv[1]), int(sys.argv[2])
size = mmap.PAGESIZE
memory = mmap.mmap(-1, pages * stride * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
memory.madvise(mmap.MADV_MERGEABLE)
for page in range(pages * stride):
    if page % stride == 0:
        content = b"%015d\\n" % (page // stride % 512) * 256
    else:
        content = b"%08d%07d\\n" % (os.getpid(), page) * 256
    memory[page * size : (page + 1) * size] = content
print("ready", flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Shape:
    """`pages` merged pages in each of `processes` processes, `stride` pages apart."""

    name: str
    processes: int
    pages: int
    stride: int


SHAPES = (
    Shape("every third page of 10 processes", 10, 20_000, 3),
    Shape("200 small processes", 200, 100, 1),
    Shape("in a row, 10 processes", 10, 20_000, 1),
)


@contextmanager
def load(shape: Shape) -> Iterator[list[subprocess.Popen[bytes]]]:
    processes = []
    try:
        for _ in range(shape.processes):
            command = [sys.executable, "-S", "-c", LOAD, str(shape.pages), str(shape.stride)]
            processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def merge(pages: int) -> None:
    """Wait until everything that is equal is merged."""
    end = time.monotonic() + 120
    knob("run", 1)
    while knob("pages_sharing") + knob("pages_shared") < 0.99 * pages:
        if time.monotonic() > end:
            raise TimeoutError(f"{knob('pages_sharing')} of {pages} pages were merged after 120 s")
        time.sleep(0.1)


def by_hand() -> float:
    """run=2, the knob, run=1; the seconds that run=2 itself took."""
    begin = time.monotonic()
    knob("run", 2)
    seconds = time.monotonic() - begin
    knob("max_page_sharing", 300 - knob("max_page_sharing") % 2)
    knob("run", 1)
    return seconds


def command(*words: str, good: frozenset[int] = frozenset({0})) -> tuple[float, str]:
    """The seconds that a command took, and what it printed."""
    begin = time.monotonic()
    done = subprocess.run([PROGRAM, *words], capture_output=True, text=True, check=False)
    seconds = time.monotonic() - begin
    if done.returncode not in good:
        raise RuntimeError(done.stderr + done.stdout)
    return seconds, done.stdout + done.stderr


def middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def run_shape(shape: Shape, config: Path) -> None:
    pages = shape.processes * shape.pages
    hand, ours, predicted = [], [], []
    with load(shape) as processes:
        for round_ in range(ROUNDS):
            merge(pages)
            hand.append(by_hand())
            merge(pages)
            change = f"max_page_sharing={200 + round_}"
            _, plan = command("set", "--dry-run", "--json", change, "--config", str(config))
            seconds, text = command("set", change, "--config", str(config))
            took = re.search(r", in ([\d.]+) s", text)
            assert took is not None, text
            predicted.append(f"{json.loads(plan)['seconds']:.2f} for {float(took[1]):.2f}")
            ours.append(seconds)
            if os.environ.get("KSMD_CTL_BENCH_VERBOSE"):
                print(text)
        print(f"{shape.name}, {pages:,} merged pages")
        print(f"  run=2         {', '.join(f'{value:.2f}' for value in hand)} s")
        print(f"  ksmd-ctl set  {', '.join(f'{value:.2f}' for value in ours)} s")
        print(f"  predicted     {', '.join(predicted)} s of the change itself")
        print(f"  ratio {middle(ours) / middle(hand):.1f}, {pages / middle(ours):,.0f} pages a second, start to end")
        if shape.stride > 1:
            merge(pages)
            # As `--pid` is used: one process among others. ksmd runs, and may merge some pages again at once: 1.
            words = ("unmerge", "--pid", str(processes[0].pid), "--config", str(config))
            seconds, text = command(*words, good=frozenset({0, 1}))
            found = re.search(r"[\d,]+ pages", text)
            print(f"  unmerge --pid {seconds:.2f} s, {found[0] if found else '?'} of one process")


def run() -> None:
    with ksm() as config:
        for shape in SHAPES:
            run_shape(shape, config)


if __name__ == "__main__":
    if not os.access(KSM / "run", os.W_OK):
        sys.exit("needs root and a kernel with KSM")
    run()
