# SPDX-License-Identifier: GPL-2.0-or-later
"""What the doctor says; as JSON it is the document of docs/json.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How bad it is; what is worse comes first."""

    BLOCKS = "blocks merging"
    LOSES = "loses saving"
    COSTS = "costs"
    NOTE = "note"

    @property
    def rank(self) -> int:
        """0 for the worst."""
        return list(Severity).index(self)


class Code(StrEnum):
    """Every finding there is, by the name that programs know it by."""

    KSM_ABSENT = "ksm-absent"
    KSM_OFF = "ksm-off"
    POLICY_OBSERVES = "policy-observes"
    POLICY_WAITS = "policy-waits"
    KSMTUNED_WAITS = "ksmtuned-waits"
    KEPT_OFF = "kept-off"
    MEMORY_OFFLINE = "memory-offline"
    NOTHING_SCANNED = "nothing-scanned"
    LONG_SLEEP = "long-sleep"
    ADVISOR_CRAWL = "advisor-crawl"
    SLOW_SCAN = "slow-scan"
    NOTHING_MERGEABLE = "nothing-mergeable"
    MEMORY_KSM = "memory-ksm"
    SHARED_MEMORY = "shared-memory"
    HUGETLB = "hugetlb"
    PINNED = "pinned"
    ENCRYPTED = "encrypted"
    NOT_ASKED = "not-asked"
    USERFAULTFD = "userfaultfd"
    MIGRATING = "migrating"
    SWAPPED = "swapped"
    FILE_PAGES = "file-pages"
    MANY_MAPPINGS = "many-mappings"
    LONG_RMAP_WALKS = "long-rmap-walks"
    SMART_SCAN = "smart-scan"
    TWINS = "twins"
    SHARING_LIMIT = "sharing-limit"
    HELD_PAGES = "held-pages"
    KHUGEPAGED = "khugepaged"
    SLOW_SPLITS = "slow-splits"
    SWAP_COPIES = "swap-copies"
    KNOB_PENDING = "knob-pending"
    KNOB_FAILED = "knob-failed"
    KSMD_REFUSED = "ksmd-refused"
    CONFIG_REFUSED = "config-refused"
    TRANSACTION_LEFT = "transaction-left"
    TRANSACTION_RUNS = "transaction-runs"
    LEFT_BEHIND = "left-behind"
    SERVICE_DIED = "service-died"
    SPARSE_MAPPING = "sparse-mapping"
    NO_ROOM = "no-room"
    DOMAINS_SHARE = "domains-share"
    REMOTE_PAGES = "remote-pages"
    PROCESSES_HIDDEN = "processes-hidden"
    KNOBS_READ_ONLY = "knobs-read-only"
    LIMITS_HIDDEN = "limits-hidden"
    NO_SYSTEMD = "no-systemd"
    TWO_MANAGERS = "two-managers"
    OTHER_WRITER = "other-writer"
    VIRT_HANDLER = "virt-handler"
    COSTS_MORE = "costs-more"
    LOSING_PROCESSES = "losing-processes"
    DEAR_SCANNING = "dear-scanning"
    HOLES_WALKED = "holes-walked"
    HUGE_PAGES_SPLIT = "huge-pages-split"
    FORKED = "forked"
    ZERO_PAGES = "zero-pages"
    SPLIT_ZEROES = "split-zeroes"
    SERVICE_BLIND = "service-blind"
    UNSEEN = "unseen"
    KPAGEFLAGS = "kpageflags"


@dataclass(frozen=True, slots=True)
class Figure:
    """One thing that was read.

    :ivar name: the field's name, or what it is in words
    :ivar value: exact; a text where it is none of numbers
    :ivar unit: ``pages``, ``bytes``, ``seconds``, ``ratio``, ``a second``; empty for a bare number or a text
    :ivar source: where it was read
    """

    name: str
    value: int | float | str
    source: str
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is the matter.

    :ivar title: what, as a sentence without a full stop
    :ivar evidence: what it was seen by
    :ivar advice: what to do about it, and what that means
    :ivar command: to copy; empty where there is none
    """

    code: Code
    severity: Severity
    title: str
    evidence: tuple[Figure, ...]
    advice: str
    command: str = ""

    @classmethod
    def of(
        cls, code: Code, severity: Severity, title: str, advice: str, *evidence: Figure | None, command: str = ""
    ) -> Finding:
        """A finding; what is None of the evidence is left out."""
        return cls(code, severity, title, tuple(one for one in evidence if one is not None), advice, command)


@dataclass(frozen=True, slots=True)
class Unknown:
    """Something that could not be looked at: what, why, and what would help."""

    what: str
    why: str
    hint: str


@dataclass(frozen=True, slots=True)
class Contents:
    """Contents of memory that were compared; `apart` counts pages that equal another and are not merged with it."""

    mergeable_pages: int
    frames: int
    apart: int
    complete: bool
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class Looked:
    """What the doctor looked at.

    :ivar note: where the report is from, empty where it is from the service
    :ivar saved_bytes: ``from`` and ``to`` by the kernel's count, None where it isn't known
    :ivar split_zero_bytes: what splits of huge pages freed beside that, None where no process could be looked at
    :ivar processes: those with mergeable memory, None where they could not be had
    :ivar contents: None where they were not compared
    """

    seconds: float
    service: bool
    note: str
    run: int | None
    merged_pages: int
    saved_bytes: Mapping[str, int] | None
    split_zero_bytes: int | None
    stale_text: str
    processes: int | None
    mergeable_bytes: int
    contents: Contents | None
    unmerged_bytes: int
    unknown: tuple[Unknown, ...]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was looked at, and what is the matter, the worst first.

    :ivar host: as every document has it
    :ivar healthy: there are notes at most
    """

    format: int
    host: Mapping[str, object]
    healthy: bool
    looked: Looked
    findings: tuple[Finding, ...]
