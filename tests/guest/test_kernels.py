# SPDX-License-Identifier: GPL-2.0-or-later
"""Nodes and pages on Debian's kernels: one boot for each."""

from __future__ import annotations

import pytest

from tests.guest.inside import run_inside

pytestmark = pytest.mark.guest

REMOVABLE = ("--removable", "256")
#: Of kernels before 6.6 only.
ZERO_PAGES = "test_zero_pages_that_the_kernel_does_not_count"


def test_two_nodes() -> None:
    """Pages placed, merged, moved, un-merged, and found where they are."""
    # What takes a node of memory only is left to four nodes.
    tests = ("tests/guest_tests/numa.py", f"tests/guest_tests/doctor.py::{ZERO_PAGES}")
    run_inside("6.1", 2, *tests, "-k", "not memory_only", options=REMOVABLE)


def test_a_kernel_whose_ksmd_walks_empty_address_space() -> None:
    """What the doctor says of it, what `adaptive` makes of it, and a write that waits for it."""
    run_inside("5.10", 2, "tests/guest_tests/holes.py")


def test_four_nodes_two_of_them_memory_only() -> None:
    """The same, and what the doctor says of such machines."""
    # Yama's scope can't be taken back: what sets it comes last.
    tests = ("tests/guest_tests/numa.py", "tests/guest_tests/doctor.py", "tests/guest_tests/refused.py")
    devices = ("--device", "intel-iommu,intremap=off", "--device", "edu", "--append", "intel_iommu=on")
    elsewhere = ("--deselect", f"tests/guest_tests/doctor.py::{ZERO_PAGES}")
    run_inside("6.12", 4, *tests, *elsewhere, options=("--cpus", "1,1,0,0", *REMOVABLE, *devices))
