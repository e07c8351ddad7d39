# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes the Grafana dashboards, that of chosen hosts and that of a fleet:

    python3 packaging/grafana/dashboard.py > packaging/grafana/ksmd-ctl.json
    python3 packaging/grafana/dashboard.py fleet > packaging/grafana/ksmd-ctl-fleet.json

Grafana's own builder library has one class for each kind of panel and an epoch for a version; for dashboards of three
kinds of panel that is more to keep up with than the schema itself, of which only what differs from the default is
written here. A test holds files and this program together, and every metric against those that are exported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Panel", "dashboard"]

#: Of whatever is chosen at the top of the dashboard.
HOST = '{job=~"$job",instance=~"$instance"}'
_PLACE = 'cluster=~"$cluster",topology_kubernetes_io_zone=~"$zone",node_pool=~"$pool"'
FLEET = f'{{job=~"$job",{_PLACE}}}'

_COLUMNS = 24


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel.

    :ivar queries: PromQL, and what its line is called; ``HOST`` in it stands for the chosen hosts
    :ivar unit: Grafana's name of the unit
    :ivar stat: a single figure, and no lines
    :ivar table: what a table calls the values of the only query; empty for no table
    :ivar mappings: words to show for a value
    :ivar red_from: a single figure is red from here on, and green below
    """

    title: str
    queries: Sequence[tuple[str, str]]
    unit: str = "short"
    help: str = ""
    stat: bool = False
    table: str = ""
    stacked: bool = False
    mappings: dict[str, str] = field(default_factory=dict)
    red_from: float | None = None


# In frames, where they are known.
_SAVED = "(ksm_saved_frames_bytesHOST or ksm_saved_bytesHOST)"

Rows = Sequence[tuple[str, int, Sequence[Panel]]]

ROWS: Rows = (
    (
        "Now",
        4,
        (
            Panel("KSM", [("ksm_runHOST", "{{instance}}")], stat=True, mappings={"0": "stopped", "1": "merging"}),
            Panel("Saved", [(_SAVED, "{{instance}}")], "bytes", stat=True),
            Panel(
                "Saved, of the host's memory",
                [(f"{_SAVED} / ksm_host_memory_bytesHOST", "{{instance}}")],
                "percentunit",
                stat=True,
            ),
            Panel(
                "Knobs not as wanted",
                [("sum by (instance) (ksmd_ctl_knob_driftedHOST)", "{{instance}}")],
                stat=True,
                red_from=1,
            ),
            Panel(
                "Refused configuration",
                [("1 - ksmd_ctl_config_reload_successfulHOST", "{{instance}}")],
                stat=True,
                mappings={"0": "none", "1": "refused"},
                red_from=1,
            ),
            Panel(
                "Other writers",
                [("ksmd_ctl_other_writersHOST", "{{instance}}")],
                help="Programs that are known to write the same knobs. `ksmd-ctl status` names them.",
                stat=True,
                red_from=1,
            ),
        ),
    ),
    (
        "Saving",
        8,
        (
            Panel(
                "Saved and spent",
                [
                    (_SAVED, "saved {{instance}}"),
                    ("ksm_metadata_bytesHOST", "kept by ksmd {{instance}}"),
                ],
                "bytes",
                "Saved is net of what ksmd keeps about pages. Pages that fork shared anyway count as saved.",
            ),
            Panel(
                "Room, if it were un-merged",
                [
                    ("ksm_host_memory_available_bytesHOST", "available {{instance}}"),
                    (_SAVED, "saved {{instance}}"),
                    ("ksm_unmerge_over_bytesHOST", "over, {{place}} {{instance}}"),
                ],
                "bytes",
                "Where saved is above available, un-merging does not fit.",
            ),
            Panel(
                "Pages",
                [
                    ("ksm_pages_sharingHOST", "sharing {{instance}}"),
                    ("ksm_pages_sharedHOST", "shared {{instance}}"),
                    ("ksm_pages_unsharedHOST", "unshared {{instance}}"),
                    ("ksm_pages_volatileHOST", "volatile {{instance}}"),
                    ("ksm_zero_pagesHOST", "zero pages {{instance}}"),
                    ("ksm_split_zero_pagesHOST", "zero pages freed by splits {{instance}}"),
                ],
            ),
            Panel(
                "Could be merged and is not",
                [("ksm_unrealised_pagesHOST", "{{reason}} {{instance}}")],
                help="Pages, by the reason, where it is known. Healing gets them back where it is allowed.",
            ),
            Panel(
                "Share of the saving by group",
                [("ksm_group_share_bytesHOST or ksm_group_saved_bytesHOST", "{{group}} {{instance}}")],
                "bytes",
                "Virtual machines and units; those that are not among the 20 that save most are other. In sum what the "
                "host saves in frames.",
                stacked=True,
            ),
        ),
    ),
    (
        "NUMA",
        8,
        (
            Panel(
                "KSM pages per node",
                [("ksm_node_pagesHOST", "node {{exported_node}} {{node}} {{instance}}")],
                stacked=True,
            ),
            Panel(
                "Mapped from far away",
                [("ksm_node_remote_pagesHOST", "on node {{exported_node}} {{node}} {{instance}}")],
                help="Mappings of KSM pages by memory that belongs on another node.",
            ),
            Panel(
                "Free memory per node",
                [("ksm_node_memory_free_bytesHOST", "node {{exported_node}} {{node}} {{instance}}")],
                "bytes",
            ),
            Panel(
                "Chains and copies",
                [
                    ("ksm_stable_node_chainsHOST", "chains {{instance}}"),
                    ("ksm_stable_node_dupsHOST", "copies in chains {{instance}}"),
                ],
                help="Contents with several KSM pages: too many mappings for one, or copies that met after a move.",
            ),
        ),
    ),
    (
        "What it costs",
        8,
        (
            Panel("Scan speed", [("rate(ksm_pages_scanned_totalHOST[$__rate_interval])", "{{instance}}")], "cps"),
            Panel(
                "ksmd, of one CPU",
                [("rate(ksm_ksmd_cpu_seconds_totalHOST[$__rate_interval])", "{{instance}}")],
                "percentunit",
            ),
            Panel("Full scans", [("rate(ksm_full_scans_totalHOST[1h]) * 3600", "per hour, {{instance}}")]),
            Panel(
                "Copies",
                [
                    ("rate(ksm_cow_totalHOST[$__rate_interval])", "written to {{instance}}"),
                    ("rate(ksm_swpin_copy_totalHOST[$__rate_interval])", "from swap {{instance}}"),
                ],
                "cps",
                "Merged pages that somebody wrote to or un-merged, and those that came back from swap.",
            ),
            Panel(
                "Waiting for memory",
                [
                    ("rate(ksm_memory_pressure_waiting_seconds_totalHOST[$__rate_interval])", "some task {{instance}}"),
                    ("rate(ksm_memory_pressure_stalled_seconds_totalHOST[$__rate_interval])", "all tasks {{instance}}"),
                ],
                "percentunit",
            ),
            Panel(
                "Huge pages",
                [
                    ("rate(ksm_thp_split_page_totalHOST[$__rate_interval])", "split {{instance}}"),
                    ("rate(ksm_thp_collapse_alloc_totalHOST[$__rate_interval])", "collapsed {{instance}}"),
                ],
                "cps",
            ),
        ),
    ),
    (
        "The service",
        8,
        (
            Panel("Drift", [("increase(ksmd_ctl_drift_totalHOST[$__rate_interval])", "{{knob}} {{instance}}")]),
            Panel(
                "Transactions",
                [("increase(ksmd_ctl_transactions_totalHOST[$__rate_interval])", "{{result}} {{instance}}")],
            ),
            Panel("Waiting for an un-merge", [("ksmd_ctl_knob_pendingHOST", "{{knob}} {{instance}}")]),
            Panel(
                "Knobs of the scan",
                [
                    ("ksm_pages_to_scanHOST", "pages_to_scan {{instance}}"),
                    ("ksm_sleep_secondsHOST * 1000", "sleep_millisecs {{instance}}"),
                ],
            ),
            Panel(
                "The service, of one CPU",
                [("rate(process_cpu_seconds_totalHOST[$__rate_interval])", "{{instance}}")],
                "percentunit",
                "Without its broker.",
            ),
            Panel("Memory of the service", [("process_resident_memory_bytesHOST", "{{instance}}")], "bytes"),
            Panel("Samples", [("rate(ksmd_ctl_ticks_totalHOST[$__rate_interval])", "{{instance}}")], "cps"),
            Panel(
                "Samples come late",
                [
                    (
                        "histogram_quantile(0.99, rate(ksmd_ctl_tick_lateness_seconds_bucketHOST[$__rate_interval]))",
                        "{{instance}}",
                    )
                ],
                "s",
                "By so much at most in 99 of 100 cases: the service was kept from its work, or had no CPU.",
            ),
        ),
    ),
)

# Of many hosts, those that a table has room for.
_MOST = 20
_ALERTS = f'ALERTS{{alertstate="firing",alertname=~"Ksm.*",{_PLACE}}}'


def _table(title: str, query: str, value: str, unit: str = "short", help_text: str = "") -> Panel:
    return Panel(title, [(query, "")], unit, help_text, table=value)


FLEET_ROWS: Rows = (
    (
        "Now",
        4,
        (
            Panel("Hosts that answer", [("sum(upHOST)", "")], stat=True),
            Panel("Hosts that do not", [("sum(1 - upHOST)", "")], stat=True, red_from=1),
            Panel("Saved", [(f"sum({_SAVED})", "")], "bytes", stat=True),
            Panel(
                "Saved, of their memory",
                [(f"sum({_SAVED}) / sum(ksm_host_memory_bytesHOST)", "")],
                "percentunit",
                stat=True,
            ),
            Panel(
                "Hosts with alerts",
                [(f"count(count by (cluster, instance) ({_ALERTS})) or vector(0)", "")],
                help="Of any severity.",
                stat=True,
                red_from=1,
            ),
            Panel(
                "CPUs that ksmd takes", [("sum(rate(ksm_ksmd_cpu_seconds_totalHOST[$__rate_interval]))", "")], stat=True
            ),
        ),
    ),
    (
        "Which nodes save",
        8,
        (
            _table("Those that save most", f"topk({_MOST}, {_SAVED})", "saved", "bytes"),
            _table(
                "Those that save least of their memory",
                f"bottomk({_MOST}, {_SAVED} / ksm_host_memory_bytesHOST)",
                "saved",
                "percentunit",
            ),
            _table(
                "Could be merged and is not",
                f"topk({_MOST}, sum without (reason) (ksm_unrealised_pagesHOST))",
                "pages",
            ),
            Panel("Saved by cluster", [(f"sum by (cluster) ({_SAVED})", "{{cluster}}")], "bytes", stacked=True),
            Panel(
                "Saved by zone",
                [
                    (
                        f"sum by (cluster, topology_kubernetes_io_zone) ({_SAVED})",
                        "{{cluster}} {{topology_kubernetes_io_zone}}",
                    )
                ],
                "bytes",
                stacked=True,
            ),
            Panel(
                "Saved by node pool",
                [(f"sum by (cluster, node_pool) ({_SAVED})", "{{cluster}} {{node_pool}}")],
                "bytes",
                stacked=True,
            ),
        ),
    ),
    (
        "Which nodes are sick",
        8,
        (
            _table("Alerts", _ALERTS, "firing", help_text="docs/alerts.md says what each means and what to do."),
            _table("Not to be scraped", "upHOST == 0", "up"),
            _table("Refused configuration", "ksmd_ctl_config_reload_successfulHOST == 0", "good"),
        ),
    ),
    (
        "Drift",
        8,
        (
            _table("Knobs not as wanted", "ksmd_ctl_knob_driftedHOST == 1", "drifted"),
            _table(
                "Changed by others in the last day",
                f"topk({_MOST}, increase(ksmd_ctl_drift_totalHOST[1d]) > 0)",
                "times",
            ),
            _table("Other programs that write knobs", "ksmd_ctl_other_writersHOST > 0", "programs"),
        ),
    ),
    (
        "Trust domains",
        8,
        (
            _table("Not isolated", "ksm_domain_isolatedHOST == 0", "isolated"),
            _table("Frames shared with others", "ksm_cross_domain_framesHOST > 0", "frames"),
            _table(
                "Audits that failed in an hour", "increase(ksmd_ctl_domain_audit_failures_totalHOST[1h]) > 0", "audits"
            ),
        ),
    ),
    (
        "What the services take",
        8,
        (
            _table(
                "CPU",
                f"topk({_MOST}, rate(process_cpu_seconds_totalHOST[$__rate_interval]))",
                "of one CPU",
                "percentunit",
                "Of the service, without its broker and without ksmd.",
            ),
            _table("Memory", f"topk({_MOST}, process_resident_memory_bytesHOST)", "resident", "bytes"),
            Panel(
                "All together",
                [
                    ("sum(rate(process_cpu_seconds_totalHOST[$__rate_interval]))", "services"),
                    ("sum(rate(ksm_ksmd_cpu_seconds_totalHOST[$__rate_interval]))", "ksmd"),
                ],
                help="CPUs.",
            ),
        ),
    ),
    (
        "Versions",
        8,
        (
            _table("ksmd-ctl", "count by (cluster, version) (ksmd_ctl_build_infoHOST)", "hosts"),
            _table("Kernels", "count by (cluster, release) (ksmd_ctl_host_infoHOST)", "hosts"),
            _table("Policies", "count by (cluster, policy) (ksmd_ctl_policy_infoHOST)", "hosts"),
            _table(
                "Configurations",
                "count by (cluster, digest) (ksmd_ctl_config_infoHOST)",
                "hosts",
                help_text="Hosts with one digest have the same settings, whichever files these are in.",
            ),
        ),
    ),
)


def dashboard(*, fleet: bool = False) -> dict[str, Any]:
    """A dashboard as Grafana imports it, of chosen hosts or of a fleet."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, height, row in FLEET_ROWS if fleet else ROWS:
        panels.append(_place({"type": "row", "title": title, "collapsed": False, "panels": []}, 0, top, _COLUMNS, 1))
        top += 1
        width = max(_COLUMNS // len(row), 8 if len(row) > 4 and height > 4 else 4)
        left = 0
        for panel in row:
            if left + width > _COLUMNS:
                left, top = 0, top + height
            panels.append(_place(_panel(panel, FLEET if fleet else HOST), left, top, width, height))
            left += width
        top += height
    for number, made in enumerate(panels, start=1):
        made["id"] = number
    return {
        "uid": "ksmd-ctl-fleet" if fleet else "ksmd-ctl",
        "title": "Kernel same-page merging, fleet (ksmd-ctl)" if fleet else "Kernel same-page merging (ksmd-ctl)",
        "tags": ["ksm", "numa", "memory"],
        "schemaVersion": 36,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [_source(), _choice("job"), *(_FLEET_CHOICES if fleet else _HOST_CHOICES)]},
        "annotations": {"list": [] if fleet else [_restarts()]},
        "panels": panels,
    }


