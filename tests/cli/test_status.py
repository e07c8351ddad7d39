# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ksmd_ctl.cli import source
from ksmd_ctl.cli.main import main
from ksmd_ctl.errors import ExitCode
from tests.cli.fakes import listening, reply
from tests.fakes.ksmfs import FILES_6_12, FakeKsmFs
from tests.render.reports import example

FORBIDDEN = ("prometheus_client", "psutil", "asyncio", "rich", "pyudev", "systemd", "ctypes", "subprocess", "tomllib")
#: What only looking at the host oneself takes.
HEAVY = ("dataclasses", "inspect", "pathlib", "shutil", "logging", "ksmd_ctl.host", "ksmd_ctl.host.knobs")

PROGRAM = """
import sys
from ksmd_ctl.cli.main import main
code = main(sys.argv[1:])
print(*sorted(sys.modules), file=sys.stderr)
sys.exit(code)
"""


def modules(*words: str) -> set[str]:
    """What a command has imported, in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=False, env={**os.environ}
    )
    assert result.returncode == 0, result.stderr
    return set(result.stderr.splitlines()[-1].split())


def test_status_of_a_service_imports_nothing_of_weight(tmp_path: Path) -> None:
    with listening(tmp_path / "s", lambda request: reply(report=example())):
        found = modules("status", "--socket", str(tmp_path / "s"))
    assert "ksmd_ctl.cli.status" in found
    assert found.isdisjoint(FORBIDDEN + HEAVY)


def test_status_of_the_host_itself_imports_nothing_forbidden(tmp_path: Path) -> None:
    FakeKsmFs(tmp_path)
    found = modules("status", "--socket", str(tmp_path / "s"), "--root", str(tmp_path))
    assert "ksmd_ctl.privileged.host" in found
    assert found.isdisjoint(FORBIDDEN)


class Run:
    """A command line, run in this process."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> dict[str, str]:
        return dict(line.split(maxsplit=1) for line in self.out.replace(f"\n{' ' * 11}", " ").splitlines())


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(source, "REPORT_SECONDS", 0.2)

    def run(*words: str) -> Run:
        code = main([*words, "--socket", str(tmp_path / "s"), "--root", str(tmp_path / "root")])
        captured = capsys.readouterr()
        return Run(code, captured.out, captured.err)

    (tmp_path / "root").mkdir()
    return run


def test_a_service_is_asked(command: Any, tmp_path: Path) -> None:
    with listening(tmp_path / "s", lambda request: reply(report=example())) as requests:
        assert command("status", "--json").json == example()
        assert command("status").lines["held"] == "run 1"
    assert requests[0]["method"] == "io.ksmd-ctl.Status"


def test_without_a_service_the_host_is_looked_at(command: Any, tmp_path: Path) -> None:
    FakeKsmFs(tmp_path / "root", files={**FILES_6_12, "run": "1", "pages_shared": "10", "pages_sharing": "90"})
    found = command("status")
    assert found.code == 0
    assert found.lines["service"].startswith("no service runs")
    assert found.lines["ksm"] == "merging (run = 1)"
    assert found.lines["merged"].startswith("100 pages")
    assert "scan rate unknown" in found.lines["scanning"]
    report = command("status", "--json").json
    assert (report["format"], report["daemon"], report["derived"]["rate_seconds"]) == (1, None, None)


