# SPDX-License-Identifier: GPL-2.0-or-later
"""Each diagnosis from documents: what makes it, and what does not. tests/service has most of them for real."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.cli.doctor import blocks
from ksmd_ctl.cli.main import make_parser
from ksmd_ctl.codec import encode
from ksmd_ctl.config.loader import load
from ksmd_ctl.doctor.diagnose import CHECKS
from ksmd_ctl.doctor.diagnose import diagnose as diagnosis
from ksmd_ctl.doctor.finding import Code, Finding, Severity, Unknown
from ksmd_ctl.doctor.lost import remember
from ksmd_ctl.doctor.snapshot import (
    FILE,
    Advised,
    ProcessView,
    Snapshot,
    read_advised,
    write_advised,
)
from ksmd_ctl.doctor.worth import saved_range
from ksmd_ctl.errors import Unparsable
from ksmd_ctl.host.duplicates import DuplicatePages
from ksmd_ctl.host.memory import Attempts, UnmergeDemand
from ksmd_ctl.reports.document import room_said
from ksmd_ctl.reports.saving import least_saved_bytes
from tests.render.reports import CONTRACTS, example

PAGE = 4096
GIB = 1 << 30


def process(pid: int = 11, **more: object) -> dict[str, object]:
    """A process that merging does well by."""
    return {
        "pid": pid,
        "name": f"p{pid}",
        "group": f"p{pid}",
        "classes": ["mergeable"],
        "reason": "8.0 MiB by madvise(MADV_MERGEABLE)",
        "merging_pages": 2000,
        "saved_bytes": 2000 * (PAGE - 64),
        "relatives": 0,
        "split_blocks": 0,
        "walked_bytes": 2000 * PAGE,
        "resident_bytes": 2000 * PAGE,
        "swapped_bytes": 0,
    } | more


READINGS: dict[str, object] = {
    "run": 1,
    "pages_to_scan": 1000,
    "sleep_millisecs": 20,
    "merge_across_nodes": 1,
    "max_page_sharing": 256,
    "smart_scan": 1,
    "advisor_mode": "none",
    "advisor_min_pages_to_scan": 500,
    "advisor_target_scan_time": 200,
    "pages_shared": 16,
    "pages_sharing": 3984,
    "pages_unshared": 100,
    "pages_volatile": 3,
    "full_scans": 40,
    "pages_scanned": 100_000,
    "pages_skipped": 1000,
    "stable_node_chains": 1,
    "stable_node_dups": 16,
    "ksm_zero_pages": 0,
    "ksm_swpin_copy": 7,
    "thp_split_page": 20,
    "split_folio_pages": 10_240,
    "thp_collapse_alloc": 20,
    "cow_ksm": 9,
    "mem_total_bytes": 8 * GIB,
    "mem_available_bytes": 4 * GIB,
}


def look(
    readings: Mapping[str, object] | None = None,
    *,
    since: Mapping[str, object] | None = None,
    report: Mapping[str, object] | None = None,
    processes: list[dict[str, object]] | None = None,
    nodes: Mapping[str, object] | None = None,
    **more: Any,
) -> Snapshot:
    """A host that is well but for what is said.

    :param readings: what is otherwise, in both reports
    :param since: what is otherwise in the second
    :param report: sections of both that are otherwise
    """

    def one(values: Mapping[str, object]) -> dict[str, object]:
        return {
            "format": 1,
            "host": {"kind": "kernel", "release": "6.12-fake", "page_size_bytes": PAGE},
            "daemon": None,
            "policy": None,
            "knobs": {},
            "readings": values,
            "errors": {},
            "derived": {"saved_bytes": 16_000_000, "ksmd_cpu_ratio": 0.02, "full_scan_seconds": 0.4},
            "numa": None,
            "writers": [],
            **(report or {}),
        }

    first = READINGS | (readings or {})
    last = first | {"full_scans": 52, "pages_scanned": 101_000, "pages_skipped": 1200} | (since or {})
    listed = [process(11), process(12)] if processes is None else processes
    return Snapshot(
        one(first),
        one(last),
        5.0,
        nodes if nodes is not None else {"nodes": {}, "exposure": [], "survey": {"detection": "kpageflags"}},
        more.pop("listed", ProcessView.all_of({"processes": listed})),
        more.pop("duplicates", DuplicatePages(4000, 2116, 0, True, 0.1)),
        **more,
    )


def diagnose(found: Snapshot) -> tuple[Finding, ...]:
    return diagnosis(found).findings


def codes(found: Snapshot) -> list[Code]:
    return [finding.code for finding in diagnose(found)]


def only(found: Snapshot) -> Finding:
    (finding,) = diagnose(found)
    return finding


def service(policy: str = "fixed", **knobs: Mapping[str, object]) -> dict[str, object]:
    return {"daemon": {"pid": 4711}, "policy": policy, "knobs": knobs}


def knob(state: str, wanted: object, found: object, reason: str = "") -> dict[str, object]:
    return {"state": state, "wanted": wanted, "found": found, "reason": reason}


def test_nothing_is_said_of_a_host_that_is_well() -> None:
    assert diagnose(look()) == ()
    assert diagnose(look(report=service(run=knob("held", 1, 1)))) == ()
    assert diagnosis(look()).healthy


# -- switched ----------------------------------------------------------------------------------------------


def test_no_ksm_is_all_that_is_said_then() -> None:
    errors = {"run": {"kind": "absent", "text": "this kernel does not have it"}}
    bare = {"run": None, "cow_ksm": None, "ksm_swpin_copy": None}
    found = only(look(bare, report={"errors": errors, "writers": [{"name": "ksmtuned", "pid": 1}]}))
    assert (found.code, found.severity) == (Code.KSM_ABSENT, Severity.BLOCKS)
    assert found.title == "This kernel has no KSM"


def test_a_folder_that_is_hidden_is_told_from_a_kernel_without_ksm() -> None:
    errors = {"run": {"kind": "absent", "text": "this kernel does not have it"}}
    hidden = look({"run": None}, report={"errors": errors})
    found = only(hidden)
    assert (found.code, found.severity) == (Code.KSM_ABSENT, Severity.BLOCKS)
    assert "but this kernel has KSM" in found.title
    assert [one.name for one in found.evidence] == ["the folder", "cow_ksm", "ksm_swpin_copy"]


@pytest.mark.parametrize("run", [0, 2])
def test_off(run: int) -> None:
    found = only(look({"run": run}, duplicates=DuplicatePages(4000, 4000, 1500, True, 0.1)))
    assert (found.code, found.severity, found.command) == (Code.KSM_OFF, Severity.BLOCKS, "ksmd-ctl set run=1")
    assert [one.value for one in found.evidence if one.name == "to be saved at least"] == [1500 * PAGE]
    assert ("everything was un-merged" in found.title) == (run == 2)
    assert "side channel" in found.advice


def test_stopped_for_a_trust_domain() -> None:
    domains = {
        "mode": "nodes",
        "domains": [],
        "measures": {"stopped": "domain gold is not isolated: 3 pages elsewhere"},
    }
    found = only(look({"run": 0}, report={"domains": domains}))
    assert (found.code, found.severity, found.command) == (Code.KSM_OFF, Severity.BLOCKS, "ksmd-ctl domains")
    assert [one.value for one in found.evidence if one.name == "why"] == [domains["measures"]["stopped"]]


def test_what_costs_more_than_it_saves_is_not_switched_on_again() -> None:
    """With run = 2 as the doctor had advised."""
    nothing = {"pages_shared": 0, "pages_sharing": 0, "stable_node_dups": 0}
    found = only(look({"run": 2} | nothing, duplicates=DuplicatePages(100_000, 100_000, 1000, True, 0.1)))
    assert (found.code, found.severity, found.command) == (Code.KSM_OFF, Severity.NOTE, "")
    # A share of it says too little, and 2,000 pages are worth what is kept about 100,000.
    for more in (DuplicatePages(100_000, 1000, 1000, False, 0.1), DuplicatePages(100_000, 100_000, 2000, True, 0.1)):
        assert only(look({"run": 2} | nothing, duplicates=more)).severity == Severity.BLOCKS


def test_off_as_configured_is_changed_there() -> None:
    found = only(look({"run": 0}, report=service(run=knob("held", 0, 0))))
    assert found.code == Code.KSM_OFF
    assert "as the configuration wants it" in found.title
    assert found.command == ("printf 'knobs.run = 1\\n' > /etc/ksmd-ctl/conf.d/run.toml && systemctl reload ksmd-ctl")


def test_the_service_only_watches() -> None:
    found = only(look({"run": 0}, report=service("observe")))
    assert (found.code, 'policy = "adaptive"' in found.command) == (Code.POLICY_OBSERVES, True)
    # It may watch somebody else's merging.
    assert codes(look(report=service("observe"))) == []


def test_a_policy_that_waits() -> None:
    report = service("adaptive", run=knob("held", 0, 0)) | {
        "decision": {"phase": "off", "reasons": [{"subject": "run", "text": "enough memory is free"}]}
    }
    found = only(look({"run": 0}, report=report))
    assert found.code == Code.POLICY_WAITS
    assert "enough memory is free" in [one.value for one in found.evidence]


def manager(name: str, pid: int | None = 812, *units: str) -> dict[str, object]:
    return {"writers": [{"name": name, "pid": pid, "units": list(units)}]}


def test_ksmtuned_waits_for_memory_to_be_short() -> None:
    there = manager("ksmtuned", 812, "ksmtuned.service", "ksm.service")
    found = diagnose(look({"run": 0}, report=there))
    assert [one.code for one in found] == [Code.KSMTUNED_WAITS]
    assert found[0].command == "systemctl disable --now ksmtuned ksm && ksmd-ctl set run=1"
    # It is over its threshold and has it off all the same: what it was told is not known, but it will do it again.
    short = look({"run": 0, "mem_available_bytes": GIB}, report=there)
    assert codes(short) == [Code.KEPT_OFF]


@pytest.mark.parametrize(
    ("name", "units", "command"),
    [
        ("ksmtuned", ["ksmtuned.service"], "systemctl disable --now ksmtuned && ksmd-ctl set run=1"),
        ("momd", ["mom-vdsm.service"], "systemctl disable --now mom-vdsm && ksmd-ctl set run=1"),
        ("momd", [], "kill 812 && ksmd-ctl set run=1"),
        ("tuned", ["tuned.service"], "tuned-adm profile virtual-host && ksmd-ctl set run=1"),
        ("harvester-node-manager", [], "kubectl edit ksmtuned"),
        ("virt-handler", [], None),
    ],
)
def test_another_manager_keeps_ksm_off(name: str, units: list[str], command: str | None) -> None:
    found = only(look({"run": 0, "mem_available_bytes": GIB}, report=manager(name, 812, *units)))
    assert (found.code, found.severity, found.title) == (Code.KEPT_OFF, Severity.BLOCKS, f"{name} keeps KSM off")
    if command is None:
        assert found.command.startswith("kubectl -n kubevirt patch")
        assert found.advice.endswith("Then: ksmd-ctl set run=1")
    else:
        assert found.command == command
    # The ways of others are not told beside its own.
    words = {"ksmtuned": "KSM_THRES_COEF", "momd": "ksm.rules", "tuned": "profile", "virt-handler": "kubevirt.io/"}
    assert [of for of, word in words.items() if word in found.advice] == [of for of in words if of == name]


def test_who_never_switches_ksm_off_is_not_blamed_for_it() -> None:
    assert codes(look({"run": 0}, report=manager("advisor", None))) == [Code.KSM_OFF]
    assert codes(look({"run": 0}, report=manager("supervdsmd"))) == [Code.KSM_OFF, Code.OTHER_WRITER]
    # Nor is anybody where the configuration wants it so.
    wanted = service(run=knob("held", 0, 0)) | manager("momd")
    assert codes(look({"run": 0}, report=wanted))[0] == Code.KSM_OFF


def test_a_service_that_wants_it_on_switches_it_on_by_itself_once_the_other_is_stopped() -> None:
    report = service(run=knob("drifted", 1, 0)) | manager("momd", 812, "momd.service")
    assert diagnose(look({"run": 0}, report=report))[0].command == "systemctl disable --now momd"


def test_memory_goes_offline() -> None:
    assert only(look({"run": 5})).code == Code.MEMORY_OFFLINE


def test_nothing_is_scanned() -> None:
    found = only(look({"pages_to_scan": 0}, report={"derived": {"saved_bytes": 1}}))
    assert (found.code, found.command) == (Code.NOTHING_SCANNED, "ksmd-ctl set pages_to_scan=100")
    assert codes(look({"pages_to_scan": 0, "run": 0})) == [Code.KSM_OFF]
    # A service that was killed while it let ksmd rest: its knobs are put back together.
    rest = left(knobs={"pages_to_scan": {"found": 0, "at_start": 100, "at_first": 100}})
    killed = diagnose(look({"pages_to_scan": 0}, report={"derived": {"saved_bytes": 1}, **rest}))
    assert [one.code for one in killed] == [Code.NOTHING_SCANNED, Code.SERVICE_DIED]
    assert [one.command for one in killed] == ["", "ksmd-ctl daemon --restore"]
    assert "restore the knobs" in killed[0].advice


def test_a_long_sleep_is_not_called_a_slow_scan_too() -> None:
    assert codes(look({"sleep_millisecs": 3_600_000}, report={"derived": {"saved_bytes": 1}})) == [Code.LONG_SLEEP]


CRAWL = {"advisor_mode": "scan-time", "pages_to_scan": 10}


def test_the_advisor_at_a_crawl() -> None:
    huge = [process(resident_bytes=64 * GIB, walked_bytes=64 * GIB)]
    found = only(look(CRAWL, processes=huge, report={"derived": {"saved_bytes": 16_000_000}}))
    assert (found.code, found.severity) == (Code.ADVISOR_CRAWL, Severity.BLOCKS)
    # All of it in 200 s: 16 Mi pages in 10,000 batches.
    assert found.command == "ksmd-ctl set advisor_mode=none pages_to_scan=1680"
    # Few pages are soon scanned at any speed.
    assert codes(look(CRAWL)) == []
    # Nor is it a crawl where the advisor chose a speed of its own accord.
    assert codes(look(CRAWL | {"pages_to_scan": 600}, processes=huge, report={"derived": {"saved_bytes": 1}})) == []


def test_a_slow_scan() -> None:
    found = only(look(report={"derived": {"saved_bytes": 16_000_000, "full_scan_seconds": 7200.0}}))
    assert (found.code, found.severity) == (Code.SLOW_SCAN, Severity.LOSES)
    assert codes(look(report={"derived": {"saved_bytes": 16_000_000, "full_scan_seconds": 900.0}})) == []


# -- memory ------------------------------------------------------------------------------------------------

NOTHING = {"pages_shared": 0, "pages_sharing": 0, "pages_unshared": 0, "pages_volatile": 0, "stable_node_dups": 0}


def test_nothing_is_mergeable() -> None:
    found = only(look(NOTHING, processes=[], report={"derived": {"saved_bytes": 0}}))
    assert (found.code, found.severity) == (Code.NOTHING_MERGEABLE, Severity.BLOCKS)
    vm = process(classes=["not eligible"], reason="it was started with mem-merge=off", merging_pages=0)
    found = only(look(NOTHING, processes=[vm], report={"derived": {"saved_bytes": 0}}))
    assert "it was started with mem-merge=off" in [one.value for one in found.evidence]
    # What seems to have been tried: MemoryKSM=, which failed up to 255.4, and madvise on shared memory.
    assert "254 to 255.4" in found.advice
    assert "On shared memory both succeed and do nothing" in found.advice
    # Where processes could not be looked at nobody knows.
    assert codes(look(NOTHING, listed=None, report={"derived": {"saved_bytes": 0}})) == []


@pytest.mark.parametrize(
    ("kind", "code", "severity"),
    [
        ("shared", Code.SHARED_MEMORY, Severity.LOSES),
        ("hugetlb", Code.HUGETLB, Severity.LOSES),
        ("pinned", Code.PINNED, Severity.LOSES),
        ("encrypted", Code.ENCRYPTED, Severity.NOTE),
        ("migrating", Code.MIGRATING, Severity.NOTE),
        ("userfaultfd", Code.USERFAULTFD, Severity.NOTE),
        ("", Code.NOT_ASKED, Severity.NOTE),
    ],
)
def test_guests_out_of_reach(kind: str, code: Code, severity: Severity) -> None:
    classes = [kind, "not eligible"] if kind else ["not eligible"]
    vm = process(77, name="qemu", group="web-1", classes=classes, reason="so it is", merging_pages=0)
    found = only(look(processes=[process(11), process(12), vm]))
    assert (found.code, found.severity) == (code, severity)
    assert (found.evidence[0].name, found.evidence[0].value) == ("qemu of web-1 (pid 77)", "so it is")
    if kind:
        # Where a part of it merges it is a note.
        vm = process(77, classes=[kind, "mergeable"])
        assert only(look({"pages_sharing": 5984}, processes=[process(11), process(12), vm])).severity == Severity.NOTE


def test_who_marked_shared_memory_is_told_that_it_does_nothing() -> None:
    vm = process(77, classes=["shared", "not eligible"], merging_pages=0)
    found = only(look(processes=[process(11), process(12), vm]))
    assert "madvise(MADV_MERGEABLE) on shared memory succeeds and does nothing" in found.advice


def test_many_are_counted_not_listed() -> None:
    vms = [process(pid, classes=["hugetlb", "not eligible"], merging_pages=0) for pid in range(100, 140)]
    found = only(look(processes=[process(), *vms], duplicates=None))
    assert (len(found.evidence), found.evidence[-1].value) == (4, 37)


def test_mergeable_memory_in_swap() -> None:
    away = process(12, swapped_bytes=1000 * PAGE, resident_bytes=1000 * PAGE)
    assert only(look(processes=[process(11), away])).code == Code.SWAPPED
    assert codes(look(processes=[process(11), process(12, swapped_bytes=20 * PAGE)])) == []


def test_page_cache_in_mergeable_mappings_is_told_and_not_counted() -> None:
    snapshot = process(12, file_bytes=14 << 20, resident_bytes=2000 * PAGE)
    found = only(look(processes=[process(11), snapshot]))
    assert (found.code, found.severity) == (Code.FILE_PAGES, Severity.NOTE)
    assert [one.value for one in found.evidence] == [14 << 20, 2000 * PAGE]
    # Libraries of a service whose memory is mergeable by prctl.
    assert codes(look(processes=[process(11), process(12, file_bytes=6 << 20)])) == []
    assert codes(look(processes=[process(11), process(12, file_bytes=20 << 20, resident_bytes=64 << 20)])) == []


def test_thousands_of_mappings() -> None:
    many = only(look(processes=[process(11), process(12, mergeable_mappings=2059)]))
    assert (many.code, many.severity) == (Code.MANY_MAPPINGS, Severity.NOTE)
    assert (many.evidence[0].name, many.evidence[0].value) == ("p12 (pid 12)", 2059)
    near = only(look(processes=[process(11), process(12, mergeable_mappings=60_000)]))
    assert near.severity == Severity.COSTS
    assert codes(look(processes=[process(11), process(12, mergeable_mappings=58)])) == []


def test_a_page_whose_mappings_take_long_to_find() -> None:
    def found(**more: object) -> list[Finding]:
        return list(diagnose(look(processes=[process(11), process(12, **more)])))

    (one,) = found(adjacent_mappings=900, page_mappings=256)
    assert (one.code, one.severity) == (Code.LONG_RMAP_WALKS, Severity.COSTS)
    assert (one.evidence[0].name, one.evidence[0].value) == ("p12 (pid 12): adjacent mappings", 900)
    assert one.evidence[2].value == pytest.approx(3 * 900 * 256 * 25e-9)
    assert one.command == "ksmd-ctl set max_page_sharing=64 --dry-run"
    # Half of that is less than 10 ms, and so is a page that is mapped twice.
    assert found(adjacent_mappings=450, page_mappings=256) == []
    assert found(adjacent_mappings=900, page_mappings=2) == []
    # Where it wasn't counted: at most as often as the kernel allows, and as it has merged pages.
    (most,) = found(adjacent_mappings=900)
    assert most.evidence[1].value == 256
    assert found(adjacent_mappings=900, merging_pages=100) == []
    assert found(mergeable_mappings=60) == []


def test_the_longest_walk_is_told_and_a_small_limit_is_not_lowered() -> None:
    several = [process(11, adjacent_mappings=3000, page_mappings=60), process(12, adjacent_mappings=5000)]
    (one,) = diagnose(look({"max_page_sharing": 60}, processes=several))
    assert (one.evidence[0].value, one.evidence[3].value, one.command) == (5000, 2, "")


# -- lost --------------------------------------------------------------------------------------------------

APART = DuplicatePages(4000, 2116, 500, True, 0.1)


def test_smart_scan_keeps_pages_apart() -> None:
    found = only(look(duplicates=APART))
    assert (found.code, found.severity) == (Code.SMART_SCAN, Severity.LOSES)
    assert found.command == "ksmd-ctl set smart_scan=0 && sleep 2 && ksmd-ctl set smart_scan=1"
    steered = service("adaptive", smart_scan=knob("held", 1, 1))
    assert only(look(duplicates=APART, report=steered)).command == "ksmd-ctl status --explain"
    # Something is being merged.
    assert codes(look(duplicates=APART, since={"pages_sharing": 4100})) == []


def test_in_a_short_look_nothing_is_advised_but_a_longer_one() -> None:
    short = only(look(duplicates=APART, since={"full_scans": 41}))
    assert (short.severity, short.command) == (Severity.NOTE, "ksmd-ctl doctor --interval 4")
    # Where ten full scans are longer than a look can be, there is nothing else to try.
    slow = {"derived": {"saved_bytes": 16_000_000, "full_scan_seconds": 120.0}}
    slowly = only(look(duplicates=APART, since={"full_scans": 40}, report=slow))
    assert (slowly.severity, slowly.command.startswith("ksmd-ctl set smart_scan=0")) == (Severity.NOTE, True)


def test_pages_that_something_holds() -> None:
    for readings in ({"smart_scan": 0}, {"smart_scan": None}):
        assert only(look(readings, duplicates=APART)).code == Code.HELD_PAGES
    assert codes(look({"smart_scan": 0}, duplicates=APART, since={"full_scans": 41})) == []
    assert codes(look({"smart_scan": 0}, duplicates=DuplicatePages(4000, 2116, 12, True, 0.1))) == []


def test_what_the_kernel_refused_to_merge_is_not_put_down_to_smart_scan() -> None:
    # In twelve full scans smart_scan has let ksmd try each at least once.
    held = only(look(duplicates=APART, attempts=Attempts(1000, 500)))
    assert (held.code, held.severity) == (Code.HELD_PAGES, Severity.LOSES)
    assert held.title.endswith("something holds them")
    assert "smart_scan=0" not in held.command
    assert [one.value for one in held.evidence if one.name == "of them refused by the kernel"] == [500]
    # It is known at once, also before a scan is over.
    assert codes(look(duplicates=APART, attempts=Attempts(800, 450), since={"full_scans": 40})) == [Code.HELD_PAGES]
    # What it did not even try, smart_scan keeps apart.
    never = only(look(duplicates=APART, attempts=Attempts(0, 0)))
    assert (never.code, never.severity) == (Code.SMART_SCAN, Severity.LOSES)
    assert "something holds" not in never.advice
    both = diagnose(look(duplicates=APART, attempts=Attempts(400, 200)))
    assert [one.code for one in both] == [Code.SMART_SCAN, Code.HELD_PAGES]
    assert both[0].evidence[0].value == 300
    assert [one.value for one in both[1].evidence if one.unit == "pages"] == [500, 200]
    # Some that were written to while ksmd looked are nothing.
    assert only(look(duplicates=APART, attempts=Attempts(400, 3))).code == Code.SMART_SCAN


def test_the_service_s_own_pulses_count() -> None:
    healed = service("adaptive") | {"healing": {"unrealised": {"smart_scan": 0}}}
    assert only(look(duplicates=APART, report=healed)).code == Code.HELD_PAGES
    assert only(look(duplicates=APART, report=healed, attempts=Attempts(1000, 500))).code == Code.HELD_PAGES


def test_pages_that_change_are_not_said_to_be_held() -> None:
    found = only(look({"smart_scan": 0}, duplicates=APART, attempts=Attempts(0, 0)))
    assert (found.code, found.command) == (Code.HELD_PAGES, "")
    assert found.title.endswith("they change all the time")


def test_equal_pages_in_huge_pages_are_not_held_while_ksmd_splits_these() -> None:
    # ksmd splits about one huge page a full scan where all equal pages are in huge pages; nothing else shows it.
    splitting = {"split_folio_pages": 10 * 512}
    assert codes(look({"smart_scan": 0, "split_folio_pages": 0}, duplicates=APART, since=splitting)) == []
    still = look({"smart_scan": 0, "split_folio_pages": 512}, duplicates=APART)
    assert only(still).code == Code.HELD_PAGES
    # What khugepaged makes huge again is no progress.
    again = {"smart_scan": 0, "split_folio_pages": 0, "thp_collapse_alloc": 0}
    found = look(again, duplicates=APART, since=splitting | {"thp_collapse_alloc": 10})
    assert Code.HELD_PAGES in codes(found)


def changed(identity: str, *knobs: str, result: str = "done") -> dict[str, object]:
    last = {"id": identity, "result": result, "knobs": {name: {"from": 0, "to": 1} for name in knobs}}
    return {"transaction": {"running": None, "last": last}}


def left(**more: object) -> dict[str, object]:
    section = {
        "pid": 4711,
        "config": "",
        "started_age_seconds": 7200.0,
        "seen_age_seconds": None,
        "may_be_restarted": False,
        "knobs": {"run": {"found": 1, "at_start": 0, "at_first": 0}},
    }
    return {"left_by_service": section | more}


def test_a_service_that_died_is_found_with_what_it_left_and_what_puts_it_back() -> None:
    found = only(look(report=left()))
    assert (found.code, found.severity) == (Code.SERVICE_DIED, Severity.COSTS)
    assert found.command == "ksmd-ctl daemon --restore"
    assert [(one.name, one.value) for one in found.evidence] == [
        ("pid", "4711"),
        ("started", 7200.0),
        ("run was 0 before it, is now", "1"),
    ]
    (block,) = [list(block) for block in blocks(diagnosis(look(report=left())))][1:]
    assert block[1].text == "pid 4711, started 2 h ago, run was 0 before it, is now 1 (journal of the knobs)"
    named = only(look(report=left(config="/etc/my file.toml")))
    assert named.command == "ksmd-ctl daemon --restore --config '/etc/my file.toml'"
    # What can't be shown is not shown, however it came into the journal.
    assert only(look(report=left(config="/x\x1b[2J"))).command == "ksmd-ctl daemon --restore"


def test_a_unit_that_is_started_again_in_a_moment_is_only_noted() -> None:
    found = only(look(report=left(may_be_restarted=True)))
    assert (found.code, found.severity) == (Code.SERVICE_DIED, Severity.NOTE)
    assert codes(look(report={"left_by_service": None})) == []


def test_an_advice_that_brought_nothing_is_not_given_again() -> None:
    before = changed("a", "run")
    first = look(duplicates=APART, report=before)
    kept = remember(first, diagnose(first))
    assert kept == {Code.SMART_SCAN: Advised(500, "a")}
    # Nobody followed it: it is right still.
    assert only(look(duplicates=APART, report=before, advised=kept)).code == Code.SMART_SCAN
    for other in (changed("b", "run"), changed("b", "smart_scan", result="abandoned")):
        assert only(look(duplicates=APART, report=other, advised=kept)).code == Code.SMART_SCAN
    second = look(duplicates=APART, report=changed("b", "smart_scan"), advised=kept)
    assert only(second).code == Code.HELD_PAGES
    # That is known from then on, whatever else is changed.
    kept = remember(second, diagnose(second))
    assert kept == {Code.SMART_SCAN: Advised(500, "a", vain=True)}
    third = look(duplicates=APART, report=changed("c", "run"), advised=kept)
    assert (only(third).code, remember(third, diagnose(third))) == (Code.HELD_PAGES, kept)
    # Others that came since are others.
    more = DuplicatePages(4000, 3116, 1500, True, 0.1)
    assert only(look(duplicates=more, report=changed("c", "run"), advised=kept)).code == Code.SMART_SCAN
    assert codes(look(report=changed("c", "run"), advised=kept)) == []


def test_what_was_advised_is_kept_until_the_next_boot(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    assert read_advised(folder, "this") == {}
    kept = {"smart-scan": Advised(500, "a", vain=True)}
    write_advised(folder, "this", kept)
    assert read_advised(folder, "this") == kept
    assert read_advised(folder, "another") == {}


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"format": 1, "boot_id": "x"}', '{"format": 1, "advised": 7}', "[" * 9999]
)
def test_a_record_that_makes_no_sense_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    assert read_advised(tmp_path, "x") == {}


TWINS = {"stable_node_chains": 4, "stable_node_dups": 808, "pages_shared": 900, "pages_sharing": 3100}


def test_twins() -> None:
    found = only(look(TWINS, duplicates=DuplicatePages(4000, 2116, 780, True, 0.1)))
    assert (found.code, found.severity) == (Code.TWINS, Severity.LOSES)
    # 804 more than one for each content, of which 15 the limit may explain.
    assert found.evidence[0].value == 780
    assert only(look(TWINS, duplicates=None)).evidence[0].value == 789
    assert only(look(TWINS, duplicates=None)).command == "ksmd-ctl unmerge --pid 11"
    assert "healing.twins = true" in only(look(TWINS, duplicates=None, report=service())).command
    at_it = service() | {"healing": {"allowed": True, "unrealised": {"twins": 800}}}
    assert only(look(TWINS, duplicates=None, report=at_it)).command == ""
    # Stale ones, which a look at contents doesn't find.
    assert codes(look(TWINS)) == []


def test_healing_knows_better() -> None:
    report = {"healing": {"unrealised": {"twins": 700, "smart_scan": 300, "swapin": 5000}}}
    found = diagnose(look(report=report, duplicates=None))
    # The copies are merged again in a second.
    assert [one.code for one in found] == [Code.SMART_SCAN, Code.TWINS]
    assert [one.evidence[0].value for one in found] == [300, 700]
    slow = report | {"derived": {"saved_bytes": 16_000_000, "full_scan_seconds": 100.0}}
    found = diagnose(look(report=slow, duplicates=None))
    assert [one.code for one in found] == [Code.SMART_SCAN, Code.TWINS, Code.SWAP_COPIES]
    assert found[2].evidence[1].value == 5000


def test_a_small_sharing_limit() -> None:
    small = {"max_page_sharing": 2, "stable_node_chains": 1, "stable_node_dups": 2000, "pages_shared": 2000}
    found = only(look(small | {"pages_sharing": 2000}))
    assert (found.code, found.command) == (Code.SHARING_LIMIT, "ksmd-ctl set max_page_sharing=256 --dry-run")


def test_khugepaged_and_ksmd_undo_each_other() -> None:
    assert only(look(since={"thp_collapse_alloc": 120, "thp_split_page": 110})).code == Code.KHUGEPAGED
    # One without the other, or both at khugepaged's own pace, is life.
    assert codes(look(since={"thp_collapse_alloc": 120})) == []
    assert codes(look(since={"thp_collapse_alloc": 24, "thp_split_page": 24})) == []


def test_huge_pages_with_zeroes_that_are_split_one_by_one() -> None:
    having = [process(huge_bytes=64 * 512 * PAGE, split_zero_pages=3000)]

    def found(readings: dict[str, object], **more: Any) -> list[Finding]:
        listed = more.pop("processes", having)
        return [one for one in diagnose(look(readings, processes=listed, **more)) if one.code is Code.SLOW_SPLITS]

    ever = {"use_zero_pages": 0, "full_scans": 2, "thp_split_page": 50}
    [one] = found(ever, duplicates=APART)
    assert (one.severity, one.command) == (Severity.LOSES, "ksmd-ctl set use_zero_pages=1")
    assert found(ever, duplicates=None)
    # Equal pages are what it is about, where contents were compared.
    assert not found(ever)
    often = {"use_zero_pages": 0, "full_scans": 2000, "thp_split_page": 30_000}
    assert found(often, since={"full_scans": 2004, "thp_split_page": 30_003}, duplicates=APART)
    assert not found(often, duplicates=APART)
    for other in ({"use_zero_pages": 1}, {"run": 0}, {"thp_split_page": 200}, {"thp_split_page": 2}):
        assert not found(ever | other, duplicates=APART), other
    for none in (process(huge_bytes=8 * 512 * PAGE, split_zero_pages=3000), process(huge_bytes=64 * 512 * PAGE)):
        assert not found(ever, duplicates=APART, processes=[none])


def test_copies_from_swap() -> None:
    assert codes(look(since={"ksm_swpin_copy": 4000})) == []
    slow = {"derived": {"saved_bytes": 16_000_000, "full_scan_seconds": 300.0}}
    assert only(look(since={"ksm_swpin_copy": 4000}, report=slow)).code == Code.SWAP_COPIES
    assert codes(look({"run": 0}, since={"ksm_swpin_copy": 4000})) == [Code.KSM_OFF, Code.SWAP_COPIES]


# -- risk --------------------------------------------------------------------------------------------------


def test_a_knob_that_waits_for_an_unmerge() -> None:
    report = service(merge_across_nodes=knob("pending", 0, 1, "needs a transaction"))
    found = only(look(report=report))
    assert (found.code, found.command) == (Code.KNOB_PENDING, "ksmd-ctl set merge_across_nodes=0 --dry-run")


def test_a_kernel_that_walks_what_is_empty_is_told_by_what_a_full_scan_costs() -> None:
    far = process(13, walked_bytes=64 * GIB, resident_bytes=PAGE, merging_pages=0)
    busy = {"derived": {"saved_bytes": 1000, "ksmd_cpu_ratio": 0.9, "full_scan_seconds": 2.0}}
    begun = {"ksmd_cpu_seconds": 100.0, "full_scans": 40}
    slow = look(begun, since={"ksmd_cpu_seconds": 104.5, "full_scans": 43}, processes=[process(), far], report=busy)
    found = only(slow)
    assert (found.code, found.severity) == (Code.HOLES_WALKED, Severity.COSTS)
    assert [one.value for one in found.evidence] == [1.5, 4103, 64 * GIB - PAGE]
    assert "p13" in found.evidence[2].name
    # Not one full scan has ended: it has cost that much at least.
    ending = look(begun, since={"ksmd_cpu_seconds": 105.0, "full_scans": 40}, processes=[far], report=busy)
    assert Code.HOLES_WALKED in codes(ending)
    # The same time for many pages, or without anything that is empty, is what scanning costs.
    for processes in ([process(resident_bytes=64 * GIB, walked_bytes=128 * GIB)], [process()]):
        scanned = look(begun, since={"ksmd_cpu_seconds": 104.5, "full_scans": 43}, processes=processes)
        assert Code.HOLES_WALKED not in codes(scanned)


def test_scanning_is_said_not_to_be_slower_only_where_that_was_seen() -> None:
    far = process(13, walked_bytes=128 * GIB, resident_bytes=PAGE, merging_pages=0)
    begun = {"ksmd_cpu_seconds": 100.0}

    def advice(seconds: float, scans: int) -> str:
        since = {"ksmd_cpu_seconds": 100.0 + seconds, "full_scans": 40 + scans}
        found = diagnose(look(begun, since=since, processes=[process(), far]))
        (sparse,) = (finding for finding in found if finding.code == Code.SPARSE_MAPPING)
        return sparse.advice

    assert "not slower" in advice(0.1, 12)
    assert "not slower" not in advice(4.5, 1)
    assert "not slower" not in advice(0.0, 0)


def test_adaptive_rests_for_long_after_a_walk() -> None:
    resting = service("adaptive", sleep_millisecs=knob("held", 300_000, 300_000))
    assert codes(look({"sleep_millisecs": 300_000}, report=resting)) == []
    assert Code.LONG_SLEEP in codes(look({"sleep_millisecs": 300_000}, report=service("fixed")))


def test_adaptive_rests_with_no_page_to_scan() -> None:
    resting = service("adaptive", pages_to_scan=knob("held", 0, 0))
    assert codes(look({"pages_to_scan": 0}, report=resting)) == []
    somebody = service("adaptive", pages_to_scan=knob("held", 8000, 0))
    assert Code.NOTHING_SCANNED in codes(look({"pages_to_scan": 0}, report=somebody))


def test_a_knob_that_can_not_be_set() -> None:
    found = only(look(report=service(run=knob("failed", 1, None, "EACCES"))))
    assert (found.code, found.severity) == (Code.KNOB_FAILED, Severity.BLOCKS)
    found = only(look(report=service(smart_scan=knob("lacking", 1, None))))
    assert (found.code, found.severity) == (Code.KNOB_FAILED, Severity.NOTE)


@pytest.mark.parametrize("state", ["failed", "lacking"])
def test_ksmd_that_can_not_be_scheduled_as_configured(state: str) -> None:
    found = only(look(report=service(ksmd_cpus=knob(state, "7", None, "this host has no CPU 7"))))
    assert (found.code, found.severity) == (Code.KSMD_REFUSED, Severity.COSTS)
    assert "this host has no CPU 7" in [figure.value for figure in found.evidence]


def test_a_configuration_that_was_refused() -> None:
    report = service() | {"daemon": {"pid": 4711, "reload_error": "policy: 'x' is none"}}
    assert only(look(report=report)).code == Code.CONFIG_REFUSED


def test_a_transaction_that_nobody_ends() -> None:
    running = {"running": {"phase": "unshare", "who": "ksmd-ctl set", "knobs": {"merge_across_nodes": {}}}}
    found = only(look(report={"transaction": running}))
    assert (found.code, found.command) == (Code.TRANSACTION_LEFT, "ksmd-ctl set --recover")
    degraded = {"transaction": {"running": None, "last": {"result": "degraded", "reason": "EACCES"}}}
    assert only(look(report=degraded)).severity == Severity.COSTS


def test_a_transaction_that_is_being_carried_out_is_no_fault() -> None:
    running = {"running": {"phase": "unshare", "who": "ksmd-ctl set", "knobs": {"merge_across_nodes": {}}}}
    stopped = [process(11, merging_pages=10)]
    found = only(look({"run": 0}, processes=stopped, report=service() | {"transaction": running}))
    assert (found.code, found.severity) == (Code.TRANSACTION_RUNS, Severity.NOTE)
    found = only(look({"run": 0}, processes=stopped, report={"transaction": running}, holder="ksmd-ctl set (pid 7)"))
    assert found.code == Code.TRANSACTION_RUNS
    assert found.evidence[-1].value == "ksmd-ctl set (pid 7)"


def test_what_processes_left_behind() -> None:
    found = diagnose(look({"run": 0}, processes=[process(11, merging_pages=10)]))
    assert [one.code for one in found] == [Code.KSM_OFF, Code.LEFT_BEHIND]
    assert "sleep 5 " in found[1].command
    # So long that a full scan is over, else it would bring nothing.
    slow = look({"run": 0}, processes=[process(11, merging_pages=10)], report={"derived": {"full_scan_seconds": 60.0}})
    assert "sleep 120 " in diagnose(slow)[1].command
    assert codes(look(processes=[process(11, merging_pages=10)])) == []


def test_a_sparse_mapping() -> None:
    far = process(13, walked_bytes=128 * GIB, resident_bytes=PAGE, merging_pages=0)
    found = only(look(processes=[process(11), process(12), far]))
    # A large machine that has just started is one, and nothing is wrong with it.
    assert (found.code, found.severity) == (Code.SPARSE_MAPPING, Severity.NOTE)
    assert [one.value for one in found.evidence if one.unit == "seconds"] == [pytest.approx(1.92)]
    full = process(13, walked_bytes=128 * GIB, resident_bytes=128 * GIB)
    assert codes(look(processes=[process(11), process(12), full])) == []


def test_a_sparse_mapping_by_what_was_measured_on_this_kernel() -> None:
    processes = [process(11), process(12), process(13, walked_bytes=128 * GIB, resident_bytes=PAGE, merging_pages=0)]
    slow = only(look(processes=processes, sparse_seconds_per_gib=0.03))
    assert [one.value for one in slow.evidence if one.unit == "seconds"] == [pytest.approx(3.84)]
    assert slow.evidence[-1].source == "by a measurement on this kernel"
    # A kernel that skips what is empty.
    assert codes(look(processes=processes, sparse_seconds_per_gib=0.0)) == []


def demands(*places: tuple[str, int]) -> dict[str, object]:
    return {"exposure": [{"where": where, "over_bytes": over} for where, over in places]}


def test_no_room() -> None:
    found = diagnose(look(nodes=demands(("host", 5), ("/tenant", 10), ("/large", 20), ("node 0", 0))))
    assert "the OOM killer will act in that cgroup" in found[0].advice
    assert [(one.code, one.severity) for one in found] == [
        (Code.NO_ROOM, Severity.COSTS),
        (Code.NO_ROOM, Severity.NOTE),
    ]
    assert [one.value for one in found[0].evidence] == [20, 10]
    assert not any("charged to others" in f"{one.title} {one.advice}" for one in found)


def test_room_is_told_in_the_words_of_the_plan() -> None:
    room = UnmergeDemand("/tenant", 82 << 20, 47 << 20, upper_bound=True)
    document = {"where": "/tenant", "growth_bytes": 82 << 20, "free_bytes": 47 << 20, "over_bytes": 35 << 20}
    (figure,) = only(look(nodes={"exposure": [{**document, "upper_bound": True}]})).evidence
    assert figure.name == f"{room.text(16 << 20)}: over by up to"
    assert room_said(document) == f"{room.text(16 << 20)}: over by up to 35.0 MiB"
    exact = UnmergeDemand("node 1", 2 << 20, 1 << 20, upper_bound=False)
    assert exact.text(16 << 20) == "on node 1 it takes 2.0 MiB more, and 1.0 MiB are free above the floor of 16.0 MiB"


def test_remote_pages() -> None:
    def nodes(remote: int) -> dict[str, object]:
        return {"nodes": {str(node): {"mapped_pages": 2000, "remote_pages": remote * node} for node in (0, 1)}}

    found = only(look(nodes=nodes(1000)))
    assert (found.code, found.command) == (Code.REMOTE_PAGES, "ksmd-ctl set merge_across_nodes=0 --dry-run")
    assert only(look({"merge_across_nodes": 0}, nodes=nodes(1000))).command.startswith("ksmd-ctl migrate --pid 11")
    assert codes(look(nodes=nodes(100))) == []


# -- worth -------------------------------------------------------------------------------------------------


def test_forks_make_the_figure_too_high() -> None:
    family = [process(pid, relatives=8, merging_pages=4000) for pid in range(20, 29)]
    found = only(look({"pages_sharing": 36_000}, processes=family))
    assert (found.code, found.severity) == (Code.FORKED, Severity.NOTE)
    assert found.evidence[0].value == 0


def test_the_least_that_is_saved_is_what_the_report_says() -> None:
    family = [process(pid, relatives=2, merging_pages=4000) for pid in range(20, 23)]
    for saved in (-5000, 0, 1000 * PAGE, 40_000 * PAGE):
        found = look({"pages_sharing": 12_000}, processes=family, report={"derived": {"saved_bytes": saved}})
        assert saved_range(found) == (least_saved_bytes(saved, 12_000, PAGE), saved)
        assert saved_range(found)[0] <= saved  # type: ignore[index]


def test_what_relatives_map_at_places_of_their_own_is_saved() -> None:
    family = [process(pid, relatives=8, merging_pages=4000) for pid in range(20, 29)]
    saving = {"saved_bytes": 34_000 * PAGE, "full_scan_seconds": 0.4}

    def found(places: int) -> Snapshot:
        seen = DuplicatePages(36_000, 2000, 0, True, 0.1, places)
        return look({"pages_sharing": 34_000}, processes=family, duplicates=seen, report={"derived": saving})

    # 2,000 contents at two places in each of nine: findings F14 has 2,000 pages saved.
    assert saved_range(found(4000)) == (2000 * PAGE, 34_000 * PAGE)
    assert only(found(4000)).code == Code.FORKED
    assert "may be too high" in only(found(4000)).title
    # All mapped after the fork, wherever: that is what the kernel says.
    assert saved_range(found(36_000)) == (34_000 * PAGE, 34_000 * PAGE)
    assert codes(found(36_000)) == []


def test_zero_pages() -> None:
    assert only(look({"ksm_zero_pages": 10_000})).code == Code.ZERO_PAGES
    assert codes(look({"ksm_zero_pages": 10})) == []


def test_zero_pages_that_the_kernel_does_not_count() -> None:
    errors = {"errors": {"ksm_zero_pages": {"kind": "absent", "text": "this kernel does not have it"}}}
    mapping = [process(11, zero_mapped_pages=8192), process(12)]
    on = {"ksm_zero_pages": None, "use_zero_pages": 1}
    found = only(look(on, report=errors, processes=mapping))
    assert (found.code, found.severity) == (Code.ZERO_PAGES, Severity.NOTE)
    assert next(one.value for one in found.evidence if one.unit == "bytes") == 32 << 20
    # Without privilege the page tables are not seen, and it is said all the same.
    assert Code.ZERO_PAGES in codes(look(on, report=errors, listed=None))
    assert codes(look(on | {"use_zero_pages": 0}, report=errors)) == []


def test_it_costs_more_than_it_saves() -> None:
    worse = {"derived": {"saved_bytes": -5_000_000}}
    losing = [process(11, saved_bytes=-5_000_000)]
    assert codes(look(report=worse, processes=losing)) == [Code.COSTS_MORE]
    # Before it has settled nothing can be said.
    assert codes(look({"full_scans": 0}, since={"full_scans": 1}, report=worse, processes=losing)) == []


def test_processes_that_lose() -> None:
    losing = process(13, saved_bytes=-5_000_000)
    found = only(look(processes=[process(11), process(12), losing]))
    assert (found.code, found.severity) == (Code.LOSING_PROCESSES, Severity.COSTS)
    rich = {"derived": {"saved_bytes": 10**9}}
    assert only(look(processes=[process(11), process(12), losing], report=rich)).severity == Severity.NOTE


def test_dear_scanning() -> None:
    busy = {"derived": {"saved_bytes": 16_000_000, "ksmd_cpu_ratio": 0.6, "full_scan_seconds": 0.4}}
    found = only(look(report=busy))
    assert (found.code, found.command) == (Code.DEAR_SCANNING, "ksmd-ctl set pages_to_scan=33")
    assert codes(look(report=busy, since={"pages_sharing": 5000})) == []
    # Splits give pages of zeroes back that no counter has.
    assert codes(look({"split_folio_pages": 0}, report=busy, since={"split_folio_pages": 5120})) == []
    rich = {"derived": {"saved_bytes": 10 * GIB, "ksmd_cpu_ratio": 0.6, "full_scan_seconds": 0.4}}
    assert codes(look(report=rich)) == []


def test_huge_pages_split_for_little() -> None:
    few = {"split_blocks": 950, "low_yield_blocks": 900, "low_yield_pages": 1800}
    found = only(look(processes=[process(11, **few), process(12)]))
    assert found.code == Code.HUGE_PAGES_SPLIT
    shown = [(figure.name, figure.value) for figure in found.evidence]
    assert shown == [
        ("huge pages prevented", 900),
        ("merged and freed pages in each", 2.0),
        ("p11 (pid 11): huge pages prevented", 900),
        ("p11 (pid 11): saved by that", 1800),
    ]
    # Blocks that save much, however many, are what merging is for.
    assert codes(look(processes=[process(11, split_blocks=900, low_yield_blocks=63), process(12)])) == []


@pytest.mark.parametrize(
    ("facts", "way"),
    [
        ({"name": "qemu-system-x86"}, "mem-merge=off in QEMU's -machine"),
        (
            {"reason": "all of its memory by prctl(PR_SET_MEMORY_MERGE)", "unit": "web.service"},
            "MemoryKSM=no for web.service",
        ),
        (
            {"reason": "8.0 MiB by madvise or prctl", "unit": "web.service"},
            "MemoryKSM=no for web.service, or no madvise",
        ),
        ({}, "no madvise(MADV_MERGEABLE) in p11"),
    ],
)
def test_the_way_out_of_merging_is_that_of_the_process(facts: dict[str, object], way: str) -> None:
    found = only(look(processes=[process(11, low_yield_blocks=900, low_yield_pages=900, **facts), process(12)]))
    assert way in found.advice


def test_zeroes_that_splits_freed_are_saved_memory_that_ksm_does_not_count() -> None:
    few = {"merging_pages": 80, "saved_bytes": -2 << 20, "split_blocks": 80, "relatives": 1}
    few |= {"low_yield_blocks": 80, "low_yield_pages": 80}
    before = [process(pid, **few) for pid in (11, 12)]
    assert {Code.HUGE_PAGES_SPLIT, Code.LOSING_PROCESSES} <= set(codes(look(processes=before)))
    few |= {"low_yield_blocks": 0, "low_yield_pages": 0}
    freed = [process(pid, **few, split_zero_pages=80 * 512) for pid in (11, 12)]
    found = only(look(processes=freed))
    assert (found.code, found.severity) == (Code.SPLIT_ZEROES, Severity.NOTE)
    assert found.evidence[0].value == 2 * 80 * 512 * PAGE
    # Where splits are not counted.
    assert Code.SPLIT_ZEROES in codes(look({"split_folio_pages": None}, processes=freed))
    # What ksmd put there itself is counted by the kernel, and what was only read is nothing that was freed.
    counted = [process(pid, zero_pages=50_000, zero_mapped_pages=50_100, split_zero_pages=0) for pid in (11, 12)]
    assert codes(look(processes=counted)) == []
    unknown = [process(pid, zero_mapped_pages=50_100, split_zero_pages=None) for pid in (11, 12)]
    assert codes(look(processes=unknown)) == []


def test_forks_are_not_said_to_save_too_little_where_splits_freed_more() -> None:
    forks = [process(pid, relatives=1, split_zero_pages=0) for pid in (11, 12)]
    assert Code.FORKED in codes(look(processes=forks))
    forks = [process(pid, relatives=1, split_zero_pages=9000) for pid in (11, 12)]
    assert Code.FORKED not in codes(look(processes=forks))
    assert codes(look(processes=[process(11, split_blocks=20), process(12)])) == []


# -- others ------------------------------------------------------------------------------------------------


def writing(*names: str) -> dict[str, object]:
    return {
        "writers": [
            {"name": name, "pid": 800 + number, "units": [f"{name}.service"]} for number, name in enumerate(names)
        ]
    }


def test_one_other_writer_is_named() -> None:
    found = only(look(report=writing("ksmtuned")))
    assert (found.code, found.severity, found.command) == (
        Code.OTHER_WRITER,
        Severity.NOTE,
        "systemctl disable --now ksmtuned",
    )


def test_two_managers() -> None:
    found = only(look(report=service(run=knob("held", 1, 1)) | writing("ksmtuned")))
    assert (found.code, found.severity) == (Code.TWO_MANAGERS, Severity.COSTS)
    assert "ksmd-ctl, ksmtuned" in found.title
    assert only(look(report=writing("ksmtuned", "momd"))).title.endswith("ksmtuned, momd")


def test_the_advisor_is_somebody_else_only_where_another_speed_is_wanted() -> None:
    advisor = {"writers": [{"name": "advisor", "pid": None}]}
    assert codes(look({"advisor_mode": "scan-time"}, report=advisor)) == []
    wants = service(pages_to_scan=knob("failed", 1000, 500, "EINVAL")) | advisor
    assert Code.TWO_MANAGERS in codes(look({"advisor_mode": "scan-time"}, report=wants))
    wants = service(advisor_mode=knob("held", "scan-time", "scan-time")) | advisor
    assert codes(look({"advisor_mode": "scan-time"}, report=wants)) == []


def test_drift_by_nobody_knows_whom() -> None:
    found = only(look(report=service(pages_to_scan=knob("drifted", 1000, 100, "somebody else wrote it"))))
    assert (found.code, found.severity) == (Code.OTHER_WRITER, Severity.COSTS)


def test_the_service_can_not_look() -> None:
    found = only(look(report=service() | {"numa": {"error": "asking the broker: EACCES", "failures": 7}}))
    assert found.code == Code.SERVICE_BLIND


def test_what_was_not_seen() -> None:
    found = only(look(unknown=(Unknown("nodes", "EACCES", "only root may read it"),), duplicates=None))
    assert (found.code, found.severity) == (Code.UNSEEN, Severity.NOTE)
    assert "only root may read it" in found.advice


def test_what_made_no_sense() -> None:
    errors = {"errors": {"run": {"kind": "unparsable", "text": "'x' is not a number"}, "x": {"kind": "absent"}}}
    found = only(look({"run": None}, report=errors))
    assert (found.code, found.title) == (Code.UNSEEN, "Could not be looked at: run")


def test_how_ksm_pages_are_detected_on_6_12() -> None:
    assert only(look(nodes={"survey": {"detection": "pagemap"}})).code == Code.KPAGEFLAGS


# -- all of them -------------------------------------------------------------------------------------------


def test_the_worst_comes_first() -> None:
    found = diagnosis(look({"run": 0}, processes=[process(11, merging_pages=10)], report=writing("momd")))
    ranks = [one.severity.rank for one in found.findings]
    assert ranks == sorted(ranks)
    assert not found.healthy


def test_of_the_example_report() -> None:
    report = example()
    processes = json.loads((CONTRACTS / "processes.json").read_text())
    nodes = json.loads((CONTRACTS / "nodes.json").read_text())
    found = {one.code for one in diagnose(Snapshot(report, report, 5.0, nodes, ProcessView.all_of(processes)))}
    assert {Code.KNOB_PENDING, Code.TWO_MANAGERS, Code.REMOTE_PAGES, Code.NO_ROOM} <= found


def test_every_check_says_where_it_is_from() -> None:
    for check in CHECKS:
        assert check.__doc__, check.__name__


ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**12) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from([*READINGS, "derived", "nodes", "processes", "readings", "knobs", "errors", "healing", "numa"])
DOCUMENTS = st.dictionaries(NAMES, ANY | st.dictionaries(NAMES, ANY, max_size=4), max_size=6)


@given(DOCUMENTS, DOCUMENTS, DOCUMENTS, DOCUMENTS)
def test_any_document_is_looked_at(
    before: dict[str, object], after: dict[str, object], nodes: dict[str, object], processes: dict[str, object]
) -> None:
    """What comes over a socket may be of another version: nothing in it makes a diagnosis fail."""
    try:
        listed = ProcessView.all_of(processes)
    except Unparsable:
        listed = None
    found = Snapshot(before, after, 5.0, nodes, listed, None)
    json.dumps(encode(diagnosis(found)))


def commands() -> list[str]:
    """The commands of everything that can be found."""
    looks = [
        look({"run": 0}),
        look({"run": 0}, report=service(run=knob("held", 0, 0))),
        look({"run": 0}, report=service("observe")),
        look({"pages_to_scan": 0}),
        look({"sleep_millisecs": 3_600_000}),
        look(CRAWL, processes=[process(resident_bytes=64 * GIB)], report={"derived": {}}),
        look(duplicates=APART),
        look(TWINS, duplicates=None),
        look(TWINS, duplicates=None, report=service()),
        look({"max_page_sharing": 2, "stable_node_dups": 2000}),
        look(report=service(merge_across_nodes=knob("pending", 0, 1))),
        look({"run": 0}, processes=[]),
        look(report={"derived": {"saved_bytes": -5_000_000}}),
    ]
    return [finding.command for one in looks for finding in diagnose(one) if finding.command]


def test_every_command_of_ours_is_one(tmp_path: Path) -> None:
    """What is to be copied is understood: options and settings are checked as if it were run."""
    found = commands()
    assert len(found) >= 13
    for command in found:
        for part in command.split(" && "):
            if part.startswith("ksmd-ctl "):
                make_parser().parse_args(shlex.split(part)[1:])
            elif part.startswith("printf "):
                text, _, path = part.removeprefix("printf ").partition(" > ")
                assert re.fullmatch(r"/etc/ksmd-ctl/conf\.d/[a-z_]+\.toml", path)
                settings = shlex.split(text)[0].replace("\\n", "\n")
                # It goes beside a configuration that sets a policy, or it sets one itself.
                (tmp_path / "c.toml").write_text('policy = "fixed"\nknobs.use_zero_pages = 0\n')
                (tmp_path / "conf.d").mkdir(exist_ok=True)
                (tmp_path / "conf.d/added.toml").write_text(settings)
                load(str(tmp_path / "c.toml"))
            else:
                assert part.startswith(("sleep ", "systemctl ")), part


def audited(*domains: Mapping[str, object], **more: object) -> dict[str, object]:
    others = more.pop("others", {"domains": 0, "not_isolated": 0, "shared_frames": 0})
    return service() | {"domains": {"mode": "nodes", "error": "", "domains": list(domains), "others": others, **more}}


def test_domains_that_share_memory() -> None:
    bad = {
        "domain": "gold",
        "verdict": "not isolated",
        "reasons": [{"cause": "shared frames", "text": "merged frames are shared with silver"}],
    }
    found = only(look(report=audited(bad, {"domain": "silver", "verdict": "isolated", "reasons": []})))
    assert (found.code, found.severity) == (Code.DOMAINS_SHARE, Severity.COSTS)
    assert found.title == "Trust domains are not isolated: gold"
    assert "AllowedMemoryNodes=" in found.advice
    assert [(figure.name, figure.value) for figure in found.evidence] == [
        ("gold: shared frames", "merged frames are shared with silver")
    ]
    found = only(look(report=audited(bad, mode="report")))
    assert 'mode = "nodes"' in found.advice


def test_domains_of_their_own_that_share_memory_are_counted() -> None:
    others = {"domains": 9, "not_isolated": 3, "shared_frames": 512}
    found = only(look(report=audited(others=others)))
    assert found.title == "Trust domains are not isolated: 3 that are domains of their own"
    assert [figure.value for figure in found.evidence] == [512]


def test_domains_that_nobody_can_audit() -> None:
    found = only(look(report=audited(error="looking at processes: refused", failures=4)))
    assert (found.code, found.evidence[0].value) == (Code.DOMAINS_SHARE, "looking at processes: refused")


def test_nothing_is_said_of_domains_that_are_isolated() -> None:
    assert diagnose(look(report=audited({"domain": "gold", "verdict": "no members", "reasons": []}))) == ()
