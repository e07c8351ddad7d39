# SPDX-License-Identifier: GPL-2.0-or-later
"""What the service keeps: when it is written, how an end without a stop is seen, and what happens where it can't be."""

from __future__ import annotations

import asyncio
import dataclasses
import resource
import signal
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ksmd_ctl.config.model import Config
from ksmd_ctl.daemon.history import KIND_OF, MOST_EVENTS, SOON_SECONDS, WRITE_SECONDS, HistoryKeeper
from ksmd_ctl.daemon.log import Event, Log
from ksmd_ctl.daemon.tasks import Tasks
from ksmd_ctl.history.file import HistoryFile
from ksmd_ctl.history.model import Entry, Kind, Means, Query, Severity
from ksmd_ctl.history.reading import read_copy
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.sample import HostIdentity
from tests.fakes.host import FakeHost

EVERYTHING = Query(limit=MOST_EVENTS)
IDENTITY = FakeHost().identity


class Service:
    """As much of a service as the history needs."""

    def __init__(self, folder: Path, identity: HostIdentity = IDENTITY, at: float = 1_800_000_000.0) -> None:
        self.config = Config()
        self.now = 0.0
        self.at = at
        self.logged: list[tuple[Event, str]] = []
        self.log = Log(lambda text, fields: self.logged.append((Event(fields["MESSAGE_ID"]), text)), lambda: self.now)
        self.tasks = Tasks()
        self.history = HistoryKeeper(folder, identity, self.tasks, lambda: self.config, self.log, lambda: self.at)

    def begin(self) -> Service:
        self.history.begin(self.now)
        self.log.event(Event.STARTED, "started", version="1")
        self.run(lambda: self.history.write(self.now))
        return self

    def run(self, call: Callable[[], object]) -> None:
        """Call a function in an event loop, and wait for what it starts."""

        async def loop() -> None:
            call()
            while self.tasks.running:
                await asyncio.wait(self.tasks.running)

        asyncio.run(loop())

    def end(self) -> None:
        self.log.event(Event.STOPPED, "stopped by SIGTERM")
        self.history.close()

    def wait(self, seconds: float = WRITE_SECONDS) -> None:
        self.now += seconds
        self.at += seconds
        self.run(lambda: self.history.tick(self.now))

    def drift(self, times: int = 1) -> None:
        for number in range(times):
            # Each of another knob, or they would be held back.
            self.log.event(Event.DRIFT, f"drift {number}", knob=f"knob{self.now}-{number}", writers="ksmtuned")

    def on_disk(self) -> list[Entry]:
        return read_copy(self.history.path, EVERYTHING)

    def asked(self) -> Any:
        return self.document(EVERYTHING)["events"]

    def document(self, query: Query) -> Any:
        return asyncio.run(self.history.document(query))

    def means(self) -> Sequence[Means]:
        return asyncio.run(self.history.past(3600, 60))[0]

    def cut_off(self) -> None:
        """What the kernel does when it is killed."""
        file = self.history._store._file
        assert file is not None
        file._db.close()

    def told(self, event: Event) -> list[str]:
        return [text for found, text in self.logged if found is event]


def texts(entries: Any) -> list[str]:
    return [entry["text"] if isinstance(entry, dict) else entry.text for entry in entries]


def test_every_event_has_a_kind() -> None:
    assert KIND_OF.keys() == set(Event)


def test_an_event_is_kept_with_its_fields_and_who(tmp_path: Path) -> None:
    service = Service(tmp_path).begin()
    service.log.event(Event.DRIFT, "run was changed", knob="run", found=2, writers="ksmtuned, tuned")
    service.log.event(Event.TRANSACTION_FAILED, "transaction abandoned", id="x", who="ksmd-ctl set run=0, pid 1, uid 0")
    service.history.decided("quick: 5 pages", "quick", {Knob.RUN: 1})
    service.end()
    boot = IDENTITY.boot_id
    assert service.on_disk() == [
        Entry(service.at, Kind.SERVICE, "started", Severity.INFO, "started", "", {"version": "1"}, boot),
        Entry(
            *(service.at, Kind.FOREIGN, "drift", Severity.WARNING, "run was changed"),
            *("ksmtuned, tuned", {"knob": "run", "found": "2"}, boot),
        ),
        Entry(
            *(service.at, Kind.TRANSACTION, "transaction_failed", Severity.WARNING, "transaction abandoned"),
            *("ksmd-ctl set run=0, pid 1, uid 0", {"id": "x"}, boot),
        ),
        Entry(
            *(service.at, Kind.POLICY, "decided", Severity.INFO, "quick: 5 pages", ""),
            *({"phase": "quick", "run": "1"}, boot),
        ),
        Entry(service.at, Kind.SERVICE, "stopped", Severity.INFO, "stopped by SIGTERM", "", {}, boot),
    ]


