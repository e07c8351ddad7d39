# SPDX-License-Identifier: GPL-2.0-or-later
"""This host's ksmd at work, recorded and replayed."""

from __future__ import annotations

import json
import os
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.page_sample import PageLook, Selection
from ksmd_ctl.kernel.page_sample import KernelPages
from ksmd_ctl.kernel.proc_pid import start_time_ticks
from tests.service.programs import equal, program
from tests.service.running import PROGRAM, until

pytestmark = pytest.mark.ksm

PAGES = 2000


def look(pages: KernelPages, *, zero_pages: bool = False) -> PageLook:
    steps = pages.look(zero_pages=zero_pages)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found: PageLook = end.value
            return found


def counter(ksm: Path, name: str) -> int:
    return int((ksm / name).read_text())


def merge(ksm: Path, sharing: int) -> None:
    (ksm / "pages_to_scan").write_text("5000")
    (ksm / "run").write_text("1")
    until("pages to be merged", lambda: counter(ksm, "pages_sharing") == sharing or None)


def test_a_look_finds_which_pages_are_equal_and_changes_none(ksm_host: Path) -> None:
    pages = KernelPages(Selection())
    with program(equal(100, 1)) as one, program(equal(100, 51)) as other:
        assert pages.pages() == 200
        found = look(pages)
        by_pid = {each.process.pid: each for each in found.processes}
        assert by_pid.keys() == {one.pid, other.pid}
        assert by_pid[one.pid].process == ProcessId(one.pid, start_time_ticks(one.pid))
        numbers = [[page.number for _, page in sorted(each.sampled.items())] for each in by_pid.values()]
        assert sorted(map(len, numbers)) == [100, 100]
        assert len(set(numbers[0]) & set(numbers[1])) == 50
        assert {page.frame for each in by_pid.values() for page in each.sampled.values()} == {0}
        about = by_pid[one.pid].about
        assert about is not None
        assert about.id.pid == one.pid
        merge(ksm_host, 50)
        broken = counter(ksm_host, "pages_shared")
        again = {each.process.pid: each for each in look(pages).processes}
        assert again[one.pid].about is None
        for pid, each in again.items():
            assert {address: page.number for address, page in each.sampled.items()} == {
                address: page.number for address, page in by_pid[pid].sampled.items()
            }
        frames = [{page.frame for page in each.sampled.values()} - {0} for each in again.values()]
        assert frames[0] == frames[1]
        assert len(frames[0]) == 50
        # Reading un-merges nothing.
        assert (counter(ksm_host, "pages_shared"), counter(ksm_host, "pages_sharing")) == (broken, 50)


def test_the_zero_page_is_a_page_of_zeroes_only_where_ksmd_put_it(ksm_host: Path) -> None:
    pages = KernelPages(Selection())
    (ksm_host / "use_zero_pages").write_text("1")
    with program("area = mergeable([0] * 60 + list(range(1, 41)))") as one:
        (ksm_host / "pages_to_scan").write_text("5000")
        (ksm_host / "run").write_text("1")
        until("zeroes to be merged", lambda: counter(ksm_host, "ksm_zero_pages") == 60 or None)
        (without,) = look(pages).processes
        (found,) = look(pages, zero_pages=True).processes
        assert (without.process.pid, without.pages, found.pages) == (one.pid, 40, 100)


def test_what_is_in_memory_is_seen_of_newcomers_too(ksm_host: Path) -> None:
    pages = KernelPages(Selection())
    with program(equal(100)) as one:
        look(pages)
        known = [ProcessId(one.pid, start_time_ticks(one.pid))]
        with program(equal(100)) as other:
            found = pages.counts(known)
            assert {one.pid, other.pid} <= {process.pid for process in found}
            assert os.getpid() not in {process.pid for process in found}
            assert found[known[0]].resident > 100
    assert not {process.pid for process in pages.counts(known)} & {one.pid, other.pid}


@pytest.mark.parametrize("smart_scan", [0, 1])
def test_a_replay_is_near_the_kernel(ksm_host: Path, tmp_path: Path, smart_scan: int) -> None:
    """Not a figure of how near: this machine may be busy. At the end everything is merged on both."""
    path = tmp_path / "r.ksm"
    (ksm_host / "smart_scan").write_text(str(smart_scan))
    (ksm_host / "pages_to_scan").write_text("200")
    words = [PROGRAM, "record", "--host", "kernel", "-o", str(path), "--for", "14", "--cpu", "1", "--every", "0.25"]
    with ExitStack() as stack:
        for number in range(3):
            stack.enter_context(program(equal(PAGES, 1 + 500 * number)))
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as recording:
            until("the recording to begin", lambda: (path.exists() and path.stat().st_size > 0) or None)
            time.sleep(0.5)
            (ksm_host / "run").write_text("1")
            said, _ = recording.communicate(timeout=120)
        assert recording.returncode == 0
        assert "looks at all pages" in said
        merged = counter(ksm_host, "pages_sharing")
    done = subprocess.run([PROGRAM, "replay", str(path), "--json"], capture_output=True, text=True, check=True)
    document = json.loads(done.stdout)
    last = document["timeline"][-1]
    assert last["recorded"]["pages_sharing"] == merged > 2000
    assert last["replayed"]["pages_sharing"] == merged
    assert last["replayed"]["pages_shared"] == last["recorded"]["pages_shared"]
    assert document["pages_sharing_difference"]["median"] < 0.5
    report = subprocess.run([PROGRAM, "report", str(path), "--json"], capture_output=True, text=True, check=True)
    contents = json.loads(report.stdout)["contents"]
    assert (contents["pages"], contents["could_save_bytes"]) == (3 * PAGES, merged * 4096)
