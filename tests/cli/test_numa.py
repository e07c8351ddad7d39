# SPDX-License-Identifier: GPL-2.0-or-later
"""nodes, processes and migrate: their documents, what people read, and the way to the service or past it."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import re
import signal
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from ksmd_ctl.cli import change, client, host, migrate, nodes, processes
from ksmd_ctl.cli.main import main
from ksmd_ctl.cli.source import survey_text
from ksmd_ctl.cli.terminal import Column, ProgressLine, list_text, table
from ksmd_ctl.config import loader
from ksmd_ctl.errors import Denied, ExitCode
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.memory import Census, KsmDetection, Process, ProcessClass, ProcessId, Skipped, Unmergeable
from ksmd_ctl.host.operation import MoveResult
from ksmd_ctl.reports.numa import nodes_document, processes_document
from ksmd_ctl.statefiles import HostLock
from ksmd_ctl.switch.keep import records_document
from tests.cli.fakes import conversation, listening, reply
from tests.fakes.host import FakeHost, process
from tests.render.reports import CONTRACTS
from tests.switch.test_keep import record


def contract(name: str) -> Any:
    return json.loads((CONTRACTS / f"{name}.json").read_text())


def shape(value: object, name: str = "") -> object:
    """The keys of a document, for a comparison of forms; what data names, and null, is of any form."""
    if isinstance(value, Mapping):
        if name in ("nodes", "distances", "left", "would_move"):
            return {"*": shape(next(iter(value.values()), None))}
        return {key: shape(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return None


STUCK = Skipped(9, "stuck", "the process keeps its readers waiting")
DATABASE = Unmergeable(
    ProcessId(31, 3100),
    "postgres",
    "postgresql@15-main.service",
    frozenset({ProcessClass.SHARED, ProcessClass.NOT_ELIGIBLE}),
    "8.0 GiB of shared memory (memfd, share=on, tmpfs), which KSM does not merge; nothing else of it is mergeable",
)


def machine() -> FakeHost:
    found = FakeHost()
    forks: dict[str, Any] = {"relatives": 1, "group": "pre-fork.service", "unit": "pre-fork.service"}
    found.running = [
        process(7, "idle", 0, rmap_items=500),
        process(11, "web-1", 150_000, nodes={0: 100_000, 1: 50_000}, remote_pages=50_000, remote_nodes={1: 50_000}),
        process(21, pages=4000, **forks),
        process(22, pages=4000, **forks),
    ]
    return found


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command on a fake host, with the service's socket and lock in a folder of its own."""
    there = machine()
    for module in (host, change):
        monkeypatch.setattr(module, "open_host", lambda *_, **__: nullcontext(there))
    config = tmp_path / "c.toml"
    config.write_text(f'[limits]\nfloor_bytes = 16789561\n[service]\nruntime_directory = "{tmp_path}/run"\n')
    load = loader.load
    monkeypatch.setattr(loader, "load", lambda path=None: load(str(config)))

    class Command:
        host = there

        def __call__(self, *words: str) -> tuple[int, str, str]:
            code = main([*words, "--socket", str(tmp_path / "s")])
            said = capsys.readouterr()
            return code, said.out, said.err

    return Command()


# -- nodes and processes -----------------------------------------------------------------------------------


def test_the_documents_have_the_form_of_the_examples() -> None:
    there = machine()
    there.skipped = [STUCK]
    there.unseen = [1]
    there.unmergeable = [DATABASE]
    survey = there.seen()
    found = nodes_document(there.identity, there.sample(), survey, 1 << 27)
    assert shape(found) == shape(contract("nodes"))
    ended = [record(1, ended=True)]
    switched = records_document(ended, there.now, [process(7, unit="web.service", name="p1")])
    document = processes_document(there.identity, survey, there.sample(), survey, switched=switched)
    assert shape(document) == shape(contract("processes"))


