# SPDX-License-Identifier: GPL-2.0-or-later
"""The figures of runs as tables for people. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from benchmarks.policy.contenders import OFF
from benchmarks.policy.figures import CPU, END, IN_TIME, KEPT, LATENCY, Run, Total, end_share, lost_share, mean_time
from benchmarks.policy.oracle import FEW

__all__ = ["LEGEND", "marks", "summary", "table"]

#: What a reader of the table has to know.
LEGEND = (
    "lost: area between the oracle's line and what is saved, as a share of the area below the oracle's line",
    "at the end: what is saved, of what could be; in frames, zeroes that splits of huge pages freed among them",
    "time to 95 %: from an arrival's last page to the first sample in which 95 % is saved of what the oracle says then;"
    " never: not before something else begins to happen. In a mean never counts as the whole time that there was",
    "CPU: ksmd and the service or script, with all that it starts; others: CPU seconds of all else on the host, tenants"
    " and neighbours among it; where it was busy, ksmd had to wait",
    "huge pages: how many of the tenants' are left at the end; few: of those with fewer than"
    f" {FEW} pages that can be merged",
    "p50, p99, worst: milliseconds that requests of about 0.2 ms took in processes beside, one on each CPU; in brackets"
    " the p99 as a multiple of that with KSM off",
    "ksmtuned: two minutes stand for an hour, so its script runs, and costs, thirty times as often as in earnest",
    "kubevirt: its interval is as much shorter, six seconds; both think memory short as soon as there is a tenant",
    "advisor: on a host where ksmd has worked before, its first scan makes it slow down to a crawl (F12)",
)


def table(runs: Sequence[Run]) -> list[str]:
    """One line a policy."""
    rows = [("policy", "lost", "at the end", "mean to 95 %", "ksmd", "service", "CPU", "scans", "others", "huge pages",
             "few", "p50", "p99", "worst", "time to 95 % after each arrival")]  # fmt: skip
    for run in runs:
        last, huge = run.samples[-1], run.huge_pages
        merges = run.policy != OFF
        rows.append((
            run.policy, f"{lost_share(run):.1%}", f"{end_share(run.samples, run.steps):.1%}",
            f"{mean_time(run):.1f} s" if merges else "", f"{last.ksmd:.1f} s", f"{last.service:.2f} s",
            f"{run.cpu:.1f} s", str(last.full_scans - run.samples[0].full_scans), f"{run.others:.0f} s",
            _left(huge.end, huge.before), _left(huge.few_end, huge.few_before), f"{run.latency.p50 / 1000:.2f}",
            _p99(run, runs), f"{run.latency.worst / 1000:.1f}",
            " ".join("never" if time is None else f"{time:.1f}" for time in run.times()) if merges else "",
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *middle, last_column in rows:
        cells = [cell.rjust(width) for cell, width in zip(middle, widths[1:], strict=False)]
        lines.append("  ".join([first.ljust(widths[0]), *cells, last_column]).rstrip())
    return lines


def marks(name: str, total: Total) -> list[str]:
    """What is reached and what is missed, with figures: over all scripts, with the spread."""
    held, verdicts = total.held, total.verdicts
    worst = max(verdict.late for verdict in verdicts)
    late = f", at worst {worst:.1f} s later" if worst else ""
    peers = ", ".join(sorted({verdict.peer for verdict in verdicts}))
    few = "there are none"
    if total.few_before:
        few = (
            f"{total.few_end} of {total.few_before}, {total.few_end / total.few_before:.0%}; at most"
            f" {_spread([v.few_saving for v in verdicts])} of the saving is in them"
        )
    return [
        f"{name}: saved at the end, of what could be: {_spread([v.end for v in verdicts])}"
        f" (mark {END:.0%}: {_said(held['end'])})",
        f"{name}: 95 % no later than with any other policy: after {total.in_time} of {total.arrivals}"
        f" arrivals{late} (mark {IN_TIME:.0%}: {_said(held['time'])})",
        f"{name}: CPU seconds, of those of the best other ({peers}): {_spread([v.cpu for v in verdicts])}"
        f" (mark at most {CPU:.0%}: {_said(held['cpu'])}); ksmd alone {_spread([v.ksmd for v in verdicts])}",
        f"{name}: huge pages with fewer than {FEW} mergeable pages that are left: {few}"
        f" (mark {KEPT:.0%}: {_said(held['huge_pages'])})",
        f"{name}: the neighbours' p99, as a multiple of that with KSM off:"
        f" {_spread(total.latencies, 'x') if total.latencies else 'not measured'}"
        f" (mark at most {LATENCY:g}: {_said(held['latency'])})",
    ]


def summary(groups: Mapping[str, Sequence[Sequence[Run]]], totals: Mapping[str, Total], name: str) -> list[str]:
    """Everything as Markdown: for each group of scripts a table with a line a policy, and the marks.

    :param groups: by heading, for each script its runs
    :param totals: of the policy `name`, by heading; not of all groups
    """
    lines = []
    for heading, scripts in groups.items():
        lines += [
            f"### {heading[0].upper()}{heading[1:]}",
            "",
            "| policy | saved at the end | seconds to 95 % after an arrival | CPU seconds: ksmd and service or script"
            f" | huge pages left | of those with fewer than {FEW} mergeable pages | neighbours' p50, p99, worst (ms)"
            " | p99 as a multiple of that with KSM off |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for policy in dict.fromkeys(run.policy for runs in scripts for run in runs):
            lines.append(_row([(run, runs) for runs in scripts for run in runs if run.policy == policy]))
        if heading in totals:
            lines += ["", *(f"- {line}" for line in marks(name, totals[heading]))]
        lines.append("")
    return lines


def _row(pairs: Sequence[tuple[Run, Sequence[Run]]]) -> str:
    runs = [run for run, _ in pairs]
    times = [time for run in runs for time in run.times()]
    never = f"; {times.count(None)} of {len(times)} never" if None in times else ""
    cells = [runs[0].policy, "", "", "0"]
    if runs[0].policy != OFF:
        cells[1:] = [
            _spread([end_share(run.samples, run.steps) for run in runs]),
            f"{statistics.mean(map(mean_time, runs)):.1f} in the mean{never}",
            _spread([run.cpu for run in runs], "s"),
        ]
    cells += [
        _left(sum(run.huge_pages.end for run in runs), sum(run.huge_pages.before for run in runs)),
        _left(sum(run.huge_pages.few_end for run in runs), sum(run.huge_pages.few_before for run in runs)),
        _latency(runs),
        _spread(ratios, "x") if (ratios := [ratio for pair in pairs if (ratio := _ratio(*pair))]) else "",
    ]
    return f"| {' | '.join(cells)} |"


def _latency(runs: Sequence[Run]) -> str:
    p50, p99 = (statistics.mean(getattr(run.latency, name) for run in runs) for name in ("p50", "p99"))
    return f"{p50 / 1000:.2f}, {p99 / 1000:.2f}, {max(run.latency.worst for run in runs) / 1000:.1f}"


def _ratio(run: Run, runs: Sequence[Run]) -> float | None:
    off = next((other for other in runs if other.policy == OFF), None)
    return None if off is None or off is run else run.latency.p99 / off.latency.p99


def _p99(run: Run, runs: Sequence[Run]) -> str:
    ratio = _ratio(run, runs)
    return f"{run.latency.p99 / 1000:.2f}" + (f" ({ratio:.2f} x)" if ratio else "")


def _left(end: int, before: int) -> str:
    return f"{end} of {before}" if before else "none"


def _said(held: bool | None) -> str:
    return {True: "reached", False: "missed", None: "nothing to judge"}[held]


def _spread(values: Sequence[float], unit: str = "%") -> str:
    """Mean and range: shares as percentages, others with their unit."""

    def said(value: float) -> str:
        return f"{value:.1%}" if unit == "%" else f"{value:.2f}" if unit == "x" else f"{value:.1f}"

    after = "" if unit == "%" else f" {unit}"
    if len(values) == 1:
        return f"{said(values[0])}{after}"
    return f"{said(statistics.mean(values))}{after} in the mean, {said(min(values))} to {said(max(values))}"
