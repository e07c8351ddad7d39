# SPDX-License-Identifier: GPL-2.0-or-later
"""One neighbour of the tenants: a process without mergeable memory. It imports nothing of the project.

`busy`: it takes all of a CPU that it gets. `latency`: it serves requests and measures how long they take.

Requests come every 2 ms, whether the last one is served or not: the timetable is fixed in advance, so a request that
had to wait behind a late one counts with its whole wait (no coordinated omission). One needs about 0.2 ms: checksums of
another part of 4 MiB each time, so that it feels lost caches and memory bandwidth, and as long a loop. It keeps to one
CPU, as the virtual CPUs of latency-sensitive guests are pinned (libvirt's vcpupin, OpenStack's cpu_policy=dedicated):
it can't evade ksmd, and what is measured is not the scheduler's choice of a CPU.
"""

import ctypes
import gc
import os
import signal
import sys
import time
import zlib
from array import array

PERIOD_NS = 2_000_000
#: Bytes whose checksum is taken at once, times a request, and steps of the loop.
PART, PARTS, STEPS = 64 << 10, 4, 3500
DATA_BYTES = 4 << 20
_PR_SET_PDEATHSIG, _PR_SET_TIMERSLACK = 1, 29


def main(kind: str, cpu: int, parent: int) -> None:
    """Work until the end. `latency`: on the standard input come the time of the first request (CLOCK_MONOTONIC, ns)
    and how many there are; on the standard output their latencies in ns, eight bytes each.
    """
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    while kind == "busy":
        pass
    os.sched_setaffinity(0, {cpu})
    # A sleep ends when it should, not up to 50 us later.
    prctl(_PR_SET_TIMERSLACK, 1)
    data = memoryview(os.urandom(DATA_BYTES))
    parts = [data[at : at + PART] for at in range(0, DATA_BYTES, PART)]
    first, count = map(int, sys.stdin.readline().split())
    sys.stdout.buffer.write(serve(first, count, parts))


def serve(first: int, count: int, parts: "list[memoryview]") -> "array[int]":
    """The latency of each request: from when it came, by the timetable, until it was served."""
    found = array("Q", bytes(8 * count))
    clock, sleep, checksum = time.monotonic_ns, time.sleep, zlib.crc32
    gc.disable()
    for number in range(count):
        due = first + number * PERIOD_NS
        if (early := due - clock()) > 0:
            sleep(early / 1e9)
        for part in range(number * PARTS, (number + 1) * PARTS):
            checksum(parts[part % len(parts)])
        for _ in range(STEPS):
            pass
        found[number] = clock() - due
    return found


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
