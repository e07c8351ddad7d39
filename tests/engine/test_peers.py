# SPDX-License-Identifier: GPL-2.0-or-later
"""What the Linux Test Project and the kernel's selftests check of KSM, as tests with their exact numbers.

The layouts are theirs, described anew; sizes are theirs where that is quick, and scaled where it is not.
"""

from __future__ import annotations

import pytest

from ksmd_ctl.engine.memory import PAGE_SIZE
from tests.engine.lab import ALL, CHAINS, NEW, Lab, is_ksm
from tests.engine.scenario_runner import content
from tests.engine.test_corner_cases import processed

each = pytest.mark.parametrize("profile", ALL)


def oracle(count: int, limit: int) -> tuple[int, int]:
    """pages_shared and pages_sharing of so many equal pages (selftests' own formula)."""
    copies, rest = divmod(count, limit)
    if rest in (0, 1):
        return copies, copies * (limit - 1)
    return copies + 1, count - copies - 1


# -- LTP -------------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("children", [3, 4])
@pytest.mark.parametrize("regions", [1, 4])
def test_ltp_ksm01_four_rounds(profile: str, children: int, regions: int) -> None:
    """Also ksm02, ksm03 and ksm04, which run the same under policies and in control groups."""
    pages = 64 // regions
    total = 64 * children
    lab = Lab(profile, across=1, **({"max_page_sharing": total} if profile in CHAINS else {}))
    memory = []
    for child in range(children):
        first = lab.region(f"c{child}", ["-"] * pages, 0)
        memory.append([first, *(lab.more(first.pid, ["-"] * pages, 0) for _ in range(regions - 1))])

    def fill(child: int, label: str) -> None:
        for region in memory[child]:
            for index in range(pages):
                region.write(index, label)

    rounds = [
        ("caac", (2, total - 2, 0, 0)),
        ("cbac", (3, total - 3, 0, 0)),
        ("dddd", (1, total - 1, 0, 0)),
        ("dddd", (1, total - 2, 1, 0)),
    ]
    for number, (labels, expected) in enumerate(rounds, 1):
        for child in range(children):
            fill(child, labels[min(child, 3)])
        if number == 4:
            last = memory[1][-1]
            lab.machine.write(last.pid, last.address(pages - 1), content("d")[:-1] + b"e")
        # Three scans are waited for: one under way and two complete ones.
        lab.scan(3)
        shared, sharing, unshared, volatile = expected
        assert lab.counts == (shared, sharing, unshared, volatile), number
    lab.store("run", 2)
    assert lab.counts == (0, 0, 0, 0)
    lab.store("run", 0)
    assert lab.counts == (0, 0, 0, 0)


@each
def test_ltp_ksm05_exit_race(profile: str) -> None:
    lab = Lab(profile)
    for number in range(30):
        pages = lab.region(f"c{number}", ["x"], 0)
        if number % 2:
            lab.batch(1 + number % 3)
        pages.exit()
    lab.scan(2)
    assert lab.ksm.rmap_items == 0
    assert lab.ksm.mm_head.next is lab.ksm.mm_head


@each
@pytest.mark.parametrize("nodes", [2, 3, 4])
@pytest.mark.parametrize("pages", [10, 100])
def test_ltp_ksm06_merge_across_nodes(profile: str, nodes: int, pages: int) -> None:
    lab = Lab(profile, nodes, across=1, **({"max_page_sharing": pages * nodes} if profile in CHAINS else {}))
    first = lab.region("p", ["\n"] * pages, 0)
    regions = [first, *(lab.more(first.pid, ["\n"] * pages, node) for node in range(1, nodes))]
    lab.scan(3)
    assert lab.counts == (1, pages * nodes - 1, 0, 0)
    assert set(first.nodes()) == {0}  # its node is that of the page scanned second
    lab.store("run", 2)
    lab.store("merge_across_nodes", 0)
    lab.store("run", 1)
    lab.scan(3)
    assert lab.counts == (nodes, pages * nodes - nodes, 0, 0)
    assert [set(region.nodes()) for region in regions] == [{node} for node in range(nodes)]


