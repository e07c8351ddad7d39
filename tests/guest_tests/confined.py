# SPDX-License-Identifier: GPL-2.0-or-later
"""Processes of the lab in cpusets: where their memory can be, and that no cgroup is left. Inside a guest:

tests/guest/run --kernel 6.12 --nodes 2 -- python -m pytest tests/guest_tests/confined.py
"""

from __future__ import annotations

import errno
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ksmd_ctl.errors import Rejected
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.scenario.cpusets import GROUP
from ksmd_ctl.scenario.format import LIBRARY
from ksmd_ctl.scenario.kernel_lab import open_kernel_lab
from tests.guest_tests.tenants import CGROUP, NODES, cgroups

__all__ = ["cgroups"]

pytestmark = pytest.mark.ksm

if len(NODES) < 2:
    pytest.skip(f"needs two nodes with memory, and there is {len(NODES)}", allow_module_level=True)

VERIFY = [sys.executable, "-m", "ksmd_ctl.cli.main", "verify"]


def test_memory_is_where_the_cpuset_allows_it(ksm_host: Path, cgroups: Path, tmp_path: Path) -> None:
    home, other = NODES[1], NODES[0]
    with open_kernel_lab(directory=tmp_path) as lab:
        assert lab.lacks_cpusets() == ""
        process = lab.spawn("member", frozenset({home}))
        child = lab.fork(process, "child")
        for each in (process, child):
            status = Path(f"/proc/{each.pid}/status").read_text()
            assert f"\nMems_allowed_list:\t{home}\n" in status
            start = lab.map(each, 2, None)
            lab.store(each, start, [b"x" * PAGE_SIZE] * 2)
            assert [page.node for page in lab.pages(each, start, 2)] == [home] * 2
            assert lab.pages(each, start, 2, ksm=False) == lab.pages(each, start, 2)
            with pytest.raises(Rejected) as refused:
                lab.move_pages(each, [start], other, shared=True)
            assert refused.value.errno == errno.EACCES
        with pytest.raises(Rejected):
            lab.map(process, 1, other)
        free = lab.spawn("nobody's")
        assert f"\nMems_allowed_list:\t{home}\n" not in Path(f"/proc/{free.pid}/status").read_text()
        assert (CGROUP / GROUP).is_dir()
    assert not (CGROUP / GROUP).exists()


def test_what_a_killed_run_left_is_removed_by_the_next(ksm_host: Path, cgroups: Path) -> None:
    killed = subprocess.Popen([*VERIFY, "--random", "1", "--count", "100000", "--domains", "separate"])
    deadline = time.monotonic() + 300
    while not list((CGROUP / GROUP).glob("*/cgroup.procs")):
        assert killed.poll() is None
        assert time.monotonic() < deadline, "no process was confined"
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    assert (CGROUP / GROUP).is_dir()
    done = subprocess.run([*VERIFY, LIBRARY / "domains"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (CGROUP / GROUP).exists()
