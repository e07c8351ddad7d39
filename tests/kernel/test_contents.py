# SPDX-License-Identifier: GPL-2.0-or-later
"""What whoever asks, unless it is root, must not learn from a comparison of contents."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest

from ksmd_ctl.errors import NoSuchProcess, Refused
from ksmd_ctl.kernel.contents import Asker
from ksmd_ctl.kernel.pagemap import PRESENT
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.privileged.requests import Context, FindDuplicates
from tests.kernel.trees import write_tree, zone

SERVICE, TENANT = 990, 1000
PAGES, START = 600, 0x100000


def tree(root: Path, run: int = 1) -> None:
    """Two processes with the same contents: one of the service's user, one of a tenant's."""
    files = {
        "sys/kernel/mm/ksm/run": f"{run}\n",
        "sys/kernel/mm/ksm/max_page_sharing": "256\n",
        "proc/zoneinfo": zone(0, "Normal", 0, 8000),
    }
    for pid, uid in ((7, SERVICE), (8, TENANT), (9, TENANT)):
        files |= {
            f"proc/{pid}/smaps": (
                f"{START:x}-{START + PAGES * PAGE_SIZE:x} rw-p 00000000 00:00 0 \n"
                f"Rss: {PAGES * 4} kB\nAnonymous: {PAGES * 4} kB\nVmFlags: rd wr mg \n"
            ),
            f"proc/{pid}/stat": f"{pid} (x) S {' '.join(['1'] * 50)}\n",
            f"proc/{pid}/status": f"Name:\tx\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\n",
        }
    write_tree(root, files)
    for pid in (7, 8, 9):
        entries = array("Q", bytes(8 * (START // PAGE_SIZE)))
        entries.extend(PRESENT | 1000 * (pid - 6) + page for page in range(PAGES))
        (root / f"proc/{pid}/pagemap").write_bytes(entries.tobytes())
        with open(root / f"proc/{pid}/mem", "wb") as memory:
            memory.seek(START)
            for page in range(PAGES):
                memory.write(bytes([page % 251, page // 251]) * (PAGE_SIZE // 2))


def test_root_gets_what_there_is(tmp_path: Path) -> None:
    tree(tmp_path, run=0)
    found = FindDuplicates(1 << 20).run(Context(tmp_path, uid=0))
    assert (found.frames, found.pages) == (3 * PAGES, 2 * PAGES)


def test_whoever_asks_is_left_out_and_counts_are_rounded(tmp_path: Path) -> None:
    tree(tmp_path)
    found = FindDuplicates(1 << 20).run(Context(tmp_path, uid=SERVICE))
    # The tenant's two processes only: 1,200 frames of 600 contents, down to multiples of 256.
    assert (found.mergeable_pages, found.frames, found.pages) == (2 * PAGES, 1024, 512)


def test_how_often_related_processes_map_merged_pages_is_rounded_as_well(tmp_path: Path) -> None:
    tree(tmp_path)
    for pid in (8, 9):
        # Forks of one another, which map one of 700 frames at two places each.
        write_tree(tmp_path, {f"proc/{pid}/stat": f"{pid} (x) S 1{' 0' * 23} 2147418112{' 0' * 24}\n"})
        entries = array("Q", bytes(8 * (START // PAGE_SIZE)))
        entries.extend(PRESENT | 1000 + page // 2 for page in range(PAGES))
        (tmp_path / f"proc/{pid}/pagemap").write_bytes(entries.tobytes())
    exact = FindDuplicates(1 << 20).run(Context(tmp_path, uid=0))
    assert exact.related_places == PAGES
    assert FindDuplicates(1 << 20).run(Context(tmp_path, uid=SERVICE)).related_places == 512


@pytest.mark.parametrize("run", [0, 2])
def test_nothing_is_compared_while_nothing_is_merged(tmp_path: Path, run: int) -> None:
    tree(tmp_path, run)
    with pytest.raises(Refused, match=f"run is {run}"):
        FindDuplicates(1 << 20).run(Context(tmp_path, uid=SERVICE))
    Asker(0, tmp_path).need_merging("what")


@pytest.mark.parametrize(("pages", "told"), [(0, 0), (1, 0), (255, 0), (256, 256), (700, 512)])
def test_small_counts_are_not_told(pages: int, told: int) -> None:
    assert (Asker(SERVICE, Path("/")).rounded(pages), Asker(0, Path("/")).rounded(pages)) == (told, pages)


@pytest.mark.parametrize("place", range(4))
def test_each_uid_of_a_process_counts(tmp_path: Path, place: int) -> None:
    uids = [str(SERVICE) if at == place else "0" for at in range(4)]
    write_tree(tmp_path, {"proc/7/status": "Name:\tx\nUid:\t" + "\t".join(uids) + "\nGid:\t0\n"})
    assert not Asker(SERVICE, tmp_path).may_compare(7)
    assert Asker(99, tmp_path).may_compare(7)
    with pytest.raises(NoSuchProcess):
        Asker(SERVICE, tmp_path).may_compare(8)
