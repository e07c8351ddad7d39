# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.kernel.machines import (
    Membership,
    Origin,
    cgroup_paths,
    is_machine,
    membership,
    normalised_unit,
    systemd_path,
    unescape,
    unit_of,
)
from ksmd_ctl.kernel.proc_pid import LONGEST_NAME

LIBVIRT = r"0::/machine.slice/machine-qemu\x2d3\x2dweb\x2d01.scope/libvirt/emulator"
QEMU = ["/usr/bin/qemu-system-x86_64", "-name", "guest=web-01,debug-threads=on", "-m", "1024"]


POD = "0::/kubepods.slice/kubepods-burstable.slice/pod1a2b.slice/cri-containerd-" + "c" * 64 + ".scope"
SESSION = "0::/user.slice/user-1000.slice/session-17.scope"
USER = "0::/user.slice/user-1000.slice/user@1000.service"
LONG = "a-name-of-a-domain-that-is-longer-than-what-a-scope-can-have-of-it"


def of(cgroup: str, command: list[str], name: str = "qemu", uid: int | None = 0, **more: bool) -> Membership:
    facts = {"machine": bool(command) and is_machine(command[0]), **more}
    return membership(Origin(cgroup + "\n", command, name, uid, **facts))


@pytest.mark.parametrize(
    ("cgroup", "command", "uid", "group"),
    [
        (LIBVIRT, QEMU, 64055, "web-01"),
        # The number of the start is not part of the name; without a command line the scope has it.
        (LIBVIRT.replace("d3", "d44"), [], 64055, "web-01"),
        ("11:memory:/x\n1:name=systemd:" + LIBVIRT[3:], QEMU, 107, "web-01"),
        # libvirt leaves out of a scope's name what a host's name can't have, and cuts it.
        (
            r"0::/machine.slice/machine-qemu\x2d1\x2dab.scope",
            ["/usr/libexec/qemu-kvm", "-name", "a,,b,debug-threads=on"],
            107,
            "a,b",
        ),
        (
            r"0::/machine.slice/machine-qemu\x2d1\x2d" + LONG[:55].replace("-", r"\x2d") + ".scope",
            ["qemu-system-x86_64", "-name", f"guest={LONG}"],
            107,
            LONG,
        ),
        ("0::/machine/qemu-5-web-01.libvirt-qemu/emulator", QEMU, 107, "web-01"),
        (
            "0::/qemu.slice/100.scope",
            ["/usr/bin/kvm", "-id", "100", "-name", "db,debug-threads=on"],
            0,
            "100",
        ),
        ("0::/", ["/usr/bin/kvm", "-id", "105", "-name", "db"], 0, "105"),
        (POD, ["/usr/libexec/qemu-kvm", "-name", "guest=shop_web_1"], 107, "shop/web_1"),
        (SESSION, ["qemu-system-aarch64", "-uuid", "1-2-3"], 0, "1-2-3"),
        ("0::/system.slice/fc@7.service", ["/usr/bin/firecracker", "--id", "f7"], 0, "f7"),
        ("0::/system.slice/fc@7.service", ["/usr/bin/firecracker"], 0, "fc@.service"),
        # microvm.nix: a user of its own, and one unit for all.
        ("0::/system.slice/microvm@web.service", QEMU, 990, "microvm@.service/web-01"),
    ],
)
def test_machines_have_the_name_that_stays(cgroup: str, command: list[str], uid: int, group: str) -> None:
    found = of(cgroup, command, uid=uid)
    assert found.group == group
    # Only one that has no name at all is called as its unit.
    assert found.machine == (group != "fc@.service")
    assert found.namespace == ("shop" if cgroup == POD else "")


VICTIM = ["qemu-system-x86_64", "-name", "guest=web-01", "-id", "100", "-uuid", "1-2-3"]


@pytest.mark.parametrize(
    ("cgroup", "uid", "contained", "group"),
    [
        (SESSION, 1000, False, "user-1000/web-01"),
        (USER + "/app.slice/app-vm.scope", 1000, False, "user-1000/web-01"),
        ("0::/", 1000, False, "user-1000/web-01"),
        ("0::/", None, False, "user-unknown/web-01"),
        ("0::/system.slice/httpd.service", 33, False, "httpd.service/web-01"),
        # Root of a container is not root; what it calls its cgroups is its own affair.
        ("0::/system.slice/docker-" + "0a" * 32 + ".scope", 0, True, "docker-*.scope/web-01"),
        ("0::/docker/" + "0a" * 32 + "/qemu.slice/100.scope", 0, True, "container/web-01"),
        ("0::/lxc/205/ns/qemu.slice/100.scope", 100000, True, "lxc/205/web-01"),
        (USER + LIBVIRT[3:], 1000, False, "user-1000/web-01"),
        (USER + "/qemu.slice/100.scope", 1000, False, "user-1000/web-01"),
        (USER + POD[3:], 1000, False, "user-1000/web-01"),
        # A guest that broke out of its QEMU and wrote another name over its arguments.
        (LIBVIRT.replace("web", "mine"), 107, False, "mine-01"),
    ],
)
def test_nobody_is_counted_as_another_by_what_they_say(
    cgroup: str, uid: int | None, contained: bool, group: str
) -> None:
    assert of(cgroup, VICTIM, uid=uid, contained=contained, machine=True).group == group