def _place(panel: dict[str, Any], left: int, top: int, width: int, height: int) -> dict[str, Any]:
    return {**panel, "gridPos": {"x": left, "y": top, "w": width, "h": height}}


def _panel(panel: Panel, chosen: str) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit}
    if panel.mappings:
        options = {value: {"text": text} for value, text in panel.mappings.items()}
        defaults["mappings"] = [{"type": "value", "options": options}]
    if panel.red_from is not None:
        steps = [{"color": "green", "value": None}, {"color": "red", "value": panel.red_from}]
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
    made: dict[str, Any] = {
        "type": "table" if panel.table else "stat" if panel.stat else "timeseries",
        "title": panel.title,
        "description": panel.help,
        "datasource": _DATASOURCE,
        "targets": [_target(panel, index, *query, chosen) for index, query in enumerate(panel.queries)],
    }
    if panel.table:
        defaults["noValue"] = "none"
        hidden = dict.fromkeys(("Time", "__name__", "job", "alertstate"), True)
        columns: dict[str, Any] = {"excludeByName": hidden, "renameByName": {"Value": panel.table}}
        made["transformations"] = [{"id": "organize", "options": columns}]
    elif panel.stat:
        made["options"] = {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "none"}
        if panel.red_from is None:
            defaults["color"] = {"mode": "fixed", "fixedColor": "text"}
    else:
        defaults["custom"] = {"fillOpacity": 10, "stacking": {"mode": "normal" if panel.stacked else "none"}}
        made["options"] = {"tooltip": {"mode": "multi"}, "legend": {"displayMode": "list", "placement": "bottom"}}
    made["fieldConfig"] = {"defaults": defaults, "overrides": []}
    return made


