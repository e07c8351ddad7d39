# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from prometheus_client.registry import Collector, CollectorRegistry

from ksmd_ctl.host.fields import FIELDS
from ksmd_ctl.host.fields import Metric as Kind
from ksmd_ctl.host.knobs import KNOBS, Knob
from ksmd_ctl.render.exposition import Exposition
from tests.render.reports import CONTRACTS, example

ROOT = Path(__file__).parents[2]
OPENMETRICS = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.4"


def full() -> dict[str, Any]:
    """The example with a number for every field of the table."""
    report = example()
    report["readings"] = {
        field.name: "scan-time" if field.metric is Kind.STATE else 7 + number for number, field in enumerate(FIELDS)
    }
    return report


def samples(report: Mapping[str, Any]) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = Exposition(lambda: report).text()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parse_text(text)
        for sample in family.samples
    }


def names(report: Mapping[str, Any]) -> set[str]:
    return {name for name, _ in samples(report)}


def test_the_names_are_a_contract() -> None:
    """Dashboards and alerts stand on these: a change here is a change for everybody who has one."""
    found = sorted({f"{name}{{{','.join(key for key, _ in labels)}}}" for name, labels in samples(full())})
    assert found == json.loads((CONTRACTS / "metric-names.json").read_text())


def test_every_field_is_exported_and_none_that_was_not_read() -> None:
    with_all = names(full())
    for field in FIELDS:
        name = field.stem + ("_total" if field.metric is Kind.COUNTER else "")
        assert name in with_all
        lacking = full()
        del lacking["readings"][field.name]
        assert with_all - names(lacking) == {name}


def test_values_are_in_base_units_and_signed() -> None:
    report = example()
    report["readings"] |= {"general_profit": -4096, "sleep_millisecs": 20, "advisor_max_cpu": 70}
    report["derived"]["saved_bytes"] = -1
    found = samples(report)
    assert found["ksm_profit_bytes", ()] == -4096
    assert found["ksm_saved_bytes", ()] == -1
    assert found["ksm_sleep_seconds", ()] == 0.02
    assert found["ksm_advisor_max_cpu_ratio", ()] == 0.7


def test_what_is_not_known_is_absent() -> None:
    report = example()
    report["derived"] = dict.fromkeys(report["derived"])
    report["nodes"] = {}
    report["numa"] = report["healing"] = report["sharing"] = report["domains"] = None
    report["readings"] = {"run": 1}
    assert {name for name in names(report) if name.startswith("ksm_")} == {"ksm_page_size_bytes", "ksm_run"}


@pytest.mark.parametrize("word", ["none", "scan-time", "a word of a later kernel"])
def test_a_word_is_one_of_its_states(word: str) -> None:
    report = example()
    report["readings"]["advisor_mode"] = word
    found = {
        dict(labels)["ksm_advisor_mode"]: value
        for (name, labels), value in samples(report).items()
        if name == "ksm_advisor_mode"
    }
    assert found == {choice: float(choice == word) for choice in (*KNOBS[Knob.ADVISOR_MODE].choices, word)}


def test_a_simulated_host_is_marked() -> None:
    report = example()
    report["host"] |= {"kind": "engine", "simulated": True, "release": "current"}
    labels = (("kind", "engine"), ("release", "current"), ("simulated", "true"))
    assert samples(report)["ksmd_ctl_host_info", labels] == 1


def test_where_merged_pages_are_and_whose() -> None:
    found = samples(example())
    assert found["ksm_node_pages", (("node", "1"),)] == 400
    assert found["ksm_node_pages_low", (("node", "1"),)] == 391
    assert found["ksm_node_remote_pages", (("node", "1"),)] == 25100
    assert found["ksm_group_merging_pages", (("group", "web-1"),)] == 150000
    assert found["ksm_group_merging_pages", (("group", "other"),)] == 101000
    assert found["ksm_group_forked_processes", (("group", "other"),)] == 2
    assert found["ksm_unmerge_over_bytes", (("place", "node 0"),)] == 150258176
    assert found["ksm_unmerge_over_cgroups", ()] == 1
    assert found["ksmd_ctl_census_age_seconds", ()] == 12.5
    assert found["ksmd_ctl_census_complete", ()] == 0


def test_cgroups_are_no_labels() -> None:
    assert not [labels for _, labels in samples(example()) if "/tenant.slice" in dict(labels).values()]


