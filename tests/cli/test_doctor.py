# SPDX-License-Identifier: GPL-2.0-or-later
"""The doctor on the simulated host and on fake ones: what people read, the document, the way to the service."""

from __future__ import annotations

import json
import re
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from ksmd_ctl.cli import host, source
from ksmd_ctl.cli.main import main
from ksmd_ctl.doctor.finding import Code, Severity
from ksmd_ctl.engine.host import EngineHost
from ksmd_ctl.engine.memory import PAGE_SIZE
from ksmd_ctl.errors import ExitCode
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.operation import Move, finish
from tests.cli.fakes import listening, reply
from tests.cli.test_numa import contract, shape
from tests.engine.test_host import lab, process_with, scan
from tests.fakes.ksmfs import FakeKsmFs
from tests.render.reports import example

DOC = Path(__file__).parents[2] / "docs/doctor.md"


class Visit:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err

    @property
    def document(self) -> Any:
        return json.loads(self.out)

    @property
    def codes(self) -> list[str]:
        return [finding["code"] for finding in self.document["findings"]]


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(source, "REPORT_SECONDS", 0.5)

    def run(*words: str) -> Visit:
        code = main(["doctor", *words, "--socket", str(tmp_path / "s")])
        said = capsys.readouterr()
        return Visit(code, said.out, said.err)

    return run


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> EngineHost:
    """A simulated host, on which time passes while the doctor waits."""
    found = lab()
    found.set(Knob.MERGE_ACROSS_NODES, 1)
    found.set(Knob.PAGES_TO_SCAN, 1000)
    monkeypatch.setattr(host, "open_host", lambda kind, root="/": nullcontext(found))
    monkeypatch.setattr(time, "sleep", found.advance)
    return found


def labels(first: int, pages: int) -> list[str]:
    return [f"content {number}" for number in range(first, first + pages)]


def merging(there: EngineHost, *contents: list[str]) -> None:
    for node, found in enumerate(contents):
        process_with(there, found, node % 2)
    there.set(Knob.RUN, 1)
    there.advance(1)


# -- the simulated host ------------------------------------------------------------------------------------


def test_a_healthy_host(there: EngineHost, command: Any) -> None:
    there.set(Knob.MERGE_ACROSS_NODES, 0)
    merging(there, labels(0, 100), labels(0, 100), labels(0, 100), labels(0, 100))
    found = command("--json")
    assert (found.codes, found.code) == ([], ExitCode.DONE)
    lines = command().out.splitlines()
    assert lines[0] == "host       SIMULATED: these figures are not about this machine"
    assert lines[1].startswith("service    no service runs")
    assert lines[2].startswith("healthy    nothing is wrong, the simulated host, for 5.5 s, 4 processes with 1.6 MiB")
    assert "contents of 200 frames compared: no identical pages that are not merged" in lines[2]
    assert len(lines) == 3


def test_off(there: EngineHost, command: Any) -> None:
    merging(there, labels(0, 100), labels(0, 100))
    there.set(Knob.RUN, 0)
    there.set(Knob.RUN, 2)
    there.set(Knob.RUN, 0)
    found = command()
    assert found.code == ExitCode.CHECK_FAILED
    head, block = found.out.split("\n\n")
    assert "200 frames compared: 100 identical pages that are not merged, 400.0 KiB to be saved" in head
    assert block.splitlines() == [
        "blocks     KSM is switched off (ksm-off)",
        "seen       run 0 (/sys/kernel/mm/ksm); to be saved at least 400.0 KiB (contents of memory)",
        "advice     Merging memory across trust domains is a known side channel; if all mergeable memory here may "
        "be merged, switch it on. Before that, `ksmd-ctl estimate` as root tells what merging would save here.",
        "command    ksmd-ctl set run=1",
    ]


def test_a_host_with_duplicates_is_not_called_healthy(there: EngineHost, command: Any) -> None:
    merging(there, labels(0, 100), labels(0, 100))
    process_with(there, labels(500, 200), 0)
    process_with(there, labels(500, 200), 0)
    # A batch of what is new: too little to say why it is not merged yet.
    there.set(Knob.PAGES_TO_SCAN, 1)
    there.set(Knob.SLEEP_MILLISECS, 5000)
    found = command("--json")
    assert found.document["looked"]["unmerged_bytes"] == 200 * PAGE_SIZE
    assert "smart-scan" not in found.codes
    head = command().out.split("\n\n")[0].splitlines()
    assert head[-1].startswith("looked ")
    assert "nothing is wrong" not in head[-1]
    assert "200 identical pages that are not merged, 800.0 KiB to be saved" in head[-1]


def test_migrated_twins(there: EngineHost, command: Any) -> None:
    there.set(Knob.MERGE_ACROSS_NODES, 0)
    process, _ = process_with(there, [*labels(0, 50), *labels(0, 50)], 0)
    process_with(there, [*labels(0, 50), *labels(0, 50)], 1)
    scan(there, 3)
    there.set(Knob.RUN, 1)
    assert command("--json").codes == []
    finish(there.move(Move(process, 1), 60))
    there.advance(1)
    found = command("--json")
    assert found.codes == ["twins", "remote-pages"]
    assert found.document["findings"][0]["evidence"][0]["value"] == 50


def test_merged_pages_far_from_home(there: EngineHost, command: Any) -> None:
    merging(there, labels(0, 100), labels(0, 100))
    found = command("--json")
    assert found.codes == ["remote-pages"]
    assert found.document["findings"][0]["command"] == "ksmd-ctl set merge_across_nodes=0 --dry-run"


