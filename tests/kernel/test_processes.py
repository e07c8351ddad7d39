# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
import random
from array import array
from pathlib import Path

import pytest

from ksmd_ctl.errors import Cancelled, Denied
from ksmd_ctl.host.memory import KsmDetection, ProcessClass, ProcessId, SplitBlocks
from ksmd_ctl.kernel import process_pages
from ksmd_ctl.kernel.detection import PageReader, choose, probe
from ksmd_ctl.kernel.kpageflags import Bit
from ksmd_ctl.kernel.pagemap import PRESENT
from ksmd_ctl.kernel.proc_pid import LONGEST_NAME
from ksmd_ctl.kernel.processes import Surveyor, unit_members
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.topology import FrameMap, Span, read_frame_map, read_topology
from ksmd_ctl.kernel.zero_pages import ZeroPages
from ksmd_ctl.scenario.regions import spawn
from tests.kernel.test_detection import filled, scan
from tests.kernel.test_ranges import TOPOLOGY
from tests.kernel.trees import write_tree

FRAMES = FrameMap([Span(0, 1000, 0), Span(1000, 2000, 1)])
MERGED = 1 << Bit.KSM | 1 << Bit.MMAP | 1 << Bit.ANON


def stat(pid: int, name: str, flags: int = 0, start: int = 500) -> str:
    fields = ["0"] * 49
    fields[9 - 4], fields[22 - 4] = str(flags), str(start)
    return f"{pid} ({name}) S " + " ".join(fields) + "\n"


def smaps(
    start: int,
    pages: int,
    merged: int | None,
    flags: str = "rd wr mg",
    huge_kib: int = 0,
    pss_kib: int | None = None,
) -> str:
    pss = "" if pss_kib is None else f"Pss: {pss_kib} kB\n"
    ksm = "" if merged is None else f"KSM: {merged * 4} kB\n"
    return (
        f"{start:x}-{start + pages * 4096:x} rw-p 00000000 00:00 0 \n"
        f"Rss: {pages * 4} kB\n{pss}AnonHugePages: {huge_kib} kB\n"
        f"{ksm}VmFlags: {flags} \n"
    )


def pages(root: Path, pid: int, entries: dict[int, int], flags: dict[int, int]) -> None:
    """A pagemap and kpageflags with these frames by page number, and these flags by frame."""
    words = array("Q", [0] * (max(entries) + 1))
    for page, frame in entries.items():
        words[page] = PRESENT | frame
    (root / f"proc/{pid}/pagemap").write_bytes(words.tobytes())
    words = array("Q", [0] * 2000)
    for frame, flag in flags.items():
        words[frame] = flag
    (root / "proc/kpageflags").write_bytes(words.tobytes())


STATUS = "Uid:\t1000\t1000\t1000\t1000\nCpus_allowed_list:\t0-1\nMems_allowed_list:\t0-1\n"


def machine_tree(root: Path) -> Path:
    """A virtual machine with a range on each node, a process without mergeable memory, and a kernel thread."""
    write_tree(
        root,
        {
            "proc/2/stat": stat(2, "kthreadd", flags=0x00208040),
            "proc/7/stat": stat(7, "qemu-system-x86"),
            "proc/7/cmdline": "/usr/bin/qemu-system-x86_64\0-name\0guest=web,debug-threads=on\0",
            "proc/7/cgroup": "0::/machine.slice/machine-qemu\\x2d3\\x2dweb.scope/libvirt/emulator\n",
            "proc/7/status": STATUS,
            "proc/7/ksm_stat": "ksm_rmap_items 30\nksm_zero_pages 2\nksm_merging_pages 6\nksm_process_profit 1000\n",
            "proc/7/smaps": smaps(0x100000, 8, 4, huge_kib=2048)
            + smaps(0x400000, 8, 2)
            + smaps(0x800000, 4, 0, "rd wr"),
            "proc/7/numa_maps": "100000 bind:0 anon=8 N0=6 N1=2\n400000 bind:1 anon=8 N1=8\n",
            "proc/7/fd/3": "-> /dev/vfio/4",
            "proc/7/task/7/comm": "qemu-system-x86\n",
            "proc/9/stat": stat(9, "cat"),
            "proc/9/smaps": smaps(0x100000, 8, 0, "rd wr"),
        },
    )
    entries = {0x100 + index: 10 + index for index in range(6)} | {0x106: 1006, 0x107: 1007}
    entries |= {0x400 + index: 1100 + index for index in range(8)}
    merged = [10, 11, 1006, 1007, 1100, 1101]
    pages(root, 7, entries, dict.fromkeys(entries.values(), 1 << Bit.ANON) | dict.fromkeys(merged, MERGED))
    return root


