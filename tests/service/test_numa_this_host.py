# SPDX-License-Identifier: GPL-2.0-or-later
"""nodes, processes and migrate against the service on this host's kernel, whatever nodes it has."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.service.running import PROGRAM, Service, equal_pages, metrics, service, until

pytestmark = pytest.mark.ksm

MERGING = (
    "policy = 'fixed'\n[knobs]\nrun = 1\npages_to_scan = 5000\nsleep_millisecs = 10\n"
    "[census]\ninterval = 5\ncpu_share = 0.5\n"
)


def asked(running: Service, *words: str) -> Any:
    result = subprocess.run(
        [PROGRAM, *words, "--json", "--socket", str(running.folder / "socket")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_where_and_whose_and_already_there(ksm_host: Path, tmp_path: Path) -> None:
    with service(tmp_path, MERGING) as running, equal_pages(2000) as pid:
        until("2000 equal pages to be merged", lambda: merged(running))
        nodes = asked(running, "nodes")
        shared = running.status()["readings"]["pages_shared"]
        assert nodes["survey"]["complete"] is True
        assert sum(node["ksm_pages"] for node in nodes["nodes"].values()) == shared
        assert sum(node["mapped_pages"] for node in nodes["nodes"].values()) == 2000
        (process,) = (item for item in asked(running, "processes")["processes"] if item["pid"] == pid)
        assert (process["merging_pages"], sum(process["nodes"].values())) == (2000, 2000)
        series = until("the metrics to follow", lambda: followed(running.port, shared))
        assert sum(pages for name, pages in series.items() if name.startswith("ksm_group_merging_pages{")) == 2000
        (node,) = process["nodes"]
        moved = asked(running, "migrate", "--pid", str(pid), "--to", node)
        assert moved["totals"] == {"moved": 0, "would_move": 0, "already": shared, "left": 0}
        assert running.end() == 0


def merged(running: Service) -> bool | None:
    return True if running.status()["readings"]["pages_sharing"] >= 1990 else None


def followed(port: int, shared: int) -> dict[str, float] | None:
    found = metrics(port)
    pages = sum(value for name, value in found.items() if name.startswith("ksm_node_pages{"))
    return found if pages == shared else None


@pytest.mark.parametrize("word", ["--dry-run", "--json"])
def test_which_privilege_is_missing_is_said(ksm_host: Path, tmp_path: Path, word: str) -> None:
    with equal_pages(20) as pid:
        words = [PROGRAM, "migrate", "--pid", str(pid), "--to", "0", "--socket", str(tmp_path / "none"), word]
        found = subprocess.run(
            ["setpriv", "--bounding-set", "-sys_admin", *words], capture_output=True, text=True, check=False
        )
    assert (found.returncode, found.stdout) == (3, "")
    assert "CAP_SYS_ADMIN" in found.stderr
