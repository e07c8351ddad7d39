# SPDX-License-Identifier: GPL-2.0-or-later
"""A plugin of pytest: each test's result goes to a file as it comes, so that it is there if the guest is lost later."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--reports", type=Path, help="the file; one line of JSON for each test, and for what failed beside"
    )


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Reports(config.getoption("--reports")))


class _Reports:
    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._write(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome != "passed":
            self._write(report)

    def _write(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        found = {"test": report.nodeid, "outcome": report.outcome, "text": report.longreprtext}
        with self.path.open("a") as file:
            file.write(json.dumps(found) + "\n")
