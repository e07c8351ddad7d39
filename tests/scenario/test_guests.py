# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernel and engine compared on machines with two nodes: the library and fifty random scenarios, one boot a kernel.

``make matrix`` does it on more kernels, and with more random scenarios.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import matrix


@pytest.mark.guest
@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_kernel_and_engine_are_equal(kernel: str, tmp_path: Path) -> None:
    output = matrix.run_guest(kernel, 2, 50, 50, tmp_path)
    parts = matrix.parse(output)
    assert matrix.judged(parts, 50) == [], output
    assert parts[0].equal >= 100
    assert parts[1].equal == 50
