# SPDX-License-Identifier: GPL-2.0-or-later
"""The command: what it runs, prints, saves and ends with. On the engine, which needs no root."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from ksmd_ctl.cli import main as command_line
from ksmd_ctl.cli import verify
from ksmd_ctl.cli.terminal import ProgressLine
from ksmd_ctl.scenario import generate_domains
from ksmd_ctl.scenario.compare import Result, Verdict
from ksmd_ctl.scenario.format import LIBRARY, load
from ksmd_ctl.scenario.generate import Abilities, generate
from ksmd_ctl.scenario.model import Scenario
from ksmd_ctl.scenario.session import Fact, Session, engine_for
from tests import matrix
from tests.guest.test_kernels import RANDOM_SCENARIOS, SEED

GOOD = """
format = 1
name = "good"
[[region]]
process = "p"
name = "a"
pages = ["x", "x"]
[[step]]
scan = 2
[[step]]
observe = "end"
"""
WRONG = GOOD.replace("good", "wrong") + '[[expect]]\nat = "end"\npages_shared = 7\n'
NOTHING = GOOD.replace("good", "nothing")
GOOD += '[[expect]]\nat = "end"\npages_shared = 1\n'
LACKING = GOOD.replace('name = "good"', 'name = "lacking"\nnodes = 9')


def ksmd_ctl(*words: str | Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    try:
        code = command_line.main(["verify", *map(str, words)])
    except SystemExit as stop:
        code = int(str(stop.code))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in (("good", GOOD), ("wrong", WRONG), ("lacking", LACKING)):
        (tmp_path / f"{name}.toml").write_text(text)
    return tmp_path


def test_a_line_a_scenario_and_the_first_difference(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = ksmd_ctl("--host", "engine", folder, capsys=capsys)
    assert (code, err) == (1, "")
    lines = out.splitlines()
    assert lines[0] == "equal      good: good"
    assert lines[1] == "skipped    lacking: lacking: engine: needs 9 nodes with memory; this host has 4"
    assert lines[2] == "different  wrong: wrong: end: pages_shared is 1, not 7"
    assert lines[4].endswith("1 equal, 1 different, 1 skipped")


NO_EXPECTATION = "nothing to compare: one host, and the file expects nothing of it"


@pytest.mark.parametrize("expect", ["", '[[expect]]\nat = "end"\nprofile = "seed"\npages_shared = 7\n'])
def test_where_nothing_is_compared_it_is_not_called_equal(
    tmp_path: Path, expect: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "nothing.toml"
    path.write_text(NOTHING + expect)
    code, out, _ = ksmd_ctl("--host", "engine", "--report", tmp_path / "r.html", path, capsys=capsys)
    lines = out.splitlines()
    assert (code, lines[0]) == (0, f"ran        nothing: nothing: {NO_EXPECTATION}")
    assert lines[1].endswith(": 0 equal, 0 different, 0 skipped, 1 ran without anything to compare")
    page = (tmp_path / "r.html").read_text()
    assert "0 equal, 0 different, 0 skipped, 1 ran without" in page
    assert ">equal" not in page
    (found,) = json.loads(ksmd_ctl("--host", "engine", "--json", path, capsys=capsys)[1])["scenarios"]
    assert (found["verdict"], found["compared"], found["reason"]) == ("equal", False, NO_EXPECTATION)


def test_an_error_that_a_file_expects_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "refused.toml"
    step = '[[step]]\nset = { max_page_sharing = 1 }\nfails = "EINVAL"\n'
    path.write_text(NOTHING + step)
    assert ksmd_ctl("--host", "engine", path, capsys=capsys)[1].startswith("equal      refused: nothing\n")
    path.write_text(NOTHING + step.replace("EINVAL", "any"))
    assert ksmd_ctl("--host", "engine", path, capsys=capsys)[1].startswith("ran        refused: nothing: ")


def test_two_hosts_are_always_compared(tmp_path: Path) -> None:
    path = tmp_path / "nothing.toml"
    path.write_text(NOTHING)
    assert _TwoEngines("6.12").run(load(path)).word in ("equal", "different")


@pytest.mark.parametrize(("name", "code"), [("good", 0), ("wrong", 1), ("lacking", 4)])
def test_exit_codes(folder: Path, name: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert ksmd_ctl("--host", "engine", folder / f"{name}.toml", capsys=capsys)[0] == code


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.toml"], "no such file"),
        (["--profile", "9.9"], "'9.9' is not one of seed"),
        (["--count", "3"], "--count, --first and --domains need --random"),
        (["--random", "1", "good.toml"], "combined with files"),
        (["--random", "-1"], "is not a whole number from 0"),
        (["--random", "1", "--count", "0"], "is not a whole number from 1"),
        (["--host", "nobody"], "invalid choice"),
        (["--report", "no/such/folder/r.html"], "no such folder"),
    ],
)
def test_usage(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    host = [] if "--host" in words else ["--host", "engine"]
    code, out, err = ksmd_ctl(*host, *words, capsys=capsys)
    assert (code, out) == (2, "")
    assert said in err


def test_wrong_files_are_all_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.toml").write_text(GOOD.replace("scan = 2", "scan = 0"))
    (tmp_path / "b.toml").write_text(GOOD.replace("scan = 2", "jump = 2"))
    code, _, err = ksmd_ctl("--host", "engine", tmp_path, capsys=capsys)
    assert code == 2
    assert f"{tmp_path}/a.toml: step 1 (scan): 0 is not" in err
    assert f"{tmp_path}/b.toml: step 1: a step is one of" in err


def test_an_empty_folder_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ksmd_ctl("--host", "engine", tmp_path, capsys=capsys)[0] == 2


def test_the_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ksmd_ctl("--host", "engine", "--profile", "6.1", "--json", folder, capsys=capsys)
    document = json.loads(out)
    assert code == 1
    assert document.keys() == {"format", "kernel", "profile", "scenarios", "totals", "happened"}
    assert (document["format"], document["kernel"], document["profile"]) == (1, None, "6.1")
    assert document["totals"] == {"equal": 1, "different": 1, "skipped": 1}
    good, lacking, wrong = document["scenarios"]
    assert good.keys() == {"file", "name", "verdict", "compared", "reason", "observations", "differences"}
    assert good["compared"] is True
    assert good["observations"]["engine"]["end"]["groups"] == [["p.a.0", "p.a.1"]]
    assert (lacking["verdict"], lacking["observations"]) == ("skipped", {"engine": {}})
    assert wrong["differences"] == [
        {"at": "expected", "what": "end: pages_shared is 1, not 7", "engine": "does not hold"}
    ]


def test_the_shipped_library_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ksmd_ctl("--host", "engine", capsys=capsys)
    assert code == 0
    assert f"{len(list(LIBRARY.rglob('*.toml')))} equal, 0 different, 0 skipped" in out


def test_random_ones_print_what_happened(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ksmd_ctl("--host", "engine", "--random", "4", "--count", "40", capsys=capsys)
    assert code == 0
    assert out.splitlines()[0].endswith(": 0 equal, 0 different, 0 skipped, 40 ran without anything to compare")
    counts = out.splitlines()[1].removeprefix("scenarios by what happened in them: ")
    assert {"migration", "exile", "fork", "partial scan"} <= {item.partition(" ")[2] for item in counts.split(", ")}
    first = ksmd_ctl("--host", "engine", "--random", "4", "--count", "10", capsys=capsys)
    rest = ksmd_ctl("--host", "engine", "--random", "4", "--first", "10", "--count", "30", "--json", capsys=capsys)
    assert first[0] == rest[0] == 0
    assert json.loads(rest[1])["scenarios"][0]["name"] == "random 4/10"


class _TwoEngines(Session):
    """A session whose kernel is an engine of another profile."""

    def run(self, scenario: Scenario, watch: Any = None) -> Result:
        self.kernel = engine_for("6.1", 2)
        return super().run(scenario, watch)

    @property
    def nodes(self) -> int:
        return 2


def test_a_random_one_that_differs_is_shrunk_and_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ksmd_ctl.scenario.session.Session", _TwoEngines)
    monkeypatch.setattr(verify, "_session", lambda _args, _stack: (_TwoEngines("6.12"), None, ""))
    report = tmp_path / "report.html"
    words = ["--random", "3", "--count", "5", "--save", tmp_path, "--report", report]
    code, out, err = ksmd_ctl(*words, capsys=capsys)
    assert code == 1
    saved = sorted(tmp_path.glob("ksmd-ctl-random-3-*.toml"))
    assert len(saved) == out.count("\ndifferent ") + out.startswith("different ")
    assert len(saved) == err.count("the smallest scenario that still differs is in ") > 0
    for path in saved:
        assert _TwoEngines("6.12").run(load(path)).verdict is Verdict.DIFFERENT
    assert report.read_text().count("<h2") == len(saved)


def test_progress_is_for_terminals() -> None:
    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    for out, shown in ((Terminal(), True), (StringIO(), False)):
        show = ProgressLine(out)
        show.say("3 of 10: name")
        show.clear()
        assert ("3 of 10: name" in out.getvalue()) is shown


# -- the table of all kernels --------------------------------------------------------------------------------

OUTPUT = """\
equal      s01: one
skipped    ksm07: ksm07: kernel: this kernel has no smart_scan (it came with 6.7)
kernel 6.1.0-50-amd64 with 2 nodes and engine 6.1: 101 equal, 0 different, 1 skipped
scenarios by what happened in them: 24 chain, 38 exile, 19 partial scan
kernel 6.1.0-50-amd64 with 2 nodes and engine 6.1: 99 equal, 1 different, 0 skipped
scenarios by what happened in them: 20 chain, 1 collapse, 30 exec, 30 exile, 60 fork, 9 huge-page split, 20 limit, \
50 migration, 10 mremap, 20 offlined block, 90 partial scan, 9 swap-in
"""
NEVER = matrix.never("6.1", 2)


def test_the_matrix_reads_what_verify_prints(capsys: pytest.CaptureFixture[str]) -> None:
    library, random = matrix.parse(OUTPUT)
    assert (library.equal, library.skipped, library.wrong_skips) == (101, 1, [])
    assert random.happened["partial scan"] == 90
    assert matrix.judged([library, random], 100, NEVER) == ["1 differences"]
    assert matrix.judged([library], 100, NEVER) == ["1 of 2 runs came to their end"]
    _, out, _ = ksmd_ctl("--host", "engine", capsys=capsys)
    kernel = out.replace("engine 7.2:", "kernel 7.2.0 with 4 nodes and engine 7.2:")
    assert matrix.parse(kernel)[0].equal == len(list(LIBRARY.rglob("*.toml")))


def test_the_matrix_refuses_empty_random_scenarios_and_wrong_skips() -> None:
    library, random = matrix.parse(OUTPUT.replace("30 exile", "3 exile").replace("1 different", "0 different"))
    assert matrix.judged([library, random], 100, NEVER) == ["only 3 of 100 random scenarios with a exile"]
    unmet = matrix.judged([library, random], 100)
    assert "only 0 of 100 random scenarios with a zero subpage" in unmet
    assert len(unmet) == 1 + len(NEVER)
    library, random = matrix.parse(OUTPUT.replace("this kernel has no smart_scan", "needs 4 nodes"))
    assert len(library.wrong_skips) == 1


def test_the_matrix_says_what_happened_on_each_kernel_and_what_can_not() -> None:
    _, random = matrix.parse(OUTPUT)
    guests = {matrix.Guest("6.1", 2): random, matrix.Guest("6.12", 4): random}
    text = matrix.what_happened("random scenarios with a", list(matrix.LEAST), guests)
    assert text[1] == "| random scenarios with a | 6.1 with 2 nodes | 6.12 with 4 nodes |"
    assert "| swap-in | 9 | 9 |" in text
    assert "| zero subpage | - | 0 |" in text
    assert "| offlined block | 20 | - |" in text
    assert "6.1 with 2 nodes, zero subpage: a split gives no zeroes back (6.12)" in text
    assert all(name in matrix.LEAST for lacking in matrix.NEVER.values() for name in lacking)
    assert {*matrix.LEAST, *matrix.LEAST_DOMAINS, matrix.ACROSS} <= {fact.value for fact in Fact}


class TwoNodes(Session):
    """The engine as a guest's kernel is: with two nodes, the second of which can lose memory."""

    @property
    def nodes(self) -> int:
        return 2

    def abilities(self) -> Abilities:
        # prctl came with 6.4.
        return replace(super().abilities(), offline=frozenset({1}), merge=self.profile != "6.1")