def test_decisions_are_written_once_a_minute_and_shown_at_once(tmp_path: Path) -> None:
    service = Service(tmp_path).begin()
    service.wait(1)
    service.wait(SOON_SECONDS)
    service.history.decided("quick", "quick", {})
    service.wait(WRITE_SECONDS - 1)
    assert texts(service.on_disk()) == ["started"]
    assert texts(service.asked()) == ["started", "quick"]
    service.wait(1)
    assert texts(service.on_disk()) == ["started", "quick"]
    assert texts(service.asked()) == ["started", "quick"]


def test_what_others_did_is_written_soon_and_not_each_time(tmp_path: Path) -> None:
    service = Service(tmp_path).begin()
    for step in range(int(SOON_SECONDS)):
        service.drift()
        service.history.decided("quick", "quick", {})
        service.wait(1)
        assert texts(service.on_disk()) == ["started"], step
    service.drift()
    service.wait(1)
    assert texts(service.on_disk()) == ["started", *["drift 0", "quick"] * 5, "drift 0"]


def test_samples_are_means_of_a_minute(tmp_path: Path) -> None:
    service = Service(tmp_path).begin()
    for step in range(18):
        service.history.add(Means(0, step, None, 10 * step, ksm_pages={"0": step}))
        service.wait(10)
    first = 1_800_000_000 // 60 * 60
    found = service.means()
    assert [(mean.time_seconds - first, mean.saved_bytes, mean.pages_shared, mean.ksm_pages) for mean in found] == [
        (0, 2.5, None, {"0": 5}),
        (60, 8.5, None, {"0": 11}),
    ]
    service.end()
    assert len(Service(tmp_path, at=service.at).begin().means()) == 3


def test_a_clean_end_is_no_news_and_another_is(tmp_path: Path) -> None:
    first = Service(tmp_path).begin()
    first.end()
    second = Service(tmp_path).begin()
    assert second.told(Event.KILLED) == []
    second.history.add(Means(0, 1))
    second.wait()
    second.history.add(Means(0, 1))
    second.wait()
    second.cut_off()
    third = Service(tmp_path, at=second.at + 1000).begin()
    (said,) = third.told(Event.KILLED)
    assert said.startswith("the service that ran before ended without a stop, after 20")
    third.end()
    assert third.told(Event.REBOOTED) == []
    found = [entry for entry in third.on_disk() if entry.kind is Kind.SERVICE]
    assert [entry.event for entry in found] == ["started", "stopped", "started", "killed", "started", "stopped"]
    assert found[3].fields == {"booted": "False"}


def test_a_reboot_is_seen_and_whether_it_was_a_clean_one(tmp_path: Path) -> None:
    Service(tmp_path).begin().end()
    other = dataclasses.replace(IDENTITY, boot_id="another")
    service = Service(tmp_path, other).begin()
    assert len(service.told(Event.REBOOTED)) == 1
    assert service.told(Event.KILLED) == []
    service.cut_off()
    third = Service(tmp_path).begin()
    assert third.told(Event.REBOOTED) == []
    (said,) = third.told(Event.KILLED)
    assert said.endswith("; the host was booted again since")
    third.end()
    assert [entry.boot_id for entry in third.on_disk()] == [
        *[IDENTITY.boot_id] * 2,
        *["another"] * 2,
        *[IDENTITY.boot_id] * 3,
    ]


