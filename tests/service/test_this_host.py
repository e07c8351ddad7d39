# SPDX-License-Identifier: GPL-2.0-or-later
"""The main job on this host's kernel: knobs held and put back, memory merged, drift, crashes."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.service.running import (
    PROGRAM,
    ROOT,
    Service,
    configure,
    equal_pages,
    free_port,
    knobs,
    metrics,
    service,
    until,
)

pytestmark = pytest.mark.ksm

MERGING = "policy = 'fixed'\n[knobs]\nrun = 1\npages_to_scan = 1234\nsleep_millisecs = 10\n"


def test_make_run_merges_and_puts_everything_back(ksm_host: Path) -> None:
    before = knobs(ksm_host)
    port = free_port()
    # A process group of its own, as a terminal makes one: Ctrl-C reaches make and the service alike.
    command = ["make", "-C", str(ROOT), "run", f"ARGS=--metrics-listen 127.0.0.1:{port}"]
    with subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            running = Service(process, Path("/run/ksmd-ctl"), port)
            until("the endpoint", running.answers)
            until("run = 1", lambda: running.has("run", 1))
            assert running.status()["host"]["simulated"] is False
            with equal_pages(2000):
                until(
                    "2000 equal pages to be merged",
                    lambda: running.answers()["ksm_pages_sharing"] >= 1990 or None,  # type: ignore[index]
                )
                derived = running.status()["derived"]
                assert derived["merged_pages"] == 2000
                assert derived["saved_bytes"] > 1900 * 4096
            os.killpg(process.pid, signal.SIGTERM)
            output, _ = process.communicate(timeout=30)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert f"127.0.0.1:{port}" in output
    assert "/run/ksmd-ctl/socket" in output
    assert knobs(ksm_host) == before


def test_observe_writes_nothing(ksm_host: Path, tmp_path: Path) -> None:
    before = knobs(ksm_host)
    with service(tmp_path, "policy = 'observe'\n") as running:
        assert running.status()["policy"] == "observe"
        assert knobs(ksm_host) == before
        assert running.end() == 0
    assert knobs(ksm_host) == before


def test_signals_that_keep_coming_do_not_keep_it_from_putting_everything_back(ksm_host: Path, tmp_path: Path) -> None:
    before = knobs(ksm_host)
    with service(tmp_path, MERGING) as running:
        until("run = 1", lambda: running.has("run", 1))
        numbers = itertools.cycle((signal.SIGTERM, signal.SIGINT, signal.SIGHUP))

        def ended() -> int | None:
            for number in itertools.islice(numbers, 100):
                running.process.send_signal(number)
                time.sleep(0.0005)
            return running.process.poll()

        assert until("the service to end", ended) == 0
        assert knobs(ksm_host) == before


def test_drift_is_put_back_within_two_ticks_and_counted(ksm_host: Path, tmp_path: Path) -> None:
    with service(tmp_path, MERGING) as running:
        until("the knob", lambda: running.has("pages_to_scan", 1234))
        (ksm_host / "pages_to_scan").write_text("77")
        ticks = metrics(running.port)["ksmd_ctl_ticks_total"]
        until("the knob again", lambda: (ksm_host / "pages_to_scan").read_text() == "1234\n" or None)
        # The tick that counted the first figure may have begun before the write.
        assert metrics(running.port)["ksmd_ctl_ticks_total"] - ticks <= 2 + 1
        until("the drift to be counted", lambda: drifted(running, 1))
        assert running.answers()['ksmd_ctl_drift_total{knob="pages_to_scan"}'] == 1  # type: ignore[index]
        assert running.end() == 0
    assert (ksm_host / "pages_to_scan").read_text() == "100\n"


def test_drift_is_reported_and_left_where_told_so(ksm_host: Path, tmp_path: Path) -> None:
    with service(tmp_path, MERGING, on_drift="observe") as running:
        until("the knob", lambda: running.has("pages_to_scan", 1234))
        (ksm_host / "pages_to_scan").write_text("77")
        until("the drift to be counted", lambda: drifted(running, 1))
        ticks = running.status()["daemon"]["ticks"]
        until("three more ticks", lambda: running.status()["daemon"]["ticks"] > ticks + 3 or None)
        knob = running.status()["knobs"]["pages_to_scan"]
        assert (knob["state"], knob["found"], knob["wanted"]) == ("drifted", 77, 1234)
        assert running.end() == 0
    # Somebody wants it so: it isn't put back at the stop either.
    assert (ksm_host / "pages_to_scan").read_text() == "77\n"


def drifted(running: Service, times: int) -> bool | None:
    return True if running.status()["knobs"]["pages_to_scan"]["drift_total"] == times else None


def test_killed_and_started_again_it_still_knows_what_it_found_at_first(ksm_host: Path, tmp_path: Path) -> None:
    before = knobs(ksm_host)
    with service(tmp_path, MERGING) as running:
        until("the knob", lambda: running.has("pages_to_scan", 1234))
        running.end(signal.SIGKILL)
    assert (ksm_host / "pages_to_scan").read_text() == "1234\n"
    with service(tmp_path, MERGING) as running:
        assert running.status()["knobs"]["pages_to_scan"]["at_first"] == 100
        assert running.end() == 0
    assert knobs(ksm_host) == before


def test_merging_that_was_on_before_the_start_is_on_after_the_stop(ksm_host: Path, tmp_path: Path) -> None:
    path = configure(tmp_path, "policy = 'observe'\n")
    subprocess.run([PROGRAM, "set", "run=1", "--config", str(path)], check=True, capture_output=True)
    with service(tmp_path, "policy = 'adaptive'\n") as running:
        until("the policy to write", lambda: running.status()["knobs"]["sleep_millisecs"]["found"] != 20 or None)
        running.end(signal.SIGKILL)
    with service(tmp_path, "policy = 'adaptive'\n") as running:
        assert running.end() == 0
    after = knobs(ksm_host)
    found = [after[name].strip() for name in ("run", "pages_to_scan", "sleep_millisecs")]
    assert found == ["1", "100", "20"]
    subprocess.run([PROGRAM, "daemon", "--restore", "--config", str(path)], check=True, capture_output=True)
    assert knobs(ksm_host)["run"] == "0\n"


def test_somebody_elses_write_stays_in_sight_while_a_policy_writes(ksm_host: Path, tmp_path: Path) -> None:
    with service(tmp_path, "policy = 'adaptive'\n") as running:
        until("run = 1", lambda: running.has("run", 1))
        (ksm_host / "run").write_text("2")
        until("run = 1 again", lambda: (running.has("run", 1) and running.status()["foreign_changes"]) or None)
        assert running.end() == 0
    with service(tmp_path, "policy = 'adaptive'\n") as running:
        [change] = running.status()["foreign_changes"]
        assert (change["knob"], change["from"], change["to"], change["held"]) == ("run", 1, 2, True)
        assert running.end() == 0