def test_nodes_for_people(command: Any) -> None:
    code, out, _ = command("nodes")
    assert code == ExitCode.DONE
    lines = out.splitlines()
    assert lines[0].startswith("service    no service runs")
    at = lines.index("node  cpus   memory       free  KSM pages  mappings   remote mappings  distances")
    assert lines[at : at + 3] == [
        "node  cpus   memory       free  KSM pages  mappings   remote mappings  distances",
        "0     0     1.0 GiB  512.0 MiB     10,800   108,000                 0  0: 10 1: 20",
        "1     1     1.0 GiB          ?      5,000    50,000  50,000 (100.0 %)  0: 20 1: 10",
    ]
    joined = " ".join(out.split())
    assert "on node 0 it takes up to 3.0 MiB more, and 0 bytes are free above the floor of 16.0 MiB" in joined
    assert "in the memory cgroup /a.slice it takes up to 9 bytes more, and 1 byte are free above its reserve" in joined
    assert "all frames counted (kpageflags), 20 ms of CPU" in lines[-1]


def test_a_sample_shows_its_interval(command: Any) -> None:
    there = command.host
    survey = there.seen()
    census = Census(1.0, {0: 1000, 1: 5}, {0: 900, 1: 5}, {0: 1100, 1: 5}, False, KsmDetection.KPAGEFLAGS, 0.3)
    sampled = dataclasses.replace(survey, census=census, demands=(), cpu_seconds=0.3)
    found = nodes_document(there.identity, there.sample(), sampled, 1 << 27)
    text = "\n".join(nodes.lines(found))
    assert "1,000 (900 to 1,100)" in text
    assert "95 %" in text
    assert "un-merged now" not in text
    # Figures by process have no interval.
    said = survey_text({"survey": found["survey"]})
    assert ("estimated from a sample" in said, "brackets" in said) == (True, False)


def test_what_can_not_be_counted_is_not_0(command: Any) -> None:
    there = command.host
    there.running = [process(1, pages=10, remote_pages=None, nodes={})]
    survey = dataclasses.replace(there.seen(), census=None, lacking="this kernel has no kpageflags", demands=())
    found = nodes_document(there.identity, there.sample(), survey, 1 << 27)
    assert found["nodes"]["0"]["ksm_pages"] is None  # type: ignore[index]
    assert found["nodes"]["0"]["mapped_pages"] is None  # type: ignore[index]
    text = "\n".join(nodes.lines(found))
    assert "KSM pages could not be counted: this kernel has no kpageflags" in text


def test_no_permission(command: Any) -> None:
    command.host.survey_outcome = Denied("counting", "reading /proc/kpageflags takes CAP_SYS_ADMIN", hint="run as root")
    code, out, err = command("nodes", "--json")
    assert (code, out) == (ExitCode.DENIED, "")
    assert err == "ksmd-ctl: counting: reading /proc/kpageflags takes CAP_SYS_ADMIN\nhint: run as root\n"


def test_processes_for_people(command: Any) -> None:
    code, out, _ = command("processes")
    assert code == ExitCode.DONE
    assert re.findall(r"^ *(\d+)  ", out, re.MULTILINE) == ["11", "21", "22", "7"]
    assert "50,000 (33.3 %)" in out
    assert re.search(r"0:100,000,(.*\n.*)? 1:50,000", out)
    assert "15.4 MiB*" in out
    assert max(map(len, out.splitlines()[2:])) <= 100
    assert re.search(r"^total: 4 processes, [\d,]+ merged pages, [\d.]+ MiB saved", out, re.MULTILINE)
    assert "2 processes may be forks of one another" in out
    assert "8,000 merged pages" in out
    assert "the real saving may be below 4,000 pages" in out


