# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of docs/json.md, "Exit codes": one thing that is wrong has one code in every command that can meet it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from ksmd_ctl.cli import change, host
from ksmd_ctl.cli.main import COMMANDS, main
from ksmd_ctl.cli.terminal import ProgressLine
from ksmd_ctl.config import loader
from ksmd_ctl.config.loader import load
from ksmd_ctl.config.model import Config
from ksmd_ctl.engine.host import open_engine_host
from ksmd_ctl.errors import Denied, Unreadable
from ksmd_ctl.history.file import HistoryFile
from ksmd_ctl.history.model import history_path
from ksmd_ctl.host.knobs import KNOBS, Knob
from ksmd_ctl.host.memory import HomeRange, Inventory, ProcessMemory, Skipped, UnmergeDemand
from ksmd_ctl.host.operation import MoveResult
from ksmd_ctl.host.sample import HostKind
from ksmd_ctl.statefiles import HostLock
from tests.cli.fakes import conversation, listening
from tests.conftest import ksm_lock
from tests.fakes.host import FakeHost, FakeOperation, process
from tests.fakes.ksmfs import FakeKsmFs
from tests.replay.recordings import Stage

DOCS = Path(__file__).parents[2] / "docs/json.md"

#: What is wrong, as the table has it; its code; command lines that meet it.
TABLE = {
    "a process, node, knob or command that is not there": (
        2,
        [
            ["unmerge", "--pid", "4000000"],
            ["unmerge", "--pid", "4000000", "--dry-run"],
            ["collapse", "--pid", "4000000"],
            ["merge", "off", "--pid", "4000000"],
            ["migrate", "--pid", "4000000", "--to", "0"],
            ["unmerge", "--pid", "1000", "--to", "9"],
            ["migrate", "--pid", "1000", "--to", "9"],
            ["set", "page_to_scan=1"],
            ["estimate", "--pid", "4000000"],
            ["stat"],
            ["--debug", "stat"],
        ],
    ),
    "a value that a knob doesn't take": (
        2,
        [["set", "run=-1"], ["set", "smart_scan=on"], ["set", "advisor_mode=fast"]],
    ),
    "a process or unit without mergeable memory": (
        6,
        [
            ["unmerge", "--unit", "nobody"],
            ["migrate", "--unit", "nobody", "--to", "0"],
            ["estimate", "--unit", "nobody"],
        ],
    ),
}


@pytest.mark.parametrize(
    ("code", "words"), [(code, words) for code, lines in TABLE.values() for words in lines], ids=str
)
def test_the_table(code: int, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, *([] if "stat" in words else ["--host", "engine"])]) == code
    out, err = capsys.readouterr()
    assert out == ""
    first, second = err.splitlines()[-2:]
    assert first.startswith("ksmd-ctl: ")
    assert second.startswith("hint: ")


#: Rows that take a host of their own: a test below for each.
ROWS = {
    "a process or unit without mergeable memory": 6,
    "a process that may not be looked at, or keeps its readers waiting": 3,
    "too little room, or another change is under way": 6,
    "what only root may see or change": 3,
    "a state or runtime directory on a disk that is full or read-only": 6,
    "a kernel without KSM": 4,
    "something on the socket that doesn't answer as the service does, or not in time": 5,
    "a change that was cancelled before its end": 7,
    "Ctrl-C": 130,
    "the output can't be written": 8,
}


def test_the_documents_have_the_table() -> None:
    rows = dict(re.findall(r"^\| (.+) \| (\d+) \|$", DOCS.read_text().split("The same mistake has")[1], re.MULTILINE))
    told = {wrong: code for wrong, (code, _) in TABLE.items()} | ROWS
    assert {wrong: int(rows[wrong]) for wrong in told} == told
    before_the_next_table = list(rows)[: list(rows).index("the output can't be written") + 1]
    assert set(before_the_next_table) == set(told)


