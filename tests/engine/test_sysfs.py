# SPDX-License-Identifier: GPL-2.0-or-later
"""The files of /sys/kernel/mm/ksm: statement 11 of docs/engine.md, and every refusal by its errno."""

from __future__ import annotations

import errno

import pytest

from ksmd_ctl.engine.machine import Machine
from ksmd_ctl.engine.profile import PROFILES
from ksmd_ctl.engine.sysfs import ksm_show
from tests.engine.lab import ALL, CHAINS, NEW, Lab

each = pytest.mark.parametrize("profile", ALL)

DEFAULTS = {
    "run": "0",
    "pages_to_scan": "100",
    "sleep_millisecs": "20",
    "merge_across_nodes": "1",
    "use_zero_pages": "0",
    "max_page_sharing": "256",
    "stable_node_chains_prune_millisecs": "2000",
    "smart_scan": "1",
    "advisor_mode": "[none] scan-time",
    "advisor_max_cpu": "70",
    "advisor_min_pages_to_scan": "500",
    "advisor_max_pages_to_scan": "30000",
    "advisor_target_scan_time": "200",
}


def refused(machine: Machine, name: str, value: object) -> int:
    """The errno with which a value is refused."""
    with pytest.raises(OSError, match=name) as refusal:
        machine.store(name, value)
    assert refusal.value.errno is not None
    return refusal.value.errno


@each
def test_files_and_defaults(profile: str) -> None:
    machine = Machine(1, PROFILES[profile])
    numbers = {"seed": 9, "4.1": 9, "4.10": 9, "5.10": 14, "6.1": 14}
    files = (*PROFILES[profile].knobs, *PROFILES[profile].counters)
    assert len(set(files)) == numbers.get(profile, 24)
    for name in PROFILES[profile].knobs:
        assert machine.show(name) == DEFAULTS[name] + "\n"
    for name in PROFILES[profile].counters:
        assert machine.show(name) == "0\n"


@each
def test_a_file_that_the_profile_lacks_is_enoent(profile: str) -> None:
    machine = Machine(1, PROFILES[profile])
    for name in DEFAULTS.keys() - set(PROFILES[profile].knobs):
        assert refused(machine, name, 1) == errno.ENOENT
        with pytest.raises(FileNotFoundError):
            ksm_show(machine.ksm, name)
    assert refused(machine, "no_such_file", 1) == errno.ENOENT


@each
def test_counters_can_only_be_read(profile: str) -> None:
    machine = Machine(1, PROFILES[profile])
    for name in PROFILES[profile].counters:
        assert refused(machine, name, 0) == errno.EACCES


U32 = 2**32
REFUSALS = [
    ("run", "3", errno.EINVAL),
    ("run", "-1", errno.EINVAL),
    ("run", "x", errno.EINVAL),
    ("run", str(U32), errno.EINVAL),
    ("pages_to_scan", "-1", errno.EINVAL),
    ("pages_to_scan", str(U32), errno.EINVAL),
    ("pages_to_scan", "1 2", errno.EINVAL),
    ("pages_to_scan", "", errno.EINVAL),
    ("sleep_millisecs", "ten", errno.EINVAL),
    ("sleep_millisecs", str(U32), errno.EINVAL),
    ("merge_across_nodes", "2", errno.EINVAL),
    ("merge_across_nodes", "no", errno.EINVAL),
    ("merge_across_nodes", str(2**64), errno.ERANGE),
    ("use_zero_pages", "2", errno.EINVAL),
    ("use_zero_pages", "o", errno.EINVAL),
    ("max_page_sharing", "1", errno.EINVAL),
    ("max_page_sharing", "-7", errno.EINVAL),
    ("max_page_sharing", str(2**31), errno.ERANGE),
    ("max_page_sharing", "many", errno.EINVAL),
    ("stable_node_chains_prune_millisecs", str(U32), errno.EINVAL),
    ("smart_scan", "maybe", errno.EINVAL),
    ("advisor_mode", "scan_time", errno.EINVAL),
    ("advisor_max_cpu", "-1", errno.EINVAL),
    ("advisor_min_pages_to_scan", str(2**64), errno.EINVAL),
    ("advisor_max_pages_to_scan", "1.5", errno.EINVAL),
    ("advisor_target_scan_time", "0", errno.EINVAL),
]


@pytest.mark.parametrize(("name", "value", "number"), REFUSALS)
def test_bad_values_are_refused_and_change_nothing(name: str, value: str, number: int) -> None:
    machine = Machine(1)
    before = machine.show(name)
    assert refused(machine, name, value) == number
    assert machine.show(name) == before


@pytest.mark.parametrize(("word", "value"), [("1", 1), ("y", 1), ("Yes", 1), ("on", 1), ("t", 1), ("off", 0), ("N", 0)])
def test_11_9_switches_take_words(word: str, value: int) -> None:
    machine = Machine(1)
    machine.store("use_zero_pages", 1 - value)
    machine.store("use_zero_pages", word)
    assert machine.show("use_zero_pages") == f"{value}\n"


