# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.kernel.machines import (
    Membership,
    Owner,
    cgroup_paths,
    is_machine,
    membership,
    normalised_unit,
    unescape,
    unit_of,
)

LIBVIRT = r"0::/machine.slice/machine-qemu\x2d3\x2dweb\x2d01.scope/libvirt/emulator"
QEMU = ["/usr/bin/qemu-system-x86_64", "-name", "guest=web-01,debug-threads=on", "-m", "1024"]


@pytest.mark.parametrize(
    ("cgroup", "command", "group", "owner"),
    [
        (LIBVIRT, QEMU, "web-01", Owner.LIBVIRT),
        # The number of the start is not part of the name; without a command line the scope has it.
        (LIBVIRT.replace("d3", "d44"), [], "web-01", Owner.LIBVIRT),
        (LIBVIRT, ["/usr/libexec/qemu-kvm", "-name", "a,,b,debug-threads=on"], "a,b", Owner.LIBVIRT),
        (
            "0::/qemu.slice/100.scope",
            ["/usr/bin/kvm", "-id", "100", "-name", "db,debug-threads=on"],
            "100",
            Owner.PROXMOX,
        ),
        ("0::/", ["/usr/bin/kvm", "-id", "105", "-name", "db"], "105", Owner.PROXMOX),
        (
            "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1a2b.slice/cri-containerd-"
            + "c" * 64
            + ".scope",
            ["/usr/libexec/qemu-kvm", "-name", "guest=shop_web_1,debug-threads=on"],
            "shop/web_1",
            Owner.KUBEVIRT,
        ),
        ("0::/user.slice", ["qemu-system-aarch64", "-uuid", "1-2-3"], "1-2-3", Owner.OTHER),
        ("0::/system.slice/fc@7.service", ["/usr/bin/firecracker", "--id", "f7"], "f7", Owner.OTHER),
        ("0::/system.slice/fc@7.service", ["/usr/bin/firecracker"], "fc@.service", Owner.OTHER),
    ],
)
def test_machines_have_the_name_that_stays(cgroup: str, command: list[str], group: str, owner: Owner) -> None:
    found = membership(cgroup + "\n", command, "qemu")
    assert (found.group, found.owner) == (group, owner)
    assert found.machine


@pytest.mark.parametrize(
    ("cgroup", "unit", "group"),
    [
        ("0::/system.slice/nginx.service", "nginx.service", "nginx.service"),
        ("0::/user.slice/user-1000.slice/session-17.scope", "session-17.scope", "session-*.scope"),
        ("0::/user.slice/user-0.slice/session-c2.scope", "session-c2.scope", "session-*.scope"),
        (
            "0::/system.slice/sshd@12-10.0.0.1:22-10.0.0.2:5.service",
            "sshd@12-10.0.0.1:22-10.0.0.2:5.service",
            "sshd@.service",
        ),
        ("0::/system.slice/run-r0123456789abcdef.scope", "run-r0123456789abcdef.scope", "run-*.scope"),
        ("0::/system.slice/run-u17.service", "run-u17.service", "run-*.service"),
        ("0::/system.slice/docker-" + "0a" * 32 + ".scope", "docker-" + "0a" * 32 + ".scope", "docker-*.scope"),
        (
            "0::/a/cri-containerd-" + "0a" * 32 + ".scope/x",
            "cri-containerd-" + "0a" * 32 + ".scope",
            "cri-containerd-*.scope",
        ),
        (r"0::/system.slice/a\x2db.service", r"a\x2db.service", "a-b.service"),
        ("1:name=systemd:/system.slice/x.service\n0::/", "x.service", "x.service"),
        ("12:memory:/foo\n1:name=systemd:/", "", "cat"),
        ("", "", "cat"),
    ],
)
def test_others_are_their_unit_without_what_changes(cgroup: str, unit: str, group: str) -> None:
    assert membership(cgroup, ["cat", "-name", "guest=not-a-machine"], "cat") == Membership(group, unit, Owner.NONE)


def test_paths_by_hierarchy() -> None:
    text = "4:cpu,cpuacct:/a:b\n1:name=systemd:/s\n0::/u\nnonsense\n"
    assert cgroup_paths(text) == {"cpu": "/a:b", "cpuacct": "/a:b", "name=systemd": "/s", "": "/u"}


@given(st.text(max_size=30))
def test_names_of_any_kind_are_taken(text: str) -> None:
    assert isinstance(normalised_unit(text), str)
    assert membership(f"0::/{text}", [text], text).group is not None
    assert "/" not in unit_of(text)
    escaped = "".join(f"\\x{byte:02x}" for byte in text.encode(errors="replace"))
    assert unescape(escaped) == text.encode(errors="replace").decode()


@pytest.mark.parametrize(
    ("command", "machine"),
    [
        ([], False),
        (["/usr/bin/qemu-img", "convert"], False),
        (["/usr/bin/qemu-system-x86_64"], True),
        (["/usr/libexec/qemu-kvm"], True),
        (["cloud-hypervisor"], True),
        (["/usr/sbin/virtqemud"], False),
    ],
)
def test_which_programs_are_machines(command: list[str], machine: bool) -> None:
    assert is_machine(command) is machine