class Host(FakeHost):
    """A host with a process that has 1,000 merged pages (11), one without mergeable memory (98), and little room."""

    def __init__(self) -> None:
        super().__init__()
        self.room_bytes = 0
        self.running, self.alive = [process(11, "web.service", 1000, unit="web.service")], {98}

    def inventory(self, floor_bytes: int) -> FakeOperation[Inventory]:
        memories = tuple(
            ProcessMemory(
                one.id, one.name, one.unit, one.classes, 1000, (HomeRange(0, 1000 << 12, 0, {0: 1000}, 1000),)
            )
            for one in self.running
        )
        room = (UnmergeDemand("host", 1000 << 12, self.room_bytes),)
        return FakeOperation(Inventory(self.topology(), memories, room, tuple(self.skipped), tuple(self.unseen)))


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Host:
    """`Host`, and `run` with a configuration that has all files of a service in a folder of its own."""
    found = Host()
    for module in (host, change):
        monkeypatch.setattr(module, "open_host", lambda *_, **__: nullcontext(found))
    config = tmp_path / "c.toml"
    folders = ("runtime", "state")
    config.write_text("[service]\n" + "".join(f'{one}_directory = "{tmp_path}/{one}"\n' for one in folders))
    monkeypatch.setattr(loader, "load", lambda path=None: load(str(config)))
    monkeypatch.setenv("KSMD_CTL_SOCKET", str(tmp_path / "s"))
    return found


