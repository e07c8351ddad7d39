# SPDX-License-Identifier: GPL-2.0-or-later
"""The tables of recordings, and their description."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

from ksmd_ctl.codec import encode
from ksmd_ctl.recording.schema import FACTS, TABLES, document
from tests.lint.test_lint import ROOT


def test_the_tables_are_in_the_documents() -> None:
    text = (ROOT / "docs/recordings.md").read_text()
    assert "".join(document()).rstrip("\n") in text


def test_every_fact_is_described(made: Path) -> None:
    with sqlite3.connect(made) as database:
        found = {name for (name,) in database.execute("SELECT name FROM fact")}
    assert found == FACTS.keys() - {"service"} | {"service"}
    assert len({table.name for table in TABLES}) == len(TABLES)
    assert json.dumps(encode({"a": 1}))