def test_swap(there: EngineHost, command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    there.set(Knob.MERGE_ACROSS_NODES, 0)
    (one, start), (other, begin) = (process_with(there, labels(0, 100), 0) for _ in range(2))
    scan(there, 3)
    for process, at in ((one, start), (other, begin)):
        there.machine.swap_out(process.pid, at, 100)
    there.set(Knob.RUN, 1)
    assert command("--json").codes == ["swapped"]
    there.set(Knob.RUN, 0)
    wait = there.advance

    def meanwhile(seconds: float) -> None:
        # They come back while the doctor looks.
        for process, at in ((one, start), (other, begin)):
            for page in range(100):
                there.machine.read(process.pid, at + page * PAGE_SIZE)
        wait(seconds)

    monkeypatch.setattr(time, "sleep", meanwhile)
    assert {"ksm-off", "swap-copies"} <= set(command("--json").codes)


def test_memory_goes_offline(there: EngineHost, command: Any) -> None:
    there.set(Knob.MERGE_ACROSS_NODES, 0)
    merging(there, labels(0, 100), labels(200, 10), labels(0, 100))
    there.machine.going_offline(1)
    assert command("--json").codes == ["memory-offline"]


def test_no_room_on_a_node(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ksmd_ctl.engine.machine import Machine
    from ksmd_ctl.engine.profile import profile

    small = EngineHost(Machine(1, profile("7.2"), node_pages=1024))
    monkeypatch.setattr(host, "open_host", lambda kind, root="/": nullcontext(small))
    monkeypatch.setattr(time, "sleep", small.advance)
    small.set(Knob.PAGES_TO_SCAN, 500)
    small.set(Knob.SMART_SCAN, 0)
    small.set(Knob.RUN, 1)
    for _ in range(4):
        process_with(small, labels(0, 400), 0)
        small.advance(1)
    found = command("--json")
    assert (found.codes, found.code) == (["no-room"], ExitCode.DONE)
    assert found.document["findings"][0]["severity"] == Severity.NOTE


# -- fakes -------------------------------------------------------------------------------------------------


def test_a_kernel_without_ksm(command: Any, tmp_path: Path) -> None:
    FakeKsmFs(tmp_path / "root", files=None)
    found = command("--json", "--root", str(tmp_path / "root"))
    assert (found.codes, found.code) == (["ksm-absent"], ExitCode.CHECK_FAILED)
    assert "this kernel doesn't have it" not in found.err


def answers(request: dict[str, object]) -> bytes:
    """A service that has the documents of the examples."""
    name = str(request["method"]).rpartition(".")[2].lower()
    return reply(report=example()) if name == "status" else reply(**{name: contract(name)})


def test_a_service_is_asked(command: Any, tmp_path: Path) -> None:
    fake = FakeKsmFs(tmp_path / "root")
    with listening(tmp_path / "s", answers) as requests:
        found = command("--json", "--no-contents", "--interval", "0.1", "--root", str(tmp_path / "root"))
        # The report still has a ksmtuned that has ended.
        assert "two-managers" not in found.codes
        fake.add_process(812, "ksmtuned", command=["/bin/bash", "/usr/sbin/ksmtuned"])
        found = command("--json", "--no-contents", "--interval", "0.1", "--root", str(tmp_path / "root"))
    assert {"knob-pending", "two-managers", "remote-pages"} <= set(found.codes)
    assert {str(request["method"]).rpartition(".")[2] for request in requests} == {"Status", "Nodes", "Processes"}
    looked = found.document["looked"]
    assert (looked["service"], looked["note"], looked["contents"]) == (True, "", None)


def test_a_service_that_can_not_look_itself(command: Any, tmp_path: Path) -> None:
    def refuses(request: dict[str, object]) -> bytes:
        if str(request["method"]).endswith("Status"):
            return reply(report=example())
        failed = {"what": "counting", "why": "EACCES", "hint": "root may", "exit_code": 3}
        return reply("io.ksmd-ctl.Failed", **failed)

    with listening(tmp_path / "s", refuses):
        FakeKsmFs(tmp_path / "root")
        found = command("--json", "--no-contents", "--interval", "0.1", "--root", str(tmp_path / "root"))
    assert "unseen" in found.codes
    assert found.document["looked"]["unknown"] == [
        {"what": what, "why": "counting: EACCES", "hint": "root may"} for what in ("nodes", "processes")
    ]
    assert found.document["looked"]["processes"] is None


@pytest.mark.parametrize("interval", ["0", "601", "nan", "x"])
def test_an_interval_that_is_none(command: Any, interval: str) -> None:
    assert command("--interval", interval).code == ExitCode.USAGE


def test_the_document_has_the_form_of_the_example(there: EngineHost, command: Any) -> None:
    merging(there, labels(0, 100), labels(0, 100))
    assert shape(command("--json").document) == shape(contract("doctor"))


# -- the documentation -------------------------------------------------------------------------------------


def test_every_finding_is_documented_and_nothing_else() -> None:
    section = DOC.read_text().partition("## Findings")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert sorted(code for row in rows for code in re.findall(r"`([a-z-]+)`", row.split("|")[1])) == sorted(Code)
    severities = re.findall(r"^\| `([a-z ]+)` \|", DOC.read_text().partition("## Findings")[0], re.MULTILINE)
    assert severities == list(Severity)