@pytest.mark.parametrize(
    "line",
    [
        "unmerge --pid 98",
        "unmerge --pid 98 --dry-run",
        "unmerge --unit db",
        "migrate --pid 98 --to 1",
        "migrate --unit db --to 1",
        "processes --pid 98",
        "processes --unit db",
    ],
)
def test_no_mergeable_memory(there: Host, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    there.move_outcomes = [MoveResult(0, 0, {})]
    assert main(line.split()) == ROWS["a process or unit without mergeable memory"]
    out, err = capsys.readouterr()
    assert out == ""
    assert "mergeable memory" in err


@pytest.mark.parametrize(
    "line",
    ["unmerge --pid 9", "unmerge --pid 9 --dry-run", "migrate --pid 9 --to 1", "processes --pid 9"],
)
@pytest.mark.parametrize(
    ("stuck", "why"), [(True, "the process keeps its readers waiting"), (False, "process 9 may not be looked at")]
)
def test_a_process_that_cannot_be_looked_at(
    there: Host, line: str, stuck: bool, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    there.alive = {9}
    if stuck:
        there.skipped = [Skipped(9, "stuck", "the process keeps its readers waiting")]
        there.move_outcomes = [Unreadable("reading /proc/9/smaps", "the process keeps its readers waiting")]
    else:
        there.unseen = [9]
        there.move_outcomes = [Denied("moving memory", "process 9 may not be looked at")]
    assert main(line.split()) == ROWS["a process that may not be looked at, or keeps its readers waiting"]
    out, err = capsys.readouterr()
    assert out == ""
    assert why in err
    assert "no mergeable memory" not in err


@pytest.mark.parametrize("line", ["unmerge --pid 98 --to 5", "migrate --pid 98 --to 5"])
def test_a_node_that_is_not_there_is_told_before_anything_of_the_process(
    there: Host, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 2
    assert "to node 5: there is no such node" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["set run=1", "unmerge --pid 11", "migrate --pid 11 --to 1"])
def test_another_change_is_under_way(
    there: Host, tmp_path: Path, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with HostLock(tmp_path / "runtime/lock", "somebody"):
        assert main(line.split()) == ROWS["too little room, or another change is under way"]
    assert "somebody" in capsys.readouterr().err
    assert (there.written, there.moves, there.collapses) == ([], [], [])


@pytest.fixture
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with nothing but a file in a folder, full or read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder]
    if os.geteuid() != 0 or subprocess.run(words, check=False).returncode:
        pytest.skip("needs root that may mount a tmpfs")
    try:
        (folder / "there").mkdir()
        if request.param == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        else:
            with suppress(OSError), open(folder / "large", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("disk", ["full", "read-only"], indirect=True)
@pytest.mark.parametrize("folder", ["there", "to/be/made"])
@pytest.mark.parametrize(
    ("line", "which"),
    [
        ("set smart_scan=0", "state"),
        ("set merge_across_nodes=0", "state"),
        ("set smart_scan=0", "runtime"),
        ("set --recover", "runtime"),
        ("unmerge --pid 11", "runtime"),
        ("migrate --pid 11 --to 1", "runtime"),
    ],
)
def test_nothing_is_changed_that_can_not_be_recorded(
    there: Host, disk: Path, folder: str, line: str, which: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.toml"
    config.write_text(config.read_text().replace(f"{tmp_path}/{which}", str(disk / folder)))
    assert main(line.split()) == ROWS["a state or runtime directory on a disk that is full or read-only"]
    out, err = capsys.readouterr()
    assert out == ""
    first, second = err.splitlines()[-2:]
    assert str(disk / folder) in first
    assert re.search(r"ENOSPC \(No space left|EROFS \(Read-only", first)
    assert second.startswith("hint: make room there")
    assert (there.written, there.moves) == ([], [])


@pytest.mark.parametrize(
    "line", ["set merge_across_nodes=0 --dry-run", "set merge_across_nodes=0", "unmerge --pid 11 --dry-run"]
)
def test_too_little_room(there: Host, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    there.counters |= {"pages_shared": 1, "pages_sharing": 999}
    assert main(line.split()) == ROWS["too little room, or another change is under way"]
    assert "host" in "".join(capsys.readouterr())
    assert there.written == []


@pytest.mark.parametrize("line", ["unmerge --pid 1000", "migrate --pid 1000 --to 1"])
@pytest.mark.parametrize("room", ["none", "some"])
def test_a_dry_run_ends_with_the_code_of_the_real_one(
    there: Host, line: str, room: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = set()
    for words in ([*line.split(), "--dry-run"], line.split()):
        # Each on a simulated host of its own, of which the floor leaves nothing, or eight pages.
        simulated = open_engine_host()
        simulated.set(Knob.RUN, 1)
        simulated.advance(30)
        floor = max(one.free_bytes for one in simulated.sample().nodes.values()) - (8 << 12 if room == "some" else 0)
        monkeypatch.setattr(loader, "load", lambda _=None, floor=floor: replace(Config(), floor_bytes=floor))
        for module in (host, change):
            monkeypatch.setattr(module, "open_host", lambda *_, one=simulated, **__: nullcontext(one))
        codes.add(main([*words, "--host", "engine"]))
        capsys.readouterr()
    refused = room == "none" and line.startswith("unmerge")
    assert codes == {6 if refused else 1}


def test_room_for_a_part_is_no_refusal(there: Host) -> None:
    there.room_bytes = 999 << 12
    assert main(["unmerge", "--pid", "11", "--dry-run"]) == 1


@pytest.mark.parametrize("line", ["status", "metrics"])
def test_a_kernel_without_ksm(tmp_path: Path, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    FakeKsmFs(tmp_path)
    shutil.rmtree(tmp_path / "sys/kernel/mm/ksm")
    assert main([line, "--root", str(tmp_path), "--socket", str(tmp_path / "s")]) == ROWS["a kernel without KSM"]
    assert "boot a kernel with CONFIG_KSM=y" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "status",
        "metrics",
        "nodes",
        "processes",
        "doctor",
        "set run=1",
        "set run=1 --dry-run",
        "unmerge --pid 11",
        "collapse --pid 11",
        "merge off --pid 11",
        "migrate --pid 11 --to 1",
    ],
)
@pytest.mark.parametrize("answer", [b"220 mail ESMTP", b"{}\0", b""])
def test_something_else_on_the_socket(there: Host, tmp_path: Path, line: str, answer: bytes) -> None:
    code = ROWS["something on the socket that doesn't answer as the service does, or not in time"]
    with listening(tmp_path / "s", lambda request: answer):
        assert main(line.split()) == code
    assert (there.written, there.moves) == ([], [])


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("set run=1", {"transaction": {"result": "abandoned", "reason": "interrupted"}, "progress": None}),
        ("unmerge --pid 11", {"result": {"cancelled": True, "fits": True, "processes": []}, "progress": None}),
        ("migrate --pid 11 --to 1", {"result": {"cancelled": True, "processes": []}, "progress": None}),
    ],
)
@pytest.mark.parametrize("pressed", [False, True])
def test_a_change_that_was_cancelled(
    there: Host, tmp_path: Path, line: str, answer: dict[str, object], pressed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the service, or because somebody pressed Ctrl-C; what came of a change of knobs is told by its result."""

    def tell(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    if pressed:
        monkeypatch.setattr(ProgressLine, "tell", tell)
    progress = {"progress": {"done": 1, "total": 2, "unit": "pages"}}
    with listening(tmp_path / "s", lambda request: conversation(*([progress] if pressed else []), answer)):
        code = main(line.split())
    by_hand = pressed and not line.startswith("set")
    assert code == ROWS["Ctrl-C" if by_hand else "a change that was cancelled before its end"]


@pytest.mark.parametrize("line", ["processes", "processes --json", "nodes"])
def test_only_root_may_see_that(there: Host, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    denied = Denied("looking at processes", "this user may not look at other users' processes", hint="run as root")
    there.processes_outcome = there.survey_outcome = denied
    assert main(line.split()) == ROWS["what only root may see or change"]
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("hint: run as root\n")


#: Each command as it prints something and ends.
PRINTING = (
    "status",
    "set smart_scan=0",
    "set smart_scan=0 --dry-run",
    "set --recover",
    "nodes",
    "processes",
    "sharing",
    "history",
    "estimate",
    "domains",
    "metrics",
    "doctor --interval 0.2",
    "unmerge --pid 1000 --dry-run",
    "collapse --pid 1000 --dry-run",
    "merge off --pid 1000 --dry-run",
    "migrate --pid 1000 --to 0 --dry-run",
    "verify --random 1 --count 1",
    "record -o NEW --for 0.2",
    "report RECORDING",
    "replay RECORDING",
    "daemon --check-config",
)


def run_with_output(line: str, folder: Path, output: str, environ: dict[str, str] | None = None) -> tuple[int, str]:
    """The exit code and what stderr got of a command whose output goes where a shell's redirection says."""
    if "RECORDING" in line and not (folder / "recording").exists():
        stage = Stage(folder / "recording")
        stage.recorder.sample()
        stage.end()
    line = line.replace("NEW", str(folder / "new")).replace("RECORDING", str(folder / "recording"))
    words = [sys.executable, "-m", "ksmd_ctl.cli.main", *line.split()]
    config = folder / "c.toml"
    folders = "".join(f'{one}_directory = "{folder}/{one}"\n' for one in ("runtime", "state"))
    config.write_text(f"[service]\n{folders}")
    if not line.startswith(("-", "verify", "daemon", "report", "replay")):
        words += ["--host", "engine"]
    if line.startswith("history"):
        HistoryFile(history_path(folder / "state", HostKind.ENGINE), 1 << 20).close()
    if line.startswith(("daemon", "set", "unmerge", "collapse", "merge", "history")):
        words += ["--config", str(config)]
    environ = {**os.environ, "KSMD_CTL_SOCKET": str(folder / "s"), **(environ or {})}
    shell = f"exec {shlex.join(words)} {output}"
    with ksm_lock() if line.startswith("verify") else nullcontext():
        done = subprocess.run(["sh", "-c", shell], stderr=subprocess.PIPE, text=True, env=environ, check=False)
    return done.returncode, done.stderr


def test_every_command_is_among_those_that_print() -> None:
    # `watch` goes on until somebody ends it: tests/cli/test_watch.py.
    assert {line.split()[0] for line in PRINTING} == set(COMMANDS) - {"watch"}


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (">/dev/full", "writing the output: ENOSPC (No space left on device)"),
        (">&-", "writing the output: stdout is closed"),
    ],
)
@pytest.mark.parametrize("line", [*PRINTING, *(f"{line} --json" for line in PRINTING), "--help", "--version"])
def test_output_that_can_not_be_written(line: str, output: str, said: str, tmp_path: Path) -> None:
    code, err = run_with_output(line, tmp_path, output)
    first, second = err.splitlines()[-2:]
    assert (code, first) == (ROWS["the output can't be written"], f"ksmd-ctl: {said}")
    assert second.startswith("hint: ")
    assert "Error" not in err


def test_output_that_can_not_be_written_is_told_without_buffers_too(tmp_path: Path) -> None:
    code, err = run_with_output("nodes", tmp_path, ">/dev/full", {"PYTHONUNBUFFERED": "1"})
    assert (code, err.splitlines()[0]) == (8, "ksmd-ctl: writing the output: ENOSPC (No space left on device)")


def test_nothing_is_changed_where_nobody_could_be_told(tmp_path: Path) -> None:
    assert run_with_output("set smart_scan=0", tmp_path, ">&-")[0] == 8
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(("line", "code"), [("nodes", 0), ("stat", 2), ("processes --pid 4000000", 2)])
def test_without_stderr_there_is_the_exit_code(line: str, code: int, tmp_path: Path) -> None:
    for output in ("2>&-", "2>/dev/full"):
        assert run_with_output(line, tmp_path, f"{output} >/dev/null") == (code, "")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
@pytest.mark.parametrize("line", ["processes", "set run=1", "unmerge --pid 1", "migrate --pid 1 --to 0"])
def test_somebody_else_than_root_is_told_so(line: str) -> None:
    child = os.fork()
    if not child:
        code = 99
        try:
            os.setresuid(65534, 65534, 65534)
            code = main([*line.split(), "--socket", "/nonexistent"])
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == ROWS["what only root may see or change"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["set", "page_to_scan=1"], "did you mean pages_to_scan?"),
        (["set", "run=-1"], "run takes a whole number from 0 to 2"),
        (["set", "smart_scan=on"], "smart_scan takes 0 or 1"),
        (["stat"], "did you mean status?"),
        (["--debug", "stat"], "did you mean status?"),
        (["unmerge", "--pid", "1000", "--to", "9"], "un-merging to node 9: there is no such node"),
        (["migrate", "--pid", "1000", "--to", "9"], "moving memory to node 9: there is no such node"),
        (["unmerge", "--pid", "4000000"], "there is no process 4000000"),
    ],
)
def test_what_is_wrong_is_said_with_what_would_be_right(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*words, *([] if "stat" in words else ["--host", "engine"])])
    err = capsys.readouterr().err
    assert said in err
    assert "broker" not in err


