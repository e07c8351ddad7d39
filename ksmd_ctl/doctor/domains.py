# SPDX-License-Identifier: GPL-2.0-or-later
"""Trust domains that are not kept apart, as the service's latest audit found."""

from __future__ import annotations

from collections.abc import Iterator

from ksmd_ctl.doctor.finding import Code, Figure, Finding, Severity
from ksmd_ctl.doctor.snapshot import Snapshot
from ksmd_ctl.reports.document import number, part, parts, text

_DOMAINS = "ksmd-ctl domains"


def domains_share(seen: Snapshot) -> Iterator[Finding]:
    """Memory is shared across trust domains, or nothing prevents it (docs/domains.md)."""
    domains = part(seen.after, "domains")
    if error := text(domains, "error"):
        yield Finding.of(
            Code.DOMAINS_SHARE,
            Severity.COSTS,
            "Nobody knows whether trust domains share memory: the latest audit failed",
            "Metrics and status show what the audit before it found.",
            Figure("why", error, _DOMAINS),
            Figure("failures", number(domains, "failures") or 0, _DOMAINS),
            command=_DOMAINS,
        )
        return
    bad = [one for one in parts(domains, "domains") if text(one, "verdict") == "not isolated"]
    others = part(domains, "others")
    own = number(others, "not_isolated") or 0
    if not bad and not own:
        return
    names = [text(one, "domain") for one in bad] + ([f"{own:.0f} that are domains of their own"] if own else [])
    reasons = [
        Figure(f"{text(one, 'domain')}: {text(reason, 'cause')}", text(reason, "text"), _DOMAINS)
        for one in bad
        for reason in parts(one, "reasons")
    ]
    nodes = text(domains, "mode") == "nodes"
    yield Finding.of(
        Code.DOMAINS_SHARE,
        Severity.COSTS,
        f"Trust domains are not isolated: {', '.join(names)}",
        "What is shared can be told by others from the time that a write takes. "
        + (
            "Confine members to their domain's nodes (AllowedMemoryNodes=), and move what lies elsewhere."
            if nodes
            else 'Domains with nodes of their own are kept apart by mode = "nodes" (docs/domains.md).'
        ),
        *reasons,
        Figure("frames shared by domains of their own", number(others, "shared_frames") or 0, _DOMAINS, "pages")
        if own
        else None,
        command=_DOMAINS,
    )