def test_what_a_look_could_not_find_out_is_absent() -> None:
    report = example()
    report["numa"]["nodes"]["1"] |= {"ksm_pages": None, "remote_pages": None}
    report["numa"]["groups"][0]["saved_bytes"] = None
    report["numa"] |= {"age_seconds": None, "complete": None, "cgroups_over": None, "other": None}
    found = samples(report)
    for missing in (
        ("ksm_node_pages", (("node", "1"),)),
        ("ksm_node_remote_pages", (("node", "1"),)),
        ("ksm_group_saved_bytes", (("group", "web-1"),)),
        ("ksm_group_merging_pages", (("group", "other"),)),
        ("ksm_unmerge_over_cgroups", ()),
        ("ksmd_ctl_census_age_seconds", ()),
        ("ksmd_ctl_census_complete", ()),
    ):
        assert missing not in found
    assert found["ksm_node_pages", (("node", "0"),)] == 600


def test_managed_knobs_only() -> None:
    found = samples(example())
    assert found["ksmd_ctl_drift_total", (("knob", "run"),)] == 2
    assert found["ksmd_ctl_knob_drifted", (("knob", "pages_to_scan"),)] == 1
    assert found["ksmd_ctl_knob_pending", (("knob", "merge_across_nodes"),)] == 1
    assert found["ksmd_ctl_knob_pending", (("knob", "run"),)] == 0
    assert ("ksmd_ctl_drift_total", (("knob", "sleep_millisecs"),)) not in found


def test_without_a_service_there_is_nothing_about_it() -> None:
    report = example()
    report["daemon"] = report["numa"] = None
    assert {name for name in names(report) if name.startswith("ksmd_ctl_")} == {
        "ksmd_ctl_build_info",
        "ksmd_ctl_host_info",
    }


def test_the_format_is_the_one_asked_for() -> None:
    exposition = Exposition(full)
    content_type, body = exposition.render()
    assert content_type.startswith("text/plain")
    assert b"# TYPE ksm_advisor_mode gauge" in body
    content_type, body = exposition.render(OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text")
    families = {family.name: family.type for family in parse_openmetrics(body.decode())}  # type: ignore[no-untyped-call]
    assert families["ksm_advisor_mode"] == "stateset"
    assert families["ksm_full_scans"] == "counter"
    assert families["ksmd_ctl_host"] == "info"


class Parsed(Collector):
    def __init__(self, body: bytes) -> None:
        self.body = body

    def collect(self) -> list[Metric]:
        return list(parse_openmetrics(self.body.decode()))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("report", [full(), example()], ids=["full", "example"])
def test_the_text_format_is_the_librarys(report: dict[str, Any]) -> None:
    """What prometheus_client makes of the same metrics in its own writer of the text format."""
    exposition = Exposition(lambda: report)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Parsed(exposition.render(OPENMETRICS)[1]))
    assert exposition.render()[1] == generate_latest(registry)


@pytest.mark.parametrize(
    ("accept", "openmetrics"),
    [
        ("application/openmetrics-text", True),
        ("text/html, application/openmetrics-text; version=1.0.0; charset=utf-8", True),
        ("application/openmetrics-text;version=0.0.1,application/openmetrics-text;version=1.0.0", True),
        ("application/openmetrics-text;version=0.0.1", False),
        ("application/openmetrics-text;version=x", False),
        ("application/openmetrics", False),
        ("text/plain;version=1.0.0;escaping=allow-utf-8", False),
        ("*/*", False),
    ],
)
def test_openmetrics_is_for_those_who_ask_for_it(accept: str, openmetrics: bool) -> None:
    assert Exposition(example).render(accept)[0].startswith("application/openmetrics-text") is openmetrics


def test_the_source_is_asked_once_a_tick() -> None:
    asked = []

    def source() -> dict[str, Any]:
        asked.append(1)
        return example()

    exposition = Exposition(source)
    assert exposition.render()[1] == exposition.render()[1]
    assert len(asked) == 1
    exposition.invalidate()
    exposition.text()
    assert len(asked) == 2


@given(st.text(max_size=100) | st.from_regex(r"(application/openmetrics-text|text/plain);version=[0-9.x]{0,9}.{0,20}"))
def test_any_accept_header_gets_something(accept: str) -> None:
    content_type, body = Exposition(example).render(accept)
    # Nothing of it comes back in the answer's header.
    assert content_type in {Exposition(example).render(asked)[0] for asked in ("", "application/openmetrics-text")}
    assert b"ksm_run 1.0" in body


