# SPDX-License-Identifier: GPL-2.0-or-later
"""What it costs to count who shares frames with whom, beside reading the page tables and nothing else.

Three shapes of a million merged pages: each frame mapped by 16 processes, by two, and by different sets of processes.
Then half of the time for that, which makes it a sample, and `ksmd-ctl sharing` of 200 processes from start to end. Uses
this host's KSM; every knob is put back.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

from benchmarks.transaction import PROGRAM, knob, ksm
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.operation import finish
from ksmd_ctl.host.sharing import Sharing, figures, pairs
from ksmd_ctl.kernel.proc_pid import start_time_ticks
from ksmd_ctl.kernel.ranges import mappings
from ksmd_ctl.privileged.host import KernelHost, open_kernel_host

PAGES = int(os.environ.get("KSMD_CTL_BENCH_PAGES", str(1 << 20)))
ROUNDS = int(os.environ.get("KSMD_CTL_BENCH_ROUNDS", "5"))
MARK_SECONDS = 1.0
READ_BYTES = 256 << 10

# Pages with contents FIRST, FIRST + STEP and so on.
LOAD = """
import mmap, sys
first, step, pages = map(int, sys.argv[1:])
size = mmap.PAGESIZE
memory = mmap.mmap(-1, pages * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
memory.madvise(mmap.MADV_MERGEABLE)
for page in range(pages):
    memory[page * size : (page + 1) * size] = b"%015d\\n" % (first + page * step) * 256
print("ready", flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Shape:
    """Processes with so many pages each; of each its first content, and how far it is to the next."""

    name: str
    pages: int
    contents: tuple[tuple[int, int], ...]

    @property
    def merged(self) -> int:
        return self.pages * len(self.contents)


def shapes() -> Iterator[Shape]:
    each = PAGES // 16
    yield Shape("each frame mapped by 16", each, ((0, 1),) * 16)
    yield Shape("each frame mapped by 2", each, tuple((process // 2 * each, 1) for process in range(16)))
    # The contents of a process are the multiples of a number: what it has depends on the divisors of the content.
    yield Shape("frames of several sets", each, tuple((0, 1 + process % 5) for process in range(16)))


@contextmanager
def load(shape: Shape) -> Iterator[list[ProcessId]]:
    """The processes, once nearly everything that is equal is merged."""
    processes = []
    try:
        for first, step in shape.contents:
            command = [sys.executable, "-S", "-c", LOAD, str(first), str(step), str(shape.pages)]
            processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        contents = [first + page * step for first, step in shape.contents for page in range(shape.pages)]
        equal = len(contents) - len(set(contents))
        del contents
        end = time.monotonic() + 600
        # What has ended is counted until ksmd comes by, or run is 2.
        knob("run", 2)
        knob("run", 1)
        while knob("pages_sharing") < 0.99 * equal:
            if time.monotonic() > end:
                raise TimeoutError(f"{knob('pages_sharing')} of {equal} pages were merged after 600 s")
            time.sleep(0.2)
        knob("run", 0)
        yield [ProcessId(process.pid, start_time_ticks(process.pid)) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def read_page_tables(processes: Sequence[ProcessId]) -> float:
    """CPU seconds of reading pagemap of all mergeable memory."""
    places = [
        (process.pid, item.start // 4096 * 8, item.end // 4096 * 8)
        for process in processes
        for item in mappings(process.pid)
        if item.mergeable
    ]
    begin = time.process_time()
    for pid, first, last in places:
        with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:
            for offset in range(first, last, READ_BYTES):
                os.pread(file.fileno(), min(READ_BYTES, last - offset), offset)
    return time.process_time() - begin


def count(host: KernelHost, processes: Sequence[ProcessId], budget: float = 3600.0, groups: int = 0) -> Sharing:
    """As the service does it: in a process of its own, with another that reads.

    :param groups: of how many processes side by side; 0: each is its own
    """
    size = len(processes) // groups if groups else 1
    return finish(host.sharing([processes[at : at + size] for at in range(0, len(processes), size)], budget))


def run_shape(shape: Shape) -> None:
    with load(shape) as processes, closing(open_kernel_host()) as host:
        plain, ours = [], []
        found = None
        for _ in range(ROUNDS):
            plain.append(read_page_tables(processes))
            found = count(host, processes)
            ours.append(found.cpu_seconds)
        assert found is not None
        assert found.complete
        begin = time.process_time()
        most = max(pair.frames for pair in pairs(found))
        saved = sum(one.saved_pages for one in figures(found))
        telling = time.process_time() - begin
        middle = statistics.median(ours)
        print(f"{shape.name}: {found.pages:,} merged pages, {len(found.sets):,} sets of groups")
        print(f"  all counted in {middle:.2f} s of CPU (mark {MARK_SECONDS:g}); {min(ours):.2f} to {max(ours):.2f}")
        print(
            f"  reading the page tables alone {statistics.median(plain):.3f} s: {middle / statistics.median(plain):.1f}"
        )
        print(f"  {saved:,.0f} pages saved, at most {most:,} frames of two; told in {telling:.2f} s")
        audits = [count(host, processes, groups=2).cpu_seconds for _ in range(ROUNDS)]
        middle_audit = statistics.median(audits)
        print(f"  the same of two domains, as an audit counts: {middle_audit:.2f} s (mark {MARK_SECONDS:g})")
        part = count(host, processes, middle / 2)
        estimate = max(pair.frames for pair in pairs(part))
        print(f"  half of that time: {part.cpu_seconds:.2f} s, {part.share:.0%} of all frames, at most {estimate:,}")


def run_command(processes: int, pages: int) -> None:
    with load(Shape("", pages, ((0, 1),) * processes)):
        for by in ("unit", "process"):
            begin = time.monotonic()
            command = [str(PROGRAM), "sharing", "--host", "kernel", "--by", by, "--socket", "/nowhere"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            print(f"`sharing --by {by}` of {processes} processes: {time.monotonic() - begin:.2f} s (mark 3)")


def run() -> None:
    with ksm():
        knob("pages_to_scan", 100_000)
        for shape in shapes():
            run_shape(shape)
        run_command(200, 500)
