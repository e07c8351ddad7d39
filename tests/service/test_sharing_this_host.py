# SPDX-License-Identifier: GPL-2.0-or-later
"""Who shares memory with whom, on this host's kernel: by the service, and by the command alone."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.service.running import PROGRAM, Service, equal_pages, metrics, run_command, service, until
from tests.service.test_numa_this_host import MERGING, asked

pytestmark = pytest.mark.ksm

PAGES = 2000
PAGE = 4096


def merged(running: Service) -> bool | None:
    return True if running.status()["readings"]["pages_sharing"] >= 2 * PAGES - 20 else None


def check(document: dict[str, Any], pids: set[int]) -> None:
    """Two processes with equal pages share all that they have; the parts of both make the whole."""
    assert {group["pid"] for group in document["groups"]} == pids
    (pair,) = document["pairs"]
    assert pair["frames"] > 0
    first, second = document["groups"]
    assert first["merged_bytes"] == second["merged_bytes"] == PAGES * PAGE
    assert abs(first["saved_bytes"] + second["saved_bytes"] - document["look"]["saved_bytes"]) <= 2 * PAGE
    frames = pair["frames"] + first["own_frames"] + second["own_frames"]
    assert document["look"]["saved_bytes"] == (2 * PAGES - frames) * PAGE
    assert document["look"]["unseen_frames"] == 0


def test_two_that_share_everything(ksm_host: Path, tmp_path: Path) -> None:
    with service(tmp_path, MERGING) as running, equal_pages(PAGES) as one, equal_pages(PAGES) as other:
        until("all pages to be merged", lambda: merged(running))
        check(asked(running, "sharing", "--by", "process"), {one, other})

        def shown() -> Any:
            section = running.status()["sharing"]
            return section if section and section["merged_bytes"] else None

        section = until("a look in the background", shown)
        # Rounded down to 256 pages, whoever asks.
        assert section["merged_bytes"] == 2 * PAGES // 256 * 256 * PAGE
        assert (section["failures"], section["error"], section["complete"]) == (0, "", True)
        series = metrics(running.port)
        assert any(name.startswith("ksm_shared_with_others_bytes{") for name in series)
        assert series["ksm_unseen_frames"] == 0
        said = run_command("sharing", "--by", "process", "--socket", str(running.folder / "socket"))
        assert (said.returncode, "all frames counted" in said.stdout) == (0, True)
        # Without the service it is the same.
        alone = subprocess.run(
            [PROGRAM, "sharing", "--json", "--by", "process", "--socket", str(tmp_path / "none")],
            capture_output=True,
            text=True,
            check=True,
        )
        check(json.loads(alone.stdout), {one, other})


def test_which_privilege_is_missing_is_said(ksm_host: Path, tmp_path: Path) -> None:
    with equal_pages(20):
        words = [PROGRAM, "sharing", "--by", "process", "--json", "--socket", str(tmp_path / "none")]
        found = subprocess.run(
            ["setpriv", "--bounding-set", "-sys_admin", *words], capture_output=True, text=True, check=False
        )
    # Nothing is merged, so nobody is looked at; with the probe of a page of its own it notices.
    assert (found.returncode, found.stdout) == (3, "")
    assert "CAP_SYS_ADMIN" in found.stderr
