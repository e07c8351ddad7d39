# SPDX-License-Identifier: GPL-2.0-or-later
"""Manual pages and completions have every command, option and setting that there is."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ksmd_ctl.cli.main import make_parser
from ksmd_ctl.config.domains import DOMAIN_KEYS
from ksmd_ctl.config.model import KNOB_KEYS, SETTINGS
from ksmd_ctl.errors import ExitCode
from tests.packaging.building import ROOT, need


def commands(
    parser: argparse.ArgumentParser | None = None, above: str = ""
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The commands for people, and the commands below some of them: `domains plan`."""
    for action in (parser or make_parser())._actions:
        if isinstance(action, argparse._SubParsersAction):
            for shown in action._choices_actions:
                yield f"{above}{shown.dest}", action.choices[shown.dest]
                yield from commands(action.choices[shown.dest], f"{above}{shown.dest} ")


def options(parser: argparse.ArgumentParser) -> list[str]:
    return [
        option
        for action in parser._actions
        if action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction)
        for option in action.option_strings
    ]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Each page as a person sees it."""
    need("scdoc", "man")
    folder = tmp_path_factory.mktemp("man")
    subprocess.run([sys.executable, ROOT / "packaging/man/pages.py", folder], check=True)
    shown = {}
    for page in folder.iterdir():
        environment = {"MANWIDTH": "400", "PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "MAN_KEEP_FORMATTING": ""}
        done = subprocess.run(
            ["man", "--warnings=w", page], capture_output=True, text=True, env=environment, check=True
        )
        assert done.stderr == ""
        shown[page.name] = re.sub(r".\x08|\x1b\[[0-9;]*m", "", done.stdout)
    return shown


def test_help_makes_no_folder(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "packaging/man/pages.py", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "usage:" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_there_is_a_page_for_program_configuration_and_service(pages: dict[str, str]) -> None:
    assert set(pages) == {"ksmd-ctl.1", "ksmd-ctl.toml.5", "ksmd-ctl.service.8"}
    for name, text in pages.items():
        assert "@" not in text.replace("man@", ""), name
        # What whatis(1) shows.
        assert re.search(r"^NAME\n +\S.* - \S", text, re.MULTILINE), name


def test_every_command_and_option_is_in_the_manual(pages: dict[str, str]) -> None:
    text = pages["ksmd-ctl.1"]
    found = dict(commands())
    assert {"daemon", "status", "metrics", "verify"} <= set(found)
    parts = re.split(r"^   ([A-Z][A-Z ]*)$", text, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert set(sections) == {name.upper() for name in found}
    for name, parser in found.items():
        for option in options(parser):
            described = re.search(rf"^ +{re.escape(option)}( \S+)?$\n +\S", sections[name.upper()], re.MULTILINE)
            assert described, f"{name} {option}"


def test_the_manual_has_no_option_that_there_is_not(pages: dict[str, str]) -> None:
    known = {option for _, parser in commands() for option in options(parser)} | {"--help", "--version", "--more"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", pages["ksmd-ctl.1"])) <= known


def test_every_setting_and_knob_is_in_the_manual(pages: dict[str, str]) -> None:
    text = pages["ksmd-ctl.toml.5"]
    knobs = [key for keys in KNOB_KEYS.values() for key in keys]
    for name in [*(setting.key for setting in SETTINGS), *knobs, *DOMAIN_KEYS]:
        assert re.search(rf"^ +{name}$\n +\S", text, re.MULTILINE), name


def test_the_manual_says_how_to_switch_it_on_with_a_good_configuration(pages: dict[str, str], tmp_path: Path) -> None:
    from ksmd_ctl.config.loader import load

    source = (ROOT / "packaging/man/ksmd-ctl.toml.5.scd").read_text()
    block = re.search(r"# SWITCHING MERGING ON.*?```\n(.*?)```", source, re.DOTALL)
    assert block
    (tmp_path / "merge.toml").write_text(block[1])
    config = load(str(tmp_path / "merge.toml"))
    assert (config.policy.value, config.knobs) == ("adaptive", {})


def test_every_exit_status_is_in_the_manual(pages: dict[str, str]) -> None:
    status = pages["ksmd-ctl.1"].partition("EXIT STATUS")[2].partition("ENVIRONMENT")[0]
    assert {int(number) for number in re.findall(r"^ +(\d+)$", status, re.MULTILINE)} == {
        int(code) for code in ExitCode
    }


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completions_know_every_command_and_option(shell: str, tmp_path: Path) -> None:
    need("shtab")
    # Debian's, as in the package's build.
    subprocess.run(["/usr/bin/python3", ROOT / "packaging/completion/completions.py", tmp_path], check=True)
    text = (tmp_path / shell).read_text()
    for name, parser in commands():
        assert re.search(rf"\b{name.split()[-1]}\b", text), name
        for option in options(parser):
            assert option in text, f"{name} {option}"
    assert "broker" not in text


def test_bash_completes(tmp_path: Path) -> None:
    need("shtab")
    subprocess.run(["/usr/bin/python3", ROOT / "packaging/completion/completions.py", tmp_path], check=True)
    script = (
        f"source {tmp_path}/bash; COMP_WORDS=(ksmd-ctl status --js); COMP_CWORD=2; COMP_LINE='ksmd-ctl status --js'; "
        '_shtab_ksmd_ctl ksmd-ctl --js status; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["--json"], done.stderr