def _target(panel: Panel, index: int, query: str, legend: str, chosen: str) -> dict[str, Any]:
    instant = panel.stat or bool(panel.table)
    return {
        "refId": chr(ord("A") + index),
        "datasource": _DATASOURCE,
        "expr": query.replace("HOST", chosen),
        "legendFormat": legend,
        "instant": instant,
        "range": not instant,
        **({"format": "table"} if panel.table else {}),
    }


_DATASOURCE = {"type": "prometheus", "uid": "$datasource"}


def _source() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}


def _choice(name: str, of: str = "", label: str = "") -> dict[str, Any]:
    # A label that targets may lack: a regular expression that also matches nothing stands for all.
    lacking = {"allValue": ".*"} if label else {}
    return {
        "name": name,
        "type": "query",
        "datasource": _DATASOURCE,
        "query": {"query": f"label_values(ksmd_ctl_build_info{of}, {label or name})", "refId": name},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "current": {"text": "All", "value": "$__all"},
        **lacking,
    }


_HOST_CHOICES = (_choice("instance", '{job=~"$job"}'),)
_FLEET_CHOICES = tuple(
    _choice(name, '{job=~"$job"}', label)
    for name, label in (("cluster", "cluster"), ("zone", "topology_kubernetes_io_zone"), ("pool", "node_pool"))
)


def _restarts() -> dict[str, Any]:
    return {
        "name": "The service started",
        "datasource": _DATASOURCE,
        "enable": True,
        "iconColor": "blue",
        "expr": f"resets(ksmd_ctl_uptime_seconds{HOST}[$__rate_interval]) > 0",
        "titleFormat": "{{instance}}",
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(fleet=sys.argv[1:] == ["fleet"]), indent=1))
