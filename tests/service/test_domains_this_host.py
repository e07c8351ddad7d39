# SPDX-License-Identifier: GPL-2.0-or-later
"""Trust domains on this host's kernel, which may have one node: what is merged across users is found, and its end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ksmd_ctl.errors import ExitCode
from tests.service.running import ROOT, Service, run_command, service, until

pytestmark = pytest.mark.ksm

GOLD, SILVER = 65533, 65534
PAGES = 1000
MERGING = """policy = "fixed"
[knobs]
run = 1
pages_to_scan = 5000
sleep_millisecs = 10
[census]
interval = 5
cpu_share = 0.5
[domains]
"""
USERS = f"""[domains.gold]
users = ["{GOLD}"]
[domains.silver]
users = ["{SILVER}"]
"""


@contextmanager
def equal_pages_of(user: int) -> Iterator[int]:
    """A process of a user with equal mergeable pages; its pid."""
    command = [sys.executable, str(ROOT / "examples/equal_pages.py"), str(PAGES)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, user=user, group=user) as process:
        try:
            assert process.stdout is not None
            assert "mergeable" in process.stdout.readline()
            yield process.pid
        finally:
            process.kill()


def shared(running: Service, domain: str) -> float | None:
    return (running.answers() or {}).get(f'ksm_cross_domain_frames{{domain="{domain}"}}')


def asked(running: Service, *words: str) -> tuple[int, Any]:
    done = run_command(*words, "--json", "--socket", str(running.folder / "socket"))
    return done.returncode, json.loads(done.stdout)


def verdicts(running: Service) -> tuple[int, list[str]]:
    code, document = asked(running, "domains")
    return code, [one["verdict"] for one in document["domains"]]


def test_what_is_merged_across_domains_is_found_and_its_end(ksm_host: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        log.open("w") as stderr,
        service(tmp_path, MERGING + USERS, stderr=stderr) as running,
        equal_pages_of(GOLD),
    ):
        with equal_pages_of(SILVER):
            until("frames to be shared", lambda: True if shared(running, "gold") else None)
            assert shared(running, "silver")
            code, document = asked(running, "domains")
            gold, silver = document["domains"][:2]
            assert (code, gold["verdict"], silver["verdict"]) == (
                ExitCode.CHECK_FAILED,
                "not isolated",
                "not isolated",
            )
            # All pages have one content, and a KSM page has 256 mappings at most.
            assert 0 < gold["shared_with"]["silver"] == gold["shared_frames"] <= 2 * PAGES // 256 + 1
            assert gold["merged_pages"] == silver["merged_pages"] == PAGES
            groups = asked(running, "sharing", "--by", "domain")[1]["groups"]
            assert {group["group"] for group in groups} == {"gold", "silver"}
        until("nothing to be shared", lambda: True if shared(running, "gold") == 0 else None)
        # A process can end between the looks at memory and at members: the next audit has both.
        ended = (ExitCode.DONE, ["nothing is shared now", "no members"])
        until("the members to be gone", lambda: True if verdicts(running) == ended else None)
    said = log.read_text()
    assert "domain gold is not isolated: merged frames are shared with other domains" in said
    assert "domain gold: nothing is shared now" in said


def test_a_node_that_is_not_there_is_a_verdict(ksm_host: Path, tmp_path: Path) -> None:
    nodes = MERGING + 'mode = "nodes"\n' + USERS.replace(f'["{GOLD}"]', f'["{GOLD}"]\nnodes = "0"')
    nodes = nodes.replace(f'["{SILVER}"]', f'["{SILVER}"]\nnodes = "900"')
    with service(tmp_path, nodes) as running, equal_pages_of(GOLD), equal_pages_of(SILVER):
        until("the first audit", lambda: True if shared(running, "gold") is not None else None)
        code, document = asked(running, "domains")
    gold, silver = document["domains"][:2]
    assert (code, silver["verdict"]) == (ExitCode.CHECK_FAILED, "not isolated")
    assert any(reason["text"].startswith("this host has no node 900, but 0") for reason in silver["reasons"])
    # On one node they are on each other's.
    assert "others on its nodes" in {reason["cause"] for reason in gold["reasons"]}
