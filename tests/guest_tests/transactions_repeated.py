# SPDX-License-Identifier: GPL-2.0-or-later
"""Transactions in both directions, over and over, by a service without privilege and its broker. Inside a guest:

tests/guest/run --kernel 6.12 --nodes 4 --timeout 900 -- \\
    env KSMD_CTL_ROUNDS=20 python -m pytest -s tests/guest_tests/transactions_repeated.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.guest_tests.tenants import NODES, PAGES, Placed, cgroups, knob, share, tenants, unchanged
from tests.service.running import PROGRAM, Service, configure, free_port, until

__all__ = ["cgroups"]

pytestmark = pytest.mark.ksm

if len(NODES) < 2:
    pytest.skip(f"needs two nodes with memory, and there is {len(NODES)}", allow_module_level=True)

ROUNDS = int(os.environ.get("KSMD_CTL_ROUNDS", "1"))
#: Emulated, under load.
LIMIT_SECONDS = 120.0
NOBODY = 65534
MERGING = (
    "policy = 'fixed'\n[knobs]\nrun = 1\npages_to_scan = 2000\nsleep_millisecs = 10\n"
    "[limits]\nfloor_bytes = 16777216\nmax_pressure = 1.0\n[census]\ninterval = 86400\n"
)


@contextmanager
def unprivileged_service() -> Iterator[Service]:
    """As the package runs it: the service as a user without any privilege, and the broker as root."""
    # Where the interpreter is, only root can go; what a guest changes is gone with it.
    for path in (*Path(sys.executable).resolve().parents, *Path(PROGRAM).parents):
        if not path.stat().st_mode & 0o001:
            path.chmod(path.stat().st_mode | 0o555)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        broker_socket = folder / "broker"
        config = configure(folder, MERGING, broker_socket=str(broker_socket))
        os.chown(folder, NOBODY, NOBODY)
        port = free_port()
        broker = [sys.executable, "-I", "-m", "ksmd_ctl.kernel.broker", "--user", str(NOBODY)]
        nobody = ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups", "--bounding-set", "-all"]
        daemon = [PROGRAM, "daemon", "--config", str(config), "--metrics-listen", f"127.0.0.1:{port}"]
        with subprocess.Popen([*broker, "--socket", str(broker_socket), "--idle-seconds", "3600"]) as privileged:
            try:
                until("the broker", lambda: broker_socket.exists() or None, LIMIT_SECONDS)
                with subprocess.Popen([*nobody, *daemon], text=True) as process:
                    running = Service(process, folder, port)
                    try:
                        until("the service", running.answers, LIMIT_SECONDS)
                        yield running
                        assert running.end() == 0
                    finally:
                        if process.poll() is None:
                            process.kill()
            finally:
                privileged.kill()


def all_merged(ksm: Path, found: list[Placed]) -> bool | None:
    total = sum(tenant.pages for tenant in found)
    return knob(ksm, "pages_shared") + knob(ksm, "pages_sharing") >= total or None


def changed(running: Service, *words: str) -> Any:
    done = subprocess.run(
        [PROGRAM, "set", *words, "--json", "--socket", str(running.folder / "socket")],
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
    with tenants(cgroups, few=True) as found, unprivileged_service() as running:
        uid = Path(f"/proc/{running.process.pid}").stat().st_uid
        print(f"\n{len(NODES)} nodes, {len(found)} processes, {PAGES * len(found)} pages, service with uid {uid}")
        assert uid == NOBODY
        for number in range(1, ROUNDS + 1):
            for across in (0, 1):
                until("everything to be merged", lambda: all_merged(ksm_host, found), LIMIT_SECONDS)
                before = share(found)
                began = time.monotonic()
                document = changed(running, f"merge_across_nodes={across}")
                after = document["home"]["after"]["ratio"]
                print(
                    f"{number}: merge_across_nodes {1 - across} -> {across}: {document['result']}, at home "
                    f"{before:.1%} before, {after:.1%} after; {document['pages']['unshared']} pages un-merged, "
                    f"{document['pages']['rest']} left to run = 2, in {document['duration_seconds']:.1f} s "
                    f"({time.monotonic() - began:.1f} s with the command)",
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
