# SPDX-License-Identifier: GPL-2.0-or-later
"""Each import rule of pyproject.toml can fail: lint-imports finds what is planted in a copy of the package."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.lint.test_lint import PACKAGE, ROOT, tool

SETTINGS: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
CONTRACTS: list[dict[str, Any]] = SETTINGS["contracts"]


def violations(contract: dict[str, Any]) -> list[tuple[str, str]]:
    """Every import that a contract forbids: (importing module, imported module)."""
    if contract["type"] == "forbidden":
        return list(itertools.product(contract["source_modules"], contract["forbidden_modules"]))
    if contract["type"] == "layers":
        (container,) = contract["containers"]
        layers = [[f"{container}.{name.strip()}" for name in layer.split("|")] for layer in contract["layers"]]
        upwards = [(low, high) for above, below in itertools.combinations(layers, 2) for low in below for high in above]
        return upwards + [pair for layer in layers for pair in itertools.permutations(layer, 2)]
    raise ValueError(f"no violation is known for a contract of type {contract['type']}")


def plant(tree: Path, importing: str, imported: set[str]) -> None:
    """Have a module import others. A package gets a new module for that, so that it stays as it is."""
    path = tree / importing.replace(".", "/")
    file = path / "planted.py" if path.is_dir() else path.with_suffix(".py")
    assert path.is_dir() or file.is_file(), f"{importing} is in an import rule and not in the package"
    with file.open("a") as text:
        text.writelines(f"\nimport {name}\n" for name in sorted(imported))


def settings(contract: dict[str, Any]) -> str:
    """A configuration of import-linter with this contract alone, in its ini format."""
    lines = ["[importlinter]", f"root_package = {SETTINGS['root_package']}", "include_external_packages = True"]
    lines += ["[importlinter:contract:only]"]
    for key, value in contract.items():
        lines.append(
            f"{key} =" + ("".join(f"\n    {item}" for item in value) if isinstance(value, list) else f" {value}")
        )
    return "\n".join(lines)


@pytest.mark.parametrize("contract", CONTRACTS, ids=[contract["name"] for contract in CONTRACTS])
def test_a_planted_violation_is_found(contract: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / ".importlinter").write_text(settings(contract))
    expected = violations(contract)
    assert expected
    planted: dict[str, set[str]] = defaultdict(set)
    for importing, imported in expected:
        planted[importing].add(imported)
    for importing, names in planted.items():
        plant(tmp_path, importing, names)
    command = [tool("lint-imports"), "--config", ".importlinter", "--no-cache"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stdout + result.stderr
    said = " ".join(result.stdout.split())
    missing = [pair for pair in expected if f"{pair[0]} is not allowed to import {pair[1]}" not in said]
    assert missing == []


def test_every_module_of_the_package_has_a_layer(tmp_path: Path) -> None:
    """A new folder or module that no layer names is a violation, too: its imports would be free."""
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    (layers,) = [contract for contract in CONTRACTS if contract["type"] == "layers"]
    (tmp_path / ".importlinter").write_text(settings(layers))
    (tmp_path / PACKAGE.name / "newroom.py").write_text("import ksmd_ctl.cli.main\n")
    command = [tool("lint-imports"), "--config", ".importlinter", "--no-cache"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "newroom" in result.stdout


@pytest.mark.parametrize(
    ("module", "folders"), [("prometheus_client", 1), ("pyudev", 1), ("rich", 2), ("systemd", 1), ("ctypes", 1)]
)
def test_only_its_folders_may_import_it(module: str, folders: int) -> None:
    """Every other folder and module is named by the rule that forbids it."""
    (rule,) = [
        contract
        for contract in CONTRACTS
        if contract["name"].startswith("Only") and module in contract["forbidden_modules"]
    ]
    rooms = {
        f"{PACKAGE.name}.{path.stem}"
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert len(rooms - {f"{PACKAGE.name}.__init__"} - set(rule["source_modules"])) == folders
