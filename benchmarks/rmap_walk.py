# SPDX-License-Identifier: GPL-2.0-or-later
"""How long the kernel takes to reclaim a merged page of a process with many mappings (mm/ksm.c:rmap_walk_ksm).

For each mapping of the page the walk visits every mapping of its anon_vma twice. To reclaim one page the kernel walks
to ask whether it was used, and once more, half as long, to take it out of the page tables: three visits. Needs root, a
memory controller of cgroup v1 and zram. Uses this host's KSM; every knob is put back.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.transaction import knob, ksm
from tests.service.swap import ZRAM, swap_device

#: Mappings of the process, mappings of each merged page, and how many such pages are reclaimed.
SHAPES = (
    (1, 256, 20),
    (1000, 256, 10),
    (5000, 16, 20),
    (5000, 64, 10),
    (5000, 256, 5),
    (20_000, 16, 10),
    (20_000, 256, 2),
)
VISITS = 3
CGROUP = Path("/sys/fs/cgroup/memory/ksmd-ctl-bench-rmap")

# Its equal pages alone are charged to the cgroup: what is reclaimed there are the merged pages and little else. Every
# second page of one mapping is made read-only, so that it becomes many mappings with one anon_vma.
LOAD = """
import ctypes, mmap, os, sys
mappings, sharers, pages, cgroup, back = *map(int, sys.argv[1:4]), *sys.argv[4:]
libc = ctypes.CDLL(None, use_errno=True)
size = mmap.PAGESIZE
memory = mmap.mmap(-1, max(mappings, sharers * pages) * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
memory.madvise(mmap.MADV_MERGEABLE)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
contents = [b"%015d\\n" % page * (size // 16) for page in range(pages)]
open(cgroup, "w").write(str(os.getpid()))
for page in range(sharers * pages):
    ctypes.memmove(start + page * size, contents[page // sharers], size)
open(back, "w").write(str(os.getpid()))
for page in range(1, mappings, 2):
    assert libc.mprotect(ctypes.c_void_p(start + page * size), ctypes.c_size_t(size), mmap.PROT_READ) == 0
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def cgroup() -> Iterator[None]:
    CGROUP.mkdir()
    try:
        yield
    finally:
        CGROUP.rmdir()


def swapped_out() -> int:
    match = re.search(r"^pswpout (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    assert match
    return int(match[1])


def reclaim(mappings: int, sharers: int, pages: int) -> tuple[float, int]:
    """CPU seconds to reclaim each of these pages once, and how many pages were swapped out."""
    words = [sys.executable, "-S", "-c", LOAD, *map(str, (mappings, sharers, pages)), str(CGROUP / "cgroup.procs")]
    with subprocess.Popen(
        [*words, str(CGROUP.parent / "cgroup.procs")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            knob("run", 1)
            end = time.monotonic() + 60
            while (merged := knob("pages_shared") + knob("pages_sharing")) < sharers * pages:
                if time.monotonic() > end:
                    raise TimeoutError(f"{merged} of {sharers * pages} pages were merged after 60 s")
                time.sleep(0.05)
            knob("run", 0)
            before, begin = swapped_out(), time.thread_time()
            (CGROUP / "memory.force_empty").write_text("0")
            return time.thread_time() - begin, swapped_out() - before
        finally:
            process.kill()
            process.communicate()
            knob("run", 2)
            knob("run", 0)


def run() -> None:
    if not (ZRAM.exists() and (CGROUP.parent / "memory.force_empty").exists()):
        print("needs zram and a memory controller of cgroup v1")
        return
    with ksm(), swap_device(), cgroup():
        for mappings, sharers, pages in SHAPES:
            # max_page_sharing can only be changed while nothing is merged, which is so at this point.
            knob("max_page_sharing", sharers)
            seconds, out = reclaim(mappings, sharers, pages)
            each = seconds / pages
            print(
                f"{mappings:,} mappings, {sharers} of each page: {each * 1000:.2f} ms for a page, "
                f"{each / (VISITS * sharers * mappings) * 1e9:.0f} ns a visit ({pages} merged pages, {out} swapped out)"
            )
