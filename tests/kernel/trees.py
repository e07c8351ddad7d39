# SPDX-License-Identifier: GPL-2.0-or-later
"""Fake sysfs and procfs trees for the tests of ksmd_ctl.kernel: the test shows the tree that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

__all__ = ["meminfo", "node", "write_tree", "zone"]


def write_tree(root: Path, files: Mapping[str, str]) -> Path:
    """Write files by their path below root; a text that begins with ``-> `` is a symbolic link's target."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text.startswith("-> "):
            path.symlink_to(text[3:])
        else:
            path.write_text(text)
    return root


def meminfo(number: int, total_kib: int, free_kib: int = 0) -> str:
    """A node's meminfo as drivers/base/node.c prints it."""
    return (
        f"Node {number} MemTotal:       {total_kib:8d} kB\n"
        f"Node {number} MemFree:        {free_kib:8d} kB\n"
        f"Node {number} MemUsed:        {total_kib - free_kib:8d} kB\n"
    )


def node(number: int, cpus: str, total_kib: int, distance: str, free_kib: int = 0) -> dict[str, str]:
    """The files of one node."""
    folder = f"sys/devices/system/node/node{number}"
    return {
        f"{folder}/cpulist": f"{cpus}\n",
        f"{folder}/distance": f"{distance}\n",
        f"{folder}/meminfo": meminfo(number, total_kib, free_kib),
    }


def zone(number: int, name: str, start: int, spanned: int) -> str:
    """A zone in /proc/zoneinfo, with the fields that matter in their places."""
    return (
        f"Node {number}, zone {name:>8}\n"
        f"  pages free     {spanned}\n"
        f"        spanned  {spanned}\n"
        f"        present  {spanned}\n"
        f"  pagesets\n    cpu: 0\n"
        f"  start_pfn:           {start}\n"
    )
