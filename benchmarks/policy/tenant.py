# SPDX-License-Identifier: GPL-2.0-or-later
"""One tenant: a process with mergeable memory that holds what it is told to.

It is run under a name that ksmtuned takes for a virtual machine's, and imports nothing of the project. On its
standard input come commands: one byte of kind, four bytes of count, then numbers. F: fill so many pages with these
contents. W: first so many places, then what to write there. It answers each with a line. At the input's end it leaves.
Its memory begins at a multiple of 2 MiB, as that of a guest does.
"""

import ctypes
import mmap
import os
import signal
import struct
import sys
from array import array

PAGE = mmap.PAGESIZE
HUGE = 2 << 20
#: For the whole memory, by what pages it gets.
ADVICE = {"qemu": mmap.MADV_HUGEPAGE, "always": None, "small": mmap.MADV_NOHUGEPAGE}
HEADER = struct.Struct("<cI")
_PR_SET_PDEATHSIG = 1


def main(pool: int, parent: int, pages: str) -> None:
    """Serve until nobody asks any more; `pool` is a file of contents, one a page."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    memory, base = None, 0
    while head := sys.stdin.buffer.read(HEADER.size):
        kind, count = HEADER.unpack(head)
        if kind == b"F":
            # Nothing before the base is ever touched.
            memory = mmap.mmap(-1, HUGE + count * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            base = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE
            memory.madvise(mmap.MADV_MERGEABLE, base, count * PAGE)
            if (advice := ADVICE[pages]) is not None:
                memory.madvise(advice, base, count * PAGE)
        assert memory is not None
        places = range(count) if kind == b"F" else numbers(count)
        # Only for so long: it would count as this process's memory.
        with mmap.mmap(pool, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ) as contents:
            for place, content in zip(places, numbers(count), strict=True):
                at = base + place * PAGE
                memory[at : at + PAGE] = contents[content * PAGE : (content + 1) * PAGE]
        sys.stdout.write("done\n")
        sys.stdout.flush()


def numbers(count: int) -> "array[int]":
    found = array("I")
    found.frombytes(sys.stdin.buffer.read(count * found.itemsize))
    return found


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
