# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.errors import Absent, NoSuchProcess, Unparsable
from ksmd_ctl.host.memory import Range
from ksmd_ctl.kernel.ranges import NumaRange, mappings, parse_numa_maps, parse_smaps, read_ranges
from ksmd_ctl.kernel.regions import spawn
from ksmd_ctl.kernel.syscalls import PAGE_SIZE
from tests.kernel.trees import write_tree

SMAPS = """\
1000-5000 rw-p 00000000 00:00 0 
Size:                 16 kB
Rss:                   8 kB
Anonymous:             4 kB
KSM:                   4 kB
THPeligible:           0
ProtectionKey:         0
VmFlags: rd wr mr mw me ac nh mg 
5000-6000 r--p 00002000 fe:00 260131                     /a b\\012KSM: (deleted)
Rss:                   4 kB
VmFlags: rd mr mw me 
"""  # noqa: W291


def test_mappings_with_figures_and_flags() -> None:
    first, second = parse_smaps(SMAPS)
    assert (first.start, first.end, first.permissions, first.name) == (0x1000, 0x5000, "rw-p", "")
    assert first.figures == {"Rss": 8192, "Anonymous": 4096, "KSM": 4096}
    assert {"mg", "nh", "wr"} <= first.flags
    assert second.name == "/a b\\012KSM: (deleted)"
    assert "KSM" not in second.figures


@pytest.mark.parametrize("text", ["nonsense\n", "Rss: 1 kB x\n", "1000-2000 rw-p\n"])
def test_what_is_not_smaps_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="not a line of smaps"):
        parse_smaps(text)


@pytest.mark.parametrize(
    ("policy", "name", "nodes"),
    [
        ("default", "default", set()),
        ("local", "local", set()),
        ("bind:0", "bind", {0}),
        ("bind=static:0-1,65", "bind", {0, 1, 65}),
        ("prefer:3", "prefer", {3}),
        ("prefer=relative:3", "prefer", {3}),
        ("prefer (many):1-2", "prefer (many)", {1, 2}),
        ("interleave:0-1", "interleave", {0, 1}),
        ("weighted interleave:0-1", "weighted interleave", {0, 1}),
        ("weighted interleave=static:7", "weighted interleave", {7}),
    ],
)
@pytest.mark.parametrize(
    ("rest", "counts"),
    [
        ("", ({}, 0)),
        (" anon=3 dirty=3 N0=1 N12=2 kernelpagesize_kB=4", ({0: 1, 12: 2}, 3)),
        (" file=/x\\040N3=4 mapped=2 N1=2 kernelpagesize_kB=4", ({1: 2}, 0)),
        (" file=/x\\040anon=9 anon=1 mapped=3 N1=3 kernelpagesize_kB=4", ({1: 3}, 1)),
        (" heap anon=1 N0=1", ({0: 1}, 1)),
    ],
)
def test_policies_of_mappings(
    policy: str, name: str, nodes: set[int], rest: str, counts: tuple[dict[int, int], int]
) -> None:
    found = parse_numa_maps(f"7f00 {policy}{rest}\n")
    assert found == {0x7F00: NumaRange(0x7F00, name, frozenset(nodes), *counts)}


@given(st.text(max_size=60))
def test_other_text_is_an_error_and_never_another_exception(text: str) -> None:
    for parse in (parse_numa_maps, parse_smaps):
        try:
            parse(text)
        except ValueError:
            continue


def test_ranges_join_both_files(tmp_path: Path) -> None:
    root = write_tree(
        tmp_path,
        {"proc/7/smaps": SMAPS, "proc/7/numa_maps": "1000 bind:1 anon=2 dirty=2 N1=2 kernelpagesize_kB=4\n"},
    )
    first, second = read_ranges(7, root)
    assert first == Range(
        0x1000,
        0x5000,
        first.flags,
        policy="bind",
        policy_nodes=frozenset({1}),
        resident_pages=2,
        anonymous_pages=1,
        ksm_pages=1,
    )
    assert first.mergeable
    assert (second.policy, second.ksm_pages, second.mergeable) == ("default", None, False)


def test_a_process_that_is_gone_and_a_file_that_no_kernel_has(tmp_path: Path) -> None:
    root = write_tree(tmp_path, {"proc/7/comm": "x\n", "proc/9/smaps": "garbage\n"})
    with pytest.raises(Absent, match="smaps"):
        mappings(7, root)
    with pytest.raises(NoSuchProcess, match="process 8"):
        read_ranges(8, root)
    with pytest.raises(Unparsable, match="garbage"):
        mappings(9, root)


def test_this_process() -> None:
    with spawn("test-ranges") as process:
        start = process.map(5)
        process.advise(start, 5, mergeable=True)
        process.store(start, [b"x" * PAGE_SIZE, b"y" * PAGE_SIZE])
        (found,) = (item for item in read_ranges(process.id.pid, page_size=PAGE_SIZE) if item.mergeable)
    assert (found.start, found.end, found.resident_pages) == (start, start + 5 * PAGE_SIZE, 2)
    assert found.ksm_pages in (0, None)
    assert len(mappings(os.getpid())) > 5