def test_without_a_service_a_figure_of_a_stopped_ksmd_may_be_out_of_date(command: Any, tmp_path: Path) -> None:
    merged = {"pages_shared": "10", "pages_sharing": "90", "general_profit": "300000"}
    FakeKsmFs(tmp_path / "root", files={**FILES_6_12, **merged, "run": "0"})
    found = command("status")
    assert found.lines["saved"].endswith("(may be out of date)")
    assert "may still be counted" in found.lines["stale"]
    assert "two full scans (run = 1)" in found.lines["stale"]
    derived = command("status", "--json").json["derived"]
    assert (derived["stale"], derived["saved_bytes"]) == (None, 300_000)
    assert "may still be counted" in derived["stale_text"]
    doctor = command("doctor", "--no-contents", "--interval", "0.1")
    assert "293.0 KiB saved (may be out of date)" in doctor.out.replace(f"\n{' ' * 11}", " ")
    assert "stale      ksmd is stopped. Pages un-merged since then may still be counted" in doctor.out
    assert "ksm_counters_maybe_stale 1.0" in command("metrics").out
    (tmp_path / "root/sys/kernel/mm/ksm/run").write_text("1\n")
    found = command("status")
    assert "out of date" not in found.out
    assert "ksm_counters_maybe_stale 0.0" in command("metrics").out
    assert command("status", "--json").json["derived"]["stale_text"] == ""


def test_processes_that_ended_while_ksmd_was_stopped_show_without_a_service(command: Any, tmp_path: Path) -> None:
    merged = {"pages_shared": "2", "pages_sharing": "98", "general_profit": "300000"}
    host = FakeKsmFs(tmp_path / "root", files={**FILES_6_12, **merged, "run": "0"}, ksmd_pid=None)
    for pid, pages in ((11, 60), (12, 30)):
        (tmp_path / f"root/proc/{pid}").mkdir(parents=True)
        (tmp_path / f"root/proc/{pid}/ksm_merging_pages").write_text(f"{pages}\n")
    # Where ksmd can't be seen, others can't be either.
    assert command("status", "--json").json["derived"]["stale"] is None
    host.ksmd(37)
    for pid in (1, 2, 37):
        (tmp_path / f"root/proc/{pid}/ksm_merging_pages").write_text("0\n" if pid == 1 else "")
    derived = command("status", "--json").json["derived"]
    assert (derived["stale"], derived["gone_pages"], derived["saved_bytes"]) == (True, 10, None)
    found = command("status")
    assert "10 pages or more of these are not merged any more" in found.lines["stale"]
    assert "unknown" in found.lines["saved"]
    assert "ksm_counters_stale 1.0" in command("metrics").out
    for pid, kib in ((11, 240), (12, 80)):
        (tmp_path / f"root/proc/{pid}/smaps_rollup").write_text(f"Rss: 400 kB\nKSM:   {kib} kB\nPss: 9 kB\n")
    # Page tables show more than counters do: of those that still run some were un-merged, too.
    assert command("status", "--json").json["derived"]["gone_pages"] == 20
    assert "ksm_saved_bytes" not in re.sub(r"^#.*", "", command("metrics").out, flags=re.MULTILINE)
    (tmp_path / "root/proc/13").mkdir()
    (tmp_path / "root/proc/13/ksm_merging_pages").write_text("10\n")
    assert command("status", "--json").json["derived"]["stale"] is None


def test_two_looks_give_a_speed(command: Any, tmp_path: Path) -> None:
    FakeKsmFs(tmp_path / "root")
    found = command("status", "--interval", "0.1", "--json").json
    assert found["derived"]["pages_scanned_per_second"] == 0
    assert found["derived"]["rate_seconds"] > 0


def test_the_document_of_a_host_has_the_form_of_the_example(command: Any, tmp_path: Path) -> None:
    FakeKsmFs(tmp_path / "root")
    found = command("status", "--json").json
    expected = example()
    assert found.keys() == expected.keys()
    for part in ("host", "derived"):
        assert found[part].keys() == expected[part].keys()
    assert found["knobs"]["run"].keys() == expected["knobs"]["run"].keys()
    assert found["nodes"]["0"].keys() == expected["nodes"]["0"].keys()


def test_the_simulated_host_says_so(command: Any) -> None:
    found = command("status", "--host", "engine")
    assert "SIMULATED" in found.lines["host"]
    assert command("status", "--host", "engine", "--json").json["host"]["simulated"] is True


