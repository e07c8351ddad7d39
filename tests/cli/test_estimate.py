# SPDX-License-Identifier: GPL-2.0-or-later
"""estimate: its document, what people read, its options, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ksmd_ctl.cli import estimate
from ksmd_ctl.cli.main import main
from ksmd_ctl.errors import Denied, ExitCode
from ksmd_ctl.host.estimate import Contents, Estimate, PageKind, Rules, SampledPages, Stability, Stage
from ksmd_ctl.host.merging import estimate as told
from ksmd_ctl.host.sample import HostIdentity, HostKind, Sample
from ksmd_ctl.host.sampling import Bounds
from ksmd_ctl.kernel.estimate_targets import Target
from ksmd_ctl.kernel.proc_pid import LeftOut
from ksmd_ctl.reports.estimate import LookedAt, estimate_document, ksmd_cost
from tests.cli.test_numa import contract, shape
from tests.fakes.host import process

IDENTITY = HostIdentity(HostKind.KERNEL, "6.12-fake", 4096, "boot-1")
PROCESSES = [process(pid, f"web-{pid}", 0) for pid in (1, 2)]
RULES = Rules(256, nodes=2)
NOTHING_CHANGED = Stability()
BY = ("unit", "process")


def found(share: float = 1.0, *, stable: Stability | None = NOTHING_CHANGED, more: bool = True) -> Estimate:
    """A thousand contents that both have, on one node, fifty on two, fifty more unmarked, and zeroes."""
    kinds = [
        PageKind(0, (0,)),
        PageKind(0, (1,)),
        PageKind(1, (1,)),
        PageKind(0, (1,), marked=False),
        PageKind(0, (0,), split_frees=True),
    ]
    sets = {((0, 1), (1, 1)): 1000, ((0, 1), (2, 1)): 50, ((0, 1), (3, 1)): 50}
    mapped = {(0, True): 2000, (1, True): 2000, (1, False): 50}
    contents = Contents(kinds, sets, share, zeroes={0: 100, 4: 300})
    return told(contents, mapped, RULES, 2, more=more, domain_of=["a", "b"], stable=stable)


def document(one: Estimate, **changes: Any) -> dict[str, object]:
    looked = LookedAt(PROCESSES, RULES, 0.5, 10.0, 12.0, 3.0, domains=["a", "b"])
    return estimate_document(IDENTITY, one, replace(looked, **changes), ())


def text(one: Mapping[str, object], by: str = "unit") -> str:
    return "\n".join(estimate.lines(one, by))


def test_the_document_has_the_form_of_the_example() -> None:
    one = json.loads(json.dumps(document(found(), left_out={9: "it keeps its readers waiting"})))
    assert shape(one) == shape(contract("estimate"))


def test_figures_fit_together() -> None:
    one = json.loads(json.dumps(document(found())))
    across, across_zero, apart, apart_zero = one["outcomes"]
    assert [outcome["current"] for outcome in one["outcomes"]] == [True, False, False, False]
    # Equal contents, plain zeroes but one, and those that splits free.
    assert across["freed_bytes"] == (1050 + 99 + 300) * 4096
    assert across_zero["freed_bytes"] == (1050 + 100 + 300) * 4096
    assert apart["freed_bytes"] == (1000 + 99 + 300) * 4096
    assert apart_zero["freed_bytes"] == (1000 + 100 + 300) * 4096
    assert across["records_bytes"] == (4000 - 300) * 64
    assert across_zero["records_bytes"] == (4000 - 400) * 64
    assert across["saved_bytes"] == across["freed_bytes"] - across["records_bytes"] == across["saved_low_bytes"]
    assert sum(unit["saved_bytes"] for unit in one["units"]) == across["saved_bytes"]
    assert sum(domain["saved_bytes"] for domain in one["domains"]) == across["saved_bytes"]
    more = one["outcomes_with_unmarked"][0]
    assert more["freed_bytes"] - across["freed_bytes"] == 50 * 4096
    assert sum(unit["saved_with_unmarked_bytes"] for unit in one["units"]) == more["saved_bytes"]
    # Alone each has nothing but its zeroes.
    assert [domain["saved_apart_bytes"] for domain in one["domains"]] == [
        (99 + 300) * 4096 - (2000 - 300) * 64, -2000 * 64
    ]  # fmt: skip
    assert one["look"]["complete"] is True


def test_a_part_of_contents_has_an_interval() -> None:
    one = json.loads(json.dumps(document(found(0.5))))
    across = one["outcomes"][0]
    assert across["saved_low_bytes"] < across["saved_bytes"] < across["saved_high_bytes"]
    assert one["look"]["complete"] is False
    assert "50.0 % of contents kept" in text(one)


def test_what_changed_is_left_out() -> None:
    stable = Stability(Bounds(0.9, 0.8, 0.95), owners={0: 0.5})
    one = json.loads(json.dumps(document(found(stable=stable))))
    assert one["outcomes"][0]["freed_bytes"] == round((0.9 * 1050 + 99 + 300) * 4096)
    assert one["look"]["unchanged_share"] == 0.9
    assert "10.0 % of that changed within 10 s and is left out" in text(one)


def test_before_everything_was_read_nobody_has_a_part() -> None:
    pages = SampledPages(Counter(range(100)), Counter({(number, 0): 1 for number in range(100)}), Counter({False: 9}))
    one = Estimate(Stage.SAMPLE, 0.1, 1.0, 4000, 0, pages.outcomes(0.1, 4000, RULES))
    shown = document(one, interrupted=True)
    assert (shown["processes"], shown["units"], shown["domains"]) == ([], [], None)
    said = text(json.loads(json.dumps(shown)))
    assert "whose part it is, is known once everything was read" in said
    assert "interrupted, from a sample of 10.0 % of all pages" in said


def test_processes_that_ended_are_named() -> None:
    shown = json.loads(json.dumps(document(found(stable=NOTHING_CHANGED), gone=[7, 9])))
    assert "2 processes ended meanwhile and are left out: pid 7, 9" in text(shown)
    read = replace(found(), stage=Stage.READ)
    once = json.loads(json.dumps(document(read, gone=[7])))
    assert "1 process ended meanwhile; what was read of it is counted: pid 7" in text(once)
    assert "nobody is left whose memory is marked mergeable" in text({**shown, "marked_bytes": 0})


def test_where_everything_was_read_and_nobody_has_memory_no_part_is_awaited() -> None:
    shown = json.loads(json.dumps(document(found())))
    assert "is known once" not in text({**shown, "units": [], "processes": []})


def test_lines() -> None:
    shown = json.loads(json.dumps(document(found(), left_out={9: "it keeps its readers waiting"})))
    for by in BY:
        said = text(shown, by)
        assert "merging would save" in said
        assert "with 200.0 KiB more that nobody has marked mergeable:" in said
        assert "1 process could not be looked at: pid 9 (it keeps its readers waiting)" in said
        assert "if kept apart" in said
        assert all(len(line) <= 100 for line in said.splitlines() if "ksmd would take" not in line)
    assert "[1]" in text(shown, "process")
    heads = {by: [line.split()[0] for line in text(shown, by).splitlines() if " marked  " in line] for by in BY}
    assert heads == {"unit": ["group", "domain"], "process": ["process", "domain"]}
    assert "SIMULATED" not in text(shown)
    nothing = {**shown, "marked_bytes": 0, "outcomes_with_unmarked": None}
    assert "no memory is marked mergeable; --all" in text(nothing)


def test_where_nothing_is_marked_it_tells_no_cost() -> None:
    nothing = told(Contents([], {}), {}, RULES, 0, domain_of=[], stable=Stability())
    looked = LookedAt([], RULES, 0.5, 0.0, 0.1, 0.05)
    shown = json.loads(json.dumps(estimate_document(IDENTITY, nothing, looked, ())))
    assert text(shown).splitlines() == [
        "0 processes: no memory is marked mergeable; --all looks at memory that is not marked, too",
        "all pages read, 0.1 s of CPU in 0.1 s",
    ]
    assert shown["ksmd"]["first_cpu_seconds"] == shown["ksmd"]["scan_cpu_seconds"] == 0


def test_ksmds_cost_is_measured_where_it_runs() -> None:
    (outcome,) = [one for one in found().outcomes if one.merge_across_nodes and not one.use_zero_pages]
    calculated = ksmd_cost(outcome, ())
    assert not calculated.measured
    # A page that is not merged costs more than one that is.
    assert 0.3e-6 < calculated.page_cpu_seconds < 5e-6
    assert calculated.first_cpu_seconds > calculated.scan_cpu_seconds
    # To merge a page takes half of what one takes that stays: here of 100,000 nothing is merged, or everything.
    apart, merged = (
        ksmd_cost(replace(outcome, items=100_000, pages_shared=shared, pages_sharing=sharing, split_zero_pages=0), ())
        for shared, sharing in ((0, 0), (50_000, 50_000))
    )
    assert (apart.first_cpu_seconds, merged.first_cpu_seconds) == (pytest.approx(0.83, 0.02), pytest.approx(0.53))
    assert (apart.scan_cpu_seconds, merged.scan_cpu_seconds) == (pytest.approx(0.65, 0.02), pytest.approx(0.033))
    # Zeroes have to be read and merged before they are gone.
    zeroes = ksmd_cost(replace(outcome, items=0, pages_shared=0, pages_sharing=0, zero_pages=1000), ())
    assert zeroes.first_cpu_seconds > 5e-3
    samples = [Sample(at, {"pages_scanned": 1_000_000 * at, "ksmd_cpu_seconds": 4.0 * at}, {}) for at in (1.0, 2.0)]
    measured = ksmd_cost(outcome, samples)
    assert (measured.measured, measured.page_cpu_seconds) == (True, 4e-6)
    # Measured is measured, however slow the look was; what is calculated is as much slower.
    assert ksmd_cost(outcome, samples, 3.9e-6).scan_cpu_seconds == measured.scan_cpu_seconds
    slower = ksmd_cost(outcome, (), 3.9e-6)
    assert slower.page_cpu_seconds == pytest.approx(2 * calculated.page_cpu_seconds)
    assert slower.first_cpu_seconds == pytest.approx(2 * calculated.first_cpu_seconds)
    few = [Sample(at, {"pages_scanned": 100 * at, "ksmd_cpu_seconds": 4.0 * at}, {}) for at in (1.0, 2.0)]
    assert not ksmd_cost(outcome, few).measured
    # The first pass takes no less than a later one.
    slow = [Sample(at, {"pages_scanned": 1_000_000 * at, "ksmd_cpu_seconds": 40.0 * at}, {}) for at in (1.0, 2.0)]
    assert ksmd_cost(outcome, slow).first_cpu_seconds == ksmd_cost(outcome, slow).scan_cpu_seconds


@pytest.mark.parametrize(
    "words",
    [
        ["--cpu", "0"], ["--cpu", "1.5"], ["--cpu", "-1"], ["--cpu", "nan"], ["--cpu", "half"], ["--cpu", "\u0660.5"],
        ["--interval", "-1"], ["--interval", "4000"], ["--interval", "1e3"], ["--pid", "0"], ["--pid", "one"],
        ["--pid", "1", "--unit", "a"], ["--by", "domain"], ["--unit="], ["--unit", ""], ["--config="],
    ],
)  # fmt: skip
def test_what_makes_no_sense(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--host", "engine", *words]) == ExitCode.USAGE
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 2)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--cpu", "1e-3"], "'1e-3' is not a share from 0.001 to 1, written with digits alone, as 0.25"),
        (["--cpu", "1.5"], "'1.5' is not a share from 0.001 to 1"),
        (["--interval", "1e3"], "'1e3' is not a number of seconds from 0 to 3600, written with digits alone, as 0.25"),
        (["--unit="], "argument --unit: the value is empty"),
    ],
)
def test_it_says_what_is_wrong_with_a_value(words: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--host", "engine", *words]) == ExitCode.USAGE
    assert capsys.readouterr().err.splitlines()[0].endswith(why)


def test_without_root_it_says_what_can_be_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(["estimate"]) == ExitCode.DENIED
    out, err = capsys.readouterr()
    assert out == ""
    first, second = err.splitlines()
    assert "only root may compare" in first
    assert "status" in second


def test_a_unit_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--host", "engine", "--unit", "web-99"]) == ExitCode.REFUSED
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("no process of unit web-99 has mergeable memory")
    assert "web-1" in second


def test_one_unit_of_the_simulated_host(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--host", "engine", "--unit", "machine-qemu-web-1.scope", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert [unit["group"] for unit in one["units"]] == ["web-1"]
    assert one["look"]["only"] == "unit machine-qemu-web-1.scope"
    assert main(["estimate", "--host", "engine", "--unit", "web-1", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert (listed["units"], listed["outcomes"]) == (one["units"], one["outcomes"])
    assert main(["estimate", "--host", "engine"]) == 0
    assert capsys.readouterr().out.startswith("SIMULATED")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to read others' memory")
@pytest.mark.parametrize("json_", [True, False])
def test_ctrl_c_prints_the_best_so_far(json_: bool, tmp_path: Path) -> None:
    """At the second look, for which it waits; with nothing known yet there is nothing to print."""
    load = "import sys; data = [b'%d' % (n % 50) * 4000 for n in range(3000)]; print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", load], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        words = ["estimate", "--all", "--pid", str(other.pid), "--interval", "600", *(["--json"] if json_ else [])]
        command = [sys.executable, "-m", "ksmd_ctl.cli.main", *words]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as ours:
            try:
                waiting = Path(f"/proc/{ours.pid}")
                until, before = time.monotonic() + 60, ""
                # It waits once its CPU time stands still.
                while time.monotonic() < until:
                    time.sleep(0.5)
                    stat = (waiting / "stat").read_text().rpartition(")")[2].split()
                    if before == stat[11] and int(stat[11]):
                        break
                    before = stat[11]
                ours.send_signal(signal.SIGINT)
                out, err = ours.communicate(timeout=60)
            finally:
                ours.kill()
                other.kill()
    assert ours.returncode == ExitCode.INTERRUPTED
    assert err == ""
    if json_:
        look = json.loads(out)["look"]
        assert (look["interrupted"], look["stage"]) == (True, "read")
    else:
        assert "interrupted, all pages read" in out


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to read others' memory")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("drawn", [256, 0])
def test_interrupted_in_the_sample_it_prints_the_figures_of_that(
    number: signal.Signals, drawn: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where one process could not be looked at. Where no other could either, that is the error."""
    pages = SampledPages(Counter(range(100)), Counter({(number, 0): 1 for number in range(100)}))

    class Look:
        pages, read, gone, interval_seconds, page_cpu_seconds = 4000, 0, frozenset[int](), 10.0, None

        def __init__(self, *_: object, left_out: LeftOut, **__: object) -> None:
            self.drawn = drawn
            left_out.errors[1] = Denied("process 1", "/proc/1/smaps can't be read: EACCES")

        def estimates(self) -> Iterator[Estimate]:
            yield Estimate(Stage.SAMPLE, 0.1, 1.0, 4000, 0, pages.outcomes(0.1, 4000, RULES))
            signal.raise_signal(number)

    monkeypatch.setattr("ksmd_ctl.kernel.estimate.Look", Look)
    targets = [Target(one, 0, ()) for one in PROCESSES]
    monkeypatch.setattr("ksmd_ctl.kernel.estimate_targets.find_targets", lambda *_, **__: targets)
    before = signal.getsignal(number)
    code = main(["estimate", "--all"])
    out, err = capsys.readouterr()
    assert signal.getsignal(number) is before
    if not drawn:
        assert (code, out) == (ExitCode.DENIED, "")
        return
    assert (code, err) == (ExitCode.INTERRUPTED, "")
    assert out.startswith("merging would save ")
    assert "1 process could not be looked at: pid 1 (" in out
    assert "interrupted, from a sample of 10.0 % of all pages" in out


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to read others' memory")
def test_interrupted_before_there_is_a_figure_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Look:
        pages, read = 4000, 0

        def __init__(self, *_: object, **__: object) -> None:
            pass

        def estimates(self) -> Iterator[Estimate]:
            signal.raise_signal(signal.SIGINT)
            yield from ()

    monkeypatch.setattr("ksmd_ctl.kernel.estimate.Look", Look)
    targets = [Target(one, 0, ()) for one in PROCESSES]
    monkeypatch.setattr("ksmd_ctl.kernel.estimate_targets.find_targets", lambda *_, **__: targets)
    assert main(["estimate", "--all"]) == ExitCode.INTERRUPTED
    assert capsys.readouterr() == (
        "",
        "interrupted before there was a figure\n",
    )


