# SPDX-License-Identifier: GPL-2.0-or-later
"""The service and its commands on a machine with several nodes, with memory that is really merged. Inside a guest:

tests/guest/run --kernel 6.12 --nodes 2 --removable 256 -- python -m pytest tests/guest_tests/numa_service.py
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from ksmd_ctl.cli.client import Conversation
from ksmd_ctl.errors import ExitCode, KsmdError
from ksmd_ctl.kernel import libnuma
from ksmd_ctl.kernel.topology import memory_blocks, read_topology
from ksmd_ctl.scenario.regions import RegionProcess, spawn
from tests.service.running import PROGRAM, Service, metrics, run_command, service, until

pytestmark = pytest.mark.ksm

NODES = [node.number for node in read_topology(numa=libnuma.available()).with_memory()]

if len(NODES) < 2:
    pytest.skip(f"needs two nodes with memory, and there is {len(NODES)}", allow_module_level=True)

FIRST, SECOND = NODES[:2]
HERE, THERE = 400, 300
#: Emulated, under load.
LIMIT_SECONDS = 120.0

MERGING = (
    "policy = 'fixed'\n[knobs]\nrun = 1\npages_to_scan = 5000\nsleep_millisecs = 200\nmerge_across_nodes = 0\n"
    "[census]\ninterval = 86400\ncpu_share = 0.5\n"
)


def page(number: int) -> bytes:
    return b"%015d\n" % number * 256


def command(running: Service, *words: str) -> subprocess.CompletedProcess[str]:
    """A command as somebody in another terminal gives it."""
    return run_command(*words, "--socket", str(running.folder / "socket"))


def document(running: Service, *words: str) -> Any:
    found = command(running, *words, "--json")
    assert found.returncode in (ExitCode.DONE, ExitCode.CHECK_FAILED), found.stderr
    return json.loads(found.stdout)


def mergeable(process: RegionProcess, numbers: range, node: int) -> int:
    start = process.map(len(numbers), node)
    process.advise(start, len(numbers), mergeable=True)
    process.store(start, [page(number) for number in numbers])
    return start


class Scene:
    """A service, and two pairs of processes with equal memory, one pair on each of two nodes."""

    def __init__(self, running: Service, here: list[RegionProcess], there: list[RegionProcess], start: int) -> None:
        self.running = running
        self.here = here
        self.there = there
        self.start = start

    def by_node(self, key: str) -> dict[int, int]:
        nodes = document(self.running, "nodes")["nodes"]
        return {node: nodes[str(node)][key] for node in NODES}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    ksm = Path("/sys/kernel/mm/ksm")
    (ksm / "run").write_text("2")
    with ExitStack() as stack:
        here = [stack.enter_context(spawn(f"here-{number}", FIRST)) for number in range(2)]
        there = [stack.enter_context(spawn(f"there-{number}", SECOND)) for number in range(2)]
        starts = [mergeable(process, range(HERE), FIRST) for process in here]
        for process in there:
            mergeable(process, range(10_000, 10_000 + THERE), SECOND)
        running = stack.enter_context(service(tmp_path_factory.mktemp("service"), MERGING))
        until(
            "everything to be merged",
            lambda: (int((ksm / "pages_sharing").read_text()) == HERE + THERE) or None,
            LIMIT_SECONDS,
        )
        yield Scene(running, here, there, starts[0])
        assert running.end() == 0


def test_nodes_processes_status_and_metrics_say_exactly_where_it_is(scene: Scene) -> None:
    running = scene.running
    found = document(running, "nodes")
    nodes = found["nodes"]
    assert found["survey"]["complete"] is True
    assert {node: nodes[str(node)]["ksm_pages"] for node in NODES} == {FIRST: HERE, SECOND: THERE}
    assert {node: nodes[str(node)]["mapped_pages"] for node in NODES} == {FIRST: 2 * HERE, SECOND: 2 * THERE}
    assert {node: nodes[str(node)]["remote_pages"] for node in NODES} == {FIRST: 0, SECOND: 0}
    assert sum(item["ksm_pages"] for item in nodes.values()) == running.status()["readings"]["pages_shared"]
    assert nodes[str(FIRST)]["distances"].keys() == {str(node) for node in NODES}

    processes = {item["pid"]: item for item in document(running, "processes")["processes"]}
    for process in scene.here:
        mine = processes[process.id.pid]
        assert (mine["nodes"], mine["home"], mine["remote_pages"]) == ({str(FIRST): HERE}, FIRST, 0)
        assert mine["merging_pages"] == HERE
        assert mine["classes"] == ["mergeable"]
        assert mine["relatives"] == 0
    order = [item["merging_pages"] for item in document(running, "processes")["processes"]]
    assert order == sorted(order, reverse=True)

    series = metrics(running.port)
    assert series[f'ksm_node_pages{{node="{FIRST}"}}'] == HERE
    assert series[f'ksm_node_pages{{node="{SECOND}"}}'] == THERE
    assert series[f'ksm_node_remote_pages{{node="{SECOND}"}}'] == 0
    merged = sum(value for name, value in series.items() if name.startswith("ksm_group_merging_pages{"))
    assert merged == 2 * (HERE + THERE)
    text = command(running, "status").stdout
    assert f"{HERE} on node {FIRST}" in text
    assert "0.0 % away from home" in text


def test_migrate_moves_merged_pages_of_all_who_map_them_and_back(scene: Scene) -> None:
    running, (one, other) = scene.running, scene.here
    words = ["migrate", "--pid", str(one.id.pid), "--to", str(SECOND)]
    (planned,) = document(running, *words, "--dry-run")["processes"]
    assert planned["would_move"] == {str(FIRST): HERE}
    assert planned["shared"] == HERE
    assert scene.by_node("ksm_pages") == {FIRST: HERE, SECOND: THERE}

    half = f"{scene.start:x}-{scene.start + HERE // 2 * 4096:x}"
    (part,) = document(running, *words, "--range", half)["processes"]
    assert (part["moved"], part["left"], part["error"]) == (HERE // 2, {}, None)
    assert scene.by_node("ksm_pages") == {FIRST: HERE // 2, SECOND: THERE + HERE // 2}

    done = command(running, *words)
    assert done.returncode == ExitCode.DONE, done.stderr
    assert f"{HERE // 2} pages moved to node {SECOND}, {HERE // 2} were there already" in done.stdout
    assert scene.by_node("ksm_pages") == {FIRST: 0, SECOND: THERE + HERE}
    # Both map these pages, and both belong on the first node.
    assert scene.by_node("remote_pages") == {FIRST: 0, SECOND: 2 * HERE}
    processes = {item["pid"]: item for item in document(running, "processes")["processes"]}
    for process in (one, other):
        mine = processes[process.id.pid]
        assert (mine["home"], mine["remote_pages"], mine["remote_ratio"]) == (FIRST, HERE, 1.0)
    until("the metrics", lambda: metrics(running.port)[f'ksm_node_remote_pages{{node="{SECOND}"}}'] == 2 * HERE or None)

    (back,) = document(running, "migrate", "--pid", str(other.id.pid), "--to", str(FIRST))["processes"]
    assert back["moved"] == HERE
    assert scene.by_node("ksm_pages") == {FIRST: HERE, SECOND: THERE}
    assert scene.by_node("remote_pages") == {FIRST: 0, SECOND: 0}
    # Nothing of it un-merged anything.
    assert int(Path("/sys/kernel/mm/ksm/pages_sharing").read_text()) == HERE + THERE
    assert one.load(scene.start, 1) == (page(0),)


def test_without_the_service_a_command_does_it_itself(scene: Scene, tmp_path: Path) -> None:
    words = ["migrate", "--pid", str(scene.here[0].id.pid), "--socket", str(tmp_path / "none")]
    for to in (SECOND, FIRST):
        done = run_command(*words, "--to", str(to), "--json")
        assert done.returncode == ExitCode.DONE, done.stderr
        assert json.loads(done.stdout)["totals"]["moved"] == HERE
    looked = run_command("nodes", "--json", "--socket", str(tmp_path / "none"))
    # On a machine that is slow enough it is an estimate, and says within what.
    found = json.loads(looked.stdout)["nodes"][str(FIRST)]
    assert found["ksm_pages_low"] <= HERE <= found["ksm_pages_high"]


def test_what_can_not_be_done_is_said(scene: Scene) -> None:
    running, pid = scene.running, str(scene.here[0].id.pid)
    gone = command(running, "migrate", "--pid", "4194303", "--to", str(FIRST))
    assert (gone.returncode, "there is no process" in gone.stderr) == (ExitCode.USAGE, True)
    nowhere = command(running, "migrate", "--pid", pid, "--to", "77")
    assert (nowhere.returncode, "there is no such node" in nowhere.stderr) == (ExitCode.USAGE, True)
    unmapped = command(running, "migrate", "--pid", pid, "--to", str(SECOND), "--range", "1000-2000")
    assert (unmapped.returncode, "nothing is mapped" in unmapped.stderr) == (ExitCode.REFUSED, True)
    assert scene.by_node("ksm_pages") == {FIRST: HERE, SECOND: THERE}


@pytest.mark.parametrize("capability", ["sys_admin", "sys_nice"])
def test_which_privilege_is_missing_is_said(scene: Scene, tmp_path: Path, capability: str) -> None:
    """Root without one: frames can't be seen, or pages that several map can't be moved."""
    words = [
        PROGRAM,
        "migrate",
        "--pid",
        str(scene.here[0].id.pid),
        "--to",
        str(SECOND),
        "--socket",
        str(tmp_path / "s"),
    ]
    found = subprocess.run(
        ["setpriv", "--bounding-set", f"-{capability}", *words], capture_output=True, text=True, check=False
    )
    assert found.returncode == ExitCode.DENIED, found.stderr
    assert f"CAP_{capability.upper()}" in found.stdout + found.stderr
    assert scene.by_node("ksm_pages") == {FIRST: HERE, SECOND: THERE}


def test_a_memory_block_goes_offline_and_comes_back_while_the_service_runs(scene: Scene) -> None:
    """Only events can tell the service: its interval is a day."""
    running = scene.running
    movable = [
        block
        for block in memory_blocks()
        if block.nodes == {SECOND}
        and Path(f"/sys/devices/system/memory/memory{block.number}/valid_zones").read_text().startswith("Movable")
    ]
    assert movable, "the guest needs --removable"
    size = (movable[-1].last - movable[-1].first) * 4096
    state = Path(f"/sys/devices/system/memory/memory{movable[-1].number}/state")
    document(running, "nodes")
    before = scene.by_node("total_bytes")
    for word, total in (("offline", before[SECOND] - size), ("online_movable", before[SECOND])):
        looked = metrics(running.port)["ksmd_ctl_censuses_total"]
        state.write_text(word)
        until("the service to look again", lambda looked=looked: looked_again(running, looked), LIMIT_SECONDS)  # type: ignore[misc]
        assert scene.by_node("total_bytes") == {FIRST: before[FIRST], SECOND: total}
        assert scene.by_node("ksm_pages") == {FIRST: HERE, SECOND: THERE}
    assert running.process.poll() is None


def looked_again(running: Service, before: float) -> bool | None:
    return metrics(running.port)["ksmd_ctl_censuses_total"] > before or None


def big(process: RegionProcess) -> int:
    pages = 16_000
    mergeable(process, range(100_000, 100_000 + pages), FIRST)
    return pages


def test_a_process_that_exits_half_way_is_said_to_and_the_service_goes_on(scene: Scene) -> None:
    with spawn("ends", FIRST) as process:
        big(process)
        parameters = {"to": SECOND, "pid": process.id.pid}
        with Conversation(str(scene.running.folder / "socket"), "Migrate", parameters) as talk:
            first = talk.answer()
            assert first is not None
            assert first["progress"] is not None
            os.kill(process.id.pid, signal.SIGKILL)
            with pytest.raises(KsmdError, match=r"exited|is gone"):
                last_of(talk)
    assert scene.running.status()["daemon"] is not None


def last_of(talk: Conversation) -> dict[str, object] | None:
    found = answer = talk.answer()
    while answer is not None:
        found, answer = answer, talk.answer()
    return found


def test_who_has_nothing_more_to_say_stops_it_and_is_told_what_moved(scene: Scene) -> None:
    with spawn("stopped", FIRST) as process:
        pages = big(process)
        parameters = {"to": SECOND, "pid": process.id.pid}
        with Conversation(str(scene.running.folder / "socket"), "Migrate", parameters) as talk:
            answer = talk.answer()
            assert answer is not None
            talk.stop()
            while answer is not None and not answer["result"]:
                answer = talk.answer()
        assert answer is not None
        result: Any = answer["result"]
        assert result["cancelled"] is True
        assert "pages have been moved, and stay there" in result["processes"][0]["error"]["why"]
        # The rest is where it was, and can be moved now: the service is free again.
        (rest,) = document(scene.running, "migrate", "--pid", str(process.id.pid), "--to", str(SECOND))["processes"]
        assert 0 < rest["moved"] < pages
        assert rest["moved"] + rest["already"] <= pages


def test_interrupting_the_command_stops_what_the_service_does(scene: Scene) -> None:
    with spawn("interrupted", FIRST) as process:
        big(process)
        words = [PROGRAM, "migrate", "--pid", str(process.id.pid), "--to", str(SECOND), "--json"]
        with subprocess.Popen(
            [*words, "--socket", str(scene.running.folder / "socket")], stdout=subprocess.PIPE, text=True
        ) as running:
            limit = time.monotonic() + LIMIT_SECONDS
            while not moved(process):
                # Without a pause: it is over in a second or two.
                assert time.monotonic() < limit, "the migration has not begun"
            running.send_signal(signal.SIGINT)
            output, _ = running.communicate(timeout=LIMIT_SECONDS)
        assert running.returncode == ExitCode.INTERRUPTED
        assert json.loads(output)["cancelled"] is True


def moved(process: RegionProcess) -> bool:
    """Whether some of a process's memory is on the second node."""
    maps = Path(f"/proc/{process.id.pid}/numa_maps").read_text()
    return any(f" N{SECOND}=" in line and "anon=" in line for line in maps.splitlines() if f"bind:{FIRST}" in line)