def test_an_option_before_the_command_is_said_to_go_after_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "status"]) == 2
    assert "give it after status" in capsys.readouterr().err


#: What Python takes for a number, or nearly, and no person writes on purpose.
NO_NUMBERS = ("-0", "+1", " 1", "1 ", "0x1", "1_0", "\N{ARABIC-INDIC DIGIT ONE}", "\N{SUPERSCRIPT TWO}", "", "9" * 5000)


@pytest.mark.parametrize("number", NO_NUMBERS, ids=lambda number: ascii(number)[:12])
@pytest.mark.parametrize(
    "line",
    [
        *(f"set {knob}={{}}" for knob, spec in KNOBS.items() if not spec.words),
        "set run=0 --wait={}",
        "status --interval={}",
        "doctor --interval={}",
        "processes --top={}",
        "processes --pid={}",
        "unmerge --pid={}",
        "unmerge --pid=1000 --to={}",
        "migrate --to=0 --pid={}",
        "migrate --pid=1000 --to={}",
        "verify --random={}",
        "verify --random=1 --count={}",
        "verify --random=1 --first={}",
    ],
)
def test_what_only_looks_like_a_number_is_refused(line: str, number: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*(word.format(number) for word in line.split()), "--host", "engine"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert max(map(len, err.splitlines())) < 300
    assert "Exceeds the limit" not in err
    assert "unrecognized" not in err


@pytest.mark.parametrize("address", [one for one in NO_NUMBERS if one != "0x1"], ids=lambda one: ascii(one)[:12])
def test_what_only_looks_like_an_address_is_refused(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["migrate", "--pid", "1000", "--to", "0", f"--range={address}-7f00", "--host", "engine"]) == 2
    assert "is not of the form" in capsys.readouterr().err


def test_run_2_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    main(["set", "run=2", "--dry-run", "--host", "engine"])
    assert "warning: run = 2 un-merges everything" in capsys.readouterr().err
