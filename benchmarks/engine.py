# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine beside this host's ksmd, on the same page contents in the same run: pages per CPU second.

Three kinds of scans: the first pass (checksums only), unique pages in the unstable tree, and pages that are
merged. Then the engine alone: what a page costs in the unstable tree as their number grows, and its memory.
The engine's pages are hashed when they are written, ksmd's when they are scanned; the figure of the first
pass has to be read with that.

Uses this host's KSM for some seconds, alone, and puts every knob back. Without KSM, or without root, only
the engine's own figures are shown.
"""

from __future__ import annotations

import fcntl
import gc
import math
import mmap
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ksmd_ctl.engine.machine import Machine
from ksmd_ctl.engine.memory import PAGE_SIZE

KSM = Path("/sys/kernel/mm/ksm")
PAGES = int(os.environ.get("KSMD_CTL_BENCH_PAGES", str(1 << 17)))
MOST_PAGES = int(os.environ.get("KSMD_CTL_BENCH_MOST_PAGES", str(1 << 20)))
#: What was set as a first goal, in times of ksmd's speed.
MARKS = {"first pass": 0.3, "unstable tree": 0.3, "merged pages": 0.1}
_TAIL = bytes(PAGE_SIZE - 32)


def unique_contents(count: int) -> list[bytes]:
    """Pages that differ within their first 32 bytes."""
    source = random.Random(count)
    return [source.randbytes(32) + _TAIL for _ in range(count)]


# -- ksmd ------------------------------------------------------------------------------------------------------


@contextmanager
def ksm_alone() -> Iterator[None]:
    """This host's KSM for us alone, its knobs put back afterwards."""
    with open(Path(tempfile.gettempdir()) / "ksmd-ctl-ksm.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # run last; what can't be written while the advisor is on, after it.
        names = ("advisor_mode", "merge_across_nodes", "smart_scan", "sleep_millisecs", "pages_to_scan")
        knobs = {name: (KSM / name).read_text() for name in names if (KSM / name).exists()}
        before = int((KSM / "run").read_text())
        # Whoever ends this by a signal gets the knobs back all the same.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        (KSM / "run").write_text("2")
        try:
            yield
        finally:
            (KSM / "run").write_text("0")
            (KSM / "run").write_text("2")
            for name, text in knobs.items():
                active = text[text.index("[") + 1 : text.index("]")] if "[" in text else text
                (KSM / name).write_text(active)
            (KSM / "run").write_text(str(before))


def ksmd_pid() -> int:
    for comm in Path("/proc").glob("[0-9]*/comm"):
        try:
            if comm.read_text() == "ksmd\n":
                return int(comm.parent.name)
        except OSError:
            continue
    raise LookupError("ksmd does not run")


class Ksmd:
    """ksmd, scan by scan: one batch is a full scan, and it is woken for each."""

    def __init__(self, pages: int) -> None:
        self.schedstat = Path(f"/proc/{ksmd_pid()}/schedstat")
        self.sleep = 3_600_000
        for name, value in (("advisor_mode", "none"), ("smart_scan", "0")):
            if (KSM / name).exists():
                (KSM / name).write_text(value)
        (KSM / "pages_to_scan").write_text(str(pages + 10_000))
        (KSM / "sleep_millisecs").write_text(str(self.sleep))

    def cpu_seconds(self) -> float:
        return int(self.schedstat.read_text().split()[0]) / 1e9

    def scan(self) -> float:
        """One full scan; the CPU time that it took."""
        self.wait_until_asleep()
        scans, before = int((KSM / "full_scans").read_text()), self.cpu_seconds()
        if (KSM / "run").read_text() != "1\n":
            (KSM / "run").write_text("1")
        else:
            self.wake()
        for _ in range(12_000):
            if int((KSM / "full_scans").read_text()) > scans:
                self.wait_until_asleep()
                return self.cpu_seconds() - before
            time.sleep(0.005)
        raise TimeoutError("ksmd did not end a scan within a minute")

    def wake(self) -> None:
        self.sleep += 1
        (KSM / "sleep_millisecs").write_text(str(self.sleep))

    def unmerge(self) -> None:
        """run=2; ksmd wakes from its sleep between batches, and waits for run=1."""
        (KSM / "run").write_text("2")
        self.wake()
        self.wait_until_asleep()

    def wait_until_asleep(self) -> None:
        """Until it used no CPU time for a while: woken before it sleeps, it would miss that."""
        used = -1.0
        while (now := self.cpu_seconds()) != used:
            used = now
            time.sleep(0.1)

    def load(self, contents: Sequence[bytes]) -> mmap.mmap:
        """Mergeable memory with these contents."""
        memory = mmap.mmap(-1, len(contents) * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        for index, content in enumerate(contents):
            memory[index * PAGE_SIZE : (index + 1) * PAGE_SIZE] = content
        memory.madvise(mmap.MADV_MERGEABLE)
        return memory


def of_ksmd(unique: Sequence[bytes], pairs: Sequence[bytes]) -> dict[str, float]:
    """CPU seconds of each kind of scan."""
    costs = {}
    with ksm_alone():
        ksmd = Ksmd(len(unique))
        with ksmd.load(unique):
            costs["first pass"] = ksmd.scan()
            costs["unstable tree"] = min(ksmd.scan() for _ in range(2))
        ksmd.unmerge()
        with ksmd.load(pairs):
            for _ in range(3):
                ksmd.scan()
            merged = int((KSM / "pages_sharing").read_text())
            if merged != len(pairs) // 2:
                raise RuntimeError(f"{merged} pages are shared, not {len(pairs) // 2}: somebody else uses KSM")
            costs["merged pages"] = min(ksmd.scan() for _ in range(3))
    return costs


# -- the engine --------------------------------------------------------------------------------------------------


def machine_with(contents: Sequence[bytes]) -> Machine:
    machine = Machine(1, node_pages=1 << 22)
    machine.store("smart_scan", 0)
    pid = machine.spawn("bench")
    start = machine.mmap(pid, len(contents))
    machine.madvise(pid, start, len(contents), mergeable=True)
    for index, content in enumerate(contents):
        machine.write(pid, start + index * PAGE_SIZE, content)
    return machine


def cpu_seconds(work: Callable[[], object]) -> float:
    before = time.process_time()
    work()
    return time.process_time() - before


def of_engine(unique: Sequence[bytes], pairs: Sequence[bytes]) -> dict[str, float]:
    """CPU seconds of each kind of scan."""
    costs = {}
    machine = machine_with(unique)
    costs["first pass"] = cpu_seconds(machine.scan)
    costs["unstable tree"] = min(cpu_seconds(machine.scan) for _ in range(2))
    machine = machine_with(pairs)
    machine.scan(3)
    if machine.ksm.pages_sharing != len(pairs) // 2:
        raise RuntimeError(f"{machine.ksm.pages_sharing} pages are shared, not {len(pairs) // 2}")
    costs["merged pages"] = min(cpu_seconds(machine.scan) for _ in range(3))
    return costs


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def one_size(count: int) -> None:
    """Print CPU seconds and bytes a page in the unstable tree, of so many unique pages."""
    contents = unique_contents(count)
    before = resident_bytes()
    machine = machine_with(contents)
    machine.scan()
    cost = cpu_seconds(machine.scan) / count
    print(cost, (resident_bytes() - before) / count)


def growth() -> None:
    """Cost and memory a page as the number of pages grows, each size in a process of its own."""
    count, first = MOST_PAGES >> 8, 0.0
    while count <= MOST_PAGES:
        program = f"from benchmarks.engine import one_size; one_size({count})"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        cost, each = map(float, done.stdout.split())
        first = first or cost / math.log2(count)
        print(
            f"{count:9,} pages: {cost * 1e6:6.2f} us a page, by log2 n {cost / math.log2(count) / first:5.2f} times "
            f"the first row's; {each:5.0f} bytes of engine a page beside its content"
        )
        count *= 4


def run() -> None:
    unique = unique_contents(PAGES)
    half = unique[: PAGES // 2]
    pairs = half + half
    engine = of_engine(unique, pairs)
    ksmd: dict[str, float] | None = None
    if os.access(KSM / "run", os.W_OK):
        ksmd = of_ksmd(unique, pairs)
    else:
        print("no KSM here, or no right to use it: only the engine's own figures")
    for kind, cost in engine.items():
        line = f"{kind:14} engine {PAGES / cost:12,.0f} pages per CPU second"
        if ksmd is not None:
            ratio = ksmd[kind] / cost
            line += f", ksmd {PAGES / ksmd[kind]:12,.0f}, ratio {ratio:5.2f} (mark {MARKS[kind]})"
        print(line)
    del unique, half, pairs
    growth()
