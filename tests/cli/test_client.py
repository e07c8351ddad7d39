# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import socket
from pathlib import Path

import pytest

from ksmd_ctl.cli import client
from ksmd_ctl.cli.client import Conversation, NoService, socket_path
from ksmd_ctl.cli.common import DEFAULT_SOCKET
from ksmd_ctl.config.model import SETTINGS_BY_KEY
from ksmd_ctl.daemon.varlink import INTERFACE
from ksmd_ctl.errors import ConfigError, Denied, ExitCode, KsmdError, Unreachable
from ksmd_ctl.host.operation import readable
from tests.cli.fakes import conversation, listening, reply


def call(path: str, method: str, parameters: object = None, timeout_seconds: float = 5.0) -> dict[str, object]:
    with Conversation(path, method, parameters, more=False, timeout_seconds=timeout_seconds) as conversation:
        return conversation.answer() or {}


def test_defaults_are_the_services(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KSMD_CTL_SOCKET", raising=False)
    assert socket_path(None) == DEFAULT_SOCKET == SETTINGS_BY_KEY["service", "socket"].default
    monkeypatch.setenv("KSMD_CTL_SOCKET", "/a")
    assert socket_path(None) == "/a"
    assert socket_path("/b") == "/b"
    assert client.INTERFACE == INTERFACE


def test_a_call(tmp_path: Path) -> None:
    with listening(tmp_path / "s", lambda request: reply(text="x" * 200_000)) as requests:
        assert call(str(tmp_path / "s"), "Metrics", {"a": 1}) == {"text": "x" * 200_000}
    assert requests == [{"method": f"{INTERFACE}.Metrics", "parameters": {"a": 1}}]


@pytest.mark.parametrize("stale", [False, True])
def test_nobody_listens(tmp_path: Path, stale: bool) -> None:
    path = tmp_path / "s"
    if stale:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path))
    with pytest.raises(NoService) as caught:
        call(str(path), "Status")
    assert str(path) in caught.value.what
    assert caught.value.exit_code == ExitCode.UNREACHABLE


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"", "hung up without an answer"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "hung up without an answer"),
        (b"\0", "not JSON"),
        (b"\xff\0", "not JSON"),
        (b"[" * 100_000 + b"\0", "not JSON"),
        (b"[]\0", "not of Varlink's form"),
        (b'{"parameters":1}\0', "not of Varlink's form"),
        (b'{"error":1}\0', "not of Varlink's form"),
        (reply("org.varlink.service.MethodNotFound", method="x"), "it answers org.varlink.service.MethodNotFound"),
        (reply(f"{INTERFACE}.TooManyClients", limit=32), "32 clients already"),
        (reply(f"{INTERFACE}.TooManyClients", limit="32"), r"it answers io\.ksmd-ctl\.TooManyClients"),
        (reply(f"{INTERFACE}.Failed", what="the report"), r"it answers io\.ksmd-ctl\.Failed"),
        (b"x" * (client._MAX_ANSWER_BYTES + 100_000), "longer than"),
    ],
    ids=lambda value: repr(value[:40]),
)
def test_answers_that_are_none(tmp_path: Path, answer: bytes, why: str) -> None:
    with listening(tmp_path / "s", lambda request: answer), pytest.raises(Unreachable, match=why) as caught:
        call(str(tmp_path / "s"), "Status")
    assert str(tmp_path / "s") in caught.value.what


def test_a_silent_service(tmp_path: Path) -> None:
    with listening(tmp_path / "s", None), pytest.raises(Unreachable, match=r"no answer within 0\.05 s"):
        call(str(tmp_path / "s"), "Status", timeout_seconds=0.05)


def test_a_service_that_does_not_even_accept(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as first:
        server.bind(str(tmp_path / "s"))
        server.listen(0)
        first.connect(str(tmp_path / "s"))
        with pytest.raises(Unreachable, match=r"no answer within 0\.05 s|temporarily unavailable|timed out"):
            call(str(tmp_path / "s"), "Status", timeout_seconds=0.05)


def test_what_the_service_says_that_failed(tmp_path: Path) -> None:
    failed = reply(f"{INTERFACE}.Failed", what="the report", why="none yet", hint="wait", exit_code=4)
    with listening(tmp_path / "s", lambda request: failed), pytest.raises(KsmdError) as caught:
        call(str(tmp_path / "s"), "Status")
    assert (caught.value.what, caught.value.why, caught.value.hint) == ("the report", "none yet", "wait")
    assert caught.value.exit_code == ExitCode.LACKING


def test_an_exit_code_that_is_none(tmp_path: Path) -> None:
    failed = reply(f"{INTERFACE}.Failed", what="a", why="b", hint="", exit_code=99)
    with listening(tmp_path / "s", lambda request: failed), pytest.raises(KsmdError) as caught:
        call(str(tmp_path / "s"), "Status")
    assert caught.value.exit_code == ExitCode.CHECK_FAILED


def test_denied_and_bad_configuration(tmp_path: Path) -> None:
    answers = [
        reply(f"{INTERFACE}.PermissionDenied", needs="root"),
        reply(f"{INTERFACE}.ReloadFailed", problems=[{"path": "/f", "key": "k", "text": "bad"}]),
    ]
    with listening(tmp_path / "s", lambda request: answers.pop(0)):
        with pytest.raises(Denied, match="only root may"):
            call(str(tmp_path / "s"), "Reload")
        with pytest.raises(ConfigError) as caught:
            call(str(tmp_path / "s"), "Reload")
    assert [str(problem) for problem in caught.value.problems] == ["/f: k: bad"]


def arriving(stream: Conversation, count: int) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    while len(found) < count:
        if (answer := stream.arrived()) is not None:
            found.append(answer)
        else:
            assert readable(stream.fileno(), 30)
    return found


def test_what_has_arrived_is_taken_without_waiting(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with (
        listening(path, lambda request: conversation({"a": 1}, {"a": 2})),
        Conversation(str(path), "Status") as stream,
    ):
        assert arriving(stream, 2) == [{"a": 1}, {"a": 2}]
        with pytest.raises(Unreachable, match="it has ended the answers"):
            stream.arrived()


def test_an_answer_without_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_MAX_ANSWER_BYTES", 1000)
    path = tmp_path / "s"
    with (
        listening(path, lambda request: b"x" * 5000),
        Conversation(str(path), "Status") as stream,
        pytest.raises(Unreachable, match="longer than"),
    ):
        arriving(stream, 1)
