# SPDX-License-Identifier: GPL-2.0-or-later
"""history: what people read, and the way to the service or to the file."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from ksmd_ctl.cli import history
from ksmd_ctl.cli.main import main
from ksmd_ctl.errors import ExitCode
from ksmd_ctl.history.file import HistoryFile
from ksmd_ctl.history.model import Entry, Kind, Severity, history_path
from tests.cli.fakes import conversation, listening, reply

EVENT = {
    "time_seconds": 1795951815.5,
    "kind": "foreign",
    "event": "drift",
    "severity": "warning",
    "text": "run was changed from 1 to 2 by somebody else",
    "who": "ksmtuned",
    "fields": {"knob": "run"},
    "boot_id": "b",
}
OTHER = {**EVENT, "kind": "transaction", "severity": "info", "text": "transaction done (ksmd-ctl set run=1)"}
DOCUMENT = {"format": 1, "events": [EVENT, OTHER], "more": False}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()

    def command(*words: str) -> tuple[int, str, str]:
        code = main(["history", *words, "--socket", str(tmp_path / "s")])
        said = capsys.readouterr()
        return code, said.out, said.err

    return command


def test_events_have_a_line_each(run: Any, tmp_path: Path) -> None:
    with listening(tmp_path / "s", lambda _: reply(history=DOCUMENT)) as requests:
        code, out, err = run()
    assert (code, err) == (ExitCode.DONE, "")
    assert out == (
        "2026-11-29 11:30:15 foreign       run was changed from 1 to 2 by somebody else\n"
        "2026-11-29 11:30:15 transaction   transaction done (ksmd-ctl set run=1)\n"
    )
    assert requests == [{"method": "io.ksmd-ctl.History", "parameters": {"limit": 1000}}]


def test_options_are_what_is_asked_for(run: Any, tmp_path: Path) -> None:
    with listening(tmp_path / "s", lambda _: reply(history={**DOCUMENT, "more": True})) as requests:
        words = ("--since", "@5", "--until", "2026-11-29", "--kind", "policy", "--kind", "foreign", "--limit", "7")
        code, out, _ = run(*words)
        assert (code, "more" in out) == (ExitCode.DONE, False)
        code, out, _ = run()
    assert requests[0]["parameters"] == {
        **{"since_seconds": 5.0, "until_seconds": 1795910400.0},
        **{"kinds": ["foreign", "policy"], "limit": 7},
    }
    assert out.endswith("more       only the latest 2: --until shows earlier ones\n")


def test_json_is_the_document(run: Any, tmp_path: Path) -> None:
    with listening(tmp_path / "s", lambda _: reply(history=DOCUMENT)):
        code, out, _ = run("--json")
    assert code == ExitCode.DONE
    assert json.loads(out) == DOCUMENT


def test_where_nothing_is_kept_it_says_so(run: Any, tmp_path: Path) -> None:
    with listening(tmp_path / "s", lambda _: reply(history={**DOCUMENT, "events": []})):
        assert run("--kind", "domain")[:2] == (ExitCode.DONE, "none       no such event is kept\n")


def test_whoever_may_not_ask_the_service_is_told_that(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not that there is no history: they may not see where it is."""

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("socket.socket.connect", refuse)
    code, out, err = run()
    assert (code, out) == (ExitCode.DENIED, "")
    assert "EACCES" in err
    assert "member of the group" in err


def test_following_shows_what_comes_until_the_service_ends(run: Any, tmp_path: Path) -> None:
    def answer(request: dict[str, Any]) -> bytes:
        if request["method"].endswith("Status"):
            return reply(report={"host": {"kind": "kernel"}})
        return conversation({"history": DOCUMENT}, {"history": {**DOCUMENT, "events": [OTHER]}})

    with listening(tmp_path / "s", answer) as requests:
        code, out, err = run("--follow")
        assert requests[-1] == {
            **{"method": "io.ksmd-ctl.History", "parameters": {"limit": 10, "follow": True}, "more": True}
        }
        assert len(out.splitlines()) == 3
        assert code == ExitCode.UNREACHABLE
        assert "it has ended" in err
        _, out, _ = run("--follow", "--json")
        assert [json.loads(line) for line in out.splitlines()] == [EVENT, OTHER, OTHER]


