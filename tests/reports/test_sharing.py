# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import dataclasses
from typing import Any

from ksmd_ctl.host.memory import KsmDetection
from ksmd_ctl.host.operation import finish
from ksmd_ctl.host.sharing import MOST_PROCESSES, Sharing
from ksmd_ctl.reports.numa import OTHER, Largest
from ksmd_ctl.reports.sharing import grouping, sharing_document, sharing_section
from tests.fakes.host import FakeHost, process

PAGE = 4096


def host(frames: list[dict[int, int]]) -> FakeHost:
    found = FakeHost()
    pids = sorted({pid for mapped in frames for pid in mapped})
    found.running = [process(pid, f"vm-{pid}", 1000 - pid) for pid in pids]
    found.frames = frames
    return found


def looked(there: FakeHost, by: str = "unit") -> tuple[Any, Sharing]:
    groups = grouping(there.running, by)
    return groups, finish(there.sharing(groups.members, 1.0))


def test_a_document_has_groups_and_pairs_with_what_they_share() -> None:
    there = host([{1: 1, 2: 1}] * 300 + [{1: 2, 3: 1}] * 10 + [{2: 1}] * 7)
    found: Any = sharing_document(there.identity, *looked(there), there.now + 5)
    assert (found["by"], found["look"]["age_seconds"], found["look"]["complete"]) == ("unit", 5.0, True)
    assert found["look"]["saved_bytes"] == (300 + 20) * PAGE
    assert [group["group"] for group in found["groups"]] == ["vm-1", "vm-2", "vm-3"]
    first, second, third = found["groups"]
    assert (first["merged_bytes"], first["shared_bytes"], first["frames"]) == (320 * PAGE, 320 * PAGE, 310)
    assert (second["merged_bytes"], second["shared_bytes"], second["own_frames"]) == (307 * PAGE, 300 * PAGE, 7)
    # If the third leaves, the first still has two mappings of each; if the first does, the others have one.
    assert [group["leaving_costs_bytes"] // PAGE for group in found["groups"]] == [310, 300, 0]
    assert first["saved_alone_bytes"] == 10 * PAGE
    assert third["saved_bytes"] == int(10 * 2 / 3) * PAGE
    assert [(pair["groups"], pair["shared_bytes"]) for pair in found["pairs"]] == [
        (["vm-1", "vm-2"], 300 * PAGE),
        (["vm-1", "vm-3"], 10 * PAGE),
    ]
    assert found["pairs_left_out"] == 0


def test_rounded_counts_say_nothing_of_a_few_pages() -> None:
    there = host([{1: 1, 2: 1}] * 300 + [{1: 1, 3: 1}] * 255)
    found: Any = sharing_document(there.identity, *looked(there), there.now, round_pages=256)
    assert [(pair["groups"], pair["frames"]) for pair in found["pairs"]] == [(["vm-1", "vm-2"], 256)]
    # The last two have nothing that may be told: by name.
    assert [(group["group"], group["shared_bytes"] // PAGE) for group in found["groups"]] == [
        ("vm-1", 512),
        ("vm-2", 256),
        ("vm-3", 0),
    ]
    assert all(number % 256 == 0 for group in found["groups"] for key, number in group.items() if "frames" in key)
    assert all(
        number % (256 * PAGE) == 0 for group in found["groups"] for key, number in group.items() if "bytes" in key
    )


def test_of_a_group_that_was_not_looked_at_nothing_is_said() -> None:
    there = host([{1: 1, 2: 1}] * 300 + [{1: 1, 3: 1}] * 255)
    groups, found = looked(there)
    late = dataclasses.replace(found, unread=(2,), complete=False)
    document: Any = sharing_document(there.identity, groups, late, there.now)
    assert [(one["group"], one["unread"]) for one in document["groups"]] == [("vm-1", 0), ("vm-3", 0), ("vm-2", 1)]
    unknown = document["groups"][2]
    assert {key for key, value in unknown.items() if value is None} == unknown.keys() - {"group", "processes", "unread"}
    assert sharing_section(groups, late, Largest(), PAGE, 256)["complete"] is False


def test_who_has_nothing_merged_takes_no_part_unless_it_is_a_fork() -> None:
    processes = [
        process(1, "a", 0),
        process(2, "b", 5),
        process(3, "c", 0, relatives=1),
        process(4, "d", 0, ksm_mapped_pages=3),
    ]
    groups = grouping(processes, "process")
    assert groups.names == ("p2[2]", "p3[3]", "p4[4]")
    assert groups.left_out == 0


def test_of_too_many_processes_those_with_most_merged_pages_are_looked_at() -> None:
    processes = [process(pid, "a", pid) for pid in range(1, MOST_PROCESSES + 11)]
    groups = grouping(processes, "unit")
    assert (groups.names, groups.left_out) == (("a",), 10)
    assert min(one.pid for one in groups.members[0]) == 11
    found: Any = sharing_document(
        FakeHost().identity, groups, Sharing(0.0, (), (0,), 1.0, True, KsmDetection.KPAGEFLAGS), 0.0
    )
    assert (found["look"]["complete"], found["look"]["left_out"]) == (False, 10)


def test_a_report_names_those_that_share_most_and_adds_up_the_others() -> None:
    # Each shares with the next, with the last two the least.
    there = host([{number: 1, number + 1: 1} for number in range(1, 6) for _ in range(256 * (7 - number))])
    groups, sharing = looked(there)
    found: Any = sharing_section(groups, sharing, Largest(2), PAGE, 256)
    assert [group["group"] for group in found["groups"]] == ["vm-2", "vm-3"]
    assert found["other"]["group"] == OTHER
    assert found["other"]["processes"] == 4
    # What the others share with one another is not shared with anybody else.
    assert found["other"]["shared_bytes"] == 256 * (6 + 4) * PAGE
    assert {tuple(pair["groups"]): pair["frames"] // 256 for pair in found["pairs"]} == {
        ("vm-2", "other"): 6,
        ("vm-2", "vm-3"): 5,
        ("vm-3", "other"): 4,
    }
    alone: Any = sharing_section(*looked(host([{1: 1, 2: 1}] * 256 + [{3: 2}] * 256)), Largest(), PAGE, 256)
    assert {group["group"]: group["shared_bytes"] for group in alone["groups"] if group["merged_bytes"]} == {
        "vm-1": 256 * PAGE,
        "vm-2": 256 * PAGE,
        "vm-3": 0,
    }
    nothing: Any = sharing_section(*looked(host([])), Largest(), PAGE, 256)
    assert (nothing["groups"], nothing["pairs"], nothing["other"]["shared_bytes"]) == ([], [], 0)
