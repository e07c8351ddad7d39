# SPDX-License-Identifier: GPL-2.0-or-later
"""Builds the Debian package for tests: once for all of them, in a folder of its own."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

__all__ = ["ROOT", "build", "load", "need"]

ROOT = Path(__file__).parents[2]


def need(*programs: str) -> None:
    """Skip a test where a program is missing."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}; tools/packages-test.txt lists what tests need")


def build(folder: Path, *options: str) -> Path:
    """A package in this folder; its path."""
    need("dpkg-buildpackage", "dh", "pybuild", "scdoc", "shtab")
    done = subprocess.run(
        [ROOT / "packaging/build-deb", *options, folder], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = done.stdout.splitlines()
    return Path(path)


def load(name: str) -> dict[str, object]:
    """The names of a program below packaging/, which is no package of Python's."""
    import runpy

    return runpy.run_path(str(ROOT / "packaging" / name))
