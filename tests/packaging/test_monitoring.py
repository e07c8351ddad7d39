# SPDX-License-Identifier: GPL-2.0-or-later
"""Rules and dashboard ask only for what is exported, do what they say, and every alert is explained."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from ksmd_ctl.render import cells
from ksmd_ctl.render.exposition import Exposition
from tests.packaging.building import ROOT

RULES = ROOT / "packaging/prometheus/ksmd-ctl.rules.yml"
GRAFANA = ROOT / "packaging/grafana"
#: What makes each dashboard.
DASHBOARDS = {GRAFANA / "ksmd-ctl.json": (), GRAFANA / "ksmd-ctl-fleet.json": ("fleet",)}
ALERTS = ROOT / "docs/alerts.md"
FLEET = ROOT / "docs/fleet.md"
REPORT = ROOT / "tests/contracts/report.json"
CONTRACT = ROOT / "tests/contracts/metric-names.json"


@cache
def promtool() -> str:
    done = subprocess.run(
        [ROOT / "tools/deb-program", "prometheus", "promtool"], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(done.stderr)
    return done.stdout.strip()


def check(*words: str | Path, given: str | None = None) -> str:
    done = subprocess.run([promtool(), *words], input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def families(found: object) -> Iterator[cells.Family]:
    """Every family that the exporter has."""
    if isinstance(found, cells.Family):
        yield found
    elif isinstance(found, dict):
        for value in found.values():
            yield from families(value)
    elif isinstance(found, list | tuple):
        for value in found:
            yield from families(value)


@cache
def exported() -> frozenset[str]:
    """Names of samples: of the contract, and of what a report of other hosts would have."""
    contract = {series.partition("{")[0] for series in json.loads(CONTRACT.read_text())}
    made = {family.name + family.suffix for family in families(list(vars(cells).values()))}
    assert contract <= made
    return frozenset(made)


def asked(expression: str) -> set[str]:
    """The metrics that an expression asks for."""
    return set(re.findall(r"\b(?:\w+:)?(?:ksmd?|process)_\w+(?::\w+)?", re.sub(r'"[^"]*"', '""', expression)))


def rules() -> list[tuple[str, str]]:
    """Name and expression of each rule."""
    found = []
    for part in re.split(r"^ +- (?=alert:|record:)", RULES.read_text(), flags=re.MULTILINE)[1:]:
        name = re.match(r"\w+: (\S+)", part)
        expression = re.search(r"expr: (.*?)(?=\n +(?:for|labels|annotations):|\n\n|\Z)", part, re.DOTALL)
        assert name
        assert expression
        found.append((name[1], expression[1]))
    return found


def test_the_rules_are_well_formed() -> None:
    assert "SUCCESS" in check("check", "rules", RULES)


def test_the_example_of_a_configuration_is_one(tmp_path: Path) -> None:
    text = (ROOT / "packaging/prometheus/scrape.yml").read_text()
    installed = "/usr/share/ksmd-ctl/prometheus/ksmd-ctl.rules.yml"
    assert installed in text
    (tmp_path / "prometheus.yml").write_text(text.replace(installed, str(RULES)))
    check("check", "config", tmp_path / "prometheus.yml")


def test_alerts_fire_when_they_should_and_not_before(tmp_path: Path) -> None:
    cases = tmp_path / "cases.yml"
    text = Path(__file__).with_name("rules.yml").read_text()
    cases.write_text(text.replace('"RULES"', f'"{RULES}"'))
    check("test", "rules", cases)
    for name, _ in rules():
        assert name in text or ":" in name, f"{name} has no case"


def test_rules_ask_for_what_is_exported() -> None:
    recorded = {name for name, _ in rules() if ":" in name}
    labels = {"ksm_advisor_mode"}
    for name, expression in rules():
        wanted = asked(expression)
        assert wanted or 'up{job="ksmd-ctl"}' in expression
        assert wanted <= exported() | recorded | labels, name


def test_every_alert_says_what_it_means_and_what_to_do() -> None:
    alerts = [name for name, _ in rules() if ":" not in name]
    text = ALERTS.read_text()
    explained = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL))
    assert list(explained) == alerts
    for name, said in explained.items():
        assert re.search(r"\*\*Means:\*\* \S.*\n\n\*\*Do:\*\* \S", said, re.DOTALL), name
    told = text + FLEET.read_text()
    for name, _ in rules():
        # Figures of zones and node pools are those of clusters.
        assert re.sub("^(?:zone|node_pool):", "cluster:", name) in told, name


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_the_dashboards_are_the_generated_ones(path: Path) -> None:
    made = subprocess.run(
        [sys.executable, GRAFANA / "dashboard.py", *DASHBOARDS[path]], capture_output=True, text=True, check=True
    ).stdout
    assert path.read_text() == made, f"packaging/grafana/dashboard.py {' '.join(DASHBOARDS[path])} > {path}"


def targets() -> list[str]:
    panels = [panel for path in DASHBOARDS for panel in json.loads(path.read_text())["panels"]]
    found = [panel for panel in panels if panel["type"] != "row"]
    assert all(panel["targets"] for panel in found)
    return [target["expr"] for panel in found for target in panel["targets"]]


def test_the_dashboards_ask_for_what_is_exported() -> None:
    for expression in targets():
        wanted = asked(expression)
        # Prometheus' own.
        assert wanted or re.search(r"\b(?:up|ALERTS)\{", expression)
        assert wanted <= exported(), expression


def test_the_dashboards_queries_are_promql(tmp_path: Path) -> None:
    """promtool checks expressions as rules; Grafana's own words are put in first."""
    lines = ["groups:", "- name: dashboard", "  rules:"]
    for number, expression in enumerate(targets()):
        plain = re.sub(r"\$__rate_interval", "5m", expression)
        plain = re.sub(r"\$(?:job|instance|cluster|zone|pool)\b", ".*", plain)
        assert "$" not in plain
        lines += [f"  - record: query:{number}", f"    expr: {json.dumps(plain)}"]
    (tmp_path / "queries.yml").write_text("\n".join(lines) + "\n")
    assert f"{len(targets())} rules found" in check("check", "rules", tmp_path / "queries.yml")


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_do_not_lie_on_each_other(path: Path) -> None:
    taken: set[tuple[int, int]] = set()
    panels = json.loads(path.read_text())["panels"]
    for panel in panels:
        place = panel["gridPos"]
        cells_of = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells_of, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells_of
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_what_is_exported_passes_prometheus_own_checker() -> None:
    report = json.loads(REPORT.read_text())
    check("check", "metrics", given=Exposition(lambda: report).text())
