# SPDX-License-Identifier: GPL-2.0-or-later
"""Policies on this host's kernel, through the running service."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.service.running import PROGRAM, Service, knobs, service, until

pytestmark = pytest.mark.ksm

LIMIT = 120.0

_PROCESS = """
import mmap, signal, sys
pages, label = int(sys.argv[1]), sys.argv[2]
memory = mmap.mmap(-1, pages * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
for page in range(pages):
    memory[page * mmap.PAGESIZE : page * mmap.PAGESIZE + 40] = f"{label} {page}".encode().ljust(40)
memory.madvise(mmap.MADV_MERGEABLE)
print("ready", flush=True)
signal.pause()
"""


@contextmanager
def pages(count: int, label: str) -> Iterator[None]:
    """A process with so many pages of its own, which are equal to those of another one with this label."""
    command = [sys.executable, "-c", _PROCESS, str(count), label]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield
        finally:
            process.kill()


def reading(running: Service, name: str) -> float:
    return float(running.answers()[name])  # type: ignore[index]


def merged(running: Service, count: int) -> bool | None:
    return True if reading(running, "ksm_pages_sharing") >= count else None


def test_adaptive_merges_what_comes_says_why_and_puts_everything_back(ksm_host: Path, tmp_path: Path) -> None:
    before = knobs(ksm_host)
    with service(tmp_path, "policy = 'adaptive'\n") as running:
        until("run = 1", lambda: running.has("run", 1))
        with pages(20_000, "a"), pages(20_000, "a"):
            until("all to be merged", lambda: merged(running, 20_000), LIMIT)
            until("rest", lambda: running.status()["decision"]["phase"] == "background" or None, LIMIT)
            until("smart_scan on again", lambda: running.has("smart_scan", 1))
            explained = subprocess.run(
                [PROGRAM, "status", "--explain", "--socket", str(tmp_path / "socket")],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            assert "\nwhy        background: the last burst merged " in explained
            assert "\ndecided    " in explained
            assert "quick: " in explained
        assert running.end() == 0
    assert knobs(ksm_host) == before


def test_locked_pairs_are_recovered_within_ten_full_scans(ksm_host: Path, tmp_path: Path) -> None:
    """1,000 pages whose twins come 13 full scans later never merge with smart_scan on (findings F2)."""
    configuration = (
        "policy = 'fixed'\nhealing.smart_scan = true\n"
        "[knobs]\nrun = 1\npages_to_scan = 400\nsleep_millisecs = 700\nsmart_scan = 1\n"
    )
    with service(tmp_path, configuration) as running:
        until("run = 1", lambda: running.has("run", 1))
        with pages(1000, "pair"):
            began = reading(running, "ksm_full_scans_total")
            until(
                "13 full scans",
                lambda: reading(running, "ksm_full_scans_total") >= began + 13 or None,
                LIMIT,
            )
            with pages(1000, "pair"):
                began = reading(running, "ksm_full_scans_total")
                until("all pairs to be merged", lambda: merged(running, 1000), LIMIT)
                assert reading(running, "ksm_full_scans_total") <= began + 10
                until("smart_scan on again", lambda: running.has("smart_scan", 1))
                healed = running.status()["decision"]["healed"]["smart_scan"]
                assert healed["pulses"] >= 1
                assert reading(running, 'ksmd_ctl_healing_pulses_total{reason="smart_scan"}') >= 1
        assert running.end() == 0


def test_ksmtuned_and_kernel_are_selectable_and_a_reload_gives_back_what_they_steered(
    ksm_host: Path, tmp_path: Path
) -> None:
    with service(tmp_path, "policy = 'kernel'\n[kernel]\ntarget_scan_time = 100\n") as running:
        until("the advisor", lambda: running.has("advisor_mode", "scan-time"))
        until("its target", lambda: running.has("advisor_target_scan_time", 100))
        path = tmp_path / "ksmd-ctl.toml"
        text = path.read_text().replace("'kernel'", "'ksmtuned'")
        path.write_text(text)
        running.process.send_signal(1)
        until("no advisor", lambda: running.has("advisor_mode", "none"))
        until("the kernel's own target again", lambda: running.has("advisor_target_scan_time", 200))
        assert running.status()["policy"] == "ksmtuned"
        path.write_text(text.replace("'ksmtuned'", "'observe'"))
        running.process.send_signal(1)
        until("run = 0", lambda: running.has("run", 0))
        until("pages_to_scan as found", lambda: running.has("pages_to_scan", 100))
        assert running.end() == 0