@pytest.mark.parametrize(
    ("words", "pids"),
    [
        (["--sort", "name"], {"7", "11", "21", "22"}),
        (["--sort", "merged", "--top", "2"], {"11", "21"}),
        (["--pid", "22"], {"22"}),
        (["--unit", "pre-fork"], {"21", "22"}),
    ],
)
def test_some_processes(command: Any, words: list[str], pids: set[str]) -> None:
    code, out, _ = command("processes", *words)
    assert code == ExitCode.DONE
    shown = [match[1] for match in re.finditer(r"^ *(\d+)  ", out, re.MULTILINE)]
    assert set(shown) == pids
    assert "total: " in out
    document = json.loads(command("processes", *words, "--json")[1])
    assert [str(process["pid"]) for process in document["processes"]] == shown


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (["--pid", "99"], ExitCode.USAGE, "there is no process 99"),
        (["--pid", "98"], ExitCode.REFUSED, "process 98 has no mergeable memory"),
        (["--pid", "31"], ExitCode.REFUSED, "process 31 has no mergeable memory: it has 8.0 GiB of shared memory"),
        (["--pid", "9"], ExitCode.DENIED, "process 9 could not be read: the process keeps its readers waiting"),
        (["--unit", "postgresql@15-main"], ExitCode.REFUSED, "process 31 has 8.0 GiB of shared memory"),
        (["--unit", "none"], ExitCode.REFUSED, "no process of unit none.service has mergeable memory"),
        (["--top", "0"], ExitCode.USAGE, "is not a whole number from 1 to"),
        (["--sort", "age"], ExitCode.USAGE, "invalid choice"),
    ],
)
def test_processes_that_are_not_there(command: Any, words: list[str], code: ExitCode, why: str) -> None:
    command.host.skipped, command.host.unmergeable, command.host.alive = [STUCK], [DATABASE], {9, 98}
    for more in ([], ["--json"]):
        found, out, err = command("processes", *words, *more)
        assert (found, out) == (code, "")
        assert why in err


def test_processes_that_may_not_be_looked_at_are_counted(command: Any) -> None:
    command.host.unseen = [1]
    assert "not shown: 1 process that this user may not look at (pid 1)" in command("processes")[1]
    command.host.unseen = list(range(100, 400))
    assert "not shown: 300 processes that this user may not look at\n" in command("processes")[1]


def test_some_are_sorted_by_name(command: Any) -> None:
    document = json.loads(command("processes", "--sort", "name", "--json")[1])
    assert [one["name"] for one in document["processes"]] == ["p11", "p21", "p22", "p7"]


def test_the_first_of_a_document_are_those_of_the_table(command: Any) -> None:
    # The one with most merged pages is the one whose saving is least.
    command.host.running = [
        process(1, pages=5000, profit_bytes=-(2**20)),
        process(2, pages=4000, rmap_items=None),
        process(3, pages=10, profit_bytes=2**30),
        process(4, pages=20, profit_bytes=2**20),
    ]
    for words, first in ((["--top", "3"], [3, 4, 1]), (["--top", "1", "--sort", "merged"], [1])):
        document = json.loads(command("processes", *words, "--json")[1])
        assert [one["pid"] for one in document["processes"]] == first
        shown = re.findall(r"^ *(\d+)  ", command("processes", *words)[1], re.MULTILINE)
        assert shown == list(map(str, first))


def test_a_total_does_not_take_the_unknown_for_nothing(command: Any) -> None:
    command.host.running = [process(1, pages=256, rmap_items=0), process(2, pages=10, rmap_items=None)]
    out = command("processes")[1]
    said = "total: 2 processes, 266 merged pages, 1.0 MiB saved (each un-merged alone), "
    assert f"{said}not counting 1 process whose saving is unknown" in " ".join(out.split())
    command.host.running = [process(2, pages=10, rmap_items=None)]
    assert "total: 1 process, 10 merged pages, the saving is unknown" in command("processes")[1]


