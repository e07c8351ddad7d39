# SPDX-License-Identifier: GPL-2.0-or-later
"""What status, processes and metrics say is saved, against the frames that processes really have."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.zero_pages import splits_free_zeroes
from tests.kernel.test_detection import scan
from tests.kernel.test_zero_pages import holders, khugepaged_asleep
from tests.service.running import run_command, service, until
from tests.service.test_numa_this_host import MERGING, asked

__all__ = ["khugepaged_asleep"]

pytestmark = pytest.mark.ksm

PAGES = 16 * 512
HUGE = Path("/sys/kernel/mm/transparent_hugepage")


@pytest.mark.usefixtures("khugepaged_asleep")
@pytest.mark.parametrize(("kind", "use_zero_pages"), [("huge", 0), ("huge", 1), ("small", 0), ("small", 1)])
def test_every_figure_of_the_saving_agrees_with_the_frames(
    ksm_host: Path, tmp_path: Path, kind: str, use_zero_pages: int
) -> None:
    """Of the pages of two processes 40 % are equal, 20 % are zeroes and 40 % like no other."""
    frees = splits_free_zeroes()
    if kind == "huge" and frees is None:
        pytest.skip("no huge page is to be had")
    if use_zero_pages and not (ksm_host / "ksm_zero_pages").exists():
        pytest.skip("this kernel does not count what ksmd replaces by the zero page")
    (ksm_host / "use_zero_pages").write_text(str(use_zero_pages))
    if (ksm_host / "smart_scan").exists():
        (ksm_host / "smart_scan").write_text("0")
    with holders(kind, PAGES) as both:
        before = len(both[0].frames() | both[1].frames())
        if kind == "huge" and any(one.huge_bytes() < PAGES * PAGE_SIZE for one in both):
            pytest.skip("not all of it could be huge pages")
        assert before == 2 * PAGES
        scan(ksm_host, 6)
        saved = before - len(both[0].frames() | both[1].frames())
        with service(tmp_path, MERGING) as running:
            pids = {one.process.pid for one in both}

            def complete() -> dict[str, float] | None:
                # In an emulated guest it may take longer to answer than is waited for.
                found = running.answers()
                return found if found and "ksm_saved_frames_bytes" in found else None

            series = until("the first survey", complete)
            status = running.status()
            processes = asked(running, "processes")
            said = run_command("status", "--socket", str(running.folder / "socket")).stdout
            assert running.end() == 0
    derived, total = status["derived"], processes["total"]
    ours = [one for one in processes["processes"] if one["pid"] in pids]
    records = derived["metadata_bytes"]
    figures = {
        "status": derived["saved_frames_bytes"] + records,
        "metrics": series["ksm_saved_frames_bytes"] + series["ksm_metadata_bytes"],
        "processes": total["saved_frames_bytes"] + records,
        "shares": sum(one["share_bytes"] + 64 * one["rmap_items"] for one in ours),
        "groups": sum(found for name, found in series.items() if name.startswith("ksm_group_share_bytes{")) + records,
    }
    pages = {name: found / PAGE_SIZE for name, found in figures.items()}
    assert pages == {name: pytest.approx(saved, rel=0.02) for name in pages}, (saved, pages)
    zeroes = 2 * len(range(2, PAGES, 5))
    freed = zeroes if kind == "huge" and frees else 0
    # Two of five pages of each are merged. Where zeroes are merged instead of freed they count as well.
    merged = 2 * len([page for page in range(PAGES) if page % 5 < 3])
    blocks = [sum(one[key] for one in ours) for key in ("split_blocks", "split_block_pages", "low_yield_blocks")]
    assert blocks == ([2 * PAGES // 512, merged, 0] if kind == "huge" else [0, 0, 0])
    assert [series["ksm_split_zero_pages"], total["split_zero_pages"]] == [freed, freed]
    assert sum(one["split_zero_pages"] for one in ours) == freed
    assert ("in frames" in said, f"{freed:,} pages of zeroes freed by splits" in said) == (bool(freed), bool(freed))


@pytest.fixture
def pages_of_64_kib(ksm_host: Path) -> Iterator[None]:
    """Huge pages of 64 KiB, where memory asks for huge pages and no larger one fits.

    After `ksm_host`: not while others have this host's KSM.
    """
    enabled = HUGE / "hugepages-64kB/enabled"
    if not enabled.exists():
        pytest.skip("this kernel has no huge pages of 64 KiB")
    before = enabled.read_text().partition("[")[2].partition("]")[0]
    enabled.write_text("madvise")
    try:
        yield
    finally:
        enabled.write_text(before)


@pytest.mark.usefixtures("khugepaged_asleep", "pages_of_64_kib")
def test_zero_pages_that_splits_of_smaller_huge_pages_freed(ksm_host: Path, tmp_path: Path) -> None:
    if not splits_free_zeroes():
        pytest.skip("splits free no zeroes here")
    if (ksm_host / "smart_scan").exists():
        (ksm_host / "smart_scan").write_text("0")
    socket = str(tmp_path / "none")

    def readings() -> dict[str, int]:
        return json.loads(run_command("status", "--json", "--socket", socket).stdout)["readings"]

    # A mapping of 1 MiB has no room for a huge page of 2 MiB.
    pages, folio = 256, 16
    before = readings()
    with holders("huge", pages) as both:
        scan(ksm_host, 5)
        after = readings()
        assert after["thp_split_page"] == before["thp_split_page"]
        split = after["split_folio_pages"] - before["split_folio_pages"]
        assert 2 * (pages - 2 * folio) <= split <= 2 * pages
        document = json.loads(run_command("processes", "--json", "--socket", socket).stdout)
        ours = {one.process.pid: one.freed() for one in both}
        assert sum(ours.values()) == pytest.approx(2 * len(range(2, pages, 5)), abs=2 * folio)
        found = {one["pid"]: one["split_zero_pages"] for one in document["processes"] if one["pid"] in ours}
        assert found == ours
        # What it says where nobody has counted them.
        said = " ".join(run_command("status", "--socket", socket).stdout.split())
        assert "without pages of zeroes that splits of huge pages may have freed" in said


_UNMERGING = """
import ctypes, mmap, sys
libc = ctypes.CDLL(None, use_errno=True)
size = int(sys.argv[1]) * 4096
area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
start = ctypes.addressof(ctypes.c_char.from_buffer(area))
def advise(advice):
    if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice):
        sys.exit("madvise failed")
