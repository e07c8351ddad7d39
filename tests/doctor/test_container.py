# SPDX-License-Identifier: GPL-2.0-or-later
"""What the doctor says in a container that lacks what it needs."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from ksmd_ctl.doctor.container import container
from ksmd_ctl.doctor.diagnose import diagnose
from ksmd_ctl.doctor.finding import Code, Severity
from ksmd_ctl.doctor.snapshot import Snapshot
from ksmd_ctl.errors import Absent, Denied
from ksmd_ctl.host.container import Container, Hidden
from tests.service.running import PROGRAM

PROCESSES = Absent("looking", "ksmd is not among the processes", hint="share the host's: hostPID: true", path="/proc")
KNOBS = Denied("writing", "/sys/kernel/mm/ksm is mounted read-only", hint="mount it", path="/sys/kernel/mm/ksm")
LIMITS = Absent("reading", "/sys/fs/cgroup has not the cgroups", hint="mount that", path="/sys/fs/cgroup")


def look(found: Container | None, run: int = 1, *, service: bool = False) -> Snapshot:
    report: dict[str, object] = {"readings": {"run": run}, "daemon": {"pid": 1} if service else None}
    return Snapshot(report, report, 1.0, container=found)


def codes(seen: Snapshot) -> list[tuple[Code, Severity]]:
    return [(one.code, one.severity) for one in container(seen)]


def test_outside_of_a_container_nothing_is_said() -> None:
    assert codes(look(None)) == []
    assert codes(look(Container(systemd=True))) == []


def test_each_thing_that_is_missing_is_a_finding_with_what_to_do() -> None:
    seen = look(Container({Hidden.PROCESSES: PROCESSES, Hidden.KNOBS: KNOBS, Hidden.LIMITS: LIMITS}, systemd=True))
    processes, knobs, limits = container(seen)
    assert (processes.code, processes.severity) == (Code.PROCESSES_HIDDEN, Severity.COSTS)
    assert processes.advice.endswith("un-merged. Share the host's: hostPID: true.")
    assert [(one.value, one.source) for one in processes.evidence] == [("ksmd is not among the processes", "/proc")]
    assert (knobs.code, knobs.evidence[0].value) == (Code.KNOBS_READ_ONLY, KNOBS.why)
    assert (limits.code, limits.severity) == (Code.LIMITS_HIDDEN, Severity.COSTS)


def test_knobs_that_nobody_here_can_write_are_worst_where_nothing_merges() -> None:
    found = Container({Hidden.KNOBS: KNOBS}, systemd=True)
    assert codes(look(found, run=1)) == [(Code.KNOBS_READ_ONLY, Severity.COSTS)]
    assert codes(look(found, run=0)) == [(Code.KNOBS_READ_ONLY, Severity.BLOCKS)]
    # The service's container has them read-only, and its broker writes them.
    assert codes(look(found, run=0, service=True)) == []


def test_without_systemd_a_host_is_healthy() -> None:
    seen = look(Container(), service=True)
    assert codes(seen) == [(Code.NO_SYSTEMD, Severity.NOTE)]
    assert diagnose(seen).healthy


def doctor(tmp_path: Path, options: list[str], variables: dict[str, str]) -> list[str]:
    """The findings of the program in namespaces of its own."""
    if os.geteuid() != 0 or not Path("/sys/kernel/mm/ksm/run").exists():
        pytest.skip("namespaces of one's own need root, and KSM")
    words = [PROGRAM, "doctor", "--json", "--no-contents", "--interval", "0.1"]
    done = subprocess.run(
        ["unshare", *options, *words, "--socket", str(tmp_path / "socket")],
        env=os.environ | variables, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    return [one["code"] for one in json.loads(done.stdout)["findings"]]


def test_a_pid_namespace_of_its_own(tmp_path: Path) -> None:
    found = doctor(tmp_path, ["--pid", "--fork", "--mount-proc"], {})
    assert {"processes-hidden", "no-systemd"} <= set(found)


def test_a_read_only_sysfs(tmp_path: Path) -> None:
    mount = "mount -o bind,ro /sys/kernel/mm/ksm /sys/kernel/mm/ksm && mount -o remount,bind,ro /sys/kernel/mm/ksm"
    inside = ["--mount", "sh", "-c", f'{mount} && exec "$@"', "sh"]
    assert "knobs-read-only" in doctor(tmp_path, inside, {"container": "oci"})
    assert "knobs-read-only" not in doctor(tmp_path, ["--mount"], {"container": "oci"})
