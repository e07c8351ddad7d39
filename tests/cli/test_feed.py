# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the reports of ``watch`` come from: a service that comes and goes, or this process."""

from __future__ import annotations

import argparse
import json
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

from ksmd_ctl.cli import feed as module
from ksmd_ctl.cli.client import wait
from ksmd_ctl.cli.feed import Feed, OwnReports
from ksmd_ctl.errors import Absent, Denied, KsmdError, Unreachable
from ksmd_ctl.host.knobs import Knob
from tests.cli.fakes import reply
from tests.cli.test_schemas import problems
from tests.fakes.host import FakeHost, process

PATIENCE_SECONDS = 20


class Service:
    """A service in this thread: it takes connections and sends reports when a test says so."""

    def __init__(self, path: Path, kind: str = "kernel") -> None:
        self.path = path
        self.kind = kind
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.listener.settimeout(0)
        self.clients: list[tuple[socket.socket, str]] = []

    def accept(self) -> None:
        with suppress(BlockingIOError):
            while True:
                client, _ = self.listener.accept()
                client.settimeout(PATIENCE_SECONDS)
                request = b""
                while not request.endswith(b"\0"):
                    request += client.recv(65536)
                self.clients.append((client, json.loads(request[:-1])["method"].rpartition(".")[2]))

    def asked_for(self, method: str) -> int:
        self.accept()
        return sum(name == method for _, name in self.clients)

    def send(self, data: bytes, to: str = "Status") -> None:
        self.accept()
        for client, method in self.clients:
            if method == to:
                client.sendall(data)

    def happens(self, *texts: str) -> None:
        history = {"format": 1, "events": [{"text": text} for text in texts], "more": False}
        self.send(json.dumps({"parameters": {"history": history}, "continues": True}).encode() + b"\0", "History")

    def report(self, ticks: int) -> None:
        report = {"host": {"kind": self.kind, "simulated": False}, "daemon": {"ticks": ticks}}
        self.send(json.dumps({"parameters": {"report": report}, "continues": True}).encode() + b"\0")

    def close(self) -> None:
        for client, _ in self.clients:
            client.close()
        self.listener.close()
        self.path.unlink(missing_ok=True)


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> FakeHost:
    found = FakeHost({Knob.RUN: 1})
    found.running = [process(11, "web.service", 1000)]
    monkeypatch.setattr(module, "open_host", lambda *_, **__: nullcontext(found))
    monkeypatch.setattr(module, "left_by_service", lambda _: None)
    monkeypatch.setattr(module, "_AGAIN_SECONDS", 0.05)
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


@pytest.fixture
def service(path: Path) -> Iterator[Service]:
    with closing(Service(path)) as found:
        yield found


def args(path: Path, host: str | None = None) -> argparse.Namespace:
    return argparse.Namespace(socket=str(path), host=host, root="/")


def until(feed: Feed, wanted: Any) -> Mapping[str, object]:
    """The first report of which something holds."""
    begun = time.monotonic()
    while time.monotonic() < begun + PATIENCE_SECONDS:
        report = feed.poll()
        if report and wanted(report):
            return report
        wait(min(0.02, feed.wait_seconds()), feed.fileno())
    raise AssertionError("no such report came")


def ticks(report: Mapping[str, Any]) -> Any:
    return report["daemon"] and report["daemon"]["ticks"]


def test_the_services_reports_come_in_order_and_whole(path: Path, service: Service, there: FakeHost) -> None:
    with Feed(args(path), 1.0) as feed:
        assert feed.poll() is None
        service.report(1)
        service.report(2)
        assert ticks(until(feed, ticks)) == 1
        # It had arrived with the first one.
        assert ticks(feed.next()) == 2
        whole = json.dumps({"parameters": {"report": {"host": {"kind": "kernel"}}}, "continues": True}).encode() + b"\0"
        service.send(whole[:20])
        assert feed.poll() is None
        service.send(whole[20:])
        assert until(feed, bool)["host"] == {"kind": "kernel"}
        assert feed.note == ""


