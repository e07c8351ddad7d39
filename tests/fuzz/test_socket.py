# SPDX-License-Identifier: GPL-2.0-or-later
"""Made-up messages to a service that really runs, on a simulated host with memory to merge."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from pathlib import Path

from tests.fuzz.messages import say
from tests.service.running import PROGRAM, configure, free_port, metrics, until


def fuzz(folder: Path, messages: int, seed: int) -> int:
    """Say so many to a service, and see that it is well afterwards; how many calls it answered."""
    port = free_port()
    path = configure(folder, "policy = 'fixed'\n[knobs]\nrun = 1\npages_to_scan = 100\n")
    command = [PROGRAM, "daemon", "--host", "engine", "--config", str(path), "--metrics-listen", f"127.0.0.1:{port}"]
    log = folder / "log"
    with log.open("w") as stderr, subprocess.Popen(command, stderr=stderr, text=True) as process:
        try:
            until("the socket", lambda: (folder / "socket").exists() or None)
            until("the metrics", lambda: metrics_of(port))
            answered = say(folder / "socket", messages, seed)
            assert process.poll() is None
            page = urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30).read().decode()
            assert "ksmd-ctl" in page
            status = [PROGRAM, "status", "--json", "--socket", str(folder / "socket")]
            found = subprocess.run(status, capture_output=True, text=True, timeout=60, check=True)
            assert json.loads(found.stdout)["daemon"]["pid"] == process.pid
            process.terminate()
            assert process.wait(60) == 0
        finally:
            if process.poll() is None:
                process.kill()
    said = log.read_text()
    assert "Traceback" not in said, said[-3000:]
    assert "bug" not in said, said[-3000:]
    return answered


def metrics_of(port: int) -> dict[str, float] | None:
    try:
        return metrics(port)
    except OSError:
        return None


def test_whatever_is_said_the_service_answers_or_hangs_up(tmp_path: Path) -> None:
    assert fuzz(tmp_path, 15_000, 1) > 3_000
