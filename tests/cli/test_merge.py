# SPDX-License-Identifier: GPL-2.0-or-later
"""merge: its options, what people read, who does it, and what belongs into configurations."""

from __future__ import annotations

import json
import os
import syslog
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from ksmd_ctl.cli import change, host, merge, merge_persist
from ksmd_ctl.cli.main import main
from ksmd_ctl.errors import Denied, ExitCode, Refused
from ksmd_ctl.host.switching import Method
from ksmd_ctl.statefiles import HostLock
from ksmd_ctl.switch.keep import SwitchJournal
from ksmd_ctl.switch.persist import MemoryKsm
from tests.cli.fakes import listening, reply
from tests.cli.test_systemctl import Script
from tests.fakes.host import process
from tests.fakes.switching import SwitchHost, switched

POST = "ExecStartPost=-+/usr/bin/timeout 30 /usr/bin/ksmd-ctl merge"


class Run:
    """Runs the command on a host, with all files in a folder."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.host = SwitchHost()
        self.host.running = [
            process(11, "web.service", 100, unit="web.service"),
            process(20, "vm-1", 500, unit="", machine=True),
        ]
        self.host.units = {"web.service": [11]}
        self.config = folder / "c.toml"
        self.allow("false")
        self.logged: list[str] = []
        self._capsys = capsys

    def allow(self, word: str) -> None:
        folders = "".join(f'{one}_directory = "{self.folder}/{one}"\n' for one in ("runtime", "state"))
        socket = f'socket = "{self.folder}/s"\n'
        self.config.write_text(f"[switch]\nallow = {word}\n[service]\n{folders}{socket}")

    def __call__(self, *words: str) -> tuple[int, str, str]:
        code = main(["merge", *words, "--config", str(self.config)])
        said = self._capsys.readouterr()
        return code, said.out, said.err

    @property
    def journal(self) -> SwitchJournal:
        return SwitchJournal(self.folder / "state", self.host.identity)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    made = Run(tmp_path, capsys)
    for module in (host, change):
        monkeypatch.setattr(module, "open_host", lambda *_, **__: nullcontext(made.host))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(syslog, "syslog", lambda _, text: made.logged.append(text))
    monkeypatch.setattr(merge_persist, "systemds_answer", lambda _: (MemoryKsm.UNKNOWN, "252"))
    return made


def test_off_as_root_without_a_service(run: Run) -> None:
    code, out, err = run("off", "--pid", "11")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "un-merged  100 pages of p11 (pid 11)",
        "switched   off for p11 (pid 11): prctl(PR_SET_MEMORY_MERGE)",
        "now        off, it was on: 0 bytes mergeable",
        "stopped    for 0.002 s at most at once",
        "note       this lasts until the process ends: --persist says what belongs into its configuration",
    ]
    (record,) = run.journal.records
    assert (record.name, record.on, record.done) == ("p11", False, True)
    assert record.by == f"ksmd-ctl merge off --pid 11, pid {os.getpid()}, uid {os.getuid()}"
    assert any("switched   off for p11" in line and record.by in line for line in run.logged)


def test_a_dry_run(run: Run) -> None:
    code, out, _ = run("off", "--vm", "vm-1", "--dry-run", "--method", "qmp")
    assert code == 0
    assert "would      un-merge 500 pages of p20 (pid 20)" in out
    assert "would      switch merging off for p20 (pid 20)" in out
    assert run.host.switches == [(20, False, Method.QMP, True)]
    assert (run.journal.records, run.logged) == ((), [])
    run.host.room_bytes = 0
    code, out, _ = run("off", "--vm", "vm-1", "--dry-run")
    assert code == ExitCode.REFUSED
    assert "this would be refused" in out


def test_what_is_left_and_what_fails(run: Run) -> None:
    left = "2.4 MiB that are no backend's stay mergeable"
    run.host.switch_outcomes = [switched(run.host.find(20), on=False, after=None, left=(left,))]
    code, out, _ = run("off", "--vm", "vm-1")
    assert code == ExitCode.CHECK_FAILED
    assert f"left       {left}" in out
    assert "now        on for a part, it was on" in out
    run.host.switch_outcomes = [Refused("switching merging", "it is being debugged by process 7", hint="end that")]
    code, out, err = run("off", "--pid", "11")
    assert (code, out) == (ExitCode.REFUSED, "")
    assert err == "ksmd-ctl: switching merging: it is being debugged by process 7\nhint: end that\n"


@pytest.mark.parametrize(
    "words",
    [
        ("on",),
        ("--pid", "11"),
        ("maybe", "--pid", "11"),
        ("on", "--pid", "11", "--vm", "a"),
        ("on", "--pid", "11", "--method", "gdb"),
        ("on", "--pid", "11", "--range", "5-3"),
        ("on", "--pid", "11", "--range", "1064-2064"),
        ("on", "--pid", "11", "--range", "1000-1000"),
        ("on", "--pid", "11", "--range", "0-200000000000000"),
        ("on", "--pid", "11", "--range", "1,000-2,000"),
        ("on", "--unit", "web", "--range", "1000-2000"),
        ("on", "--pid", "11", "--range", "1000-2000", "--method", "qmp"),
        ("on", "--pid", "11", "--persist", "later"),
    ],
)
def test_mistakes(run: Run, words: tuple[str, ...]) -> None:
    code, out, err = run(*words)
    assert (code, out, run.host.switches) == (ExitCode.USAGE, "", [])
    assert len(err.splitlines()) == 2


def test_ranges(run: Run) -> None:
    asked: list[Any] = []
    take = run.host.switch
    run.host.switch = lambda request, *more, **named: asked.append(request) or take(request, *more, **named)  # type: ignore[method-assign,func-returns-value]
    assert run("on", "--pid", "11", "--range", "7f0000-7F1000", "--range", "0x10000-0x20000")[0] == 0
    assert asked[0].ranges == ((0x7F0000, 0x7F1000), (0x10000, 0x20000))


def test_two_commands_never_switch_at_the_same_time(run: Run) -> None:
    with HostLock(run.folder / "runtime" / merge.LOCK, "ksmd-ctl merge on --pid 1"):
        code, _, err = run("off", "--pid", "11")
    assert (code, run.host.switches) == (ExitCode.REFUSED, [])
    assert "ksmd-ctl merge on --pid 1" in err


# -- with a service --------------------------------------------------------------------------------------------

RESULT: dict[str, Any] = {"result": {"on": True, "dry_run": False, "processes": []}, "progress": None}


def report(**more: object) -> dict[str, Any]:
    return {"report": {"host": {"kind": "kernel"}, **more}}


def test_the_service_does_it_where_it_may(run: Run) -> None:
    """What its own configuration says counts, not the one that the command reads."""

    def answer(request: dict[str, object]) -> bytes:
        return reply(**(report(switch_allow=True) if request["method"] == "io.ksmd-ctl.Status" else RESULT))

    with listening(run.folder / "s", answer) as asked:
        assert run("on", "--vm", "vm-1", "--method", "qmp")[0] == 0
    assert run.host.switches == []
    _, call = asked
    assert call["method"] == "io.ksmd-ctl.Merge"
    assert call["parameters"] == {"on": True, "vm": "vm-1", "method": "qmp", "dry_run": False}


def test_root_does_it_where_the_service_may_not(run: Run) -> None:
    with listening(run.folder / "s", lambda _: reply(**report(switch_allow=False))):
        assert run("on", "--pid", "11")[0] == 0
    assert len(run.host.switches) == 1
    running = {"running": {"who": "ksmd-ctl set run=2, pid 7"}}
    with listening(run.folder / "s", lambda _: reply(**report(transaction=running))):
        code, _, err = run("on", "--pid", "11")
    assert (code, len(run.host.switches)) == (ExitCode.REFUSED, 1)
    assert "ksmd-ctl set run=2, pid 7" in err


def test_who_is_not_root_asks_the_service(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    refusal: dict[str, Any] = {"what": "switching merging", "why": "not allowed", "hint": "as root", "exit_code": 6}
    with listening(run.folder / "s", lambda _: reply("io.ksmd-ctl.Failed", **refusal)):
        code, _, err = run("on", "--pid", "11")
    assert (code, run.host.switches) == (6, [])
    assert err == "ksmd-ctl: switching merging: not allowed\nhint: as root\n"


# -- the next start --------------------------------------------------------------------------------------------


def test_persist_prints(run: Run) -> None:
    code, out, _ = run("on", "--unit", "web", "--persist")
    assert code == 0
    assert "next start In /etc/systemd/system/web.service.d/50-ksmd-ctl-merge.conf: ksmd-ctl switches it" in out
    assert "systemd 252 does not know MemoryKSM=" in out
    assert out.splitlines()[-1].strip() == f"{POST} on --pid $MAINPID"
    document = json.loads(run("off", "--vm", "vm-1", "--persist", "--json")[1])
    (setting,) = document["persist"]
    assert (setting["starter"], setting["content"], setting["written"]) == ("other", "-machine mem-merge=off", False)


def test_persist_writes_a_drop_in(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(run.folder), prepend=":")
    script = Script(run.folder)
    (run.folder / "etc/systemd/system").mkdir(parents=True)
    path = run.folder / "etc/systemd/system/web.service.d/50-ksmd-ctl-merge.conf"
    words = ("off", "--unit", "web", "--persist", "write", "--root", str(run.folder))
    assert run(*words, "--dry-run")[0] == 0
    assert not path.exists()
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    assert path.read_text() == f"[Service]\n{POST} off --pid $MAINPID\n"
    assert path.stat().st_mode & 0o777 == 0o644
    assert "written    /etc/systemd/system/web.service.d/50-ksmd-ctl-merge.conf" in out
    assert script.asked()[-1] == "daemon-reload"
    # A later one takes its place.
    assert run("on", *words[1:])[0] == 0
    assert "merge on" in path.read_text()


def test_persist_writes_for_units_only(run: Run) -> None:
    code, _, err = run("off", "--vm", "vm-1", "--persist", "write")
    assert code == ExitCode.REFUSED
    assert "--persist without `write` prints what belongs where" in err
    # Before anything was switched: it was only looked at.
    assert {dry_run for *_, dry_run in run.host.switches} <= {True}


@pytest.mark.parametrize("name", ["../../etc.service", "a b.service", "x/y.service", "-.slice"])
def test_a_name_that_is_no_units_is_not_written(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_persist, "Systemctl", lambda *_, **__: None)
    start = {"starter": "systemd", "name": name}
    document = {"on": True, "processes": [{"start": start, "machine": False}]}
    with pytest.raises(Refused, match="no unit's name"):
        merge_persist.settings(document, tmp_path, write=True)
    assert list(tmp_path.rglob("*")) == []


def test_a_folder_that_can_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "no")

    monkeypatch.setattr(merge_persist, "replace_file", refuse)
    monkeypatch.setattr(merge_persist, "Systemctl", lambda *_, **__: None)
    (tmp_path / "etc/systemd/system").mkdir(parents=True)
    start = {"starter": "systemd", "name": "web.service"}
    with pytest.raises(Denied, match="EACCES"):
        merge_persist.settings({"on": True, "processes": [{"start": start}]}, tmp_path, write=True)


def test_without_systemd_nothing_is_switched_or_written(run: Run) -> None:
    (run.folder / "etc/systemd/system").mkdir(parents=True)
    code, out, err = run("off", "--unit", "web", "--persist", "write", "--root", str(run.folder))
    assert (code, out) == (ExitCode.LACKING, "")
    assert err.splitlines() == [
        "ksmd-ctl: looking for systemd: this host was not started with systemd",
        "hint: --persist without `write` prints what belongs where",
    ]
    assert {dry_run for *_, dry_run in run.host.switches} <= {True}
    assert list((run.folder / "etc/systemd/system").iterdir()) == []
