# SPDX-License-Identifier: GPL-2.0-or-later
"""`make release` refuses what is no release. What it builds is tested as the package is."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.packaging.building import ROOT

ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/nonexistent",
    **{f"GIT_{role}_{what}": "a@b.invalid" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
}
CHANGELOG = "# Changelog\n\n## 1.2.3 (2026-01-31)\n\n- One.\n"


def git(tree: Path, *words: str) -> None:
    subprocess.run(["git", *words], cwd=tree, env=ENVIRONMENT, check=True, capture_output=True)


def check(tree: Path) -> subprocess.CompletedProcess[str]:
    command = [str(tree / "tools/release"), "--check"]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout of version 1.2.3, ready to be released."""
    for folder in ("tools", "ksmd_ctl", "packaging/debian"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "tools/release", tmp_path / "tools")
    (tmp_path / "ksmd_ctl/__init__.py").write_text('__version__ = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    (tmp_path / "packaging/debian/changelog").write_text("ksmd-ctl (1.2.3) unstable; urgency=medium\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "one")
    return tmp_path


def test_a_release_can_be_built(tree: Path) -> None:
    result = check(tree)
    assert (result.returncode, result.stdout) == (0, "release: 1.2.3 can be built\n")


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("CHANGELOG.md", CHANGELOG.replace("2026-01-31", "not released"), 'begins with "## 1.2.3 (not released)"'),
        ("CHANGELOG.md", CHANGELOG.replace("1.2.3", "1.2.2"), 'begins with "## 1.2.2 (2026-01-31)"'),
        ("packaging/debian/changelog", "ksmd-ctl (1.2.2) unstable; urgency=medium\n", "has version 1.2.2"),
        ("ksmd_ctl/__init__.py", "", "no __version__"),
    ],
)
def test_version_and_changelogs_have_to_agree(tree: Path, name: str, text: str, why: str) -> None:
    (tree / name).write_text(text)
    git(tree, "commit", "-qam", "two")
    result = check(tree)
    assert result.returncode == 6
    assert why in result.stderr


@pytest.mark.parametrize("name", ["CHANGELOG.md", "new"])
def test_a_tree_with_changes_is_refused(tree: Path, name: str) -> None:
    with (tree / name).open("a") as file:
        file.write("more\n")
    result = check(tree)
    assert result.returncode == 6
    assert "not committed" in result.stderr


def test_a_version_is_released_once(tree: Path) -> None:
    git(tree, "tag", "v1.2.3")
    assert check(tree).returncode == 0
    git(tree, "commit", "-qm", "two", "--allow-empty")
    result = check(tree)
    assert result.returncode == 6
    assert "v1.2.3 is another commit" in result.stderr
