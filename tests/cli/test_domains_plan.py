# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import argparse
import io
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from ksmd_ctl.cli import domains_plan, host
from ksmd_ctl.cli.main import make_parser
from ksmd_ctl.errors import ExitCode, UsageError
from ksmd_ctl.host.memory import Node
from tests.fakes.host import FakeHost, process

GIB = 1 << 30
CONFIG = '[domains.gold]\nunits = ["gold.service"]\n[domains.silver]\nunits = ["silver.service"]\n'


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> FakeHost:
    found = FakeHost()
    found.nodes = tuple(Node(number, frozenset({number}), 4 * GIB, {}) for number in range(2))
    found.counters |= {"mem_total_bytes": 8 * GIB, "mem_available_bytes": 7 * GIB}
    pages = GIB // 4096
    for pid, unit, node in ((1, "gold.service", 1), (2, "silver.service", 0), (3, "else.service", 0)):
        found.running.append(process(pid, unit=unit, resident_bytes=GIB, resident_nodes={node: pages}))
    monkeypatch.setattr(host, "open_host", lambda *_, **__: nullcontext(found))
    return found


def plan(folder: Path, *words: str, config: str = CONFIG) -> tuple[int, str]:
    path = folder / "c.toml"
    path.write_text(config)
    parser = argparse.ArgumentParser()
    domains_plan.add_parser(parser.add_subparsers())
    out = io.StringIO()
    code = domains_plan.run(parser.parse_args(["plan", "--config", str(path), *words]), out)
    return code, out.getvalue()


def test_for_people(there: FakeHost, tmp_path: Path) -> None:
    code, out = plan(tmp_path)
    assert code == ExitCode.DONE
    lines = out.splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["gold", "1"], ["silver", "0"]]
    assert (
        "note: 1.0 GiB of mergeable memory is in processes that belong to no domain: no node is left for these" in lines
    )
    assert "  systemd: systemctl set-property gold.service AllowedMemoryNodes=1" in lines
    assert not any("numa=fake" in line for line in lines)


def test_who_could_not_be_looked_at_is_not_taken_to_need_nothing(there: FakeHost, tmp_path: Path) -> None:
    there.unseen = (7, 8)
    out = plan(tmp_path)[1]
    said = "2 processes could not be looked at: what these need, whoever they belong to, is not in this plan"
    assert f"note: {said}\n" in out


def test_what_a_domain_is_to_have_is_taken_for_what_it_has(there: FakeHost, tmp_path: Path) -> None:
    code, out = plan(tmp_path, "--memory", "gold=4G", "--reserve", "0.5", "--json")
    document: Any = json.loads(out)
    assert (code, document["kernel_parameter"]) == (ExitCode.DONE, "numa=fake=2U")
    assert document["domains"]["gold"]["needed_bytes"] == 6 * GIB
    assert "started with numa=fake=" in plan(tmp_path, "--memory", "gold=4G", "--reserve", "0.5")[1]


def test_errors(there: FakeHost, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the configuration has none"):
        plan(tmp_path, config="")
    with pytest.raises(UsageError, match=r"there is no domain 'gould'"):
        plan(tmp_path, "--memory", "gould=1G")


@pytest.mark.parametrize(
    ("text", "size"), [("a=1", 1), ("a=2K", 2048), ("a=1.5G", 3 << 29), ("a=1GiB", GIB), ("a=2TB", 2 << 40)]
)
def test_sizes(text: str, size: int) -> None:
    assert domains_plan.memory_size(text) == ("a", size)


@pytest.mark.parametrize("text", ["a", "a=", "=1G", "a=-1", "a=1X", "a=1e3"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        domains_plan.memory_size(text)


@pytest.mark.parametrize("text", ["", "-1", "1e3", "x", "99.1", "nan", "\u0660.5"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(UsageError, match="is not a share from 0 to 99"):
        make_parser(["domains"]).parse_args(["domains", "plan", f"--reserve={text}"])


def test_options_may_be_given_before_the_action() -> None:
    parser = make_parser(["domains"])
    given = parser.parse_args(["domains", "--json", "--config", "x", "--host", "engine", "plan"])
    assert (given.json, given.config, given.host, given.action) == (True, "x", "engine", "plan")
    assert parser.parse_args(["domains", "--config", "x", "assign", "--config", "y", "gold"]).config == "y"
    assert not parser.parse_args(["domains", "plan"]).json
