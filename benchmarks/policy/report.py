# SPDX-License-Identifier: GPL-2.0-or-later
"""The figures of runs as tables for people, and as JSON. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from benchmarks.policy.figures import CPU, END, Run, Sample, Verdict, area, end_share, mean_time
from benchmarks.policy.oracle import FEW

__all__ = ["LEGEND", "document", "marks", "table"]

#: What a reader of the table has to know.
LEGEND = (
    "lost: area between the oracle's line and what is saved, as a share of the area below the oracle's line",
    "time to 95 %: from an arrival's last page to the first sample in which 95 % is saved of what the oracle says then;"
    " never: not before something else begins to happen. In a mean never counts as the whole time that there was",
    "others: CPU seconds of all else on the host, tenants among it; where it was busy, ksmd had to wait",
    "huge pages: of those that the tenants had before KSM split any, how many are left at the end; few: of those with"
    f" fewer than {FEW} mergeable pages",
    "quickest: the least mean time to 95 %; CPU: ksmd and the service or script, with all that it starts",
    "ksmtuned: two minutes stand for an hour, so its script runs, and costs, thirty times as often as in earnest",
    "advisor: on a host where ksmd has worked before, its first scan makes it slow down to a crawl (F12)",
)


def table(runs: Sequence[Run]) -> list[str]:
    """One line a policy."""
    lines = [
        f"{'policy':13} {'lost':>6} {'at the end':>10} {'mean to 95 %':>12} {'ksmd':>7} {'service':>8} {'CPU':>7}"
        f" {'scans':>6} {'others':>7} {'huge pages':>12} {'few':>9}  time to 95 % after each arrival"
    ]
    for run in runs:
        lost, could = area(run.samples, run.steps)
        last = run.samples[-1]
        times = " ".join("never" if time is None else f"{time:.1f}" for time in run.times())
        huge = run.huge_pages
        lines.append(
            f"{run.policy:13} {lost / could:6.1%}"
            f" {end_share(run.samples, run.steps):10.1%} {mean_time(run):10.1f} s {last.ksmd:5.1f} s"
            f" {last.service:6.2f} s {run.cpu:5.1f} s {last.full_scans:6} {run.others:5.0f} s"
            f" {_kept(huge.end, huge.before):>12} {_kept(huge.few_end, huge.few_before):>9}  {times}"
        )
    return lines


def _kept(end: int, before: int) -> str:
    return f"{end} of {before}"


def marks(name: str, verdicts: Sequence[Verdict]) -> list[str]:
    """What is reached, over all seeds, with the spread."""
    held = {mark: all(verdict.held[mark] for verdict in verdicts) for mark in verdicts[0].held}
    arrivals = sum(verdict.arrivals for verdict in verdicts)
    in_time = sum(verdict.in_time for verdict in verdicts)
    worst = max(verdict.late for verdict in verdicts)
    late = f"; at worst {worst:.1f} s later" if worst else ""
    peers = ", ".join(sorted({verdict.peer for verdict in verdicts}))
    return [
        f"{name}: 95 % after each arrival no later than any other: {in_time} of {arrivals} arrivals{late}"
        f" ({_said(held['time'])})",
        f"{name}: CPU seconds as a share of the quickest other's ({peers}): {_spread([v.cpu for v in verdicts])}"
        f" (mark {CPU:.0%}: {_said(held['cpu'])}); ksmd alone: {_spread([v.ksmd for v in verdicts])}",
        f"{name}: saved at the end, of what could be: {_spread([v.end for v in verdicts])}"
        f" (mark {END:.0%}: {_said(held['end'])})",
    ]


def _said(held: bool) -> str:
    return "reached" if held else "not reached"


def _spread(shares: Sequence[float]) -> str:
    if len(shares) == 1:
        return f"{shares[0]:.1%}"
    return f"{statistics.mean(shares):.1%} in the mean, {min(shares):.1%} to {max(shares):.1%}"


def document(run: Run) -> Mapping[str, Any]:
    """A run as JSON: its samples by columns."""
    lost, could = area(run.samples, run.steps)
    return {
        "policy": run.policy,
        "cpu_seconds": round(run.cpu, 4),
        "others_cpu_seconds": run.others,
        "page_seconds_lost": round(lost),
        "page_seconds_possible": round(could),
        "end_share": end_share(run.samples, run.steps),
        "huge_pages": asdict(run.huge_pages),
        "huge_pages_not_given": run.not_huge,
        "arrivals": [
            asdict(arrival) | {"seconds_to_95": time} for arrival, time in zip(run.arrivals, run.times(), strict=True)
        ],
        "oracle": [asdict(step) for step in run.steps],
        "samples": {field.name: [getattr(sample, field.name) for sample in run.samples] for field in fields(Sample)},
    }
