# SPDX-License-Identifier: GPL-2.0-or-later
"""Who else is known to write the knobs."""

from __future__ import annotations

from pathlib import Path

import pytest

from ksmd_ctl.host.sample import Writer
from ksmd_ctl.kernel.writers import find_writers
from tests.fakes.ksmfs import FakeKsmFs


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
    assert find_writers(fake.root) == (Writer(name, 500),)


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
    assert find_writers(fake.root) == ()


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
    assert find_writers(fake.root) == ((Writer("tuned", 600),) if writes else ())


def test_all_are_found_in_the_order_of_their_pids(fake: FakeKsmFs) -> None:
    fake.add_process(1000, "ksmtuned")
    fake.add_process(200, "momd")
    (fake.proc / "300").mkdir()
    assert find_writers(fake.root) == (Writer("momd", 200), Writer("ksmtuned", 1000))


def test_without_procfs_there_are_none(tmp_path: Path) -> None:
    assert find_writers(tmp_path) == ()
