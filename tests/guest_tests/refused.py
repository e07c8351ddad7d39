# SPDX-License-Identifier: GPL-2.0-or-later
"""Where Yama lets nobody at another process, not even root: what is still known, and what is refused. In a guest:

tests/guest/run --kernel 6.12 --nodes 2 -- python -m pytest tests/guest_tests/refused.py

It comes last in a guest: kernel.yama.ptrace_scope can't be taken back before the next boot.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from ksmd_ctl.kernel.detection import probe
from tests.service.programs import Ksm, equal, program, visit
from tests.service.running import configure, run_command

pytestmark = pytest.mark.ksm

SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")
PAGES = 400


@pytest.fixture
def ksm(ksm_host: Path) -> Ksm:
    if not SCOPE.exists():
        pytest.skip("this kernel has no Yama")
    SCOPE.write_text("3\n")
    return Ksm(ksm_host)


def test_yama_refuses_even_root(ksm: Ksm, tmp_path: Path) -> None:
    config = configure(tmp_path, "[limits]\nfloor_bytes = 16777216\nmax_pressure = 1.0\n")
    here = f"os.sched_setaffinity(0, {{0}})\n{equal(PAGES)}"
    with program(here) as one, program(here):
        ksm.merging(sleep_millisecs=500)
        ksm.scanned(4)
        found = visit(tmp_path)
        # Counters and page tables are read as always; contents are not, and that is said with what would help.
        kernel = ["kpageflags"] if probe().bit_lies else []
        assert (found.codes, found.code) == (["unseen", *kernel], 0), found
        (unknown,) = found.document["looked"]["unknown"]
        assert unknown["what"] == "contents of memory"
        assert "kernel.yama.ptrace_scope" in unknown["hint"]
        assert found.document["looked"]["merged_pages"] == 2 * PAGES

        def command(*words: str) -> subprocess.CompletedProcess[str]:
            return run_command(*words, "--config", str(config))

        done = command("unmerge", "--pid", str(one.pid))
        print(done)
        assert done.returncode == 1
        un_merged, left = done.stdout.splitlines()[:2]
        assert un_merged.startswith("un-merged  0 pages"), done
        assert left.startswith(f"left       {PAGES} pages: no access to its memory, by Yama or"), done
        for words in (["off"], ["off", "--dry-run"]):
            done = command("merge", *words, "--pid", str(one.pid))
            assert (done.returncode, done.stdout) == (3, ""), done
            assert "kernel.yama.ptrace_scope is 3" in done.stderr
            assert len(done.stderr.splitlines()) == 2
        assert ksm["pages_sharing"] == PAGES
        # run = 2 asks nobody: so a knob can be changed all the same, and it is told that it was done in one go.
        done = command("set", "max_page_sharing=100", "--json")
        print(done)
        assert done.returncode == 0, done.stderr
        transaction = json.loads(done.stdout)["transaction"]
        assert (transaction["result"], transaction["pages"]["unshared"]) == ("done", 0)
        assert "no access to its memory" in str(transaction["left"])
        assert (ksm["max_page_sharing"], ksm["run"]) == (100, 1)