def test_whoever_watches_gets_new_surveys(
    path: Path, service: Service, there: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SURVEY_SECONDS", 0.0)
    with Feed(args(path), 1.0) as feed:
        feed.poll()
        for number in range(1, 4):
            service.report(number)
            until(feed, ticks)
        # The first is not answered yet.
        assert service.asked_for("Nodes") == 1
        (survey,) = [client for client, method in service.clients if method == "Nodes"]
        survey.sendall(reply(nodes={}))
        service.report(4)
        until(feed, ticks)
        assert service.asked_for("Nodes") == 2
        # One that fails is no reason to end.
        service.clients[-1][0].sendall(reply("io.ksmd-ctl.Failed", what="a", why="b", hint="", exit_code=3))
        service.report(5)
        assert ticks(until(feed, ticks)) == 5


def test_a_service_that_goes_and_comes_back(path: Path, there: FakeHost) -> None:
    with closing(Service(path)) as service, Feed(args(path), 0.05) as feed:
        feed.poll()
        service.report(1)
        until(feed, ticks)
        service.close()
        assert until(feed, lambda report: not report["daemon"])["daemon"] is None
        assert feed.note == f"read from the kernel directly: no service runs ({path})"
        with closing(Service(path)) as another:
            while not another.asked_for("Status"):
                feed.poll()
            another.report(2)
            assert ticks(until(feed, ticks)) == 2
            assert feed.note == ""


def heard(feed: Feed) -> list[tuple[list[str], bool]]:
    return [([event["text"] for event in history["events"]], anew) for history, anew in feed.events()]  # type: ignore


def test_events_are_those_of_the_services_history(path: Path, service: Service, there: FakeHost) -> None:
    with Feed(args(path), 1.0, listen=True) as feed:
        feed.poll()
        assert heard(feed) == []
        service.report(1)
        until(feed, ticks)
        assert service.asked_for("History") == 1
        service.happens("one", "two")
        service.happens("three")
        found: list[tuple[list[str], bool]] = []
        while len(found) < 2:
            found += heard(feed)
        assert found == [(["one", "two"], True), (["three"], False)]


def test_a_service_without_a_history_is_asked_for_it_now_and_then(
    path: Path, service: Service, there: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SURVEY_SECONDS", 0.0)
    with Feed(args(path), 1.0, listen=True) as feed:
        feed.poll()
        service.report(1)
        until(feed, ticks)
        service.asked_for("History")
        service.send(reply("org.varlink.service.MethodNotFound"), "History")
        begun = time.monotonic()
        while feed._history is not None:
            assert heard(feed) == []
            assert time.monotonic() < begun + PATIENCE_SECONDS
        service.report(2)
        until(feed, ticks)
        assert service.asked_for("History") == 2


def test_who_wants_no_events_asks_for_none(path: Path, service: Service, there: FakeHost) -> None:
    with Feed(args(path), 1.0) as feed:
        feed.poll()
        service.report(1)
        until(feed, ticks)
        assert service.asked_for("History") == 0


def test_a_simulated_service_that_goes_is_not_replaced_by_the_kernel(path: Path, there: FakeHost) -> None:
    with closing(Service(path, "engine")) as service, Feed(args(path), 0.05) as feed:
        feed.poll()
        service.report(1)
        until(feed, ticks)
        service.close()
        begun = time.monotonic()
        while time.monotonic() < begun + 0.3:
            assert feed.poll() is None
        assert feed.stopped
        assert feed.note == f"these are the last ones: no service runs ({path})"


def test_a_service_on_another_host_is_not_asked_again(path: Path, service: Service, there: FakeHost) -> None:
    with Feed(args(path, "engine"), 0.05) as feed:
        feed.poll()
        service.report(1)
        until(feed, lambda report: report["daemon"] is None)
        begun = time.monotonic()
        while time.monotonic() < begun + 0.3:
            feed.poll()
        assert service.asked_for("Status") == 1
        assert feed.note == "read from the engine directly: the service runs on the kernel"


@pytest.mark.parametrize("answer", [b"\0", b"{}\0", reply("io.ksmd-ctl.TooManyClients", limit=2), reply(report={})])
def test_another_on_the_socket_ends_it_at_the_beginning(
    path: Path, service: Service, there: FakeHost, answer: bytes
) -> None:
    with Feed(args(path), 1.0) as feed:
        feed.poll()
        service.send(answer)
        with pytest.raises(Unreachable):
            until(feed, bool)


def test_a_service_that_says_nothing_ends_it_at_the_beginning(
    path: Path, service: Service, there: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REPORT_SECONDS", 0.1)
    with Feed(args(path), 1.0) as feed, pytest.raises(Unreachable, match=r"no answer within 0\.1 s"):
        until(feed, bool)


def test_a_service_that_says_nothing_later_is_late(
    path: Path, service: Service, there: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LATE_SECONDS", 0.1)
    with Feed(args(path), 1.0) as feed:
        feed.poll()
        service.report(1)
        until(feed, ticks)
        assert feed.late_seconds == 0
        time.sleep(0.15)
        assert feed.late_seconds > 0.1
        service.report(2)
        until(feed, ticks)
        assert feed.late_seconds == 0


def test_nonsense_later_is_said_and_the_service_is_asked_again(path: Path, service: Service, there: FakeHost) -> None:
    with Feed(args(path), 1.0) as feed:
        feed.poll()
        service.report(1)
        until(feed, ticks)
        service.send(b"nonsense\0")
        while not feed.note:
            feed.poll()
        assert feed.note.startswith("these are the last ones: asking")
        while service.asked_for("Status") < 2:
            feed.poll()
        service.clients.pop(0)
        service.report(2)
        assert ticks(until(feed, ticks)) == 2


def test_who_may_not_ask_reads_directly(path: Path, there: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise Denied("asking", "EACCES (Permission denied)")

    monkeypatch.setattr(module, "Conversation", refused)
    with Feed(args(path), 1.0) as feed:
        assert until(feed, bool)["daemon"] is None
        assert "no permission to query the service (EACCES" in feed.note


def test_a_kernel_without_ksm(path: Path, there: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    there.knobs.clear()
    with Feed(args(path), 1.0) as feed, pytest.raises(Absent):
        feed.poll()


# -- own reports ------------------------------------------------------------------------------------------------


def reports(own: OwnReports, count: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    begun = time.monotonic()
    while len(found) < count and time.monotonic() < begun + PATIENCE_SECONDS:
        if report := own.poll():
            found.append(report)
        wait(min(0.01, own.wait_seconds()), own.fileno())
    return found


def test_own_reports_have_the_form_of_the_services(there: FakeHost) -> None:
    first, *_, last = reports(OwnReports(there, 0.02), 5)
    for report in (first, last):
        assert problems("status", report) == []
    assert last["numa"]["groups"][0]["group"] == "web.service"
    assert last["sharing"]["looks"] == 1


def test_what_fails_is_said_and_the_rest_goes_on(there: FakeHost) -> None:
    there.survey_outcome = Denied("looking", "EACCES (Permission denied)")
    last = reports(OwnReports(there, 0.02), 3)[-1]
    assert last["numa"]["error"].startswith("looking: EACCES (Permission denied); root may look")
    assert last["derived"]["merged_pages"] is not None
    assert problems("status", last) == []


def test_an_expensive_survey_is_seldom(there: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SURVEY_SECONDS", 0.0)
    monkeypatch.setattr(module, "_CPU_SHARE", 1000.0)
    own = OwnReports(there, 0.01)
    surveys = reports(own, 12)[-1]["numa"]["surveys"]
    assert surveys >= 2
    monkeypatch.setattr(module, "_CPU_SHARE", 1e-9)
    own = OwnReports(there, 0.01)
    assert reports(own, 12)[-1]["numa"]["surveys"] == 1


def test_a_host_that_fails_is_an_error(there: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    own = OwnReports(there, 0.01)

    def fails(*, fresh: bool = False) -> None:
        raise KsmdError("sampling", "gone")

    monkeypatch.setattr(there, "sample", fails)
    with pytest.raises(KsmdError, match="gone"):
        reports(own, 1)
