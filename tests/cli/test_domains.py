# SPDX-License-Identifier: GPL-2.0-or-later
"""domains: the document, what people read, the exit code, and the way to the service or past it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from ksmd_ctl.cli import client, domains, host
from ksmd_ctl.cli.main import main
from ksmd_ctl.errors import ExitCode
from ksmd_ctl.host.knobs import Knob
from tests.cli.fakes import listening, reply
from tests.cli.test_numa import contract, shape
from tests.domains.test_audit import SharedBy, counted, member, sound

CONFIG = """policy = "fixed"
[domains]
mode = "nodes"
[domains.gold]
nodes = "0"
units = ["gold*"]
[domains.silver]
nodes = "1"
units = ["silver*"]
"""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command on a fake host, with a configuration of its own and no service."""
    there = sound()
    monkeypatch.setattr(host, "open_host", lambda *_, **__: nullcontext(there))
    config = tmp_path / "c.toml"
    config.write_text(CONFIG)

    class Command:
        host = there

        def __call__(self, *words: str, text: str = CONFIG) -> tuple[int, str, str]:
            config.write_text(text)
            code = main(["domains", *words, "--config", str(config), "--socket", str(tmp_path / "s")])
            said = capsys.readouterr()
            return code, said.out, said.err

    return Command()


def test_all_are_isolated(command: Any) -> None:
    code, out, _ = command()
    assert code == ExitCode.DONE
    lines = out.splitlines()
    assert any(line.startswith("domain ") and line.endswith("verdict") for line in lines)
    assert any(line.split()[:5] == ["gold", "0", "2", "800.0", "KiB"] and "isolated" in line for line in lines)
    assert lines[-1].startswith('mode "nodes", audited just now, all frames counted, ')


def test_what_is_not_isolated_is_named_with_its_reasons(command: Any) -> None:
    command.host.sharing_outcomes = [counted(SharedBy((0, 1), 7, (14, 7), (4.7, 2.3), (0, 7)))]
    command.host.knobs[Knob.MERGE_ACROSS_NODES] = 1
    code, out, _ = command()
    assert code == ExitCode.CHECK_FAILED
    assert "gold: merged frames are shared with other domains\n" in out
    assert "gold: merge_across_nodes is 1: pages of all nodes are merged\n" in out
    assert "gold: merged frames shared: 7 with silver\n" in out


def test_a_sample_shows_its_interval(command: Any) -> None:
    command.host.sharing_outcomes = [counted(SharedBy((0, 1), 7, (14, 7), (4.7, 2.3), (0, 7)), share=0.5)]
    out = command()[1]
    assert "14 (" in out
    assert "50.0 % of all frames counted (95 % intervals in brackets)" in " ".join(out.split())


def test_without_a_configuration_each_unit_is_a_domain(command: Any) -> None:
    command.host.sharing_outcomes = [counted(SharedBy((0, 1), 7, (14, 7), (4.7, 2.3), (0, 7)))]
    code, out, _ = command(text="")
    assert code == ExitCode.CHECK_FAILED
    assert "silver: merged frames are shared with other domains\n" in out
    assert 'mode "report"' in out


def test_of_many_that_share_nothing_some_are_shown(command: Any) -> None:
    command.host.running = [member(pid, f"unit-{pid}", 0) for pid in range(1, 41)]
    code, out, _ = command(text="")
    assert code == ExitCode.DONE
    assert "20 more that are domains of their own share nothing now\n" in out


def test_nobody_has_mergeable_memory(command: Any) -> None:
    command.host.running.clear()
    assert "no process has mergeable memory\n" in command(text="")[1]
    code, out, _ = command()
    assert code == ExitCode.DONE
    assert out.count("no members") == 2


def test_a_wrong_configuration(command: Any) -> None:
    code, _, err = command(text=CONFIG.replace('"1"', '"0"'))
    assert code == ExitCode.USAGE
    assert "domains.silver.nodes: 0 belongs to the domain gold too" in err


def test_the_document_has_the_form_of_the_example(command: Any) -> None:
    command.host.sharing_outcomes = [counted(SharedBy((0, 1), 7, (14, 7), (4.7, 2.3), (0, 7)))]
    command.host.confined.clear()
    command.host.running[0] = member(1, "gold", 1)
    made = json.loads(command("--json")[1])
    made["domains"][0] |= {"shared_with": None, "intruders": []}
    made["domains"][0]["strays"][0]["pages"] = None
    example = contract("domains")
    example["domains"][0]["shared_with"] = example["domains"][0]["strays"][0]["pages"] = None
    made["domains"] = made["domains"][:1]
    assert shape(made) == shape(example)


def test_any_part_of_a_document_may_be_of_another_form() -> None:
    for key in contract("domains"):
        for wrong in (None, 1, "x", [], [1], {}, {"a": 1}):
            document = contract("domains") | {key: wrong}
            assert all(isinstance(line, str) for line in domains.lines(document))


def test_the_service_is_asked_where_one_runs(command: Any, tmp_path: Path) -> None:
    with listening(tmp_path / "s", lambda request: reply(domains=contract("domains"))) as requests:
        code, out, _ = command("--json")
    assert (code, json.loads(out)) == (ExitCode.CHECK_FAILED, contract("domains"))
    assert [request["method"] for request in requests] == [f"{client.INTERFACE}.Domains"]
    assert command.host.surveys == []


def test_no_line_is_wider_than_100_columns(command: Any) -> None:
    command.host.running += [member(pid, f"a-very-long-name-of-a-unit-{pid}.service", 0) for pid in range(40, 60)]
    assert max(map(len, command()[1].splitlines())) <= 100
