# SPDX-License-Identifier: GPL-2.0-or-later
"""What takes minutes in an emulated guest, and is therefore not in tests/guest/test_kernels.py."""

from __future__ import annotations

import pytest

from tests.guest.inside import run_inside

pytestmark = [pytest.mark.soak, pytest.mark.guest]

#: 6.12 calls every anonymous page a KSM page, 6.1 does not. Much memory, and FUSE, are left to this machine.
SHARING = "tests/kernel/test_sharing.py"
NOT_EMULATED = (
    *("--deselect", f"{SHARING}::test_a_sample_of_much"),
    *("--deselect", f"{SHARING}::test_a_process_that_keeps_its_readers_waiting_holds_nobody_up"),
)
FEW_PAGES = {"KSMD_CTL_PAGES": "200"}


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_who_shares_what(kernel: str) -> None:
    run_inside(kernel, 2, SHARING, *NOT_EMULATED)


@pytest.mark.parametrize("name", ["covert_channel", "confined", "domains_measures"])
def test_domains(name: str) -> None:
    """Nobody learns of contents across domains, members are confined, and figures of domains are right."""
    run_inside("6.12", 2, f"tests/guest_tests/{name}.py", options=("--removable", "256"), environment=FEW_PAGES)
