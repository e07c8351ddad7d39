# SPDX-License-Identifier: GPL-2.0-or-later
"""Trust domains on a machine with several nodes, confined by cgroup v2, and everybody who gets out. Inside a guest:

tests/guest/run --kernel 6.12 --nodes 2 -- python -m pytest tests/guest_tests/domains.py
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from ksmd_ctl.config.domains import Domain, DomainMode, Domains
from ksmd_ctl.domains.audit import Audit, Cause, DomainAudit, auditing
from ksmd_ctl.errors import ExitCode
from ksmd_ctl.host.operation import finish
from ksmd_ctl.privileged.host import open_kernel_host
from ksmd_ctl.scenario.regions import RegionProcess, spawn
from tests.guest_tests.tenants import CPUS, NODES, cgroups, contents, group, knob
from tests.kernel.test_detection import scan
from tests.service.running import Service, run_command, service, until

__all__ = ["cgroups"]

pytestmark = pytest.mark.ksm

if len(NODES) < 2:
    pytest.skip(f"needs two nodes with memory, and there is {len(NODES)}", allow_module_level=True)

FIRST, SECOND = NODES[:2]
PAGES = 500
ALL_CPUS = ",".join(map(str, sorted(frozenset().union(*CPUS.values()))))
CONFIG = Domains(
    (
        Domain("gold", frozenset({FIRST}), cgroups=("/gold",)),
        Domain("silver", frozenset({SECOND}), cgroups=("/silver",)),
    ),
    DomainMode.NODES,
)


@pytest.fixture(autouse=True)
def ksm(ksm_host: Path) -> Path:
    """KSM with a tree for each node."""
    (ksm_host / "merge_across_nodes").write_text("0")
    (ksm_host / "use_zero_pages").write_text("0")
    return ksm_host


def cage(cgroups: Path, name: str, nodes: str) -> Path:
    return group(cgroups, name, cpuset_cpus=ALL_CPUS, cpuset_mems=nodes)


def fill(process: RegionProcess) -> int:
    """The same contents for everybody, each twice."""
    start = process.map(PAGES)
    process.advise(start, PAGES, mergeable=True)
    process.store(start, contents(PAGES))
    return start


@contextmanager
def placed(cgroups: Path) -> Iterator[dict[str, list[RegionProcess]]]:
    """Two processes in each domain, which got their memory there."""
    with ExitStack() as stack:
        found: dict[str, list[RegionProcess]] = {}
        for name, node in (("gold", FIRST), ("silver", SECOND)):
            path = cage(cgroups, name, str(node))
            for number in range(2):
                process = stack.enter_context(spawn(f"{name}-{number}"))
                (path / "cgroup.procs").write_text(str(process.id.pid))
                fill(process)
                found.setdefault(name, []).append(process)
        yield found


def audited() -> Audit:
    with closing(open_kernel_host(fork=True)) as host:
        return finish(auditing(host, CONFIG, finish(host.survey(5.0)), 5.0))


def named(audit: Audit, name: str) -> DomainAudit:
    return next(one for one in audit.domains if one.name == name)


def causes(audit: Audit, name: str) -> set[Cause]:
    return {reason.cause for reason in named(audit, name).reasons}


def strays(audit: Audit, name: str) -> list[int]:
    return [stray.process.pid for stray in named(audit, name).strays]


def pids(processes: Sequence[RegionProcess]) -> list[int]:
    return sorted(process.id.pid for process in processes)


def test_domains_that_are_kept_apart(ksm: Path, cgroups: Path) -> None:
    with placed(cgroups):
        scan(ksm, 4)
        audit = audited()
    assert {one.name: one.verdict.value for one in audit.domains} == {"gold": "isolated", "silver": "isolated"}
    assert (audit.share, audit.lacking, audit.cpusets) == (1.0, "", True)
    for one in audit.domains:
        assert one.figures is not None
        # Each content has a frame of its own in each domain.
        assert (one.figures.merged_pages, one.figures.frames, one.figures.shared_frames) == (2 * PAGES, PAGES // 2, 0)
        assert (one.processes, one.resident_pages, one.elsewhere_pages) == (2, 2 * PAGES, 0)


def test_the_same_with_one_tree_for_all_shares_every_frame(ksm: Path, cgroups: Path) -> None:
    knob(ksm, "merge_across_nodes", 1)
    with placed(cgroups):
        scan(ksm, 4)
        audit = audited()
    for name, other in (("gold", "silver"), ("silver", "gold")):
        assert {Cause.SHARED_FRAMES, Cause.KNOB, Cause.PAGES_ELSEWHERE} & causes(audit, name) >= {
            Cause.SHARED_FRAMES,
            Cause.KNOB,
        }
        assert named(audit, name).shared_with == {other: PAGES // 2}
    # A merged page is on the node of one of them, and elsewhere for the other.
    assert sum(one.elsewhere_pages for one in audit.domains) == 2 * PAGES


def test_a_stranger_is_found_before_it_shares_anything(ksm: Path, cgroups: Path) -> None:
    with placed(cgroups), spawn("stranger", FIRST) as stranger:
        fill(stranger)
        audit = audited()
        for name in ("gold", "silver"):
            assert causes(audit, name) == {Cause.OTHERS_ON_ITS_NODES}
            assert [found.process.pid for found in named(audit, name).intruders] == [stranger.id.pid]
        scan(ksm, 4)
        audit = audited()
        assert causes(audit, "gold") == {Cause.OTHERS_ON_ITS_NODES, Cause.SHARED_FRAMES}
        assert causes(audit, "silver") == {Cause.OTHERS_ON_ITS_NODES}
        assert sum(named(audit, "gold").shared_with.values()) == PAGES // 2


def test_who_is_confined_takes_pages_along_that_were_merged_before(ksm: Path, cgroups: Path) -> None:
    with placed(cgroups) as found, spawn("late", SECOND) as late:
        fill(late)
        scan(ksm, 4)
        # The kernel moves all of its pages, for whoever maps them (kernel/cgroup/cpuset.c: cpuset_migrate_mm).
        (cgroups / "gold/cgroup.procs").write_text(str(late.id.pid))
        audit = audited()
        assert strays(audit, "gold") == []
        assert sorted(strays(audit, "silver")) == pids(found["silver"])
        assert named(audit, "silver").elsewhere_pages == 2 * PAGES
        assert causes(audit, "silver") == {Cause.PAGES_ELSEWHERE, Cause.SHARED_FRAMES}
        assert causes(audit, "gold") == {Cause.OTHERS_ON_ITS_NODES, Cause.SHARED_FRAMES}
        assert named(audit, "gold").processes == len(found["gold"]) + 1


def test_a_child_that_is_moved_to_another_domain_takes_its_parent_s_pages_along(ksm: Path, cgroups: Path) -> None:
    with placed(cgroups) as found, found["silver"][0].fork() as child:
        (cgroups / "gold/cgroup.procs").write_text(str(child.id.pid))
        audit = audited()
        assert strays(audit, "gold") == []
        assert strays(audit, "silver") == [found["silver"][0].id.pid]
        assert Cause.PAGES_ELSEWHERE in causes(audit, "silver")
        assert Cause.OTHERS_ON_ITS_NODES in causes(audit, "gold")
        figures = named(audit, "gold").figures
        assert figures is not None
        # Nothing of it is merged: the kernel's fork shares it.
        assert (figures.forked_frames, figures.shared_frames) == (PAGES, 0)


THREADED = """
import mmap, sys, threading
memory = mmap.mmap(-1, 4 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_MERGEABLE)
memory[:] = bytes([7]) * (4 << 20)
end = threading.Event()
thread = threading.Thread(target=end.wait)
thread.start()
print(thread.native_id, flush=True)
sys.stdin.read()
end.set()
"""


def test_a_thread_that_was_moved_out_is_found(ksm: Path, cgroups: Path) -> None:
    gold = cage(cgroups, "gold", f"{FIRST},{SECOND}")
    with subprocess.Popen([sys.executable, "-c", THREADED], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        thread = int(process.stdout.readline())
        (gold / "cgroup.procs").write_text(str(process.pid))
        main, side = (group(gold, name) for name in ("main", "side"))
        for path in (main, side):
            (path / "cgroup.type").write_text("threaded")
        (gold / "cgroup.subtree_control").write_text("+cpuset")
        cage(gold, "main", str(FIRST))
        cage(gold, "side", str(FIRST))
        for tid in (process.pid, thread):
            (main / "cgroup.threads").write_text(str(tid))
        assert strays(audited(), "gold") == []
        (side / "cgroup.threads").write_text(str(thread))
        (side / "cpuset.mems").write_text(str(SECOND))
        audit = audited()
        # The thread has taken the process's memory along (update_tasks_nodemask).
        assert causes(audit, "gold") == {Cause.MAY_ALLOCATE_ELSEWHERE, Cause.PAGES_ELSEWHERE}
        assert strays(audit, "gold") == [process.pid]
        assert named(audit, "gold").strays[0].allowed == frozenset({SECOND})
        process.stdin.close()
    for path in (main, side, gold):
        until(f"{path} is empty", lambda path=path: True if not (path / "cgroup.threads").read_text() else None)
        path.rmdir()


def test_an_ended_unit_is_told_from_an_isolated_one(ksm: Path, cgroups: Path) -> None:
    with placed(cgroups) as found:
        for process in found["silver"]:
            process.exit()
        audit = audited()
    assert {one.name: one.verdict.value for one in audit.domains} == {"gold": "isolated", "silver": "no members"}


# -- the service -----------------------------------------------------------------------------------------------

CONFIGURATION = f"""policy = "fixed"
[knobs]
run = 1
pages_to_scan = 5000
sleep_millisecs = 100
[census]
interval = 5
cpu_share = 0.5
[domains]
mode = "nodes"
[domains.gold]
nodes = "{FIRST}"
cgroups = ["/gold"]
[domains.silver]
nodes = "{SECOND}"
cgroups = ["/silver"]
"""


def command(running: Service, *words: str) -> subprocess.CompletedProcess[str]:
    return run_command(*words, "--socket", str(running.folder / "socket"))


def isolated(running: Service, name: str, value: float) -> bool | None:
    return True if (running.answers() or {}).get(f'ksm_domain_isolated{{domain="{name}"}}') == value else None


def test_the_service_notices_a_stranger_and_its_end(ksm: Path, cgroups: Path, tmp_path: Path) -> None:
    with placed(cgroups), service(tmp_path, CONFIGURATION) as running:
        until("both are isolated", lambda: isolated(running, "gold", 1) and isolated(running, "silver", 1), 120)
        assert knob(ksm, "merge_across_nodes") == knob(ksm, "use_zero_pages") == 0
        done = command(running, "domains")
        assert (done.returncode, done.stderr) == (ExitCode.DONE, "")
        refused = command(running, "set", "merge_across_nodes=1")
        assert refused.returncode == ExitCode.REFUSED
        assert "domains.mode" in refused.stderr
        with spawn("stranger", FIRST) as stranger:
            fill(stranger)
            until("it is noticed", lambda: isolated(running, "gold", 0), 120)
            done = command(running, "domains")
            assert done.returncode == ExitCode.CHECK_FAILED
            assert f"(pid {stranger.id.pid})" in " ".join(done.stdout.split())
            doctor = command(running, "doctor", "--no-contents", "--interval", "1")
            assert "domains-share" in doctor.stdout
        until("it is over", lambda: isolated(running, "gold", 1), 120)