def test_a_process_whose_main_thread_has_ended_is_seen_by_another_one_s_files(tmp_path: Path) -> None:
    root = machine_tree(tmp_path)
    (root / "proc/7").rename(root / "proc/8")
    fields = stat(7, "qemu-system-x86").replace(" S ", " Z ").split()
    dead = {"proc/7/smaps": "", "proc/7/task/7/comm": "", "proc/7/task/8/comm": ""}
    surveyor = Surveyor(TOPOLOGY, FRAMES, None, root=root)
    for threads, expected in (("2", 8), ("1", None)):
        fields[20 - 1] = threads
        write_tree(root, {**dead, "proc/7/stat": " ".join(fields)})
        found = surveyor.one(7)
        assert (found and found.id.pid) == expected


def test_a_machine_with_a_home_for_each_range(tmp_path: Path) -> None:
    root = machine_tree(tmp_path)
    with PageReader(KsmDetection.KPAGEFLAGS, root) as reader:
        (found,) = Surveyor(TOPOLOGY, FRAMES, reader, root=root).all()
    assert found.id == ProcessId(7, 500)
    assert (found.name, found.group, found.unit) == ("qemu-system-x86", "web", "machine-qemu\\x2d3\\x2dweb.scope")
    assert found.classes == {ProcessClass.MERGEABLE, ProcessClass.PINNED}
    assert (found.rmap_items, found.zero_pages, found.merging_pages, found.profit_bytes) == (30, 2, 6, 1000)
    # Four in the range that belongs to node 0, of which two lie on node 1; two in the other, both at home.
    assert found.nodes == {0: 2, 1: 4}
    assert found.remote_pages == 2
    assert found.home is None
    assert found.huge_bytes == 2 << 20
    # Its mappings are too small to have a huge page.
    assert found.split_blocks == SplitBlocks()
    assert (found.uid, found.machine, found.namespace) == (1000, True, "")
    assert found.cgroup == "/machine.slice/machine-qemu\\x2d3\\x2dweb.scope/libvirt/emulator"
    # Merged or not.
    assert found.resident_nodes == {0: 6, 1: 10}


@pytest.mark.parametrize(
    ("splits", "frees", "zero_pages", "expected"),
    [
        (9, True, 2, 4),
        (9, True, 0, 6),
        (0, None, 0, 0),
        # A kernel that does not free them, one that can't be tried, and one that does not count its own.
        (9, False, 2, 0),
        (9, None, 2, None),
        (9, True, None, None),
    ],
)
def test_zero_pages_that_splits_freed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    splits: int,
    frees: bool | None,
    zero_pages: int | None,
    expected: int | None,
) -> None:
    counted = "" if zero_pages is None else f"ksm_zero_pages {zero_pages}\n"
    ksm_stat = f"ksm_rmap_items 30\n{counted}ksm_merging_pages 6\n"
    root = write_tree(
        machine_tree(tmp_path),
        {
            "proc/7/ksm_stat": ksm_stat,
            "proc/vmstat": f"thp_split_page {splits}\n",
            "sys/kernel/mm/transparent_hugepage/hpage_pmd_size": "2097152\n",
            "sys/kernel/mm/ksm/use_zero_pages": "1\n",
        },
    )
    monkeypatch.setattr(process_pages, "splits_free_zeroes", lambda: frees)
    monkeypatch.setattr(process_pages, "count_zero_pages", lambda *_: ZeroPages(8, 2))
    (found,) = Surveyor(TOPOLOGY, FRAMES, None, root=root).all()
    assert (found.zero_mapped_pages, found.split_zero_pages) == (8, expected)


def test_a_process_without_zero_pages_asks_for_no_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_pages, "splits_free_zeroes", lambda: pytest.fail("tried"))
    monkeypatch.setattr(process_pages, "count_zero_pages", lambda *_: ZeroPages(3, 3))
    (found,) = Surveyor(TOPOLOGY, FRAMES, None, root=machine_tree(tmp_path)).all()
    assert found.split_zero_pages == 0