@each
def test_11_1_run_0_keeps_everything(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x", "x"], 0)
    lab.store("run", 1)
    lab.scan(3)
    lab.store("run", 0)
    assert lab.counts == (1, 1, 0, 0)
    assert pages.frames() == 1


@each
def test_11_2_run_2_unmerges_and_starts_again(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x", "x", "u"], 0)
    dead = lab.region("o", ["x", "x"], 0)
    lab.scan(3)
    dead.exit()
    lab.batch(1)
    lab.store("run", 2)
    assert lab.counts == (0, 0, 0, 0)
    assert pages.frames() == 3
    assert lab.ksm.scan.seqnr == 0
    assert lab.ksm.scan.mm_slot is lab.ksm.mm_head
    assert lab.machine.mm(pages.pid).slot is not None
    assert lab.ksm.mm_head.next.next is lab.ksm.mm_head  # the dead one is gone
    lab.store("run", 1)
    assert lab.scan(3).counts == (1, 1, 1, 0)


@each
def test_11_2_unmerging_without_memory_fails_and_stops(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x"] * 6, 0)
    lab.scan(3)
    lab.store("run", 1)
    for node in lab.machine.memory.nodes:
        node.capacity = node.used + (node.nid == 0)
    with pytest.raises(OSError, match="no node has a free frame") as refusal:
        lab.store("run", 2)
    assert refusal.value.errno == errno.ENOMEM
    assert lab.machine.show("run") == "0\n"
    assert pages.frames() == 2
    assert lab.ksm.scan.mm_slot is lab.ksm.mm_head


@each
def test_11_4_merge_across_nodes_while_pages_are_merged(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x", "x"], 0)
    lab.region("o", ["u"], 0)
    lab.scan(3)
    lab.store("merge_across_nodes", 0)  # the same value is always taken
    assert refused(lab.machine, "merge_across_nodes", 1) == errno.EBUSY
    pages.write(0, "a")
    pages.write(1, "b")
    node = lab.ksm.root_stable_tree[0].rb_node
    assert node is not None
    assert refused(lab.machine, "merge_across_nodes", 1) == errno.EBUSY
    lab.scan(1)
    lab.store("merge_across_nodes", 1)
    assert lab.machine.show("merge_across_nodes") == "1\n"


@each
def test_11_4_refusing_deletes_what_nobody_maps(profile: str) -> None:
    lab = Lab(profile)
    gone = lab.region("p", ["m", "m"], 0)
    parent = lab.region("o", ["x", "x"], 1)
    lab.scan(3)
    nodes = gone.node(), parent.node()
    gone.fork("q").discard()
    child = parent.fork("r")
    gone.write(0, "a")
    gone.write(1, "b")
    parent.write(0, "a")
    parent.write(1, "b")
    lab.batch(4)  # no item is listed any more; one page is still mapped by a child
    assert lab.counts[0] == 0
    assert refused(lab.machine, "merge_across_nodes", 1) == errno.EBUSY
    assert [node.rmap_hlist_len for node in nodes] == [0, 0]
    assert lab.ksm.root_stable_tree[0].rb_node is None
    assert lab.ksm.root_stable_tree[1].rb_node is child.node()


@each
def test_11_5_the_one_unstable_tree_becomes_node_0s(profile: str) -> None:
    lab = Lab(profile, across=1)
    pages = lab.region("p", ["a", "b"], 1)
    lab.scan(1)
    lab.batch(1)
    lab.store("merge_across_nodes", 0)
    assert lab.ksm.root_unstable_tree[0].rb_node is pages.item(0)


@each
def test_11_6_switching_resets_nothing(profile: str) -> None:
    lab = Lab(profile, across=1)
    lab.region("p", ["a", "b"], 0)
    lab.scan(2)
    lab.batch(1)
    before = (lab.ksm.scan.seqnr, lab.ksm.scan.address, lab.counts)
    lab.store("merge_across_nodes", 0)
    assert (lab.ksm.scan.seqnr, lab.ksm.scan.address, lab.counts) == before


@pytest.mark.parametrize("profile", CHAINS)
def test_11_7_max_page_sharing_while_pages_are_merged(profile: str) -> None:
    lab = Lab(profile)
    lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    lab.store("max_page_sharing", 256)
    assert refused(lab.machine, "max_page_sharing", 3) == errno.EBUSY
    lab.unmerge()
    lab.store("max_page_sharing", 3)
    assert lab.machine.show("max_page_sharing") == "3\n"


@pytest.mark.parametrize("profile", NEW)
def test_11_8_pages_to_scan_is_the_advisors(profile: str) -> None:
    lab = Lab(profile, advisor_mode="scan-time")
    assert refused(lab.machine, "pages_to_scan", 7) == errno.EINVAL
    lab.store("advisor_mode", "none")
    lab.store("pages_to_scan", 7)


@each
def test_11_10_offlining_holds_up_three_files_only(profile: str) -> None:
    lab = Lab(profile)
    lab.machine.going_offline(0)
    for name in lab.ksm.profile.knobs:
        if name in ("run", "merge_across_nodes", "max_page_sharing"):
            assert refused(lab.machine, name, {"run": 1, "merge_across_nodes": 1}.get(name, 9)) == errno.EAGAIN
        elif name != "advisor_mode":
            lab.store(name, 1)
    lab.machine.cancel_offline()
    lab.store("run", 1)


def test_advisor_max_cpu_is_cut_to_32_bits() -> None:
    lab = Lab("6.12", advisor_max_cpu=2**32 + 5)
    assert lab.machine.show("advisor_max_cpu") == "5\n"
