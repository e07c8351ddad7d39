# SPDX-License-Identifier: GPL-2.0-or-later
"""Which CPUs are left to the host."""

from __future__ import annotations

from pathlib import Path

import pytest

from ksmd_ctl.errors import Absent, HostError
from ksmd_ctl.kernel.housekeeping import housekeeping_cpus
from tests.fakes.ksmfs import FakeKsmFs

CPU = "sys/devices/system/cpu"


@pytest.fixture
def fake(tmp_path: Path) -> FakeKsmFs:
    """Two nodes of four CPUs."""
    fake = FakeKsmFs(tmp_path, nodes={0: (1000, 500), 1: (1000, 500)})
    fake.write(tmp_path / CPU / "online", "0-7\n")
    for node, cpus in ((0, "0-3"), (1, "4-7")):
        fake.write(tmp_path / f"sys/devices/system/node/node{node}/cpulist", f"{cpus}\n")
    return fake


def machine(fake: FakeKsmFs, pid: int, threads: dict[str, str], name: str = "qemu-system-x86") -> None:
    """A virtual machine's process, with threads by name and the CPUs of each."""
    fake.add_process(pid, name)
    for number, (thread, cpus) in enumerate({"main": "0", **threads}.items(), pid):
        called = name if thread.startswith("main") else thread
        text = (
            f"Name:\t{called}\nState:\tS (sleeping)\nCpus_allowed:\tff\nCpus_allowed_list:\t{cpus}\nMems_allowed:\t1\n"
        )
        fake.write(fake.proc / f"{pid}/task/{number}/status", text)


def test_without_machines_it_is_every_cpu(fake: FakeKsmFs) -> None:
    fake.add_process(50, "postgres", cpus="1")
    assert housekeeping_cpus(fake.root) == "0-7"


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({f"{CPU}/isolated": "2-3", f"{CPU}/nohz_full": "(null)"}, "0-1,4-7"),
        ({f"{CPU}/isolated": "", f"{CPU}/nohz_full": "5-7"}, "0-4"),
        ({f"{CPU}/isolated": "1", f"{CPU}/nohz_full": "2", "sys/fs/cgroup/cpuset.cpus.isolated": "6-7"}, "0,3-5"),
        ({f"{CPU}/online": "0-1,4", f"{CPU}/isolated": "4-7"}, "0-1"),
        ({f"{CPU}/isolated": "?"}, "0-7"),
    ],
)
def test_isolated_cpus_are_left_out(fake: FakeKsmFs, files: dict[str, str], left: str) -> None:
    for name, text in files.items():
        fake.write(fake.root / name, f"{text}\n")
    assert housekeeping_cpus(fake.root) == left


@pytest.mark.parametrize(
    ("threads", "name", "left"),
    [
        # One CPU each, as <vcpupin> does; what QEMU's other threads may use is left.
        ({"CPU 0/KVM": "2", "CPU 1/KVM": "3", "worker": "1"}, "qemu-system-x86", "0-1,4-7"),
        ({"CPU 0/TCG": "1-3"}, "qemu-system-aar", "0,4-7"),
        ({"vcpu0": "5", "vcpu1": "6", "http-server": "0"}, "cloud-hyperviso", "0-4,7"),
        ({"fc_vcpu 0": "7"}, "firecracker", "0-6"),
        # Without names all of its threads count but the first, which has CPU 0.
        ({"main2": "4", "main3": "5"}, "kvm", "0-3,6-7"),
        # A whole node, or more, is not pinned.
        ({"CPU 0/KVM": "0-3", "CPU 1/KVM": "0-7", "CPU 2/KVM": "3-7"}, "qemu-system-x86", "0-7"),
        ({"CPU 0/KVM": "2"}, "postgres", "0-7"),
        ({"CPU 0/KVM": ""}, "qemu-system-x86", "0-7"),
    ],
)
def test_cpus_of_pinned_virtual_cpus_are_left_out(
    fake: FakeKsmFs, threads: dict[str, str], name: str, left: str
) -> None:
    machine(fake, 500, threads, name)
    assert housekeeping_cpus(fake.root) == left


def test_without_numa_less_than_all_cpus_is_pinned(tmp_path: Path) -> None:
    fake = FakeKsmFs(tmp_path, nodes={})
    fake.write(tmp_path / CPU / "online", "0-3\n")
    machine(fake, 500, {"CPU 0/KVM": "0-3", "CPU 1/KVM": "3"})
    assert housekeeping_cpus(fake.root) == "0-2"


def test_none_left_is_an_error_that_says_why(fake: FakeKsmFs) -> None:
    fake.write(fake.root / CPU / "isolated", "4-7\n")
    machine(fake, 500, {"CPU 0/KVM": "0-1", "CPU 1/KVM": "2", "CPU 2/KVM": "3"})
    with pytest.raises(HostError, match="no CPU is left: 4-7 are isolated and 0-3 are those of pinned virtual CPUs"):
        housekeeping_cpus(fake.root)


def test_without_the_list_of_cpus_nothing_is_known(tmp_path: Path) -> None:
    with pytest.raises(Absent):
        housekeeping_cpus(FakeKsmFs(tmp_path).root)


def test_on_this_host_some_are_left() -> None:
    assert housekeeping_cpus()
