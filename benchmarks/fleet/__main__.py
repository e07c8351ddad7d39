# SPDX-License-Identifier: GPL-2.0-or-later
"""A rehearsal of a fleet, without a cluster: `make rehearsal`.

Services on simulated hosts, each a process with an address of its own on the loopback network, and one real Prometheus
that scrapes them with the packaged rules, of which only the times that alerts wait are shortened. Some hosts are sick
on purpose. It checks that all targets are up, that each recorded figure is the sum of what the instances report, that
alerts fire for the sick and for no others, and that every query of the dashboards has a result.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from subprocess import DEVNULL, Popen, TimeoutExpired

from benchmarks.fleet import queries, sums
from benchmarks.fleet.hosts import ALERTS, GO, Ails, Pace, Spec, specs
from benchmarks.fleet.prometheus import Prometheus
from benchmarks.steady import ROOT, cpu_seconds, free_port, memory_mib
from ksmd_ctl.cli.client import Conversation
from ksmd_ctl.errors import KsmdError

_START_SECONDS = 60.0
_ASK_SECONDS = 20.0
_AT_ONCE = 4
#: With 200 units and 20 trust domains that are configured.
_MOST_SAMPLES = 600
#: When guests stop writing, so that what is recorded and what is reported can be the same, and when the services of
#: some hosts are stopped; as shares of the time.
_QUIET = 0.4
_STOP = 0.2


@dataclass(slots=True)
class Outcome:
    """What the rehearsal found.

    :ivar failed: what is not as it should be, for people
    :ivar figures: what was measured, in the order of the lines that show it
    """

    failed: list[str] = field(default_factory=list)
    figures: dict[str, object] = field(default_factory=dict)
    tables: dict[str, list[object]] = field(default_factory=dict)


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    # So that nothing is left running.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="ksmd-ctl-fleet-") as scratch:
        outcome = rehearse(options.hosts, options.seconds, options.interval, Path(scratch))
    for name, value in outcome.figures.items():
        print(f"{name:32} {value}")
    if options.json:
        Path(options.json).write_text(json.dumps({"figures": outcome.figures, "tables": outcome.tables}, indent=1))
    for text in outcome.failed:
        print(f"rehearsal: {text}", file=sys.stderr)
    return 1 if outcome.failed else 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make rehearsal", description=__doc__)
    parser.add_argument("--hosts", type=int, default=200, help="how many (default: 200)")
    parser.add_argument("--seconds", type=int, default=600, help="for how long, after the start (default: 600)")
    parser.add_argument("--interval", type=int, default=15, help="seconds between scrapes (default: 15)")
    parser.add_argument("--json", metavar="FILE", help="write figures and results of queries there")
    return parser.parse_args(arguments)


def rehearse(count: int, seconds: int, interval: int, folder: Path) -> Outcome:
    """All of it; nothing is left running."""
    quick = seconds < 300
    # A short one has less time to merge.
    pace = Pace(2000 if quick else 200, 1000, seconds * _QUIET)
    hosts, outcome = specs(count, free_port(), folder, pace), Outcome()
    began = time.monotonic()
    with instances(hosts, folder) as running:
        outcome.figures["hosts"] = count
        outcome.figures["start of all, seconds"] = round(time.monotonic() - began, 1)
        with Prometheus(hosts, folder, interval, seconds // 3 if quick else seconds // 2) as prometheus:
            _pass(hosts, running, prometheus, folder, seconds, outcome)
    return outcome


@contextmanager
def instances(hosts: Sequence[Spec], folder: Path) -> Iterator[dict[int, Popen[bytes]]]:
    """A service on each host, all of which answer."""
    running: dict[int, Popen[bytes]] = {}
    try:
        for first in range(0, len(hosts), _AT_ONCE):
            some = hosts[first : first + _AT_ONCE]
            for one in some:
                with (folder / f"{one.number}.log").open("wb") as log:
                    running[one.number] = Popen(
                        [sys.executable, "-m", "benchmarks.fleet.instance", f"{folder}/{one.number}.json"],
                        cwd=ROOT, stdin=DEVNULL, stdout=log, stderr=log,
                    )  # fmt: skip
            for one in some:
                _until_it_answers(one, running[one.number], folder)
        yield running
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            try:
                process.wait(timeout=_START_SECONDS)
            except TimeoutExpired:
                process.kill()
                process.wait()


def _until_it_answers(one: Spec, process: Popen[bytes], folder: Path) -> None:
    limit = time.monotonic() + _START_SECONDS
    while time.monotonic() < limit and process.poll() is None:
        try:
            report(one)
            return
        except KsmdError:
            time.sleep(0.05)
    raise RuntimeError(f"host {one.number} did not start: {(folder / f'{one.number}.log').read_text()}")


def report(one: Spec) -> Mapping[str, object]:
    """What `ksmd-ctl status --json` shows of it.

    :raises KsmdError: it doesn't answer
    """
    with Conversation(one.socket, "Status", more=False, timeout_seconds=_ASK_SECONDS) as conversation:
        answer = conversation.answer()
    found = (answer or {})["report"]
    assert isinstance(found, dict)
    return found


def _pass(hosts: Sequence[Spec], running: Mapping[int, Popen[bytes]], prometheus: Prometheus, folder: Path,
          seconds: int, outcome: Outcome) -> None:  # fmt: skip
    began = time.monotonic()

    def until(passed: float) -> None:
        time.sleep(max(0.0, began + passed - time.monotonic()))

    def reports() -> dict[int, sums.Report]:
        return {one.number: report(one) for one in hosts if running[one.number].poll() is None}

    # Each target is scraped before anything happens that is counted: increase() begins with the first sample.
    while len(prometheus.query('up{job="ksmd-ctl"} == 1')) < len(hosts) and time.monotonic() < began + _START_SECONDS:
        time.sleep(0.2)
    began = time.monotonic()
    (folder / GO).touch()
    before = reports()
    until(seconds * _STOP)
    up = prometheus.query('up{job="ksmd-ctl"} == 1')
    outcome.figures["targets up"] = len(up)
    if len(up) != len(hosts):
        outcome.failed.append(f"{len(up)} of {len(hosts)} targets are up")
    ended: dict[int, sums.Report] = {}
    for one in hosts:
        if one.ails is Ails.STOPPED:
            ended[one.number] = report(one)
            running[one.number].terminate()
            running[one.number].wait(timeout=_START_SECONDS)
    cost = {number: cpu_seconds(process.pid) for number, process in running.items() if process.poll() is None}
    cost_prometheus, cost_at = cpu_seconds(prometheus.process.pid), time.monotonic()
    if seconds > sums.RATE_SECONDS:
        until(seconds - sums.RATE_SECONDS)
        before, ended = reports(), {}
    until(seconds)
    passed = time.monotonic() - cost_at
    used = [(cpu_seconds(running[number].pid) - start) / passed for number, start in cost.items()]
    _measure(used, running, outcome)
    share = (cpu_seconds(prometheus.process.pid) - cost_prometheus) / passed
    series = prometheus.query('count({__name__=~".+"})')[0][1]
    outcome.figures["Prometheus"] = (
        f"{share:.1%} of a CPU, {memory_mib(prometheus.process.pid, 'Rss'):.0f} MiB, {series:.0f} series"
    )
    _check_sums(hosts, sums.Reports(reports(), before, ended), prometheus, outcome)
    _check_alerts(hosts, prometheus, outcome)
    _scrapes(prometheus, seconds, outcome)
    exported = set(prometheus.get("/api/v1/label/__name__/values"))
    asked = queries.ask_all(prometheus)
    outcome.figures["queries of the dashboards"] = f"{len(asked)}, {sum(1 for one in asked if not one.came)} empty"
    outcome.failed += [f"empty: {text}" for text in queries.wrongly_empty(asked, exported)]
    outcome.tables["queries"] = [[one.dashboard, one.panel, one.query, one.came[:8], len(one.came)] for one in asked]


def _measure(used: Sequence[float], running: Mapping[int, Popen[bytes]], outcome: Outcome) -> None:
    alive = [process for process in running.values() if process.poll() is None]
    for name in ("Rss", "Pss"):
        sizes = [memory_mib(process.pid, name) for process in alive]
        outcome.figures[f"memory of one, {name}, MiB"] = (
            f"median {median(sizes):.1f}, most {max(sizes):.1f}, sum {sum(sizes):.0f}"
        )
    outcome.figures["CPU of one"] = f"median {median(used):.2%}, most {max(used):.2%}, sum {sum(used):.1%}"


def _check_sums(hosts: Sequence[Spec], reports: sums.Reports, prometheus: Prometheus, outcome: Outcome) -> None:
    right = 0
    for level in sums.LEVELS:
        for figure in sums.FIGURES:
            came = prometheus.query(f"{level}:{figure.name}")
            wrong = sums.differences(came, sums.wanted(level, figure.name, hosts, reports), figure)
            right += not wrong
            outcome.failed += [f"{level}:{figure.name}{text}" for text in wrong]
            outcome.tables[f"{level}:{figure.name}"] = list(came)
    outcome.figures["recording rules with the right sum"] = f"{right} of {len(sums.LEVELS) * len(sums.FIGURES)}"


def _check_alerts(hosts: Sequence[Spec], prometheus: Prometheus, outcome: Outcome) -> None:
    fired: dict[str, set[str]] = {one.address: set() for one in hosts}
    for labels, _ in prometheus.query('ALERTS{alertstate="firing"}'):
        fired[labels["instance"]].add(labels["alertname"])
    for one in hosts:
        if fired[one.address] != ALERTS[one.ails]:
            outcome.failed.append(
                f"host {one.number} ({one.ails}): {sorted(fired[one.address])} fire, not {sorted(ALERTS[one.ails])}"
            )
    sick = [one for one in hosts if one.ails is not Ails.NOTHING]
    outcome.figures["hosts with alerts"] = f"{sum(map(bool, fired.values()))}, sick are {len(sick)}"


def _scrapes(prometheus: Prometheus, seconds: int, outcome: Outcome) -> None:
    took = sorted(
        value for series in prometheus.raw(f'scrape_duration_seconds{{job="ksmd-ctl"}}[{seconds}s]') for value in series
    )
    p99 = took[min(len(took) - 1, int(0.99 * len(took)))]
    outcome.figures["scrapes"] = len(took)
    outcome.figures["scrape duration, ms"] = (
        f"median {1000 * median(took):.1f}, p99 {1000 * p99:.1f}, most {1000 * took[-1]:.1f}"
    )
    samples = [value for _, value in prometheus.query('scrape_samples_scraped{job="ksmd-ctl"} > 0')]
    outcome.figures["samples of one scrape"] = f"{min(samples):.0f} to {max(samples):.0f}"
    if max(samples) > _MOST_SAMPLES:
        outcome.failed.append(f"an instance exports {max(samples):.0f} samples, more than {_MOST_SAMPLES}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