def test_time_passes_on_the_simulated_host(capsys: pytest.CaptureFixture[str]) -> None:
    looks = {}
    for interval in ("0", "10", "30"):
        assert main(["estimate", "--host", "engine", "--interval", interval, "--json"]) == 0
        looks[interval] = json.loads(capsys.readouterr().out)["look"]
    assert [one["interval_seconds"] for one in looks.values()] == [0, 10, 30]
    assert [one["stage"] for one in looks.values()] == ["read", "final", "final"]
    assert looks["0"]["unchanged_share"] is None
    # Its guests write all the time.
    assert 1 > looks["10"]["unchanged_share"] > looks["30"]["unchanged_share"] > 0.9


def test_domains_of_the_simulated_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its guests are virtual machines. A domain to which nobody belongs is told."""
    config = tmp_path / "c.toml"
    config.write_text('[domains.gold]\nmachines = ["web-*"]\n[domains.silver]\nunits = ["none.service"]\n')
    words = ["estimate", "--host", "engine", "--config", str(config)]
    assert main([*words, "--json"]) == 0
    found = {one["domain"]: one["processes"] for one in json.loads(capsys.readouterr().out)["domains"]}
    assert (found["gold"], found["silver"], found["db-1"]) == (3, 0, 1)
    assert main(words) == 0
    assert "no process that was looked at belongs to silver (docs/domains.md)" in capsys.readouterr().out
    # Of others nothing was asked.
    assert main([*words, "--unit", "web-1", "--json"]) == 0
    assert [one["domain"] for one in json.loads(capsys.readouterr().out)["domains"]] == ["gold"]


def test_the_example_in_the_documents_is_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs/estimate.md").read_text()
    command, *shown = text.partition("```console\n")[2].partition("\n...\n")[0].splitlines()
    assert command == "# ksmd-ctl estimate --host engine"
    assert main(command.split()[2:]) == 0
    assert capsys.readouterr().out.splitlines()[: len(shown)] == shown
