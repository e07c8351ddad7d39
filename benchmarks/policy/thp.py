# SPDX-License-Identifier: GPL-2.0-or-later
"""What pages tenants get, and the host's settings of transparent huge pages (THP) for that.

Source: Documentation/admin-guide/mm/transhuge.rst. QEMU allocates the memory of a guest at a multiple of 2 MiB
(util/oslib-posix.c:qemu_anon_ram_alloc, QEMU_VMALLOC_ALIGN) and calls madvise(MADV_HUGEPAGE) for it
(system/physmem.c:ram_block_add). Tenants do the same with `Memory.QEMU`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from benchmarks.policy.pages import PAGE
from ksmd_ctl.kernel.zero_pages import HUGE_BYTES

__all__ = ["HUGE_PAGES", "Memory", "fault_fallbacks", "restore", "settings", "use"]

#: Pages of a huge page.
HUGE_PAGES = HUGE_BYTES // PAGE

FOLDER = Path("/sys/kernel/mm/transparent_hugepage")
#: As kernels have them after boot (mm/huge_memory.c, mm/khugepaged.c). Not every kernel has all.
DEFAULTS = {
    "enabled": "madvise",
    "defrag": "madvise",
    "shrink_underused": "1",
    "use_zero_page": "1",
    "khugepaged/defrag": "1",
    "khugepaged/pages_to_scan": str(8 * HUGE_PAGES),
    "khugepaged/scan_sleep_millisecs": "10000",
    "khugepaged/alloc_sleep_millisecs": "60000",
    "khugepaged/max_ptes_none": str(HUGE_PAGES - 1),
    "khugepaged/max_ptes_swap": str(HUGE_PAGES // 8),
    "khugepaged/max_ptes_shared": str(HUGE_PAGES // 2),
}


class Memory(StrEnum):
    """What pages tenants get."""

    QEMU = "qemu"
    ALWAYS = "always"
    SMALL = "small"

    @property
    def about(self) -> str:
        """In words."""
        return {
            Memory.QEMU: "huge pages as QEMU asks for them (madvise)",
            Memory.ALWAYS: "huge pages everywhere (THP=always, no madvise)",
            Memory.SMALL: "no huge pages (MADV_NOHUGEPAGE)",
        }[self]


def settings(folder: Path = FOLDER) -> dict[str, str]:
    """The host's settings now; of a choice, what is chosen."""
    found = {}
    for name in DEFAULTS:
        try:
            text = (folder / name).read_text().strip()
        except FileNotFoundError:
            continue
        found[name] = text.partition("[")[2].partition("]")[0] or text
    return found


def use(memory: Memory, folder: Path = FOLDER) -> None:
    """Set the host as these tenants want it; everything else of THP and khugepaged as after boot."""
    always = {"enabled": "always"} if memory is Memory.ALWAYS else {}
    restore({name: text for name, text in (DEFAULTS | always).items() if (folder / name).exists()}, folder)


def restore(values: Mapping[str, str], folder: Path = FOLDER) -> None:
    """Set the host as `settings` found it."""
    for name, text in values.items():
        (folder / name).write_text(text)


def fault_fallbacks(vmstat: Path = Path("/proc/vmstat")) -> int:
    """How often since boot somebody wanted a huge page and got a small one; 0 on kernels without huge pages."""
    found = dict(line.split() for line in vmstat.read_text().splitlines())
    return int(found.get("thp_fault_fallback", 0))
