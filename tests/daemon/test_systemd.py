# SPDX-License-Identifier: GPL-2.0-or-later
"""What is between the service and systemd: notifications, the journal, a stop and a restart, the units."""

from __future__ import annotations

import io
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from ksmd_ctl.cli.main import make_parser
from ksmd_ctl.daemon.log import BURST, BURST_SECONDS, Event, Level, Log, Record, journal_takes_stderr, open_log
from ksmd_ctl.daemon.notify import Notifier
from ksmd_ctl.daemon.restore import final_stop, job_type

ROOT = Path(__file__).parents[2]

# -- notifications -----------------------------------------------------------------------------------------


def notifier(**environment: str) -> tuple[Notifier, list[str]]:
    sent: list[str] = []
    return Notifier({"NOTIFY_SOCKET": "/x", **environment}, sent.append), sent


def test_nothing_is_sent_where_nobody_listens() -> None:
    sent: list[str] = []
    silent = Notifier({}, sent.append)
    silent.ready("merging")
    silent.progress(1, lambda: "merging", news=True)
    silent.stopping("")
    assert sent == []


def test_the_watchdog_is_fed_by_progress_only_and_not_at_each_tick() -> None:
    notify, sent = notifier(WATCHDOG_USEC="30000000", WATCHDOG_PID=str(os.getpid()))
    notify.ready("a")
    assert not any("WATCHDOG" in text for text in sent)
    for second in range(60):
        notify.progress(100.0 + second, lambda: "a", news=False)
    fed = [text for text in sent if "WATCHDOG=1" in text]
    assert len(fed) == 8


def test_a_watchdog_for_another_process_is_none_of_ours() -> None:
    notify, sent = notifier(WATCHDOG_USEC="30000000", WATCHDOG_PID="1")
    for second in range(3):
        notify.progress(100.0 + second, lambda: "a", news=False)
    assert sum("WATCHDOG=1" in text for text in sent) == 3


def test_the_status_is_shown_when_it_is_news() -> None:
    notify, sent = notifier(WATCHDOG_USEC="3600000000")
    notify.ready("a")
    notify.progress(100, lambda: "b", news=False)
    notify.progress(101, lambda: "c", news=False)
    notify.progress(102, lambda: "d", news=True)
    notify.progress(103, lambda: "d", news=True)
    assert sent == ["READY=1\nSTATUS=a", "WATCHDOG=1\nSTATUS=b", "STATUS=d"]


def test_a_reload_says_when_it_began() -> None:
    notify, sent = notifier()
    notify.reloading()
    assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", sent[0])


# -- the log -----------------------------------------------------------------------------------------------


def test_events_have_an_id_a_priority_and_fields() -> None:
    records: list[tuple[str, Mapping[str, str]]] = []
    log = Log(lambda text, fields: records.append((text, fields)))
    log.event(Event.DRIFT, "it moved", knob="run", found=0)
    assert records == [
        (
            "it moved",
            {"MESSAGE_ID": Event.DRIFT.value, "PRIORITY": "4", "KSMD_KNOB": "run", "KSMD_FOUND": "0"},
        )
    ]
    assert all(re.fullmatch(r"[0-9a-f]{12}4[0-9a-f]{3}[89ab][0-9a-f]{15}", event) for event in Event)


def test_what_keeps_happening_is_held_back() -> None:
    now = 0.0
    texts: list[str] = []
    log = Log(lambda text, fields: texts.append(text), lambda: now)
    for _ in range(100):
        log.event(Event.DRIFT, "run moved", knob="run")
    log.event(Event.DRIFT, "another moved", knob="smart_scan")
    assert texts == ["run moved"] * BURST + ["another moved"]
    now = BURST_SECONDS
    log.event(Event.DRIFT, "run moved", knob="run")
    assert texts[-1] == f"run moved ({100 - BURST} more like this were not logged)"


def test_each_listener_hears_what_is_logged_and_nothing_else() -> None:
    heard: list[list[Record]] = [[], []]
    log = Log(lambda text, fields: None, lambda: 0.0)
    for records in heard:
        log.listen(records.append)
    log.event(Event.HELD, "run holds", knob="run", found=1)
    log.plain(Level.WARNING, "not an event")
    for _ in range(BURST + 5):
        log.event(Event.DRIFT, "run moved", knob="run")
    for records in heard:
        assert records[0] == Record(Event.HELD, "run holds", {"knob": "run", "found": "1"}, Level.INFO)
        assert [record.event for record in records[1:]] == [Event.DRIFT] * BURST
        assert [record.bad for record in records[:2]] == [False, True]


