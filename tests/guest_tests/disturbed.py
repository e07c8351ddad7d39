# SPDX-License-Identifier: GPL-2.0-or-later
"""The service while others write the knobs: at random ten times a second, Debian's ksmtuned, memory going offline.

KSMTUNED=$(tools/deb-program ksmtuned ksmtuned); tests/guest/run --kernel 6.12 --nodes 2 --removable 256 -- \\
    env KSMD_CTL_KSMTUNED=$KSMTUNED python -m pytest -s tests/guest_tests/disturbed.py
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from ksmd_ctl.kernel.topology import memory_blocks
from tests.guest_tests.tenants import NODES, cgroups, knob, knobs, tenants, unchanged
from tests.guest_tests.transactions_repeated import MERGING, all_merged
from tests.guest_tests.unprivileged import unprivileged_service
from tests.service.running import LIMIT_SECONDS, PROGRAM, Service, metrics, until

__all__ = ["cgroups"]

pytestmark = pytest.mark.ksm

if len(NODES) < 2:
    pytest.skip(f"needs two nodes with memory, and there is {len(NODES)}", allow_module_level=True)

KSMTUNED = os.environ.get("KSMD_CTL_KSMTUNED", "")
#: A knob is put back ten times, at longer and longer intervals: after a bit more than two minutes it is given up.
SECONDS = float(os.environ.get("KSMD_CTL_SECONDS", "200"))
DECLARED = {"run": 1, "pages_to_scan": 2000, "sleep_millisecs": 10}

# Any knob, any value that it takes, ten times a second; it says at the end how often the kernel took one.
FLIPPER = """
import os, random, signal, sys, time
choice = random.Random(20261123)
values = {
    "run": [0, 1, 2], "pages_to_scan": [1, 100, 5000], "sleep_millisecs": [0, 20, 500], "merge_across_nodes": [0, 1],
    "max_page_sharing": [2, 64, 256], "stable_node_chains_prune_millisecs": [0, 2000], "use_zero_pages": [0, 1],
    "smart_scan": [0, 1],
}
names = [name for name in values if os.path.exists(f"{sys.argv[1]}/{name}")]
taken = refused = 0
def end(*_):
    print(taken, refused, flush=True)
    os._exit(0)
signal.signal(signal.SIGTERM, end)
while True:
    name = choice.choice(names)
    try:
        with open(f"{sys.argv[1]}/{name}", "w") as file:
            file.write(str(choice.choice(values[name])))
        taken += 1
    except OSError:
        refused += 1
    time.sleep(0.1)
"""


@contextmanager
def flipper(ksm: Path, said: list[str]) -> Iterator[None]:
    command = [sys.executable, "-I", "-S", "-c", FLIPPER, str(ksm)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield
        finally:
            process.terminate()
            said.append(process.communicate()[0].strip())


@contextmanager
def ksmtuned(folder: Path) -> Iterator[None]:
    """Debian's, unchanged; every two seconds."""
    pid = folder / "ksmtuned.pid"
    environment = {**os.environ, "KSM_MONITOR_INTERVAL": "2", "PIDFILE": str(pid)}
    subprocess.run([KSMTUNED], env=environment, check=True)
    try:
        yield
    finally:
        os.kill(int(pid.read_text()), signal.SIGKILL)


def movable_block() -> Path:
    found = [
        Path(f"/sys/devices/system/memory/memory{block.number}")
        for block in memory_blocks()
        if block.nodes == {NODES[1]}
    ]
    found = [path for path in found if (path / "valid_zones").read_text().startswith("Movable")]
    assert found, "the guest needs --removable"
    return found[-1]


def set_meanwhile(running: Service, value: int) -> str:
    """A transaction in the middle of it; what came of it."""
    words = [PROGRAM, "set", f"max_page_sharing={value}", "--json", "--socket", str(running.folder / "socket")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=3 * LIMIT_SECONDS, check=False)
    if done.stdout:
        document = json.loads(done.stdout)["transaction"]
        return f"{document['result']}{': ' if document['reason'] else ''}{document['reason']}"
    return f"exit code {done.returncode}: {done.stderr.splitlines()[0]}"


def test_others_write_the_knobs_all_the_time(ksm_host: Path, cgroups: Path, tmp_path: Path) -> None:
    assert KSMTUNED, "KSMD_CTL_KSMTUNED names Debian's ksmtuned (tools/deb-program)"
    before, log, said = knobs(ksm_host), tmp_path / "log", list[str]()
    outcomes: Counter[str] = Counter()
    lines = []
    block = movable_block()
    with tenants(cgroups, few=True) as found, log.open("w") as stream, ExitStack() as stack:
        running = stack.enter_context(unprivileged_service(MERGING, stream))
        until("everything to be merged", lambda: all_merged(ksm_host, found), LIMIT_SECONDS)
        with flipper(ksm_host, said), ksmtuned(tmp_path):
            began, rounds = time.monotonic(), 0
            while time.monotonic() - began < SECONDS:
                for word in ("offline", "online_movable"):
                    try:
                        (block / "state").write_text(word)
                    except OSError as error:
                        outcomes[f"{word}: {error.strerror}"] += 1
                outcomes[set_meanwhile(running, 100 + rounds)] += 1
                rounds += 1
                lines.append((time.monotonic() - began, len(log.read_text().splitlines())))
                assert running.process.poll() is None
            writers = running.status()["writers"]
            disturbed = {name: item for name, item in running.status()["knobs"].items() if item["state"] != "unmanaged"}
        print(f"\nflips taken and refused: {said}; {rounds} rounds; writers named: {writers}")
        for outcome, count in outcomes.items():
            print(f"{count} x {outcome}")
        for name, item in disturbed.items():
            print(f"{name}: {item['state']}, {item['drift_total']} times changed by others: {item['reason']}")
        print(f"lines in the log after so many seconds: {lines[:: max(1, len(lines) // 8)]}")

        assert any(writer["name"] == "ksmtuned" for writer in writers)
        assert {disturbed[name]["state"] for name in DECLARED} <= {"held", "drifted"}
        assert all(disturbed[name]["drift_total"] for name in DECLARED)
        assert len(log.read_text().splitlines()) < 150

        # They are gone, and a person has the service try again.
        running.process.send_signal(signal.SIGHUP)
        until("the knobs to be as declared", lambda: as_declared(ksm_host), LIMIT_SECONDS)
        transaction = running.status()["transaction"]
        assert transaction["running"] is None
        assert set_meanwhile(running, 99) == "done"
        assert knob(ksm_host, "max_page_sharing") == 99
        until("everything to be merged", lambda: all_merged(ksm_host, found), LIMIT_SECONDS)
        unchanged(found)
        assert metrics(running.port)['ksmd_ctl_transactions_total{result="done"}'] >= 1
        stack.close()
        # What the service found at first is what it leaves, as far as it had to do with it.
        after = knobs(ksm_host)
        assert {name: after[name] for name in DECLARED} == {name: before[name] for name in DECLARED}


def as_declared(ksm: Path) -> bool | None:
    return {name: knob(ksm, name) for name in DECLARED} == DECLARED or None
