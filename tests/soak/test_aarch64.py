# SPDX-License-Identifier: GPL-2.0-or-later
"""Switching on aarch64, in an emulated guest: there are no other guests of that processor, and few such machines."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.guest import aarch64
from tests.kernel.switched import SOURCE

pytestmark = [
    pytest.mark.soak,
    pytest.mark.guest,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for mount namespaces"),
]

#: What does not run there: programs for PCs, and QEMU.
NOT_THERE = "not rseq and not vsyscall and not 32_bit and not handles_system_calls and not qemu and not debian"
PYTEST = f"python -m pytest -q -p no:cacheprovider -k '{NOT_THERE}'"


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aarch64")
    for options in ((), ("-static",)):
        aarch64.compiled(SOURCE, folder, *options)
    return folder


def run(programs: Path, *words: str, cpu: str, times: int = 1) -> None:
    environment = f"export PYTHONPATH=/checkout KSMD_CTL_COMPILED=/extra KSMD_CTL_SLOW=40 KSMD_CTL_TIMES={times}"
    assert aarch64.run(f"{environment}\n{PYTEST} {' '.join(words)}\n", programs, cpu=cpu, timeout_seconds=5400) == 0


@pytest.mark.parametrize("cpu", aarch64.CPUS)
def test_a_program_does_not_notice(programs: Path, cpu: str) -> None:
    """The one that checks its registers is switched 1,200 times; of three, who switches is killed 240 times."""
    run(programs, "tests/kernel/test_injection.py", "tests/kernel/test_aarch64.py", cpu=cpu, times=4)


def test_on_and_off(programs: Path) -> None:
    """VmFlags, ksm_stat, frames and contents, by prctl and by madvise."""
    switching = "tests/kernel/test_switching.py"
    parts = (f"{switching}::test_on_and_off", f"{switching}::test_only_some_addresses", "tests/kernel/test_ptrace.py")
    run(programs, "tests/kernel/test_switched_programs.py", *parts, cpu=aarch64.CPUS[0])
