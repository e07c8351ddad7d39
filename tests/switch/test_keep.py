# SPDX-License-Identifier: GPL-2.0-or-later
"""Records of who was switched: on disk, after a start, and after a reboot."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.host.memory import Process, ProcessClass, ProcessId
from ksmd_ctl.host.sample import HostIdentity, HostKind
from ksmd_ctl.switch.keep import Switched, SwitchJournal, records_document, short, started_again
from tests.fakes.host import process

HERE = HostIdentity(HostKind.KERNEL, "6.12", 4096, "boot-1")


def record(pid: int, *, on: bool = False, **more: object) -> Switched:
    fields: dict[str, object] = {
        "process": ProcessId(pid, 100 * pid),
        "name": f"p{pid}",
        "group": "web.service",
        "unit": "web.service",
        "machine": False,
        "on": on,
        "how": "prctl(PR_SET_MEMORY_MERGE)",
        "by": "somebody",
        "at_seconds": 10.0,
        "done": True,
    }
    return Switched(**(fields | more))  # type: ignore[arg-type]


VM = {"name": "qemu", "group": "vm-1", "unit": "machine-qemu-1.scope", "machine": True}


def test_records_are_read_again(tmp_path: Path) -> None:
    journal = SwitchJournal(tmp_path, HERE)
    journal.note(record(1))
    journal.note(record(2, on=True))
    assert SwitchJournal(tmp_path, HERE).records == journal.records == (record(1), record(2, on=True))
    # Of one process there is one record, the latest last.
    journal.note(record(1, on=True))
    assert [(one.process.pid, one.on) for one in journal.records] == [(2, True), (1, True)]


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    ours, theirs = SwitchJournal(tmp_path, HERE), SwitchJournal(tmp_path, HERE)
    ours.note(record(1))
    theirs.note(record(2))
    ours.note(record(3))
    assert [one.process.pid for one in SwitchJournal(tmp_path, HERE).records] == [1, 2, 3]


def test_who_ends_is_kept_only_where_it_can_start_again(tmp_path: Path) -> None:
    journal = SwitchJournal(tmp_path, HERE)
    journal.note(record(1))
    journal.note(record(2, on=True))
    journal.note(record(3, unit="session-1.scope"))
    journal.note(record(4, **VM))
    journal.note(record(5))
    journal.ended([ProcessId(pid, 100 * pid) for pid in (1, 2, 3, 4)])
    assert [(one.process.pid, one.ended) for one in journal.records] == [(1, True), (4, True), (5, False)]
    assert journal.running() == (ProcessId(5, 500),)
    journal.ended([])
    assert len(journal.records) == 3


def test_after_a_reboot_no_pid_counts(tmp_path: Path) -> None:
    journal = SwitchJournal(tmp_path, HERE)
    for one in (record(1), record(2, on=True), record(3, **VM), record(4, done=False)):
        journal.note(one)
    later = SwitchJournal(tmp_path, dataclasses.replace(HERE, boot_id="boot-2"))
    assert [(one.process.pid, one.ended, one.at_seconds) for one in later.records] == [(1, True, None), (3, True, None)]


@pytest.mark.parametrize(
    ("made", "now", "again"),
    [
        (record(1), process(9, unit="web.service", name="p1"), True),
        (record(1), process(9, unit="web.service", name="helper"), False),
        (record(1), process(9, unit="web@2.service", name="p1"), False),
        (record(1, on=True), process(9, unit="web.service", name="p1"), False),
        (record(1), process(9, unit="web.service", name="p1", classes=frozenset({ProcessClass.NOT_ELIGIBLE})), False),
        (record(1, **VM), process(9, "vm-1", machine=True, unit="machine-qemu-2.scope"), True),
        # Whoever is only called so.
        (record(1, **VM), process(9, "vm-1", machine=False), False),
        (record(1, **VM), process(9, "vm-10", machine=True), False),
        (record(1, unit="session-1.scope"), process(9, unit="session-1.scope", name="p1"), False),
        (record(1, unit="user@1000.service"), process(9, unit="user@1000.service", name="p1"), False),
    ],
)
def test_who_has_started_again(made: Switched, now: Process, again: bool) -> None:
    ended = dataclasses.replace(made, ended=True)
    assert bool(started_again((ended,), (now,))) == again
    # While it is there, nobody else is it.
    assert started_again((dataclasses.replace(made, ended=False),), (now,)) == []


def test_each_that_started_again_is_found_once() -> None:
    records = (record(1, ended=True), record(2, ended=True, name="p1"))
    now = [process(8, unit="web.service", name="p1"), process(9, unit="web.service", name="p1")]
    assert [process.id.pid for _, process in started_again(records, now)] == [8, 9]
    # One that was switched since is known.
    known = (*records, record(8, on=True, name="p1"))
    assert [process.id.pid for _, process in started_again(known, now)] == [9]


def test_a_switch_of_what_started_again_takes_the_old_records_place(tmp_path: Path) -> None:
    journal = SwitchJournal(tmp_path, HERE)
    journal.note(record(1, **VM))
    journal.ended([ProcessId(1, 100)])
    journal.note(record(9, on=True, **VM))
    assert [(one.process.pid, one.on) for one in journal.records] == [(9, True)]


def test_the_oldest_of_many_are_forgotten(tmp_path: Path) -> None:
    journal = SwitchJournal(tmp_path, HERE)
    journal.put_back(tuple(record(pid, by=short("x" * 1000)) for pid in range(1, 600)))
    assert [one.process.pid for one in journal.records] == list(range(600 - 512, 600))
    assert SwitchJournal(tmp_path, HERE).records == journal.records


@pytest.mark.parametrize("content", [b"", b"{}", b'{"format": 2}', b"[1]", b"\xff"])
def test_a_damaged_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "switched-kernel.json"
    path.write_bytes(content)
    assert SwitchJournal(tmp_path, HERE, keep=True).records == ()
    assert path.exists()
    journal = SwitchJournal(tmp_path, HERE)
    assert (journal.records, journal.damaged) == ((), f"{path}.damaged")


@pytest.mark.parametrize("text", ["\x1b[31m", "a\nb", "x" * 401])
def test_texts_that_are_no_names_are_not_read(tmp_path: Path, text: str) -> None:
    """Root reads it in a folder that the service's user owns."""
    journal = SwitchJournal(tmp_path, HERE)
    journal.note(record(1))
    document = json.loads(journal.path.read_text())
    document["records"][0]["by"] = text
    journal.path.write_text(json.dumps(document))
    assert SwitchJournal(tmp_path, HERE, keep=True).records == ()


@given(st.text())
def test_any_text_is_made_fit_for_a_record(text: str) -> None:
    made = short(text)
    assert len(made) <= 400
    assert made.isprintable()


def test_the_document() -> None:
    records = (record(1, ended=True), record(2, at_seconds=None, on=True))
    first, second = records_document(records, 25.0, [process(9, unit="web.service", name="p1")])
    assert (first["pid"], first["age_seconds"], first["on"], first["again"]) == (2, None, True, None)
    assert (second["pid"], second["age_seconds"], second["ended"], second["again"]) == (1, 15.0, True, {"pid": 9})
