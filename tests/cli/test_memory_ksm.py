# SPDX-License-Identifier: GPL-2.0-or-later
"""Units that have MemoryKSM=, found in files, with systemctl and /proc in their place."""

from __future__ import annotations

from pathlib import Path

import pytest

from ksmd_ctl.cli.memory_ksm import systemds_answer, units
from ksmd_ctl.kernel.syscalls import knows_memory_merge
from ksmd_ctl.switch.persist import MemoryKsm, MemoryKsmUnit
from tests.cli.test_systemctl import Script


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return Script(tmp_path)


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_version_of_the_systemd_that_runs(script: Script, tmp_path: Path) -> None:
    script.say("252.39-1~deb12u1\n")
    assert systemds_answer(tmp_path) == (MemoryKsm.UNKNOWN, "252.39-1~deb12u1")
    script.say("257.8\n")
    state = MemoryKsm.WORKS if knows_memory_merge() else MemoryKsm.NO_PRCTL
    assert systemds_answer(tmp_path) == (state, "257.8")
    script.say("", "no bus", 1)
    assert systemds_answer(tmp_path) == (MemoryKsm.UNKNOWN, "")


def test_a_host_without_systemd(tmp_path: Path) -> None:
    write(tmp_path, "etc/systemd/system/a.service", "[Service]\nMemoryKSM=yes\n")
    assert systemds_answer(tmp_path)[1] == ""
    assert units(tmp_path) == ()


def test_units_that_have_the_setting(script: Script, tmp_path: Path) -> None:
    vendor, own = "usr/lib/systemd/system", "etc/systemd/system"
    write(tmp_path, f"{vendor}/a.service", "[Service]\n  MemoryKSM = yes \n#MemoryKSM=no\n")
    write(tmp_path, f"{vendor}/b.service", "[Service]\nMemoryKSM=yes\n")
    write(tmp_path, f"{own}/b.service.d/10.conf", "[Service]\nMemoryKSM=no\n")
    write(tmp_path, f"{own}/c.service", "[Service]\n#MemoryKSM=yes\n")
    write(tmp_path, f"{own}/d@.service", "[Service]\nMemoryKSM=yes\n")
    (tmp_path / own / "gone.service").symlink_to("/nowhere")
    (tmp_path / own / "binary.service").write_bytes(b"\xff\0MemoryKSM")
    stat = "ksm_rmap_items 0\nksm_merge_any: no\nksm_mergeable: no\n"
    write(tmp_path, "proc/4711/ksm_stat", stat)
    write(tmp_path, "proc/4711/ksm_merging_pages", "0\n")
    script.say("ActiveState=active\nMainPID=4711\n")
    assert units(tmp_path) == (
        MemoryKsmUnit("a.service", True, "active", 4711, False),
        MemoryKsmUnit("b.service", False, "active", 4711, False),
    )
    script.say("ActiveState=failed\nMainPID=0\n")
    assert units(tmp_path)[0] == MemoryKsmUnit("a.service", True, "failed", 0, None)
