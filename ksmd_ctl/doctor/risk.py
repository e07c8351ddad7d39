# SPDX-License-Identifier: GPL-2.0-or-later
"""What goes wrong at the next change: knobs that wait, what run = 2 would do, pages that are far from home."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Final

from ksmd_ctl.doctor.finding import Code, Figure, Finding, Severity
from ksmd_ctl.doctor.snapshot import NODES, PROCESSES, SERVICE, Snapshot, figures_of, largest
from ksmd_ctl.doctor.switched import full_scan_seconds
from ksmd_ctl.doctor.worth import walk
from ksmd_ctl.host.knobs import KNOBS, KSMD_KNOBS, Knob
from ksmd_ctl.host.memory import ProcessClass
from ksmd_ctl.reports.document import number, part, parts, restore_command, room_said, text
from ksmd_ctl.transactions.plan import SPARSE_SECONDS_PER_GIB

#: A process that is stopped for longer is noticed.
_STILL_SECONDS: Final = 1.0
#: So much away from home is worth a change.
_REMOTE_SHARE: Final = 0.1
_SHARE: Final = 0.01
_JOURNAL: Final = "journal of the knobs"


def knob_pending(seen: Snapshot) -> Iterator[Finding]:
    """A knob that the kernel refuses with EBUSY while pages are merged (mm/ksm.c:merge_across_nodes_store)."""
    for name, knob in seen.knobs("pending"):
        wanted = knob.get("wanted")
        advised = name == Knob.PAGES_TO_SCAN and part(seen.after, "readings").get(Knob.ADVISOR_MODE) == "scan-time"
        unmerge = name in {one.value for one, spec in KNOBS.items() if spec.needs_unmerge}
        yield Finding.of(
            Code.KNOB_PENDING,
            Severity.LOSES,
            f"{name} is not as configured yet",
            "It can be changed only while nothing is merged. A transaction un-merges in small batches, and only "
            "where there is room; the plan says what it takes."
            if unmerge
            else "The kernel's advisor sets it as long as it is on."
            if advised
            else "The service tries again by itself.",
            Figure("wanted", str(wanted), SERVICE),
            seen.figure(name),
            Figure("why", text(knob, "reason") or "unknown", SERVICE),
            seen.figure("pages_shared"),
            command=f"ksmd-ctl set {name}={wanted} --dry-run"
            if unmerge
            else seen.set_command(advisor_mode="none")
            if advised
            else "",
        )


def knob_failed(seen: Snapshot) -> Iterator[Finding]:
    """A knob that the service can't write, or that this kernel lacks."""
    for state, severity, advice in (
        ("failed", Severity.BLOCKS, "The service can't do what it is configured for."),
        ("lacking", Severity.NOTE, "Leave it out of the configuration on this kernel."),
    ):
        for name, knob in seen.knobs(state):
            if name in KSMD_KNOBS:
                continue
            yield Finding.of(
                Code.KNOB_FAILED,
                severity,
                f"{name} can't be set" if state == "failed" else f"{name} is wanted, and this kernel lacks it",
                advice,
                Figure("wanted", str(knob.get("wanted")), SERVICE),
                Figure("why", text(knob, "reason") or "unknown", SERVICE),
                command="systemctl status ksmd-ctl ksmd-ctl-broker.socket" if state == "failed" else "",
            )


def ksmd_refused(seen: Snapshot) -> Iterator[Finding]:
    """How ksmd is scheduled can't be as [ksmd] says, or as the policy chooses."""
    for name, knob in (*seen.knobs("failed"), *seen.knobs("lacking")):
        if name in KSMD_KNOBS:
            yield Finding.of(
                Code.KSMD_REFUSED,
                Severity.COSTS,
                f"{name} can't be set",
                "ksmd runs as before, and may take CPU time from other programs. If the reason can't be removed, name "
                'other CPUs in [ksmd], or what can be set: scheduling = "idle" or "other".',
                Figure("wanted", str(knob.get("wanted")), SERVICE),
                seen.figure(name),
                Figure("why", text(knob, "reason") or "unknown", SERVICE),
            )


def config_refused(seen: Snapshot) -> Iterator[Finding]:
    """The service could not take its latest configuration: the old one stays."""
    error = text(part(seen.after, "daemon"), "reload_error")
    if error:
        yield Finding.of(
            Code.CONFIG_REFUSED,
            Severity.COSTS,
            "The service's new configuration is invalid, and the old one stays in force",
            "Correct it and reload: systemctl reload ksmd-ctl. Until then a restart would fail.",
            Figure("why", error, SERVICE),
            command="ksmd-ctl daemon --check-config",
        )


