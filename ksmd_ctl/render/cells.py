# SPDX-License-Identifier: GPL-2.0-or-later
"""The figures of a report as samples of metrics: the series, and separately their values.

The values change from one tick to the next, and the series hardly ever do. `ksmd_ctl.render.exposition` makes what
depends on the series only once.

What a report does not have is absent, never 0. No label grows with time: knobs, nodes and kinds of errors are few, and
of virtual machines and units a fixed number is named (`ksmd_ctl.reports.numa`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ksmd_ctl import __version__
from ksmd_ctl.host.fields import FIELDS, Field
from ksmd_ctl.host.fields import Metric as Kind
from ksmd_ctl.host.knobs import KNOBS, Knob
from ksmd_ctl.reports.document import number, part, parts, text


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """A metric.

    :ivar name: without the suffix that its samples have
    :ivar kind: its OpenMetrics type
    :ivar suffix: of its samples: ``_total`` of counters, ``_info`` of infos. A histogram is several of one name
    """

    name: str
    help: str
    kind: str = "gauge"
    suffix: str = ""


Labels = tuple[tuple[str, str], ...]
Series = tuple[Family, Labels]


class Cells:
    """Series, those of one family in a row, and the value of each."""

    __slots__ = ("series", "values")

    def __init__(self) -> None:
        self.series: list[Series] = []
        self.values: list[float] = []

    def add(self, family: Family, value: float | None, labels: Labels = ()) -> None:
        """Add a sample, if there is a value."""
        if value is not None:
            self.series.append((family, labels))
            self.values.append(value)


def cells(report: Mapping[str, object]) -> Cells:
    """The figures of a report (docs/json.md)."""
    found = Cells()
    _host(found, report)
    readings = part(report, "readings")
    for field in FIELDS:
        if field.name in readings:
            _reading(found, field, readings)
    derived = part(report, "derived")
    found.add(_SAVED, number(derived, "saved_bytes"))
    found.add(_SAVED_LOW, number(derived, "saved_low_bytes"))
    found.add(_SAVED_FRAMES, number(derived, "saved_frames_bytes"))
    stale, stale_text = derived.get("stale"), derived.get("stale_text")
    found.add(_STALE, stale if isinstance(stale, bool) else None)
    found.add(_MAYBE_STALE, None if stale_text is None else bool(stale_text))
    found.add(_METADATA, number(derived, "metadata_bytes"))
    nodes = part(report, "nodes")
    for family, name in ((_NODE_TOTAL, "total_bytes"), (_NODE_FREE, "free_bytes")):
        for node in nodes:
            found.add(family, number(part(nodes, node), name), (("node", node),))
    _numa(found, part(report, "numa"))
    _sharing(found, part(report, "sharing"))
    if part(report, "daemon"):
        _service(found, report)
        _domains(found, part(report, "domains"))
        _knobs(found, part(report, "knobs"))
        _transactions(found, part(report, "transaction"))
        _decision(found, part(report, "decision"))
        _healing(found, part(report, "decision", "healed"), part(report, "healing"))
        _switches(found, report)
    return found


def _counter(name: str, help_text: str) -> Family:
    return Family(name, help_text, "counter", "_total")


def _info(name: str, help_text: str) -> Family:
    return Family(name, help_text, "info", "_info")


_SUFFIXES: Final = {Kind.GAUGE: "", Kind.COUNTER: "_total", Kind.STATE: ""}
_FIELDS: Final = {
    field.name: Family(field.stem, field.help, field.metric.value, _SUFFIXES[field.metric]) for field in FIELDS
}

_BUILD: Final = _info("ksmd_ctl_build", "The version of ksmd-ctl.")
_HOST: Final = _info("ksmd_ctl_host", "The host that all ksm_ metrics are of; is it simulated?")
_PAGE_SIZE: Final = Family("ksm_page_size_bytes", "Size of the pages that are counted.")
_SAVED: Final = Family(
    "ksm_saved_bytes",
    "What merging saves by the kernel's counters: merged and zero pages less ksmd's records (docs/saving.md); may be "
    "negative, includes what fork shares, absent while ksm_counters_stale is 1, may be too high while "
    "ksm_counters_maybe_stale is 1.",
)
_SAVED_LOW: Final = Family(
    "ksm_saved_low_bytes",
    "The least that merging saves: ksm_saved_bytes without all merged pages of forks (docs/saving.md).",
)
_SAVED_FRAMES: Final = Family(
    "ksm_saved_frames_bytes",
    "What merging saves in frames: ksm_saved_bytes and ksm_split_zero_pages together (docs/saving.md); absent where "
    "one of both is not known.",
)
_SPLIT_ZERO: Final = Family(
    "ksm_split_zero_pages",
    "Pages of zeroes in mergeable memory that splits of huge pages freed, which no counter of the kernel has; as of "
    "the latest survey (docs/saving.md).",
)
_STALE: Final = Family(
    "ksm_counters_stale",
    "1 if KSM's counters include pages that are not merged any more, as ksmd was stopped meanwhile (docs/saving.md).",
)
_MAYBE_STALE: Final = Family(
    "ksm_counters_maybe_stale",
    "1 if KSM's counters may include pages that are not merged any more, as ksmd is stopped: then ksm_saved_bytes and "
    "the figures of groups may be too high (docs/saving.md).",
)
_METADATA: Final = Family("ksm_metadata_bytes", "Memory that ksmd uses for its records of pages.")
_NODE_TOTAL: Final = Family("ksm_node_memory_bytes", "Memory of a NUMA node.")
_NODE_FREE: Final = Family("ksm_node_memory_free_bytes", "Free memory of a NUMA node.")


def _figures(beginning: str, helps: Mapping[str, str], **names: str) -> tuple[tuple[Family, str], ...]:
    """Metrics whose names begin alike, each with its key in the report.

    :param helps: by that key
    :param names: what follows the beginning where it is not the key
    """
    return tuple((Family(f"{beginning}{names.get(key, key)}", text), key) for key, text in helps.items())


_END: Final = "end of the 95 % interval of ksm_node_pages; equal to it if all were counted."
_NODE_FIGURES: Final = _figures(
    "ksm_node_",
    {
        "ksm_pages": "KSM pages that lie on a node, as of the latest survey.",
        "ksm_pages_low": f"Lower {_END}",
        "ksm_pages_high": f"Upper {_END}",
        "mapped_pages": "Mappings of KSM pages that lie on a node.",
        "remote_pages": "Mappings of KSM pages that lie on a node, by memory that belongs on another one.",
    },
    ksm_pages="pages",
    ksm_pages_low="pages_low",
    ksm_pages_high="pages_high",
)
_GROUP_FIGURES: Final = _figures(
    "ksm_group_",
    {
        "merging_pages": "Merged pages of a virtual machine or unit; all that are not among the 20 that save most are "
        "other.",
        "saved_bytes": "What un-merging a virtual machine or unit alone would take (docs/saving.md); in sum more than "
        "ksm_saved_bytes, of which ksm_group_share_bytes is the part; too much for forks (ksm_group_forked_processes).",
        "share_bytes": "The part of a virtual machine or unit in ksm_saved_frames_bytes: each KSM page is divided "
        "among its mappings (docs/saving.md).",
        "split_zero_pages": "Pages of zeroes of a virtual machine or unit that splits of huge pages freed.",
        "huge_bytes": "Huge pages in mergeable memory of a virtual machine or unit.",
        "split_blocks": "Blocks of 2 MiB of a virtual machine or unit that are no huge page, as pages of them are "
        "merged or were freed by a split (docs/huge-pages.md).",
        "split_block_pages": "Merged pages and freed zero pages in ksm_group_split_blocks.",
        "low_yield_blocks": "Those of ksm_group_split_blocks that have fewer than 32 such pages.",
        "remote_pages": "Merged pages that lie on another node than where they belong.",
        "processes": "Processes of a virtual machine or unit with mergeable memory.",
        "related": "Of these, those that look like forks of one another.",
    },
    related="forked_processes",
)
_CROSS_DOMAIN: Final = Family(
    "ksm_cross_domain_frames",
    "KSM pages that a trust domain shares with anybody else, as of the latest audit; 'each its own' is the sum of all "
    "units and virtual machines that are domains of their own (docs/domains.md).",
)
_ISOLATED: Final = Family(
    "ksm_domain_isolated",
    "1 if a trust domain that has nodes of its own is isolated, 0 if it is not; absent without members.",
)
_AUDIT_AGE: Final = Family("ksmd_ctl_domain_audit_age_seconds", "Time since the latest audit of trust domains.")
_AUDIT_CPU: Final = Family("ksmd_ctl_domain_audit_cpu_seconds", "CPU time of the latest audit of trust domains.")
_AUDITS: Final = _counter("ksmd_ctl_domain_audits", "Audits of trust domains.")
_AUDIT_FAILURES: Final = _counter("ksmd_ctl_domain_audit_failures", "Audits of trust domains that failed.")
_SHARED: Final = Family(
    "ksm_shared_with_others_bytes",
    "Merged memory of a virtual machine or unit in frames that others map as well, as of the latest look, rounded down "
    "to 1 MiB (docs/sharing.md); all that are not among the 20 that share most are other.",
)
_UNSEEN: Final = Family(
    "ksm_unseen_frames", "Merged frames that also somebody maps who could not be looked at, rounded down to 256."
)
_GROWTH: Final = Family(
    "ksm_unmerge_growth_bytes", "How much host and nodes would grow at most if everything un-merged now."
)
_OVER: Final = Family(
    "ksm_unmerge_over_bytes",
    "By how much host and nodes would be over what is free above floor_bytes if everything un-merged now.",
)
_CGROUPS_OVER: Final = Family(
    "ksm_unmerge_over_cgroups",
    "Memory cgroups that would be over their limit, less a reserve, if everything un-merged now.",
)
_CENSUS_AGE: Final = Family("ksmd_ctl_census_age_seconds", "Time since the latest survey of nodes and processes.")
_CENSUS_CPU: Final = Family("ksmd_ctl_census_cpu_seconds", "CPU time of the latest survey of nodes and processes.")
_CENSUS_COMPLETE: Final = Family(
    "ksmd_ctl_census_complete", "1 if all frames were counted, 0 if ksm_node_pages is an estimate."
)
_CENSUSES: Final = _counter("ksmd_ctl_censuses", "Surveys of nodes and processes.")
_CENSUS_FAILURES: Final = _counter("ksmd_ctl_census_failures", "Surveys of nodes and processes that failed.")
_TICKS: Final = _counter("ksmd_ctl_ticks", "Samples that were taken and acted upon.")
_LATE_BUCKET, _LATE_COUNT, _LATE_SUM = (
    Family("ksmd_ctl_tick_lateness_seconds", "Delay of samples after they were due.", "histogram", suffix)
    for suffix in ("_bucket", "_count", "_sum")
)
_UPTIME: Final = Family("ksmd_ctl_uptime_seconds", "Time since the service was started.")
_CONFIG: Final = _info("ksmd_ctl_config", "A digest of all settings in force: equal where the settings are.")
# As prometheus_client and others call them.
_OWN_CPU: Final = _counter("process_cpu_seconds", "CPU time of the service, without that of its broker.")
_OWN_MEMORY: Final = Family("process_resident_memory_bytes", "Resident memory of the service.")
_RELOADED: Final = Family("ksmd_ctl_config_reload_successful", "1 if the last reload of the configuration succeeded.")
_RELOAD_FAILURES: Final = _counter(
    "ksmd_ctl_config_reload_failures", "Reloads that were refused because the configuration is invalid."
)
_HISTORY_BYTES: Final = Family("ksmd_ctl_history_bytes", "How large the file of the history is.")
_HISTORY_ERRORS: Final = _counter(
    "ksmd_ctl_history_errors", "How often the history could not be written or read; the service works without it."
)
_POLICY: Final = _info("ksmd_ctl_policy", "The policy in force.")
_WRITERS: Final = Family("ksmd_ctl_other_writers", "Other programs that are known to write the knobs.")
_FAILED: Final = Family("ksmd_ctl_failed_readings", "Fields that could not be read.")
_DRIFT: Final = _counter("ksmd_ctl_drift", "How often somebody else changed a managed knob.")
_DRIFTED: Final = Family("ksmd_ctl_knob_drifted", "1 if a knob does not have the wanted value.")
_PENDING: Final = Family(
    "ksmd_ctl_knob_pending", "1 if a knob does not have the wanted value yet and waits for something."
)

_TRANSACTIONS: Final = _counter("ksmd_ctl_transactions", "Changes of knobs as transactions, by result.")
_TRANSACTION_SECONDS: Final = _counter("ksmd_ctl_transaction_seconds", "Duration of all transactions.")
_TRANSACTION_RUNNING: Final = Family("ksmd_ctl_transaction_running", "1 while a transaction is under way.")
_UNMERGED: Final = _counter("ksmd_ctl_unmerged_pages", "Pages that transactions have un-merged.")
_BROUGHT_HOME: Final = _counter("ksmd_ctl_home_pages", "Pages that transactions have moved home afterwards.")

_PHASE: Final = _info("ksmd_ctl_policy_phase", "The mode of the policy.")
_PULSES: Final = _counter("ksmd_ctl_healing_pulses", "Temporary changes of knobs to recover lost savings.")
_HEALED: Final = _counter("ksmd_ctl_healing_gained_pages", "Pages merged during these changes.")

_HEALING_UNMERGED: Final = _counter(
    "ksmd_ctl_healing_unmerged_pages", "Pages un-merged to recover duplicate KSM pages."
)
_UNREALISED: Final = Family("ksm_unrealised_pages", "Pages that could be merged and are not, by reason, where known.")

_SWITCHES: Final = _counter(
    "ksmd_ctl_switches",
    "Processes that the service was to switch merging on or off for, by method and result: done, left (a part is not "
    "switched), failed (auto: no method worked).",
)
_SWITCHED_OFF: Final = Family("ksmd_ctl_switched_off_processes", "Processes that merging was switched off for.")
_STARTED_AGAIN: Final = Family(
    "ksmd_ctl_started_again_processes",
    "Processes that are mergeable, and were switched off before they started again (docs/switching.md).",
)

# The errors of fields that this kernel has.
_FAILURES: Final = ("unreadable", "unparsable")


def _host(found: Cells, report: Mapping[str, object]) -> None:
    found.add(_BUILD, 1, (("version", __version__),))
    host = part(report, "host")
    simulated = "true" if host.get("simulated") else "false"
    labels = (("kind", text(host, "kind")), ("release", text(host, "release")), ("simulated", simulated))
    found.add(_HOST, 1, labels)
    found.add(_PAGE_SIZE, number(host, "page_size_bytes"))


def _numa(found: Cells, numa: Mapping[str, object]) -> None:
    if not numa:
        return
    found.add(_SPLIT_ZERO, number(numa, "split_zero_pages"))
    nodes = part(numa, "nodes")
    for family, name in _NODE_FIGURES:
        for node in nodes:
            found.add(family, number(part(nodes, node), name), (("node", node),))
    groups = parts(numa, "groups")
    for family, name in _GROUP_FIGURES:
        for group in (*groups, part(numa, "other")):
            label = text(group, "group")
            if label:
                found.add(family, number(group, name), (("group", label),))
    places = parts(numa, "exposure")
    for family, name in ((_GROWTH, "growth_bytes"), (_OVER, "over_bytes")):
        for place in places:
            where = text(place, "where")
            # The paths of cgroups come and go.
            if where and not where.startswith("/"):
                found.add(family, number(place, name), (("place", where),))
    found.add(_CGROUPS_OVER, number(numa, "cgroups_over"))
    found.add(_CENSUS_AGE, number(numa, "age_seconds"))
    found.add(_CENSUS_CPU, number(numa, "cpu_seconds"))
    complete = numa.get("complete")
    found.add(_CENSUS_COMPLETE, complete if isinstance(complete, bool) else None)
    found.add(_CENSUSES, number(numa, "surveys"))
    found.add(_CENSUS_FAILURES, number(numa, "failures"))


def _domains(found: Cells, domains: Mapping[str, object]) -> None:
    if not domains:
        return
    configured, others = parts(domains, "domains"), part(domains, "others")
    for one in configured:
        found.add(_CROSS_DOMAIN, number(one, "shared_frames"), (("domain", text(one, "domain")),))
    if number(others, "domains"):
        found.add(_CROSS_DOMAIN, number(others, "shared_frames"), (("domain", text(domains, "unmatched")),))
    for one in configured:
        verdict = text(one, "verdict")
        if one.get("nodes") and verdict in ("isolated", "not isolated"):
            found.add(_ISOLATED, verdict == "isolated", (("domain", text(one, "domain")),))
    found.add(_AUDIT_AGE, number(domains, "age_seconds"))
    found.add(_AUDIT_CPU, number(domains, "cpu_seconds"))
    found.add(_AUDITS, number(domains, "audits"))
    found.add(_AUDIT_FAILURES, number(domains, "failures"))


def _sharing(found: Cells, sharing: Mapping[str, object]) -> None:
    for group in (*parts(sharing, "groups"), part(sharing, "other")):
        if label := text(group, "group"):
            found.add(_SHARED, number(group, "shared_bytes"), (("group", label),))
    found.add(_UNSEEN, number(sharing, "unseen_frames"))


def _reading(found: Cells, field: Field, readings: Mapping[str, object]) -> None:
    family = _FIELDS[field.name]
    if field.metric is Kind.STATE:
        active = text(readings, field.name)
        if active:
            # A kernel may know words that the table doesn't. OpenMetrics wants the metric's own name as the label.
            for word in dict.fromkeys((*KNOBS[Knob(field.name)].choices, active)):
                found.add(family, word == active, ((field.stem, word),))
        return
    value = number(readings, field.name)
    if value is not None and field.scale != 1:
        # 70 / 100 is 0.7, and 70 * 0.01 is not.
        value /= 1 / field.scale
    found.add(family, value)


def _service(found: Cells, report: Mapping[str, object]) -> None:
    daemon = part(report, "daemon")
    found.add(_TICKS, number(daemon, "ticks"))
    late = part(daemon, "tick_lateness")
    within = part(late, "within")
    for bound in within:
        found.add(_LATE_BUCKET, number(within, bound), (("le", bound),))
    found.add(_LATE_BUCKET, number(late, "ticks"), (("le", "+Inf"),))
    found.add(_LATE_COUNT, number(late, "ticks"))
    found.add(_LATE_SUM, number(late, "seconds"))
    found.add(_UPTIME, number(daemon, "uptime_seconds"))
    found.add(_OWN_CPU, number(daemon, "cpu_seconds"))
    found.add(_OWN_MEMORY, number(daemon, "resident_bytes"))
    if digest := text(daemon, "config_digest"):
        found.add(_CONFIG, 1, (("digest", digest),))
    found.add(_RELOADED, not daemon.get("reload_error"))
    found.add(_RELOAD_FAILURES, number(daemon, "reload_failures"))
    history = part(report, "history")
    found.add(_HISTORY_BYTES, number(history, "bytes"))
    found.add(_HISTORY_ERRORS, number(history, "errors"))
    found.add(_POLICY, 1, (("on_drift", text(report, "on_drift")), ("policy", text(report, "policy"))))
    writers = report.get("writers")
    if isinstance(writers, list | tuple):
        found.add(_WRITERS, len(writers))
    errors = part(report, "errors")
    kinds = [text(part(errors, name), "kind") for name in errors]
    for kind in _FAILURES:
        found.add(_FAILED, kinds.count(kind), (("kind", kind),))


def _knobs(found: Cells, knobs: Mapping[str, object]) -> None:
    states = {name: text(part(knobs, name), "state") for name in knobs}
    managed = {name: state for name, state in states.items() if state not in ("", "unmanaged")}
    for name in managed:
        found.add(_DRIFT, number(part(knobs, name), "drift_total") or 0, (("knob", name),))
    for family, wanted in ((_DRIFTED, "drifted"), (_PENDING, "pending")):
        for name, state in managed.items():
            found.add(family, state == wanted, (("knob", name),))


def _transactions(found: Cells, transaction: Mapping[str, object]) -> None:
    totals = part(transaction, "totals")
    for result in totals:
        found.add(_TRANSACTIONS, number(totals, result), (("result", result),))
    if totals:
        found.add(_TRANSACTION_SECONDS, number(transaction, "seconds"))
        found.add(_TRANSACTION_RUNNING, bool(part(transaction, "running")))
        found.add(_UNMERGED, number(transaction, "unmerged_pages"))
        found.add(_BROUGHT_HOME, number(transaction, "home_pages"))


def _decision(found: Cells, decision: Mapping[str, object]) -> None:
    phase = text(decision, "phase")
    if phase:
        found.add(_PHASE, 1, (("phase", phase),))


def _healing(found: Cells, pulsed: Mapping[str, object], healing: Mapping[str, object]) -> None:
    for kind in pulsed:
        found.add(_PULSES, number(part(pulsed, kind), "pulses"), (("reason", kind),))
    for kind in pulsed:
        found.add(_HEALED, number(part(pulsed, kind), "pages"), (("reason", kind),))
    found.add(_HEALED, number(healing, "healed_pages"), (("reason", "twins"),))
    found.add(_HEALING_UNMERGED, number(healing, "unmerged_pages"))
    unrealised = part(healing, "unrealised")
    for reason in unrealised:
        found.add(_UNREALISED, number(unrealised, reason), (("reason", reason),))


def _switches(found: Cells, report: Mapping[str, object]) -> None:
    switches, switched = part(report, "switches"), parts(report, "switched")
    for method in switches:
        results = part(switches, method)
        for result in results:
            found.add(_SWITCHES, number(results, result), (("method", method), ("result", result)))
    if switches:
        off = [one for one in switched if not one.get("on")]
        found.add(_SWITCHED_OFF, sum(bool(one.get("done")) and not one.get("ended") for one in off))
        found.add(_STARTED_AGAIN, sum(bool(part(one, "again")) for one in off))
