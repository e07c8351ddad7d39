# SPDX-License-Identifier: GPL-2.0-or-later
"""Huge pages that merging split, given back by a service, as somebody would do it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from tests.kernel.test_collapse import supported
from tests.kernel.test_detection import scan
from tests.kernel.test_zero_pages import huge_holders, khugepaged_asleep
from tests.service.running import run_command, service

__all__ = ["khugepaged_asleep", "supported"]

pytestmark = pytest.mark.ksm

PAGES = 4 * 512


@pytest.mark.usefixtures("supported", "khugepaged_asleep")
def test_a_process_gets_its_huge_pages_back_from_the_service(ksm_host: Path, tmp_path: Path) -> None:
    with huge_holders("huge", PAGES) as both:
        scan(ksm_host, 5)
        (ksm_host / "run").write_text("2")
        assert [one.huge_bytes() for one in both] == [0, 0]
        with service(tmp_path, "policy = 'observe'\n") as running:
            process = ["--pid", str(both[0].process.pid), "--keep-pages", "512"]
            words = [*process, "--socket", str(running.folder / "socket")]
            planned = run_command("collapse", *words, "--dry-run")
            assert (planned.returncode, "make 4 huge pages" in planned.stdout) == (0, True), planned
            done = run_command("collapse", *words, "--json")
            assert done.returncode == 0, done.stderr
            (found,) = json.loads(done.stdout)["processes"]
            assert (found["huge_before"], found["huge_after"], found["blocks"], found["left"]) == (0, 4, 4, {})
            assert running.end() == 0
        assert [one.huge_bytes() for one in both] == [PAGES * PAGE_SIZE, 0]
