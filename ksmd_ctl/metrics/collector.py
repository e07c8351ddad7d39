# SPDX-License-Identifier: GPL-2.0-or-later
"""The metrics of one report: the field table (`ksmd_ctl.fields`) and what the service itself does.

What a report doesn't have is absent, never 0. No label grows with time: knobs, nodes and kinds of errors are few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
    StateSetMetricFamily,
)
from prometheus_client.registry import Collector

from ksmd_ctl import __version__
from ksmd_ctl.fields import FIELDS, Field
from ksmd_ctl.fields import Metric as Kind
from ksmd_ctl.knobs import KNOBS, Knob
from ksmd_ctl.metrics.document import number, part, text

__all__ = ["ReportCollector"]

# Which readings could not be had although they are there; what is absent is no error.
_FAILURES = ("unreadable", "unparsable")


class ReportCollector(Collector):
    """Renders the report that `source` gives at the time of a scrape."""

    def __init__(self, source: Callable[[], Mapping[str, object]]) -> None:
        self._source = source

    def collect(self) -> Iterator[Metric]:
        report = self._source()
        yield from _host(report)
        readings = part(report, "readings")
        for field in FIELDS:
            if field.name in readings:
                yield from _reading(field, readings)
        yield from _derived(report)
        yield from _nodes(report)
        if part(report, "daemon"):
            yield from _service(report)
            yield from _knobs(report)


def _gauge(name: str, help_text: str, value: float | None) -> Iterator[Metric]:
    if value is not None:
        yield GaugeMetricFamily(name, help_text, value=value)


def _host(report: Mapping[str, object]) -> Iterator[Metric]:
    yield InfoMetricFamily("ksmd_ctl_build", "The version of ksmd-ctl.", value={"version": __version__})
    host = part(report, "host")
    labels = {
        "kind": text(host, "kind"),
        "release": text(host, "release"),
        "simulated": "true" if host.get("simulated") else "false",
    }
    yield InfoMetricFamily("ksmd_ctl_host", "The host that all ksm_ metrics are of; is it simulated?", value=labels)
    yield from _gauge(
        "ksm_page_size_bytes", "What one page is, wherever pages are counted.", number(host, "page_size_bytes")
    )


def _reading(field: Field, readings: Mapping[str, object]) -> Iterator[Metric]:
    if field.metric is Kind.STATE:
        active = text(readings, field.name)
        if active:
            # A kernel may know words that the table doesn't.
            words = dict.fromkeys((*KNOBS[Knob(field.name)].choices, active))
            states = {word: word == active for word in words}
            yield StateSetMetricFamily(field.stem, field.help, value=states)
        return
    value = number(readings, field.name)
    if value is None:
        return
    if field.scale != 1:
        # 70 / 100 is 0.7, and 70 * 0.01 is not.
        value /= 1 / field.scale
    if field.metric is Kind.COUNTER:
        yield CounterMetricFamily(field.stem, field.help, value=value)
    else:
        yield GaugeMetricFamily(field.stem, field.help, value=value)


def _derived(report: Mapping[str, object]) -> Iterator[Metric]:
    derived = part(report, "derived")
    yield from _gauge(
        "ksm_saved_bytes",
        "What merging saves, less what ksmd keeps for the pages that it has seen; may be negative.",
        number(derived, "saved_bytes"),
    )
    yield from _gauge(
        "ksm_metadata_bytes",
        "What ksmd keeps for the pages that it has seen.",
        number(derived, "metadata_bytes"),
    )


def _nodes(report: Mapping[str, object]) -> Iterator[Metric]:
    total = GaugeMetricFamily("ksm_node_memory_bytes", "Memory of a NUMA node.", labels=["node"])
    free = GaugeMetricFamily("ksm_node_memory_free_bytes", "Free memory of a NUMA node.", labels=["node"])
    nodes = part(report, "nodes")
    for node in nodes:
        for family, name in ((total, "total_bytes"), (free, "free_bytes")):
            value = number(part(nodes, node), name)
            if value is not None:
                family.add_metric([node], value)
    for family in (total, free):
        if family.samples:
            yield family


def _service(report: Mapping[str, object]) -> Iterator[Metric]:
    daemon = part(report, "daemon")
    ticks = number(daemon, "ticks")
    if ticks is not None:
        yield CounterMetricFamily("ksmd_ctl_ticks", "Samples that were taken and acted upon.", value=ticks)
    yield from _gauge("ksmd_ctl_uptime_seconds", "How long the service runs.", number(daemon, "uptime_seconds"))
    yield from _gauge(
        "ksmd_ctl_config_reload_successful",
        "1 if the configuration was taken the last time that it was read.",
        float(not daemon.get("reload_error")),
    )
    failures = number(daemon, "reload_failures")
    if failures is not None:
        yield CounterMetricFamily(
            "ksmd_ctl_config_reload_failures",
            "How often a bad configuration was refused.",
            value=failures,
        )
    policy = {"policy": text(report, "policy"), "on_drift": text(report, "on_drift")}
    yield InfoMetricFamily("ksmd_ctl_policy", "What the service does about the knobs.", value=policy)
    writers = report.get("writers")
    if isinstance(writers, list | tuple):
        yield from _gauge("ksmd_ctl_other_writers", "Others that are known to write the knobs.", len(writers))
    failed = GaugeMetricFamily("ksmd_ctl_failed_readings", "Fields that could not be read.", labels=["kind"])
    kinds = [text(part(report, "errors", name), "kind") for name in part(report, "errors")]
    for kind in _FAILURES:
        failed.add_metric([kind], kinds.count(kind))
    yield failed


def _knobs(report: Mapping[str, object]) -> Iterator[Metric]:
    drift = CounterMetricFamily("ksmd_ctl_drift", "How often somebody else changed a managed knob.", labels=["knob"])
    drifted = GaugeMetricFamily("ksmd_ctl_knob_drifted", "1 if a knob is not as it is wanted.", labels=["knob"])
    pending = GaugeMetricFamily(
        "ksmd_ctl_knob_pending",
        "1 if a knob can't be as wanted before everything was un-merged.",
        labels=["knob"],
    )
    knobs = part(report, "knobs")
    for name in knobs:
        knob = part(knobs, name)
        state = text(knob, "state")
        if state in ("", "unmanaged"):
            continue
        drift.add_metric([name], number(knob, "drift_total") or 0)
        drifted.add_metric([name], state == "drifted")
        pending.add_metric([name], state == "pending")
    for family in (drift, drifted, pending):
        if family.samples:
            yield family
