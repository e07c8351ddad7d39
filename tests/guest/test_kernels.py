# SPDX-License-Identifier: GPL-2.0-or-later
"""Nodes, pages and the main job on Debian's kernels: one boot for each."""

from __future__ import annotations

import pytest

from tests.guest.inside import run_inside

pytestmark = pytest.mark.guest

REMOVABLE = ("--removable", "256")


def test_two_nodes() -> None:
    """Pages placed, merged, moved and found; the service merges, notices drift and puts everything back."""
    # What takes a node of memory only is left to four nodes. `make run` has ten seconds, which no guest promises.
    chosen = ["tests/service/test_this_host.py", "tests/guest_tests/numa.py", "-k", "not memory_only and not make_run"]
    run_inside("6.1", 2, *chosen, options=REMOVABLE)


def test_four_nodes_two_of_them_memory_only() -> None:
    run_inside("6.12", 4, "tests/guest_tests/numa.py", options=("--cpus", "1,1,0,0", *REMOVABLE))