@pytest.mark.parametrize("version", ["1.0.0", "1.2.3", "0007.0.0", "99.0.0", "1.0.0.0.0.0"])
def test_the_version_asked_for_does_not_come_back(version: str) -> None:
    for kind in ("application/openmetrics-text", "text/plain"):
        content_type = Exposition(example).render(f"{kind};version={version}")[0]
        assert set(re.findall(r"version=([^;]*)", content_type)) <= {"1.0.0", "0.0.4"}


def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        program = ROOT / "tools/deb-program"
        result = subprocess.run([program, "prometheus", "promtool"], capture_output=True, text=True, check=False)
        if result.returncode:
            pytest.skip(f"promtool is missing (Debian package prometheus): {result.stderr.strip()}")
        found = result.stdout.strip()
    return found


@pytest.mark.parametrize("report", [full(), example()], ids=["full", "example"])
def test_promtool_finds_nothing(report: dict[str, Any]) -> None:
    result = subprocess.run(
        [promtool(), "check", "metrics"],
        input=Exposition(lambda: report).text(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


@pytest.mark.parametrize("accept", ["", OPENMETRICS, "text/plain;version=1.0.0;escaping=allow-utf-8"])
def test_filling_in_gives_what_rendering_anew_gives(accept: str) -> None:
    """From one report to the next: other values, then also other series, and the first again."""
    changed, fewer = full(), full()
    changed["readings"] |= {"general_profit": -1, "run": 2**64, "pages_shared": 0.125, "advisor_mode": "none"}
    changed["derived"]["saved_bytes"] = 10**30
    del fewer["readings"]["run"]
    fewer["host"]["release"] = 'a "b" \\ # c\u2028\n d'
    reports = [full(), changed, fewer, full(), example(), changed]
    latest: list[dict[str, Any]] = []
    exposition = Exposition(lambda: latest[-1])
    for report in reports:
        latest.append(report)
        exposition.invalidate()
        assert exposition.render(accept) == Exposition(lambda: latest[-1]).render(accept)


@given(st.dictionaries(st.sampled_from([field.name for field in FIELDS]), st.integers() | st.floats(allow_nan=False)))
def test_any_values_are_filled_in(values: dict[str, float]) -> None:
    first, second = full(), full()
    first["readings"].update(dict.fromkeys(values, 1))
    second["readings"].update(values)
    latest = [first]
    exposition = Exposition(lambda: latest[-1])
    exposition.render()
    latest.append(second)
    exposition.invalidate()
    assert exposition.text() == Exposition(lambda: second).text()


def test_domains_have_their_frames_and_those_with_nodes_a_verdict() -> None:
    report = example()
    gold, silver = report["domains"]["domains"]
    iron = gold | {"domain": "iron", "nodes": [], "verdict": "nothing is shared now", "shared_frames": 256}
    empty = gold | {"domain": "empty", "verdict": "no members", "shared_frames": None}
    report["domains"] |= {"domains": [gold, silver, iron, empty]}
    report["domains"]["others"] |= {"shared_frames": 512}
    found = samples(report)
    frames = {labels[0][1]: value for (name, labels), value in found.items() if name == "ksm_cross_domain_frames"}
    assert frames == {"gold": 0, "silver": 0, "iron": 256, "each its own": 512}
    isolated = {labels[0][1]: value for (name, labels), value in found.items() if name == "ksm_domain_isolated"}
    assert isolated == {"gold": 1, "silver": 0}
    report["domains"] = None
    assert not any("domain" in name for name in names(report))


def test_switches() -> None:
    found = samples(example())
    counts = {
        tuple(value for _, value in labels): count for (name, labels), count in found.items() if "switches" in name
    }
    assert counts == {
        ("qmp", "done"): 2,
        ("qmp", "left"): 1,
        ("qmp", "failed"): 0,
        ("inject", "done"): 1,
        ("inject", "left"): 0,
        ("inject", "failed"): 1,
        ("auto", "failed"): 1,
    }
    # The one there has ended, and started again.
    assert found["ksmd_ctl_switched_off_processes", ()] == 0
    assert found["ksmd_ctl_started_again_processes", ()] == 1
    # A command without a service knows no counts.
    assert not [name for name in names(example() | {"switches": None}) if "switche" in name or "started_again" in name]
