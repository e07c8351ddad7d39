# SPDX-License-Identifier: GPL-2.0-or-later
"""What the recording rules have to say, calculated from the reports of the instances and not from their metrics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isclose

from benchmarks.fleet.hosts import ZONE, Spec, labels
from benchmarks.fleet.prometheus import Sample
from ksmd_ctl.reports.document import number, part, parts, text

#: The labels of each level.
LEVELS = {"cluster": ("cluster",), "zone": ("cluster", ZONE), "node_pool": ("cluster", "node_pool")}

#: How far back the rules look for rates.
RATE_SECONDS = 300.0

Report = Mapping[str, object]
#: Of a sum, in the order of `LEVELS`.
Key = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Figure:
    """A recorded figure.

    :ivar name: after the level
    :ivar tolerance: relative; 0 for figures that have to be the same
    """

    name: str
    tolerance: float = 0.0


FIGURES = (
    Figure("ksm_saved_bytes:sum"),
    Figure("ksm_host_memory_bytes:sum"),
    Figure("ksm_saved:ratio", 1e-9),
    Figure("ksm_unrealised_pages:sum"),
    # A rate over minutes beside two readings with the same time between.
    Figure("ksm_ksmd_cpu:rate5m", 0.25),
    Figure("ksm_run:count"),
    Figure("ksmd_ctl_up:count"),
    Figure("ksmd_ctl_up:sum"),
    Figure("ksmd_ctl_version:count"),
    Figure("ksmd_ctl_knob_drifted:sum"),
    # increase() extends what it saw to the whole range.
    Figure("ksmd_ctl_drift:increase1h", 0.25),
    Figure("ksm_cross_domain_frames:sum"),
    Figure("ksm_domain_not_isolated:count"),
)


@dataclass(frozen=True, slots=True)
class Reports:
    """What instances report, by the numbers of their hosts.

    :ivar now: of those that answer
    :ivar before: `RATE_SECONDS` earlier, or from the beginning
    :ivar ended: the last ones of those that were stopped since; rates go on with what they did
    """

    now: Mapping[int, Report]
    before: Mapping[int, Report]
    ended: Mapping[int, Report]


def wanted(level: str, figure: str, specs: Sequence[Spec], reports: Reports) -> dict[Key, float]:
    """The sums of one figure."""
    if figure == "ksm_saved:ratio":
        names = ("ksm_saved_bytes:sum", "ksm_host_memory_bytes:sum")
        saved, memory = (wanted(level, name, specs, reports) for name in names)
        return {key: saved[key] / memory[key] for key in saved}
    found: dict[Key, float] = defaultdict(float)
    for one in specs:
        where = labels(one)
        key = tuple((label, where[label]) for label in LEVELS[level] if label in where)
        if figure == "ksmd_ctl_version:count":
            key = (*key, ("version", one.version))
        value = _added(figure, one.number, reports)
        if value is not None:
            found[key] += value
    return dict(found)


def _added(figure: str, host: int, reports: Reports) -> float | None:
    # What one host adds; None for nothing.
    report = reports.now.get(host)
    match figure:
        case "ksmd_ctl_up:count":
            return 1
        case "ksmd_ctl_up:sum":
            return report is not None
        case "ksm_ksmd_cpu:rate5m":
            latest = reports.ended.get(host, report)
            # rate() divides by the whole range, also where it has samples of a part of it only.
            return None if latest is None else (_ksmd(latest) - _ksmd(reports.before[host])) / RATE_SECONDS
        case _:
            return None if report is None else _value(figure, report)


def _ksmd(report: Report) -> float:
    return number(part(report, "readings"), "ksmd_cpu_seconds") or 0.0


def _value(figure: str, report: Report) -> float | None:
    knobs, readings = part(report, "knobs"), part(report, "readings")
    domains = parts(part(report, "domains"), "domains")
    match figure:
        case "ksm_saved_bytes:sum":
            derived = part(report, "derived")
            frames = number(derived, "saved_frames_bytes")
            return number(derived, "saved_bytes") if frames is None else frames
        case "ksm_host_memory_bytes:sum":
            return number(readings, "mem_total_bytes")
        case "ksm_unrealised_pages:sum":
            return _sum(part(part(report, "healing"), "unrealised"))
        case "ksm_run:count":
            return number(readings, "run") == 1
        case "ksmd_ctl_version:count":
            return 1
        case "ksmd_ctl_knob_drifted:sum":
            return sum(text(part(knobs, name), "state") == "drifted" for name in knobs)
        case "ksmd_ctl_drift:increase1h":
            return sum(number(part(knobs, name), "drift_total") or 0 for name in knobs)
        case "ksm_cross_domain_frames:sum":
            others = part(part(report, "domains"), "others")
            more = [others] if number(others, "domains") else []
            return sum(number(one, "shared_frames") or 0 for one in (*domains, *more)) if domains else None
        case "ksm_domain_not_isolated:count":
            verdicts = [text(one, "verdict") for one in domains if one.get("nodes")]
            verdicts = [verdict for verdict in verdicts if verdict in ("isolated", "not isolated")]
            return verdicts.count("not isolated") if verdicts else None
    raise ValueError(figure)


def _sum(found: Mapping[str, object]) -> float | None:
    return sum(number(found, name) or 0 for name in found) if found else None


def differences(found: Iterable[Sample], sums: Mapping[Key, float], figure: Figure) -> list[str]:
    """What differs, for people; empty for nothing."""
    recorded = {tuple(sorted(where.items())): value for where, value in found}
    expected = {tuple(sorted(key)): value for key, value in sums.items()}
    said = []
    for key in sorted(recorded.keys() | expected.keys()):
        ours, theirs = expected.get(key), recorded.get(key)
        near = None not in (ours, theirs) and isclose(ours or 0, theirs or 0, rel_tol=figure.tolerance, abs_tol=1e-9)
        if not near:
            said.append(f"{dict(key)}: recorded {theirs}, from the reports {ours}")
    return said
