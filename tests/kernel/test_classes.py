# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import pytest

from ksmd_ctl.host.memory import ProcessClass, Range
from ksmd_ctl.kernel.classes import Evidence, classify

GIB = 1 << 30
QEMU = ("/usr/bin/qemu-system-x86_64",)


def mapping(flags: str, size: int = GIB, name: str = "") -> Range:
    return Range(0x1000, 0x1000 + size, frozenset(flags.split()), name=name)


PRIVATE = mapping("rd wr mg")


@pytest.mark.parametrize(
    ("evidence", "classes", "reason"),
    [
        (Evidence([PRIVATE]), {"mergeable"}, "1.0 GiB by madvise"),
        (Evidence([PRIVATE], merge_any=True), {"mergeable"}, "by prctl"),
        # Which of the two it was is told since 6.14.
        (Evidence([PRIVATE], merge_any=False), {"mergeable"}, "by madvise(MADV_MERGEABLE)"),
        (Evidence([PRIVATE]), {"mergeable"}, "by madvise or prctl"),
        (Evidence([mapping("rd wr")]), {"not eligible"}, "neither madvise nor prctl"),
        (
            Evidence([mapping("rd wr sh ms", name="/memfd:memory (deleted)")]),
            {"shared", "not eligible"},
            "1.0 GiB of shared memory",
        ),
        (Evidence([mapping("rd wr sh", name="/dev/shm/ram"), PRIVATE]), {"shared", "mergeable"}, "tmpfs"),
        (Evidence([PRIVATE, mapping("rd sh", name="/usr/lib/locale")]), {"mergeable"}, "madvise"),
        (Evidence([PRIVATE, mapping("rd wr sh", 4096, "/memfd:wayland")]), {"mergeable"}, "madvise"),
        (Evidence([mapping("rd wr ht")]), {"hugetlb", "not eligible"}, "hugetlbfs"),
        (
            Evidence([PRIVATE], descriptors=frozenset({"/dev/vfio/12", "/dev/vfio/vfio"})),
            {"mergeable", "pinned"},
            "/dev/vfio/12",
        ),
        (Evidence([PRIVATE], descriptors=frozenset({"anon_inode:[vfio-device]"})), {"mergeable", "pinned"}, "VFIO"),
        (Evidence([PRIVATE], descriptors=frozenset({"/dev/vfio/vfio"})), {"mergeable"}, "madvise"),
        (Evidence([PRIVATE, mapping("rd", 4096, "anon_inode:[vfio-device]")]), {"mergeable", "pinned"}, "VFIO"),
        (Evidence([PRIVATE], pinned_bytes=GIB), {"mergeable", "pinned"}, "VmPin"),
        (Evidence([mapping("rd wr mg um")]), {"mergeable", "userfaultfd"}, "userfaultfd watches 1.0 GiB"),
        (Evidence([mapping("rd wr mg uw")]), {"mergeable", "userfaultfd"}, "would wait"),
        (
            Evidence([PRIVATE], descriptors=frozenset({"anon_inode:[userfaultfd]"})),
            {"mergeable", "userfaultfd"},
            "at any moment",
        ),
        (
            Evidence([PRIVATE], QEMU, threads=frozenset({"mig/src/main"}), machine=True),
            {"mergeable", "migrating"},
            "mig/src/main",
        ),
        (
            Evidence([PRIVATE], QEMU, threads=frozenset({"live_migration"}), machine=True),
            {"mergeable", "migrating"},
            "live_migration",
        ),
        (Evidence([PRIVATE], QEMU, threads=frozenset({"CPU 0/KVM"}), machine=True), {"mergeable"}, "madvise"),
        (Evidence([PRIVATE], threads=frozenset({"live_migration"})), {"mergeable"}, "madvise"),
        (
            Evidence([mapping("rd wr mg um")], (*QEMU, "-incoming", "defer"), machine=True),
            {"mergeable", "userfaultfd", "migrating"},
            "post-copy",
        ),
        (
            Evidence([PRIVATE], (*QEMU, "-object", "sev-guest,id=sev0"), machine=True),
            {"mergeable", "encrypted"},
            "sev-guest",
        ),
        (
            Evidence([PRIVATE], (*QEMU, "-object", '{"qom-type":"sev-snp-guest","id":"a"}'), machine=True),
            {"mergeable", "encrypted"},
            "sev-snp-guest",
        ),
        (
            Evidence([PRIVATE], descriptors=frozenset({"anon_inode:[kvm-gmem]"})),
            {"mergeable", "encrypted"},
            "guest_memfd",
        ),
        (
            Evidence([mapping("rd wr")], (*QEMU, "-machine", "pc,mem-merge=off"), machine=True),
            {"not eligible"},
            "mem-merge=off",
        ),
        (Evidence([]), {"not eligible"}, "nothing of it"),
    ],
)
def test_what_a_process_is_and_why(evidence: Evidence, classes: set[str], reason: str) -> None:
    verdict = classify(evidence)
    assert verdict.classes == {ProcessClass(name) for name in classes}
    assert reason in verdict.reason
