# SPDX-License-Identifier: GPL-2.0-or-later
"""The Debian package, built once for all tests."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.packaging.building import build


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package."""
    return build(tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="session")
def tree(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is in it."""
    folder = tmp_path_factory.mktemp("tree")
    subprocess.run(["dpkg-deb", "-R", package, folder], check=True)
    return folder
