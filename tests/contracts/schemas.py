# SPDX-License-Identifier: GPL-2.0-or-later
"""The JSON Schemas of what `--json` prints, made from the dataclasses below: docs/schemas.

    python -m tests.contracts.schemas

A field without a default is always there, and so is each field of a dataclass of the package. Keys may be added to
documents (docs/json.md), so the schemas allow keys that they do not know; a test of what commands print does not.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from ksmd_ctl.config.domains import DomainMode, OnViolation
from ksmd_ctl.config.model import AtStop, OnDrift, PolicyName
from ksmd_ctl.daemon.varlink_wire import ConfigProblem
from ksmd_ctl.doctor import finding
from ksmd_ctl.domains.documents import DomainFigures, DomainReport, OtherDomains
from ksmd_ctl.errors import ExitCode
from ksmd_ctl.history.model import Entry
from ksmd_ctl.host.estimate import Stage
from ksmd_ctl.host.fields import FIELDS
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.memory import KsmDetection, Skipped
from ksmd_ctl.host.operation import Progress
from ksmd_ctl.host.sample import HostKind, NodeMemory, Writer
from ksmd_ctl.host.switching import Method
from ksmd_ctl.policies.policy import Intervention
from ksmd_ctl.replay.comparison import ReplayReport
from ksmd_ctl.reports.estimate import EstimatedDomain, EstimatedGroup, EstimatedOutcome, KsmdCost
from ksmd_ctl.reports.numa import NamedProcess, ProcessReport
from ksmd_ctl.reports.recording import RecordingReport
from ksmd_ctl.reports.report import KnobReport
from ksmd_ctl.reports.sharing import SharingGroup, SharingPair
from ksmd_ctl.scenario.compare import Observation, Verdict
from ksmd_ctl.scenario.session import Fact, Kernel
from ksmd_ctl.switch.persist import Start, Starter
from ksmd_ctl.transactions.duplicates import RecoveryPhase as HealingPhase
from ksmd_ctl.transactions.journal import TransactionReport
from ksmd_ctl.transactions.transaction import Phase, Result

FOLDER = Path(__file__).resolve().parents[2] / "docs/schemas"

FieldName = StrEnum("FieldName", [field.name for field in FIELDS])  # type: ignore[misc]
#: The key of a field that some documents do not have.
ABSENT: Any = None

Number = int | float
KnobValue = int | str


@dataclass
class Host:
    kind: HostKind
    release: str
    simulated: bool
    page_size_bytes: int
    boot_id: str


@dataclass
class Lateness:
    ticks: int
    seconds: Number
    within: Mapping[str, int]


@dataclass
class Daemon:
    pid: int
    version: str
    uptime_seconds: Number
    ticks: int
    tick_lateness: Lateness
    metrics_address: str
    config_files: tuple[str, ...]
    config_digest: str
    cpu_seconds: Number
    resident_bytes: int | None
    reload_error: str
    reload_failures: int
    restart_needed_for: tuple[str, ...]


@dataclass
class ReadingError:
    kind: Literal["absent", "unreadable", "unparsable"]
    text: str


@dataclass
class Derived:
    saved_bytes: int | None
    saved_low_bytes: int | None
    saved_frames_bytes: int | None
    saved_frames_low_bytes: int | None
    split_zero_bytes: int | None
    freed_bytes: int | None
    zero_bytes: int | None
    metadata_bytes: int | None
    stale: bool | None
    stale_text: str
    gone_pages: int | None
    merged_pages: int | None
    pages_scanned_per_second: Number | None
    full_scan_seconds: Number | None
    ksmd_cpu_ratio: Number | None
    rate_seconds: Number | None


@dataclass
class NodeFigures:
    ksm_pages: int | None
    ksm_pages_low: int | None
    ksm_pages_high: int | None
    mapped_pages: int | None
    remote_pages: int | None


@dataclass
class Exposure:
    where: str
    growth_bytes: int
    free_bytes: int
    over_bytes: int
    upper_bound: bool


@dataclass
class Group:
    group: str
    processes: int
    merging_pages: int
    saved_bytes: int | None
    remote_pages: int | None
    related: int
    split_zero_pages: int | None
    share_bytes: int | None
    huge_bytes: int | None
    split_blocks: int | None
    split_block_pages: int | None
    low_yield_blocks: int | None
    low_yield_pages: int | None


@dataclass
class Numa:
    age_seconds: Number | None
    surveys: int
    failures: int
    error: str
    forked_pages: int | None
    split_zero_pages: int | None
    split_zero_low_pages: int | None
    split_since_pages: int | None
    huge_bytes: int | None
    split_blocks: int | None
    split_block_pages: int | None
    low_yield_blocks: int | None
    low_yield_pages: int | None
    nodes: Mapping[int, NodeFigures]
    groups: tuple[Group, ...]
    other: Group | None
    floor_bytes: int
    exposure: tuple[Exposure, ...]
    cgroups_over: int | None
    # Absent as long as no look has succeeded.
    cpu_seconds: Number = ABSENT
    complete: bool | None = ABSENT
    detection: KsmDetection | None = ABSENT
    witness: KsmDetection | None = ABSENT
    lacking: str = ABSENT
    going_offline: bool = ABSENT


@dataclass
class FromTo:
    from_: KnobValue | None
    to: KnobValue


@dataclass
class Carrier:
    pid: int | None
    alive: bool | None


@dataclass(frozen=True)
class Transaction(TransactionReport):
    recovered: Phase | Literal[""]
    # "from" is no name in Python.
    knobs: Mapping[Knob, FromTo]  # type: ignore[assignment]
    # Of one that runs, by whoever can know it.
    progress: Progress = ABSENT
    process: Carrier = ABSENT


@dataclass
class Transactions:
    running: Transaction | None
    last: Transaction | None
    totals: Mapping[Result, int]
    unmerged_pages: int
    home_pages: int
    seconds: Number


@dataclass
class Reason:
    subject: str
    text: str


@dataclass
class PastDecision:
    age_seconds: Number
    phase: str
    text: str
    knobs: Mapping[Knob, KnobValue]


@dataclass
class Decision:
    phase: str
    reasons: tuple[Reason, ...]
    recent: tuple[PastDecision, ...]
    healed: Mapping[str, Intervention]


@dataclass
class BeforeAfter:
    before: int | None
    after: int | None


@dataclass
class HealingRound:
    frames: int
    pages: int
    unmerged: int
    left: Mapping[str, int]
    brought: int | None
    pages_shared: BeforeAfter
    pages_sharing: BeforeAfter


@dataclass
class Healing:
    allowed: bool
    phase: HealingPhase
    unrealised: Mapping[str, int | None]
    left: Mapping[str, int]
    complete: bool | None
    looked_age_seconds: Number | None
    looked_cpu_seconds: Number | None
    looks: int
    failures: int
    rounds: int
    unmerged_pages: int
    healed_pages: int
    text: str
    last: HealingRound | None


@dataclass
class Shared:
    age_seconds: Number | None
    looks: int
    failures: int
    error: str
    cpu_seconds: Number | None
    complete: bool | None
    share: Number | None
    detection: KsmDetection | None
    merged_bytes: int | None
    saved_bytes: int | None
    unseen_frames: int | None
    unread: tuple[int, ...]
    gone: tuple[int, ...]
    left_out: int
    groups: tuple[SharingGroup, ...]
    other: SharingGroup | None
    pairs: tuple[SharingPair, ...]


@dataclass
class ForeignChange:
    knob: Knob
    from_: KnobValue
    to: KnobValue
    held: bool
    writers: tuple[str, ...]
    who: str
    times: int
    age_seconds: Number
    first_age_seconds: Number


@dataclass
class LeftKnob:
    found: KnobValue | None
    at_start: KnobValue
    at_first: KnobValue


@dataclass
class Left:
    pid: int
    config: str
    started_age_seconds: Number
    seen_age_seconds: Number | None
    may_be_restarted: bool
    knobs: Mapping[Knob, LeftKnob]


@dataclass
class AuditFacts:
    mode: DomainMode
    unmatched: str
    on_violation: OnViolation
    age_seconds: Number | None
    cpu_seconds: Number | None
    share: Number | None
    lacking: str
    uncounted_processes: int
    isolated: bool | None


@dataclass
class DomainMeasures:
    stopped: str
    unmerged_pages: int
    moved_pages: int
    text: str


@dataclass
class DomainsSection(AuditFacts):
    audits: int
    failures: int
    error: str
    domains: tuple[DomainFigures, ...]
    others: OtherDomains
    measures: DomainMeasures


@dataclass
class HistoryFacts:
    bytes: int
    waiting: int
    errors: int
    error: str


@dataclass
class History:
    """`history --json`, and io.ksmd-ctl.History."""

    format: Literal[1]
    events: tuple[Entry, ...]
    more: bool


@dataclass
class StartedAgain:
    pid: int


@dataclass
class SwitchedRecord:
    pid: int
    start_time_ticks: int
    name: str
    group: str
    unit: str
    on: bool
    how: str
    by: str
    age_seconds: Number | None
    done: bool
    ended: bool
    again: StartedAgain | None


@dataclass
class Status:
    """`status --json`, and io.ksmd-ctl.Status."""

    format: Literal[1]
    host: Host
    daemon: Daemon | None
    policy: PolicyName | None
    on_drift: OnDrift | None
    at_stop: AtStop | None
    switch_allow: bool | None
    knobs: Mapping[Knob, KnobReport]
    readings: Mapping[FieldName, Number | str]
    errors: Mapping[FieldName, ReadingError]
    derived: Derived
    nodes: Mapping[int, NodeMemory]
    numa: Numa | None
    writers: tuple[Writer, ...]
    transaction: Transactions | None
    decision: Decision | None
    healing: Healing | None
    sharing: Shared | None
    foreign_changes: tuple[ForeignChange, ...] | None
    left_by_service: Left | None
    domains: DomainsSection | None
    history: HistoryFacts | None
    switched: tuple[SwitchedRecord, ...] | None
    switches: Mapping[str, Mapping[str, int]] | None


@dataclass
class Survey:
    age_seconds: Number
    cpu_seconds: Number
    complete: bool | None
    detection: KsmDetection | None
    witness: KsmDetection | None
    lacking: str


@dataclass
class Node(NodeFigures):
    cpus: tuple[int, ...]
    total_bytes: int
    free_bytes: int | None
    distances: Mapping[int, int]


@dataclass
class Nodes:
    """`nodes --json`, and io.ksmd-ctl.Nodes."""

    format: Literal[1]
    host: Host
    survey: Survey
    numa: bool
    going_offline: bool
    nodes: Mapping[int, Node]
    floor_bytes: int
    exposure: tuple[Exposure, ...]


@dataclass
class Domains(AuditFacts):
    """`domains --json`, and io.ksmd-ctl.Domains."""

    format: Literal[1]
    host: Host
    cpusets: bool
    domains: tuple[DomainReport, ...]


@dataclass(frozen=True)
class Unmergeable(NamedProcess):
    pass


@dataclass(frozen=True)
class Process(ProcessReport):
    pass


@dataclass
class ProcessesTotal:
    split_zero_pages: int | None
    share_bytes: int | None
    saved_frames_bytes: int | None
    other_bytes: int | None


@dataclass
class Processes:
    """`processes --json`, and io.ksmd-ctl.Processes."""

    format: Literal[1]
    host: Host
    survey: Survey | None
    stale_text: str
    total: ProcessesTotal
    processes: tuple[Process, ...]
    groups: tuple[Group, ...]
    skipped: tuple[Skipped, ...]
    denied: tuple[int, ...]
    unmergeable: tuple[Unmergeable, ...]
    switched: tuple[SwitchedRecord, ...] | None


@dataclass
class SharingLook:
    age_seconds: Number
    cpu_seconds: Number
    complete: bool
    share: Number
    detection: KsmDetection
    merged_bytes: int
    saved_bytes: int
    unseen_frames: int
    unread: tuple[int, ...]
    gone: tuple[int, ...]
    left_out: int


@dataclass
class Sharing:
    """`sharing --json`, and io.ksmd-ctl.Sharing."""

    format: Literal[1]
    host: Host
    by: Literal["unit", "process", "domain"]
    look: SharingLook
    groups: tuple[SharingGroup, ...]
    pairs: tuple[SharingPair, ...]
    pairs_left_out: int


@dataclass
class LeftOutProcess:
    pid: int
    why: str


@dataclass
class EstimateLook:
    only: str
    stage: Stage
    complete: bool
    interrupted: bool
    seconds: Number
    cpu_seconds: Number
    cpu_share: Number
    interval_seconds: Number
    read_share: Number
    content_share: Number
    unchanged_share: Number | None
    unchanged_low: Number | None
    unchanged_high: Number | None
    processes: int
    left_out: tuple[LeftOutProcess, ...]
    gone: tuple[int, ...]


@dataclass
class Estimate:
    """`estimate --json`."""

    format: Literal[1]
    host: Host
    look: EstimateLook
    max_page_sharing: int
    marked_bytes: int
    freed_already_bytes: int
    outcomes: tuple[EstimatedOutcome, ...]
    unmarked_bytes: int | None
    outcomes_with_unmarked: tuple[EstimatedOutcome, ...] | None
    processes: tuple[EstimatedGroup, ...]
    units: tuple[EstimatedGroup, ...]
    domains: tuple[EstimatedDomain, ...] | None
    ksmd: KsmdCost


@dataclass
class Range:
    from_: int
    to: int


@dataclass(frozen=True)
class Looked(finding.Looked):
    # "from" is no name in Python.
    saved_bytes: Range | None  # type: ignore[assignment]


@dataclass(frozen=True)
class Doctor(finding.Diagnosis):
    """`doctor --json`."""

    format: Literal[1]
    host: Host  # type: ignore[assignment]
    looked: Looked


@dataclass(frozen=True)
class Error(finding.Unknown):
    exit_code: ExitCode


@dataclass
class MoveFailed:
    pid: int
    start_time_ticks: int
    name: str
    error: Error


@dataclass
class Moved:
    pid: int
    start_time_ticks: int
    name: str
    error: None
    already: int
    left: Mapping[str, int]
    moved: int


@dataclass
class WouldMove:
    pid: int
    start_time_ticks: int
    name: str
    error: None
    already: int
    left: Mapping[str, int]
    would_move: Mapping[int, int]
    shared: int
    room: str
    room_bytes: int | None


@dataclass
class MoveTotals:
    moved: int
    would_move: int
    already: int
    left: int


@dataclass
class Migrate:
    """`migrate --json`."""

    format: Literal[1]
    to: int
    dry_run: bool
    cancelled: bool
    untouched: int
    processes: tuple[MoveFailed | Moved | WouldMove, ...]
    totals: MoveTotals


@dataclass
class Set:
    """`set --json`; `transaction` is null where `--recover` found none."""

    format: Literal[1]
    transaction: Transaction | None


@dataclass
class PlanPages:
    merged: int
    processes: int
    at_home: int
    with_home: int
    read_only: int
    homeless: int
    leave_home_by_plain_run_2: int
    size_bytes: int


@dataclass
class Room:
    where: str
    takes_bytes: int
    free_bytes: int
    over_bytes: int
    upper_bound: bool


@dataclass
class SetDryRun:
    """`set --dry-run --json`."""

    format: Literal[1]
    knobs: Mapping[Knob, FromTo]
    run: FromTo
    unmerge: bool
    at_once: bool
    fits: bool
    steps: tuple[str, ...]
    pages: PlanPages
    room: tuple[Room, ...]
    floor_bytes: int
    skipped: Mapping[str, str]
    seconds: Number
    sparse_seconds: Number
    remerge_seconds: Number | None


@dataclass
class UnmergedProcess:
    pid: int
    name: str
    merged: int
    unshared: int
    left: Mapping[str, int]


@dataclass
class Unmerge:
    """`unmerge --json`."""

    format: Literal[1]
    dry_run: bool
    to: int | None
    cancelled: bool
    merges_again: bool
    huge_pages_split: bool
    fits: bool
    floor_bytes: int
    room: tuple[Room, ...]
    processes: tuple[UnmergedProcess, ...]


@dataclass
class SwitchedProcess:
    pid: int
    start_time_ticks: int
    name: str
    group: str
    unit: str
    machine: bool
    start: Start | None
    unmerged: int
    method: Method | None
    how: str
    before: bool | None
    after: bool | None
    mergeable_bytes: int | None
    merging_pages: int | None
    stopped_seconds: Number | None
    left: tuple[str, ...]
    error: Error | None


@dataclass
class PersistentSetting:
    starter: Starter
    name: str
    text: str
    content: str
    path: str
    written: bool


@dataclass
class Merge:
    """`merge --json`."""

    format: Literal[1]
    on: bool
    dry_run: bool
    cancelled: bool
    fits: bool
    floor_bytes: int
    room: tuple[Room, ...]
    processes: tuple[SwitchedProcess, ...]
    persist: tuple[PersistentSetting, ...] = ABSENT


@dataclass
class CollapsedProcess:
    pid: int
    name: str
    huge_before: int
    huge_after: int
    blocks: int
    taken_bytes: int
    kept: int
    left: Mapping[str, int]
    error: str


@dataclass
class Collapse:
    """`collapse --json`."""

    format: Literal[1]
    dry_run: bool
    keep_pages: int
    stopped: str
    processes: tuple[CollapsedProcess, ...]


@dataclass
class Difference:
    at: str
    what: str
    kernel: object = ABSENT
    engine: object = ABSENT


@dataclass
class Scenario:
    file: str
    name: str
    verdict: Verdict
    compared: bool
    reason: str
    observations: Mapping[str, Mapping[str, Observation]]
    differences: tuple[Difference, ...]


@dataclass
class Verify:
    """`verify --json`."""

    format: Literal[1]
    kernel: Kernel | None
    profile: str
    scenarios: tuple[Scenario, ...]
    totals: Mapping[Verdict, int]
    happened: Mapping[Fact, int]


@dataclass
class Metrics:
    """`metrics --json`."""

    format: Literal[1]
    text: str


@dataclass
class CheckConfig:
    """`daemon --check-config --json`."""

    format: Literal[1]
    problems: tuple[ConfigProblem, ...]


@dataclass
class PlannedDomain:
    nodes: tuple[int, ...]
    needed_bytes: int
    room_bytes: int
    moved_bytes: int


@dataclass
class DomainsPlan:
    """`domains plan --json`."""

    format: Literal[1]
    kernel_parameter: str
    split: int
    domains: Mapping[str, PlannedDomain]
    rest: tuple[int, ...]
    costs: tuple[str, ...]
    settings: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]


@dataclass
class AssignedUnit:
    unit: str
    domain: str
    nodes: tuple[int, ...]
    processes: int
    elsewhere: int
    unmerge: tuple[Unmerge, ...] = ABSENT
    migrate: tuple[Migrate, ...] = ABSENT
    errors: tuple[str, ...] = ABSENT


@dataclass
class OutsideProcess:
    pid: int
    name: str


@dataclass
class DomainsAssign:
    """`domains assign --json`."""

    format: Literal[1]
    dry_run: bool
    units: tuple[AssignedUnit, ...]
    outside: tuple[OutsideProcess, ...]
    undone: tuple[str, ...]
    merge_across_nodes: int | None


@dataclass
class Record:
    """`record --json`."""

    format: Literal[1]
    file: str
    seconds: Number
    looks: int
    one_in: int


#: By the name of the file.
DOCUMENTS: dict[str, type] = {
    "status": Status,
    "nodes": Nodes,
    "domains": Domains,
    "domains-plan": DomainsPlan,
    "domains-assign": DomainsAssign,
    "processes": Processes,
    "sharing": Sharing,
    "history": History,
    "estimate": Estimate,
    "doctor": Doctor,
    "migrate": Migrate,
    "set": Set,
    "set-dry-run": SetDryRun,
    "unmerge": Unmerge,
    "collapse": Collapse,
    "record": Record,
    "report": RecordingReport,
    "replay": ReplayReport,
    "merge": Merge,
    "verify": Verify,
    "metrics": Metrics,
    "check-config": CheckConfig,
}

_PLAIN = {int: "integer", str: "string", bool: "boolean", float: "number", type(None): "null", None: "null"}

Schema = dict[str, Any]


def schema(kind: type) -> Schema:
    """The schema of a document."""
    definitions: dict[str, Schema] = {}
    found = _object(kind, definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": (kind.__doc__ or "").rstrip("."),
        **found,
        "$defs": dict(sorted(definitions.items())),
    }


def _object(kind: type, definitions: dict[str, Schema]) -> Schema:
    hints = typing.get_type_hints(kind)
    # "from" is no name in Python.
    names = {field.name: field.name.rstrip("_") for field in dataclasses.fields(kind)}
    # A dataclass of the package is encoded with all its fields.
    whole = kind.__module__ != __name__
    always = [field.name for field in dataclasses.fields(kind) if whole or field.default is dataclasses.MISSING]
    required = [names[name] for name in always]
    properties = {names[name]: _schema(hints[name], definitions) for name in names}
    return {"type": "object", "required": required, "properties": properties}


def _schema(kind: Any, definitions: dict[str, Schema]) -> Schema:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is object:
        return {}
    if kind in _PLAIN:
        return {"type": _PLAIN[kind]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is types.UnionType or origin is typing.Union:
        members = [_schema(member, definitions) for member in arguments]
        if all(member.keys() == {"type"} for member in members):
            return {"type": [member["type"] for member in members]}
        return {"anyOf": members}
    if origin in (tuple, frozenset):
        return {"type": "array", "items": _schema(arguments[0], definitions)}
    if origin is Mapping:
        keys = {"pattern": "^[0-9]+$"} if arguments[0] is int else _schema(arguments[0], definitions)
        named = {} if keys == {"type": "string"} else {"propertyNames": keys}
        return {"type": "object", **named, "additionalProperties": _schema(arguments[1], definitions)}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if kind.__name__ not in definitions:
            # First, because a definition may name itself.
            definitions[kind.__name__] = {}
            definitions[kind.__name__] = _object(kind, definitions)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    return {"enum": [member.value for member in kind]}


def text(kind: type) -> str:
    """A schema as its file has it."""
    return json.dumps(schema(kind), indent=1) + "\n"


def main() -> None:
    for name, kind in DOCUMENTS.items():
        (FOLDER / f"{name}.schema.json").write_text(text(kind))


if __name__ == "__main__":
    main()
