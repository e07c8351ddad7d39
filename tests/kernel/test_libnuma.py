# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import ctypes
import errno
import mmap
import os
import subprocess
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.errors import Absent, NoSuchProcess, Rejected
from ksmd_ctl.kernel import libnuma
from ksmd_ctl.kernel.libnuma import MASK_BITS, NOT_ATTEMPTED, PageMover, Policy, PolicyMode, mask_of, nodes_of
from ksmd_ctl.kernel.ranges import numa_ranges

PAGE = mmap.PAGESIZE
# Up to 6.x, where there isn't even a page table, EFAULT (mm/gup.c:no_page_table); else ENOENT.
UNTOUCHED = (-errno.ENOENT, -errno.EFAULT)


@pytest.fixture
def two_pages() -> Iterator[int]:
    """Two pages of private memory, of which the first was written to."""
    memory = mmap.mmap(-1, 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    view = ctypes.c_char.from_buffer(memory)
    memory[0] = 1
    yield ctypes.addressof(view)
    del view
    memory.close()


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(name: str, **_: object) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    libnuma.library.cache_clear()
    monkeypatch.setattr(libnuma.ctypes, "CDLL", refuse)
    yield
    libnuma.library.cache_clear()


@given(st.sets(st.integers(0, MASK_BITS - 1)))
def test_a_mask_names_the_nodes_that_it_was_made_of(nodes: set[int]) -> None:
    assert nodes_of(mask_of(nodes)) == nodes


@given(st.sets(st.integers(0, MASK_BITS - 1), min_size=1))
def test_a_mask_has_a_bit_a_node_where_the_kernel_looks_for_it(nodes: set[int]) -> None:
    mask = mask_of(nodes)
    width = 8 * mask.itemsize
    assert sum(word.bit_count() for word in mask) == len(nodes)
    assert all(mask[node // width] & 1 << node % width for node in nodes)


@pytest.mark.parametrize("node", [-1, MASK_BITS])
def test_a_mask_takes_no_number_that_no_node_has(node: int) -> None:
    with pytest.raises(ValueError, match="not between"):
        mask_of([node])


def test_without_the_library_there_is_no_numa(no_library: None) -> None:
    assert not libnuma.available()
    with pytest.raises(Absent, match=r"libnuma\.so\.1") as caught:
        PageMover().query(0, [0])
    assert "libnuma1" in caught.value.hint


def test_a_query_tells_present_pages_from_untouched_ones(two_pages: int) -> None:
    found = PageMover().query(os.getpid(), [two_pages, two_pages + PAGE])
    assert found[0] >= 0
    assert found[1] in UNTOUCHED


def test_arrays_are_kept_and_hold_nothing_of_an_earlier_batch(two_pages: int) -> None:
    mover = PageMover()
    node = mover.query(os.getpid(), [two_pages] * 100)[0]
    assert mover.query(os.getpid(), [two_pages + PAGE])[0] in UNTOUCHED
    assert list(mover.move(os.getpid(), [two_pages], node, shared=False)) == [node]
    assert not mover.query(os.getpid(), [])


def test_policies_come_back_as_they_were_set(two_pages: int) -> None:
    node = PageMover().query(os.getpid(), [two_pages])[0]
    libnuma.mbind(two_pages, PAGE, Policy(PolicyMode.BIND, frozenset({node})))
    bound = numa_ranges(os.getpid())[two_pages]
    assert (bound.policy, bound.policy_nodes) == ("bind", {node})
    before = libnuma.get_mempolicy()
    libnuma.set_mempolicy(Policy(PolicyMode.PREFERRED, frozenset({node})))
    try:
        assert libnuma.get_mempolicy() == Policy(PolicyMode.PREFERRED, frozenset({node}))
    finally:
        libnuma.set_mempolicy(before)


def test_refusals_name_their_cause(two_pages: int) -> None:
    with pytest.raises(Rejected, match="no memory or is not allowed") as caught:
        libnuma.mbind(two_pages, PAGE, Policy(PolicyMode.BIND, frozenset({MASK_BITS - 1})))
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(Rejected, match="not online or has no memory"):
        PageMover().move(os.getpid(), [two_pages], 1000, shared=False)
    child = subprocess.Popen(["true"])
    child.wait()
    with pytest.raises(NoSuchProcess, match=f"process {child.pid}"):
        PageMover().query(child.pid, [two_pages])


def test_a_process_that_is_exiting_is_gone(two_pages: int) -> None:
    with subprocess.Popen(["true"]) as process:
        # It has ended and nobody has asked for its status: it still is, and has no memory.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(NoSuchProcess, match="it is exiting"):
            PageMover().query(process.pid, [two_pages])


def test_every_status_has_words() -> None:
    assert "MPOL_MF_MOVE_ALL and CAP_SYS_NICE" in libnuma.status_cause(-errno.EACCES)
    assert "not attempted" in libnuma.status_cause(NOT_ATTEMPTED)
    assert "EIDRM" in libnuma.status_cause(-errno.EIDRM)
