# SPDX-License-Identifier: GPL-2.0-or-later
"""The doctor where merged memory was swapped out and comes back, with compressed memory for swap."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.service.programs import Ksm, Program, program, visit
from tests.service.running import service, until
from tests.service.swap import ZRAM, swap_device
from tests.service.test_doctor_this_host import merged

pytestmark = pytest.mark.ksm

PAGES = 4000
#: So many are read at a time.
PART = 50
CGROUPS = Path("/sys/fs/cgroup/memory")

READER = """
open({procs!r}, "w").write(str(os.getpid()))
area = mergeable(range(1, {pages} + 1))
for part in range(0, {pages}, {part}):
    ready()
    command()
    for at in range(part, part + {part}):
        area[at * PAGE]
"""


@pytest.fixture
def swap() -> Iterator[None]:
    """A swap device of its own."""
    if not ZRAM.exists():
        pytest.skip("this kernel has no zram")
    with swap_device():
        yield


@pytest.fixture
def cgroup() -> Iterator[Path]:
    if not (CGROUPS / "memory.force_empty").exists():
        pytest.skip("no memory controller of cgroup v1 here")
    folder = CGROUPS / "ksmd-ctl-test-swap"
    folder.mkdir()
    try:
        yield folder
    finally:
        until("it to be empty", lambda: removed(folder))


def removed(folder: Path) -> bool | None:
    try:
        folder.rmdir()
    except OSError:
        return None
    return True


def swapped_pages(one: Program) -> int:
    status = Path(f"/proc/{one.pid}/status").read_text()
    return int(status.partition("VmSwap:")[2].split()[0]) // 4


@contextmanager
def swapped_out(ksm: Ksm, cgroup: Path) -> Iterator[tuple[Program, Program]]:
    """Two processes whose merged pages are all in swap; told to, they read them."""
    code = READER.format(procs=str(cgroup / "cgroup.procs"), pages=PAGES, part=PART)
    with program(code) as one, program(code) as other:
        ksm.merging()
        merged(ksm, PAGES)

        def away() -> bool | None:
            (cgroup / "memory.force_empty").write_text("0")
            return True if min(swapped_pages(one), swapped_pages(other)) >= PAGES * 0.95 else None

        until("all to be in swap", away)
        yield one, other


def test_in_swap_and_back_as_copies(swap: None, cgroup: Path, ksm_host: Path, tmp_path: Path) -> None:
    ksm = Ksm(ksm_host)
    with swapped_out(ksm, cgroup) as both:
        found = visit(tmp_path)
        assert found.codes == ["swapped"], found
        assert found.figure("swapped", "swapped out") >= 2 * PAGES * 4096 * 0.95
        ksm.set(run=0)
        with ThreadPoolExecutor(1) as pool:
            looking = pool.submit(visit, tmp_path, seconds=5)
            # A bit all the time, so that some of it comes back between its two looks.
            for _ in range(PAGES // PART):
                for one in both:
                    one.say("read")
                if wait([looking], 0.2).done:
                    break
            found = looking.result()
        assert {"ksm-off", "swap-copies"} <= set(found.codes), found
        assert "they stay copies while KSM is off" in found["swap-copies"]["title"]


WATCHES = "policy = 'fixed'\n[knobs]\nrun = 0\n"


def test_the_service_counts_the_copies_until_they_are_merged_again(
    swap: None, cgroup: Path, ksm_host: Path, tmp_path: Path
) -> None:
    ksm = Ksm(ksm_host)
    with swapped_out(ksm, cgroup) as both, service(tmp_path, WATCHES, on_drift="observe") as running:
        until("ksmd to be stopped", lambda: running.has("run", 0))
        assert running.status()["healing"]["unrealised"]["swapin"] == 0
        before = copied()
        for _ in range(PAGES // PART):
            for one in both:
                one.say("read")
        copies = copied() - before
        assert copies >= PAGES * 0.9

        def counted() -> bool | None:
            return True if running.status()["healing"]["unrealised"]["swapin"] == copies else None

        until("the copies to be counted", counted)
        found = visit(tmp_path)
        assert found.figure("swap-copies", "copies that ksmd has not scanned twice") == copies
        # As many as there are by contents.
        assert found.document["looked"]["contents"]["apart"] == pytest.approx(copies, abs=PAGES * 0.1)
        # Somebody switches it on, and the service leaves that as it is until it holds its knobs again.
        ksm.merging()
        until("ksmd to have passed them", lambda: running.status()["healing"]["unrealised"]["swapin"] == 0 or None)


def copied() -> int:
    return int(Path("/proc/vmstat").read_text().partition("ksm_swpin_copy ")[2].split()[0])
