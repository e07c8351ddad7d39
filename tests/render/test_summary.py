# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.render.summary import BAD, GOOD, PLAIN, explanation, summary, summary_text
from ksmd_ctl.reports.saving import Counters
from tests.render.reports import example

EXAMPLE = """\
host       this machine, kernel 6.12.107
service    ksmd-ctl 0.1.0, up 1 h, metrics on 127.0.0.1:19753
policy     fixed, on drift enforce, at stop restore
why        quick: 40,000 pages that ksmd has not looked at twice may save 20,000
ksm        merging (run = 1)
drifted    pages_to_scan: wanted 1000, found 100: somebody else wrote it, 1 time so far
pending    merge_across_nodes: wanted 0, found 1: needs a transaction
held       run 1
merged     251,000 pages (980.5 MiB) onto 1,000 KSM pages
huge pages 2.0 GiB in mergeable memory; merging prevents 1,200 more: 125 pages saved for each, fewer than 32 for 40
saved      960.9 MiB = 976.6 MiB merged - 15.6 MiB for ksmd's records
unrealised 8,000 pages (31.2 MiB): duplicate KSM pages; un-merging 4,096 pages brought 2,028 of 2,048 pages
scanning   20,000 pages/s; ksmd takes 3.4 % of a CPU; 12 full scans, one in 12.8 s (over 1 s)
nodes      0: 1.0 GiB of 4.0 GiB free; 1: 2.0 GiB of 4.0 GiB free
merged on  KSM pages: about 600 on node 0, 400 on node 1; 10.0 % away from home (surveyed 12 s ago)
exposed    un-merging everything now: on node 0 it takes up to 1.1 GiB more, \
and 1.0 GiB are free above the floor of 128.0 MiB: over by up to 143.3 MiB
exposed    un-merging everything now: in the memory cgroup /tenant.slice it takes up to 3.9 MiB more, \
and 1.0 MiB are free above its reserve: over by up to 2.9 MiB
domain     silver: not isolated: 1 process may allocate on node 0 as well: qemu-system-x86 (pid 4242)
domains    isolated: gold; not isolated: silver
switched   off: web-1 (pid 4711), 1 h 30 min ago, by ksmd-ctl merge off --vm web-1, pid 4800, uid 0; started again as \
pid 5120, and is mergeable
writers    also written by ksmtuned (pid 812)
changed    run 1 to 2 by somebody else (running: ksmtuned), 3 min ago; 2 changes in a day
last       transaction done: merge_across_nodes 1 -> 0, 40.0 % of 10,000 pages at home before, 100.0 % after
unparsable use_zero_pages: 'x' is not a number
"""


def lines(report: dict[str, Any]) -> dict[str, str]:
    return {line.label: line.text for line in summary(report)}


def test_the_example() -> None:
    assert summary_text(example()) == EXAMPLE


def test_what_somebody_has_to_look_at_stands_out() -> None:
    tones = {line.label: line.tone for line in summary(example())}
    assert {label for label, tone in tones.items() if tone == BAD} == {
        "drifted",
        "pending",
        "domain",
        "domains",
        "switched",
        "writers",
        "changed",
        "unparsable",
    }
    # What might happen is for people to know; it is no state that somebody has to end.
    assert tones["exposed"] == PLAIN
    assert {label for label, tone in tones.items() if tone == GOOD} == {"held"}


def test_a_simulated_host_says_so_first() -> None:
    report = example()
    report["host"]["simulated"] = True
    first = next(iter(summary(report)))
    assert "SIMULATED" in first.text
    assert first.tone == BAD


@pytest.mark.parametrize(
    ("run", "text"),
    [
        (0, "stopped (run = 0)"),
        (1, "merging (run = 1)"),
        (2, "everything was un-merged, stopped (run = 2)"),
        (5, "merging, and waits while memory goes offline (run = 5)"),
        (3, "unknown (run = 3)"),
    ],
)
def test_run(run: int, text: str) -> None:
    report = example()
    report["readings"]["run"] = run
    assert lines(report)["ksm"] == text