def test_on_one_node_shares_and_what_splits_freed_take_the_place_of_nodes(command: Any) -> None:
    each = {"rmap_items": 0, "sharing_bytes": 1 << 20, "unit": "a.service"}
    command.host.running = [
        process(1, "a", 512, split_zero_pages=256, **each),
        process(2, "b", 512, split_zero_pages=0, **each),
    ]
    command.host.counters.update(pages_shared=512, pages_sharing=512, general_profit=2 << 20, ksm_zero_pages=0)
    out = command("processes", "--sort", "share")[1]
    rows = [" ".join(line.split()) for line in out.splitlines()[2:]]
    assert rows[0] == "pid name group merged pages saved share freed zeroes class"
    assert rows[1:3] == [
        "1 p1 a 512 2.0 MiB 2.0 MiB 256 mergeable",
        "2 p2 b 512 2.0 MiB 1.0 MiB 0 mergeable",
    ]
    joined = " ".join(out.split())
    assert "4.0 MiB saved (each un-merged alone)" in joined
    assert (
        "the host saves 3.0 MiB in frames, 256 pages of zeroes that splits of huge pages freed among them: "
        "3.0 MiB are the shares of its processes" in joined
    )
    assert "left over" not in joined
    # What cannot be read has its part, too.
    command.host.running = command.host.running[1:]
    joined = " ".join(command("processes")[1].split())
    assert "the host saves 2.0 MiB in frames: 1.0 MiB are the shares of its processes, 1.0 MiB are left over" in joined
    assert "freed zeroes" not in joined


def test_what_is_not_merged_any_more_is_not_shown_as_merged(command: Any) -> None:
    command.host.knobs[Knob.RUN] = 0
    command.host.running = [
        process(1, pages=600, rmap_items=0, ksm_mapped_pages=0),
        process(2, pages=600, rmap_items=0, ksm_mapped_pages=600),
    ]
    command.host.counters.update(pages_shared=600, pages_sharing=600)
    out = command("processes", "--sort", "name")[1]
    assert [line.split()[2:5] for line in out.splitlines()[3:5]] == [["0", "0", "bytes"], ["600", "2.3", "MiB"]]
    joined = " ".join(out.split())
    assert "total: 2 processes, 600 merged pages, 2.3 MiB saved" in joined
    assert "600 pages or more of these are not merged any more" in joined
    assert "pid 1 (p1): the kernel still counts 600 pages as merged that are not any more" in joined
    assert "in frames" not in joined
    # If page tables show as many as are counted, the counters are right.
    command.host.running = [process(pid, pages=600, rmap_items=0, ksm_mapped_pages=600) for pid in (1, 2)]
    assert "stale" not in command("processes")[1]


def test_counts_of_processes_stand_still_while_ksmd_is_stopped(command: Any) -> None:
    command.host.counters.update(pages_shared=1000, pages_sharing=157_000)
    for run, doubtful in ((0, True), (1, False)):
        command.host.knobs[Knob.RUN] = run
        assert ("may still be counted" in " ".join(command("processes")[1].split())) is doubtful
        assert bool(json.loads(command("processes", "--json")[1])["stale_text"]) is doubtful
    command.host.counters.update(pages_shared=0, pages_sharing=0)
    command.host.knobs[Knob.RUN], command.host.running = 0, [process(7, "idle", 0)]
    assert "still be counted" not in command("processes")[1]


def test_who_can_never_merge_is_listed_when_asked_for(command: Any) -> None:
    command.host.unmergeable = [DATABASE]
    assert "postgres" not in command("processes")[1]
    code, out, _ = command("processes", "--all", "--sort", "name")
    assert code == ExitCode.DONE
    assert re.findall(r"^ *(\d+)  ", out, re.MULTILINE) == ["11", "21", "22", "7", "31"]
    assert "pid 31 (postgres): 8.0 GiB of shared memory" in out
    assert max(map(len, out.splitlines()[2:])) <= 100
    assert "total: 4 processes" in out
    for words in (["--pid", "31"], ["--unit", "postgresql@15-main"]):
        code, out, _ = command("processes", "--all", *words)
        assert (code, re.findall(r"^ *(\d+)  ", out, re.MULTILINE)) == (ExitCode.DONE, ["31"])


@pytest.mark.parametrize("nodes_seen", [1, 8])
def test_no_line_of_processes_is_wider_than_100_columns(command: Any, nodes_seen: int) -> None:
    command.host.running = [
        process(
            4_000_000,
            "user-1000/" + "a-very-long-name-without-a-blank" * 3,
            10**8,
            nodes=dict.fromkeys(range(nodes_seen), 10**7),
            remote_pages=10**7,
            reason="words " * 40,
            classes=frozenset({ProcessClass.PINNED, ProcessClass.NOT_ELIGIBLE}),
            name="n" * 100,
        )
    ]
    # Without the line on the service: this test's socket has a long name.
    lines = command("processes")[1].splitlines()[2:]
    assert max(map(len, lines)) <= 100
    assert sum(line.count("words") for line in lines) == 40


