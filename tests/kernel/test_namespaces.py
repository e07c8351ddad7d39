# SPDX-License-Identifier: GPL-2.0-or-later
"""What a container hides, from trees like a container's and in namespaces of a test's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ksmd_ctl.errors import Absent, Denied
from ksmd_ctl.host.container import Container, Hidden
from ksmd_ctl.kernel.namespaces import container, hidden_from_container, join_host_cgroups

JOIN = """
import os
from ksmd_ctl.kernel.namespaces import join_host_cgroups
before = os.readlink("/proc/self/ns/cgroup")
join_host_cgroups()
print(before, os.readlink("/proc/self/ns/cgroup"))
"""


def add_ksmd(root: Path) -> None:
    (root / "proc/12").mkdir(parents=True)
    (root / "proc/12/stat").write_text("12 (ksmd) S 2 0 0")
    (root / "proc/12/cmdline").touch()


def unshared(*options: str) -> list[str]:
    if os.geteuid() != 0:
        pytest.skip("namespaces of one's own need root")
    done = subprocess.run(
        ["unshare", *options, sys.executable, "-c", JOIN], capture_output=True, text=True, timeout=30, check=True
    )
    return done.stdout.split()


def test_the_hosts_cgroups_are_seen_from_a_namespace_of_its_own() -> None:
    before, after = unshared("--cgroup")
    assert before != after == "cgroup:[4026531835]"


def test_without_the_hosts_processes_there_is_no_namespace_to_join() -> None:
    before, after = unshared("--cgroup", "--pid", "--fork", "--mount-proc")
    assert before == after != "cgroup:[4026531835]"


def test_who_is_on_the_host_joins_nothing(tmp_path: Path) -> None:
    before = os.readlink("/proc/self/ns/cgroup")
    join_host_cgroups()
    join_host_cgroups(tmp_path)
    assert os.readlink("/proc/self/ns/cgroup") == before


def test_the_right_that_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "proc/self/ns").mkdir(parents=True)
    (tmp_path / "proc/self/ns/cgroup").symlink_to("cgroup:[1]")
    add_ksmd(tmp_path)
    (tmp_path / "proc/12/ns").mkdir()
    # No namespace: setns(2) refuses it.
    (tmp_path / "proc/12/ns/cgroup").write_text("")
    with pytest.raises(Denied, match="seeing the cgroups of this host") as raised:
        join_host_cgroups(tmp_path)
    assert "CAP_SYS_ADMIN" in raised.value.hint


def host(root: Path, *, kind: str = "unified") -> Path:
    add_ksmd(root)
    knobs, cgroups = root / "sys/kernel/mm/ksm", root / "sys/fs/cgroup"
    knobs.mkdir(parents=True)
    (knobs / "run").write_text("0\n")
    cgroups.mkdir(parents=True)
    if kind == "unified":
        (cgroups / "cgroup.controllers").write_text("memory\n")
    else:
        (cgroups / "memory").mkdir()
        (cgroups / "memory/release_agent").write_text("\n")
    return root


@pytest.mark.parametrize("kind", ["unified", "version 1"])
def test_with_all_that_it_takes_nothing_is_hidden(tmp_path: Path, kind: str) -> None:
    assert hidden_from_container(host(tmp_path, kind=kind)) == {}


def test_a_container_is_told_by_its_pid_namespace_or_by_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("container", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    (host(tmp_path) / "proc/self/ns").mkdir(parents=True)
    link = tmp_path / "proc/self/ns/pid"
    assert container(tmp_path) is None
    link.symlink_to("pid:[4026531836]")
    assert container(tmp_path) is None
    monkeypatch.setenv("container", "oci")
    assert container(tmp_path) == Container({}, systemd=False)
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    assert container(tmp_path) == Container({}, systemd=True)
    monkeypatch.delenv("container")
    link.unlink()
    link.symlink_to("pid:[4026532001]")
    assert container(tmp_path) == Container({}, systemd=True)


def test_each_thing_that_is_hidden_is_said_with_what_to_mount(tmp_path: Path) -> None:
    found = hidden_from_container(tmp_path)
    assert list(found) == list(Hidden)
    pid, knobs, cgroups = found.values()
    assert isinstance(pid, Absent)
    assert "hostPID" in pid.hint
    assert isinstance(knobs, Denied)
    assert "not there" in knobs.why
    assert "at the same path" in knobs.hint
    assert isinstance(cgroups, Absent)
    assert "sys/fs/cgroup" in cgroups.hint


@pytest.mark.parametrize("kind", ["unified", "version 1"])
def test_a_container_that_sees_its_own_cgroup_only_is_told_so(kind: str, tmp_path: Path) -> None:
    cgroups = host(tmp_path, kind=kind) / "sys/fs/cgroup"
    if kind == "unified":
        (cgroups / "cgroup.type").write_text("domain\n")
    else:
        (cgroups / "memory/release_agent").unlink()
    (error,) = hidden_from_container(tmp_path).values()
    assert error.what == "reading the memory limits of tenants"


def test_knobs_on_a_read_only_mount_are_told_from_knobs_that_are_not_there() -> None:
    if os.geteuid() != 0 or not Path("/sys/kernel/mm/ksm/run").exists():
        pytest.skip("a mount of one's own needs root, and KSM")
    program = "from ksmd_ctl.kernel.namespaces import *; print([e.why for e in hidden_from_container().values()])"
    mount = "mount -o bind,ro /sys/kernel/mm/ksm /sys/kernel/mm/ksm && mount -o remount,bind,ro /sys/kernel/mm/ksm"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert "/sys/kernel/mm/ksm is mounted read-only" in done.stdout