def _change(running: Mapping[str, object]) -> tuple[Figure, ...]:
    """What a change of knobs is, by its journal."""
    return (
        Figure("knobs", ", ".join(part(running, "knobs")) or "none", SERVICE),
        Figure("phase", text(running, "phase") or "unknown", SERVICE),
        Figure("begun by", text(running, "who") or "unknown", SERVICE),
    )


def transaction_left(seen: Snapshot) -> Iterator[Finding]:
    """A change of knobs whose process was killed half way (docs/transactions.md), or that could not put all back."""
    running, last = seen.begun, part(seen.after, "transaction", "last")
    if running and not seen.changing:
        yield Finding.of(
            Code.TRANSACTION_LEFT,
            Severity.BLOCKS,
            "A change of knobs was begun and not finished: the process that made it was probably killed",
            "Until it has ended, ksmd may be stopped and pages may be un-merged. Starting the service ends it, too.",
            *_change(running),
            command="ksmd-ctl set --recover",
        )
    elif text(last, "result") == "degraded":
        yield Finding.of(
            Code.TRANSACTION_LEFT,
            Severity.COSTS,
            "The last change of knobs could not put everything back",
            "Check which knobs are not as they should be.",
            Figure("why", text(last, "reason") or "unknown", SERVICE),
            Figure("begun by", text(last, "who") or "unknown", SERVICE),
            command="ksmd-ctl status",
        )


def transaction_runs(seen: Snapshot) -> Iterator[Finding]:
    """A change of knobs that is being carried out now: nothing is merged meanwhile, and that is no fault."""
    running = seen.begun
    if seen.changing:
        yield Finding.of(
            Code.TRANSACTION_RUNS,
            Severity.NOTE,
            "A change of knobs is being carried out, and ksmd may be stopped for it",
            "The other findings may change once it is over: run the doctor again then.",
            *_change(running),
            Figure("carried out by", seen.holder, SERVICE) if seen.holder else None,
            command="ksmd-ctl status",
        )


def left_behind(seen: Snapshot) -> Iterator[Finding]:
    """Items of processes that ended stay until ksmd scans them, and keep EBUSY alive (mm/ksm.c:__ksm_exit)."""
    known = sum(one.merging_pages for one in seen.processes)
    left = seen.merged_pages - known
    blind = any(one.what == "processes" for one in seen.unknown)
    if seen.merging or seen.listed is None or blind or left <= _SHARE * seen.merged_pages:
        return
    yield Finding.of(
        Code.LEFT_BEHIND,
        Severity.COSTS,
        "KSM counts merged pages of processes that have ended",
        "ksmd is stopped and has not scanned their memory since. Until it does, the saving is shown too high, and "
        "the kernel refuses merge_across_nodes and max_page_sharing with EBUSY. One full scan is enough (`ksmd-ctl "
        "set` does not need it).",
        seen.figure("pages_shared"),
        seen.figure("pages_sharing"),
        Figure("merged pages of running processes", known, PROCESSES, "pages"),
        seen.figure(Knob.RUN),
        command=seen.pulse_command(Knob.RUN, 1, max(5, math.ceil(2 * (full_scan_seconds(seen) or 0)))),
    )


def sparse_mapping(seen: Snapshot) -> Iterator[Finding]:
    """run = 2 and MADV_UNMERGEABLE walk address space page by page and stop the process (findings F11, break_ksm).

    Not on newer kernels, where the measurement is 0.
    """

    measured = seen.sparse_seconds_per_gib
    rate = SPARSE_SECONDS_PER_GIB if measured is None else measured
    source = "15 ms a GiB, not measured here" if measured is None else "by a measurement on this kernel"

    def still(bytes_of: int) -> float:
        return bytes_of / (1 << 30) * rate

    far = [one for one in seen.processes if still(one.hole_bytes) >= _STILL_SECONDS]
    if not far:
        return
    first, walked = largest(far, "walked_bytes", 1)[0], walk(seen)
    scanning = "" if walked is None or walked.empty else " Scanning is not slower for it on this kernel."
    yield Finding.of(
        Code.SPARSE_MAPPING,
        Severity.NOTE,
        "run = 2 would stop a process for seconds: it has much mergeable address space and little memory in it",
        "Don't write run = 2 by hand: ksmd-ctl un-merges page by page and avoids run = 2 where it can, and the "
        f"plan says so.{scanning} A program that only reserves address space should mark only what it uses.",
        *figures_of(far, "walked_bytes", "bytes", "{}: mergeable address space"),
        Figure("memory in use by the first", first.resident_bytes, PROCESSES, "bytes"),
        Figure("run = 2 would stop it for about", still(first.walked_bytes), source, "seconds"),
        command="ksmd-ctl set merge_across_nodes=0 --dry-run",
    )