def test_without_a_second_look_there_is_no_speed() -> None:
    report = example()
    report["derived"] |= dict.fromkeys(("pages_scanned_per_second", "full_scan_seconds", "ksmd_cpu_ratio"))
    report["derived"]["rate_seconds"] = None
    assert lines(report)["scanning"] == "12 full scans; scan rate unknown: needs two samples (status --interval 1)"


def test_what_can_not_be_read_is_unknown_and_not_0() -> None:
    report = example()
    report["readings"] = {}
    report["derived"] = dict.fromkeys(report["derived"])
    report["derived"]["rate_seconds"] = 1
    report["errors"] = {
        name: {"kind": "unreadable", "text": "EACCES"}
        for name in ("run", "pages_sharing", "full_scans", "pages_scanned")
    }
    found = lines(report)
    assert found["ksm"] == found["merged"] == "unknown (unreadable)"
    assert found["saved"] == "unknown"
    said = "scan rate unknown (unreadable); ksmd's CPU share unknown; unknown (unreadable)"
    assert found["scanning"].startswith(said)


def test_one_node_needs_no_line_of_its_own() -> None:
    report = example()
    del report["numa"]["nodes"]["1"]
    assert "merged on" not in lines(report)


def test_where_merged_pages_are_is_unknown_where_nobody_could_look() -> None:
    report = example()
    for node in report["numa"]["nodes"].values():
        node.update(dict.fromkeys(node))
    report["numa"] |= {"error": "looking: CAP_SYS_PTRACE is missing", "age_seconds": None}
    found = lines(report)
    assert found["merged on"] == "where KSM pages are is unknown; share away from home unknown"
    assert found["census"] == "failed: looking: CAP_SYS_PTRACE is missing"


def test_a_bad_new_configuration_shows() -> None:
    report = example()
    report["daemon"]["reload_error"] = "policy: is no policy"
    assert "is no policy" in lines(report)["config"]


def test_a_policy_that_writes_nothing_says_so() -> None:
    report = example()
    report["policy"] = "observe"
    assert lines(report)["policy"] == "observe (nothing is written)"


def test_where_zero_pages_are_not_counted_the_saving_says_so() -> None:
    report = example()
    report["readings"]["use_zero_pages"] = 1
    report["errors"]["ksm_zero_pages"] = {"kind": "absent", "text": "this kernel does not have it"}
    assert lines(report)["saved"].endswith("without pages of zeroes, which this kernel does not count")
    report["readings"]["use_zero_pages"] = 0
    assert "zeroes" not in lines(report)["saved"]


def test_knobs_at_their_defaults_are_left_out_unless_everything_is_asked_for() -> None:
    report = example()
    assert "found" not in lines(report)
    report["knobs"]["sleep_millisecs"]["found"] = 50
    assert lines(report)["found"] == "sleep_millisecs 50"
    found = {line.label: line.text for line in summary(report, everything=True)}["found"]
    assert found == "sleep_millisecs 50, advisor_mode none"


def test_the_saving_is_the_sum_of_what_is_said_of_it() -> None:
    report = example()
    report["readings"]["ksm_zero_pages"] = 2560
    report["derived"] |= {"zero_bytes": 2560 * 4096, "saved_bytes": 1024000000 + 2560 * 4096 - 16384000}
    report["derived"]["saved_low_bytes"] = report["derived"]["saved_bytes"]
    found = lines(report)
    assert found["zero pages"] == "2,560 pages of zeroes replaced by the zero page"
    assert found["saved"] == "970.9 MiB = 976.6 MiB merged + 10.0 MiB zero pages - 15.6 MiB for ksmd's records"


def split(pages: int) -> dict[str, Any]:
    """The example, with so many pages of zeroes that splits freed."""
    report = example()
    report["numa"] |= {"split_zero_pages": pages, "age_seconds": 16.4}
    saved = report["derived"]["saved_bytes"] + pages * 4096
    report["derived"] |= {
        "split_zero_bytes": pages * 4096,
        "saved_frames_bytes": saved,
        "saved_frames_low_bytes": saved,
    }
    return report


