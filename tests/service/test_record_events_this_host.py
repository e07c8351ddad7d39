# SPDX-License-Identifier: GPL-2.0-or-later
"""A recording of this host while a service runs, is stopped and runs again: what it tells is in the recording."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ksmd_ctl.errors import KsmdError
from ksmd_ctl.recording.reader import RecordedEvent, Recording
from tests.service.running import PROGRAM, service, until

pytestmark = pytest.mark.ksm

CONFIGURATION = 'policy = "fixed"\nknobs.pages_to_scan = 300'


def held(ksm: Path) -> bool | None:
    return (ksm / "pages_to_scan").read_text() == "300\n" or None


def looked(path: Path) -> bool | None:
    """True once a recording that goes on has a look."""
    try:
        with Recording(path) as recording:
            return bool(recording.looks()) or None
    except KsmdError:
        # It is being written just now.
        return None


def told(path: Path, kind: str, text: str) -> Callable[[], RecordedEvent | None]:
    """The first event of a recording that goes on which a service told, with this text."""

    def look() -> RecordedEvent | None:
        try:
            with Recording(path) as recording:
                events = recording.events()
        except KsmdError:
            return None
        return next((one for one in events if one.service and one.kind == kind and text in one.text), None)

    return look


def test_the_events_of_a_service_that_stops_and_comes_again(ksm_host: Path, tmp_path: Path) -> None:
    path, options = tmp_path / "r.ksm", ("--host", "kernel")
    words = [PROGRAM, "record", *options, "--socket", str(tmp_path / "socket"), "-o", str(path), "--cpu", "1"]
    with service(tmp_path, CONFIGURATION, options=options) as first:
        until("the knob to be held", lambda: held(ksm_host))
        with subprocess.Popen([*words, "--every", "0.25"], stdout=subprocess.PIPE, text=True) as recorder:
            try:
                until("the first look", lambda: looked(path))
                subprocess.run(["sh", "-c", f"echo 777 >{ksm_host}/pages_to_scan; sleep 0.5"], check=True)
                foreign = until("who wrote", told(path, "foreign", "was changed from 300 to 777 by sh"))
                assert first.end() == 0
                with service(tmp_path, CONFIGURATION, options=options):
                    # The stream ended with the first one. The next one is asked for what has happened since.
                    started = until("the next start", told(path, "service", "started:"))
                recorder.send_signal(signal.SIGINT)
                assert recorder.wait(timeout=120) == 0
            finally:
                recorder.kill()
    with Recording(path) as recording:
        assert recording.facts.service is not None
        assert recording.facts.service["policy"] == "fixed"
        wanted = recording.facts.service["wanted"]
        assert isinstance(wanted, dict)
        assert wanted["pages_to_scan"] == 300
        events = recording.events()
    (stopped,) = [event for event in events if event.kind == "service" and event.text.startswith("stopped")]
    assert 0 < foreign.seconds < stopped.seconds < started.seconds
    # None comes twice.
    assert len([event for event in events if event.service]) == len({event for event in events if event.service})
    # What the recorder has seen itself is beside it: the first one put back what it had found.
    assert [event for event in events if event.text.startswith("pages_to_scan: 300 → ") and not event.service]
