# SPDX-License-Identifier: GPL-2.0-or-later
"""Who has changed a knob, told by the history of a service without privilege, on a kernel with memory merged."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.guest_tests.unprivileged import unprivileged_service
from tests.service.running import LIMIT_SECONDS, Service, equal_pages, run_command, until

PAGES = int(os.environ.get("KSMD_CTL_PAGES", "3000"))
HELD = {"run": "1", "pages_to_scan": "1000", "sleep_millisecs": "20"}
HOLDING = "policy = 'fixed'\n[knobs]\n" + "".join(f"{name} = {value}\n" for name, value in HELD.items())
# It writes as KubeVirt's virt-handler does: `run` as its pod starts and ends, and each three minutes what it has come
# to. A round is a line of its input.
VIRT_HANDLER = """#!/bin/sh
cd /sys/kernel/mm/ksm
while read run pages sleep; do
    [ "$sleep" ] && echo $sleep > sleep_millisecs
    [ "$pages" ] && echo $pages > pages_to_scan
    echo $run > run
    echo done
done
"""
ROUNDS = ("0", "1 100 28", "1 400 28", "1 700 28", "0 650", "1 1250 28", "0")


class Watched:
    """A service that has merged memory to un-merge, and what its history says of others."""

    def __init__(self, ksm: Path, service: Service) -> None:
        self.ksm = ksm
        self.service = service

    def drifts(self) -> int:
        knobs = self.service.status()["knobs"]
        return sum(knobs[name]["drift_total"] for name in HELD)

    def put_back(self, drifts: int) -> None:
        """Wait until so many changes were noticed, and undone."""
        until("the drift to be noticed", lambda: self.drifts() >= drifts or None)
        until(
            "it to be put back", lambda: {name: (self.ksm / name).read_text().strip() for name in HELD} == HELD or None
        )

    def told(self, number: int) -> list[dict[str, Any]]:
        """So many changes by others, from the history."""
        socket = str(self.service.folder / "socket")

        def found() -> list[dict[str, Any]] | None:
            done = run_command("history", "--kind", "foreign", "--json", "--socket", socket)
            done.check_returncode()
            events: list[dict[str, Any]] = json.loads(done.stdout)["events"]
            return events if len(events) >= number else None

        return until(f"{number} changes in the history", found)


@pytest.fixture
def watched(ksm_host: Path) -> Iterator[Watched]:
    with unprivileged_service(HOLDING) as service, equal_pages(PAGES):
        until("merged pages", lambda: int((ksm_host / "pages_sharing").read_text()) >= PAGES * 0.9 or None)
        shown = Path(f"/proc/{service.process.pid}/fd")
        until("who writes to be watched", lambda: any("fanotify" in os.readlink(at) for at in shown.iterdir()) or None)
        yield Watched(ksm_host, service)


@contextmanager
def started(*words: str | Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def named(events: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """What was changed, and by whom, without unit and login."""
    return [(str(one["fields"]["knob"]), str(one["who"]).split(",")[0].rstrip(")")) for one in events]


def test_an_unmerge_and_a_stop_soon_after_it_have_their_names(watched: Watched) -> None:
    """The kernel tells who wrote 2 when all is un-merged; the service writes 1 then, and soon somebody writes 0."""
    wanted = []
    me = f"{Path('/proc/self/comm').read_text().strip()} (pid {os.getpid()}"
    for times in range(3):
        with started("sh", "-c", f"echo 2 > {watched.ksm}/run; echo done; read wait") as foreign:
            until("the un-merging to be noticed", lambda: watched.drifts() > 2 * times or None)  # noqa: B023
            limit = time.monotonic() + LIMIT_SECONDS
            while (watched.ksm / "run").read_text() != "1\n":
                assert time.monotonic() < limit, "the service did not put run back"
                time.sleep(0.0001)
            # Its write may be told of after the next one's, until it has returned.
            assert foreign.stdout is not None
            assert foreign.stdout.readline() == "done\n"
            (watched.ksm / "run").write_text("0")
            wanted += [("run", f"sh (pid {foreign.pid}"), ("run", me)]
            watched.put_back(2 * times + 2)
    events = watched.told(len(wanted))
    assert named(events) == wanted
    assert all(f" by {event['who']}: " in event["text"] for event in events)
    assert ["from 1 to 2" in event["text"] for event in events] == [True, False] * 3


def test_each_write_of_virt_handler_is_named(watched: Watched, tmp_path: Path) -> None:
    script = tmp_path / "virt-handler"
    script.write_text(VIRT_HANDLER)
    script.chmod(0o755)
    wanted = []
    with started(script) as handler:
        assert handler.stdin is not None
        assert handler.stdout is not None
        for line in ROUNDS:
            handler.stdin.write(f"{line}\n")
            handler.stdin.flush()
            assert handler.stdout.readline() == "done\n"
            values = dict(zip(("run", "pages_to_scan", "sleep_millisecs"), line.split(), strict=False))
            wanted += [name for name, value in values.items() if value != HELD[name]]
            watched.put_back(len(wanted))
        who = f"virt-handler (pid {handler.pid}"
    events = watched.told(len(wanted))
    assert sorted(named(events)) == sorted((name, who) for name in wanted)


def test_whoever_ends_at_once_has_a_pid_at_least(watched: Watched) -> None:
    """Mostly also a name: it is read when the file is opened."""
    names = []
    for times in range(4):
        with started("sh", "-c", f"echo {times + 1} > {watched.ksm}/pages_to_scan") as foreign:
            foreign.wait()
        watched.put_back(times + 1)
        event = watched.told(times + 1)[-1]
        assert f"pid {foreign.pid}" in event["who"], event
        names.append(event["who"])
    print(sum(name.startswith("sh ") for name in names), "of", len(names), "were named")
