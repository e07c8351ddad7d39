# SPDX-License-Identifier: GPL-2.0-or-later
"""Transactions on a machine with two nodes: one boot runs tests/guest_tests/transactions.py in it."""

from __future__ import annotations

import pytest

from tests.guest.inside import run_inside


@pytest.mark.guest
def test_transactions_on_two_nodes() -> None:
    # Other kernels, four nodes, many times over and with little memory: tests/soak.
    run_inside("6.12", 2, "-s", "tests/guest_tests/transactions.py")
