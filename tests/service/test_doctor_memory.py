# SPDX-License-Identifier: GPL-2.0-or-later
"""The doctor on this host's kernel: what is the matter with memory, with real memory."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest

from ksmd_ctl.host.operation import finish
from ksmd_ctl.kernel.zero_pages import splits_free_zeroes
from ksmd_ctl.privileged.host import open_kernel_host
from tests.service.programs import Ksm, Visit, equal, program, visit
from tests.service.running import LIMIT_SECONDS, PROGRAM, service, until
from tests.service.test_doctor_this_host import merged, seen, two_equal

pytestmark = pytest.mark.ksm

QEMU = ("/usr/bin/qemu-system-x86_64",)


@pytest.fixture
def ksm(ksm_host: Path) -> Ksm:
    return Ksm(ksm_host)


# -- what can't be merged ----------------------------------------------------------------------------------


MIGRATING = """
import threading, time
def name():
    # PR_SET_NAME
    libc.prctl(15, b"live_migration")
    time.sleep(1000)
threading.Thread(target=name, daemon=True).start()
"""


def test_machines_whose_memory_is_out_of_reach(ksm: Ksm, tmp_path: Path) -> None:
    shared = "fd = os.memfd_create('guest'); os.ftruncate(fd, 32 << 20); area = mmap.mmap(fd, 32 << 20)\narea[0] = 1"
    machines = {
        "shared-memory": (shared, ()),
        "encrypted": ("", ("-object", "sev-guest,id=sev0")),
        "migrating": (MIGRATING + equal(10, 50_000), ()),
        "not-asked": ("", ("-machine", "q35,mem-merge=off")),
    }
    with two_equal(), ExitStack() as stack:
        pids = {code: stack.enter_context(program(text, QEMU, words)).pid for code, (text, words) in machines.items()}
        ksm.merging()
        merged(ksm, 2000)
        found = visit(tmp_path)
        assert set(found.codes) | {"not-asked"} == set(machines), found
        for code, pid in pids.items():
            named = str(found[code]["evidence"])
            # Of many only some are named, and there may be real machines beside it.
            assert f"(pid {pid})" in named or (code == "not-asked" and "others like them" in named), code
        assert found["shared-memory"]["severity"] == "loses saving"


SNAPSHOT = """
file = open(sys.argv[1], "r+b")
area = mmap.mmap(file.fileno(), 16 << 20, flags=mmap.MAP_PRIVATE)
area.madvise(mmap.MADV_MERGEABLE)
for page in range(4096):
    area[page * PAGE]
for page in range(500):
    area[page * PAGE : (page + 1) * PAGE] = content(1 + page)