def test_the_host_that_was_named_is_shown(command: Any, tmp_path: Path) -> None:
    FakeKsmFs(tmp_path / "root", files={**FILES_6_12, "run": "2"})
    report = example()
    report["host"] |= {"kind": "engine", "simulated": True}
    with listening(tmp_path / "s", lambda request: reply(report=report)):
        found = command("status", "--host", "kernel")
    assert "runs on the engine" in found.lines["service"]
    assert found.lines["host"].startswith("this machine")


def test_no_ksm_in_the_kernel(command: Any, tmp_path: Path) -> None:
    FakeKsmFs(tmp_path / "root", files=None)
    found = command("status")
    assert (found.code, found.out) == (ExitCode.LACKING, "")
    first, second = found.err.splitlines()
    assert first == "ksmd-ctl: looking at KSM: this kernel doesn't have it"
    assert second.startswith("hint: ")


def test_a_garbage_file_is_unparsable_and_the_rest_is_shown(command: Any, tmp_path: Path) -> None:
    FakeKsmFs(tmp_path / "root", files={**FILES_6_12, "pages_sharing": "many", "advisor_mode": "none scan-time"})
    found = command("status")
    assert found.code == 0
    assert found.lines["merged"] == "unknown (unparsable)"
    assert found.lines["ksm"] == "stopped (run = 0)"
    report = command("status", "--json").json
    for name in ("pages_sharing", "advisor_mode"):
        assert report["errors"][name]["kind"] == "unparsable"
        assert name not in report["readings"]
    assert report["derived"]["merged_pages"] is None
    assert report["readings"]["run"] == 0


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (None, "no answer within"),
        (b"\x7fELF\0", "not JSON"),
        (b"220 mail ESMTP\r\n", "hung up"),
        (reply(report=1), "its answer has no report"),
        (reply(report={"host": 1}), "its answer has no report"),
        (reply(), "its answer has no report"),
    ],
)
@pytest.mark.parametrize("words", [("status",), ("status", "--json"), ("metrics", "--host", "kernel")])
def test_something_else_on_the_socket(
    command: Any, tmp_path: Path, answer: bytes | None, why: str, words: tuple[str, ...]
) -> None:
    with listening(tmp_path / "s", None if answer is None else lambda request: answer):
        found = command(*words)
    assert (found.code, found.out) == (ExitCode.UNREACHABLE, "")
    assert str(tmp_path / "s") in found.err
    assert why in found.err


def test_no_line_is_wider_than_100_columns(command: Any, tmp_path: Path) -> None:
    report = example()
    report["daemon"]["reload_error"] = "many words " * 30
    with listening(tmp_path / "s", lambda request: reply(report=report)):
        found = command("status", "--explain").out.splitlines()
    assert max(map(len, found)) <= 100
    assert sum(line.startswith(" " * 11 + "many words") for line in found) >= 3


def test_a_service_that_may_not_be_asked(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeKsmFs(tmp_path / "root")

    def denied(self: object, path: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("socket.socket.connect", denied)
    assert "no permission to query the service (EACCES" in command("status").lines["service"]
    for words in (["set", "run=0"], ["collapse", "--pid", "1"], ["unmerge", "--pid", "1"]):
        refused = command(*words)
        assert refused.code == ExitCode.DENIED
        assert "a member of the group of the socket" in refused.err


def test_metrics(command: Any, tmp_path: Path) -> None:
    FakeKsmFs(tmp_path / "root", files={**FILES_6_12, "general_profit": "-4096"})
    found = command("metrics")
    assert "\nksm_profit_bytes -4096.0\n" in found.out
    assert "ksmd_ctl_ticks" not in found.out
    with listening(tmp_path / "s", lambda request: reply(text="ksm_run 1.0\n")):
        assert command("metrics").out == "ksm_run 1.0\n"
        assert command("metrics", "--json").json == {"format": 1, "text": "ksm_run 1.0\n"}


def test_metrics_that_are_no_text(command: Any, tmp_path: Path) -> None:
    with listening(tmp_path / "s", lambda request: reply(text=1)):
        found = command("metrics")
    assert (found.code, found.out) == (ExitCode.UNREACHABLE, "")
    assert "no text" in found.err