def test_the_journal_is_used_only_where_stderr_is_connected_to_it(tmp_path: Path) -> None:
    with open(tmp_path / "log", "w") as stream:
        found = os.fstat(stream.fileno())
        assert journal_takes_stderr({"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}, stream)
        for other in ("", f"{found.st_dev}:{found.st_ino + 1}", "x", ":"):
            assert not journal_takes_stderr({"JOURNAL_STREAM": other}, stream)
        assert not journal_takes_stderr({}, stream)
    assert not journal_takes_stderr({"JOURNAL_STREAM": "1:2"}, io.StringIO())


def test_without_a_journal_everything_is_on_stderr() -> None:
    stream = io.StringIO()
    log = open_log({}, stream)
    log.event(Event.STARTED, "started")
    log.plain(Level.INFO, "plain")
    logging.getLogger("ksmd_ctl.daemon.http").warning("from a %s", "module")
    logging.getLogger("ksmd_ctl.daemon.http").info("not this")
    logging.getLogger("asyncio").error("from asyncio")
    assert stream.getvalue().splitlines() == [
        "ksmd-ctl: started",
        "ksmd-ctl: plain",
        "ksmd-ctl: from a module",
        "ksmd-ctl: from asyncio",
    ]


def test_a_log_that_nobody_reads_any_more_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream:
        log = open_log({}, stream)
        log.event(Event.STARTED, "started")
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)


# -- stop or restart ---------------------------------------------------------------------------------------

UNIT = "ksmd-ctl.service"
JOBS = "12 other.service restart running\n340 ksmd-ctl.service {} running\n9 ksmd-ctl-broker.service stop waiting\n"


@pytest.mark.parametrize(
    ("job", "final"),
    [("stop", True), ("restart", False), ("try-restart", False), ("reload-or-start", False), ("start", False)],
)
def test_the_job_tells_a_stop_from_a_restart(job: str, final: bool) -> None:
    for result in ("success", "exit-code"):
        assert final_stop(UNIT, {"SERVICE_RESULT": result}, lambda: JOBS.format(job)) is final


@pytest.mark.parametrize(
    ("result", "final"), [("success", True), ("exit-code", False), ("signal", False), ("watchdog", False)]
)
def test_without_a_job_the_result_tells(result: str, final: bool) -> None:
    assert final_stop(UNIT, {"SERVICE_RESULT": result}, lambda: "No jobs running.\n") is final


def test_where_systemd_cannot_be_asked_it_is_a_stop() -> None:
    assert final_stop(UNIT, {"SERVICE_RESULT": "exit-code"}, lambda: None)


def test_only_the_line_of_the_unit_counts() -> None:
    assert job_type(JOBS.format("stop"), "ksmd-ctl") is None
    assert job_type(JOBS.format("stop"), "other.service") == "restart"


# -- the units ---------------------------------------------------------------------------------------------


def test_the_units_are_well_formed() -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    with tempfile.TemporaryDirectory() as scratch:
        for unit in (ROOT / "systemd").iterdir():
            # The program need not be installed here; that its path is right is for a test of the package.
            text = unit.read_text().replace("/usr/bin/ksmd-ctl", sys.executable)
            (Path(scratch) / unit.name).write_text(text)
        result = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", *(str(path) for path in Path(scratch).iterdir())],
            capture_output=True,
            text=True,
            check=False,
        )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_the_units_call_commands_that_there_are() -> None:
    calls = [
        words.replace("%n", UNIT).replace("$MAINPID", "1").split()[1:]
        for unit in (ROOT / "systemd").iterdir()
        for words in re.findall(r"^Exec\w+=\+?(/usr/bin/ksmd-ctl .*)$", unit.read_text(), re.MULTILINE)
    ]
    assert len(calls) == 3
    for call in calls:
        if call[0] == "broker":
            from ksmd_ctl.privileged.broker import main

            with pytest.raises(SystemExit) as ended:
                main([*call[1:], "--help"])
            assert ended.value.code == 0
        else:
            assert make_parser().parse_args(call).unit == UNIT
