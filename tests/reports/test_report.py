# SPDX-License-Identifier: GPL-2.0-or-later
"""The report and its document: honest figures, null for what isn't known."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ksmd_ctl.errors import Absent, ReadError, Unparsable, Unreadable
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.sample import Sample, Writer
from ksmd_ctl.reports.report import History, document, report_of_samples
from ksmd_ctl.reports.saving import CURRENT, Counters, CountersWatch, Saving, saving
from tests.fakes.host import FakeHost


def test_saved_bytes_are_the_kernels_figure_or_calculated() -> None:
    host = FakeHost()
    host.counters.update(pages_shared=10, pages_sharing=90, pages_unshared=50, pages_volatile=5)
    assert saving(host.sample(), 4096) == Saving(90 * 4096, 0, 155 * 64)
    host.counters["ksm_zero_pages"] = 7
    host.counters["general_profit"] = 97 * 4096 - 160 * 64
    found = saving(host.sample(), 4096)
    assert found == Saving(90 * 4096, 7 * 4096, 160 * 64)
    assert found.saved_bytes == 97 * 4096 - 160 * 64
    host.broken["general_profit"] = Absent("general_profit", "not here")
    host.broken["pages_volatile"] = Unreadable("pages_volatile", "EIO")
    assert saving(host.sample(), 4096) is None


def counted(run: int, cow: int | None, *, time: float = 0, merged: int = 100, scans: int = 9) -> Sample:
    readings: dict[str, int | float | str | ReadError] = {"run": run, "pages_shared": 10, "full_scans": scans}
    readings["pages_sharing"] = merged - 10
    if not merged:
        readings |= {"pages_shared": 0, "pages_sharing": 0}
    if cow is not None:
        readings["cow_ksm"] = cow
    return Sample(time, readings)


def watched(*samples: Sample) -> CountersWatch:
    watch = CountersWatch()
    for sample in samples:
        watch.add(sample)
    return watch


def test_counters_are_stale_once_something_is_unmerged_while_ksmd_is_stopped() -> None:
    assert watched().counters() == CURRENT
    assert watched(counted(1, 0), counted(1, 50)).counters() == CURRENT
    assert watched(counted(1, 50), counted(0, 50)).counters() == CURRENT
    assert watched(counted(1, 50), counted(0, 50), counted(0, 80)).counters() == Counters(True, 30)
    # More copies than pages: some were copied before they were merged.
    assert watched(counted(1, 50), counted(0, 900)).counters() == Counters(True, 100)
    # Everything un-merged by run = 2: the counters are 0, and right.
    assert watched(counted(1, 50), counted(0, 80), counted(2, 90, merged=0)).counters() == CURRENT


def test_where_the_stop_was_not_seen_nothing_is_sure() -> None:
    assert watched(counted(0, 50)).counters() == Counters(None, None)
    assert watched(counted(0, 50), counted(0, 60)).counters() == Counters(True, 10)
    # Before 5.19 no counter tells.
    assert watched(counted(1, None), counted(0, None)).counters() == Counters(None, None)


def test_processes_that_ended_while_ksmd_is_stopped_are_missed_by_a_look_at_all_others() -> None:
    watch = watched(counted(1, 50, time=1), counted(0, 50, time=2), counted(0, 50, time=9))
    assert watch.counters(3.0, 60) == Counters(True, 40)
    assert watch.counters(1.5, 60) == CURRENT
    assert watch.counters(3.0, 100) == watch.counters(3.0, 200) == watch.counters(3.0, None) == CURRENT


def test_page_tables_tell_whether_counters_are_stale_where_nobody_saw_the_stop() -> None:
    watch = watched(counted(0, 50, time=2))
    assert watch.counters(3.0, 100, 60) == Counters(True, 40)
    assert watch.counters(3.0, 100, 100) == CURRENT
    # More are mapped than were counted, as after a fork: some of those that were counted may be gone.
    assert watch.counters(3.0, 100, 120) == Counters(None, None)
    # The look was before the stop.
    assert watch.counters(1.0, 100, 60) == watch.counters(1.0, 100, 100) == Counters(None, None)
    # One was copied since.
    assert watched(counted(0, 50, time=2), counted(0, 51, time=4)).counters(3.0, 100, 100) == Counters(True, 1)


def test_what_splits_freed_is_part_of_the_saving_in_frames() -> None:
    host = FakeHost({Knob.RUN: 1})
    host.counters.update(pages_shared=10, pages_sharing=90, pages_unshared=0, pages_volatile=0)
    found = report_of_samples(host.identity, [host.sample()])
    counted = 90 * 4096 - 100 * 64

    def derived(**numa: object) -> tuple[object, ...]:
        numbers = document(replace(found, numa=numa or None))["derived"]
        assert isinstance(numbers, dict)
        assert numbers["saved_bytes"] == counted
        return tuple(numbers[name] for name in ("split_zero_bytes", "saved_frames_bytes", "saved_frames_low_bytes"))

    zeroes = {"split_zero_pages": 50, "split_zero_low_pages": 20}
    assert derived(forked_pages=0, **zeroes) == (50 * 4096, counted + 50 * 4096, counted + 20 * 4096)
    assert derived(forked_pages=80, **zeroes)[2] == counted - 80 * 4096 + 20 * 4096
    assert derived(forked_pages=0, split_zero_pages=None, split_zero_low_pages=None) == (None, None, None)
    assert derived() == (None, None, None)
    stale = document(replace(found, numa={"forked_pages": 0, **zeroes}, counters=Counters(True, 7)))["derived"]
    assert isinstance(stale, dict)
    assert (stale["split_zero_bytes"], stale["saved_frames_bytes"]) == (50 * 4096, None)


def test_counters_stay_stale_until_ksmd_has_come_by_everything() -> None:
    stopped = (counted(1, 50), counted(0, 50), counted(0, 80))
    assert watched(*stopped, counted(1, 80, scans=9)).counters() == Counters(True, None)
    assert watched(*stopped, counted(1, 80, scans=9), counted(1, 80, scans=10)).counters() == Counters(True, None)
    assert watched(*stopped, counted(1, 80, scans=9), counted(1, 80, scans=11)).counters() == CURRENT
    assert watched(*stopped, counted(1, 80, scans=9), counted(1, 80, scans=0)).counters() == CURRENT


def test_a_saving_that_is_gone_is_not_in_the_document() -> None:
    host = FakeHost({Knob.RUN: 1})
    host.counters.update(pages_shared=10, pages_sharing=90, pages_unshared=0, pages_volatile=0, cow_ksm=5)
    first = host.sample()
    found = document(report_of_samples(host.identity, [first]))["derived"]
    assert isinstance(found, dict)
    assert (found["stale"], found["gone_pages"], found["saved_bytes"]) == (False, 0, 90 * 4096 - 100 * 64)
    host.knobs[Knob.RUN] = 0
    host.counters["cow_ksm"] = 105
    found = document(report_of_samples(host.identity, [first, host.sample()]))["derived"]
    assert isinstance(found, dict)
    assert (found["stale"], found["gone_pages"], found["saved_bytes"]) == (True, 100, None)
    assert found["stale_text"] == "ksmd is stopped, and 100 pages or more of these are not merged any more"
    assert found["merged_pages"] == 100


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
    assert rates.rate_seconds == 10
    assert rates.pages_scanned_per_second == 100
    assert rates.ksmd_cpu_ratio == pytest.approx(0.02)
    assert rates.full_scan_seconds == 2


def test_a_scan_that_takes_longer_than_the_window() -> None:
    ticks = [(float(t), {"full_scans": t // 40}) for t in range(100)]
    assert history(*ticks).rates().full_scan_seconds == 40


def test_counters_that_begin_again_give_no_rate() -> None:
    assert history((0, {"full_scans": 9}), (1, {"full_scans": 0})).rates().full_scan_seconds is None
    assert history((0, {"pages_scanned": 9}), (1, {"pages_scanned": 0})).rates().pages_scanned_per_second is None
    assert history((0, {"pages_scanned": 9}), (0, {"pages_scanned": 9})).rates().rate_seconds is None
    assert history((0, {})).rates().rate_seconds is None


def test_long_intervals_have_rates_too() -> None:
    samples = [(float(t), {"pages_scanned": t}) for t in range(0, 300, 60)]
    assert history(*samples).rates().rate_seconds == 60


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
        "default": 0,
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
    assert found["derived"]["metadata_bytes"] == 100
    assert found["derived"]["pages_scanned_per_second"] is None
    assert found["derived"]["rate_seconds"] == 2
    assert found["nodes"] == {"0": {"total_bytes": 2**30, "free_bytes": 2**29}}
    assert found["writers"] == [
        {"name": "ksmtuned", "pid": 7, "units": []},
        {"name": "advisor", "pid": None, "units": []},
    ]
    assert found["transaction"] is None
