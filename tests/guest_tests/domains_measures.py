# SPDX-License-Identifier: GPL-2.0-or-later
"""Mode ``nodes`` of the service on a machine with several nodes, members in cpusets of cgroup v2. Inside a guest:

tests/guest/run --kernel 6.12 --nodes 2 -- python -m pytest tests/guest_tests/domains_measures.py
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from ksmd_ctl.scenario.regions import RegionProcess, spawn
from tests.guest_tests.numa_service import command, document
from tests.guest_tests.tenants import NODES, Placed, cgroups, fill, group
from tests.service.running import Service, service, until

__all__ = ["cgroups"]

pytestmark = pytest.mark.ksm

if len(NODES) < 2:
    pytest.skip(f"needs two nodes with memory, and there is {len(NODES)}", allow_module_level=True)

FIRST, SECOND = NODES[:2]
PAGES = 200
KSM = Path("/sys/kernel/mm/ksm")

CONFIGURATION = """
policy = "fixed"
[knobs]
run = 1
pages_to_scan = 5000
sleep_millisecs = 20
[census]
interval = 5
cpu_share = 0.5
[domains]
mode = "nodes"
on_violation = "{on_violation}"
[domains.gold]
nodes = "{first}"
cgroups = ["/gold"]
[domains.silver]
nodes = "{second}"
cgroups = ["/silver"]
"""


@dataclass
class Scene:
    """The service, and a process of each domain with equal merged memory."""

    running: Service
    gold: Placed
    silver: Placed

    def isolated(self) -> bool:
        return bool(document(self.running, "domains")["isolated"])

    def measures(self, name: str) -> int | str:
        found: int | str = self.running.status()["domains"]["measures"][name]
        return found


def run_is(value: int) -> bool | None:
    return True if (KSM / "run").read_text().strip() == str(value) else None


@contextmanager
def scene(cgroups: Path, folder: Path, on_violation: str) -> Iterator[Scene]:
    (KSM / "run").write_text("2")
    (KSM / "merge_across_nodes").write_text("0")
    with ExitStack() as stack:
        found = []
        for name, node in (("gold", FIRST), ("silver", SECOND)):
            place = group(cgroups, name, cpuset_mems=str(node))
            process: RegionProcess = stack.enter_context(spawn(f"test-{name}", None))
            (place / "cgroup.procs").write_text(str(process.id.pid))
            found.append(Placed(process, fill(process, PAGES, None), PAGES, node))
        text = CONFIGURATION.format(on_violation=on_violation, first=FIRST, second=SECOND)
        there = Scene(stack.enter_context(service(folder, text)), *found)
        until("both domains to be isolated, and merged", lambda: (there.isolated() and run_is(1) and merged()) or None)
        yield there
        assert there.running.end() == 0


def merged() -> bool:
    """Each content is there twice in each domain, and once a domain where the trees are a node's."""
    return int((KSM / "pages_sharing").read_text()) == PAGES


def test_pages_of_a_confined_process_are_brought_home(ksm_host: Path, cgroups: Path, tmp_path: Path) -> None:
    """The copies of who un-merges come from his own policy: the process's cpuset is not asked."""
    with scene(cgroups, tmp_path, "report") as there:
        assert there.gold.nodes() == {FIRST: PAGES}
        done = command(there.running, "unmerge", "--pid", str(there.gold.process.id.pid), "--to", str(SECOND))
        assert "un-merged" in done.stdout, done.stderr
        until("the pages to be at home again", lambda: there.gold.nodes() == {FIRST: PAGES} or None)
        until("an audit that says so", lambda: there.isolated() or None)
        assert int(there.measures("moved_pages")) + int(there.measures("unmerged_pages")) > 0
        assert there.silver.nodes() == {SECOND: PAGES}
        assert there.measures("stopped") == ""


def test_ksmd_is_stopped_while_a_member_is_not_confined(ksm_host: Path, cgroups: Path, tmp_path: Path) -> None:
    with scene(cgroups, tmp_path, "stop") as there:
        procs, pid = cgroups / "gold/cgroup.procs", str(there.gold.process.id.pid)
        (cgroups / "gold/cpuset.mems").write_text(f"{FIRST},{SECOND}")
        until("ksmd to be stopped", lambda: run_is(0))
        assert "gold is not isolated" in str(there.measures("stopped"))
        scans = (KSM / "full_scans").read_text()
        refused = command(there.running, "set", "run=1")
        assert refused.returncode != 0
        assert pid in procs.read_text().split()
        assert (KSM / "full_scans").read_text() == scans
        (cgroups / "gold/cpuset.mems").write_text(str(FIRST))
        until("ksmd to run again", lambda: run_is(1))
        assert there.measures("stopped") == ""


def test_a_service_that_was_killed_while_ksmd_was_stopped(ksm_host: Path, cgroups: Path, tmp_path: Path) -> None:
    with scene(cgroups, tmp_path, "stop") as there:
        (cgroups / "gold/cpuset.mems").write_text(f"{FIRST},{SECOND}")
        until("ksmd to be stopped", lambda: run_is(0))
        there.running.process.kill()
        there.running.process.wait()
        text = CONFIGURATION.format(on_violation="stop", first=FIRST, second=SECOND)
        with service(tmp_path, text) as after:
            assert run_is(0)
            (cgroups / "gold/cpuset.mems").write_text(str(FIRST))
            until("ksmd to run again", lambda: run_is(1))
            there.running = after
            assert after.end() == 0
        there.running.end = lambda *_: 0  # type: ignore[method-assign]