@pytest.mark.parametrize(("encounters", "skipped"), [(14, 7), (23, 15), (100, 84)])
def test_ltp_ksm07_smart_scan(encounters: int, skipped: int) -> None:
    assert encounters - len(processed(encounters)) == skipped


@each
@pytest.mark.parametrize("across", [0, 1])
def test_ltp_migrate_pages03(profile: str, across: int) -> None:
    lab = Lab(profile, across=across)
    pages = lab.region("p", ["0"], 0)
    more = [lab.more(pages.pid, ["0"], 0) for _ in range(19)]
    lab.scan(3)
    assert lab.counts == (1, 19, 0, 0)
    frames = set()
    for turn in range(20):
        nid = 1 - turn % 2
        assert lab.machine.move_pages(pages.pid, [pages.start], nid, move_all=True) == (0, [nid])
        assert {region.nodes()[0] for region in more} == {nid}
        frames.add(pages[0].pfn)
        lab.scan(1)
        assert lab.counts == (1, 19, 0, 0)
        assert pages.node().nid == (0 if across else nid)
    assert len(frames) > 1
    # Without the privilege nothing moves, for it has more than one mapping.
    assert lab.machine.move_pages(pages.pid, [pages.start], 1, move_all=False)[1] == [-13]


@each
def test_ltp_mmap10_mostly_empty_memory_forks_and_partial_unmaps(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["-"] * 50, 0)
    pages.write(25, "x")
    for number in range(3):
        child = pages.fork(f"q{number}")
        lab.batch(2)
        lab.machine.munmap(child.pid, child.address(20), 30)
        child.exit()
    lab.machine.munmap(pages.pid, pages.start, 50)
    lab.scan(2)
    assert (lab.ksm.rmap_items, lab.machine.memory.nodes[0].used) == (0, 0)


# -- selftests: ksm_tests ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", CHAINS)
@pytest.mark.parametrize("limit", [2, 3, 10, 256])
def test_selftests_sharing_oracle(profile: str, limit: int) -> None:
    counts = [0, 1, 2, 9, 10, 11, 20, 21, 22, 255, 256, 257, 258, 512, 513, 600]
    for count in counts:
        lab = Lab(profile, across=1, max_page_sharing=limit)
        lab.region("p", ["*"] * count or ["-"], 0)
        for _ in range(4):
            lab.machine.scan()
        assert lab.counts[:2] == oracle(count, limit), count
        copies = oracle(count, limit)[0]
        assert lab.chains == ((1, copies) if copies > 1 else (0, 0)), count


@each
def test_selftests_merge(profile: str) -> None:
    lab = Lab(profile, across=1)
    lab.region("p", ["*"] * 10, 0)
    assert lab.scan(2).counts[:2] == (1, 9)


@each
def test_selftests_unmerge(profile: str) -> None:
    lab = Lab(profile, across=1)
    pages = lab.region("p", ["*", "*"], 0)
    assert lab.scan(2).counts[:2] == (1, 1)
    pages.write(0, "-*")
    pages.write(1, "+*")
    assert lab.scan(1).counts[:2] == (0, 0)


@pytest.mark.parametrize("profile", CHAINS)
@pytest.mark.parametrize("use_zero_pages", [0, 1])
def test_selftests_zero_pages(profile: str, use_zero_pages: int) -> None:
    lab = Lab(profile, across=1, use_zero_pages=use_zero_pages)
    lab.region("p", ["0"] * 10, 0)
    lab.scan(2)
    assert lab.counts[:2] == ((0, 0) if use_zero_pages else (1, 9))
    if profile in NEW:
        assert lab.ksm.zero_pages == 10 * use_zero_pages


@each
@pytest.mark.parametrize("across", [0, 1])
def test_selftests_numa(profile: str, across: int) -> None:
    lab = Lab(profile, across=across)
    lab.region("p", ["*"], 0)
    lab.scan(2)
    lab.region("o", ["*"], 1)
    lab.scan(2)
    assert lab.counts[:2] == ((1, 1) if across else (0, 0))


@each
def test_selftests_cow_pairs(profile: str) -> None:
    lab = Lab(profile, across=1)
    labels = [f"{pair}" + "+" * 3 for pair in range(1, 201) for _ in range(2)]
    pages = lab.region("p", labels, 0)
    assert lab.scan(2).counts[:2] == (200, 200)
    for index in range(0, 400, 2):
        pages.write(index, f"w{index}")
    assert lab.ksm.cow_ksm == 200
    assert pages.frames() == 400