def test_zeroes_that_splits_freed_are_in_the_saving_which_says_that_it_is_in_frames() -> None:
    report = split(25_000)
    found = lines(report)
    assert found["zeroes"] == (
        "25,000 pages of zeroes freed by splits of huge pages, in no counter of the kernel (counted 16 s ago)"
    )
    assert found["saved"] == (
        "1.0 GiB in frames = 976.6 MiB merged + 97.7 MiB zero pages - 15.6 MiB for ksmd's records; "
        "the kernel counts 960.9 MiB"
    )
    report["derived"]["saved_frames_low_bytes"] = 100 << 20
    assert lines(report)["saved"].startswith(
        "100.0 MiB to 1.0 GiB in frames = at most 976.6 MiB merged + 97.7 MiB zero"
    )
    # Nothing is merged any more, and what was freed stays freed.
    report["derived"] |= {"merged_pages": 0, "freed_bytes": 0}
    assert "in frames" in lines(report)["saved"]
    report["derived"] |= {"saved_bytes": -(1 << 20)}
    assert {line.label: line.tone for line in summary(report)}["saved"] == ""


def test_it_says_what_was_split_since_the_zeroes_were_counted() -> None:
    counted = "pages of zeroes freed by splits of huge pages, in no counter of the kernel (counted 16 s ago"
    report = split(25_000)
    report["numa"]["split_since_pages"] = 12_288
    assert lines(report)["zeroes"] == f"25,000 {counted}; 12,288 pages of huge pages split since then)"
    report = split(0)
    assert "zeroes" not in lines(report)
    report["numa"]["split_since_pages"] = 512
    assert lines(report)["zeroes"] == f"0 {counted}; 512 pages of huge pages split since then)"


def test_where_what_splits_freed_is_unknown_the_saving_is_the_kernels_count_and_says_so() -> None:
    report = example()
    report["derived"] |= {"split_zero_bytes": None, "saved_frames_bytes": None, "saved_frames_low_bytes": None}
    report["readings"]["split_folio_pages"] = 0
    assert "count" not in lines(report)["saved"]
    report["readings"]["split_folio_pages"] = 12 * 512
    said = "by the kernel's count, without pages of zeroes that splits of huge pages may have freed"
    assert lines(report)["saved"].endswith(said)
    report["derived"]["merged_pages"] = 0
    assert said not in lines(report)["saved"]


def test_what_fork_shares_makes_the_saving_a_range() -> None:
    report = example()
    report["derived"]["saved_low_bytes"] = 24 << 20
    assert lines(report)["saved"].startswith("24.0 MiB to 960.9 MiB = at most 976.6 MiB merged")


def test_a_change_of_run_alone_is_named() -> None:
    report = example()
    report["transaction"] = {"running": None, "last": {"result": "done", "knobs": {}, "run_after": 1}}
    assert lines(report)["last"] == "transaction done: run = 1"


def test_where_nothing_is_merged_nothing_is_saved() -> None:
    report = example()
    report["derived"] |= {"merged_pages": 0, "freed_bytes": 0, "saved_bytes": -164659, "metadata_bytes": 164659}
    assert lines(report)["saved"] == "nothing: ksmd's records of the pages it has looked at take 160.8 KiB"


@pytest.mark.parametrize(
    ("stale", "gone", "said"),
    [
        (True, 59516, "ksmd is stopped, and 59,516 pages or more of these are not merged any more"),
        (True, None, "pages that were un-merged while ksmd was stopped are still counted as merged"),
        (None, None, Counters(None, None).text),
    ],
)
def test_stale_counters_are_said_to_be_stale(stale: bool | None, gone: int | None, said: str) -> None:
    report = example()
    report["derived"] |= {"stale": stale, "gone_pages": gone, "stale_text": Counters(stale, gone).text}
    if stale:
        report["derived"]["saved_bytes"] = None
    assert lines(report)["stale"] == said
    assert ("unknown" in lines(report)["saved"]) is bool(stale)
    assert ("may be out of date" in lines(report)["saved"]) is (stale is None)


def test_a_cost_that_is_greater_than_the_saving_stands_out() -> None:
    report = example()
    report["derived"]["saved_bytes"] = -4096
    found = {line.label: line for line in summary(report)}["saved"]
    assert found.text.startswith("-4.0 KiB")
    assert found.tone == BAD


