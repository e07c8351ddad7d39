# SPDX-License-Identifier: GPL-2.0-or-later
"""Prints, as JSON, what of NUMA and KSM a guest has; needs no more than Python's own library."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import struct
import time
from pathlib import Path
from typing import Any

KSM = Path("/sys/kernel/mm/ksm")
NODES = Path("/sys/devices/system/node")
BLOCKS = Path("/sys/devices/system/memory")
CGROUP = Path("/sys/fs/cgroup/cgroup.controllers")
PAGES = 64
PATIENCE_SECONDS = 60.0
#: Files in /sys/kernel/mm/ksm: the smart scan and the advisor came after 6.1.
KSM_FILES = {"6.1": 14, "6.12": 24}


def main() -> None:
    """Print the facts of this guest."""
    facts = {
        "release": os.uname().release,
        "nodes": {node.name: megabytes(node) for node in sorted(NODES.glob("node[0-9]*"))},
        "cpus": {node.name: (node / "cpulist").read_text().strip() for node in sorted(NODES.glob("node[0-9]*"))},
        "libnuma": libnuma(),
        "kpageflags": kpageflags(),
        "controllers": CGROUP.read_text().split() if CGROUP.exists() else [],
        "ksm_files": len(list(KSM.iterdir())),
        "merged": merged(),
        "removed": removed(),
    }
    print(json.dumps(facts))


def check(found: dict[str, Any], ksm_files: int) -> None:
    """Compare facts with what every guest has; for the tests that read them."""
    # What the kernel keeps for itself lies on whichever node it was put on at random.
    assert all(memory > 100 for memory in found["nodes"].values())
    assert found["libnuma"] == len(found["nodes"]) - 1
    assert found["kpageflags"]
    assert {"cpuset", "memory"} <= set(found["controllers"])
    assert found["ksm_files"] == ksm_files
    assert found["merged"] == PAGES - 1


def megabytes(node: Path) -> int:
    """Return the memory of a node in MiB."""
    line = (node / "meminfo").read_text().splitlines()[0]
    return int(line.split()[-2]) // 1024


def removed() -> dict[str, int]:
    """Take each block of movable memory offline, put it back, and return the MiB of each node that went."""
    block_bytes = int((BLOCKS / "block_size_bytes").read_text(), 16)
    gone: dict[str, int] = {}
    for block in sorted(BLOCKS.glob("memory[0-9]*")):
        if (block / "valid_zones").read_text().split() != ["Movable"]:
            continue
        (block / "state").write_text("offline")
        node = next(block.glob("node[0-9]*")).name
        gone[node] = gone.get(node, 0) + block_bytes // 2**20
        (block / "state").write_text("online_movable")
    return gone


def libnuma() -> int:
    """Return the highest node that libnuma knows of."""
    return int(ctypes.CDLL("libnuma.so.1", use_errno=True).numa_max_node())


def kpageflags() -> bool:
    """Return whether the flags of the first page frame can be read."""
    with open("/proc/kpageflags", "rb") as flags:
        return len(struct.unpack("Q", flags.read(8))) == 1


def merged() -> int:
    """Merge equal pages, un-merge them, and return how many the kernel saved."""
    with mmap.mmap(-1, PAGES * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area.write(b"k" * len(area))
        area.madvise(mmap.MADV_MERGEABLE)
        (KSM / "pages_to_scan").write_text("1000")
        (KSM / "run").write_text("1")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (sharing := saved()) < PAGES - 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        (KSM / "run").write_text("2")
    return sharing


def saved() -> int:
    """Return how many pages are spared because others stand for them."""
    return int((KSM / "pages_sharing").read_text())


if __name__ == "__main__":
    main()
