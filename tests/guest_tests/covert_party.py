# SPDX-License-Identifier: GPL-2.0-or-later
"""One of two processes that talk by what is merged: `covert_channel.py` starts it, and tells it what to do by lines of
JSON. {"fill": [N, ...]} makes a mergeable page of each content, {"write": [P, ...]} writes to these pages for the first
time and answers how many nanoseconds each took. Anything else ends it.
"""

from __future__ import annotations

import gc
import json
import mmap
import sys
import time

PAGE = mmap.PAGESIZE


def content(number: int) -> bytes:
    """A page that is like no other number's."""
    return (b"%015d\n" % number) * (PAGE // 16)


def timed(memory: mmap.mmap, pages: list[int]) -> list[int]:
    clock, times = time.perf_counter_ns, []
    for page in pages:
        offset = page * PAGE
        # What reading takes is no part of it.
        assert memory[offset]
        before = clock()
        memory[offset] = 1
        times.append(clock() - before)
    return times


def main() -> None:
    memory = mmap.mmap(-1, PAGE)
    for line in sys.stdin:
        request = json.loads(line)
        if "fill" in request:
            numbers = request["fill"]
            memory = mmap.mmap(-1, PAGE * len(numbers), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_NOHUGEPAGE)
            memory.madvise(mmap.MADV_MERGEABLE)
            for page, number in enumerate(numbers):
                memory[page * PAGE : (page + 1) * PAGE] = content(number)
            answer = []
        elif "write" in request:
            gc.disable()
            answer = timed(memory, request["write"])
        else:
            return
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
