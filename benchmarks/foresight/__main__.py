# SPDX-License-Identifier: GPL-2.0-or-later
"""What `ksmd-ctl estimate` says with KSM off, and what ksmd then reaches: `make bench-foresight`.

Tenants with real page contents (the traces of `make bench-policy`), or emulated guests, are estimated, then merged by
full scans of every page until these add nothing. The ruler is frames in page tables. Each case is another choice of
tenants, with huge pages as QEMU asks for them, with huge pages everywhere, and without. Three marks: the error is at
most 5 % of what is saved at the 95th percentile, 95 % of the intervals hold it, and a pass costs at most 1.2 times the
CPU time of reading and hashing alone. It uses this host's KSM alone, and leaves it as it was.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from benchmarks.policy import guests, thp, traces
from benchmarks.policy.held import Holder
from benchmarks.policy.host import Alone, Ksm, Unfit, ksm_alone
from benchmarks.policy.pages import PAGE
from benchmarks.policy.results import machine
from benchmarks.policy.stage import Library, Tenant
from benchmarks.policy.thp import Memory
from ksmd_ctl.host.estimate import Estimate, Outcome, Rules, Stage
from ksmd_ctl.kernel.contents import Contents
from ksmd_ctl.kernel.estimate import Look
from ksmd_ctl.kernel.estimate_targets import Target, find_targets
from ksmd_ctl.kernel.pace import Pace
from ksmd_ctl.kernel.pagemap import Pagemap, frames_of, pieces, zero_frame
from ksmd_ctl.kernel.proc_pid import LeftOut
from ksmd_ctl.reports.estimate import KsmdCost, ksmd_cost
from tests.guest import image

_MOST_ERROR, _LEAST_HELD, _MOST_COST, _FIRST_SECONDS = 0.05, 0.95, 1.2, 10.0
#: Of a CPU, for the look whose first figures are judged: so little that a sample is needed.
_LITTLE_CPU: Final = 0.05
_INTERVAL_SECONDS: Final = 2.0
_MERGE_SECONDS: Final = 120.0
_GUEST_SECONDS: Final = 180.0
# Two scans that add nothing: ksmd compares what it saw for the first time in the scan after.
_SCANS_WITHOUT_MORE: Final = 3
# What is merged in more scans than that is what changes.
_NEARLY_ALL: Final = 0.99
_POLL_SECONDS: Final = 0.005
_SLEEP_MILLISECS: Final = 3_600_000


@dataclass(frozen=True)
class Figure:
    """One estimate beside what was reached; pages."""

    stage: str
    seconds: float
    found: float
    low: float
    high: float


@dataclass(frozen=True)
class Case:
    """One choice of tenants.

    :ivar pages: pages that they hold
    :ivar reached: frames that ksmd freed
    :ivar figures: what a look with a whole CPU said
    :ivar early: what a look with little of a CPU said
    :ivar cost: CPU seconds of a look, once, of one with both looks, and of reading and hashing alone
    :ivar share: of a CPU, that the look with little of one took
    :ivar predicted: CPU seconds of ksmd until all is merged, and of a full scan later; `taken`: what these were
    """

    name: str
    memory: str
    use_zero_pages: bool
    pages: int
    reached: int
    figures: tuple[Figure, ...]
    early: tuple[Figure, ...]
    cost: tuple[float, float, float]
    share: float
    predicted: tuple[float, float]
    taken: tuple[float, float]

    @property
    def error(self) -> float:
        return abs(self.figures[-1].found - self.reached) / max(1, self.reached)

    def held(self, figure: Figure) -> bool:
        return figure.low - 1 <= self.reached <= figure.high + 1


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="make bench-foresight", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=int, default=20, metavar="N", help="how many choices (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of these choices (default: %(default)s)")
    parser.add_argument("--traces", type=int, metavar="N", help="only the first N traces of each kind")
    parser.add_argument("--copies", type=int, default=1, metavar="N", help="of each trace (default: %(default)s)")
    parser.add_argument("--guests", action="store_true", help="one case with emulated guests instead of tenants")
    parser.add_argument("--output", type=Path, default=Path("build/bench-foresight"), help="folder for the figures")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    cases: list[Case] = []
    try:
        for case in _guests() if options.guests else _tenants(options):
            cases.append(case)
            print(_line(case), flush=True)
    except Unfit as error:
        print(f"bench-foresight: {error}", file=sys.stderr)
        return 6
    except KeyboardInterrupt:
        print("bench-foresight: interrupted; everything is restored", file=sys.stderr)
    if cases:
        document = {"date": str(datetime.date.today()), "machine": machine(), "cases": [asdict(one) for one in cases]}
        name = "guests" if options.guests else f"seed-{options.seed}"
        (options.output / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
        print("\n".join(_marks(cases)))
    return 0


# -- cases ---------------------------------------------------------------------------------------------------------


def _tenants(options: argparse.Namespace) -> Iterator[Case]:
    recipes = [
        recipe
        for kind in ("guest", "program")
        for recipe in [one for one in traces.RECIPES if one.kind == kind][: options.traces]
    ]
    library, chance = Library(traces.fetch(recipes)), random.Random(options.seed)
    names = [f"{recipe.name}-{recipe.number}" for recipe in recipes]
    for number in range(options.cases):
        memory = list(Memory)[number % len(Memory)]
        chosen = chance.sample(range(len(names)), min(len(names), chance.randint(3, 6))) * options.copies
        with ksm_alone(memory) as host:
            tenants = [Tenant(library.pool, host) for _ in chosen]
            try:
                for tenant, trace in zip(tenants, chosen, strict=True):
                    tenant.tell(b"F", array("I", library.traces[trace]))
                pids = [tenant.process.pid for tenant in tenants]
                yield _case(", ".join(names[one] for one in chosen), host, pids, zero=number % 2 == 1)
            finally:
                for tenant in tenants:
                    tenant.leave()


def _guests() -> Iterator[Case]:
    system = image.fetch()
    with ksm_alone(Memory.QEMU) as host, tempfile.TemporaryDirectory(prefix="bench-foresight-") as scratch:
        running = [guests.Guest(system, host.tenants, Path(scratch) / f"console-{number}") for number in range(3)]
        try:
            until = time.monotonic() + _GUEST_SECONDS * len(running)
            while not all(guest.up() for guest in running):
                if time.monotonic() > until:
                    raise Unfit("a guest did not come up\nhint: this machine is too busy; wait until it is quiet")
                time.sleep(1)
            yield _case("three guests", host, [guest.process.pid for guest in running], zero=False)
        finally:
            for guest in running:
                guest.process.kill()
                guest.process.wait()


def _case(name: str, host: Alone, pids: Sequence[int], *, zero: bool) -> Case:
    host.ksm.write("use_zero_pages", int(zero))
    # Before and after: on a machine that others use too, one alone may be from another hour.
    alone = _read_and_hash(_targets(pids)) / 2
    look = _look(pids, zero, 1.0)
    alone += _read_and_hash(_targets(pids)) / 2
    early = _look(pids, zero, _LITTLE_CPU)
    before = _frames(pids)
    taken = _merge(host.ksm)
    return Case(
        name=name,
        memory=host.memory,
        use_zero_pages=zero,
        pages=sum(target.pages for target in _targets(pids)),
        reached=before - _frames(pids),
        figures=look.figures,
        early=early.figures,
        cost=(look.once, look.cpu_seconds, alone),
        share=early.cpu_seconds / early.seconds,
        predicted=(look.ksmd.first_cpu_seconds, look.ksmd.scan_cpu_seconds),
        taken=taken,
    )


def _targets(pids: Sequence[int]) -> list[Target]:
    return find_targets(lambda process: process.id.pid in pids, LeftOut(), more=False)


@dataclass(frozen=True)
class _Looked:
    """What a look said, and what it took: CPU seconds until everything was read once, and at its end."""

    figures: tuple[Figure, ...]
    ksmd: KsmdCost
    once: float
    cpu_seconds: float
    seconds: float


def _look(pids: Sequence[int], zero: bool, share: float) -> _Looked:
    targets, once = _targets(pids), 0.0
    rules, pace = Rules(256, use_zero_pages=zero), Pace(share)
    look = Look(targets, rules, pace, interval_seconds=_INTERVAL_SECONDS, left_out=LeftOut())
    found = []
    for one in look.estimates():
        freed = _outcome(one, rules).freed
        found.append(Figure(one.stage, pace.seconds, *freed))
        if one.stage is Stage.READ:
            once = pace.cpu_seconds
    cost = ksmd_cost(_outcome(one, rules), (), look.page_cpu_seconds)
    return _Looked(tuple(found), cost, once, pace.cpu_seconds, pace.seconds)


def _outcome(one: Estimate, rules: Rules) -> Outcome:
    return next(
        found for found in one.outcomes if found.merge_across_nodes and found.use_zero_pages == rules.use_zero_pages
    )


def _read_and_hash(targets: Sequence[Target]) -> float:
    """CPU seconds for the contents of all pages, in runs as they are present, in the quickest way there is."""
    began = time.process_time()
    for target in targets:
        with Contents(target.process.id.pid, Path("/")) as contents:
            for item, _ in target.ranges:
                for start, count in pieces([(item.start, item.end)], 512):
                    contents.block(start, count)
    return time.process_time() - began


def _frames(pids: Sequence[int]) -> int:
    """Frames that these have in mergeable memory."""
    found: set[int] = set()
    for pid in pids:
        with Pagemap(pid, killable=False) as pagemap:
            for item in Holder(pid).mergeable():
                for start, count in pieces([(item.start, item.end)], 1 << 15):
                    found.update(frames_of(pagemap.read_frames(start, count)))
    return len(found - {0, zero_frame()})


def _merge(ksm: Ksm) -> tuple[float, float]:
    """Full scans of every page until these add nothing.

    khugepaged sleeps meanwhile: at any moment it may have made a huge page of merged ones again (`ksmd-ctl doctor`:
    khugepaged), which the next scans split.

    With use_zero_pages = 0 a scan splits a single one of the huge pages with zeroes in which nothing else merges, and
    with 1 all (tests/kernel/test_zero_pages.py). So the last scans are with 1: what is merged already stays so.

    :return: ksmd's CPU seconds until all was merged, and for each full scan later
    """
    for name, value in (("smart_scan", 0), ("pages_to_scan", 100_000), ("sleep_millisecs", 1)):
        ksm.write(name, value)
    thp.restore({"khugepaged/scan_sleep_millisecs": f"{_SLEEP_MILLISECS}"})
    began, zero = ksm.cpu_seconds(), ksm.read("use_zero_pages")
    ksm.write("run", 1)
    ends = _scan(ksm)
    if not zero:
        ksm.write("use_zero_pages", 1)
        _scan(ksm)
    ksm.write("run", 0)
    ksm.write("use_zero_pages", zero)
    merged, _, used = next(end for end in ends if end[1] >= _NEARLY_ALL * max(saved for _, saved, _ in ends))
    scans, _, all_used = ends[-1]
    return used - began, (all_used - used) / max(1, scans - merged)


def _scan(ksm: Ksm) -> list[tuple[int, int, float]]:
    """Scan until scans add nothing: after each how many there were, what is saved, and ksmd's CPU seconds."""
    until, best, since = time.monotonic() + _MERGE_SECONDS, -1, ksm.read("full_scans")
    ends: list[tuple[int, int, float]] = []
    while time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
        scans = ksm.read("full_scans")
        saved = ksm.read("pages_sharing") + ksm.read("ksm_zero_pages")
        if not ends or scans > ends[-1][0]:
            ends.append((scans, saved, ksm.cpu_seconds()))
        if saved > best:
            best, since = saved, scans
        elif scans > since + _SCANS_WITHOUT_MORE:
            break
    return ends


