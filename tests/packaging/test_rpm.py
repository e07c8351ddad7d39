# SPDX-License-Identifier: GPL-2.0-or-later
"""The RPM: built here for the Python of RHEL 9, compared with the Debian package, and linted. Nothing is installed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.packaging.building import ROOT, need

SPEC = ROOT / "packaging/rpm/ksmd-ctl.spec"
SITE = "/usr/lib/python3.11/site-packages"
#: The two have these in folders of their own.
DOCUMENTS = re.compile(r"/usr/share/doc/")


def query(rpm: Path, *options: str) -> str:
    return subprocess.run(["rpm", "-qp", *options, rpm], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    need("rpmbuild", "scdoc", "shtab")
    folder = tmp_path_factory.mktemp("rpm")
    done = subprocess.run(
        [ROOT / "packaging/build-rpm", "--python", "3.11", folder],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [Path(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def rpm(built: list[Path]) -> Path:
    return next(path for path in built if path.name.endswith(".noarch.rpm"))


def test_the_version_is_the_programs() -> None:
    from ksmd_ctl import __version__

    assert re.search(rf"^Version: +{re.escape(__version__)}$", SPEC.read_text(), re.MULTILINE)


def test_its_files_are_those_of_the_debian_package(rpm: Path, tree: Path) -> None:
    ours = {path for path in query(rpm, "-l").split() if not DOCUMENTS.match(path)}
    theirs = {f"/{path.relative_to(tree)}" for path in tree.rglob("*") if path.is_file() or path.is_symlink()}
    wanted = {
        path.replace("/usr/lib/python3/dist-packages", SITE).replace("zsh/vendor-completions", "zsh/site-functions")
        for path in theirs
        if not path.startswith("/DEBIAN/") and not DOCUMENTS.match(path)
    }
    # What installers leave beside the metadata.
    wanted = {path for path in wanted if ".dist-info/" not in path}
    folders = {path for path in ours if any(other.startswith(f"{path}/") for other in ours)}
    found = {path for path in ours - folders if ".dist-info/" not in path and "/licenses/" not in path}
    # Debian compiles when it installs.
    compiled = {path for path in found if "/__pycache__/" in path}
    assert len(compiled) == sum(path.startswith(SITE) and path.endswith(".py") for path in wanted)
    assert found - compiled - {"/etc/ksmd-ctl/conf.d"} == wanted
    assert query(rpm, "-c").split() == ["/etc/ksmd-ctl/ksmd-ctl.toml"]


def test_it_asks_for_the_python_that_it_was_made_for(rpm: Path, tmp_path: Path) -> None:
    requires = query(rpm, "--requires").splitlines()
    assert "/usr/bin/python3.11" in requires
    assert {"python3.11dist(psutil) >= 5.9", "python3.11dist(systemd-python) >= 235", "numactl-libs"} <= set(requires)
    assert not query(rpm, "--conflicts", "--obsoletes").strip()
    archive = subprocess.run(["rpm2cpio", rpm], capture_output=True, check=True).stdout
    subprocess.run(["cpio", "-idm", "--quiet", "./usr/bin/ksmd-ctl"], input=archive, cwd=tmp_path, check=True)
    assert (tmp_path / "usr/bin/ksmd-ctl").read_text().splitlines()[0] == "#!/usr/bin/python3.11 -I"


def test_its_scripts_are_a_shells_and_name_units_that_there_are(rpm: Path) -> None:
    text = query(rpm, "--scripts")
    assert set(re.findall(r"ksmd-ctl[\w-]*\.(?:service|socket)", text)) == {
        p.name for p in (ROOT / "systemd").iterdir()
    }
    scripts = re.split(r"^\w+ scriptlet \(using (/bin/sh)\):\n", text, flags=re.MULTILINE)[2::2]
    assert len(scripts) == 4
    for script in scripts:
        assert "%" not in script.replace("'%s\\n'", "")
        subprocess.run(["sh", "-n"], input=script, text=True, check=True)


def test_rpmlint_has_nothing_to_say(built: list[Path]) -> None:
    need("rpmlint")
    done = subprocess.run(
        ["rpmlint", "--config", Path(__file__).parent / "rpmlint.toml", *built, SPEC],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = [line for line in done.stdout.splitlines() if re.search(r": [EW]: ", line)]
    assert said == []
