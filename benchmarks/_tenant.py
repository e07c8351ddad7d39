# SPDX-License-Identifier: GPL-2.0-or-later
"""A process of `benchmarks.replay`, which imports little: in an emulated guest that takes long."""

from __future__ import annotations

import mmap
import random
import signal
import sys
import time
from typing import Final

PAGE_SIZE: Final = mmap.PAGESIZE
_ZEROES: Final = 0.10
_COMMON: Final = 0.45
_REWRITTEN: Final = 0.04


def tenant(number: int, pages: int, node: int | None) -> None:
    """Be a process with mergeable memory until SIGTERM; its first line says that all is written."""
    if node is not None:
        from ksmd_ctl.kernel.libnuma import Policy, PolicyMode, set_mempolicy

        set_mempolicy(Policy(PolicyMode.BIND, frozenset({node})))
    memory = mmap.mmap(-1, pages * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    memory.madvise(mmap.MADV_MERGEABLE)
    own = random.Random(number)
    zeroes, common = int(pages * _ZEROES), int(pages * _COMMON)
    for page in range(zeroes, pages):
        # Each common content is in two to eight of them, at a place of its own.
        shared = page < zeroes + common and page % 7 >= number % 4
        source = random.Random(page) if shared else own
        memory[page * PAGE_SIZE : page * PAGE_SIZE + 32] = source.randbytes(32)
    for page in range(zeroes):
        memory[page * PAGE_SIZE] = 0
    print("written", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    while True:
        time.sleep(2)
        for page in range(pages - int(pages * _REWRITTEN), pages):
            memory[page * PAGE_SIZE : page * PAGE_SIZE + 32] = own.randbytes(32)