# -- telling -------------------------------------------------------------------------------------------------------


def _line(case: Case) -> str:
    once, twice, alone = case.cost
    first, last = case.early[0], case.figures[-1]
    return (
        f"{case.memory:6} zero={int(case.use_zero_pages)} {case.pages * PAGE / 2**20:6.0f} MiB: "
        f"estimated {last.found:8,.0f} ({last.low:,.0f} to {last.high:,.0f}), reached {case.reached:8,}: "
        f"{case.error:6.2%} off; {once / alone:.2f} and {twice / alone:.2f} of reading and hashing; "
        f"first after {first.seconds:.1f} s: {first.low:,.0f} to {first.high:,.0f}; "
        f"{sum(map(case.held, case.early))} of {len(case.early)} held; {case.share:.1%} of a CPU; "
        f"ksmd predicted {case.predicted[0]:.2f} s and {case.predicted[1]:.2f} a scan, "
        f"took {case.taken[0]:.2f} and {case.taken[1]:.2f}"
    )


def _marks(cases: Sequence[Case]) -> Iterator[str]:
    errors = sorted(case.error for case in cases)
    worst = errors[max(0, -(-95 * len(errors) // 100) - 1)]
    held = statistics.fmean(case.held(case.figures[-1]) for case in cases)
    every = [case.held(figure) for case in cases for figure in case.early]
    cost = statistics.median(case.cost[0] / case.cost[2] for case in cases)
    twice = statistics.median(case.cost[1] / case.cost[2] for case in cases)
    first = max(case.early[0].seconds for case in cases)
    share = max(case.share for case in cases)
    yield f"error at the 95th percentile {worst:.2%} (mark {_MOST_ERROR:.0%}), median {statistics.median(errors):.2%}"
    yield f"intervals that hold what was reached: final {held:.0%}, all {statistics.fmean(every):.0%} (mark 95 %)"
    yield f"a pass: {cost:.2f} of reading and hashing alone (mark {_MOST_COST}), with a second look {twice:.2f}"
    yield f"first figure after {first:.1f} s at most (mark {_FIRST_SECONDS:g})"
    yield f"{share:.2%} of a CPU at most, of {_LITTLE_CPU:.0%} that were given"
    for at, what in enumerate(("until all is merged", "a full scan later")):
        ratios = [case.predicted[at] / max(1e-9, case.taken[at]) for case in cases]
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        yield f"ksmd's CPU {what}, predicted of taken: median {middle:.2f}, {low:.2f} to {high:.2f}"


if __name__ == "__main__":
    if os.geteuid() != 0:
        sys.exit("bench-foresight: it takes root\nhint: run it as root, on a host where nothing else uses KSM")
    sys.exit(main(sys.argv[1:]))