def test_nobody_has_mergeable_memory(command: Any) -> None:
    command.host.running = []
    code, out, _ = command("processes")
    assert (code, out.splitlines()[-1]) == (ExitCode.DONE, "no process has mergeable memory")
    assert json.loads(command("processes", "--json")[1])["processes"] == []


@pytest.mark.parametrize(("name", "method"), [("nodes", "Nodes"), ("processes", "Processes")])
def test_the_service_is_asked_where_one_runs(command: Any, tmp_path: Path, name: str, method: str) -> None:
    with listening(tmp_path / "s", lambda request: reply(**{name: contract(name)})) as requests:
        code, out, _ = command(name, "--json")
    assert (code, json.loads(out)) == (ExitCode.DONE, contract(name))
    assert [request["method"] for request in requests] == [f"{client.INTERFACE}.{method}"]
    assert command.host.surveys == []


@pytest.mark.parametrize("name", ["nodes", "processes"])
def test_a_service_that_says_something_else(command: Any, tmp_path: Path, name: str) -> None:
    with listening(tmp_path / "s", lambda request: reply(**{name: 1})):
        code, _, err = command(name)
    assert (code, f"its answer has no {name}" in err) == (ExitCode.UNREACHABLE, True)


@pytest.mark.parametrize("name", ["nodes", "processes"])
def test_any_part_of_a_document_may_be_of_another_form(name: str) -> None:
    lines = {"nodes": nodes.lines, "processes": processes.lines}[name]
    for key in contract(name):
        for wrong in (None, 1, "x", [], [1], {}, {"a": 1}):
            document = contract(name) | {key: wrong}
            assert all(isinstance(line, str) for line in lines(document))


# -- migrate -----------------------------------------------------------------------------------------------


def test_migrating_without_a_service(command: Any, tmp_path: Path) -> None:
    command.host.move_outcomes = [MoveResult(30, 7, {"busy: pinned": 2})]
    code, out, err = command("migrate", "--pid", "11", "--to", "1", "--range", "7f00-8000", "--range", "0x9000-0xa000")
    assert (code, err) == (ExitCode.CHECK_FAILED, "")
    assert out == (
        "process 11: 30 pages moved to node 1, 7 were there already\n  2 stay where they are: busy: pinned\n"
    )
    (request, _) = command.host.moves[0]
    assert request.ranges == ((0x7F00, 0x8000), (0x9000, 0xA000))
    assert (request.floor_bytes, request.latency_seconds) == (16789561, 0.01)
    assert (tmp_path / "run/lock").exists()


@pytest.mark.parametrize(("text", "seconds"), [("none", 0), ("0.05", 0.05)])
def test_how_long_a_call_may_take(command: Any, text: str, seconds: float | None) -> None:
    command.host.move_outcomes = [MoveResult(30, 0, {})]
    assert command("migrate", "--pid", "11", "--to", "1", "--latency", text)[0] == ExitCode.DONE
    ((request, _),) = command.host.moves
    assert request.latency_seconds == seconds


@pytest.mark.parametrize("text", ["0", "-1", "2", "None", "nan", "10ms", ""])
def test_a_latency_that_nobody_can_mean(command: Any, text: str) -> None:
    code, _, err = command("migrate", "--pid", "11", "--to", "1", "--latency", text)
    assert code == ExitCode.USAGE
    assert "is not a number of seconds" in err
    assert not command.host.moves


