# SPDX-License-Identifier: GPL-2.0-or-later
"""Counting the zero pages of a GiB beside reading its pagemap and looking for them there, with what memory may hold."""

from __future__ import annotations

import mmap
import os
import statistics
import time
from collections.abc import Callable
from unittest import mock

from ksmd_ctl.errors import Absent
from ksmd_ctl.host.memory import Range
from ksmd_ctl.kernel import syscalls
from ksmd_ctl.kernel.detection import open_reader
from ksmd_ctl.kernel.pagemap import Pagemap, zero_frame
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.split_blocks import BlockPages
from ksmd_ctl.kernel.zero_pages import count_zero_pages

ROUNDS = 5
BYTES = 1 << 30
PAGES = BYTES // PAGE_SIZE


def fill(memory: mmap.mmap, step: int, count: int) -> None:
    """Have `count` of each `step` pages written, and all others of these only read."""
    memory.madvise(mmap.MADV_DONTNEED)
    for page in range(PAGES):
        place = page * PAGE_SIZE
        if page % step < count:
            memory[place] = 1
        else:
            memory[place]


def nothing(memory: mmap.mmap) -> None:
    memory.madvise(mmap.MADV_DONTNEED)


KINDS: dict[str, Callable[[mmap.mmap], None]] = {
    "nothing in it": nothing,
    "all written": lambda memory: fill(memory, 1, 1),
    "a fifth zero pages": lambda memory: fill(memory, 5, 4),
    "every second a zero page": lambda memory: fill(memory, 2, 1),
    "all zero pages": lambda memory: fill(memory, 1, 0),
}


def seconds(count: Callable[[], int]) -> tuple[float, int]:
    start = time.process_time()
    found = count()
    return time.process_time() - start, found


def by_blocks(ranges: list[Range], zero_pages: int) -> None:
    """What it costs a walk of page tables to count merged and zero pages in blocks of 2 MiB as well."""
    with open_reader() as reader:

        def walk(zero_pages: int | None) -> Callable[[], int]:
            def count() -> int:
                blocks = BlockPages(zero_frame())
                for window in reader.windows(os.getpid(), ranges):
                    window.merged()
                    if zero_pages is not None:
                        blocks.add(window, zero_pages)
                return blocks.figures().count

            return count

        pairs = [(seconds(walk(zero_pages))[0], seconds(walk(None))[0]) for _ in range(ROUNDS)]
        mine, theirs = (statistics.median(column) * 1000 for column in zip(*pairs, strict=True))
        print(f"walk of it: {theirs:.1f} ms of CPU, with counts by block {mine:.1f} ms; ratio {mine / theirs:.2f}")


def run() -> None:
    with mmap.mmap(-1, BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory, Pagemap(os.getpid()) as pagemap:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        start = syscalls.address_of(memory)
        ranges = [Range(start, start + BYTES, frozenset({"mg"}))]

        def ours() -> int:
            return count_zero_pages(pagemap, ranges, 0).mapped

        def peer() -> int:
            with mock.patch.object(pagemap, "scan", side_effect=Absent("pages", "as before 6.7")):
                return count_zero_pages(pagemap, ranges, PAGES).mapped

        for name, prepare in KINDS.items():
            prepare(memory)
            try:
                found = ours()
            except Absent as error:
                print(f"zero pages: {error}")
                return
            assert peer() == found
            # In turns: the machine's mood changes within seconds.
            pairs = [(seconds(ours)[0], seconds(peer)[0]) for _ in range(ROUNDS)]
            mine, theirs = (statistics.median(column) * 1000 for column in zip(*pairs, strict=True))
            print(
                f"1 GiB, {name}: {found:,} found in {mine:.2f} ms of CPU; by pagemap {theirs:.1f} ms; "
                f"ratio {theirs / mine:.1f} (mark 1.0)"
            )
            by_blocks([Range(start, start + BYTES, frozenset({"mg"}), anonymous_pages=PAGES)], found)
