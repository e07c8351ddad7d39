# SPDX-License-Identifier: GPL-2.0-or-later
"""The report and its document: honest figures, null for what isn't known."""

from __future__ import annotations

import json

import pytest

from ksmd_ctl.control.report import History, document, metadata_bytes, report_of_samples, saved_bytes
from ksmd_ctl.errors import Absent, Unparsable, Unreadable
from ksmd_ctl.host.sample import Sample, Writer
from ksmd_ctl.knobs import Knob
from tests.fakes.host import FakeHost


def test_saved_bytes_are_the_kernels_figure_or_calculated() -> None:
    host = FakeHost()
    host.counters.update(pages_shared=10, pages_sharing=90, pages_unshared=50, pages_volatile=5)
    assert metadata_bytes(host.sample()) == 155 * 64
    assert saved_bytes(host.sample(), 4096) == 90 * 4096 - 155 * 64
    host.counters["general_profit"] = -4096
    assert saved_bytes(host.sample(), 4096) == -4096
    host.broken["general_profit"] = Absent("general_profit", "not here")
    host.broken["pages_volatile"] = Unreadable("pages_volatile", "EIO")
    assert saved_bytes(host.sample(), 4096) is None
    assert metadata_bytes(host.sample()) is None


def history(*points: tuple[float, dict[str, float]]) -> History:
    result = History()
    for time, readings in points:
        result.add(Sample(time, dict(readings)))
    return result


def test_rates() -> None:
    scans = [
        (float(t), {"pages_scanned": t * 100, "ksmd_cpu_seconds": t / 50, "full_scans": t // 2}) for t in range(31)
    ]
    rates = history(*scans).rates()
    assert rates.seconds == 10
    assert rates.pages_scanned_per_second == 100
    assert rates.ksmd_cpu_ratio == pytest.approx(0.02)
    assert rates.full_scan_seconds == 2


def test_a_scan_that_takes_longer_than_the_window() -> None:
    ticks = [(float(t), {"full_scans": t // 40}) for t in range(100)]
    assert history(*ticks).rates().full_scan_seconds == 40


def test_counters_that_begin_again_give_no_rate() -> None:
    assert history((0, {"full_scans": 9}), (1, {"full_scans": 0})).rates().full_scan_seconds is None
    assert history((0, {"pages_scanned": 9}), (1, {"pages_scanned": 0})).rates().pages_scanned_per_second is None
    assert history((0, {"pages_scanned": 9}), (0, {"pages_scanned": 9})).rates().seconds is None
    assert history((0, {})).rates().seconds is None


def test_long_intervals_have_rates_too() -> None:
    samples = [(float(t), {"pages_scanned": t}) for t in range(0, 300, 60)]
    assert history(*samples).rates().seconds == 60


def test_the_document_without_a_service() -> None:
    host = FakeHost({Knob.RUN: 1}, lacks=[Knob.SMART_SCAN])
    host.offline = True
    host.counters["general_profit"] = -100
    host.broken["pages_volatile"] = Unparsable("reading pages_volatile", "'x' is not a number")
    first = host.sample()
    host.now += 2
    report = report_of_samples(host.identity, [first, host.sample()], (Writer("ksmtuned", 7), Writer("advisor")))
    found = json.loads(json.dumps(document(report), allow_nan=False))
    assert found["format"] == 1
    assert found["host"] == {
        "kind": "kernel",
        "release": "6.12-fake",
        "simulated": False,
        "page_size_bytes": 4096,
        "boot_id": "boot-1",
    }
    assert (found["daemon"], found["policy"], found["on_drift"], found["at_stop"]) == (None, None, None, None)
    assert found["knobs"]["run"] == {
        "wanted": None,
        "found": 1,
        "at_first": None,
        "at_start": None,
        "state": "unmanaged",
        "reason": "",
        "drift_total": 0,
    }
    assert found["readings"]["run"] == 5
    assert "smart_scan" not in found["readings"]
    assert found["errors"]["smart_scan"]["kind"] == "absent"
    assert found["errors"]["pages_volatile"] == {"kind": "unparsable", "text": "'x' is not a number"}
    assert found["derived"]["saved_bytes"] == -100
    assert found["derived"]["metadata_bytes"] is None
    assert found["derived"]["pages_scanned_per_second"] is None
    assert found["derived"]["rate_seconds"] == 2
    assert found["nodes"] == {"0": {"total_bytes": 2**30, "free_bytes": 2**29}}
    assert found["writers"] == [
        {"name": "ksmtuned", "pid": 7, "units": []},
        {"name": "advisor", "pid": None, "units": []},
    ]
    assert found["transaction"] is None
