# SPDX-License-Identifier: GPL-2.0-or-later
"""The message catalogue (``journalctl -x``): every event is explained, with fields that it really has."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ksmd_ctl.daemon.log import Event
from tests.packaging.building import ROOT

CATALOG = ROOT / "packaging/journal/ksmd-ctl.catalog"


def entries() -> dict[str, str]:
    """Header and text of each entry, by its number."""
    parts = re.split(r"^-- ([0-9a-f]{32})$", CATALOG.read_text(), flags=re.MULTILINE)[1:]
    numbers = parts[::2]
    assert len(set(numbers)) == len(numbers)
    return dict(zip(numbers, parts[1::2], strict=True))


def fields() -> dict[str, list[set[str]]]:
    """The fields of each call that logs an event, by the event's name; of those that can be told from the code."""
    found: dict[str, list[set[str]]] = {}
    for path in (ROOT / "ksmd_ctl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "event":
                named = {f"KSMD_{word.arg.upper()}" for word in node.keywords if word.arg}
                first = node.args[0]
                name = first.attr if isinstance(first, ast.Attribute) else ""
                found.setdefault(name, []).append(named)
    return found


def test_every_event_is_explained() -> None:
    found = entries()
    assert found.keys() == {event.value for event in Event}
    for number, entry in found.items():
        head, _, text = entry.strip().partition("\n\n")
        assert re.search(r"^Subject: \S", head, re.MULTILINE), number
        assert re.search(r"^Defined-By: ksmd-ctl$", head, re.MULTILINE), number
        assert text.strip(), number


def test_it_asks_for_fields_that_the_event_has() -> None:
    logged = fields()
    for number, entry in entries().items():
        wanted = set(re.findall(r"@(\w+)@", entry))
        name = Event(number).name
        if name in logged:
            assert all(wanted <= there for there in logged[name]), name
        else:
            # It is chosen from several: one of these calls is its.
            assert any(wanted <= there for there in logged[""]), name


def test_journalctl_takes_it(tmp_path: Path) -> None:
    if shutil.which("journalctl") is None:
        pytest.skip("journalctl is not here (Debian's package systemd)")
    folder = tmp_path / "usr/lib/systemd/catalog"
    folder.mkdir(parents=True)
    shutil.copy(CATALOG, folder)
    done = subprocess.run(
        ["journalctl", "--root", tmp_path, "--update-catalog"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    database = tmp_path / "var/lib/systemd/catalog/database"
    assert database.read_bytes().count(b"Defined-By: ksmd-ctl") == len(Event)
