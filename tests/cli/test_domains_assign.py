# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl domains assign`` on a fake host with a fake systemd; the real ones are in tests/guest_tests."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from ksmd_ctl.cli import change, domains_assign, host, systemctl
from ksmd_ctl.config import loader
from ksmd_ctl.config.loader import load
from ksmd_ctl.errors import Absent, ExitCode, KsmdError, Refused, Rejected, UsageError
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.memory import HomeRange, Inventory, Placements, Process, ProcessId, ProcessMemory, UnmergeDemand
from ksmd_ctl.host.operation import Move, MoveResult, Unshare, UnsharedPart, UnshareResult
from ksmd_ctl.statefiles import HostLock
from tests.cli.test_schemas import problems
from tests.fakes.host import FakeHost, FakeOperation, process
from tests.transactions.test_assignment import Units

CONFIG = """
[domains]
[domains.gold]
nodes = "1"
units = ["gold-*"]
[domains.silver]
nodes = "0"
slices = ["silver.slice"]
[domains.bronze]
units = ["bronze.service"]
[domains.tin]
nodes = "7"
units = ["tin.service"]
[domains.none]
nodes = "3"
units = ["none.service"]
"""


def member(pid: int, cgroup: str, nodes: dict[int, int]) -> Process:
    """A process whose pages on these nodes are all merged."""
    unit = next((part for part in cgroup.split("/") if part.endswith((".service", ".scope"))), "")
    return process(pid, unit=unit, cgroup=cgroup, nodes=nodes, resident_nodes=nodes, merging_pages=sum(nodes.values()))


class Host(FakeHost):
    """A host that has what the command takes, and notes in which order.

    :ivar done: every change, as a word and what it is about
    """

    def __init__(self, units: Units) -> None:
        super().__init__({Knob.MERGE_ACROSS_NODES: 0})
        self.units = units
        self.done: list[tuple[str, object]] = []
        self.room_bytes = 1 << 30
        self.left: dict[str, int] = {}
        self.cpusets = True
        self.running = [
            member(11, "/system.slice/gold-a.service", {0: 100, 1: 5}),
            member(12, "/system.slice/gold-b.service", {1: 50}),
            member(21, "/silver.slice/silver-x.slice/x.service", {0: 70, 1: 30}),
        ]

    def placements(self, processes: Iterable[ProcessId]) -> FakeOperation[Placements]:
        return FakeOperation(Placements({}, self.cpusets))

    def inventory(self, floor_bytes: int) -> FakeOperation[Inventory]:
        memories = tuple(
            ProcessMemory(
                *(one.id, one.name, one.unit, one.classes, one.merged_pages),
                (HomeRange(0, 1 << 20, 0, one.resident_nodes, one.merged_pages),),
            )
            for one in self.running
        )
        rooms = tuple(UnmergeDemand(f"node {node.number}", 0, self.room_bytes) for node in self.nodes)
        return FakeOperation(Inventory(self.topology(), memories, (UnmergeDemand("host", 0, 1 << 30), *rooms)))

    def unshare(self, request: Unshare, deadline_seconds: float) -> FakeOperation[UnshareResult]:
        self.done += [("un-merged", (part.process.pid, part.to, part.keep)) for part in request.parts]
        return FakeOperation(UnshareResult(tuple(UnsharedPart(part.pages, {}) for part in request.parts)))

    def move(self, request: Move, deadline_seconds: float) -> FakeOperation[MoveResult]:
        self.done.append(("moved", (request.process.pid, request.to, request.keep)))
        return FakeOperation(MoveResult(3, 4, self.left))