def test_a_policy_that_is_busy_is_summed_up(tmp_path: Path) -> None:
    service = Service(tmp_path).begin()
    for number in range(25):
        service.history.decided(f"decision {number}", "quick", {})
    service.drift()
    service.wait()
    service.history.decided("another minute", "quick", {})
    assert texts(service.asked()) == [
        "started",
        *(f"decision {number}" for number in range(10)),
        "drift 0",
        "15 more decisions within a minute",
        "another minute",
    ]


def test_where_it_cannot_be_written_that_is_said_once_and_counted(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file where the folder would be")
    service = Service(tmp_path / "state").begin()
    for _ in range(5):
        service.wait()
    assert len(service.told(Event.NO_HISTORY)) == 1
    assert "tries again" in service.told(Event.NO_HISTORY)[0]
    section = service.history.section()
    assert section is not None
    assert section["errors"] == 7
    assert str(tmp_path / "state") in str(section["error"])
    # What waits is shown.
    assert texts(service.asked())[-1] == "started"
    service.drift(600)
    assert len(service.asked()) == 500
    assert service.means() == []
    # The folder is there after all.
    (tmp_path / "state").unlink()
    service.wait()
    assert len(service.on_disk()) == 500
    section = service.history.section()
    assert section is not None
    assert (section["error"], section["waiting"]) == ("", 0)
    assert section["bytes"]
    service.end()
    assert texts(service.on_disk())[-1] == "stopped by SIGTERM"


def test_no_space_loses_nothing_that_fits_into_memory(tmp_path: Path) -> None:
    service = Service(tmp_path).begin()
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        for _ in range(3):
            service.drift(40)
            service.wait()
        assert len(service.told(Event.NO_HISTORY)) == 1
        assert len(service.asked()) == 1 + 3 * 40 + 1
        service.end()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    # Its stop is lost, and the next start says so.
    assert texts(service.on_disk()) == ["started"]
    assert len(Service(tmp_path).begin().told(Event.KILLED)) == 1


def test_a_busy_policy_pushes_out_nothing_while_the_disk_is_full(tmp_path: Path) -> None:
    """At its highest rate, for two hours; then others change a knob all the time."""
    (tmp_path / "state").write_text("a file where the folder would be")
    service = Service(tmp_path / "state").begin()
    service.drift(10)
    for minute in range(120):
        for number in range(100):
            service.history.decided(f"burst {minute}-{number}", "burst", {})
        service.wait()
    kinds = Counter(event["kind"] for event in service.asked())
    assert kinds == {"service": 2, "foreign": 10, "policy": 488}
    service.drift(1000)
    kinds = Counter(event["kind"] for event in service.asked())
    assert kinds == {"service": 2, "foreign": 498}
    (tmp_path / "state").unlink()
    service.wait()
    assert texts(service.on_disk()) == texts(service.asked())
    assert texts(service.on_disk())[-1] == "drift 999"


@pytest.mark.parametrize("content", [b"not a database" * 1000, b"SQLite format 3\0" + bytes(5000)])
def test_a_damaged_file_is_put_aside_at_a_start(tmp_path: Path, content: bytes) -> None:
    service = Service(tmp_path)
    service.history.path.write_bytes(content)
    service.begin()
    (said,) = service.told(Event.NO_HISTORY)
    assert f"was put aside as {service.history.path}.damaged" in said
    assert Path(f"{service.history.path}.damaged").read_bytes() == content
    assert texts(service.on_disk()) == [said, "started"]


def test_a_file_that_is_damaged_later_is_put_aside_then(tmp_path: Path) -> None:
    service = Service(tmp_path).begin()
    service.history._store.use(lambda file: file._db.execute("DROP TABLE events"))
    service.drift()
    service.wait()
    (said,) = service.told(Event.NO_HISTORY)
    assert "put aside" in said
    # What waited is written to the new one.
    service.wait()
    assert texts(service.on_disk()) == ["drift 0", said]
    assert Path(f"{service.history.path}.damaged").exists()


def test_nothing_is_kept_where_the_configuration_says_so(tmp_path: Path) -> None:
    service = Service(tmp_path / "state")
    service.config = dataclasses.replace(service.config, history_days=0)
    service.begin()
    service.drift()
    service.wait()
    assert service.asked() == []
    assert service.history.section() is None
    service.end()
    assert not (tmp_path / "state").exists()


def test_days_are_taken_at_a_reload(tmp_path: Path) -> None:
    service = Service(tmp_path).begin()
    service.wait(3 * 86400)
    service.drift()
    service.config = dataclasses.replace(service.config, history_days=1)
    service.wait(3600)
    assert texts(service.asked()) == ["drift 0"]


@pytest.mark.parametrize("text", ["\x1b[31mred", "a\nb", "\udc80", "\u202egnp", "x" * 10000, ""])
def test_whatever_is_logged_is_a_line_that_can_be_shown(tmp_path: Path, text: str) -> None:
    service = Service(tmp_path).begin()
    service.log.event(Event.DRIFT, text, knob=text, writers=text)
    service.end()
    (entry,) = [entry for entry in service.on_disk() if entry.event == "drift"]
    assert entry.text.isprintable()
    assert len(entry.text) <= 500
    assert entry.who.isprintable()
    assert len(entry.who) <= 200


def test_who_follows_gets_what_comes(tmp_path: Path) -> None:
    service = Service(tmp_path).begin()
    heard: list[Entry] = []
    service.history.follow(heard.append)
    service.drift(2)
    service.history.unfollow(heard.append)
    service.drift(1)
    assert texts(heard) == ["drift 0", "drift 1"]


def test_a_document_stays_within_what_a_client_takes(tmp_path: Path) -> None:
    service = Service(tmp_path).begin()
    for step in range(20):
        for number in range(200):
            service.log.event(Event.DRIFT, "x" * 500, knob=f"{step}-{number}", writers="y" * 200, more="z" * 200)
        service.wait()
    document: Any = service.document(EVERYTHING)
    assert document["more"]
    assert 500 < len(document["events"]) < 2000
    assert document["events"][-1]["fields"]["knob"] == "19-199"
    few: Any = service.document(Query(limit=3))
    assert (len(few["events"]), few["more"]) == (3, True)
    none: Any = service.document(Query(kinds=frozenset({Kind.DOMAIN})))
    assert (none["events"], none["more"]) == ([], False)


class SlowDisk:
    """Commits wait for somebody to open the gate, as on a disk that hangs."""

    def __init__(self, service: Service, machine: pytest.MonkeyPatch) -> None:
        self.gate, self.reached = threading.Event(), threading.Event()
        write = HistoryFile.write

        def slow(file: HistoryFile, entries: Sequence[Entry], means: Sequence[Means]) -> None:
            self.reached.set()
            assert self.gate.wait(30)
            write(file, entries, means)

        machine.setattr(HistoryFile, "write", slow)


def test_a_slow_disk_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(tmp_path).begin()
    disk = SlowDisk(service, monkeypatch)

    async def loop() -> None:
        service.drift()
        writing = service.history.write(service.now)
        while not disk.reached.is_set():
            await asyncio.sleep(0.001)
        # Whoever asks gets the answer when the disk has answered; it has all events, and each of them once.
        asked = service.tasks.start(service.history.document(EVERYTHING))
        for _ in range(10):
            service.now += WRITE_SECONDS
            service.drift()
            service.history.tick(service.now)
            await asyncio.sleep(0.001)
        assert not writing.done()
        assert not asked.done()
        assert len(service.history._waiting.entries) == 11
        disk.gate.set()
        events: Any = (await asked)["events"]
        assert len(events) == 12
        assert texts(events) == ["started", *["drift 0"] * 11]
        await writing
        # What came meanwhile is written next.
        service.now += 1
        service.history.tick(service.now)
        while service.tasks.running:
            await asyncio.wait(service.tasks.running)

    asyncio.run(loop())
    assert texts(service.on_disk()) == ["started", *["drift 0"] * 11]


def test_an_end_while_the_disk_is_slow_writes_all_and_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service(tmp_path).begin()
    disk = SlowDisk(service, monkeypatch)

    async def loop() -> None:
        service.drift(40)
        service.history.write(service.now)
        while not disk.reached.is_set():
            await asyncio.sleep(0.001)
        service.tasks.close()
        threading.Timer(0.05, disk.gate.set).start()

    asyncio.run(loop())
    service.end()
    assert texts(service.on_disk()) == ["started", *(f"drift {number}" for number in range(40)), "stopped by SIGTERM"]