def test_a_unit(command: Any) -> None:
    command.host.move_outcomes = [MoveResult(30, 0, {}), MoveResult(10, 5, {})]
    code, out, _ = command("migrate", "--unit", "pre-fork", "--to", "1")
    assert code == ExitCode.DONE
    assert out.splitlines() == [
        "process 21 (p21): 30 pages moved to node 1, 0 were there already",
        "process 22 (p22): 10 pages moved to node 1, 5 were there already",
        "in all: 40 pages moved, 5 pages on node 1 already, 0 pages left",
    ]


def test_a_dry_run_needs_no_lock(command: Any, tmp_path: Path) -> None:
    with HostLock(tmp_path / "run/lock", "somebody"):
        code, out, _ = command("migrate", "--pid", "11", "--to", "1", "--dry-run")
        assert code == ExitCode.DONE
        assert out == (
            "process 11: 30 pages would be moved to node 1 (30 from node 0), 20 of them shared with other mappings, "
            "7 were there already, 1.0 MiB free on node 1 above the floor\n"
        )
        code, _, err = command("migrate", "--pid", "11", "--to", "1")
        assert (code, "somebody" in err) == (ExitCode.REFUSED, True)
    assert command.host.moves == []


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (["--pid", "11"], ExitCode.USAGE, "--to"),
        (["--to", "1"], ExitCode.USAGE, "--pid --unit"),
        (["--pid", "11", "--unit", "a", "--to", "1"], ExitCode.USAGE, "not allowed with"),
        (["--pid", "-3", "--to", "1"], ExitCode.USAGE, "argument"),
        (["--pid", "x", "--to", "1"], ExitCode.USAGE, "is not a whole number"),
        (["--pid", "11", "--to", "1", "--range", "9-5"], ExitCode.USAGE, "ends where it begins"),
        (["--pid", "11", "--to", "1", "--range", "xyz"], ExitCode.USAGE, "is not of the form"),
        (["--unit", "a", "--to", "1", "--range", "5-9"], ExitCode.USAGE, "one process's own"),
        (["--pid", "99", "--to", "1"], ExitCode.USAGE, "there is no process 99"),
        (["--pid", "11", "--to", "5"], ExitCode.USAGE, "no such node"),
        (["--unit", "none", "--to", "1"], ExitCode.REFUSED, "no process of unit none.service has mergeable memory"),
    ],
)
def test_what_can_not_be_done(command: Any, words: list[str], code: ExitCode, why: str) -> None:
    found, out, err = command("migrate", *words)
    assert (found, out) == (code, "")
    assert why in err
    assert command.host.moves == []


def test_the_service_migrates_where_one_runs(command: Any, tmp_path: Path) -> None:
    progress = {"progress": {"done": 1, "total": 2, "unit": "pages"}, "result": None}
    answer = conversation(progress, progress, {"progress": None, "result": contract("migrate")})
    with listening(tmp_path / "s", lambda request: answer) as requests:
        code, out, _ = command("migrate", "--pid", "11", "--to", "1", "--range", "1000-2000", "--everything", "--json")
    assert (code, json.loads(out)) == (ExitCode.CHECK_FAILED, contract("migrate"))
    (request,) = requests
    assert request == {
        "method": f"{client.INTERFACE}.Migrate",
        "parameters": {
            "pid": 11,
            "to": 1,
            "everything": True,
            "dry_run": False,
            "ranges": [{"start": 4096, "end": 8192}],
        },
        "more": True,
    }
    assert command.host.moves == []


def test_the_service_may_refuse(command: Any, tmp_path: Path) -> None:
    answer = reply(f"{client.INTERFACE}.PermissionDenied", needs="root")
    with listening(tmp_path / "s", lambda request: answer):
        code, _, err = command("migrate", "--unit", "a", "--to", "1")
    assert (code, "only root may do this" in err) == (ExitCode.DENIED, True)


@pytest.mark.parametrize("answer", [b"", conversation({"progress": None, "result": None})])
def test_a_service_that_ends_without_a_result(command: Any, tmp_path: Path, answer: bytes) -> None:
    with listening(tmp_path / "s", lambda request: answer):
        code, out, _ = command("migrate", "--pid", "11", "--to", "1")
    assert (code, out) == (ExitCode.UNREACHABLE, "")


