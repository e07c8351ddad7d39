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
    # The seed's authors thought that colliding pages become one: no kernel does it, so this has to be told.
    other = f"ksmd-ctl verify --profile seed {matrix.LIBRARY}/findings/collision-is-for-ever.toml"
    output = matrix.run_guest(kernel, 2, 50, 50, tmp_path, other)
    *parts, seed = matrix.parse(output)
    assert matrix.judged(parts, 50) == [], output
    assert parts[0].equal >= 100
    assert parts[1].equal == 50
    assert (seed.profile, seed.different) == ("seed", 1)
    assert "met: pages_sharing: kernel 8, engine 12" in output
    assert "about it: Four contents" in output
