# SPDX-License-Identifier: GPL-2.0-or-later
"""The documented form of the JSON documents, the example, and what is printed agree."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from ksmd_ctl.errors import ExitCode
from ksmd_ctl.knobs.reconcile import KnobState
from tests.render.reports import CONTRACTS, example

TEXT = (Path(__file__).parents[2] / "docs/json.md").read_text()
WORDS = set(re.findall(r"`([a-z_]+)`", TEXT))


def keys(part: object) -> set[str]:
    if isinstance(part, Mapping):
        return {str(key) for key in part} | {key for inner in part.values() for key in keys(inner)}
    return {key for inner in part for key in keys(inner)} if isinstance(part, list) else set()


def test_every_key_is_documented() -> None:
    report = example()
    named_by_data = {name for part in ("knobs", "readings", "errors", "nodes") for name in report[part]}
    named_by_data |= set(report["daemon"]["tick_lateness"]["within"])
    assert keys(report) - named_by_data - WORDS == set()


@pytest.mark.parametrize(
    "name", ["nodes", "processes", "sharing", "estimate", "migrate", "doctor", "domains", "history"]
)
def test_every_key_of_other_documents_is_documented(name: str) -> None:
    document = json.loads((CONTRACTS / f"{name}.json").read_text())
    # Nodes are named by their numbers, and causes by words.
    assert {key for key in keys(document) if not key.isdigit() and " " not in key} - WORDS == set()


def test_every_state_and_exit_code_is_documented() -> None:
    assert {state.value for state in KnobState} <= WORDS
    assert {f"| {code.value} |" for code in ExitCode} <= {
        line[: line.index("|", 1) + 1] for line in TEXT.splitlines() if line.startswith("| ")
    }