def happened(profile: str, count: int, make: Callable[[int, int, Abilities], Scenario]) -> dict[str, int]:
    session = TwoNodes(profile)
    for number in range(count):
        session.run(make(SEED, number, session.abilities()))
    return {fact.value: many for fact, many in session.happened.items()}


def test_few_random_scenarios_of_the_guests_seed_have_everything_that_can_happen() -> None:
    count = RANDOM_SCENARIOS
    for kernel in ("6.1", "6.12"):
        never = matrix.never(kernel, 2)
        assert matrix.too_few(happened(kernel, count, generate), count, matrix.LEAST, never) == []
    apart, across = (partial(generate_domains.generate, mode=mode) for mode in generate_domains.Mode)
    found = happened("6.12", count, apart)
    assert matrix.too_few(found, count, matrix.LEAST_DOMAINS, ["migration"]) == []
    assert matrix.ACROSS not in found
    few = count // matrix.ACROSS_EVERY
    assert matrix.too_few(happened("6.12", few, across), few, {matrix.ACROSS: matrix.LEAST_ACROSS}, ()) == []


def test_the_matrix_leaves_scenarios_to_the_guests_that_can_run_them() -> None:
    two, four = (matrix.commands(nodes, 1, 5, Path("save")) for nodes in (2, 4))
    assert ("nodes-4" in two, "library/offline" in two) == (False, True)
    assert ("nodes-4" in four, "library/offline" in four) == (True, False)
    assert all("--domains" not in words for words in (two, four))