PATHS = st.sampled_from(
    [(key,) for key in example()]
    + [(key, inner) for key in example() if isinstance(example()[key], dict) for inner in example()[key]]
)


@given(PATHS, st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=2))
def test_any_part_may_be_of_another_form(path: tuple[str, ...], value: object) -> None:
    report = example()
    part = report
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    assert summary_text(report).startswith("host ")


def test_what_is_lost_and_what_gets_it_back() -> None:
    report = example()
    healing = report["healing"]
    healing |= {"allowed": False, "text": "", "complete": False}
    assert lines(report)["unrealised"] == (
        "at least 8,000 pages (31.2 MiB): duplicate KSM pages; healing.twins = true merges them"
    )
    healing |= {"allowed": True, "complete": True}
    assert lines(report)["unrealised"].endswith("duplicate KSM pages; being recovered")
    healing["left"] = {"its mapping is not writable": 8000}
    assert lines(report)["unrealised"].endswith("duplicate KSM pages; nothing recovers these")
    healing["unrealised"] = {"twins": 0, "smart_scan": 3, "other": None}
    assert [line.text for line in summary(report) if line.label == "unrealised"] == [
        "3 pages (12.0 KiB): identical pages that are not merged because of smart_scan, "
        "estimated from past recoveries; the next one merges them"
    ]
    healing["unrealised"] = {"twins": None, "swapin": 1000, "advisor": 2000}
    assert [line.text for line in summary(report) if line.label == "unrealised"] == [
        "1,000 pages (3.9 MiB): copies that swap made of merged pages; two full scans merge them again",
        "2,000 pages (7.8 MiB): identical pages that are not merged because the kernel's advisor made ksmd very slow; "
        "policy = kernel or adaptive avoids that",
    ]
    report["healing"] = None
    assert "unrealised" not in lines(report)


def test_the_explanation_has_every_reason_and_the_latest_decisions() -> None:
    lines = [str(line) for line in explanation(example())]
    assert lines == [
        "scan rate  1,200 pages a batch, for 80 % of a CPU",
        "healed     smart_scan: 2 times, 1,000 pages merged meanwhile",
        "decided    4 s ago: quick: 40,000 pages that ksmd has not looked at twice may save 20,000 "
        "(smart_scan = 0, sleep_millisecs = 10)",
        "changed    run 1 to 2 by somebody else (running: ksmtuned), 3 min ago; 2 times, first 1 h 6 min ago",
    ]
    without = {**example(), "decision": None, "foreign_changes": None}
    assert [line.label for line in explanation(without)] == ["why"]


def change(knob: str, **more: object) -> dict[str, object]:
    return {
        "knob": knob,
        "from": 1,
        "to": 2,
        "held": True,
        "writers": [],
        "times": 1,
        "age_seconds": 7200.0,
        "first_age_seconds": 7200.0,
        **more,
    }


def test_what_others_changed_has_a_line_and_all_of_it_is_explained() -> None:
    report = example() | {"writers": []}
    report["foreign_changes"] = many = [
        change("run", times=3, first_age_seconds=80000.0),
        change("smart_scan", held=False, writers=["ksmtuned", "tuned"]),
        change("run", **{"from": 2, "to": 0}),
        *(change(f"knob{number}") for number in range(4)),
    ]
    said = [(line.text, line.tone) for line in summary(report) if line.label == "changed"]
    assert said == [
        (
            "run 1 to 2 by somebody else, 2 h ago; 9 changes of 6 knobs in a day: `ksmd-ctl history --kind foreign`",
            BAD,
        )
    ]
    report["foreign_changes"] = [change("smart_scan", held=False, writers=["ksmtuned", "tuned"])]
    (line,) = [line for line in summary(report) if line.label == "changed"]
    assert line.text == "smart_scan 1 to 2 by somebody else (running: ksmtuned, tuned), 2 h ago, not held"
    assert line.tone == PLAIN
    report["foreign_changes"] = many
    assert lines(report)["writers"] == "no running program is known to write the knobs"
    explained = [line.text for line in explanation(report) if line.label == "changed"]
    assert len(explained) == 7
    assert explained[0] == "run 1 to 2 by somebody else, 2 h ago; 3 times, first 22 h 13 min ago"
    assert explained[2] == "run 2 to 0 by somebody else, 2 h ago"


