# SPDX-License-Identifier: GPL-2.0-or-later
"""Twins on the simulated host: found, and what un-merging them brings, with every profile that keeps them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ksmd_ctl.engine.host import EngineHost
from ksmd_ctl.engine.memory import PAGE_SIZE
from ksmd_ctl.engine.survey import NOT_WRITABLE
from ksmd_ctl.host.duplicates import POLICY, DuplicateKsmPages
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.memory import KsmDetection, ProcessId
from ksmd_ctl.host.operation import finish
from tests.engine.lab import CHAINS, NEW
from tests.engine.test_host import lab, process_with, scan
from tests.fakes.unsharing import unshare_one

CONTENTS = ["c", "c", "k", "k", "m", "m", "x", "x"]


def met(profile: str) -> tuple[EngineHost, ProcessId, int]:
    """F1: four contents, two mappings each, moved to where each has two already."""
    host = lab(profile)
    moved, start = process_with(host, CONTENTS, None)
    process_with(host, CONTENTS, 1)
    scan(host, 3)
    host.move_pages(moved, [start + 2 * PAGE_SIZE * number for number in range(4)], 1, shared=True)
    scan(host, 3)
    return host, moved, start


def look(host: EngineHost, most_pages: int = 1000) -> DuplicateKsmPages:
    return finish(host.duplicate_ksm_pages(1.0, most_pages))


def heal(host: EngineHost, found: DuplicateKsmPages) -> int:
    requests = [unshare_one(part.process, part.ranges, part.to) for part in found.parts]
    return sum(finish(host.unshare(request, 60)).unshared for request in requests)


def counts(host: EngineHost) -> tuple[float | int | None, ...]:
    sample = host.sample()
    return sample.number("pages_shared"), sample.number("pages_sharing")


@pytest.mark.parametrize("profile", CHAINS)
def test_migrated_twins_are_found_and_un_merging_them_brings_what_the_seed_brings(profile: str) -> None:
    host, _moved, _start = met(profile)
    assert counts(host) == (8, 8)
    found = look(host)
    assert (found.frames, found.reclaimable, found.left) == (8, 4, {})
    assert (found.part_frames, found.part_pages, found.complete) == (4, 8, True)
    assert found.detection is KsmDetection.ENGINE
    assert heal(host, found) == 8
    scan(host, 4)
    seed, _, _ = met("seed")
    assert counts(host) == counts(seed) == (4, 12)
    again = look(host)
    assert (again.frames, again.reclaimable, again.parts) == (4, 0, ())


@pytest.mark.parametrize("profile", ["5.10", "6.1"])
def test_a_chain_with_one_dup_is_no_twin(profile: str) -> None:
    host, _, _ = met(profile)
    # Not yet due: the chain is not walked in full, and stays.
    host.set(Knob.STABLE_NODE_CHAINS_PRUNE_MILLISECS, 10**6)
    heal(host, look(host))
    scan(host, 4)
    assert look(host).reclaimable == 0


def test_part_of_it_is_whole_frames() -> None:
    host, _, _ = met("6.12")
    found = look(host, 5)
    assert (found.reclaimable, found.part_frames, found.part_pages) == (4, 2, 4)
    assert heal(host, found) == 4
    scan(host, 4)
    assert counts(host) == (6, 10)
    assert look(host, 0) == replace(look(host), parts=(), part_pages=0, part_frames=0)


def test_what_has_to_stay_is_named() -> None:
    host, moved, start = met("7.2")
    host.protect(moved, start, 8, writable=False)
    found = look(host)
    # Then those who have been there are moved in their place.
    assert (found.reclaimable, found.left, found.part_frames) == (4, {}, 4)
    assert {part.process for part in found.parts} != {moved}
    for process in {part.process for part in found.parts}:
        host.protect(process, host.ranges(process)[0].start, 8, writable=False)
    assert look(host).left == {NOT_WRITABLE: 4}


def test_what_its_policy_would_take_elsewhere_is_not_un_merged() -> None:
    host = lab("7.2")
    bound, start = process_with(host, CONTENTS, 0)
    other, there = process_with(host, CONTENTS, 1)
    scan(host, 3)
    host.move_pages(bound, [start + 2 * PAGE_SIZE * number for number in range(4)], 1, shared=True)
    scan(host, 3)
    found = look(host)
    assert (found.reclaimable, found.left) == (4, {})
    assert {part.process for part in found.parts} == {other}
    host.protect(other, there, 8, writable=False)
    found = look(host)
    assert (found.reclaimable, found.parts, found.left.keys() - {NOT_WRITABLE, POLICY}) == (4, (), set())
    assert sum(found.left.values()) == 4


def halved(profile: str) -> tuple[EngineHost, ProcessId, int]:
    """Two full dups of one content, each with half of its pages gone."""
    host = lab(profile)
    host.set(Knob.MERGE_ACROSS_NODES, 1)
    host.set(Knob.MAX_PAGE_SHARING, 4)
    process, start = process_with(host, ["x"] * 8)
    scan(host, 4)
    assert (counts(host), look(host).reclaimable) == ((2, 6), 0)
    frames = [page.frame for page in host.pages(process, start, 8)]
    for frame in set(frames):
        for index in [index for index, found in enumerate(frames) if found == frame][:2]:
            host.discard(process, start + index * PAGE_SIZE, 1)
    scan(host, 2)
    return host, process, start


@pytest.mark.parametrize("profile", NEW)
def test_dups_that_lost_their_pages(profile: str) -> None:
    host, _process, _start = halved(profile)
    found = look(host)
    assert (counts(host), found.reclaimable, found.part_pages) == ((2, 2), 1, 2)
    heal(host, found)
    scan(host, 4)
    assert (counts(host), look(host).reclaimable) == ((1, 3), 0)


def test_what_fork_shares_counts_as_mapped() -> None:
    host, process, _start = halved("7.2")
    host.fork(process, "child")
    assert look(host).reclaimable == 0
