# SPDX-License-Identifier: GPL-2.0-or-later
"""Transactions on a machine with several nodes, beside the way it is done by hand. Inside a guest:

tests/guest/run --kernel 6.12 --nodes 2 -- python -m pytest -s tests/guest_tests/transactions.py
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.scenario.regions import spawn
from tests.guest_tests.tenants import (
    CPUS,
    NODES,
    PAGES,
    WRITER,
    Placed,
    cgroups,
    command,
    contents,
    fill,
    group,
    knob,
    knobs,
    merge,
    share,
    tenants,
    unchanged,
)
from tests.kernel.test_detection import scan

__all__ = ["cgroups"]

pytestmark = pytest.mark.ksm

if len(NODES) < 2:
    pytest.skip(f"needs two nodes with memory, and there is {len(NODES)}", allow_module_level=True)


def changed(folder: Path, *words: str) -> dict[str, Any]:
    done = command(folder, "set", *words)
    print(done.stderr + done.stdout)
    assert done.returncode == 0, done.stderr + done.stdout
    document: dict[str, Any] = json.loads((folder / "transactions-kernel.json").read_text())["last"]
    return document


def test_beside_the_naive_sequence(ksm_host: Path, cgroups: Path, tmp_path: Path) -> None:
    with tenants(cgroups) as found:
        merge(ksm_host, 1)
        before = share(found)
        # By hand, from a shell on the first node: findings F3.
        every = os.sched_getaffinity(0)
        os.sched_setaffinity(0, CPUS[WRITER])
        knob(ksm_host, "run", 2)
        knob(ksm_host, "merge_across_nodes", 0)
        os.sched_setaffinity(0, every)
        naive = share(found)
        predicted = sum(tenant.bound or tenant.home == WRITER for tenant in found) / len(found)
        assert abs(naive - predicted) < 0.02
    with tenants(cgroups) as found:
        merge(ksm_host, 1)
        text = command(tmp_path, "set", "merge_across_nodes=0", "--dry-run")
        print(text.stdout)
        assert text.returncode == 0, text.stderr
        assert knob(ksm_host, "merge_across_nodes") == 1
        document = changed(tmp_path, "merge_across_nodes=0")
        ours = share(found)
        print(
            f"at home: {before:.1%} while merged across nodes; {naive:.1%} after the naive sequence "
            f"(predicted {predicted:.1%}); {ours:.1%} after ksmd-ctl set"
        )
        assert knob(ksm_host, "merge_across_nodes") == 0
        assert knob(ksm_host, "run") == 1
        assert document["result"] == "done"
        assert document["home"]["after"]["ratio"] >= 0.99
        assert ours >= 0.99
        scan(ksm_host, 3)
        assert share(found) >= 0.99
        assert knob(ksm_host, "pages_sharing") > 0
        unchanged(found)
        # And back again; that merging across nodes takes pages away afterwards is what was asked for.
        knob(ksm_host, "pages_to_scan", 500)
        knob(ksm_host, "run", 1)
        document = changed(tmp_path, "merge_across_nodes=1", "max_page_sharing=128")
        assert (knob(ksm_host, "merge_across_nodes"), knob(ksm_host, "max_page_sharing")) == (1, 128)
        assert document["home"]["after"]["ratio"] >= 0.99
        assert knob(ksm_host, "run") == 1
        unchanged(found)
        knob(ksm_host, "run", 2)
        knob(ksm_host, "max_page_sharing", 256)


def events(path: Path) -> dict[str, int]:
    return {
        name: int(count) for name, count in (line.split() for line in (path / "memory.events").read_text().splitlines())
    }


def test_a_tenant_that_has_grown_past_its_limit(ksm_host: Path, cgroups: Path, tmp_path: Path) -> None:
    # Findings F10: merged memory is charged to whoever had it first.
    path = group(cgroups, "tenant", memory_max="max")
    with spawn("owner", WRITER) as owner, spawn("tenant", WRITER) as tenant:
        pages = 6000
        fill(owner, pages, None)
        (path / "cgroup.procs").write_text(str(tenant.id.pid))
        start = fill(tenant, pages, None)
        merge(ksm_host, 1)
        used = int((path / "memory.current").read_text())
        (path / "memory.max").write_text(str(used + (12 << 20)))
        counted, held = events(path), knobs(ksm_host)
        done = command(tmp_path, "set", "merge_across_nodes=0")
        print(done.stderr)
        assert done.returncode == 6
        assert "in the memory cgroup /tenant it takes " in done.stderr
        assert events(path) == counted
        assert knobs(ksm_host) == held
        # A few at a time: it has little room for more than its memory.
        for first in range(0, pages, 200):
            part = tenant.load(start + first * PAGE_SIZE, 200)
            assert part == tuple(contents(pages)[first : first + 200])
        # Told to go on only where there is room it waits, and then refuses with the same figures.
        assert command(tmp_path, "set", "merge_across_nodes=0", "--wait", "3").returncode == 6
        # By hand: on 6.1 and 6.12 alike the tenant is killed; whether the write says so differs.
        said = ""
        try:
            knob(ksm_host, "run", 2)
        except OSError as error:
            said = f", and the write fails: {errno.errorcode[error.errno or 0]}"
        print(f"by hand: {events(path)} after {counted}{said}")
        assert events(path)["oom_kill"] > counted["oom_kill"]


def test_a_node_without_room(ksm_host: Path, cgroups: Path, tmp_path: Path) -> None:
    with spawn("tenant", NODES[1]) as tenant:
        fill(tenant, 2000, NODES[1])
        merge(ksm_host, 1)
        held = knobs(ksm_host)
        done = command(tmp_path, "set", "max_page_sharing=64", floor_bytes=1 << 40)
        print(done.stderr)
        assert done.returncode == 6
        assert f"on node {NODES[1]} it takes " in done.stderr
        assert knobs(ksm_host) == held
        document = json.loads(
            command(tmp_path, "set", "max_page_sharing=64", "--dry-run", "--json", floor_bytes=1 << 40).stdout
        )
        assert not document["fits"]


def test_what_is_not_writable_is_left_to_the_end_and_moved_home(ksm_host: Path, cgroups: Path, tmp_path: Path) -> None:
    other = next(node for node in CPUS if node != WRITER)
    with spawn("sealed", other) as sealed:
        start = fill(sealed, PAGES, None)
        sealed.protect(start, PAGES, writable=False)
        merge(ksm_host, 1)
        document = changed(tmp_path, "merge_across_nodes=0")
        assert document["pages"]["unshared"] == 0
        assert document["pages"]["rest"] == PAGES
        # run = 2 spread them over the nodes; what was not at home was moved there.
        assert document["pages"]["moved"] > 0
        tenant = Placed(sealed, start, PAGES, other)
        assert share([tenant]) >= 0.99
