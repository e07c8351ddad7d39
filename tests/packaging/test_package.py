# SPDX-License-Identifier: GPL-2.0-or-later
"""The Debian package: what is in it, what it asks for, and that Debian's own checker has nothing to say."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.packaging.building import ROOT, need


def field(package: Path, name: str) -> str:
    return subprocess.run(["dpkg-deb", "-f", package, name], capture_output=True, text=True, check=True).stdout.strip()


def test_lintian_has_nothing_to_say(package: Path) -> None:
    need("lintian")
    changes = next(package.parent.glob("*.changes"))
    done = subprocess.run(
        ["lintian", "--allow-root", "--fail-on", "error,warning", changes], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_it_depends_on_little_and_conflicts_with_nobody(package: Path) -> None:
    depends = {re.split(r"[ (:|]", part.strip())[0] for part in field(package, "Depends").split(",")}
    libraries = {"python3-prometheus-client", "python3-psutil", "python3-pyudev", "python3-systemd", "libnuma1"}
    assert depends == libraries | {"python3", "systemd"}
    for name in ("Conflicts", "Breaks", "Replaces", "Pre-Depends", "Recommends"):
        assert field(package, name) == ""
    assert field(package, "Architecture") == "all"


def test_all_of_the_program_is_in_it_and_nothing_else(tree: Path) -> None:
    installed = tree / "usr/lib/python3/dist-packages/ksmd_ctl"
    found = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    source = ROOT / "ksmd_ctl"
    wanted = {
        str(path.relative_to(source))
        for path in source.rglob("*")
        if path.suffix in (".py", ".toml", ".varlink", ".typed") or path.name == "py.typed"
    }
    assert found == wanted
    assert any(name.startswith("scenario/library/") for name in found)
    tops = {path.name for path in (tree / "usr/lib/python3/dist-packages").iterdir()}
    assert {re.sub(r"-.*", "", name) for name in tops} == {"ksmd_ctl"}


def test_units_configuration_pages_and_the_rest_are_in_their_places(tree: Path) -> None:
    for unit in (ROOT / "systemd").iterdir():
        assert (tree / "usr/lib/systemd/system" / unit.name).read_text() == unit.read_text()
    for place in (
        "etc/ksmd-ctl/conf.d",
        "usr/lib/sysusers.d/ksmd-ctl.conf",
        "usr/share/man/man1/ksmd-ctl.1.gz",
        "usr/share/man/man5/ksmd-ctl.toml.5.gz",
        "usr/share/man/man8/ksmd-ctl.service.8.gz",
        "usr/share/bash-completion/completions/ksmd-ctl",
        "usr/share/zsh/vendor-completions/_ksmd-ctl",
        "usr/lib/systemd/catalog/ksmd-ctl.catalog",
        "usr/share/ksmd-ctl/prometheus/ksmd-ctl.rules.yml",
        "usr/share/ksmd-ctl/prometheus/scrape.yml",
        "usr/share/ksmd-ctl/grafana/ksmd-ctl.json",
        "usr/share/ksmd-ctl/grafana/ksmd-ctl-fleet.json",
    ):
        assert (tree / place).exists(), place
    sample = (ROOT / "ksmd_ctl/config/ksmd-ctl.toml").read_text()
    assert (tree / "etc/ksmd-ctl/ksmd-ctl.toml").read_text() == sample
    assert (tree / "DEBIAN/conffiles").read_text() == "/etc/ksmd-ctl/ksmd-ctl.toml\n"


def test_the_program_runs_isolated(tree: Path) -> None:
    program = tree / "usr/bin/ksmd-ctl"
    assert program.read_text().splitlines()[0] == "#!/usr/bin/python3 -I"
    assert program.stat().st_mode & 0o777 == 0o755


def test_the_version_is_the_programs(package: Path) -> None:
    from ksmd_ctl import __version__

    assert field(package, "Version") == __version__


def test_the_units_are_as_private_as_they_are_said_to_be() -> None:
    """README has the scores; a unit that gets worse is noticed here."""
    need("systemd-analyze")
    asked = subprocess.run(["systemd-analyze", "--version"], capture_output=True, text=True, check=True)
    version = asked.stdout.split()[1]
    said = dict(re.findall(r"\| `(ksmd-ctl[a-z-]*\.service)` \| ([0-9.]+) \|", (ROOT / "README.md").read_text()))
    assert set(said) == {"ksmd-ctl.service", "ksmd-ctl-broker.service"}
    for unit, score in said.items():
        done = subprocess.run(
            ["systemd-analyze", "security", "--offline=true", "--no-pager", ROOT / "systemd" / unit],
            capture_output=True,
            text=True,
            check=True,
        )
        found = re.search(r"exposure level for [^:]*: ([0-9.]+)", done.stdout)
        assert found
        # README has what 252 says; later ones know more of what the units ask for.
        assert float(found[1]) <= float(score) <= 2.0
        if version == "252":
            assert float(found[1]) == float(score)


def test_every_capability_has_its_reason() -> None:
    network = (ROOT / "systemd/ksmd-ctl.service").read_text()
    assert "\nCapabilityBoundingSet=\n" in network
    assert "\nAmbientCapabilities=\n" in network
    broker = (ROOT / "systemd/ksmd-ctl-broker.service").read_text()
    given = re.findall(r"^CapabilityBoundingSet=(.+)$", broker, re.MULTILINE)
    assert len(given) == 1
    explained = set(re.findall(r"^#   (CAP_\w+) +\S", broker, re.MULTILINE))
    assert explained == set(given[0].split())


def test_no_unit_stops_somebody_elses() -> None:
    for unit in (ROOT / "systemd").iterdir():
        assert "Conflicts=" not in unit.read_text()