@pytest.mark.parametrize(
    ("cgroup", "uid", "unit", "group"),
    [
        ("0::/system.slice/nginx.service", 0, "nginx.service", "nginx.service"),
        (SESSION, 1000, "session-17.scope", "session-*.scope"),
        ("0::/user.slice/user-0.slice/session-c2.scope", 0, "session-c2.scope", "session-*.scope"),
        (
            "0::/system.slice/sshd@12-10.0.0.1:22-10.0.0.2:5.service",
            0,
            "sshd@12-10.0.0.1:22-10.0.0.2:5.service",
            "sshd@.service",
        ),
        ("0::/system.slice/run-r0123456789abcdef.scope", 0, "run-r0123456789abcdef.scope", "run-*.scope"),
        ("0::/system.slice/run-u17.service", 0, "run-u17.service", "run-*.service"),
        ("0::/system.slice/docker-" + "0a" * 32 + ".scope", 0, "docker-" + "0a" * 32 + ".scope", "docker/0a0a0a0a0a0a"),
        ("0::/system.slice/docker-0a0a0a0a0a0a.scope", 0, "docker-0a0a0a0a0a0a.scope", "docker-*.scope"),
        (
            "0::/a.slice/cri-containerd-" + "0a" * 32 + ".scope/x",
            0,
            "cri-containerd-" + "0a" * 32 + ".scope",
            "cri-containerd-*.scope",
        ),
        (r"0::/system.slice/a\x2db.service", 0, r"a\x2db.service", "a-b.service"),
        ("1:name=systemd:/system.slice/x.service\n0::/", 0, "x.service", "x.service"),
        ("12:memory:/foo\n1:name=systemd:/", 0, "", "cat"),
        ("", 0, "", "cat"),
        # What a user's own systemd, a container or the process itself calls it.
        (USER + "/app.slice/nginx.service", 1000, "user@1000.service", "user-1000/nginx.service"),
        (USER + "/init.scope", 1000, "user@1000.service", "user-1000/init.scope"),
        (USER, 1000, "user@1000.service", "user@.service"),
        ("0::/system.slice/box.service/payload/system.slice/nginx.service", 0, "box.service", "box.service"),
        ("0::/lxc.payload.web/system.slice/nginx.service", 0, "", "lxc/web"),
        ("0::/docker/0a0a/system.slice/nginx.service", 1000, "", "user-1000/cat"),
        ("", 1000, "", "user-1000/cat"),
    ],
)
def test_others_are_their_unit_without_what_changes(cgroup: str, uid: int, unit: str, group: str) -> None:
    found = of(cgroup, ["cat", "-name", "guest=not-a-machine"], "cat", uid)
    assert found == Membership(group, unit, uid=uid, cgroup=systemd_path(cgroup))


def test_names_are_fit_to_be_shown() -> None:
    found = of(SESSION, ["qemu-system-x86_64", "-name", "\x1b[2J\nx" + "y" * 125_000])
    assert found.group.startswith("\\x1b[2J\\nxyyy")
    assert len(found.group) == LONGEST_NAME
    assert of("0::/a.slice/\x1b[2J\u202e.service", ["x"]).unit == "\\x1b[2J\\u202e.service"


def test_paths_by_hierarchy() -> None:
    text = "4:cpu,cpuacct:/a:b\n1:name=systemd:/s\n0::/u\nnonsense\n"
    assert cgroup_paths(text) == {"cpu": "/a:b", "cpuacct": "/a:b", "name=systemd": "/s", "": "/u"}


@given(st.text(max_size=30))
def test_names_of_any_kind_are_taken(text: str) -> None:
    assert isinstance(normalised_unit(text), str)
    assert of(f"0::/{text}", [text, "-name", text], text, machine=True).group.isprintable()
    assert "/" not in unit_of(text)
    escaped = "".join(f"\\x{byte:02x}" for byte in text.encode(errors="replace"))
    assert unescape(escaped) == text.encode(errors="replace").decode()


@pytest.mark.parametrize(
    ("program", "machine"),
    [
        ("", False),
        ("/usr/bin/qemu-img", False),
        ("/usr/bin/qemu-system-x86_64", True),
        ("/usr/bin/qemu-system-x86_64 (deleted)", True),
        ("/nix/store/abc-qemu-9.1/bin/.qemu-system-x86_64-wrapped", True),
        ("/usr/libexec/qemu-kvm", True),
        ("cloud-hypervisor", True),
        ("/usr/sbin/virtqemud", False),
    ],
)
def test_which_programs_are_machines(program: str, machine: bool) -> None:
    assert is_machine(program) is machine