def no_room(seen: Snapshot) -> Iterator[Finding]:
    """What would be over if everything un-merged: cgroups whose tenants would be killed (findings F10), nodes, host."""
    places = [one for one in parts(seen.nodes or {}, "exposure") if number(one, "over_bytes")]
    floor = number(seen.nodes or {}, "floor_bytes")
    groups = [one for one in places if text(one, "where").startswith("/")]
    for found, severity, title, advice in (
        (
            groups,
            Severity.COSTS,
            "A memory cgroup would exceed its limit if its merged pages were un-merged",
            "A merged page is charged once, to one cgroup. If its processes write to their merged pages, or anybody "
            "un-merges them, each gets a page of its own, and the OOM killer will act in that cgroup, however much "
            "memory the host has. Raise its limit, or un-merge it while there is room.",
        ),
        (
            [one for one in places if one not in groups],
            Severity.NOTE,
            "The host or a node would run out of memory if all merged pages were un-merged",
            "This is normal where merging saves much. Until there is room, ksmd-ctl refuses changes that need "
            "un-merging; run = 2 by hand would start the OOM killer.",
        ),
    ):
        if found:
            worst = sorted(found, key=lambda one: -(number(one, "over_bytes") or 0))[:3]
            yield Finding.of(
                Code.NO_ROOM,
                severity,
                title,
                advice,
                *(_over(one, floor) for one in worst),
                command="ksmd-ctl nodes",
            )


def _over(place: Mapping[str, object], floor_bytes: float | None) -> Figure:
    by = "over by" if place.get("upper_bound") is False else "over by up to"
    said = room_said(place, floor_bytes, over=False)
    return Figure(f"{said}: {by}", number(place, "over_bytes") or 0, NODES, "bytes")


def remote_pages(seen: Snapshot) -> Iterator[Finding]:
    """Merged pages that lie on another node than those belong to who map them (mm/ksm.c:get_kpfn_nid)."""
    nodes = part(seen.nodes or {}, "nodes")
    pairs = [(number(part(nodes, name), "mapped_pages"), number(part(nodes, name), "remote_pages")) for name in nodes]
    mapped = sum(all_ or 0 for all_, _ in pairs)
    remote = sum(away or 0 for _, away in pairs)
    if len(pairs) < 2 or not mapped or remote < _REMOTE_SHARE * mapped:
        return
    across = seen.reading(Knob.MERGE_ACROSS_NODES) == 1
    movable = [one for one in seen.processes if not one.classes & {ProcessClass.PINNED, ProcessClass.MIGRATING}]
    first = largest(movable, "merging_pages", 1)
    pid = str(first[0].pid) if first else "PID"
    yield Finding.of(
        Code.REMOTE_PAGES,
        Severity.COSTS,
        "Merged pages lie on other nodes than the processes that use them",
        "Each access goes to another node's memory. With merge_across_nodes = 0 every node keeps a copy of its own: "
        "that saves less. The plan says what un-merging for it takes."
        if across
        else "They were moved, or their machine was. Move them home; equal pages may stay separate there (twins).",
        Figure("away from home", remote, NODES, "pages"),
        Figure("share of all mapped merged pages", remote / mapped, NODES, "ratio"),
        seen.figure(Knob.MERGE_ACROSS_NODES),
        command="ksmd-ctl set merge_across_nodes=0 --dry-run"
        if across
        else f"ksmd-ctl migrate --pid {pid} --to NODE --dry-run",
    )


def service_died(seen: Snapshot) -> Iterator[Finding]:
    """No service runs, and one has left knobs changed: nobody holds them or puts them back."""
    left = part(seen.after, "left_by_service")
    if not left:
        return
    soon = left.get("may_be_restarted") is True
    figures = [Figure("pid", str(number(left, "pid")), _JOURNAL)]
    for name, what in (("started_age_seconds", "started"), ("seen_age_seconds", "last seen")):
        age = number(left, name)
        if age is not None:
            figures.append(Figure(what, age, _JOURNAL, "seconds ago"))
    knobs = part(left, "knobs")
    for name in knobs:
        before = part(knobs, name).get("at_start")
        figures.append(Figure(f"{name} was {before} before it, is now", str(part(knobs, name).get("found")), _JOURNAL))
    yield Finding.of(
        Code.SERVICE_DIED,
        Severity.NOTE if soon else Severity.COSTS,
        "A service ended without a stop and left knobs changed"
        + ("; systemd may be starting it again" if soon else "; nobody holds them or puts them back"),
        "Start the service again: it holds them again and puts them back when it stops. Or put back the first state "
        "of this boot now.",
        *figures,
        command=restore_command(left),
    )
