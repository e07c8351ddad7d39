# SPDX-License-Identifier: GPL-2.0-or-later
"""What belongs into whose configuration, by systemd's version, the kernel, and who starts a process."""

from __future__ import annotations

import pytest

from ksmd_ctl.switch.persist import (
    MemoryKsm,
    Start,
    Starter,
    memory_ksm,
    memory_ksm_text,
    setting_for,
    start_of,
)
from tests.fakes.host import process


@pytest.mark.parametrize(
    ("version", "prctl", "state"),
    [
        ("252.39-1~deb12u1", True, MemoryKsm.UNKNOWN),
        ("253", True, MemoryKsm.UNKNOWN),
        ("254", True, MemoryKsm.FAILS),
        ("254.26-1", True, MemoryKsm.FAILS),
        ("255.4-1ubuntu8.4", True, MemoryKsm.FAILS),
        ("255", True, MemoryKsm.FAILS),
        ("255.5", True, MemoryKsm.WORKS),
        ("v255.10-stable", True, MemoryKsm.WORKS),
        ("256~rc3-5", True, MemoryKsm.WORKS),
        ("257.8-1~deb13u2", True, MemoryKsm.WORKS),
        ("257.8-1~deb13u2", False, MemoryKsm.NO_PRCTL),
        ("254", False, MemoryKsm.FAILS),
        ("", True, MemoryKsm.UNKNOWN),
        ("unknown", True, MemoryKsm.UNKNOWN),
    ],
)
def test_what_comes_of_memory_ksm(version: str, prctl: bool, state: MemoryKsm) -> None:
    assert memory_ksm(version, prctl=prctl) is state
    assert bool(memory_ksm_text(state, version)) == (state is not MemoryKsm.WORKS)


@pytest.mark.parametrize(
    ("fields", "start"),
    [
        ({"unit": "web.service"}, Start(Starter.SYSTEMD, "web.service")),
        ({"unit": "user@1000.service"}, Start(Starter.OTHER, "g")),
        ({"unit": "session-3.scope"}, Start(Starter.OTHER, "g")),
        ({"unit": "100.scope", "cgroup": "/qemu.slice/100.scope", "machine": True}, Start(Starter.PROXMOX, "100")),
        (
            {"unit": "machine-qemu.scope", "cgroup": "/machine.slice/machine-qemu-1-g.scope", "machine": True},
            Start(Starter.LIBVIRT, "g"),
        ),
        ({"cgroup": "/machine/qemu-1-g.libvirt-qemu/emulator", "machine": True}, Start(Starter.LIBVIRT, "g")),
        ({"cgroup": "/kubepods/x", "machine": True, "namespace": "default"}, Start(Starter.KUBEVIRT, "g")),
        # A unit that is called so is no machine of libvirt's.
        (
            {"unit": "a.service", "cgroup": "/machine.slice/machine-qemu-1-g.scope"},
            Start(Starter.SYSTEMD, "a.service"),
        ),
    ],
)
def test_who_starts_a_process(fields: dict[str, object], start: Start) -> None:
    assert start_of(process(1, "g", **fields)) == start


def setting(starter: Starter, *, on: bool, machine: bool = False, state: MemoryKsm = MemoryKsm.WORKS) -> str:
    found = setting_for(Start(starter, "a"), on=on, machine=machine, state=state, version="252")
    return f"{found.path}|{found.content}"


def test_units() -> None:
    drop_in = "/etc/systemd/system/a.d/50-ksmd-ctl-merge.conf|[Service]\n"
    assert setting(Starter.SYSTEMD, on=True) == f"{drop_in}MemoryKSM=yes\n"
    assert setting(Starter.SYSTEMD, on=False) == f"{drop_in}MemoryKSM=no\n"
    post = "ExecStartPost=-+/usr/bin/timeout 30 /usr/bin/ksmd-ctl merge"
    for state in (MemoryKsm.UNKNOWN, MemoryKsm.FAILS, MemoryKsm.NO_PRCTL):
        assert setting(Starter.SYSTEMD, on=True, state=state) == f"{drop_in}{post} on --pid $MAINPID\n"
        assert setting(Starter.SYSTEMD, on=False, state=state) == f"{drop_in}{post} off --pid $MAINPID\n"
    # A machine asks for it itself, later than that.
    assert setting(Starter.SYSTEMD, on=False, machine=True) == "|-machine mem-merge=off"


def test_what_a_setting_is_not_worth_is_said() -> None:
    def text(*, on: bool, state: MemoryKsm = MemoryKsm.WORKS, prctl: bool = True) -> str:
        start = Start(Starter.SYSTEMD, "a.service")
        return setting_for(start, on=on, machine=False, state=state, version="252", prctl=prctl).text

    assert "[switch] keep = true" in text(on=False)
    assert "[switch] keep = true" in text(on=False, state=MemoryKsm.UNKNOWN)
    assert "keep" not in text(on=True)
    # Debian 12: systemd 252 and Linux 6.1.
    assert "only for memory that is there then" in text(on=True, state=MemoryKsm.UNKNOWN, prctl=False)
    assert "only for memory" not in text(on=True, state=MemoryKsm.UNKNOWN)


def test_machines_of_others() -> None:
    assert setting(Starter.PROXMOX, on=False) == "|qm set a --allow-ksm 0"
    assert setting(Starter.PROXMOX, on=True) == "|qm set a --allow-ksm 1"
    element = "|<memoryBacking><nosharepages/></memoryBacking>"
    for starter in (Starter.LIBVIRT, Starter.KUBEVIRT):
        assert setting(starter, on=False) == setting(starter, on=True) == element
    assert setting(Starter.OTHER, on=False, machine=True) == "|-machine mem-merge=off"
    assert setting(Starter.OTHER, on=False) == "|"
