# SPDX-License-Identifier: GPL-2.0-or-later
"""Processes with merged memory on every node of a guest, and where it belongs."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from ksmd_ctl.kernel import libnuma
from ksmd_ctl.kernel.libnuma import PageMover
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.topology import read_topology
from ksmd_ctl.scenario.regions import RegionProcess, spawn
from tests.kernel.test_detection import filled, scan
from tests.service.running import run_command

TOPOLOGY = read_topology(numa=libnuma.available())
NODES = [node.number for node in TOPOLOGY.with_memory()]
CPUS: Mapping[int, frozenset[int]] = {node.number: node.cpus for node in TOPOLOGY.nodes if node.cpus}
#: Whoever writes `run` by hand sits there.
WRITER = min(CPUS)
PAGES = int(os.environ.get("KSMD_CTL_PAGES", "500"))
CGROUP = Path("/sys/fs/cgroup")


@dataclass
class Placed:
    """Memory of a process: where it belongs, and whether its mapping says so itself."""

    process: RegionProcess
    start: int
    pages: int
    home: int
    bound: bool = False

    def nodes(self) -> Counter[int]:
        addresses = [self.start + page * PAGE_SIZE for page in range(self.pages)]
        return Counter(PageMover().query(self.process.id.pid, addresses))


def contents(pages: int) -> list[bytes | None]:
    """Each content twice, and the same for everybody."""
    return [filled(number // 2) for number in range(pages)]


def fill(process: RegionProcess, pages: int, node: int | None) -> int:
    start = process.map(pages, node)
    process.advise(start, pages, mergeable=True)
    process.store(start, contents(pages))
    return start


@pytest.fixture(scope="module")
def cgroups() -> Path:
    """Version 2, with memory and cpuset."""
    if not (CGROUP / "cgroup.controllers").exists():
        done = subprocess.run(["mount", "-t", "cgroup2", "none", str(CGROUP)], capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"no cgroup version 2: {done.stderr.decode()}")
    try:
        (CGROUP / "cgroup.subtree_control").write_text("+memory +cpuset")
    except OSError as error:
        pytest.skip(f"no memory and cpuset controllers: {error}")
    return CGROUP


def group(parent: Path, name: str, **files: str) -> Path:
    path = parent / name
    path.mkdir(exist_ok=True)
    for file, value in files.items():
        (path / file.replace("_", ".", 1)).write_text(value)
    return path


@contextmanager
def tenants(cgroups: Path, *, few: bool = False) -> Iterator[list[Placed]]:
    """On each node with a task policy, in a cpuset, and bound; with CPUs also without a policy, and away from home.

    :param few: two or three of these on each node, every kind on some node
    """
    with ExitStack() as stack:
        found = []

        def add(name: str, prefer: int | None = None) -> RegionProcess:
            return stack.enter_context(spawn(name, prefer))

        def policy(node: int) -> None:
            process = add(f"policy-{node}", node)
            found.append(Placed(process, fill(process, PAGES, None), PAGES, node))

        def cpuset(node: int) -> None:
            process = add(f"cpuset-{node}")
            cpus = ",".join(map(str, CPUS.get(node, frozenset().union(*CPUS.values()))))
            path = group(cgroups, f"cage-{node}", cpuset_cpus=cpus, cpuset_mems=str(node))
            (path / "cgroup.procs").write_text(str(process.id.pid))
            found.append(Placed(process, fill(process, PAGES, None), PAGES, node))

        def bound(node: int) -> None:
            process = add(f"bound-{node}")
            found.append(Placed(process, fill(process, PAGES, node), PAGES, node, bound=True))

        def plain(node: int) -> None:
            process = add(f"plain-{node}")
            os.sched_setaffinity(process.id.pid, CPUS[node])
            found.append(Placed(process, fill(process, PAGES, None), PAGES, node))

        def moved(node: int) -> None:
            # It ran elsewhere when it got its memory.
            process = add(f"moved-{node}")
            elsewhere = next(other for other in CPUS if other != node)
            os.sched_setaffinity(process.id.pid, CPUS[elsewhere])
            start = fill(process, PAGES, None)
            os.sched_setaffinity(process.id.pid, CPUS[node])
            found.append(Placed(process, start, PAGES, node))

        for index, node in enumerate(NODES):
            kinds = [policy, cpuset, bound] + [plain, moved] * (node in CPUS)
            for kind in kinds[index % 2 :: 2] if few else kinds:
                kind(node)
        yield found


def share(tenants: list[Placed]) -> float:
    """How much of it is at home."""
    there = sum(tenant.nodes()[tenant.home] for tenant in tenants)
    return there / sum(tenant.pages for tenant in tenants)


def unchanged(tenants: list[Placed]) -> None:
    for tenant in tenants:
        assert tenant.process.load(tenant.start, tenant.pages) == tuple(contents(tenant.pages))


def knob(ksm: Path, name: str, value: int | None = None) -> int:
    if value is not None:
        (ksm / name).write_text(str(value))
    return int((ksm / name).read_text())


def knobs(ksm: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in ksm.iterdir() if os.stat(path).st_mode & 0o200}


def merge(ksm: Path, across: int) -> None:
    """Everything merged, ksmd running."""
    knob(ksm, "run", 0)
    knob(ksm, "run", 2)
    knob(ksm, "merge_across_nodes", across)
    scan(ksm, 4)
    # A batch of all that there is would keep whoever writes run waiting.
    knob(ksm, "pages_to_scan", 500)
    knob(ksm, "run", 1)
    assert knob(ksm, "pages_sharing") > 0


def command(folder: Path, *words: str, floor_bytes: int = 16 << 20) -> subprocess.CompletedProcess[str]:
    """A command by itself, its files below `folder`."""
    path = folder / "ksmd-ctl.toml"
    paths = {"socket": f"{folder}/socket", "state_directory": str(folder), "runtime_directory": str(folder)}
    lines = [f"{key} = {value!r}" for key, value in paths.items()]
    path.write_text("\n".join(["[limits]", f"floor_bytes = {floor_bytes}", "[service]", *lines, ""]))
    return run_command(*words, "--config", str(path), timeout=280)


def vmstat(name: str) -> int:
    """A counter of /proc/vmstat, as oom_kill."""
    counters = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(counters[name])
