# SPDX-License-Identifier: GPL-2.0-or-later
"""What the history holds: events, and means of samples. Times are Unix seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path


class Kind(StrEnum):
    """Kinds of events, as ``--kind`` takes them."""

    FOREIGN = "foreign"
    KNOB = "knob"
    TRANSACTION = "transaction"
    POLICY = "policy"
    CONFIGURATION = "configuration"
    DOMAIN = "domain"
    RECOVERY = "recovery"
    SERVICE = "service"


#: What each kind is, for people.
KINDS: Mapping[Kind, str] = {
    Kind.FOREIGN: "knobs that others changed",
    Kind.KNOB: "knobs that the service held, gave up or restored, or could not write",
    Kind.TRANSACTION: "transactions, with who asked for them and their results",
    Kind.POLICY: "what the policy decided",
    Kind.CONFIGURATION: "reloads",
    Kind.DOMAIN: "violations of trust domains, and what was done about them",
    Kind.RECOVERY: "savings that were recovered",
    Kind.SERVICE: "starts and ends, reboots, and what the service itself lacks",
}


class Severity(StrEnum):
    """How much an event matters."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


@dataclass(frozen=True, slots=True)
class Entry:
    """An event.

    :ivar time_seconds: by the host's calendar, which may be set back: entries stand in the order in which they came
    :ivar event: which one of its kind, as in ``drift``
    :ivar who: who did it, or programs that are known to do that and ran then; empty for the service itself or unknown
    :ivar fields: as in the journal, by names without KSMD_
    :ivar boot_id: the boot in which it happened
    """

    time_seconds: float
    kind: Kind
    event: str
    severity: Severity
    text: str
    who: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    boot_id: str = ""


@dataclass(frozen=True, slots=True)
class Means:
    """Means of samples over a time; None for what was not known.

    :ivar time_seconds: when the time began, a multiple of its length
    :ivar ksm_pages: by node
    """

    time_seconds: int
    saved_bytes: float | None = None
    pages_shared: float | None = None
    pages_sharing: float | None = None
    pages_scanned_per_second: float | None = None
    ksmd_cpu_ratio: float | None = None
    ksm_pages: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Query:
    """Which events are asked for: the latest `limit` of those that match. None for any.

    :ivar since_seconds, until_seconds: from and before which time
    """

    since_seconds: float | None = None
    until_seconds: float | None = None
    kinds: frozenset[Kind] | None = None
    limit: int = 1000

    def matches(self, entry: Entry) -> bool:
        """Whether an event is one of them, the limit aside."""
        return (
            (self.since_seconds is None or entry.time_seconds >= self.since_seconds)
            and (self.until_seconds is None or entry.time_seconds < self.until_seconds)
            and (self.kinds is None or entry.kind in self.kinds)
        )


def history_path(directory: Path, kind: str) -> Path:
    """Where the history of a kind of host is."""
    return directory / f"history-{kind}.sqlite"