def test_what_is_mapped_now_and_the_share_of_it_are_in_smaps(tmp_path: Path) -> None:
    def looked_at(*mappings: str, merging: int = 9) -> tuple[int | None, int | None]:
        files = {"proc/7/stat": stat(7, "x"), "proc/7/status": STATUS, "proc/7/smaps": "".join(mappings)}
        root = write_tree(tmp_path, files | {"proc/7/ksm_stat": f"ksm_rmap_items 30\nksm_merging_pages {merging}\n"})
        (found,) = Surveyor(TOPOLOGY, FRAMES, None, root=root).all()
        return found.ksm_mapped_pages, found.sharing_bytes

    # Eight pages, of which four are KSM pages that another process maps as well.
    half = smaps(0x100000, 8, 4, pss_kib=24)
    assert looked_at(half) == (4, 2 * PAGE_SIZE)
    assert looked_at(half, smaps(0x200000, 8, 0, pss_kib=2)) == (4, 2 * PAGE_SIZE)
    # Fork shares more than what is merged: at most all of that counts.
    assert looked_at(half, smaps(0x200000, 8, 3, pss_kib=2)) == (7, 5 * PAGE_SIZE)
    # What un-merged itself has no mergeable mapping any more, whatever the kernel still counts.
    assert looked_at(smaps(0x100000, 8, 0, "rd wr", pss_kib=32)) == (0, 0)
    # Before 6.7 only the process's count says how much of it is merged.
    assert looked_at(smaps(0x100000, 8, None, pss_kib=24)) == (None, 2 * PAGE_SIZE)
    assert looked_at(smaps(0x100000, 8, None, pss_kib=2), merging=3) == (None, 3 * PAGE_SIZE)
    assert looked_at(smaps(0x100000, 8, 4)) == (4, None)


def test_whose_turn_does_not_come_in_time_is_named(tmp_path: Path) -> None:
    root = machine_tree(tmp_path)
    surveyor = Surveyor(TOPOLOGY, FRAMES, None, root=root)
    assert surveyor.all(most_seconds=0) == ()
    assert [(one.pid, one.name, one.why) for one in surveyor.skipped] == [
        (pid, name, "looking at the processes before it took 0 s") for pid, name in ((7, "qemu-system-x86"), (9, "cat"))
    ]


def test_what_a_process_is_called_is_fit_to_be_shown(tmp_path: Path) -> None:
    root = write_tree(
        tmp_path,
        {
            "proc/7/stat": stat(7, "a\x1b[2J\n8 (forged) S"),
            "proc/7/status": STATUS,
            "proc/7/smaps": smaps(0x200000, 8, 0),
        },
    )
    # 125 kB, neither UTF-8 nor one line.
    name = b"\xff\xfe\x1b[2J\n" + b"x" * 125_000
    (root / "proc/7/cmdline").write_bytes(b"qemu-system-x86_64\0-name\0" + name + b"\0")
    (root / "proc/7/cgroup").write_bytes(b"0::/user.slice/user-7.slice/session-\xff\x1b.scope\n")
    (found,) = Surveyor(TOPOLOGY, FRAMES, None, root=root).all()
    assert found.name == "a\\x1b[2J\\n8 (forged) S"
    assert found.group.startswith("user-1000/\ufffd\ufffd\\x1b[2J\\nxxx")
    assert len(found.group) == LONGEST_NAME
    assert found.unit == "session-\ufffd\\x1b.scope"


@pytest.mark.parametrize(
    "link",
    [{"exe": "-> /usr/bin/cloud-hypervisor"}, {"exe": "-> /opt/vmm (deleted)", "fd/12": "-> anon_inode:kvm-vm"}],
)
def test_a_machine_is_told_by_its_program_or_by_kvm_whatever_it_calls_itself(
    tmp_path: Path, link: dict[str, str]
) -> None:
    files = {
        "proc/7/stat": stat(7, "microvm@web"),
        "proc/7/cmdline": "microvm@web\0",
        "proc/7/status": STATUS,
        "proc/7/smaps": smaps(0x200000, 1 << 14, None, "rd wr sh").replace(" \n", " /memfd:ram (deleted)\n", 1),
        "proc/8/stat": stat(8, "cat"),
        "proc/8/smaps": smaps(0x200000, 8, None, "rd wr"),
        "proc/8/exe": "-> /usr/bin/cat",
    }
    root = write_tree(tmp_path, files | {f"proc/7/{name}": target for name, target in link.items()})
    (found,) = Surveyor(TOPOLOGY, FRAMES, None, root=root).all()
    assert found.id.pid == 7
    assert ProcessClass.SHARED in found.classes
    assert "MADV_MERGEABLE succeeds there and does nothing" in found.reason


