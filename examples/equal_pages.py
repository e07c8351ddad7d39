#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""A process with equal pages that KSM may merge: examples/equal_pages.py [PAGES]. Ends with Ctrl-C."""

import mmap
import signal
import sys

pages = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
memory = mmap.mmap(-1, pages * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
# Huge pages would have to be split first.
memory.madvise(mmap.MADV_NOHUGEPAGE)
memory.madvise(mmap.MADV_MERGEABLE)
memory.write(b"the same again.\n" * (pages * mmap.PAGESIZE // 16))
print(f"{pages} equal pages, {pages * mmap.PAGESIZE / 2**20:.1f} MiB, mergeable; Ctrl-C ends", flush=True)
try:
    signal.pause()
except KeyboardInterrupt:
    pass
