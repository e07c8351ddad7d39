# SPDX-License-Identifier: GPL-2.0-or-later
"""Linters, types and the rules of the house, as tests."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ksmd_ctl"


def run(*command: str) -> None:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"


def tracked(*patterns: str) -> list[str]:
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in listing.stdout.splitlines() if (ROOT / name).is_file()]


def tool(name: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:/usr/bin:/bin")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def test_ruff_check() -> None:
    run(tool("ruff"), "check", ".")


def test_ruff_format() -> None:
    run(tool("ruff"), "format", "--check", ".")


def test_mypy() -> None:
    run(sys.executable, "-m", "mypy")


def test_import_rules() -> None:
    run(tool("lint-imports"))


def test_spelling() -> None:
    run(tool("codespell"), "--skip=COPYING,*.json,*.svg", *tracked("*.py", "*.md", "*.toml", "Makefile"))


def test_shell() -> None:
    scripts = [name for name in tracked() if (ROOT / name).read_bytes()[:40].startswith(b"#!/usr/bin/env bash")]
    assert scripts
    run(tool("shellcheck"), *scripts)


def parsed() -> list[tuple[str, ast.Module]]:
    return [(str(path.relative_to(PACKAGE)), ast.parse(path.read_text())) for path in PACKAGE.rglob("*.py")]


NEAR_KERNEL = ("kernel/", "privileged/")
#: What does to a host what a scenario says.
LAB = tuple(f"scenario/{name}" for name in ("cpusets", "kernel_lab", "lab_restore", "region_child"))


def test_only_transactions_change_a_host() -> None:
    """What changes a host is called in transactions/ and in the hosts themselves only."""
    changing = {"write", "move", "unshare", "make_huge", "switch"}
    callers = {
        (name, node.func.attr)
        for name, tree in parsed()
        if not name.startswith((*NEAR_KERNEL, "engine/", "scenario/", "transactions/"))
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in changing
        and "host" in ast.unparse(node.func.value)
    }
    assert callers == set()


def kernel_paths(tree: ast.Module) -> list[str]:
    """String constants that are a path below /sys or /proc, absolute or relative to a root: ``root / "sys/..."``.

    Prose has spaces. Parts of f-strings are constants, too.
    """
    path = re.compile(r"/?(sys|proc)(/\S*)?")
    constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return [value for value in constants if isinstance(value, str) and path.fullmatch(value)]


def test_only_kernel_opens_the_kernels_files() -> None:
    """kernel/ has such paths, and so have what runs with privilege and a lab; host/fields.py says where a figure is."""
    found = {
        name: paths
        for name, tree in parsed()
        if not name.startswith((*NEAR_KERNEL, *LAB)) and name != "host/fields.py" and (paths := kernel_paths(tree))
    }
    assert found == {}


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ('ksm = root / "sys/kernel/mm/ksm"', ["sys/kernel/mm/ksm"]),
        ('ksm = Path(root, "sys", "kernel")', ["sys"]),
        ('maps = open("/proc/self/maps")', ["/proc/self/maps"]),
        ('maps = root / f"proc/{pid}/maps"', ["proc/"]),
        ('hint = "look at /proc/vmstat"', []),
        ('hint = "/sys/kernel/mm/ksm is missing"', []),
        ("import sys", []),
    ],
)
def test_a_path_of_the_kernels_is_found(planted: str, found: list[str]) -> None:
    assert kernel_paths(ast.parse(planted)) == found


def test_package_files_hold_no_code() -> None:
    assert all(not ast.parse(path.read_text()).body or path.parent == PACKAGE for path in PACKAGE.rglob("__init__.py"))


def test_no_python_in_folders_named_like_libraries() -> None:
    """A systemd/__init__.py here would hide systemd-python; the same for packaging."""
    assert not [name for folder in ("systemd", "packaging") for name in (ROOT / folder).glob("*.py")]


def test_every_file_says_its_licence() -> None:
    missing = [name for name in tracked("*.py") if "SPDX-License-Identifier" not in (ROOT / name).read_text()[:200]]
    assert missing == []


def test_pre_commit_runs_what_lint_runs() -> None:
    """Its hooks are local, so they need no network, and each has its program here."""
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"repo: (\S+)", text) == ["local"]
    assert set(re.findall(r"language: (\S+)", text)) == {"system"}
    entries = re.findall(r"entry: \.venv/bin/(.*)", text)
    assert [entry.split(" --")[0] for entry in entries] == [
        "ruff check",
        "ruff format",
        "python -m mypy",
        "lint-imports",
        "codespell",
        "python -m pytest -q tests/lint/test_docs.py",
    ]
    assert all(tool(entry.split()[0]) for entry in entries)


def test_each_dependency_is_imported_where_the_documents_say() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    modules = {"prometheus-client": "prometheus_client", "systemd-python": "systemd"}
    text = (ROOT / "docs/dependencies.md").read_text()
    for requirement in declared:
        name = re.split(r"[<>=]", requirement)[0]
        row = re.search(rf"^\| {re.escape(name)} \| `ksmd_ctl/([\w/]+\.py)` \|", text, re.MULTILINE)
        assert row, f"docs/dependencies.md does not say where {name} is imported"
        imported = {
            module.partition(".")[0]
            for node in ast.walk(ast.parse((PACKAGE / row[1]).read_text()))
            for module in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert modules.get(name, name) in imported, f"{row[1]} does not import {name}"
