# SPDX-License-Identifier: GPL-2.0-or-later
"""Made-up messages to a service that really runs, on a simulated host with memory to merge."""

from __future__ import annotations

import urllib.request
from pathlib import Path

from tests.fuzz.messages import say
from tests.service.running import healthy_service


def fuzz(folder: Path, messages: int, seed: int) -> int:
    """Say so many to a service, and see that it is well afterwards; how many calls it answered."""
    configuration = "policy = 'fixed'\n[knobs]\nrun = 1\npages_to_scan = 100\n"
    with healthy_service(folder, configuration, "engine") as service:
        answered = say(folder / "socket", messages, seed)
        assert service.process.poll() is None
        page = urllib.request.urlopen(f"http://127.0.0.1:{service.port}/", timeout=30).read().decode()
        assert "ksmd-ctl" in page
        assert service.status()["daemon"]["pid"] == service.process.pid
    return answered


def test_whatever_is_said_the_service_answers_or_hangs_up(tmp_path: Path) -> None:
    assert fuzz(tmp_path, 15_000, 1) > 3_000