"""


def test_a_snapshot_that_is_mapped_privately(ksm: Ksm, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(16 << 20))
    with two_equal(), program(SNAPSHOT, arguments=[str(image)]):
        ksm.merging()
        merged(ksm, 2000)
        found = visit(tmp_path)
    assert found.codes == ["file-pages"], found
    assert found.figure("file-pages", "their anonymous memory") == 500 * 4096
    assert found.document["looked"]["mergeable_bytes"] == 4500 * 4096


MOSTLY_ZEROES = """
area = memory(21 * 512)
area.madvise(mmap.MADV_HUGEPAGE)
area.madvise(mmap.MADV_MERGEABLE)
first = -(address(area) // PAGE) % 512
for block in range(20):
    at = (first + 512 * block) * PAGE
    area[at : at + PAGE] = content(1 + block)
"""


def test_huge_pages_whose_zeroes_a_split_gives_back(ksm: Ksm, tmp_path: Path) -> None:
    with program(MOSTLY_ZEROES) as one, program(MOSTLY_ZEROES):
        if not huge_bytes(one.pid):
            pytest.skip("no transparent huge pages here")
        ksm.merging()
        until("all to be split", lambda: None if huge_bytes(one.pid) else True)
        found = visit(tmp_path)
        # 6.12 and later give them back.
        assert found.codes in (["split-zeroes"], ["huge-pages-split"], []), found
        freed = rss_bytes(one.pid) < 20 << 20
        assert ("split-zeroes" in found.codes) is freed
        if freed:
            assert found.figure("split-zeroes", "zero pages that KSM does not count") >= 2 * 20 * 511 * 4096


HALF_ZEROES = """
area = memory(201 * 512)
area.madvise(mmap.MADV_HUGEPAGE)
area.madvise(mmap.MADV_MERGEABLE)
first = -(address(area) // PAGE) % 512
for page in range(200 * 512):
    at = (first + page) * PAGE
    area[at : at + 8] = (0 if page % 512 < 256 else page).to_bytes(8, "little")
"""


def test_huge_pages_with_zeroes_that_are_split_one_by_one(ksm: Ksm, tmp_path: Path) -> None:
    if not splits_free_zeroes():
        pytest.skip("splits free no zeroes here")
    # Where khugepaged takes the zero page out of the unstable tree, many huge pages are split in one scan.
    with khugepaged(scan_sleep_millisecs=3_600_000), program(HALF_ZEROES) as one:
        if huge_bytes(one.pid) < 200 << 21:
            pytest.skip("not all of it could be huge pages")
        ksm.merging()
        until("some to be split", lambda: None if huge_bytes(one.pid) > 195 << 21 else True)
        # The doctor goes by the scans of its interval.
        found = visit(tmp_path, seconds=max(8.0, 2 * ksm.scanned(2)))
        assert "slow-splits" in found.codes, found
        assert found.figure("slow-splits", "huge pages left in mergeable memory") < 200
        assert found.figure("slow-splits", "identical pages that are not merged") > 100 * 256
        ksm.set(use_zero_pages=1)
        until("all to be split", lambda: None if huge_bytes(one.pid) else True)
        assert "slow-splits" not in visit(tmp_path, seconds=max(8.0, 2 * ksm.scanned(2))).codes


def huge_bytes(pid: int) -> int:
    """Huge pages of a process."""
    found = re.search(r"^AnonHugePages: +(\d+) kB$", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def rss_bytes(pid: int) -> int:
    """What a process has in memory."""
    found = re.search(r"^Rss: +(\d+) kB$", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


@contextmanager
def saved_machine(folder: Path) -> Iterator[int]:
    """A real QEMU whose machine, which never ran, is being saved, very slowly; its pid."""
    qemu, path = shutil.which("qemu-system-x86_64"), folder / "qmp"
    if qemu is None:
        pytest.skip("no QEMU here (qemu-system-x86)")
    # libvirt and Proxmox VE have it name its threads; without that nothing tells.
    machine = ["-S", "-accel", "tcg", "-machine", "q35", "-m", "64", "-nodefaults", "-display", "none"]
    named = ["-name", "test,debug-threads=on", "-qmp", f"unix:{path},server=on,wait=off"]
    with subprocess.Popen([qemu, *machine, *named]) as process:
        try:
            until("its socket", lambda: True if path.exists() else None)
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(LIMIT_SECONDS)
                connection.connect(str(path))
                with connection.makefile("rw") as stream:
                    for name, arguments in (
                        ("qmp_capabilities", {}),
                        ("migrate-set-parameters", {"max-bandwidth": 1000}),
                        ("migrate", {"uri": "exec:cat > /dev/null"}),
                    ):
                        stream.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
                        stream.flush()
                        while "return" not in (said := json.loads(stream.readline())):
                            assert "error" not in said, said
                    yield process.pid
        finally:
            process.kill()


def test_a_real_machine_that_is_being_saved(ksm: Ksm, tmp_path: Path) -> None:
    with two_equal(), saved_machine(tmp_path) as pid:
        ksm.merging()
        merged(ksm, 2000)

        def told() -> Visit | None:
            found = visit(tmp_path, "--no-contents", seconds=0.2)
            return found if "migrating" in found.codes else None

        found = until("it to be told", told)
        assert f"(pid {pid})" in found["migrating"]["evidence"][0]["name"]
        assert "thread live_migration" in found["migrating"]["evidence"][0]["value"]


@contextmanager
def huge_pages(count: int) -> Iterator[None]:
    """So many reserved huge pages, where this host has them to give."""
    knob = Path("/proc/sys/vm/nr_hugepages")
    before = knob.read_text()
    try:
        knob.write_text(str(int(before) + count))
        if int(knob.read_text()) < int(before) + count:
            pytest.skip("no huge pages to be had")
        yield
    finally:
        knob.write_text(before)


def test_hugetlb(ksm: Ksm, tmp_path: Path) -> None:
    # MAP_HUGETLB
    code = "area = mmap.mmap(-1, 4 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000)\narea[0] = 1"
    with two_equal(), huge_pages(2), program(code, QEMU):
        ksm.merging()
        merged(ksm, 2000)
        assert visit(tmp_path).codes == ["hugetlb"]


PINNED = """
area = mergeable(range(100_000, 102_000))
class Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
ring = libc.syscall(425, 8, (ctypes.c_char * 120)())
assert ring >= 0, os.strerror(ctypes.get_errno())
vector = Iovec(address(area), 2000 * PAGE)
# IORING_REGISTER_BUFFERS
assert libc.syscall(427, ring, 0, ctypes.byref(vector), 1) == 0, os.strerror(ctypes.get_errno())
"""


def test_memory_that_io_uring_has_pinned(ksm: Ksm, tmp_path: Path) -> None:
    try:
        with program(PINNED), program(equal(2000, 100_000)):
            ksm.merging()
            ksm.scanned(5)
            found = visit(tmp_path, seconds=4)
            assert {"pinned", "held-pages"} <= set(found.codes), found
            assert found.figure("held-pages", "identical pages that are not merged") == 2000
    except AssertionError as error:
        if "it said ''" in str(error):
            pytest.skip("io_uring can't be used here")
        raise


WATCHED = """
area = mergeable(range(500_000, 500_010))
other = memory(4)
# userfaultfd(2), UFFDIO_API and UFFDIO_REGISTER
fd = libc.syscall(323, 0)
assert fd >= 0, os.strerror(ctypes.get_errno())
api = (ctypes.c_uint64 * 3)(0xAA, 0, 0)
assert libc.ioctl(fd, 0xC018AA3F, api) == 0
register = (ctypes.c_uint64 * 4)(address(other), 4 * PAGE, 1, 0)
assert libc.ioctl(fd, 0xC020AA00, register) == 0
"""


def test_userfaultfd(ksm: Ksm, tmp_path: Path) -> None:
    with two_equal(), program(WATCHED) as process:
        ksm.merging()
        merged(ksm, 2000)
        found = visit(tmp_path)
        assert (found.codes, found.code) == (["userfaultfd"], 0), found
        assert f"(pid {process.pid})" in found["userfaultfd"]["evidence"][0]["name"]


MAPPINGS = """
area = mergeable(range(500_000, 502_400))
for at in range(0, 2400, 2):
    # mprotect: to be read only
    assert libc.mprotect(ctypes.c_void_p(address(area) + at * PAGE), PAGE, 1) == 0
ready()
command()
assert libc.mprotect(ctypes.c_void_p(address(area)), ctypes.c_size_t(len(area)), 3) == 0
"""


def test_thousands_of_mappings(ksm: Ksm, tmp_path: Path) -> None:
    with two_equal(), program(MAPPINGS) as process:
        ksm.merging()
        merged(ksm, 2000)
        found = visit(tmp_path)
        assert (found.codes, found.code) == (["many-mappings"], 0), found
        assert found["many-mappings"]["evidence"][0]["name"].endswith(f"(pid {process.pid})")
        assert found["many-mappings"]["evidence"][0]["value"] >= 2400


EQUAL_IN_MAPPINGS = MAPPINGS.replace("range(500_000, 502_400)", "[7] * 2400")


def test_a_page_whose_mappings_take_long_to_find(ksm: Ksm, tmp_path: Path) -> None:
    with two_equal(), program(EQUAL_IN_MAPPINGS) as process:
        ksm.merging()
        merged(ksm, 4000)
        found = visit(tmp_path)
        assert (found.codes, found.code) == (["long-rmap-walks", "many-mappings"], 1), found
        mappings, times = found["long-rmap-walks"]["evidence"][:2]
        assert mappings["name"].endswith(f"(pid {process.pid}): adjacent mappings")
        assert 2400 <= mappings["value"] < 2500
        # As often as max_page_sharing allows.
        assert times["value"] == 256
        # The same pages in one mapping.
        process.say("join")
        found = visit(tmp_path)
        assert found.codes == [], found


# -- what is left on the table -----------------------------------------------------------------------------


LATE = """
area = mergeable(range(1, 1001), asked=False)
ready()
command()
area.madvise(mmap.MADV_MERGEABLE)
"""


def test_smart_scan_keeps_pairs_apart_and_the_advice_brings_them_together(ksm: Ksm, tmp_path: Path) -> None:
    with program(LATE) as early, program(LATE) as late:
        ksm.set(smart_scan=1, pages_to_scan=100_000, sleep_millisecs=250, run=1)
        early.say("now")
        begun = ksm["full_scans"]
        # Fifteen or sixteen scans later: findings F2 has both among those that never meet.
        until("the fifteenth scan", lambda: True if ksm["full_scans"] >= begun + 15 else None)
        late.say("now")
        ksm.set(sleep_millisecs=20)
        ksm.scanned(40)
        if ksm["pages_sharing"] > 100:
            pytest.skip(f"it arrived in another scan than it should: {ksm['pages_sharing']} pages merged")
        found = visit(tmp_path, seconds=2)
        # Scanning that often is dear on a busy machine.
        assert set(found.codes) - {"dear-scanning"} == {"smart-scan"}, found
        assert found["smart-scan"]["severity"] == "loses saving"
        assert found.figure("smart-scan", "identical pages that are not merged") == 1000
        assert "of them refused by the kernel" in str(found["smart-scan"]["evidence"])
        assert found.figure("smart-scan", "of them refused by the kernel") == 0
        assert json.loads((tmp_path / "doctor.json").read_text())["advised"]["smart-scan"]["pages"] == 1000
        command = found["smart-scan"]["command"].replace("ksmd-ctl", PROGRAM)
        subprocess.run(command, shell=True, check=True, capture_output=True)
        merged(ksm, 1000)
        assert ksm["smart_scan"] == 1
        assert visit(tmp_path).codes == []


HELD = """
area = mergeable(range(1, 2001))
ends = []
class Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
for at in range(0, 2000, 16):
    reading, writing = os.pipe()
    vector = Iovec(address(area) + at * PAGE, 16 * PAGE)
    assert libc.vmsplice(writing, ctypes.byref(vector), 1, 0) == 16 * PAGE
    ends.append((reading, writing))
ready()
command()
for pair in ends:
    os.close(pair[0]), os.close(pair[1])
"""


@pytest.mark.parametrize(("smart_scan", "scans"), [(0, 5), (1, 15)])
def test_pages_that_a_pipe_holds(ksm: Ksm, tmp_path: Path, smart_scan: int, scans: int) -> None:
    """Also while smart_scan skips them, for which an advice would bring nothing."""
    with program(HELD) as process, program(equal(2000)):
        ksm.merging(smart_scan=smart_scan)
        ksm.scanned(scans)
        found = visit(tmp_path, seconds=4)
        if smart_scan and found.codes == ["smart-scan"]:
            # On a busy host too few scans for a diagnosis: it says so, and how long to look.
            assert found["smart-scan"]["title"].endswith("(or they have just arrived)")
            found = visit(tmp_path, seconds=float(found["smart-scan"]["command"].split()[-1]))
        assert found.codes == ["held-pages"], found
        assert found.figure("held-pages", "identical pages that are not merged") == 2000
        # With smart_scan some may not have had their turn while it looked.
        assert found.figure("held-pages", "held of these, about") > 200
        assert found["held-pages"]["title"].endswith("something holds them")
        ksm.set(smart_scan=0)
        process.say("let go")
        merged(ksm, 2000)
        assert visit(tmp_path).codes == []


def test_a_small_sharing_limit(ksm: Ksm, tmp_path: Path) -> None:
    ksm.set(max_page_sharing=2)
    with program("area = mergeable([7] * 2000)"):
        ksm.merging()
        merged(ksm, 1000)
        found = visit(tmp_path)
    assert found.codes == ["sharing-limit"], found
    assert found.figure("sharing-limit", "stable_node_dups") == 1000


ONE_OF_EACH = """
area = mergeable([1 + number % 20 for number in range(20 * 512)])
ready()
command()
# One mapping of each frame is left.
seen = set()
with open("/proc/self/pagemap", "rb") as file:
    file.seek(address(area) // PAGE * 8)
    entries = memoryview(file.read(20 * 512 * 8)).cast("Q")
for at, entry in enumerate(entries):
    frame = entry & (1 << 55) - 1
    if frame in seen:
        area.madvise(mmap.MADV_DONTNEED, at * PAGE, PAGE)
    seen.add(frame)
"""


def test_copies_whose_limit_was_reached_once(ksm: Ksm, tmp_path: Path) -> None:
    with program(ONE_OF_EACH) as process:
        ksm.merging()
        merged(ksm, 20 * 510)
        assert ksm["stable_node_dups"] == 40
        assert visit(tmp_path).codes == []
        process.say("leave one of each")
        ksm.scanned(3)
        found = visit(tmp_path)
        assert found.codes == ["twins"], found
        assert found.figure("twins", "superfluous copies, at least") == 20
        words = [PROGRAM, "unmerge", "--pid", str(process.pid), "--socket", str(tmp_path / "socket")]
        subprocess.run(words, check=True, capture_output=True)
        until("them to be one", lambda: True if ksm["pages_shared"] == 20 and not ksm["stable_node_dups"] else None)


@contextmanager
def khugepaged(**knobs: int) -> Iterator[None]:
    """Its knobs, for a time."""
    folder = Path("/sys/kernel/mm/transparent_hugepage/khugepaged")
    before = {name: (folder / name).read_text() for name in knobs}
    try:
        for name, value in knobs.items():
            (folder / name).write_text(f"{value}")
        yield
    finally:
        for name, value in before.items():
            (folder / name).write_text(value)


def quick_khugepaged() -> AbstractContextManager[None]:
    return khugepaged(scan_sleep_millisecs=10, alloc_sleep_millisecs=0, pages_to_scan=4096, max_ptes_shared=256)


def test_khugepaged_undoes_it(ksm: Ksm, tmp_path: Path) -> None:
    # 128 MiB, of which each hundredth page is equal to another: findings F17's worst case.
    # A range that has a page twice fails to be made huge: each is equal to one far away.
    contents = "[number if number % 100 else 40_000 + number % 16_400 for number in range(32_800)]"
    often = "policy = 'observe'\n[census]\ninterval = 5\ncpu_share = 0.5\n"
    with quick_khugepaged(), program(f"area = mergeable({contents}, huge=True)"):
        ksm.merging()
        found = visit(tmp_path, seconds=max(8.0, ksm.scanned(3)))
        assert "khugepaged" in found.codes, found
        # ksmd comes by seldom: most of the time khugepaged has the last word.
        ksm.set(sleep_millisecs=3000)
        with service(tmp_path, often) as running:

            def all_left() -> bool | None:
                report = running.status()
                # What the kernel says is saved, ksmd has only not seen yet that it isn't any more.
                left, said = report["healing"]["unrealised"]["khugepaged"], report["readings"]["pages_sharing"]
                return True if left == said == 164 else None

            until("the service to count what is apart meanwhile", all_left, 4 * LIMIT_SECONDS)


def test_what_the_doctor_says_about_khugepaged_ends_it(ksm: Ksm, tmp_path: Path) -> None:
    contents = "[number if number % 100 else 40_000 + number % 16_400 for number in range(32_800)]"

    def said() -> Visit | None:
        found = visit(tmp_path, seconds=8)
        return found if "khugepaged" in found.codes else None

    with quick_khugepaged(), program(f"area = mergeable({contents}, huge=True)"):
        ksm.merging()
        ksm.scanned(3)
        # On a busy machine khugepaged may be slow for once.
        found = until("khugepaged and ksmd to undo each other's work", said)
        subprocess.run(found["khugepaged"]["command"], shell=True, check=True)
        ksm.scanned(3)
        until("that to end", lambda: None if said() else True)


# -- risk --------------------------------------------------------------------------------------------------


def test_what_ended_processes_leave_behind(ksm: Ksm, tmp_path: Path) -> None:
    with two_equal():
        ksm.merging()
        merged(ksm, 2000)
        ksm.set(run=0)
    found = visit(tmp_path)
    assert found.codes == ["ksm-off", "left-behind"], found
    with pytest.raises(OSError, match="Device or resource busy"):
        ksm.set(max_page_sharing=512)
    command = found["left-behind"]["command"].replace("ksmd-ctl", PROGRAM).replace("sleep 5", "sleep 1")
    subprocess.run(command, shell=True, check=True, capture_output=True)
    assert "left-behind" not in visit(tmp_path).codes


def test_a_sparse_mapping(ksm: Ksm, tmp_path: Path) -> None:
    # MAP_NORESERVE; so large that it takes more than a second on any machine.
    code = (
        "area = mmap.mmap(-1, 512 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)\n"
        "area.madvise(mmap.MADV_MERGEABLE)\narea[-1] = 1"
    )
    with two_equal(), program(code) as process:
        ksm.merging()
        merged(ksm, 2000)
        found = visit(tmp_path)
        assert found.codes == ["sparse-mapping"], found
        assert f"(pid {process.pid})" in found["sparse-mapping"]["evidence"][0]["name"]
        ksm.set(run=0)


def test_a_tenant_that_is_over_its_limit_but_for_merging(ksm: Ksm, tmp_path: Path) -> None:
    folder = Path("/sys/fs/cgroup/memory")
    if not (folder / "memory.limit_in_bytes").exists():
        pytest.skip("no memory controller of cgroup v1 here")
    groups = [folder / f"ksmd-ctl-test-doctor-{name}" for name in "ab"]
    try:
        with ExitStack() as stack:
            for group in groups:
                group.mkdir()
                join = f"open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
                stack.enter_context(program(join + equal(8000)))
            ksm.merging()
            merged(ksm, 8000)
            assert visit(tmp_path).codes == []
            # The pages are charged to one of the two; the other may be given a limit that it would not fit in.
            for group in groups:
                try:
                    (group / "memory.limit_in_bytes").write_text(str(20 << 20))
                except OSError:
                    continue
            found = visit(tmp_path)
            assert "no-room" in found.codes, found
            assert found["no-room"]["severity"] == "costs"
            host = open_kernel_host()
            nodes, plan = finish(host.survey(1.0), 60), finish(host.inventory(16 << 20), 60)
            host.close()
            # nodes, the doctor and a plan say the same of it.
            ours, theirs = (
                {item.where: item for item in one.demands if "ksmd-ctl-test-doctor" in item.where}
                for one in (nodes, plan)
            )
            assert ours == theirs
            (short,) = [item for item in ours.values() if item.over_bytes]
            (evidence,) = found["no-room"]["evidence"]
            assert evidence["name"].startswith(f"in the memory cgroup {short.where} it takes ")
            assert evidence["value"] == short.over_bytes
            for group in groups:
                (group / "memory.limit_in_bytes").write_text("-1")
    finally:
        for group in groups:
            until("it to be empty", lambda group=group: removed(group))  # type: ignore[misc]


def removed(group: Path) -> bool | None:
    try:
        group.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return None
    return True


# -- worth -------------------------------------------------------------------------------------------------


FORKS = """
area = mergeable([1 + number % 2000 for number in range(4000)])
for _ in range(8):
    if not os.fork():
        # Until whoever started us is gone.
        libc.prctl(1, signal.SIGKILL)
        signal.pause()
"""


def test_forks(ksm: Ksm, tmp_path: Path) -> None:
    with program(FORKS):
        ksm.merging()
        merged(ksm, 34_000)
        found = visit(tmp_path)
        assert (found.codes, found.code) == (["forked"], 0), found
        assert found.figure("forked", "forks of one another") == 9
        assert found.figure("forked", "their merged pages") == 36_000
        assert found.figure("forked", "places where they map them") == 4000
        # It was 2,000 pages, less what ksmd keeps about each.
        saved = found.document["looked"]["saved_bytes"]
        assert 1000 * 4096 < saved["from"] < 2000 * 4096 < saved["to"]


AFTER = """
import time
if not os.fork():
    # Mergeable as well, and not its parent's; until whoever started us is gone.
    libc.prctl(1, signal.SIGKILL)
    area = mergeable(range(900_000, 900_010))
    signal.pause()
area = mergeable([1 + number % 1000 for number in range(2000)])
"""


def test_what_came_after_a_fork_is_saved(ksm: Ksm, tmp_path: Path) -> None:
    with program(AFTER):
        ksm.merging()
        merged(ksm, 1000)
        found = visit(tmp_path)
        assert (found.codes, found.code) == ([], 0), found
        saved = found.document["looked"]["saved_bytes"]
        assert saved["from"] == saved["to"] > 3_500_000


def test_zero_pages(ksm: Ksm, tmp_path: Path) -> None:
    with program("area = mergeable([0] * 10_000)"):
        ksm.merging(use_zero_pages=1)
        until("the zero page to be mapped", lambda: True if ksm["ksm_zero_pages"] == 10_000 else None)
        found = visit(tmp_path)
        assert (found.codes, found.code) == (["zero-pages"], 0), found
        assert found.figure("zero-pages", "saved by them") == 10_000 * 4096


def test_it_is_not_worth_it(ksm: Ksm, tmp_path: Path) -> None:
    with program(equal(30_000, 100_000)) as process:
        ksm.merging(sleep_millisecs=0)
        ksm.scanned(4)
        assert "costs-more" in visit(tmp_path).codes
        # ksmd is nice: where others want the CPUs it takes a while until it gets much of one.
        until("ksmd to be busy", lambda: seen(tmp_path, "dear-scanning"))
        with two_equal(), program("area = mergeable([7] * 2000)"):
            merged(ksm, 3000)
            found = visit(tmp_path)
            assert "losing-processes" in found.codes, found
            assert f"(pid {process.pid})" in found["losing-processes"]["evidence"][0]["name"]


def test_huge_pages_split_for_one_page_each(ksm: Ksm, tmp_path: Path) -> None:
    # Each 2 MiB have one page that all have.
    code = "area = mergeable([number if number % 512 else 7 for number in range(128 * 512)], huge=True)"
    with program(code):
        ksm.merging()
        merged(ksm, 100)
        found = visit(tmp_path)
        assert "huge-pages-split" in found.codes, found
