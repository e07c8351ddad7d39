# SPDX-License-Identifier: GPL-2.0-or-later
"""Transactions in both directions, over and over, by a service without privilege and its broker. Inside a guest:

tests/guest/run --kernel 6.12 --nodes 4 --timeout 900 -- \\
    env KSMD_CTL_ROUNDS=20 python -m pytest -s tests/guest_tests/transactions_repeated.py
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from ksmd_ctl.cli.client import Conversation
from tests.guest_tests.tenants import NODES, PAGES, Placed, cgroups, knob, share, tenants, unchanged
from tests.guest_tests.unprivileged import NOBODY, unprivileged_service
from tests.service.running import LIMIT_SECONDS, PROGRAM, Service, until

__all__ = ["cgroups"]

pytestmark = pytest.mark.ksm

if len(NODES) < 2:
    pytest.skip(f"needs two nodes with memory, and there is {len(NODES)}", allow_module_level=True)

ROUNDS = int(os.environ.get("KSMD_CTL_ROUNDS", "1"))
MERGING = (
    "policy = 'fixed'\n[knobs]\nrun = 1\npages_to_scan = 2000\nsleep_millisecs = 10\n"
    "[limits]\nfloor_bytes = 16777216\nmax_pressure = 1.0\n[census]\ninterval = 86400\n"
)


def all_merged(ksm: Path, found: list[Placed]) -> bool | None:
    total = sum(tenant.pages for tenant in found)
    return knob(ksm, "pages_shared") + knob(ksm, "pages_sharing") >= total or None


def changed(running: Service, across: int) -> Any:
    """What the command asks, without its interpreter's start, which takes longest here."""
    with Conversation(str(running.folder / "socket"), "Set", {"knobs": {"merge_across_nodes": across}}) as talk:
        answer = talk.answer()
        while answer is not None and not answer["transaction"]:
            answer = talk.answer()
    assert answer is not None
    return answer["transaction"]


def changed_by_the_command(running: Service, across: int) -> Any:
    done = subprocess.run(
        [PROGRAM, "set", f"merge_across_nodes={across}", "--json", "--socket", str(running.folder / "socket")],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads(done.stdout)["transaction"]


def test_both_directions_over_and_over(ksm_host: Path, cgroups: Path) -> None:
    knob(ksm_host, "run", 2)
    knob(ksm_host, "merge_across_nodes", 1)
    if (ksm_host / "smart_scan").exists():
        # It would have ksmd come by less and less often, and each round wait for that.
        knob(ksm_host, "smart_scan", 0)
    with tenants(cgroups, few=True) as found, unprivileged_service(MERGING) as running:
        uid = Path(f"/proc/{running.process.pid}").stat().st_uid
        print(f"\n{len(NODES)} nodes, {len(found)} processes, {PAGES * len(found)} pages, service with uid {uid}")
        assert uid == NOBODY
        for number in range(1, ROUNDS + 1):
            for across in (0, 1):
                until("everything to be merged", lambda: all_merged(ksm_host, found), LIMIT_SECONDS)
                before = share(found)
                began = time.monotonic()
                document = changed(running, across) if number > 1 else changed_by_the_command(running, across)
                after = document["home"]["after"]["ratio"]
                print(
                    f"{number}: merge_across_nodes {1 - across} -> {across}: {document['result']}, at home "
                    f"{before:.1%} before, {after:.1%} after; {document['pages']['unshared']} pages un-merged, "
                    f"{document['pages']['rest']} left to run = 2, in {document['duration_seconds']:.1f} s "
                    f"({time.monotonic() - began:.1f} s with the plan)",
                    flush=True,
                )
                assert document["result"] == "done"
                assert after >= 0.99
                assert (knob(ksm_host, "merge_across_nodes"), knob(ksm_host, "run")) == (across, 1)
                if not across:
                    until("everything to be merged", lambda: all_merged(ksm_host, found), LIMIT_SECONDS)
                    assert share(found) >= 0.99
        unchanged(found)
        assert running.status()["transaction"]["totals"]["done"] == 2 * ROUNDS
