# SPDX-License-Identifier: GPL-2.0-or-later
"""Nodes, pages and the main job on Debian's kernels: one boot for each kernel and topology."""

from __future__ import annotations

import pytest

from tests.guest.inside import run_inside

pytestmark = pytest.mark.guest

REMOVABLE = ("--removable", "256")


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_two_nodes(kernel: str) -> None:
    """Pages placed, merged, moved and found; the service merges, notices drift and puts everything back."""
    # What takes a node of memory only is left to four nodes.
    chosen = ["tests/service/test_this_host.py", "tests/guest_tests/numa.py", "-k", "not memory_only"]
    run_inside(kernel, 2, *chosen, options=REMOVABLE)


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_four_nodes_two_of_them_memory_only(kernel: str) -> None:
    run_inside(kernel, 4, "tests/guest_tests/numa.py", options=("--cpus", "1,1,0,0", *REMOVABLE))
