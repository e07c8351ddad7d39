# SPDX-License-Identifier: GPL-2.0-or-later
"""Why nothing merges, or hardly: KSM is not there, is off, waits, sleeps, or crawls."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from ksmd_ctl.doctor.finding import Code, Figure, Finding, Severity
from ksmd_ctl.doctor.others import WAYS, keepers, take_over
from ksmd_ctl.doctor.snapshot import CONTENTS, PROCESSES, SERVICE, WRITERS, Snapshot, source_of
from ksmd_ctl.doctor.worth import holes_walked
from ksmd_ctl.host.knobs import RUN_OFFLINE, Knob
from ksmd_ctl.host.memory import PAGE_ITEM_BYTES
from ksmd_ctl.reports.document import number, part, parts, text

#: What only a kernel with KSM has: counters in /proc/vmstat (5.18, 5.19), and ksmd itself.
_OTHER_FIELDS: Final = ("cow_ksm", "ksm_swpin_copy", "ksmd_cpu_seconds")
#: A full scan that takes longer leaves new memory unmerged for what people notice.
_SLOW_SECONDS: Final = 1800.0
#: What the kernel's own advisor aims at (advisor_target_scan_time).
_TARGET_SECONDS: Final = 200.0
#: ksmd's cost of a unique page in a large tree (findings F18), to say what a speed would take.
_SECONDS_PER_PAGE: Final = 7e-6
_LONG_SLEEP_MILLISECS: Final = 10_000
#: ksmtuned's KSM_THRES_COEF: it merges once less than this share of memory is free.
_KSMTUNED_SHARE: Final = 0.2
_AVAILABLE: Final = source_of("mem_available_bytes")

_CHANNEL: Final = (
    "Merging memory across trust domains is a known side channel; if all mergeable memory here may be merged"
)
_ESTIMATE: Final = "Before that, `ksmd-ctl estimate` as root tells what merging would save here."


def absent(seen: Snapshot) -> Iterator[Finding]:
    """The kernel was built without CONFIG_KSM: mm/ksm.c is not in it, nor is its folder in sysfs. Or that is hidden."""
    error = part(seen.after, "errors", Knob.RUN)
    if text(error, "kind") != "absent":
        return
    others = [name for name in _OTHER_FIELDS if seen.reading(name) is not None]
    if others:
        yield Finding.of(
            Code.KSM_ABSENT,
            Severity.BLOCKS,
            "KSM's directory in sysfs can't be seen from here, but this kernel has KSM",
            "A container or a unit hides it (ProtectKernelTunables=, a mount over /sys). Look from the host itself.",
            Figure("the folder", "missing", seen.figure(Knob.RUN).source),
            *map(seen.figure, others),
            command="findmnt --submounts /sys",
        )
    else:
        yield Finding.of(
            Code.KSM_ABSENT,
            Severity.BLOCKS,
            "This kernel has no KSM",
            "Boot a kernel that was built with CONFIG_KSM=y, as distributions' kernels are.",
            Figure("run", text(error, "text"), seen.figure(Knob.RUN).source),
            command='grep CONFIG_KSM= "/boot/config-$(uname -r)"',
        )


def switched_off(seen: Snapshot) -> Iterator[Finding]:
    """``run`` is 0 or 2 (mm/ksm.c:ksmd_should_run), and who wants it so."""
    run = seen.run
    if run not in (0, 2):
        return
    evidence = [seen.figure(Knob.RUN)]
    if seen.reading("pages_sharing"):
        evidence.append(seen.figure("pages_sharing"))
    if seen.duplicates is not None and seen.duplicates.pages:
        evidence.append(Figure("to be saved at least", seen.duplicates.pages * seen.page, CONTENTS, "bytes"))
    after = ", and everything was un-merged" if run == 2 else ""
    if stopped := text(part(seen.after, "domains", "measures"), "stopped"):
        yield Finding.of(
            Code.KSM_OFF,
            Severity.BLOCKS,
            "KSM is stopped until trust domains are isolated, as on_violation says",
            "Confine the processes that are named to the nodes of their domain; then ksmd runs again by itself.",
            *evidence,
            Figure("why", stopped, SERVICE),
            command="ksmd-ctl domains",
        )
        return
    if seen.manages and seen.policy != "fixed" and seen.wanted(Knob.RUN) in (0, 2):
        yield _policy_waits(seen, evidence)
    elif (kept := _kept_off(seen, evidence)) is not None:
        yield kept
    elif seen.policy == "observe":
        yield Finding.of(
            Code.POLICY_OBSERVES,
            Severity.BLOCKS,
            f"KSM is switched off{after}, and the service only watches",
            f"{_CHANNEL}, have the service switch it on. {_ESTIMATE}",
            *evidence,
            Figure("policy", seen.policy, SERVICE),
            command=seen.configure_command({"policy": "adaptive"}),
        )
    else:
        yield _off(seen, evidence, after)


def _off(seen: Snapshot, evidence: list[Figure], after: str) -> Finding:
    declared = seen.wanted(Knob.RUN)
    if declared is not None:
        evidence.append(Figure("run as configured", str(declared), SERVICE))
    title = f"KSM is switched off{after}" + (", as the configuration wants it" if declared in (0, 2) else "")
    duplicates = seen.duplicates
    if duplicates is not None and duplicates.complete and duplicates.frames:
        # What there is to be saved, against a struct ksm_rmap_item a page: as COSTS_MORE says where it runs.
        there = (duplicates.pages + int(seen.reading("pages_sharing") or 0)) * seen.page
        cost = duplicates.mergeable_pages * PAGE_ITEM_BYTES
        if there <= cost:
            evidence.append(Figure("ksmd would keep about pages", cost, CONTENTS, "bytes"))
            advice = "Leave it off: a comparison of contents shows that it would take more memory than it saves."
            return Finding.of(
                Code.KSM_OFF,
                Severity.NOTE,
                title,
                advice,
                *evidence,
            )
    return Finding.of(
        Code.KSM_OFF,
        Severity.BLOCKS,
        title,
        f"{_CHANNEL}, switch it on. {_ESTIMATE}",
        *evidence,
        command=seen.set_command(run=1),
    )


def _policy_waits(seen: Snapshot, evidence: list[Figure]) -> Finding:
    reasons = parts(part(seen.after, "decision"), "reasons")
    evidence = [*evidence, Figure("policy", seen.policy, SERVICE)]
    evidence += [Figure("it says", text(reason, "text"), SERVICE) for reason in reasons[:1]]
    return Finding.of(
        Code.POLICY_WAITS,
        Severity.BLOCKS,
        f"KSM is switched off by the service's policy, {seen.policy}",
        "The reason is above; the command shows all reasons. Another policy, or other limits for this one, are set "
        "in the configuration.",
        *evidence,
        command="ksmd-ctl status --explain",
    )


def _kept_off(seen: Snapshot, evidence: list[Figure]) -> Finding | None:
    """Another program switches KSM off, and would do it again after whoever switches it on."""
    by = keepers(seen)
    if not by or seen.wanted(Knob.RUN) in (0, 2):
        return None
    names = list(dict.fromkeys(one.name for one in by))
    total, available = seen.reading("mem_total_bytes"), seen.reading("mem_available_bytes")
    known = bool(total) and available is not None
    # ksmtuned's adjust_ksm(): run=0 as long as more than KSM_THRES_COEF percent of memory are free.
    waits = names == ["ksmtuned"] and known and (available or 0) >= _KSMTUNED_SHARE * (total or 0)
    advice, command = take_over(by)
    merge = "; ".join(f"{name}: {WAYS[name].merge}" for name in names)
    # Where it is told from elsewhere to stop, run is set after that.
    here = not command.startswith("kubectl")
    then = "" if seen.wanted(Knob.RUN) is not None else seen.set_command(run=1)
    return Finding.of(
        Code.KSMTUNED_WAITS if waits else Code.KEPT_OFF,
        Severity.BLOCKS,
        "ksmtuned keeps KSM off: it begins once less than 20 % of memory is free"
        if waits
        else f"{' and '.join(names)} {'keeps' if len(names) == 1 else 'keep'} KSM off",
        f"If run = 1 is set by hand, it is set back. {merge[0].upper()}{merge[1:]}. "
        f"To have ksmd-ctl take over: {advice}" + (f" Then: {then}" if then and not here else ""),
        *evidence,
        *(Figure(one.name, "unknown" if one.pid is None else f"pid {one.pid}", WRITERS) for one in by),
        Figure("memory available", (available or 0) / (total or 1), _AVAILABLE, "ratio") if known else None,
        command=f"{command} && {then}" if then and here else command,
    )


def memory_offline(seen: Snapshot) -> Iterator[Finding]:
    """``run`` has 4 added while memory goes offline: mm/ksm.c:wait_while_offlining parks ksmd and who writes run."""
    run = seen.reading(Knob.RUN)
    if run is not None and int(run) & RUN_OFFLINE:
        yield Finding.of(
            Code.MEMORY_OFFLINE,
            Severity.BLOCKS,
            "ksmd waits while memory goes offline",
            "It continues by itself. If this does not end, some pages can't be moved off the memory block that is "
            "to be removed.",
            seen.figure(Knob.RUN),
            command="lsmem --all | grep -v ' online '",
        )


def nothing_scanned(seen: Snapshot) -> Iterator[Finding]:
    """``pages_to_scan`` is 0: mm/ksm.c:ksm_do_scan then returns at once, for ever."""
    # `adaptive` has ksmd rest this way.
    rests = seen.policy == "adaptive" and seen.wanted(Knob.PAGES_TO_SCAN) == 0
    # A service that died during such a rest left it; with another value here the rest of what it left would stay.
    left = Knob.PAGES_TO_SCAN in part(seen.after, "left_by_service", "knobs")
    if seen.merging and seen.reading(Knob.PAGES_TO_SCAN) == 0 and not rests:
        yield Finding.of(
            Code.NOTHING_SCANNED,
            Severity.BLOCKS,
            "ksmd runs and scans no page at all",
            "The service that ended left it so: start the service again, or restore the knobs (service-died)."
            if left
            else "Give it pages to scan.",
            seen.figure(Knob.PAGES_TO_SCAN),
            seen.rise("pages_scanned"),
            command="" if left else _speed_command(seen),
        )


def long_sleep(seen: Snapshot) -> Iterator[Finding]:
    """``sleep_millisecs`` is so long that one batch is far from the next (mm/ksm.c:ksm_scan_thread)."""
    sleep = seen.reading(Knob.SLEEP_MILLISECS)
    # Where this kernel walks empty address space, adaptive has ksmd rest for long after each walk.
    rests = seen.policy == "adaptive" and seen.wanted(Knob.SLEEP_MILLISECS) == sleep
    if seen.merging and sleep is not None and sleep >= _LONG_SLEEP_MILLISECS and not rests:
        yield Finding.of(
            Code.LONG_SLEEP,
            Severity.LOSES,
            "ksmd sleeps for a very long time between two batches",
            "20 ms is the kernel's default; pages_to_scan is the better setting for the speed.",
            seen.figure(Knob.SLEEP_MILLISECS, "ms"),
            seen.figure(Knob.PAGES_TO_SCAN),
            seen.rise("pages_scanned"),
            command=seen.set_command(sleep_millisecs=20),
        )


def full_scan_seconds(seen: Snapshot) -> float | None:
    """How long a full scan takes: as it was seen, else as knobs and memory say; None where nothing is scanned."""
    measured = number(part(seen.after, "derived"), "full_scan_seconds")
    if measured is not None:
        return float(measured)
    batch, sleep = seen.reading(Knob.PAGES_TO_SCAN), seen.reading(Knob.SLEEP_MILLISECS)
    if not batch or sleep is None:
        return None
    return seen.mergeable_pages * (sleep / 1000 / batch + _SECONDS_PER_PAGE)


def advisor_crawl(seen: Snapshot) -> Iterator[Finding]:
    """The kernel's advisor took ksmd's CPU time since boot for that of one scan (findings F12, scan_time_advisor)."""
    batch, least = seen.reading(Knob.PAGES_TO_SCAN), seen.reading(Knob.ADVISOR_MIN_PAGES_TO_SCAN)
    if not seen.merging or not _advised(seen) or batch is None or least is None or batch >= least:
        return
    target = seen.reading(Knob.ADVISOR_TARGET_SCAN_TIME) or _TARGET_SECONDS
    scan = full_scan_seconds(seen)
    if scan is None or scan > 2 * target:
        unmerged = seen.unmerged("advisor")
        yield Finding.of(
            Code.ADVISOR_CRAWL,
            Severity.BLOCKS,
            "The kernel's advisor made ksmd very slow",
            "Its first calculation takes all the CPU time that ksmd has used since boot for that of one scan, and "
            "it calculates again only after a full scan. Switch it off and set the speed from outside.",
            seen.figure(Knob.ADVISOR_MODE),
            seen.figure(Knob.PAGES_TO_SCAN),
            seen.figure(Knob.ADVISOR_MIN_PAGES_TO_SCAN),
            seen.rise("full_scans"),
            Figure("identical pages that are not merged", unmerged, SERVICE, "pages") if unmerged else None,
            None if scan is None else Figure("a full scan takes", scan, PROCESSES, "seconds"),
            command=_speed_command(seen),
        )


def slow_scan(seen: Snapshot) -> Iterator[Finding]:
    """At this speed a full scan takes very long; equal pages merge in the second scan that sees both."""
    if not seen.merging or not seen.mergeable_pages or any(advisor_crawl(seen)):
        return
    if any(holes_walked(seen)):
        return
    sleep, scan = seen.reading(Knob.SLEEP_MILLISECS), full_scan_seconds(seen)
    if sleep is None or sleep >= _LONG_SLEEP_MILLISECS or scan is None or scan < _SLOW_SECONDS:
        return
    cpu_ratio = seen.mergeable_pages * _SECONDS_PER_PAGE / _TARGET_SECONDS
    yield Finding.of(
        Code.SLOW_SCAN,
        Severity.LOSES,
        "A full scan takes very long, and pages merge in the second full scan at the earliest",
        f"Scan faster: all of it in {_TARGET_SECONDS:.0f} s takes ksmd about {100 * cpu_ratio:.0f} % of a CPU at most.",
        Figure("a full scan takes", scan, PROCESSES, "seconds"),
        Figure("mergeable memory", seen.mergeable_pages * seen.page, PROCESSES, "bytes"),
        seen.figure(Knob.PAGES_TO_SCAN),
        seen.figure(Knob.SLEEP_MILLISECS, "ms"),
        command=_speed_command(seen),
    )


def _advised(seen: Snapshot) -> bool:
    return part(seen.after, "readings").get(Knob.ADVISOR_MODE) == "scan-time"


def _speed_command(seen: Snapshot) -> str:
    # All of it in the time that the kernel's advisor aims at; no slower than the kernel's default at boot.
    sleep = (seen.reading(Knob.SLEEP_MILLISECS) or 20) / 1000
    batch = math.ceil(seen.mergeable_pages * min(sleep, 0.02) / _TARGET_SECONDS)
    knobs: dict[str, int | str] = {"advisor_mode": "none"} if _advised(seen) else {}
    # In tens, as a person would set it.
    return seen.set_command(**knobs, pages_to_scan=max(100, min(30_000, -(-batch // 10) * 10)))
