# SPDX-License-Identifier: GPL-2.0-or-later
"""The loop on a fake host: a real event loop, real signals, and ticks that the test makes itself."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.config.loader import load
from ksmd_ctl.config.model import Config, OnDrift, PolicyName, Want
from ksmd_ctl.daemon import loop
from ksmd_ctl.daemon.log import Event, Log
from ksmd_ctl.daemon.loop import BOUNDS_SECONDS, Lateness, ServiceLoop
from ksmd_ctl.daemon.notify import Notifier
from ksmd_ctl.errors import ConfigError, Denied, ExitCode, HostError, KsmdError, Problem
from ksmd_ctl.host.knobs import Knob, KnobValue
from ksmd_ctl.host.sample import NodeMemory, Writer
from ksmd_ctl.knobs.saved_knobs import SavedKnobs
from ksmd_ctl.transactions.executor import Executor
from tests.fakes.host import FakeHost


class Bench:
    """A loop and everything around it."""

    def __init__(
        self,
        directory: Path,
        wanted: dict[Knob, KnobValue],
        host: FakeHost | None = None,
        config: Config | None = None,
    ) -> None:
        (directory / "c.toml").write_text("")
        self.config = config or dataclasses.replace(
            load(str(directory / "c.toml")),
            policy=PolicyName.FIXED,
            knobs={knob: Want(value) for knob, value in wanted.items()},
            # The test makes the ticks.
            sample_interval=3600.0,
        )
        self.host = host or FakeHost()
        self.sent: list[str] = []
        self.events: list[tuple[Event, str]] = []
        self.loaded: Config | ConfigError = self.config
        self.executor = Executor(self.host, SavedKnobs(directory / "state", self.host.identity))
        self.loop = ServiceLoop(
            self.config,
            self.host,
            self.executor,
            Log(self._logged),
            Notifier({"NOTIFY_SOCKET": "/x"}, self.sent.append),
            self._load,
        )

    def _logged(self, text: str, fields: Mapping[str, str]) -> None:
        if "MESSAGE_ID" in fields:
            self.events.append((Event(fields["MESSAGE_ID"]), text))

    def _load(self) -> Config:
        if isinstance(self.loaded, ConfigError):
            raise self.loaded
        return self.loaded

    def tick(self) -> None:
        self.host.now += 1
        self.loop.tick()

    def run(self, script: Callable[[], None]) -> int:
        """Run the loop; once it is ready, the script, then SIGTERM."""

        async def at_once() -> None:
            script()

        return self.run_async(at_once)

    def run_async(self, script: Callable[[], Awaitable[None]]) -> int:
        """The same with a script that waits."""

        async def main() -> int:
            task = asyncio.ensure_future(self.loop.run(None, None))
            while not any("READY=1" in text for text in self.sent):
                done, _ = await asyncio.wait({task}, timeout=0.001)
                if done:
                    return task.result()
            await script()
            os.kill(os.getpid(), signal.SIGTERM)
            return await task

        return asyncio.run(asyncio.wait_for(main(), 60))

    def knob(self, knob: Knob) -> dict[str, object]:
        knobs = self.loop.document()["knobs"]
        assert isinstance(knobs, dict)
        found: dict[str, object] = knobs[knob.value]
        return found

    def seen(self, event: Event) -> list[str]:
        return [text for found, text in self.events if found is event]


def test_ready_means_held(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {Knob.RUN: 1, Knob.PAGES_TO_SCAN: 1000})
    assert bench.run(lambda: None) == signal.SIGTERM
    assert bench.host.written == [(Knob.PAGES_TO_SCAN, 1000), (Knob.RUN, 1)]
    assert bench.sent[0] == "READY=1\nSTATUS=merging: nothing merged yet, 2 knobs held, 0 drifted"
    assert bench.sent[-1].startswith("STOPPING=1")


def test_drift_is_put_back_within_two_ticks_and_told(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {Knob.PAGES_TO_SCAN: 1000})
    bench.host.others = (Writer("ksmtuned", 7),)

    def script() -> None:
        bench.host.put(Knob.PAGES_TO_SCAN, 7)
        bench.tick()
        bench.tick()
        found = bench.knob(Knob.PAGES_TO_SCAN)
        assert (found["found"], found["state"], found["drift_total"], found["at_first"]) == (1000, "held", 1, 100)

    bench.run(script)
    assert bench.seen(Event.DRIFT) == [
        "pages_to_scan was changed from 1000 to 7 by somebody else (known to write it and running: ksmtuned): "
        "is being put back"
    ]
    assert bench.seen(Event.HELD) == ["pages_to_scan: is 1000 again, as wanted"]
    assert any("1 drifted" in text for text in bench.sent)


def test_a_tick_that_comes_late_is_counted_as_late(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {})

    def script() -> None:
        now = asyncio.get_running_loop().time()
        for late in (0, 100):
            bench.loop._on_time(now - late)
        daemon = bench.loop.document()["daemon"]
        assert isinstance(daemon, dict)
        assert (daemon["tick_lateness"]["ticks"], daemon["tick_lateness"]["seconds"] >= 100) == (2, True)
        assert daemon["tick_lateness"]["within"]["0.5"] < 2

    bench.run(script)


def test_what_the_service_takes_itself_is_reported(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {})

    def script() -> None:
        daemon = bench.loop.document()["daemon"]
        assert isinstance(daemon, dict)
        assert 0 < daemon["cpu_seconds"] <= time.process_time()
        assert 1 << 20 < daemon["resident_bytes"] < 1 << 36

    bench.run(script)


def test_a_slow_write_keeps_nothing_waiting(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {Knob.RUN: 1}, FakeHost({Knob.RUN: 1}))

    def script() -> None:
        bench.host.slow = {Knob.RUN}
        bench.host.put(Knob.RUN, 0)
        for _ in range(5):
            bench.tick()
        assert bench.knob(Knob.RUN)["found"] == 0
        assert bench.executor.in_flight == {Knob.RUN}
        assert sum("WATCHDOG=1" in text for text in bench.sent) == 5
        bench.host.finish()
        bench.tick()
        assert (bench.knob(Knob.RUN)["state"], bench.executor.in_flight) == ("held", frozenset())

    bench.run(script)


def test_a_tick_that_fails_feeds_no_watchdog_and_ends_the_service(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {Knob.RUN: 1})

    class Broken(Exception):
        pass

    def script() -> None:
        before = list(bench.sent)

        def fail(*, fresh: bool) -> None:
            raise Broken

        bench.host.sample = fail  # type: ignore[method-assign,assignment]
        bench.loop._on_time(0)
        assert bench.sent == before

    with pytest.raises(Broken):
        bench.run(script)


def test_no_permission_ends_the_start(tmp_path: Path) -> None:
    host = FakeHost()
    host.denied = True
    bench = Bench(tmp_path, {Knob.RUN: 1}, host)
    with pytest.raises(Denied, match="EACCES") as caught:
        bench.run(lambda: None)
    assert caught.value.exit_code == ExitCode.DENIED
    assert "root" in caught.value.hint
    assert not any("READY" in text for text in bench.sent)


def test_observing_writes_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {Knob.RUN: 1})
    bench.config = bench.loaded = dataclasses.replace(bench.config, policy=PolicyName.OBSERVE)
    bench.loop = ServiceLoop(
        bench.config,
        bench.host,
        bench.executor,
        Log(bench._logged),
        Notifier({"NOTIFY_SOCKET": "/x"}, bench.sent.append),
        bench._load,
    )
    bench.run(bench.tick)
    assert bench.host.written == []
    # The history is no knob.
    assert {path.name.partition(".")[0] for path in (tmp_path / "state").iterdir()} == {"history-kernel"}
    assert bench.sent[0] == "READY=1\nSTATUS=stopped: nothing merged, observing only"


def test_a_reload_takes_over(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {Knob.PAGES_TO_SCAN: 1000})

    def script() -> None:
        bench.loaded = dataclasses.replace(
            bench.config, knobs={Knob.SMART_SCAN: Want(0)}, on_drift=OnDrift.OBSERVE, socket="/elsewhere"
        )
        assert list(bench.loop.reload()) == []
        bench.tick()
        bench.tick()
        assert (bench.knob(Knob.SMART_SCAN)["state"], bench.knob(Knob.PAGES_TO_SCAN)["state"]) == ("held", "unmanaged")
        daemon = bench.loop.document()["daemon"]
        assert isinstance(daemon, dict)
        assert daemon["restart_needed_for"] == ["socket"]
        assert bench.loop.config.socket == bench.config.socket
        assert bench.loop.document()["on_drift"] == "observe"

    bench.run(script)
    kinds = [text.partition("=")[0] for text in bench.sent]
    assert kinds[:3] == ["READY", "RELOADING", "READY"]


def test_a_reload_during_the_first_writes_does_not_make_the_service_ready(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {Knob.RUN: 1, Knob.PAGES_TO_SCAN: 1000})
    bench.host.slow = {Knob.RUN}

    async def script() -> None:
        task = asyncio.ensure_future(bench.loop.run(None, None))
        while Knob.RUN not in bench.executor.in_flight:
            await asyncio.sleep(0.001)
        bench.loaded = dataclasses.replace(bench.config, knobs={Knob.RUN: Want(1), Knob.PAGES_TO_SCAN: Want(2000)})
        assert list(bench.loop.reload()) == []
        assert bench.sent == []
        bench.host.finish()
        while not bench.sent:
            await asyncio.sleep(0.001)
        assert bench.sent[0].startswith("READY=1\n")
        assert bench.knob(Knob.PAGES_TO_SCAN)["wanted"] == 2000
        os.kill(os.getpid(), signal.SIGTERM)
        assert await task == signal.SIGTERM

    asyncio.run(asyncio.wait_for(script(), 60))


def test_a_configuration_that_was_changed_during_the_start_is_taken(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {Knob.PAGES_TO_SCAN: 1000})
    bench.loaded = dataclasses.replace(bench.config, knobs={Knob.PAGES_TO_SCAN: Want(2000)})

    def script() -> None:
        bench.tick()
        bench.tick()
        assert (bench.knob(Knob.PAGES_TO_SCAN)["found"], bench.knob(Knob.PAGES_TO_SCAN)["state"]) == (2000, "held")

    bench.run(script)
    assert bench.sent[0].startswith("READY=1\n")
    assert not any("RELOADING" in text for text in bench.sent)
    assert bench.seen(Event.RELOADED)


def test_a_configuration_that_became_wrong_during_the_start_is_told(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {Knob.PAGES_TO_SCAN: 1000})
    bench.loaded = ConfigError("reading", [Problem("/etc/x", "knobs.run", "is wrong")])
    bench.run(lambda: None)
    assert bench.seen(Event.RELOAD_FAILED)
    assert "the new configuration is wrong and the old one stays" in bench.sent[0]
    assert bench.host.written == [(Knob.PAGES_TO_SCAN, 1000)]


def test_a_bad_configuration_changes_nothing_and_is_told(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {Knob.RUN: 1})

    def script() -> None:
        bench.loaded = ConfigError("reading", [Problem("/etc/x", "knobs.run", "is wrong")])
        assert [str(problem) for problem in bench.loop.reload()] == ["/etc/x: knobs.run: is wrong"]
        daemon = bench.loop.document()["daemon"]
        assert isinstance(daemon, dict)
        assert (daemon["reload_error"], daemon["reload_failures"]) == ("/etc/x: knobs.run: is wrong", 1)
        assert bench.knob(Knob.RUN)["wanted"] == 1
        assert "the new configuration is wrong and the old one stays" in bench.sent[-1]
        assert bench.sent[-1].startswith("READY=1")
        bench.loaded = bench.config
        assert list(bench.loop.reload()) == []
        daemon = bench.loop.document()["daemon"]
        assert isinstance(daemon, dict)
        assert (daemon["reload_error"], daemon["reload_failures"]) == ("", 1)

    bench.run(script)


def test_a_reload_that_needs_a_knob_that_is_not_there_is_bad(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {Knob.RUN: 1}, FakeHost(lacks=[Knob.SMART_SCAN]))

    def script() -> None:
        bench.loaded = dataclasses.replace(bench.config, knobs={Knob.SMART_SCAN: Want(0, origin="/etc/x")})
        (problem,) = bench.loop.reload()
        assert (problem.path, problem.key) == ("/etc/x", "knobs.smart_scan")
        bench.loaded = dataclasses.replace(bench.config, knobs={Knob.SMART_SCAN: Want(0, optional=True)})
        assert list(bench.loop.reload()) == []

    bench.run(script)


def test_nobody_waits_for_a_look_at_processes(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {Knob.RUN: 1})
    bench.host.slow_writers = True

    async def script() -> None:
        bench.tick()
        # What is known is there at once; whoever wants to know it now is told once it is.
        assert bench.loop.document()["writers"] == []
        asking = bench.loop.tasks.start(bench.loop.status())
        await asyncio.sleep(0)
        bench.tick()
        assert not asking.done()
        bench.host.waiting_writers[0].release((Writer("ksmtuned", 77),))
        report: Any = (await asking)["report"]
        assert [writer["name"] for writer in report["writers"]] == ["ksmtuned"]
        assert (await bench.loop.status())["report"] == report
        assert bench.host.looked_for_writers == 1

    bench.run_async(script)


def test_processes_are_looked_at_for_people_and_not_for_scrapes(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {Knob.RUN: 1})

    def script() -> None:
        for _ in range(5):
            bench.tick()
            assert b"ksm_run" in bench.loop.exposition("")[1]
        assert bench.host.looked_for_writers == 0
        for _ in range(5):
            bench.tick()
            bench.loop.document()
        assert bench.host.looked_for_writers == 1
        bench.host.now += 3600
        bench.loop.document()
        assert bench.host.looked_for_writers == 2

    bench.run(script)


def test_the_page_draws_what_the_report_says_and_asks_for_no_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, {Knob.RUN: 1})

    def script() -> None:
        bench.host.counters |= {"pages_shared": 100, "pages_sharing": 5000, "full_scans": 3}
        with monkeypatch.context() as patch:
            # A report is for those who ask.
            patch.setattr(loop, "document", lambda _: pytest.fail("a report was made"))
            for _ in range(30):
                bench.tick()
        point, report = bench.loop._point(), bench.loop.document()
        derived, knobs = report["derived"], report["knobs"]
        assert isinstance(derived, dict)
        assert isinstance(knobs, dict)
        assert point.saved_bytes == derived["saved_bytes"]
        assert point.saved_bytes
        assert point.pages_scanned_per_second == derived["pages_scanned_per_second"]
        assert point.knobs == {knob: found["found"] for knob, found in knobs.items()}

    bench.run(script)


class Silent:
    """Events of a host where nothing happens."""

    def __init__(self) -> None:
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK)
        self.closed = False

    def fileno(self) -> int:
        return self.descriptor

    def read(self) -> str | None:
        return None

    def close(self) -> None:
        self.closed = True
        os.close(self.descriptor)


def twice(tick: Callable[[], None]) -> Callable[[], None]:
    def script() -> None:
        tick()
        tick()

    return script


@pytest.mark.parametrize("nodes", [1, 2])
def test_events_are_listened_to_where_there_are_several_nodes(tmp_path: Path, nodes: int) -> None:
    bench, opened = Bench(tmp_path, {Knob.RUN: 1}), []

    def events() -> Silent:
        opened.append(Silent())
        return opened[-1]

    bench.loop._events = events
    bench.host.memory = {number: NodeMemory(2**30, 2**29) for number in range(nodes)}
    bench.run(twice(bench.tick))
    assert len(opened) == (nodes > 1)
    assert all(source.closed for source in opened)


def test_events_that_can_not_be_had_are_told_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {Knob.RUN: 1})

    def events() -> Silent:
        raise OSError("no netlink here")

    bench.loop._events = events
    bench.host.memory = {number: NodeMemory(2**30, 2**29) for number in range(2)}
    bench.run(twice(bench.tick))
    (said,) = bench.seen(Event.NO_EVENTS)
    assert "no netlink here" in said


def test_before_the_first_sample_there_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(KsmdError, match="nothing has been sampled"):
        Bench(tmp_path, {}).loop.document()


def test_a_policy_steers_explains_itself_and_gives_back_after_a_reload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, {Knob.USE_ZERO_PAGES: 1})

    def script() -> None:
        fixed = bench.config
        bench.loaded = dataclasses.replace(fixed, policy=PolicyName.ADAPTIVE)
        bench.loop.reload()
        bench.tick()
        bench.tick()
        assert (bench.knob(Knob.RUN)["state"], bench.knob(Knob.RUN)["found"]) == ("held", 1)
        assert bench.knob(Knob.USE_ZERO_PAGES)["state"] == "held"
        decision = bench.loop.document()["decision"]
        assert isinstance(decision, dict)
        assert decision["reasons"][0]["subject"] == "phase"
        assert decision["recent"]
        assert bench.knob(Knob.PAGES_TO_SCAN)["drift_total"] == 0
        # While a transaction is under way the policy decides nothing: what that does says nothing about it.
        with monkeypatch.context() as patch:
            patch.setattr(type(bench.loop.transactions), "active", property(lambda _: True))
            bench.host.counters["full_scans"] = 0
            bench.host.now += 1000
            bench.tick()
            assert bench.loop.document()["decision"]["reasons"] == decision["reasons"]  # type: ignore[index]
        bench.loaded = fixed
        bench.loop.reload()
        bench.tick()
        bench.tick()
        assert bench.host.knobs[Knob.RUN] == 0
        assert bench.host.knobs[Knob.PAGES_TO_SCAN] == 100
        bench.tick()
        assert bench.knob(Knob.RUN)["state"] == "unmanaged"

    bench.run(script)
    told = bench.seen(Event.RESTORED)
    assert all(text.startswith("restored to the value from before the start; no longer managed: ") for text in told)
    assert "run = 0" in " ".join(told)


def test_a_policy_that_is_in_a_hurry_gets_its_samples_sooner(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {Knob.RUN: 1})
    bench.loaded = dataclasses.replace(bench.config, policy=PolicyName.ADAPTIVE, knobs={})

    def script() -> None:
        bench.loop.reload()
        bench.tick()
        now = asyncio.get_running_loop().time()
        bench.loop._on_time(now)
        assert bench.loop._timer is not None
        assert bench.loop._timer.when() - now < 1.0 < bench.config.sample_interval

    bench.run(script)


def foreign(bench: Bench) -> list[dict[str, object]]:
    found = bench.loop.document()["foreign_changes"]
    assert isinstance(found, list)
    return found


def test_what_others_changed_is_in_the_report_of_the_next_service_as_well(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {Knob.RUN: 1})
    bench.host.others = (Writer("ksmtuned", 7), Writer("ksmtuned", 8))

    def script() -> None:
        bench.host.put(Knob.RUN, 2)
        bench.tick()
        bench.host.put(Knob.SLEEP_MILLISECS, 5)
        bench.tick()
        bench.tick()

    bench.run(script)
    assert bench.seen(Event.CHANGED) == [
        "sleep_millisecs was changed from 20 to 5 by somebody else (known to write it and running: ksmtuned); "
        "the service does not hold it"
    ]
    # A policy's own writes are not among them, and neither is putting it right.
    again = Bench(tmp_path, {Knob.RUN: 1, Knob.PAGES_TO_SCAN: 700}, bench.host)

    def look() -> None:
        for _ in range(3):
            again.tick()
        found = [(one["knob"], one["from"], one["to"], one["held"], one["writers"]) for one in foreign(again)]
        assert found == [
            ("sleep_millisecs", 20, 5, False, ["ksmtuned"]),
            ("run", 1, 2, True, ["ksmtuned"]),
        ]
        assert foreign(again)[1]["age_seconds"] > foreign(again)[0]["age_seconds"]  # type: ignore[operator]

    again.run(look)


def test_what_a_transaction_changes_between_two_ticks_is_nobody_elses(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {Knob.RUN: 1})

    def script() -> None:
        bench.host.put(Knob.USE_ZERO_PAGES, 1)
        bench.loop.transactions.ended += 1
        bench.tick()
        assert foreign(bench) == []
        bench.host.put(Knob.USE_ZERO_PAGES, 0)
        bench.tick()
        assert [one["knob"] for one in foreign(bench)] == ["use_zero_pages"]

    bench.run(script)


def test_it_shows_now_and_then_that_it_is_there(tmp_path: Path) -> None:
    calls: list[float] = []
    bench = Bench(tmp_path, {Knob.RUN: 1})
    bench.loop._alive = lambda: calls.append(bench.host.now)

    def script() -> None:
        for _ in range(35):
            bench.tick()

    bench.run(script)
    assert [later - earlier for earlier, later in itertools.pairwise(calls)] == [10.0] * (len(calls) - 1)
    assert len(calls) >= 3


@given(st.lists(st.one_of(st.sampled_from(BOUNDS_SECONDS), st.floats(0, 10))))
def test_how_many_came_within_each_bound(late: list[float]) -> None:
    lateness = Lateness()
    for seconds in late:
        lateness.add(seconds)
    assert lateness.document() == {
        "ticks": len(late),
        "seconds": pytest.approx(sum(late)),
        "within": {str(bound): sum(seconds <= bound for seconds in late) for bound in BOUNDS_SECONDS},
    }


def test_the_page_is_made_once_a_tick_and_has_what_was_logged(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {Knob.RUN: 1, Knob.PAGES_TO_SCAN: 1000})

    def script() -> None:
        first = bench.loop.page()
        assert bench.loop.page() is first
        bench.host.knobs[Knob.PAGES_TO_SCAN] = 7
        bench.tick()
        assert b"pages_to_scan was changed from 1000 to 7" not in first
        assert b"pages_to_scan was changed from 1000 to 7" in bench.loop.page()

    bench.run(script)


def test_ksmd_is_held_on_the_housekeeping_cpus(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {Knob.KSMD_CPUS: "housekeeping"})
    bench.host.housekeeping_outcome = "0"

    async def look() -> None:
        bench.host.now += 60
        bench.tick()
        await asyncio.sleep(0.01)
        bench.tick()
        bench.tick()

    async def script() -> None:
        await look()
        assert bench.host.knobs[Knob.KSMD_CPUS] == "0"
        # Another machine pins another CPU: that is no drift.
        bench.host.housekeeping_outcome = "1"
        await look()
        found = bench.knob(Knob.KSMD_CPUS)
        assert (found["found"], found["wanted"], found["state"], found["drift_total"]) == ("1", "1", "held", 0)
        bench.host.housekeeping_outcome = HostError("looking", "no CPU is left")
        await look()
        found = bench.knob(Knob.KSMD_CPUS)
        assert (found["found"], found["wanted"], found["state"]) == ("1", "housekeeping", "failed")
        assert found["reason"] == "no CPU is left"
        bench.host.housekeeping_outcome = "0-1"
        await look()
        found = bench.knob(Knob.KSMD_CPUS)
        assert (found["found"], found["state"], found["at_start"]) == ("0-1", "held", "0-1")

    bench.run_async(script)
    assert bench.seen(Event.FAILED) == ["ksmd_cpus: no CPU is left"]


def test_a_kernel_that_lets_nobody_schedule_ksmd_does_not_end_the_service(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {Knob.RUN: 1, Knob.KSMD_NICE: 7})
    bench.host.refused = {Knob.KSMD_NICE}

    def script() -> None:
        assert bench.knob(Knob.RUN)["state"] == "held"
        assert bench.knob(Knob.KSMD_NICE)["state"] == "failed"

    assert bench.run(script) == signal.SIGTERM