def with_domains(separate: str, across: str, without: str = "nothing", nodes: str = "4") -> list[matrix.Part]:
    happened = "9 fork, 9 huge-page split, 9 migration, 8 refused knob, 9 refused migration, 3 stray page, 9 swap-in"
    happened = happened.replace(f"{without}, ", "")
    totals = f"kernel 6.12.1 with {nodes} nodes and engine 6.12: {{0}} equal, 0 different, 0 skipped\n"
    lines = [totals.format(130)]
    for count, more in ((20, separate), (4, across)):
        lines += [totals.format(count), f"scenarios by what happened in them: {happened}{more}\n"]
    return matrix.parse("".join(lines))


def test_the_matrix_wants_domains_apart_and_frames_across_where_pages_merge_across_nodes() -> None:
    guest = matrix.Guest("6.12", 4, fake=4)
    assert guest.options == ["--kernel", "6.12", "--nodes", "1", "--memory", "2048", "--append", "numa=fake=4U"]
    words = matrix.commands(guest.nodes, 1, 0, Path("save"), 20)
    assert "--count 20 --save save --domains separate; " in words
    assert "--count 4 --save save --domains across; " in words
    assert words.count("--random") == 2
    found = ", 3 frame across domains"
    good = with_domains("", found)
    assert matrix.judged(good, 0, (), 20) == []
    assert matrix.by_kind(good, 0, 20) == [None, *good[1:]]
    assert str(guest) == "6.12 with 4 fake nodes"
    assert matrix.row(guest, good[0], matrix.by_kind(good, 0, 20)).endswith(
        "| 4 fake | 6.12 | 130 equal | 0 | - | - | 20 equal | 0 | 4 equal | 0 |"
    )
    [said] = matrix.judged(with_domains(found, found), 0, (), 20)
    assert "3 of 20 random scenarios with a frame across domains, and none may" in said
    [said] = matrix.judged(with_domains("", ""), 0, (), 20)
    assert said == "only 0 of 4 random scenarios with a frame across domains"
    for nodes, wrong in (("2", []), ("4", ["only 0 of 20 random scenarios with a migration"])):
        assert matrix.judged(with_domains("", found, "9 migration", nodes), 0, (), 20) == wrong