@pytest.fixture
def ctrl_c(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Somebody presses Ctrl-C as often as this list is long, each time at the next word on progress."""
    presses: list[None] = [None]

    def at(*_: object) -> None:
        if presses:
            presses.pop()
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ProgressLine, "at", at)
    return presses


def test_ctrl_c_stops_what_the_service_does(command: Any, tmp_path: Path, ctrl_c: list[None]) -> None:
    progress = {"progress": {"done": 1, "total": 2, "unit": "pages"}, "result": None}
    last = {"progress": None, "result": contract("migrate") | {"cancelled": True}}
    with listening(tmp_path / "s", lambda request: conversation(progress, progress, last)):
        code, out, _ = command("migrate", "--pid", "11", "--to", "1")
        assert (code, ctrl_c) == (ExitCode.INTERRUPTED, [])
        assert "moved to node 1" in out
        assert "stopped early: pages that were moved stay on node" in out
        ctrl_c += [None, None]
        assert command("migrate", "--pid", "11", "--to", "1")[:2] == (ExitCode.INTERRUPTED, "")


def test_ctrl_c_stops_what_this_process_does(command: Any, ctrl_c: list[None]) -> None:
    code, out, _ = command("migrate", "--pid", "11", "--to", "1", "--json")
    assert (code, ctrl_c) == (ExitCode.INTERRUPTED, [])
    assert json.loads(out)["cancelled"] is True


def test_the_example_of_a_migration_has_the_form_of_one(command: Any) -> None:
    command.host.move_outcomes = [MoveResult(30, 7, {"busy": 2})]
    found = json.loads(command("migrate", "--pid", "11", "--to", "1", "--json")[1])
    assert shape(found) == shape(contract("migrate") | {"processes": contract("migrate")["processes"][:1]})
    planned = json.loads(command("migrate", "--pid", "11", "--to", "1", "--json", "--dry-run")[1])
    assert planned["processes"][0].keys() == contract("migrate")["processes"][1].keys()


def test_addresses() -> None:
    assert migrate.address_range("7f0000000000-0x7f0000001000") == (0x7F0000000000, 0x7F0000001000)
    for wrong in ("", "-", "5", "5-", "-5", "5-5", "0-1ffffffffffffffff", "g-h"):
        with pytest.raises(argparse.ArgumentTypeError):
            migrate.address_range(wrong)


# -- what tables and progress are made of ------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_for_terminals_and_leaves_nothing_behind() -> None:
    for out, shown in ((Terminal(), "\r\x1b[K1 of 4 pages (25.0 %)\r\x1b[K"), (io.StringIO(), "")):
        with ProgressLine(out) as line:
            line.at(0, 0, "")
            line.at(1, 4, "pages")
            line.at(1, 4, "pages")
        assert out.getvalue() == shown


def test_a_table() -> None:
    columns = [Column("a"), Column("number", right=True), Column("c")]
    assert list(table(columns, [["longer", "1", ""], ["x", "1,000,000", "y"]])) == [
        "a          number  c",
        "longer          1",
        "x       1,000,000  y",
    ]


def test_a_table_of_a_width() -> None:
    columns = [Column("a", wraps=True), Column("number", right=True), Column("c", wraps=True)]
    rows = [["a-name-without-a-blank", "1", "some words that go on"]]
    assert list(table(columns, rows, 30)) == [
        "a           number  c",
        "a-name-wit       1  some words",
        "hout-a-bla          that go on",
        "nk",
    ]


@pytest.mark.parametrize(("numbers", "text"), [([], "-"), ([3], "3"), ([0, 1, 2, 5, 7, 8], "0-2,5,7-8")])
def test_lists_are_as_the_kernel_writes_them(numbers: list[int], text: str) -> None:
    assert list_text(numbers) == text


def test_a_process_is_not_lost_between_two_documents() -> None:
    there = machine()
    document = processes_document(there.identity, there.seen(), there.sample())
    listed: Any = document["processes"]
    assert {item["pid"] for item in listed} == {one.id.pid for one in there.running if isinstance(one, Process)}
