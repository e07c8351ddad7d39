# SPDX-License-Identifier: GPL-2.0-or-later
"""``set`` and ``unmerge`` as somebody types them: plans, changes, refusals, with a service and without."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ksmd_ctl.cli import host as cli_host
from ksmd_ctl.cli import unmerge
from ksmd_ctl.cli.change import local
from ksmd_ctl.cli.main import main
from ksmd_ctl.config.model import SETTINGS_BY_KEY
from ksmd_ctl.engine.host import EngineHost
from ksmd_ctl.host.memory import Losses
from tests.fakes.ksmfs import FakeKsmFs
from tests.service.running import LIMIT_SECONDS, PROGRAM, until


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*words: str) -> tuple[int, str, str]:
        code = main([*words, "--host", "engine", "--socket", str(tmp_path / "none")])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_the_default_place_of_the_journal() -> None:
    assert SETTINGS_BY_KEY["service", "state_directory"].default == cli_host.STATE_DIRECTORY
    assert SETTINGS_BY_KEY["service", "runtime_directory"].default == cli_host.RUNTIME_DIRECTORY


def test_a_plan(command: Any) -> None:
    code, out, err = command("set", "merge_across_nodes=0", "--dry-run")
    assert (code, err) == (0, "")
    assert out.startswith("change     merge_across_nodes 1 -> 0\nstep 1     stop ksmd (run = 0)\n")
    assert "room       on the host it takes " in out
    assert re.search(
        r"^home       [\d.]+ % of [\d,]+ pages are on their home node now; a plain run = 2 could move", out, re.M
    )
    assert out.endswith("verdict    there is room for it\n")
    code, out, _ = command("set", "merge_across_nodes=0", "--dry-run", "--json")
    document = json.loads(out)
    assert (code, document["fits"], document["unmerge"]) == (0, True, True)
    assert document["knobs"] == {"merge_across_nodes": {"from": 1, "to": 0}}


def test_there_is_room_on_a_simulated_node_above_the_default_floor(command: Any) -> None:
    code, out, _ = command("migrate", "--pid", "1000", "--to", "1", "--dry-run")
    assert code == 0
    assert re.search(r"3\d\d\.\d MiB free on node 1 above the floor", out)
    code, out, _ = command("unmerge", "--pid", "1000", "--dry-run")
    assert code == 0
    assert "are free above the floor" in out


def test_a_change(command: Any) -> None:
    code, out, err = command("set", "merge_across_nodes=0", "--json")
    document = json.loads(out)["transaction"]
    assert (code, document["result"]) == (0, "done")
    assert document["home"]["after"]["ratio"] == 1.0 > document["home"]["before"]["ratio"]
    code, out, err = command("set", "merge_across_nodes=0")
    assert "at home" in out
    assert "un-merging page by page" in err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "it names no knob"),
        (["run"], "'run' is not KNOB=VALUE"),
        (["running=1"], "there is no knob 'running'"),
        (["run=1", "run=0"], "run is given twice"),
        (["run=3"], "run: 3 is not between 0 and 2"),
        (["--recover", "run=1"], "--recover takes no other option"),
        (["run=2", "pages_to_scan=5"], "it un-merges everything, so it stands alone"),
        (["run=1", "--wait", "nan"], "is not a number of seconds from 0 to 86400"),
    ],
)
def test_what_can_not_be_meant(command: Any, words: list[str], why: str) -> None:
    code, out, err = command("set", *words)
    assert (code, out) == (2, "")
    assert why in err


def test_one_process_alone(command: Any) -> None:
    code, out, _ = command("unmerge", "--pid", "1000", "--dry-run", "--json")
    document = json.loads(out)
    assert code == 0
    (process,) = document["processes"]
    assert process["merged"] > 0 == process["unshared"]
    code, out, _ = command("unmerge", "--pid", "1000", "--json")
    document = json.loads(out)
    assert (code, document["merges_again"]) == (0, True)
    (process,) = document["processes"]
    assert process["unshared"] == process["merged"] > 0
    assert "huge_pages_split" in document
    code, _, err = command("unmerge", "--pid", "4")
    assert (code, "there is no process 4" in err) == (2, True)
    code, _, err = command("unmerge", "--pid", "1000", "--to", "9")
    assert (code, "there is no such node" in err) == (2, True)


@pytest.mark.parametrize(
    ("changes", "hinted"),
    [
        ({}, True),
        ({"merges_again": True}, False),
        ({"huge_pages_split": False}, False),
        ({"dry_run": True}, False),
        # Nothing was merged there, so merging has split nothing.
        ({"processes": [{"pid": 4, "name": "a", "merged": 0, "unshared": 0}]}, False),
    ],
)
def test_where_huge_pages_were_split_un_merging_names_how_they_come_back(
    changes: dict[str, object], hinted: bool
) -> None:
    processes = [{"pid": 4, "name": "a", "merged": 9, "unshared": 9}]
    document = {"merges_again": False, "huge_pages_split": True, "dry_run": False, "fits": True, "processes": processes}
    said = [line.text for line in unmerge.lines({**document, **changes})]
    assert any("ksmd-ctl collapse" in line for line in said) == hinted


@pytest.mark.parametrize(("kills", "expected"), [({}, 0), ({"host": 1}, 1)])
def test_what_the_oom_killer_did_meanwhile_is_in_the_exit_code(
    command: Any, monkeypatch: pytest.MonkeyPatch, kills: dict[str, int], expected: int
) -> None:
    counts = iter([{}, kills])
    monkeypatch.setattr(
        EngineHost, "losses", lambda self, processes, cgroups: Losses({"host": 5 + next(counts).get("host", 0)})
    )
    code, out, _ = command("set", "merge_across_nodes=0")
    assert (code, "the OOM killer killed 1 process on this host meanwhile" in out) == (expected, bool(expected))


class Service:
    """A service on a simulated host; its files are below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.config = folder / "ksmd-ctl.toml"
        self.config.write_text(
            "policy = 'fixed'\n[knobs]\nrun = 1\nsleep_millisecs = 21\n[limits]\nfloor_bytes = 16777216\n[service]\n"
            f"socket = '{folder}/socket'\nstate_directory = '{folder}'\nruntime_directory = '{folder}'\n"
            "metrics_listen = ''\nsample_interval = 0.2\n"
        )
        self.process = subprocess.Popen(
            [PROGRAM, "daemon", "--host", "engine", "--config", str(self.config)], stderr=subprocess.PIPE, text=True
        )
        self.socket = str(folder / "socket")

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [PROGRAM, *words, "--socket", self.socket], capture_output=True, text=True, timeout=60, check=False
        )

    def report(self) -> dict[str, Any] | None:
        done = self.command("status", "--json")
        report: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
        return report if report.get("daemon") else None

    def merged(self) -> bool | None:
        report = self.report()
        return True if report is not None and (report["derived"]["merged_pages"] or 0) > 3000 else None


