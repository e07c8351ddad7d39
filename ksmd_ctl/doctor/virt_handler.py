# SPDX-License-Identifier: GPL-2.0-or-later
"""KubeVirt's virt-handler beside the service: it runs on each node, whether it writes the knobs or not.

What it does follows from pkg/virt-handler/ksm/ksm.go of KubeVirt 1.9. Each three minutes, with ksmConfiguration set and
this node selected, it writes run, and while ksmd is to run sleep_millisecs and pages_to_scan before. Without, it writes
run = 0 while it finds run = 1 and the node's annotation kubevirt.io/ksm-handler-managed is true; at the same time it
sets that to false, so that this happens once, unless the API server refuses it. What it writes without a change of
values can't be seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from ksmd_ctl.doctor.finding import Code, Figure, Finding, Severity
from ksmd_ctl.doctor.snapshot import SERVICE, WRITERS, Snapshot
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.reports.document import number, part, parts, text

#: Its name as a writer (ksmd_ctl.kernel.writers).
NAME: Final = "virt-handler"
#: Three of its intervals, and a minute for the service to notice.
LATELY_SECONDS: Final = 600.0

UNSET: Final = (
    "kubectl -n kubevirt patch kubevirt kubevirt --type=json "
    '-p \'[{"op": "remove", "path": "/spec/configuration/ksmConfiguration"}]\''
)


def virt_handler(seen: Snapshot) -> Iterator[Finding]:
    """Whether KSM was handed over to the service, or only half of it."""
    running = [one for one in seen.writers if one.name == NAME]
    if not running or not seen.manages:
        return
    changes = changes_by(seen)
    figures = [Figure(one.name, "unknown" if one.pid is None else f"pid {one.pid}", WRITERS) for one in running]
    figures += [_figure(change) for change in changes]
    uptime = number(part(seen.after, "daemon"), "uptime_seconds") or 0
    if any(not _stops(change) for change in changes):
        yield Finding.of(
            Code.VIRT_HANDLER,
            Severity.COSTS,
            "KubeVirt's virt-handler still writes the knobs",
            "ksmConfiguration is still set and selects this node: each three minutes both undo each other's work. "
            "Remove it (docs/kubevirt.md).",
            *figures,
            command=UNSET,
        )
    elif changes and sum(int(number(change, "times") or 1) for change in changes) > 1:
        yield Finding.of(
            Code.VIRT_HANDLER,
            Severity.COSTS,
            "KubeVirt's virt-handler switches KSM off again and again",
            "The node's annotation kubevirt.io/ksm-handler-managed is true though ksmConfiguration does not select it: "
            "virt-handler could not change the annotation, or something sets it. Remove it, and look whether "
            "virt-handler may patch nodes.",
            *figures,
            command='kubectl annotate node "$NODE" kubevirt.io/ksm-handler-managed-',
        )
    elif changes:
        yield Finding.of(
            Code.VIRT_HANDLER,
            Severity.NOTE,
            "KubeVirt's virt-handler has switched KSM off once, as it does when ksmConfiguration is removed",
            "That is the end of its work here, if it does not happen again within ten minutes.",
            *figures,
        )
    elif uptime < LATELY_SECONDS:
        yield Finding.of(
            Code.VIRT_HANDLER,
            Severity.NOTE,
            "KubeVirt's virt-handler runs, and it is not known yet whether it writes the knobs",
            "It does so each three minutes while ksmConfiguration selects this node. Look again in ten minutes.",
            *figures,
            Figure("the service runs for", uptime, SERVICE, "seconds"),
        )


def changes_by(seen: Snapshot) -> list[Mapping[str, object]]:
    """What it has changed lately."""
    changes = [change for change in parts(seen.after, "foreign_changes") if _its(change)]
    return [change for change in changes if (number(change, "age_seconds") or 0) <= LATELY_SECONDS]


def _its(change: Mapping[str, object]) -> bool:
    who = text(change, "who")
    writers = change.get("writers")
    return who.startswith(NAME) if who else isinstance(writers, list) and NAME in writers


def _stops(change: Mapping[str, object]) -> bool:
    return change.get("knob") == Knob.RUN and change.get("to") == 0


def _figure(change: Mapping[str, object]) -> Figure:
    name = f"{text(change, 'knob')} was changed from {change.get('from')}"
    return Figure(name, f"to {change.get('to')}, {change.get('times')} times", SERVICE)
