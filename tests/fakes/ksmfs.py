# SPDX-License-Identifier: GPL-2.0-or-later
"""A tree of files that looks like the sysfs and procfs of a host with KSM.

They are regular files: what is written stays as it was written, so writing has no effects, advisor_mode can't be
given a value that reads back (the kernel adds brackets), and an open file that is removed can still be read. Write
in place (`FakeKsmFs.set`) to change what an open host sees.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

__all__ = ["FILES_6_1", "FILES_6_12", "FakeKsmFs"]

#: /sys/kernel/mm/ksm on 6.1 after boot.
FILES_6_1: Mapping[str, str] = {
    "full_scans": "0",
    "max_page_sharing": "256",
    "merge_across_nodes": "1",
    "pages_shared": "0",
    "pages_sharing": "0",
    "pages_to_scan": "100",
    "pages_unshared": "0",
    "pages_volatile": "0",
    "run": "0",
    "sleep_millisecs": "20",
    "stable_node_chains": "0",
    "stable_node_chains_prune_millisecs": "2000",
    "stable_node_dups": "0",
    "use_zero_pages": "0",
}

#: The same on 6.12.
FILES_6_12: Mapping[str, str] = {
    **FILES_6_1,
    "advisor_max_cpu": "70",
    "advisor_max_pages_to_scan": "30000",
    "advisor_min_pages_to_scan": "500",
    "advisor_mode": "[none] scan-time",
    "advisor_target_scan_time": "200",
    "general_profit": "0",
    "ksm_zero_pages": "0",
    "pages_scanned": "0",
    "pages_skipped": "0",
    "smart_scan": "1",
}

_VMSTAT = """\
nr_free_pages 1000000
nr_anon_pages 5000
pgfault 123456
thp_fault_alloc 7
thp_collapse_alloc 11
thp_collapse_alloc_failed 1
thp_split_page 12
thp_split_page_failed 2
ksm_swpin_copy 13
cow_ksm 14
nr_unstable 0
"""

_PRESSURE = """\
some avg10=0.00 avg60=0.12 avg300=0.00 total=1500000
full avg10=0.00 avg60=0.00 avg300=0.00 total=250000
"""

_NODE_FILE = """\
Node {node} MemTotal:        {total} kB
Node {node} MemFree:         {free} kB
Node {node} MemUsed:         0 kB
"""


class FakeKsmFs:
    """A fake host below a directory.

    :param root: an empty directory; what is passed as the root of sysfs and procfs
    :param files: the files of /sys/kernel/mm/ksm and what they hold, None for a kernel without KSM
    :param nodes: memory of each NUMA node as (total, free) in KiB; empty for a kernel without NUMA
    :param ksmd_pid: ksmd's pid, None where it is not to be seen
    """

    def __init__(
        self,
        root: Path,
        *,
        files: Mapping[str, str] | None = FILES_6_12,
        nodes: Mapping[int, tuple[int, int]] | None = None,
        ksmd_pid: int | None = 37,
        release: str = "6.12.0-fake",
    ) -> None:
        self.root = root
        self.ksm = root / "sys/kernel/mm/ksm"
        self.proc = root / "proc"
        nodes = {0: (8 << 20, 4 << 20)} if nodes is None else nodes
        self.write(self.proc / "sys/kernel/osrelease", f"{release}\n")
        self.write(self.proc / "sys/kernel/random/boot_id", "00000000-0000-4000-8000-000000000001\n")
        self.write(self.proc / "vmstat", _VMSTAT)
        huge = root / "sys/kernel/mm/transparent_hugepage"
        self.write(huge / "hpage_pmd_size", f"{2 << 20}\n")
        self.write(huge / "hugepages-2048kB/stats/split", "12\n")
        self.write(huge / "hugepages-64kB/stats/split", "0\n")
        self.write(self.proc / "pressure/memory", _PRESSURE)
        self.write(self.proc / "pressure/cpu", _PRESSURE)
        total, free = (sum(node[part] for node in nodes.values()) or (8 << 20) >> part for part in (0, 1))
        self.memory(total, free, free)
        self.add_process(1, "systemd", parent=0, command=["/sbin/init"])
        self.add_process(2, "kthreadd", parent=0)
        if ksmd_pid is not None:
            self.ksmd(ksmd_pid)
        if files is not None:
            self.ksm.mkdir(parents=True)
            for name, text in files.items():
                self.set(name, text)
        self.set_nodes(nodes)

    def write(self, path: Path, text: str) -> None:
        """Give a file its text, in place if it is there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")

    def set(self, name: str, value: int | str) -> None:
        """Let a file of /sys/kernel/mm/ksm hold a value."""
        self.write(self.ksm / name, f"{value}\n")

    def text(self, name: str) -> str:
        """What a file of /sys/kernel/mm/ksm holds."""
        return (self.ksm / name).read_text("utf-8").strip()

    def garble(self, name: str, text: str = "garbage") -> None:
        """Let a file of /sys/kernel/mm/ksm hold something that it never would."""
        self.set(name, text)

    def remove(self, name: str) -> None:
        """Take a file of /sys/kernel/mm/ksm away, as on a kernel that lacks it; before a host opens it."""
        (self.ksm / name).unlink()

    def make_unreadable(self, name: str) -> None:
        """Let reading a file of /sys/kernel/mm/ksm fail, for root too: reading a directory is EISDIR."""
        self.make_directory(self.ksm / name)

    def make_directory(self, path: Path) -> None:
        """Put a directory where a file is expected."""
        path.unlink(missing_ok=True)
        path.mkdir()

    def link(self, name: str, target: Path = Path("/dev/full")) -> None:
        """Let another file stand for one of /sys/kernel/mm/ksm; writing /dev/full is ENOSPC."""
        (self.ksm / name).unlink()
        (self.ksm / name).symlink_to(target)

    def memory(self, total_kib: int, free_kib: int, available_kib: int) -> None:
        """Set /proc/meminfo."""
        lines = {"MemTotal": total_kib, "MemFree": free_kib, "MemAvailable": available_kib, "Buffers": 0}
        self.write(self.proc / "meminfo", "".join(f"{name + ':':<15} {kib:>8} kB\n" for name, kib in lines.items()))

    def set_nodes(self, nodes: Mapping[int, tuple[int, int]]) -> None:
        """Let these NUMA nodes be online, with memory as (total, free) in KiB."""
        if not nodes:
            return
        directory = self.root / "sys/devices/system/node"
        for node, (total, free) in nodes.items():
            self.write(directory / f"node{node}/meminfo", _NODE_FILE.format(node=node, total=total, free=free))
        self.write(directory / "online", f"{','.join(map(str, nodes))}\n")

    def ksmd(self, pid: int, *, user_ticks: int = 0, system_ticks: int = 250) -> None:
        """Let ksmd have this pid, and have used so much CPU time."""
        self.add_process(pid, "ksmd", parent=2, user_ticks=user_ticks, system_ticks=system_ticks)

    def add_process(
        self,
        pid: int,
        comm: str,
        *,
        parent: int = 1,
        command: Iterable[str] = (),
        user_ticks: int = 0,
        system_ticks: int = 0,
        start_time_ticks: int = 28,
        uids: tuple[int, int] = (0, 0),
        cpus: str = "0-1",
        policy: int = 0,
        waited_ns: int = 0,
    ) -> None:
        """A process: its stat, schedstat, comm, cmdline, and status with its users and its CPUs."""
        directory = self.proc / str(pid)
        before = f"{pid} ({comm}) S {parent} 0 0 0 -1 2097216 0 0 0 0"
        after = f"0 0 25 5 1 0 {start_time_ticks} 0 0 18446744073709551615" + " 0" * 15 + f" {policy}" + " 0" * 11
        self.write(directory / "stat", f"{before} {user_ticks} {system_ticks} {after}\n")
        self.write(directory / "schedstat", f"{10**7 * (user_ticks + system_ticks)} {waited_ns} 12\n")
        self.write(directory / "comm", f"{comm[:15]}\n")
        users = f"{uids[0]}\t{uids[1]}\t{uids[1]}\t{uids[1]}"
        self.write(directory / "status", f"Name:\t{comm[:15]}\nUid:\t{users}\nCpus_allowed_list:\t{cpus}\n")
        self.write(directory / "cmdline", "".join(f"{word}\0" for word in command))