def test_by_the_service(tmp_path: Path) -> None:
    running = Service(tmp_path)
    try:
        until("something to be merged", running.merged)
        done = running.command("set", "merge_across_nodes=0", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["transaction"]["result"] == "done"
        refused = running.command("set", "sleep_millisecs=5")
        assert refused.returncode == 6
        assert f"the configuration declares 21 ({running.config})" in refused.stderr
        assert running.command("set", "max_page_sharing=100", "--dry-run", "--json").returncode == 0

        # What was set and isn't declared stays; what the transaction did meanwhile was no drift.
        def afterwards() -> dict[str, Any] | None:
            # The sample that it shows may be from before the transaction's last step.
            report = running.report()
            return report if report is not None and report["readings"]["merge_across_nodes"] == 0 else None

        report = until("a sample from after the transaction", afterwards)
        assert report["readings"]["run"] == 1
        assert report["knobs"]["run"]["drift_total"] == 0
        assert report["transaction"]["totals"]["done"] == 1
        assert report["transaction"]["running"] is None
        metrics = running.command("metrics").stdout
        assert 'ksmd_ctl_transactions_total{result="done"} 1.0' in metrics
        assert "ksmd_ctl_transaction_running 0.0" in metrics
        # Without the service, but with its lock.
        done = subprocess.run(
            [PROGRAM, "set", "run=0", "--config", str(running.config), "--socket", str(tmp_path / "none")],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 6
        assert f"ksmd-ctl daemon (pid {running.process.pid}) holds" in done.stderr
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(LIMIT_SECONDS) == 0
    finally:
        running.process.kill()
        assert running.process.stderr is not None
        running.process.stderr.close()


def test_a_damaged_journal_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "c.toml"
    config.write_text(f"[service]\nruntime_directory = '{tmp_path}/run'\nstate_directory = '{tmp_path}'\n")
    found = tmp_path / "found-kernel.json"
    found.write_text("nothing")
    FakeKsmFs(tmp_path / "root")
    with local("kernel", str(tmp_path / "root"), str(config), "a test", change=True):
        pass
    damaged = f"{found} could not be understood and was put aside as {found}.damaged"
    assert capsys.readouterr().err == f"ksmd-ctl: {damaged}\n"