def left(**more: object) -> dict[str, object]:
    return {
        "pid": 4711,
        "config": "",
        "started_age_seconds": 7200.0,
        "seen_age_seconds": 300.0,
        "may_be_restarted": False,
        "knobs": {"run": {"found": 1, "at_start": 0, "at_first": 0}, "smart_scan": {"found": None, "at_start": 1}},
        **more,
    }


def test_a_service_that_died_is_named_with_what_it_left_and_what_puts_it_back() -> None:
    report = example() | {"daemon": None, "left_by_service": left()}
    said = lines(report)
    assert said["ended"] == "a service (pid 4711, started 2 h ago, last seen 5 min ago) died and left knobs changed"
    assert said["left"] == "run = 1 (was 0), smart_scan = unknown (was 1)"
    assert said["restore"].startswith(
        "`ksmd-ctl daemon --restore` restores the values from before the first change in this boot. "
    )
    assert {line.tone for line in summary(report) if line.label == "ended"} == {BAD}


def test_a_service_that_died_just_now_is_no_alarm() -> None:
    just = left(seen_age_seconds=None, started_age_seconds=4.0, may_be_restarted=True, config="/etc/my file.toml")
    report = example() | {"daemon": None, "left_by_service": just}
    said = lines(report)
    assert said["ended"].endswith(
        "(pid 4711, started 4 s ago, no longer there) died and left knobs changed; systemd may be starting it again"
    )
    assert "`ksmd-ctl daemon --restore --config '/etc/my file.toml'`" in said["restore"]
    assert {line.tone for line in summary(report) if line.label == "ended"} == {PLAIN}


@pytest.mark.parametrize(
    ("process", "said"),
    [
        ({"pid": 4711, "alive": True}, "; process 4711 carries it out ("),
        (
            {"pid": 4711, "alive": False},
            "; process 4711, which carried it out, has ended: `ksmd-ctl set --recover` ends the transaction (",
        ),
        (
            {"pid": None, "alive": None},
            "; whether its process still carries it out can't be seen; if it has ended, `ksmd-ctl set --recover` ends",
        ),
    ],
)
def test_whether_a_transaction_in_the_journal_is_still_carried_out(process: dict[str, object], said: str) -> None:
    report = example()
    running = {**report["transaction"]["last"], "phase": "unshare", "result": None, "process": process}
    report |= {"daemon": None, "transaction": {"running": running, "last": None}}
    assert f"un-merging page by page{said}" in lines(report)["running"]


def domain_lines(**changed: object) -> list[tuple[str, str, str]]:
    report = example()
    report["domains"] |= changed
    found = [(line.label, line.text, line.tone) for line in summary(report)]
    return [line for line in found if line[0].startswith("domain")]


def test_domains_that_are_isolated_have_one_line() -> None:
    gold = {"domain": "gold", "verdict": "isolated", "reasons": []}
    iron = {"domain": "iron", "verdict": "no members", "reasons": []}
    assert domain_lines(domains=[gold, iron], isolated=True) == [
        ("domains", "isolated: gold; no members: iron", GOOD),
    ]


def test_of_several_reasons_the_first_is_told() -> None:
    bad = {"domain": "gold", "verdict": "not isolated", "reasons": [{"text": text} for text in ("one", "two", "three")]}
    assert domain_lines(domains=[bad])[0] == ("domain", "gold: not isolated: one, and 2 more reasons", BAD)


def test_domains_of_their_own_that_share_something_are_counted() -> None:
    others = {"domains": 5, "not_isolated": 3, "shared_frames": 512}
    assert domain_lines(domains=[], others=others) == [
        ("domains", "3 of 5 that are domains of their own are not isolated", BAD)
    ]


def test_no_audit_yet_and_one_that_failed() -> None:
    nothing = {"domains": [], "age_seconds": None, "others": {}}
    assert domain_lines(**nothing) == [("domains", "no audit yet", PLAIN)]
    assert domain_lines(**nothing, error="no broker") == [("domains", "the audit failed: no broker", BAD)]