class Command:
    """The command with a configuration of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.units = Units(gold_a_service="", gold_b_service="0-1", silver_slice="")
        self.units.units = {"gold-a.service": "", "gold-b.service": "0-1", "silver.slice": ""}
        self.host = Host(self.units)
        setting = self.units.set_allowed_nodes

        def noted(unit: str, nodes: str) -> None:
            setting(unit, nodes)
            self.host.done.append(("limited", (unit, nodes)))

        monkeypatch.setattr(self.units, "set_allowed_nodes", noted)
        for module in (host, change):
            monkeypatch.setattr(module, "open_host", lambda *_, **__: nullcontext(self.host))
        monkeypatch.setattr(systemctl, "Systemctl", lambda _: self.units)
        monkeypatch.setenv("KSMD_CTL_SOCKET", str(folder / "s"))
        self.config = folder / "c.toml"
        self.write(CONFIG)
        monkeypatch.setattr(loader, "load", lambda path=None: load(str(self.config)))

    def write(self, text: str) -> None:
        folders = "".join(f'{one}_directory = "{self.folder}/{one}"\n' for one in ("runtime", "state"))
        self.config.write_text(f"{text}\n[service]\n{folders}")

    def __call__(self, *words: str) -> tuple[int, Any]:
        import argparse

        parser = argparse.ArgumentParser()
        domains_assign.add_parser(parser.add_subparsers())
        out = io.StringIO()
        args = parser.parse_args(["assign", *words])
        code = domains_assign.run(args, out)
        return code, json.loads(out.getvalue()) if args.json else out.getvalue()


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    return Command(tmp_path, monkeypatch)


def test_units_are_limited_and_memory_comes_home(command: Command) -> None:
    code, document = command("gold", "silver", "--json")
    assert code == ExitCode.DONE
    # What is merged elsewhere is un-merged before the kernel moves it with all who map it.
    assert command.host.done == [
        ("un-merged", (11, 1, (1,))),
        ("un-merged", (21, 0, (0,))),
        ("limited", ("gold-a.service", "1")),
        ("limited", ("gold-b.service", "1")),
        ("limited", ("silver.slice", "0")),
        ("moved", (11, 1, (1,))),
        ("moved", (12, 1, (1,))),
        ("moved", (21, 0, (0,))),
    ]
    assert [(one["unit"], one["nodes"], one["elsewhere"]) for one in document["units"]] == [
        ("gold-a.service", [1], 100),
        ("gold-b.service", [1], 0),
        ("silver.slice", [0], 30),
    ]
    assert document["units"][0]["unmerge"][0]["processes"][0]["unshared"] == 100
    assert problems("domains-assign", document) == []
    assert document["units"][0]["migrate"][0]["totals"]["moved"] == 3
    code, document = command("--undo", "--json")
    assert (code, document["undone"]) == (ExitCode.DONE, ["gold-a.service", "gold-b.service", "silver.slice"])
    assert problems("domains-assign", document) == []
    assert command.units.units == {"gold-a.service": "", "gold-b.service": "0-1", "silver.slice": ""}


def test_a_dry_run_changes_nothing(command: Command) -> None:
    code, text = command("gold", "--dry-run")
    assert code == ExitCode.DONE
    assert "limit gold-a.service (gold) to node 1, and move 100 pages" in text
    assert command.host.done == []
    assert not (command.folder / "state").exists()


def test_what_is_said_to_people(command: Command) -> None:
    command.host.put(Knob.MERGE_ACROSS_NODES, 1)
    command.host.left = {"busy: pinned": 7}
    code, text = command("gold")
    assert code == ExitCode.CHECK_FAILED
    assert "gold-a.service (gold) to node 1; 100 pages were elsewhere" in text
    assert "7 stay where they are: busy: pinned" in text
    assert "merge_across_nodes is 1" in text
    assert "gold-a.service, gold-b.service" in command("--undo")[1]
    assert "nothing was assigned" in command("--undo")[1]


def test_a_member_outside_of_any_unit_is_named(command: Command) -> None:
    command.write(CONFIG.replace('units = ["gold-*"]', 'units = ["gold-*"]\ncgroups = ["/loose"]'))
    command.host.running.append(member(13, "/loose", {1: 1}))
    code, text = command("gold")
    assert code == ExitCode.CHECK_FAILED
    assert "p13 (pid 13) is in no unit of systemd" in text


def test_what_failed_half_way_is_put_back_by_the_next(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    class Killed(BaseException):
        pass

    command.units.fails["gold-b.service"] = Killed()
    with pytest.raises(Killed):
        command("gold")
    # Nobody could put the second one back either.
    assert command.units.units["gold-a.service"] == ""
    command.units.fails.clear()
    assert command("silver")[0] == ExitCode.DONE
    assert "an assignment was interrupted: gold-b.service is as before it" in capsys.readouterr().err
    assert command.units.units == {"gold-a.service": "", "gold-b.service": "0-1", "silver.slice": "0"}


def test_a_process_that_can_not_be_moved_does_not_stop_the_others(command: Command) -> None:
    moving = command.host.move

    def move(request: Move, deadline_seconds: float) -> FakeOperation[MoveResult]:
        if request.process.pid == 11:
            return FakeOperation(Rejected("moving", "its cpuset does not allow it"))
        return moving(request, deadline_seconds)

    command.host.move = move  # type: ignore[method-assign]
    code, document = command("gold", "--json")
    assert code == ExitCode.CHECK_FAILED
    assert "its cpuset does not allow it" in document["units"][0]["errors"][0]
    assert document["units"][1]["migrate"][0]["totals"]["moved"] == 3


def no_room(command: Command) -> None:
    command.host.room_bytes = 4096


def one_node(command: Command) -> None:
    command.host.nodes = command.host.nodes[:1]


def ended(command: Command) -> None:
    command.units.units["gold-b.service"] = None


def without_cpusets(command: Command) -> None:
    command.host.cpusets = False


def mixed(command: Command) -> None:
    command.host.running.append(member(31, "/silver.slice/other.scope", {0: 1}))
    command.write(CONFIG.replace('units = ["gold-*"]', 'units = ["gold-*", "other.scope"]'))


def without_domains(command: Command) -> None:
    command.write("")


def nothing(command: Command) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "words", "kind", "why"),
    [
        (nothing, "", UsageError, "it takes domains, or --undo"),
        (nothing, "gold --dry-run --undo", UsageError, "--undo, which has no dry run"),
        (nothing, "gould", UsageError, r"there is no domain 'gould'.*gold"),
        (without_domains, "gold", UsageError, "the configuration has none"),
        (nothing, "bronze", Refused, "bronze has no nodes in the configuration"),
        (nothing, "tin", UsageError, "there is no such node"),
        (one_node, "silver", Refused, "this host has one node"),
        (mixed, "silver", Refused, "silver.slice has processes of silver and of gold"),
        (no_room, "gold", Refused, "400.0 KiB of gold would come to node 1, and 4.0 KiB are free"),
        (no_room, "gold --dry-run", Refused, "400.0 KiB of gold would come to node 1"),
        (ended, "gold", Absent, "it has ended"),
        (without_cpusets, "gold", Absent, "no cpuset controller"),
    ],
)
def test_what_can_not_be_done(command: Command, change: Any, words: str, kind: type[KsmdError], why: str) -> None:
    change(command)
    with pytest.raises(kind, match=why) as caught:
        command(*words.split())
    assert caught.value.hint or kind is Absent
    assert not [done for done in command.host.done if done[0] == "limited"]


def test_a_domain_without_members(command: Command) -> None:
    command.host.running = command.host.running[2:]
    with pytest.raises(Refused, match="gold has no member with mergeable memory"):
        command("gold")


def test_two_at_a_time_are_refused(command: Command) -> None:
    with (
        HostLock(command.folder / "runtime" / domains_assign.LOCK, "another one"),
        pytest.raises(Refused, match="another one"),
    ):
        command("gold")
    assert command.host.done == []