# -- selftests: ksm_functional_tests -------------------------------------------------------------------------------


@each
def test_functional_512_pages_and_the_limit(profile: str) -> None:
    lab = Lab(profile, across=1)
    lab.region("p", ["\x0f"] * 512, 0)
    lab.scan(2)
    if profile in CHAINS:
        assert lab.counts[:2] == (2, 510)
        assert lab.chains == (1, 2)
    else:
        assert lab.counts[:2] == (1, 511)


@each
def test_functional_unmerge(profile: str) -> None:
    lab = Lab(profile, across=1)
    pages = lab.region("p", ["c"] * 512, 0)
    lab.machine.scan(2)
    assert pages.frames() < 3
    pages.advise(False)
    assert pages.frames() == 512


@pytest.mark.parametrize("profile", NEW)
def test_functional_unmerge_zero_pages(profile: str) -> None:
    lab = Lab(profile, across=1, use_zero_pages=1)
    pages = lab.region("p", ["0"] * 512, 0)
    lab.machine.scan(2)
    mm = lab.machine.mm(pages.pid)
    assert mm.ksm_zero_pages == 512
    lab.machine.madvise(pages.pid, pages.start, 256, mergeable=False)
    assert mm.ksm_zero_pages == 256
    for index in range(256, 512):
        pages.write(index, f"{index}")
    assert mm.ksm_zero_pages == 0
    assert pages.frames() == 512


@each
def test_functional_unmerge_discarded(profile: str) -> None:
    lab = Lab(profile, across=1)
    pages = lab.region("p", ["c"] * 512, 0)
    lab.machine.scan(2)
    pages.discard(0, 256)
    pages.advise(False)
    assert pages.frames() == 256
    assert not any(map(is_ksm, pages.pages()))


@each
def test_functional_prot_none(profile: str) -> None:
    lab = Lab(profile, across=1)
    pages = lab.region("p", ["\x11"] * 64, 0)
    lab.machine.mprotect(pages.pid, pages.start, 64, writable=False)
    lab.scan(2)
    assert pages.frames() == 1
    pages.advise(False)
    assert pages.frames() == 64


@pytest.mark.parametrize("profile", NEW)
def test_functional_prctl_fork_and_unmerge(profile: str) -> None:
    lab = Lab(profile, across=1)
    pid = lab.machine.spawn("p")
    lab.machine.prctl_merge(pid, True)
    child = lab.machine.fork(pid, "q")
    pages = lab.more(child, ["c"] * 8, 0, mergeable=False)
    lab.scan(2)
    assert pages.frames() == 1
    lab.machine.prctl_merge(child, False)
    assert pages.frames() == 8


@each
def test_functional_fork_merging_page_count(profile: str) -> None:
    lab = Lab(profile, across=1)
    pages = lab.region("p", ["c"] * 32, 0)
    lab.scan(2)
    child = lab.machine.mm(pages.fork("q").pid)
    assert child.ksm_merging_pages == (32 if profile == "6.1" else 0)


# -- selftests: rmap -------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("across", [0, 1])
def test_rmap_all_mappings_follow_a_page(profile: str, across: int) -> None:
    lab = Lab(profile, 3, across=across)
    parents = [lab.region("p", ["-"], 0)]
    for level in range(3):
        parents += [region.fork(f"q{level}.{number}") for number, region in enumerate(parents[:3])]
    own = [lab.more(region.pid, ["c"], 0) for region in parents]
    lab.scan(3)
    assert lab.counts == (1, len(own) - 1, 0, 0)
    old = own[0][0].pfn
    for nid in (2, 1):
        assert lab.machine.move_pages(own[3].pid, [own[3].start], nid, move_all=True) == (0, [nid])
        assert {region[0].pfn for region in own} == {own[0][0].pfn}
        assert own[0][0].pfn != old
        assert lab.scan(1).counts == (1, len(own) - 1, 0, 0)
    assert own[0].read(0) == content("c")
    assert len(own[0].read(0)) == PAGE_SIZE
