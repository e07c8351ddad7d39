# SPDX-License-Identifier: GPL-2.0-or-later
"""The service heals twins on this host: pages that are left of full ones, which one node is enough for."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from ksmd_ctl.kernel.pagemap import Pagemap, frames_of
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.scenario.regions import RegionProcess, spawn
from tests.service.running import metrics, service, until

pytestmark = pytest.mark.ksm

CONTENTS = 400
MAPPINGS = 8
LIMIT_SECONDS = 120.0

MERGING = (
    "policy = 'fixed'\n[knobs]\nrun = 1\npages_to_scan = 20000\nsleep_millisecs = 10\nmax_page_sharing = 4\n"
    "smart_scan = { value = 0, optional = true }\n"
    "[census]\ninterval = 5\ncpu_share = 0.5\n[healing]\ntwins = true\n"
)


def page(number: int) -> bytes:
    return b"%015d\n" % number * 256


def leave_one(process: RegionProcess, start: int) -> None:
    """Discard all mappings of each KSM page but one."""
    with Pagemap(process.id.pid) as pagemap:
        frames = frames_of(pagemap.read(start, CONTENTS * MAPPINGS))
    seen = set()
    for index, frame in enumerate(frames):
        if frame in seen:
            process.discard(start + index * PAGE_SIZE, 1)
        seen.add(frame)


def test_what_is_left_of_full_pages_becomes_one(ksm_host: Path, tmp_path: Path) -> None:
    if not (ksm_host / "max_page_sharing").exists():
        pytest.skip("this kernel has no max_page_sharing")
    (ksm_host / "run").write_text("2")
    (ksm_host / "max_page_sharing").write_text("4")

    def counts() -> tuple[int, int]:
        return int((ksm_host / "pages_shared").read_text()), int((ksm_host / "pages_sharing").read_text())

    with spawn("test-twins") as process:
        start = process.map(CONTENTS * MAPPINGS)
        process.advise(start, CONTENTS * MAPPINGS, mergeable=True)
        process.store(start, [page(number) for number in range(CONTENTS) for _ in range(MAPPINGS)])
        with service(tmp_path, MERGING) as running:
            until("it to merge", lambda: counts() == (2 * CONTENTS, 6 * CONTENTS) or None, LIMIT_SECONDS)
            # On a busy machine that takes so long that the service would look, and heal, while it is half done.
            running.process.send_signal(signal.SIGSTOP)
            leave_one(process, start)
            running.process.send_signal(signal.SIGCONT)
            before = process.load(start, CONTENTS * MAPPINGS)
            until("one page for each content", lambda: counts() == (CONTENTS, CONTENTS) or None, LIMIT_SECONDS)
            until(
                "the service to know",
                lambda: metrics(running.port).get('ksm_unrealised_pages{reason="twins"}') == 0 or None,
                LIMIT_SECONDS,
            )
            healing = running.status()["healing"]
            assert (healing["allowed"], healing["unrealised"]["twins"]) == (True, 0)
            assert healing["healed_pages"] == CONTENTS
            assert healing["unmerged_pages"] == CONTENTS
            assert running.end() == 0
        assert process.load(start, CONTENTS * MAPPINGS) == before
