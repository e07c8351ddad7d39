# SPDX-License-Identifier: GPL-2.0-or-later
"""How long a busy process is stopped while merged memory is un-merged: by a transaction, and by hand with run=2.

The process has merged pages, and a thread of it that writes to these, one after the other, and maps, touches and
unmaps a page of its own each time (findings F11). Once more with a sparse mapping beside: much mergeable address
space with one page in it. Its longest gap between two rounds is the figure, the one without anything going on beside
it. Uses this host's KSM; every knob is put back.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

KSM = Path("/sys/kernel/mm/ksm")
ROOT = Path(__file__).parents[1]
PROGRAM = Path(sys.executable).parent / "ksmd-ctl"
PAGES = int(os.environ.get("KSMD_CTL_BENCH_PAGES", "40000"))
SPARSE_GIB = int(os.environ.get("KSMD_CTL_BENCH_SPARSE_GIB", "128"))
ROUNDS = int(os.environ.get("KSMD_CTL_BENCH_ROUNDS", "3"))
CONTENTS = 64

# It says "ready"; a line on its standard input ends a period, and is answered with the longest gap in it.
BUSY = """
import mmap, sys, threading, time
pages, sparse = int(sys.argv[1]), int(sys.argv[2]) << 30
size = mmap.PAGESIZE
flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
memory = mmap.mmap(-1, pages * size, flags=flags)
memory.madvise(mmap.MADV_NOHUGEPAGE)
memory.madvise(mmap.MADV_MERGEABLE)
for page in range(pages):
    memory[page * size : (page + 1) * size] = b"%015d\\n" % (page % 64) * 256
if sparse:
    # MAP_NORESERVE: nobody has so much memory.
    empty = mmap.mmap(-1, sparse, flags=flags | 0x4000)
    empty.madvise(mmap.MADV_NOHUGEPAGE)
    empty.madvise(mmap.MADV_MERGEABLE)
    empty[sparse - 1] = 1
gap = 0.0
def work():
    global gap
    page, last = 0, time.perf_counter()
    while True:
        # The same byte that is there: contents stay as they are, and the page is written to.
        memory[page * size] = memory[page * size]
        with mmap.mmap(-1, size, flags=flags) as own:
            own[0] = 1
        page = (page + 101) % pages
        gap = max(gap, time.perf_counter() - last)
        # One write in so long a time: else it would un-merge everything by itself.
        time.sleep(0.0005)
        last = time.perf_counter()
threading.Thread(target=work, daemon=True).start()
print("ready", flush=True)
for line in sys.stdin:
    print(gap, flush=True)
    gap = 0.0
"""


class Busy:
    """The busy process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    def longest_gap_seconds(self) -> float:
        """Since it was last asked."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())


@contextmanager
def busy(sparse_gib: int, pages: int = PAGES) -> Iterator[Busy]:
    command = [sys.executable, "-c", BUSY, str(pages), str(sparse_gib)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield Busy(process)
        finally:
            process.kill()


def knob(name: str, value: int | None = None) -> int:
    if value is not None:
        (KSM / name).write_text(str(value))
    return int((KSM / name).read_text())


def merge() -> None:
    """Wait until nearly everything is merged: the busy thread un-merges some all the time."""
    end = time.monotonic() + 60
    knob("run", 1)
    while knob("pages_sharing") < 0.9 * PAGES:
        if time.monotonic() > end:
            raise TimeoutError(f"{knob('pages_sharing')} of {PAGES} pages were merged after 60 s")
        time.sleep(0.05)


def nothing(_: Path) -> None:
    time.sleep(3)


def by_hand(_: Path) -> None:
    knob("run", 2)
    knob("max_page_sharing", 300 - knob("max_page_sharing") % 2)
    knob("run", 1)


def transaction(config: Path) -> None:
    wanted = f"max_page_sharing={200 + knob('max_page_sharing') % 2}"
    done = subprocess.run([PROGRAM, "set", wanted, "--config", config], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr + done.stdout)


@contextmanager
def ksm() -> Iterator[Path]:
    """This host's KSM alone, and a configuration for commands."""
    with (
        open(Path(tempfile.gettempdir()) / "ksmd-ctl-ksm.lock", "w") as lock,
        tempfile.TemporaryDirectory() as folder,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        config = Path(folder) / "ksmd-ctl.toml"
        config.write_text(
            "[limits]\nfloor_bytes = 16777216\nmax_pressure = 1.0\n"
            f'[service]\nsocket = "{folder}/socket"\nstate_directory = "{folder}"\nruntime_directory = "{folder}"\n'
        )
        names = ("pages_to_scan", "sleep_millisecs", "smart_scan", "max_page_sharing", "run")
        before = {name: knob(name) for name in names if (KSM / name).exists()}
        try:
            knob("sleep_millisecs", 10)
            knob("pages_to_scan", 5000)
            if "smart_scan" in before:
                knob("smart_scan", 0)
            yield config
        finally:
            knob("run", 0)
            knob("run", 2)
            for name, value in before.items():
                knob(name, value)


def run() -> None:
    ways: tuple[tuple[str, Callable[[Path], None]], ...] = (
        ("nothing", nothing),
        ("run=2 by hand", by_hand),
        ("ksmd-ctl set", transaction),
    )
    with ksm() as config:
        for sparse_gib in (0, SPARSE_GIB):
            found: dict[str, list[float]] = {name: [] for name, _ in ways}
            with busy(sparse_gib) as process:
                for _ in range(ROUNDS):
                    for name, way in ways:
                        merge()
                        process.longest_gap_seconds()
                        way(config)
                        # The round that it is in counts as well, once that is over.
                        time.sleep(1)
                        found[name].append(process.longest_gap_seconds())
            print(f"{PAGES} merged pages" + (f", and {sparse_gib} GiB with one page in it" if sparse_gib else ""))
            for name, gaps in found.items():
                print(f"  {name:14} longest gap " + ", ".join(f"{gap * 1000:.1f}" for gap in gaps) + " ms")
            middle = {name: sorted(gaps)[len(gaps) // 2] for name, gaps in found.items()}
            print(
                f"  ksmd-ctl set to run=2: {middle['ksmd-ctl set'] / middle['run=2 by hand']:.2f} (of the middle ones)"
            )
