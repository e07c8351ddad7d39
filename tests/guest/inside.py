# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests and commands that run inside a guest: one boot for all that is to be known of a kernel and its nodes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUN = ROOT / "tests/guest/run"
PYTEST = ("python", "-m", "pytest", "-p", "no:cacheprovider")


def inside(*words: str, environment: Mapping[str, str] | None = None) -> list[str]:
    """The command that has pytest run in a guest. Nothing may be skipped there, for there everything is."""
    variables = [f"{name}={value}" for name, value in (environment or {}).items()]
    return ["env", "KSMD_CTL_FORCE=1", *variables, *PYTEST, *words]


def run_inside(
    kernel: str,
    nodes: int,
    *words: str,
    options: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
    timeout_seconds: int = 900,
) -> str:
    """pytest with these words in a guest of its own; its output.

    :param options: of tests/guest/run
    :param environment: for the tests
    :raises AssertionError: a test failed, or the guest was lost
    """
    guest = [str(RUN), "--kernel", kernel, "--nodes", str(nodes), "--timeout", str(timeout_seconds), *options]
    command = [*guest, "--", *inside("-q", *words, environment=environment)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    return result.stdout


@dataclass(frozen=True)
class Boot:
    """What came of the jobs of one guest."""

    folder: Path
    runner: subprocess.CompletedProcess[bytes]

    def said(self, job: str) -> str:
        """What a job said, if it was begun and ended well."""
        out, status = self.folder / f"{job}.out", self.folder / f"{job}.status"
        text = out.read_text() if out.exists() else ""
        assert status.exists(), f"{job} did not come to its end:\n{text[-4000:]}\n{self.runner.stderr.decode()}"
        assert int(status.read_text()) == 0, text[-8000:]
        return text

    def passed(self, file: str) -> int:
        """How many of a file's tests have passed, none having failed."""
        path = self.folder / "reports"
        lines = path.read_text().splitlines() if path.exists() else []
        found = [report for report in map(json.loads, lines) if report["test"].startswith(file)]
        failed = [
            f"{report['test']}: {report['outcome']}\n{report['text']}"
            for report in found
            if report["outcome"] != "passed"
        ]
        assert not failed, "\n\n".join(failed)
        return len(found)


def boot(
    folder: Path,
    kernel: str,
    nodes: int,
    jobs: Mapping[str, Sequence[str]],
    tests: Sequence[str],
    options: Sequence[str] = (),
    last: Sequence[str] = ("true",),
    environment: Mapping[str, str] | None = None,
) -> Boot:
    """Boot a guest for some commands, for the tests of some files, and for a last command, in this order.

    :param folder: an empty one, which the guest writes to
    :param tests: words for pytest
    :param options: of tests/guest/run
    """
    reporting = ("-p", "tests.guest.reports", "--reports", str(folder / "reports"), "--durations=0", "-s")
    every = {**jobs, "tests": inside("-v", *reporting, *tests, environment=environment)}
    (folder / "jobs.json").write_text(json.dumps(every))
    words = ["--kernel", kernel, "--nodes", str(nodes), "--timeout", "3000", "--share", str(folder), *options]
    done = subprocess.run(
        [sys.executable, RUN, *words, "--", "python3", "tests/guest/jobs.py", str(folder), *last],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    return Boot(folder, done)
