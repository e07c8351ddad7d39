# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs that check themselves, switched ten thousand times; who switches them killed 500 times; other kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guest.inside import run_inside
from tests.guest.test_kernels import SWITCHED
from tests.kernel.switched import compiled, in_child, started
from tests.kernel.test_injection import killed_at_each_step, switched

pytestmark = pytest.mark.soak


@pytest.mark.parametrize(
    ("mode", "count"),
    [(("spin", "200"), 10_000), (("sleep",), 10_000), (("rseq",), 10_000), (("filter",), 10_000), (("threads",), 50)],
    ids=lambda found: found[0] if isinstance(found, tuple) else "",
)
def test_a_program_does_not_notice(tmp_path: Path, mode: tuple[str, ...], count: int) -> None:
    with started(compiled(tmp_path), *mode) as target:
        assert in_child(switched(target.process, count)) == 0
        if mode[0] == "filter":
            assert target.ask("a") == "a"
            assert target.status("Seccomp") == "2"
        else:
            assert target.end().startswith("0 errors")


@pytest.mark.parametrize("mode", [("spin", "50"), ("sleep",), ("rseq",), ("filter",), ("busy",)], ids=lambda it: it[0])
def test_killed_at_any_moment(tmp_path: Path, mode: tuple[str, ...]) -> None:
    with started(compiled(tmp_path), *mode) as target:

        def alive() -> None:
            if mode[0] == "filter":
                assert target.ask("x") == "x"

        killed_at_each_step(target, 500, alive)
        if mode[0] in ("filter", "busy"):
            assert target.status("Seccomp") == "2"
        else:
            assert target.end().startswith("0 errors")


@pytest.mark.guest
@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_on_other_kernels(kernel: str) -> None:
    """6.1 has no prctl for it."""
    run_inside(kernel, 2, *SWITCHED)
