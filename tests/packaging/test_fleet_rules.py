# SPDX-License-Identifier: GPL-2.0-or-later
"""The recording rules of clusters, zones and node pools: each has the sum that was calculated here."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.packaging.test_monitoring import RULES, check, rules

ZONE = "topology_kubernetes_io_zone"
#: The labels that each level's figures keep.
LEVELS = {"cluster": ("cluster",), "zone": ("cluster", ZONE), "node_pool": ("cluster", "node_pool")}


@dataclass(frozen=True, slots=True)
class Machine:
    """One host.

    :ivar where: labels of its target beside job and instance
    :ivar saved: bytes by counters; None where they are stale
    :ivar frames: bytes in frames; None where they are not known
    :ivar isolated: of each trust domain
    """

    where: Mapping[str, str]
    saved: int | None = 0
    frames: int | None = None
    memory: int = 1 << 30
    run: int = 1
    up: int = 1
    version: str = "1.0"
    drifted: tuple[int, ...] = (0,)
    drifts_a_minute: int = 0
    unrealised: tuple[int, ...] = ()
    cross: tuple[int, ...] = ()
    isolated: tuple[int, ...] = ()
    cpu_a_minute: int = 0


def place(cluster: str, zone: str, pool: str, number: int) -> dict[str, str]:
    return {"cluster": cluster, ZONE: zone, "node_pool": pool, "node": f"w{number}", "pod": f"p{number}"}


MACHINES = (
    Machine(place("x", "1", "big", 1), saved=100, frames=300, unrealised=(5, 7), cpu_a_minute=30),
    Machine(place("x", "1", "small", 2), saved=1000, drifted=(1, 0, 1), drifts_a_minute=2, cpu_a_minute=6),
    Machine(place("x", "2", "big", 3), saved=None, run=0, version="0.9", cross=(4, 0), isolated=(0, 1, 0)),
    Machine(place("y", "1", "big", 4), saved=-50, memory=1 << 32, cross=(9,), isolated=(0,)),
    Machine(place("y", "1", "big", 5), up=0, saved=70, run=2),
    # No labels at all, and one of a cluster without zones.
    Machine({}, saved=11, drifted=(1,)),
    Machine({}, saved=13, unrealised=(2,), isolated=(1,)),
    Machine({"cluster": "z"}, saved=17, version="2.0", drifts_a_minute=1),
)

#: By the name after the level, what a host adds; None where it adds nothing. Sums of rates and quotients are below.
SUMS: Mapping[str, Callable[[Machine], float | None]] = {
    "ksm_saved_bytes:sum": lambda one: one.saved if one.frames is None else one.frames,
    "ksm_host_memory_bytes:sum": lambda one: one.memory,
    "ksm_unrealised_pages:sum": lambda one: sum(one.unrealised) if one.unrealised else None,
    "ksm_ksmd_cpu:rate5m": lambda one: one.cpu_a_minute / 60,
    "ksm_run:count": lambda one: one.run == 1,
    "ksmd_ctl_up:count": lambda one: 1,
    "ksmd_ctl_up:sum": lambda one: one.up,
    "ksmd_ctl_knob_drifted:sum": lambda one: sum(one.drifted),
    "ksmd_ctl_drift:increase1h": lambda one: 60 * one.drifts_a_minute,
    "ksm_cross_domain_frames:sum": lambda one: sum(one.cross) if one.cross else None,
    "ksm_domain_not_isolated:count": lambda one: one.isolated.count(0) if one.isolated else None,
}
VERSIONS, RATIO = "ksmd_ctl_version:count", "ksm_saved:ratio"


def labels(found: Mapping[str, str]) -> str:
    return "{" + ", ".join(f'{key}="{value}"' for key, value in found.items()) + "}"


def series(number: int, one: Machine) -> list[dict[str, str]]:
    """What a Prometheus has of a host, two hours long."""
    target = {"job": "ksmd-ctl", "instance": f"192.0.2.{number}:19753", **one.where}
    values: list[tuple[str, dict[str, str], float | None, float]] = [
        ("up", {}, one.up, 0),
        ("ksm_saved_bytes", {}, one.saved, 0),
        ("ksm_saved_frames_bytes", {}, one.frames, 0),
        ("ksm_host_memory_bytes", {}, one.memory, 0),
        ("ksm_run", {}, one.run, 0),
        ("ksm_ksmd_cpu_seconds_total", {}, 0, one.cpu_a_minute),
        ("ksmd_ctl_build_info", {"version": one.version}, 1, 0),
        ("ksmd_ctl_drift_total", {"knob": "run"}, 0, one.drifts_a_minute),
        *(("ksmd_ctl_knob_drifted", {"knob": f"k{index}"}, value, 0) for index, value in enumerate(one.drifted)),
        *(("ksm_unrealised_pages", {"reason": f"r{index}"}, value, 0) for index, value in enumerate(one.unrealised)),
        *(("ksm_cross_domain_frames", {"domain": f"d{index}"}, value, 0) for index, value in enumerate(one.cross)),
        *(("ksm_domain_isolated", {"domain": f"d{index}"}, value, 0) for index, value in enumerate(one.isolated)),
    ]
    return [
        {"series": name + labels({**target, **more}), "values": f"{start:.0f}+{step:.0f}x120"}
        for name, more, start, step in values
        if start is not None
    ]


def wanted(level: str, name: str) -> dict[tuple[tuple[str, str], ...], float]:
    """The recorded samples, calculated from the hosts."""
    found: dict[tuple[tuple[str, str], ...], float] = defaultdict(float)
    for one in MACHINES:
        key = {label: one.where[label] for label in LEVELS[level] if label in one.where}
        value = 1 if name == VERSIONS else SUMS[name](one)
        if name == VERSIONS:
            key["version"] = one.version
        if value is not None:
            found[tuple(key.items())] += value
    return found


def samples(level: str, name: str) -> list[dict[str, object]]:
    if name == RATIO:
        memory = wanted(level, "ksm_host_memory_bytes:sum")
        found = {key: saved / memory[key] for key, saved in wanted(level, "ksm_saved_bytes:sum").items()}
    else:
        found = wanted(level, name)
    return [{"labels": f"{level}:{name}{labels(dict(key))}", "value": value} for key, value in found.items()]


@pytest.mark.parametrize("level", LEVELS)
def test_every_recorded_figure_has_the_right_sum(level: str, tmp_path: Path) -> None:
    names = [*SUMS, VERSIONS, RATIO]
    case = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [one for number, host in enumerate(MACHINES) for one in series(number, host)],
                "promql_expr_test": [
                    {"expr": f"{level}:{name}", "eval_time": "90m", "exp_samples": samples(level, name)}
                    for name in names
                ],
            }
        ],
    }
    # JSON is YAML.
    (tmp_path / "cases.yml").write_text(json.dumps(case))
    check("test", "rules", tmp_path / "cases.yml")


def test_the_three_levels_differ_in_their_labels_only() -> None:
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for name, expression in rules():
        level, colon, rest = name.partition(":")
        if colon and level in LEVELS:
            plain = re.sub(rf"\b{level}:", "LEVEL:", expression)
            found[level][rest] = plain.replace(", ".join(LEVELS[level]), "LABELS")
    assert found["cluster"] == found["zone"] == found["node_pool"]
    assert set(found["cluster"]) == {*SUMS, VERSIONS, RATIO}
