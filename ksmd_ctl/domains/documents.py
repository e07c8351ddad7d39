# SPDX-License-Identifier: GPL-2.0-or-later
"""The documents that are made of an audit: ``ksmd-ctl domains --json``, and what a report has of it (docs/json.md).

Who shares a page with whom depends on contents. So whoever is not root gets counts that are rounded (docs/security.md):
up, so that what is shared is never shown as nothing. But with whom is told only where it is much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final

from ksmd_ctl.codec import encode, encode_fields
from ksmd_ctl.config.domains import Domains
from ksmd_ctl.domains.audit import Audit, DomainAudit, Stray, Verdict, Violation
from ksmd_ctl.host.sample import HostIdentity
from ksmd_ctl.reports.numa import host_document

FORMAT: Final = 1


@dataclass(frozen=True, slots=True)
class DomainFigures:
    """What a report has of a domain. What could not be counted is null."""

    domain: str
    configured: bool
    nodes: tuple[int, ...]
    verdict: Verdict
    reasons: tuple[Violation, ...]
    processes: int
    resident_bytes: int
    elsewhere_bytes: int | None
    merged_pages: int | None
    saved_bytes: int | None
    saved_alone_bytes: int | None
    shared_frames: int | None
    shared_frames_low: int | None
    shared_frames_high: int | None
    forked_frames: int | None


@dataclass(frozen=True, slots=True)
class DomainReport(DomainFigures):
    """What the document of an audit has of a domain."""

    units: tuple[str, ...]
    shared_with: Mapping[str, int]
    strays: tuple[Stray, ...]
    intruders: tuple[Stray, ...]


@dataclass(frozen=True, slots=True)
class OtherDomains:
    """Units and virtual machines that are domains of their own, together.

    :ivar shared_frames: frames that each shares with anybody else, added up; null where that could not be counted
    """

    domains: int
    not_isolated: int
    shared_frames: int | None


def domains_document(identity: HostIdentity, audit: Audit, now: float, *, round_pages: int = 1) -> dict[str, object]:
    """The document of an audit.

    :param round_pages: counts that depend on contents are rounded up to multiples of this
    """
    page = identity.page_size_bytes
    return {
        "format": FORMAT,
        "host": host_document(identity),
        **_settings(audit.config),
        **_facts(audit, now),
        "cpusets": audit.cpusets,
        "domains": [encode_fields(_report(one, page, round_pages)) for one in audit.domains],
    }


def domains_section(
    config: Domains, audit: Audit | None, now: float, page_size_bytes: int, round_pages: int
) -> dict[str, object]:
    """What a report has of the latest audit; without one there are no domains in it."""
    found = () if audit is None else audit.domains
    configured = [_report(one, page_size_bytes, round_pages) for one in found if one.configured]
    names = [field.name for field in fields(DomainFigures)]
    return {
        **_settings(config),
        **_facts(audit, now),
        "domains": [{name: encode(getattr(one, name)) for name in names} for one in configured],
        "others": encode_fields(_others([one for one in found if not one.configured], round_pages)),
    }


def _settings(config: Domains) -> dict[str, object]:
    return {
        "mode": config.mode.value,
        "unmatched": config.unmatched,
        "on_violation": config.on_violation.value,
    }


def _facts(audit: Audit | None, now: float) -> dict[str, object]:
    return {
        "age_seconds": None if audit is None else max(0.0, now - audit.time_seconds),
        "cpu_seconds": None if audit is None else audit.cpu_seconds,
        "share": None if audit is None else audit.share,
        "lacking": "" if audit is None else audit.lacking,
        "uncounted_processes": 0 if audit is None else audit.uncounted,
        "isolated": None if audit is None else audit.isolated,
    }


def _report(one: DomainAudit, page: int, step: int) -> DomainReport:
    found = one.figures

    def count(pages: float) -> int:
        return math.ceil(pages / step) * step

    return DomainReport(
        domain=one.name,
        configured=one.configured,
        nodes=tuple(sorted(one.nodes)),
        verdict=one.verdict,
        reasons=one.reasons,
        processes=one.processes,
        resident_bytes=one.resident_pages * page,
        elsewhere_bytes=one.elsewhere_pages * page if one.nodes else None,
        merged_pages=None if found is None else count(found.merged_pages),
        saved_bytes=None if found is None else count(round(found.saved_pages)) * page,
        saved_alone_bytes=None if found is None else count(found.saved_alone_pages) * page,
        shared_frames=None if found is None else count(found.shared_frames),
        shared_frames_low=None if found is None else count(found.shared_low),
        shared_frames_high=None if found is None else count(found.shared_high),
        forked_frames=None if found is None else count(found.forked_frames),
        units=one.units,
        # With whom is more than that there is somebody: so down, as in who shares with whom.
        shared_with={name: frames // step * step for name, frames in one.shared_with.items() if frames >= step},
        strays=one.strays,
        intruders=one.intruders,
    )


def _others(found: list[DomainAudit], step: int) -> OtherDomains:
    shared = [one.shared_frames for one in found]
    known = [frames for frames in shared if frames is not None]
    return OtherDomains(
        domains=len(found),
        not_isolated=sum(one.verdict is Verdict.NOT_ISOLATED for one in found),
        shared_frames=math.ceil(sum(known) / step) * step if len(known) == len(shared) else None,
    )