def test_following_goes_on_with_the_next_service(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_AGAIN_SECONDS", 0.001)
    later = {**OTHER, "time_seconds": time.time() + 100, "text": "later"}
    calls = 0

    def answer(request: dict[str, Any]) -> bytes:
        nonlocal calls
        if request["method"].endswith("Status"):
            return reply(report={"host": {"kind": "kernel"}})
        calls += 1
        if calls < 4:
            # It is killed: first after an event, then at once.
            more = {"parameters": {"history": {**DOCUMENT, "events": [later]}}, "continues": True}
            return json.dumps(more).encode() + b"\0" if calls == 1 else b""
        return conversation({"history": {**DOCUMENT, "events": [OTHER]}})

    with listening(tmp_path / "s", answer) as requests:
        code, out, err = run("--follow", "--kind", "transaction")
    assert [line.split(" ", 3)[-1].strip() for line in out.splitlines()] == [
        *("later", "it has ended; waiting for the next one", "transaction done (ksmd-ctl set run=1)")
    ], out
    assert (code, "it has ended" in err) == (ExitCode.UNREACHABLE, True)
    # What it missed is asked for.
    parameters = [request["parameters"] for request in requests[1:]]
    assert parameters[0] == {"kinds": ["transaction"], "limit": 10, "follow": True}
    again = {"since_seconds": later["time_seconds"] + 1e-6, "kinds": ["transaction"], "limit": 2000, "follow": True}
    assert parameters[1:] == [again] * 3


def test_following_takes_a_service(run: Any) -> None:
    code, out, err = run("--follow")
    assert (code, out) == (ExitCode.UNREACHABLE, "")
    assert "no service runs" in err
    assert "without --follow" in err


def state(tmp_path: Path, kind: str = "kernel") -> Path:
    """A state directory with a history."""
    config = tmp_path / "c.toml"
    config.write_text(f"[service]\nsocket = '{tmp_path}/none'\nstate_directory = '{tmp_path}/state'\n")
    file = HistoryFile(history_path(tmp_path / "state", kind), 1 << 20)
    entries = [
        Entry(100.0, Kind.SERVICE, "started", Severity.INFO, "started"),
        Entry(200.0, Kind.FOREIGN, "drift", Severity.WARNING, "run was changed"),
    ]
    file.write(entries, [])
    file.close()
    return config


def test_without_a_service_it_is_read_from_the_file(run: Any, tmp_path: Path) -> None:
    config = state(tmp_path)
    code, out, _ = run("--config", str(config), "--kind", "foreign")
    assert code == ExitCode.DONE
    first, second = out.splitlines()
    assert f"these events are from {tmp_path}/state/history-kernel.sqlite" in first
    assert second == "1970-01-01 00:03:20 foreign       run was changed"
    code, out, _ = run("--config", str(config), "--json")
    assert [event["text"] for event in json.loads(out)["events"]] == ["started", "run was changed"]
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["history-kernel.sqlite"]


def test_the_simulated_host_has_its_own(run: Any, tmp_path: Path) -> None:
    config = state(tmp_path, "engine")
    code, _, err = run("--config", str(config))
    assert code == ExitCode.LACKING
    assert "history-kernel.sqlite" in err
    code, out, _ = run("--config", str(config), "--host", "engine")
    assert code == ExitCode.DONE
    assert "run was changed" in out


def test_a_file_that_is_none(run: Any, tmp_path: Path) -> None:
    config = state(tmp_path)
    (tmp_path / "state/history-kernel.sqlite").write_text("what is this?\n" * 100)
    code, out, err = run("--config", str(config))
    assert (code, out) == (ExitCode.CHECK_FAILED, "")
    assert len(err.splitlines()) == 2
    assert "hint: " in err


@pytest.mark.parametrize(
    "words",
    [
        ("--since", "2h", "--until", "3h"),
        ("--since", "soon"),
        ("--follow", "--until", "1h"),
        ("--follow", "--until", "tomorrow"),
        ("--kind", "x"),
        ("--limit", "0"),
        ("--limit", "2001"),
    ],
)
def test_options_that_can_not_be(run: Any, words: tuple[str, ...]) -> None:
    code, out, err = run(*words)
    assert (code, out) == (ExitCode.USAGE, "")
    assert words[0] in err


def test_a_value_that_begins_with_a_minus_goes_after_the_equals_sign(run: Any, tmp_path: Path) -> None:
    code, _, err = run("--since", "-1h")
    assert code == ExitCode.USAGE
    assert "hint: a value that begins with - goes after =" in err
    with listening(tmp_path / "s", lambda _: reply(history=DOCUMENT)) as requests:
        assert run("--since=-1h")[0] == ExitCode.DONE
    assert abs(requests[0]["parameters"]["since_seconds"] - (time.time() - 3600)) < 60
