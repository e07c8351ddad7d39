# SPDX-License-Identifier: GPL-2.0-or-later
"""What a process is to KSM, and why: found out by reading, before anything touches it.

Sources: mm/ksm.c:vma_ksm_compatible (which mappings merge), fs/proc/task_mmu.c:show_smap_vma_flags (VmFlags),
drivers/vfio (pins all memory of a guest that has a device), fs/userfaultfd.c, and QEMU's migration/ for the
names of its threads (they are shown where it runs with debug-threads=on, as libvirt and Proxmox start it).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ksmd_ctl.figures import bytes_text
from ksmd_ctl.host.memory import ProcessClass, Range
from ksmd_ctl.kernel.proc_pid import printable

#: Below this a mapping is not a machine's memory but something beside it.
_LARGE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Evidence:
    """What classes are told from.

    :ivar descriptors: where the links in /proc/PID/fd point
    :ivar threads: the threads' names
    :ivar merge_any: prctl(PR_SET_MEMORY_MERGE) is on; None where this kernel doesn't tell
    :ivar pinned_bytes: VmPin in /proc/PID/status
    :ivar machine: it is a virtual machine's monitor
    """

    ranges: Sequence[Range]
    command: Sequence[str] = ()
    descriptors: frozenset[str] = frozenset()
    threads: frozenset[str] = frozenset()
    merge_any: bool | None = None
    pinned_bytes: int = 0
    machine: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """The classes of a process, and why it has them, as one phrase."""

    classes: frozenset[ProcessClass]
    reason: str


_SHARED_NAMES = re.compile(r"/memfd:|/dev/shm/|/dev/zero |/SYSV|/run/.*hugepages")
_VFIO = re.compile(r"/dev/vfio/(?!vfio$)|anon_inode:\[vfio")
_SECRETS = ("sev-guest", "sev-snp-guest", "tdx-guest", "s390-pv-guest", "pef-guest")
_SECRET_MEMORY = re.compile(r"anon_inode:\[?(?:kvm-gmem|guest_memfd)\]?")
# QEMU before and since 9.1: migration/migration.c, multifd.c, postcopy-ram.c.
_MIGRATION_THREADS = re.compile(
    r"live_migration|mig/(?:src|dst)/.*|multifd(?:send|recv)_\d+|postcopy/.*|bg_snapshot|mig/snapshot"
)


def classify(evidence: Evidence) -> Verdict:
    """The classes of a process; never empty."""
    found: dict[ProcessClass, str] = {}
    ranges = evidence.ranges
    if evidence.merge_any:
        found[ProcessClass.MERGEABLE] = "all of its memory by prctl(PR_SET_MEMORY_MERGE)"
    elif size := _bytes(item for item in ranges if "mg" in item.flags):
        # Before 6.14 a kernel doesn't say whether it was prctl (MemoryKSM=, or inherited).
        by = "madvise or prctl" if evidence.merge_any is None else "madvise(MADV_MERGEABLE)"
        found[ProcessClass.MERGEABLE] = f"{bytes_text(size)} by {by}"
    huge = _bytes(item for item in ranges if "ht" in item.flags)
    if huge:
        found[ProcessClass.HUGETLB] = _hugetlb(huge)
    shared = _bytes(item for item in ranges if _shared(item))
    if shared >= _LARGE_BYTES:
        found[ProcessClass.SHARED] = _shared_memory(shared)
    devices = [name for name in evidence.descriptors if _VFIO.match(name)]
    devices += [item.name for item in ranges if _VFIO.match(item.name)]
    if devices:
        found[ProcessClass.PINNED] = (
            f"its memory is pinned for a device (VFIO: {printable(min(devices))}), so it can't be merged or moved"
        )
    elif evidence.pinned_bytes:
        found[ProcessClass.PINNED] = (
            f"{bytes_text(evidence.pinned_bytes)} are pinned (VmPin), so they can't be merged or moved"
        )
    watched = _bytes(item for item in ranges if item.flags & {"um", "uw", "ui"})
    if watched:
        found[ProcessClass.USERFAULTFD] = (
            f"userfaultfd watches {bytes_text(watched)}: a write from outside would wait for its handler"
        )
    elif any(name == "anon_inode:[userfaultfd]" for name in evidence.descriptors):
        found[ProcessClass.USERFAULTFD] = "it holds a userfaultfd, and may register memory at any moment"
    if evidence.machine:
        threads = sorted(name for name in evidence.threads if _MIGRATION_THREADS.fullmatch(name))
        if threads:
            found[ProcessClass.MIGRATING] = f"it is being migrated or saved (thread {printable(threads[0])})"
        elif "-incoming" in evidence.command and ProcessClass.USERFAULTFD in found:
            found[ProcessClass.MIGRATING] = "it is the target of a post-copy migration"
    if secret := _secret(evidence):
        found[ProcessClass.ENCRYPTED] = f"{secret}: no two of its pages look alike to KSM"
    if ProcessClass.MERGEABLE not in found:
        found[ProcessClass.NOT_ELIGIBLE] = _why_not(found, evidence)
    return Verdict(frozenset(found), "; ".join(found.values()))


def never_merged(shared_bytes: int, hugetlb_bytes: int) -> Verdict | None:
    """The classes of a process without mergeable memory that has much of a kind which KSM never merges; None without.

    :param shared_bytes: RssShmem in /proc/PID/status, and `hugetlb_bytes` HugetlbPages
    """
    found: dict[ProcessClass, str] = {}
    if hugetlb_bytes:
        found[ProcessClass.HUGETLB] = _hugetlb(hugetlb_bytes)
    if shared_bytes >= _LARGE_BYTES:
        found[ProcessClass.SHARED] = _shared_memory(shared_bytes)
    if not found:
        return None
    found[ProcessClass.NOT_ELIGIBLE] = "nothing else of it is mergeable"
    return Verdict(frozenset(found), "; ".join(found.values()))


def _hugetlb(count: int) -> str:
    return f"{bytes_text(count)} of hugetlbfs pages, which KSM does not merge"


def _shared_memory(count: int) -> str:
    return (
        f"{bytes_text(count)} of shared memory (memfd, share=on, tmpfs), which KSM does not merge: MADV_MERGEABLE "
        "succeeds there and does nothing"
    )


def _bytes(ranges: Iterable[Range]) -> int:
    return sum(item.end - item.start for item in ranges)


def _shared(item: Range) -> bool:
    # VM_SHARED with a name of memory, not of a file that is mapped for reading.
    return "sh" in item.flags and "ht" not in item.flags and _SHARED_NAMES.match(item.name) is not None


def _secret(evidence: Evidence) -> str:
    for word in evidence.command if evidence.machine else ():
        kind = word.partition(",")[0].removeprefix("{").strip()
        for secret in _SECRETS:
            if kind == secret or f'"qom-type":"{secret}"' in word:
                return f"its memory is encrypted ({secret})"
    if any(_SECRET_MEMORY.match(name) for name in evidence.descriptors):
        return "its memory is private to the guest (guest_memfd)"
    return ""


def _why_not(found: dict[ProcessClass, str], evidence: Evidence) -> str:
    others = [kind for kind in (ProcessClass.SHARED, ProcessClass.HUGETLB) if kind in found]
    if others:
        return "nothing else of it is mergeable"
    if "mem-merge=off" in ",".join(evidence.command).split(","):
        return "it was started with mem-merge=off"
    return "nothing of it is mergeable: neither madvise nor prctl asked for it"
