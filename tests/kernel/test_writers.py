# SPDX-License-Identifier: GPL-2.0-or-later
"""Who else is known to write the knobs."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from ksmd_ctl.host.operation import finish
from ksmd_ctl.host.sample import Writer
from ksmd_ctl.kernel.writers import WriterFinder
from tests.fakes.ksmfs import FakeKsmFs
from tests.kernel.stuck import stuck_process
from tests.service.running import until


def find(root: Path) -> tuple[Writer, ...]:
    return finish(WriterFinder(root).find())


@pytest.fixture
def fake(tmp_path: Path) -> FakeKsmFs:
    return FakeKsmFs(tmp_path)


@pytest.mark.parametrize(
    ("comm", "command", "name"),
    [
        ("ksmtuned", ["/bin/bash", "/usr/sbin/ksmtuned"], "ksmtuned"),
        ("bash", ["/bin/bash", "/usr/sbin/ksmtuned"], "ksmtuned"),
        ("momd", ["/usr/bin/python3", "/usr/sbin/momd", "-c", "/etc/vdsm/mom.conf"], "momd"),
        ("python3", ["/usr/bin/python3", "-s", "/usr/sbin/momd", "-c", "x"], "momd"),
        ("python3.11", ["/usr/bin/python3.11", "/usr/share/vdsm/supervdsmd"], "supervdsmd"),
        ("virt-handler", ["virt-handler", "--port", "8443"], "virt-handler"),
        ("harvester-node-manager", ["/usr/bin/harvester-node-manager"], "harvester-node-manager"),
        ("kata-ksm-throttler", ["/usr/libexec/kata-ksm-throttler"], "kata-ksm-throttler"),
    ],
)
def test_known_writers_are_named(fake: FakeKsmFs, comm: str, command: list[str], name: str) -> None:
    fake.add_process(500, comm, command=command)
    assert find(fake.root) == (Writer(name, 500),)


@pytest.mark.parametrize(
    ("comm", "command"),
    [
        ("libvirtd", ["/usr/sbin/libvirtd"]),
        ("ksmd-ctl", ["/usr/bin/python3", "/usr/bin/ksmd-ctl", "daemon"]),
        ("vim", ["vim", "/usr/sbin/ksmtuned"]),
        ("python3", ["/usr/bin/python3", "-c"]),
        ("python3", ["/usr/bin/python3", "-m", "x", "/usr/sbin/ksmtuned"]),
        ("bash", ["-bash"]),
        ("harvester-node-drain", ["/usr/bin/harvester-node-drain"]),
        ("kthread", []),
    ],
)
def test_others_are_not(fake: FakeKsmFs, comm: str, command: list[str]) -> None:
    fake.add_process(500, comm, command=command)
    assert find(fake.root) == ()


@pytest.mark.parametrize(
    ("profile", "writes"),
    [
        ("realtime-virtual-host\n", True),
        ("balanced cpu-partitioning\n", True),
        ("virtual-host\n", False),
        (None, False),
    ],
)
def test_tuned_writes_with_some_profiles_only(fake: FakeKsmFs, profile: str | None, writes: bool) -> None:
    fake.add_process(600, "tuned", command=["/usr/bin/python3", "-Es", "/usr/sbin/tuned", "-l", "-P"])
    if profile is not None:
        fake.write(fake.root / "etc/tuned/active_profile", profile)
    assert find(fake.root) == ((Writer("tuned", 600),) if writes else ())


def test_all_are_found_in_the_order_of_their_pids(fake: FakeKsmFs) -> None:
    fake.add_process(1000, "ksmtuned")
    fake.add_process(200, "momd")
    (fake.proc / "300").mkdir()
    assert find(fake.root) == (Writer("momd", 200), Writer("ksmtuned", 1000))


def unit(fake: FakeKsmFs, name: str) -> None:
    fake.write(fake.root / "usr/lib/systemd/system" / name, "[Service]\n")


def test_units_are_those_that_are_there(fake: FakeKsmFs) -> None:
    fake.add_process(500, "ksmtuned")
    fake.write(fake.proc / "500/cgroup", "0::/system.slice/ksmtuned.service\n")
    # Proxmox VE's package has no ksm.service, Debian's and Red Hat's have.
    assert find(fake.root) == (Writer("ksmtuned", 500, ("ksmtuned.service",)),)
    unit(fake, "ksmtuned.service")
    unit(fake, "ksm.service")
    assert find(fake.root) == (Writer("ksmtuned", 500, ("ksmtuned.service", "ksm.service")),)


def test_the_unit_that_it_runs_in_is_known_by_no_list(fake: FakeKsmFs) -> None:
    fake.add_process(500, "momd")
    fake.write(fake.proc / "500/cgroup", "0::/system.slice/our-own.service\n")
    assert find(fake.root) == (Writer("momd", 500, ("our-own.service",)),)


@pytest.mark.parametrize(
    "path",
    [
        "/user.slice/user-0.slice/session-3.scope",
        "/user.slice/user-0.slice/user@0.service",
        "/kubepods.slice/kubepods-burstable.slice/cri-containerd-0123456789ab.scope",
    ],
)
def test_no_unit_stops_what_runs_in_a_session_or_a_container(fake: FakeKsmFs, path: str) -> None:
    fake.add_process(500, "ksmtuned")
    fake.write(fake.proc / "500/cgroup", f"0::{path}\n")
    unit(fake, "ksmtuned.service")
    assert find(fake.root) == (Writer("ksmtuned", 500),)


def test_where_no_cgroup_tells_the_units_of_the_package_are_meant(fake: FakeKsmFs) -> None:
    fake.add_process(500, "ksmtuned")
    unit(fake, "ksmtuned.service")
    assert find(fake.root) == (Writer("ksmtuned", 500, ("ksmtuned.service",)),)


def test_without_procfs_there_are_none(tmp_path: Path) -> None:
    assert find(tmp_path) == ()


@pytest.mark.parametrize("uids", [(1000, 1000), (65534, 65534), (1000, 0), (0, 1000)])
def test_only_root_writes_the_knobs(fake: FakeKsmFs, uids: tuple[int, int]) -> None:
    fake.add_process(500, "ksmtuned", command=["/bin/bash", "/usr/sbin/ksmtuned"], uids=uids)
    fake.add_process(501, "bash", command=["/bin/bash", "/usr/sbin/ksmtuned"], uids=uids)
    fake.add_process(502, "ksmtuned")
    assert find(fake.root) == (Writer("ksmtuned", 502),)


def test_a_process_that_hangs_whoever_reads_of_it_holds_up_nobody(tmp_path: Path) -> None:
    with stuck_process(tmp_path, "python3", uid=65534) as pid:
        # Not root's: nothing of it is read that could wait.
        assert pid not in [writer.pid for writer in finish(WriterFinder().find())]


def test_one_of_root_s_is_given_up_and_not_asked_again(tmp_path: Path) -> None:
    finder = WriterFinder(deadline_seconds=0.2)
    with stuck_process(tmp_path, "python3") as pid:
        before = threading.active_count()
        finish(finder.find())
        assert finder.stuck == {pid}
        for _ in range(3):
            finish(finder.find())
        until("other readers to be done", lambda: True if threading.active_count() == before + 1 else None)
    until("its reader to be done", lambda: True if not finder.stuck else None)