advise(15)
advise(12)
for page in range(size // 4096):
    area[page * 4096 : page * 4096 + 8] = (page + 1).to_bytes(8, "little")
print(start, flush=True)
sys.stdin.readline()
advise(13)
print("un-merged", flush=True)
sys.stdin.read()
"""


def test_what_one_process_un_merged_while_ksmd_is_stopped_shows_without_a_service(
    ksm_host: Path, tmp_path: Path
) -> None:
    socket = str(tmp_path / "none")
    count = 1000
    with ExitStack() as stack:
        both = []
        for _ in range(2):
            words = [sys.executable, "-I", "-S", "-c", _UNMERGING, str(count)]
            one = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.callback(one.communicate)
            stack.callback(one.kill)
            assert one.stdout
            one.stdout.readline()
            both.append(one)
        scan(ksm_host, 4)
        (ksm_host / "run").write_text("0")
        said = run_command("status", "--socket", socket).stdout
        told = "KSM:" in Path("/proc/self/smaps_rollup").read_text()
        assert ("stale" in labels(said)) is not told
        first = both[0]
        assert first.stdin
        assert first.stdout
        first.stdin.write("\n")
        first.stdin.flush()
        first.stdout.readline()
        # Every counter of the kernel is as it was.
        assert int((ksm_host / "pages_sharing").read_text()) == count
        said = run_command("status", "--socket", socket).stdout
        if not told:
            # Before 6.7 no page table says which pages are merged.
            assert "Pages un-merged since then may still be counted" in " ".join(said.split())
            return
        assert "1,000 pages or more of these are not merged any more" in " ".join(said.split())
        said = run_command("processes", "--socket", socket).stdout
        joined = " ".join(said.split())
        assert f"pid {first.pid} " in joined
        assert "the kernel still counts 1,000 pages as merged that are not any more" in joined
        rows = {line.split()[0]: line.split() for line in said.splitlines() if line.strip()}
        assert "0" in rows[str(first.pid)]
        assert "1,000" in rows[str(both[1].pid)]


def labels(said: str) -> set[str]:
    return {line.split()[0] for line in said.splitlines() if line.strip()}
