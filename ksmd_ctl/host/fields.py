# SPDX-License-Identifier: GPL-2.0-or-later
"""The one table of what a sample holds. Status, JSON, metrics and pages are renderings of these fields."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ksmd_ctl.host.knobs import KNOBS, KSMD_KNOBS, Knob


class Source(StrEnum):
    """Where a field is read."""

    KNOB = "/sys/kernel/mm/ksm (read and write)"
    KSM = "/sys/kernel/mm/ksm (read only)"
    VMSTAT = "/proc/vmstat"
    SPLITS = "/sys/kernel/mm/transparent_hugepage/hugepages-*/stats/split"
    MEMINFO = "/proc/meminfo"
    PRESSURE = "/proc/pressure/memory"
    CPU_PRESSURE = "/proc/pressure/cpu"
    KSMD = "/proc/PID/stat and status of ksmd"


class Metric(StrEnum):
    GAUGE = "gauge"
    COUNTER = "counter"
    #: a word: exported as one series a choice, the active one 1
    STATE = "stateset"


@dataclass(frozen=True, slots=True)
class Field:
    """One thing that is read.

    :ivar name: the kernel's own name for it, where it has one
    :ivar signed: the kernel prints negative numbers
    :ivar stem: the metric's name without ``_total``
    :ivar scale: the metric is the value times this, for base units
    :ivar since: the kernel release that brought it, empty for always
    """

    name: str
    source: Source
    stem: str
    help: str
    metric: Metric = Metric.GAUGE
    scale: float = 1
    signed: bool = False
    since: str = ""


def _knob(knob: Knob, stem: str, text: str, *, scale: float = 1) -> Field:
    source = Source.KSMD if knob in KSMD_KNOBS else Source.KNOB
    metric = Metric.STATE if KNOBS[knob].words else Metric.GAUGE
    return Field(knob.value, source, stem, text, metric, scale, since=KNOBS[knob].since)


def _ksm(
    name: str,
    stem: str,
    text: str,
    *,
    metric: Metric = Metric.GAUGE,
    signed: bool = False,
    since: str = "",
) -> Field:
    return Field(name, Source.KSM, stem, text, metric, signed=signed, since=since)


def _vmstat(name: str, text: str, *, stem: str = "", metric: Metric = Metric.COUNTER, since: str = "") -> Field:
    return Field(name, Source.VMSTAT, stem or f"ksm_{name}", text, metric, since=since)


FIELDS: tuple[Field, ...] = (
    _knob(Knob.RUN, "ksm_run", "0 stopped, 1 merging, 2 un-merged and stopped; 4 is added while memory goes offline."),
    _knob(Knob.PAGES_TO_SCAN, "ksm_pages_to_scan", "Pages that ksmd scans before it sleeps."),
    _knob(Knob.SLEEP_MILLISECS, "ksm_sleep_seconds", "How long ksmd sleeps between batches.", scale=0.001),
    _knob(Knob.MERGE_ACROSS_NODES, "ksm_merge_across_nodes", "1 if pages of different NUMA nodes may be merged."),
    _knob(Knob.USE_ZERO_PAGES, "ksm_use_zero_pages", "1 if pages of zeroes are mapped to the zero page."),
    _knob(Knob.MAX_PAGE_SHARING, "ksm_max_page_sharing", "Mappings that one KSM page may have."),
    _knob(
        Knob.STABLE_NODE_CHAINS_PRUNE_MILLISECS,
        "ksm_stable_node_chains_prune_seconds",
        "How long a chain of copies is left alone before stale ones are looked for.",
        scale=0.001,
    ),
    _knob(Knob.SMART_SCAN, "ksm_smart_scan", "1 if pages that didn't merge are skipped in later scans."),
    _knob(Knob.ADVISOR_MODE, "ksm_advisor_mode", "The kernel's own advisor."),
    _knob(Knob.ADVISOR_MAX_CPU, "ksm_advisor_max_cpu_ratio", "CPU share of ksmd that the advisor allows.", scale=0.01),
    _knob(
        Knob.ADVISOR_MIN_PAGES_TO_SCAN,
        "ksm_advisor_min_pages_to_scan",
        "pages_to_scan that the advisor begins with.",
    ),
    _knob(
        Knob.ADVISOR_MAX_PAGES_TO_SCAN, "ksm_advisor_max_pages_to_scan", "pages_to_scan that the advisor stays under."
    ),
    _knob(
        Knob.ADVISOR_TARGET_SCAN_TIME,
        "ksm_advisor_target_scan_time_seconds",
        "Duration of a full scan that the advisor aims at.",
    ),
    _ksm("pages_shared", "ksm_pages_shared", "KSM pages in use."),
    _ksm("pages_sharing", "ksm_pages_sharing", "Further mappings of KSM pages: pages saved."),
    _ksm("pages_unshared", "ksm_pages_unshared", "Pages that were unique when last scanned."),
    _ksm("pages_volatile", "ksm_pages_volatile", "Pages that change too quickly, or were skipped."),
    _ksm("full_scans", "ksm_full_scans", "Full scans; begins again after an un-merge.", metric=Metric.COUNTER),
    _ksm("stable_node_chains", "ksm_stable_node_chains", "Contents that have several KSM pages.", since="4.13"),
    _ksm("stable_node_dups", "ksm_stable_node_dups", "KSM pages in chains.", since="4.13"),
    _ksm(
        "general_profit",
        "ksm_profit_bytes",
        "The kernel's own figure of what KSM saves, less ksmd's metadata; may be negative.",
        signed=True,
        since="6.4",
    ),
    _ksm("pages_scanned", "ksm_pages_scanned", "Pages scanned.", metric=Metric.COUNTER, since="6.6"),
    _ksm(
        "ksm_zero_pages",
        "ksm_zero_pages",
        "Mappings of the zero page that ksmd made.",
        signed=True,
        since="6.6",
    ),
    _ksm("pages_skipped", "ksm_pages_skipped", "Pages that smart_scan skipped.", metric=Metric.COUNTER, since="6.7"),
    _vmstat("ksm_swpin_copy", "KSM pages copied at swap-in.", stem="ksm_swpin_copy", since="5.18"),
    _vmstat("cow_ksm", "KSM pages copied because somebody wrote, or un-merged.", stem="ksm_cow", since="5.19"),
    _vmstat("thp_split_page", "Huge pages of the largest size split, by ksmd among others."),
    _vmstat("thp_collapse_alloc", "Huge pages that khugepaged allocated to collapse a range."),
    _vmstat(
        "nr_anon_pages",
        "Anonymous pages that are mapped; merged ones count once.",
        stem="ksm_host_anonymous_pages",
        metric=Metric.GAUGE,
        since="2.6.18",
    ),
    Field(
        "split_folio_pages",
        Source.SPLITS,
        "ksm_split_folio_pages",
        "Pages in huge pages of any size that were split, by ksmd among others; before 6.11 in those of the largest.",
        Metric.COUNTER,
    ),
    Field("mem_total_bytes", Source.MEMINFO, "ksm_host_memory_bytes", "Memory of the host."),
    Field(
        "mem_available_bytes",
        Source.MEMINFO,
        "ksm_host_memory_available_bytes",
        "Memory that is available without swapping.",
    ),
    Field(
        "pressure_some_seconds",
        Source.PRESSURE,
        "ksm_memory_pressure_waiting_seconds",
        "Time in which some task waited for memory.",
        Metric.COUNTER,
        since="4.20",
    ),
    Field(
        "pressure_full_seconds",
        Source.PRESSURE,
        "ksm_memory_pressure_stalled_seconds",
        "Time in which all tasks waited for memory.",
        Metric.COUNTER,
        since="4.20",
    ),
    Field(
        "cpu_pressure_some_seconds",
        Source.CPU_PRESSURE,
        "ksm_cpu_pressure_waiting_seconds",
        "Time in which some task waited for a CPU.",
        Metric.COUNTER,
        since="4.20",
    ),
    Field("ksmd_cpu_seconds", Source.KSMD, "ksm_ksmd_cpu_seconds", "CPU time of ksmd.", Metric.COUNTER),
    Field(
        "ksmd_wait_seconds",
        Source.KSMD,
        "ksm_ksmd_wait_seconds",
        "Time in which ksmd waited for a CPU.",
        Metric.COUNTER,
    ),
    _knob(Knob.KSMD_CPUS, "ksm_ksmd_cpus", "The CPUs that ksmd may run on."),
    _knob(Knob.KSMD_SCHEDULING, "ksm_ksmd_scheduling", "The scheduling class of ksmd."),
    _knob(Knob.KSMD_NICE, "ksm_ksmd_nice", "The nice value of ksmd: -20 is served first, 19 last."),
)

FIELDS_BY_NAME: dict[str, Field] = {field.name: field for field in FIELDS}