def test_a_name_that_two_pods_claim_is_neither_one_s(tmp_path: Path) -> None:
    files = {}
    for pid, pod in ((7, "1a"), (8, "2b"), (9, "3c")):
        name = "shop_web" if pid < 9 else "shop_db"
        files |= {
            f"proc/{pid}/stat": stat(pid, "qemu-kvm"),
            f"proc/{pid}/cmdline": f"/usr/libexec/qemu-kvm\0-name\0guest={name}\0",
            f"proc/{pid}/status": STATUS,
            f"proc/{pid}/cgroup": f"0::/kubepods.slice/kubepods-pod{pod}.slice/cri-containerd-{'0a' * 32}.scope\n",
            f"proc/{pid}/smaps": smaps(0x200000, 8, 0),
        }
    found = Surveyor(TOPOLOGY, FRAMES, None, root=write_tree(tmp_path, files)).all()
    assert [process.group for process in found] == ["pod/1a", "pod/2b", "shop/db"]
    # Nor is anybody taken for a member of that namespace.
    assert [(process.machine, process.namespace) for process in found] == [(False, ""), (False, ""), (True, "shop")]


def test_large_processes_are_estimated_from_a_part(tmp_path: Path) -> None:
    count = 1 << 14
    root = write_tree(
        tmp_path,
        {
            "proc/7/stat": stat(7, "big"),
            "proc/7/status": STATUS,
            "proc/7/smaps": smaps(0x200000, count, 3000),
            "proc/7/numa_maps": f"200000 bind:0 anon={count} N0={count // 2} N1={count // 2}\n",
        },
    )
    # Every frame is used many times over: half of the pages are merged, a quarter of these on node 1.
    entries = {0x200 + page: (100 if page % 8 else 1100) if page % 2 == 0 else 5 for page in range(count)}
    pages(root, 7, entries, {5: 1 << Bit.ANON, 100: MERGED, 1100: MERGED})
    with PageReader(KsmDetection.KPAGEFLAGS, root) as reader:
        surveyor = Surveyor(TOPOLOGY, FRAMES, reader, root=root, page_budget=count // 4, chance=random.Random(1))
        (found,) = surveyor.all()
    # How many there are is known, and every part is like every other.
    assert found.nodes == {0: 2250, 1: 750}
    assert (found.home, found.remote_pages) == (0, 750)
    assert found.split_blocks == SplitBlocks(count // 512, count // 2)


def test_what_the_kernel_calls_not_mergeable_is_not_looked_at(tmp_path: Path) -> None:
    root = write_tree(
        tmp_path,
        {
            "proc/7/stat": stat(7, "x"),
            "proc/7/ksm_stat": "ksm_merging_pages 0\nksm_merge_any: no\nksm_mergeable: no\n",
            # Reading this would be an error.
            "proc/7/smaps": "nonsense\n",
        },
    )
    assert Surveyor(TOPOLOGY, FRAMES, None, root=root).all() == ()


def test_what_never_merges_is_listed_without_a_look_at_its_mappings(tmp_path: Path) -> None:
    root = write_tree(
        tmp_path,
        {
            "proc/7/stat": stat(7, "postgres"),
            "proc/7/status": STATUS + "RssShmem:\t 2097152 kB\nHugetlbPages:\t       0 kB\n",
            "proc/7/cgroup": "0::/system.slice/postgresql@15-main.service\n",
            "proc/7/ksm_stat": "ksm_merging_pages 0\nksm_merge_any: no\nksm_mergeable: no\n",
            # Reading this would be an error.
            "proc/7/smaps": "nonsense\n",
            "proc/8/stat": stat(8, "dpdk"),
            "proc/8/status": STATUS + "RssShmem:\t 16383 kB\nHugetlbPages:\t 1048576 kB\n",
            "proc/8/smaps": smaps(0x100000, 8, 0, "rd wr"),
            "proc/9/stat": stat(9, "cat"),
            "proc/9/status": STATUS + "RssShmem:\t 16383 kB\nHugetlbPages:\t       0 kB\n",
            "proc/9/smaps": smaps(0x100000, 8, 0, "rd wr"),
        },
    )
    surveyor = Surveyor(TOPOLOGY, FRAMES, None, root=root)
    assert surveyor.all() == ()
    database, dpdk = surveyor.unmergeable
    assert (database.id, database.name, database.unit) == (ProcessId(7, 500), "postgres", "postgresql@15-main.service")
    assert database.classes == {ProcessClass.SHARED, ProcessClass.NOT_ELIGIBLE}
    assert database.reason.startswith("2.0 GiB of shared memory")
    assert dpdk.classes == {ProcessClass.HUGETLB, ProcessClass.NOT_ELIGIBLE}
    assert dpdk.reason.startswith("1.0 GiB of hugetlbfs pages")


def test_without_detection_there_are_no_pages(tmp_path: Path) -> None:
    (found,) = Surveyor(TOPOLOGY, FRAMES, None, root=machine_tree(tmp_path)).all()
    assert (found.nodes, found.remote_pages, found.split_blocks) == ({}, None, None)
    assert found.merging_pages == 6


def test_it_can_be_stopped(tmp_path: Path) -> None:
    with pytest.raises(Cancelled, match="0 of 3"):
        Surveyor(TOPOLOGY, FRAMES, None, root=machine_tree(tmp_path)).all(stop=lambda: True)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_what_is_not_ours_is_denied_where_nothing_is_left() -> None:
    with spawn("test-denied") as process:
        child = os.fork()
        if not child:
            code = 1
            try:
                os.setresuid(65534, 65534, 65534)
                Surveyor(TOPOLOGY, FRAMES, None).one(process.id.pid)
            except Denied as error:
                code = 0 if "CAP_SYS_PTRACE" in error.hint else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_unit_has_the_processes_of_its_cgroup(tmp_path: Path) -> None:
    root = write_tree(
        tmp_path,
        {
            **{f"proc/{pid}/stat": stat(pid, "x", start=500 + pid) for pid in (7, 8, 9, 10)},
            "proc/7/cgroup": "0::/system.slice/web.service/worker\n",
            "proc/8/cgroup": "0::/system.slice/web.service\n",
            "proc/9/cgroup": "0::/system.slice/other.service/web.service\n",
            "proc/10/cgroup": "0::/\n",
        },
    )
    assert unit_members("web.service", root) == [ProcessId(7, 507), ProcessId(8, 508)]
    assert unit_members("none.service", root) == []


@pytest.mark.ksm
def test_adjacent_mappings_and_how_often_a_page_is_mapped_there(tmp_path: Path) -> None:
    def one(name: str, mappings: int, budget: int = 1 << 18) -> tuple[int | None, int | None]:
        # A hole after the first three, and then mappings of two pages each that touch each other.
        starts = [*range(0x100000, 0x103000, PAGE_SIZE), *(0x200000 + 2 * PAGE_SIZE * at for at in range(mappings))]
        text = "".join(smaps(start, 2 if start >= 0x200000 else 1, 1) for start in starts)
        root = write_tree(tmp_path / name, {"proc/7/stat": stat(7, "x"), "proc/7/status": STATUS, "proc/7/smaps": text})
        # The first page of each is one KSM page; the second is none.
        entries = {start // PAGE_SIZE: 10 for start in starts} | {0x201 + 2 * at: 11 for at in range(mappings)}
        pages(root, 7, entries, {10: MERGED, 11: 1 << Bit.ANON})
        with PageReader(KsmDetection.KPAGEFLAGS, root) as reader:
            (found,) = Surveyor(TOPOLOGY, FRAMES, reader, root=root, page_budget=budget).all()
        return found.adjacent_mappings, found.page_mappings

    assert one("many", 300) == (300, 303)
    assert one("few", 20) == (20, None)
    assert one("large", 300, budget=100) == (300, None)


def test_processes_of_this_machine(ksm_host: Path) -> None:
    with spawn("test-survey") as process, PageReader(choose(probe())) as reader:
        start = process.map(100)
        process.advise(start, 100, mergeable=True)
        process.store(start, [filled(number // 10) for number in range(100)])
        process.store(process.map(30), [filled(7)] * 30)
        scan(ksm_host, 4)
        surveyor = Surveyor(read_topology(numa=True), read_frame_map(), reader)
        (found,) = (item for item in surveyor.all() if item.id == process.id)
    assert found.classes == {ProcessClass.MERGEABLE}
    assert sum(found.nodes.values()) == 100
    assert found.merging_pages in (100, None)
    assert found.name == "test-survey"
