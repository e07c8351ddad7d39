# SPDX-License-Identifier: GPL-2.0-or-later
"""What every command prints with `--json` is of its published schema (docs/schemas)."""

from __future__ import annotations

import argparse
import copy
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

import ksmd_ctl.scenario
from ksmd_ctl.cli.main import COMMANDS, make_parser
from tests.contracts import schemas
from tests.contracts.schemas import FOLDER
from tests.render.reports import CONTRACTS, example

SCENARIO = Path(ksmd_ctl.scenario.__file__).parent / "library/findings/collision-is-for-ever.toml"
DOMAINS = Path(__file__).with_name("domains.toml")


def closed(schema: Any) -> Any:
    """The schema without its room for keys of later versions: none is printed that is not described."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(item) for key, item in schema.items()}
    return {**found, "additionalProperties": False} if "required" in found else found


def problems(name: str, document: object) -> list[str]:
    schema = closed(json.loads((FOLDER / f"{name}.schema.json").read_text()))
    errors = Draft202012Validator(schema).iter_errors(document)
    # Of a union, what is wrong with the member that fits best.
    return [f"{best.json_path}: {best.message}"[:400] for error in errors if (best := best_match([error]))]


def test_the_published_schemas_are_the_made_ones() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.schema.json" for name in schemas.DOCUMENTS}
    for name, kind in schemas.DOCUMENTS.items():
        assert (FOLDER / f"{name}.schema.json").read_text() == schemas.text(kind), "python -m tests.contracts.schemas"
        Draft202012Validator.check_schema(schemas.schema(kind))


@pytest.mark.parametrize("path", sorted(CONTRACTS.glob("*.json")), ids=lambda path: path.stem)
def test_the_recorded_documents_are_of_their_schemas(path: Path) -> None:
    name = {"report": "status", "metric-names": ""}.get(path.stem, path.stem)
    if name:
        assert problems(name, json.loads(path.read_text())) == []


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items: Any = document.items() if isinstance(document, dict) else enumerate(document)
    for key, item in items:
        yield (*path, key)
        if isinstance(item, dict | list):
            yield from places(item, (*path, key))


def test_a_field_of_another_type_or_a_missing_one_is_a_problem() -> None:
    report = example()
    by_data = {"knobs", "readings", "errors", "nodes", "within", "totals", "left", "oom_kills", "healed", "unrealised"}
    by_data |= {"switches", "auto", "qmp", "inject"}
    missed = []
    for path in places(report):
        for missing in (False, True):
            changed: Any = copy.deepcopy(report)
            part: Any = changed
            for key in path[:-1]:
                part = part[key]
            if missing and (isinstance(part, list) or (path[-2:-1] and path[-2] in by_data)):
                continue
            if missing:
                del part[path[-1]]
            else:
                part[path[-1]] = [{"another": "type"}]
            if not problems("status", changed):
                missed.append((path, missing))
    assert [path for path, missing in missed if not missing] == []
    # Of what no look has found, and what only some know, docs/json.md says so.
    assert {path[-1] for path, _ in missed} <= {
        *("cpu_seconds", "complete", "detection", "witness", "lacking", "going_offline", "progress", "process")
    }


# -- what commands print -----------------------------------------------------------------------------------------

# Of what is printed, by the name of its schema. A process of the host that is asked stands for PID.
COMMANDS_WITH_JSON = [
    ("status", "status"),
    ("status", "status --interval 0.2"),
    ("nodes", "nodes"),
    ("domains", "domains"),
    ("domains-plan", "domains plan --config DOMAINS"),
    ("processes", "processes --all"),
    ("sharing", "sharing --by process"),
    ("history", "history --since 1d"),
    ("estimate", "estimate --host engine"),
    ("estimate", "estimate --host engine --all --config DOMAINS"),
    ("doctor", "doctor --interval 0.2"),
    ("metrics", "metrics"),
    ("migrate", "migrate --pid PID --to 0 --dry-run"),
    ("migrate", "migrate --pid PID --to 0"),
    ("set-dry-run", "set use_zero_pages=1 --dry-run"),
    ("set-dry-run", "set max_page_sharing=128 --dry-run"),
    ("set", "set use_zero_pages=1"),
    ("set", "set max_page_sharing=128"),
    ("set", "set --recover"),
    ("unmerge", "unmerge --pid PID --dry-run"),
    ("unmerge", "unmerge --pid PID"),
    ("collapse", "collapse --pid PID --dry-run"),
    ("collapse", "collapse --pid PID"),
    ("record", "record -o RECORDING --for 0.3"),
    ("report", "report RECORDING"),
    ("replay", "replay RECORDING smart_scan=0"),
    ("merge", "merge off --pid PID --dry-run"),
    ("merge", "merge off --pid PID --persist"),
    ("merge", "merge on --pid PID"),
    ("verify", "verify SCENARIO"),
    ("check-config", "daemon --check-config"),
]


def printed(words: str, *more: str) -> Any:
    """The document that a command prints."""
    command = [sys.executable, "-m", "ksmd_ctl.cli.main", *words.split(), "--json", *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout, f"{words}: {done.stderr}"
    return json.loads(done.stdout)


def wrong(
    pid: int,
    *more: str,
    skipped: tuple[str, ...] = (),
    config: Path | None = None,
    recording: Path | None = None,
) -> dict[str, list[str]]:
    """By command, what is not of its schema.

    :param recording: where one is made, where they are not skipped

    :param config: where commands that change something have their state, None for where a service says
    """
    found = {}
    for name, words in COMMANDS_WITH_JSON:
        if words.split()[0] not in skipped:
            changes = config is not None and words.split()[0] in ("set", "unmerge", "collapse", "merge", "daemon")
            options = (*more, "--config", str(config)) if changes else more
            # They need no host.
            options = () if words.split()[0] in ("report", "replay") else options
            meant = words.replace("PID", str(pid)).replace("SCENARIO", str(SCENARIO)).replace("DOMAINS", str(DOMAINS))
            meant = meant.replace("RECORDING", str(recording))
            if bad := problems(name, printed(meant, *options)):
                found[words] = bad
    return found


def test_there_is_a_run_for_every_command() -> None:
    (commands,) = [
        action for action in make_parser(COMMANDS)._actions if isinstance(action, argparse._SubParsersAction)
    ]
    # `watch` goes on until somebody ends it: tests/cli/test_watch.py.
    assert {choice.dest for choice in commands._choices_actions} == {
        "watch",
        *(words.split()[0] for _, words in COMMANDS_WITH_JSON),
    }
    # That takes systemd: tests/cli/test_domains_assign.py.
    assert {name for name, _ in COMMANDS_WITH_JSON} | {"domains-assign"} == schemas.DOCUMENTS.keys()


def test_what_commands_print_of_the_simulated_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KSMD_CTL_SOCKET", str(tmp_path / "none"))
    pid = printed("processes", "--host", "engine")["processes"][0]["pid"]
    # There is no history before there was a service.
    recording = tmp_path / "recording"
    assert wrong(pid, "--host", "engine", skipped=("history",), recording=recording) == {}


def test_what_commands_print_of_a_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KSMD_CTL_SOCKET", str(tmp_path / "socket"))
    config = tmp_path / "ksmd-ctl.toml"
    config.write_text(
        f"policy = 'adaptive'\n[switch]\nallow = true\n[service]\nsample_interval = 0.1\nmetrics_listen = ''\n"
        f"socket = '{tmp_path}/socket'\nruntime_directory = '{tmp_path}/run'\nstate_directory = '{tmp_path}/state'\n"
    )
    service = [sys.executable, "-m", "ksmd_ctl.cli.main", "daemon", "--host", "engine", "--config", str(config)]
    with subprocess.Popen(service, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert any("started" in line for line in process.stderr)
            pid = printed("processes")["processes"][0]["pid"]
            assert wrong(pid, skipped=("daemon", "verify", "record", "report", "replay")) == {}
            report = printed("status")
            for part in ("daemon", "numa", "decision", "healing", "sharing", "transaction"):
                assert report[part] is not None, part
            assert report["transaction"]["last"] is not None
        finally:
            process.send_signal(signal.SIGTERM)


def test_what_a_wrong_configuration_prints(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[knobs]\nrun = 7\n")
    document = printed("daemon --check-config", "--config", str(tmp_path / "c.toml"))
    assert document["problems"]
    assert problems("check-config", document) == []


TENANT = """
import mmap, sys
memory = mmap.mmap(-1, 4 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_MERGEABLE)
memory[:] = bytes([7]) * (4 << 20)
print(flush=True)
sys.stdin.read()
"""


@pytest.mark.ksm
def test_what_commands_print_of_this_host(ksm_host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KSMD_CTL_SOCKET", str(tmp_path / "none"))
    config = tmp_path / "ksmd-ctl.toml"
    config.write_text(f"[service]\nruntime_directory = '{tmp_path}/run'\nstate_directory = '{tmp_path}/state'\n")
    (ksm_host / "run").write_text("1")
    with subprocess.Popen([sys.executable, "-c", TENANT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as tenant:
        try:
            assert tenant.stdout is not None
            tenant.stdout.readline()
            while int((ksm_host / "pages_sharing").read_text()) < 1000:
                time.sleep(0.05)
            recording, skipped = tmp_path / "recording", ("verify", "history")
            assert wrong(tenant.pid, "--host", "kernel", skipped=skipped, config=config, recording=recording) == {}
        finally:
            tenant.kill()
    document = printed(f"verify {SCENARIO}")
    assert document["kernel"] is not None
    assert problems("verify", document) == []
