# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian packages of other suites, fetched with the machine's own apt.

Lists and state are private, so nothing of this touches what the machine has
installed. Where the packages come from is the machine's own configuration.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from tests.guest.errors import lacking
from tests.guest.tools import call, require

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
HINT = "see that apt-get update works and that the archive has this suite"


def mirror() -> str:
    """Return the URI of the Debian archive that this machine uses.

    KSMD_CTL_GUEST_MIRROR names one where the machine itself runs no Debian.
    """
    named = os.environ.get("KSMD_CTL_GUEST_MIRROR")
    if named:
        return named
    require(["apt-get"])
    fields = "$(REPO_URI)"
    filters = ("Created-By: Packages", "Origin: Debian", "Label: Debian")
    targets = ["apt-get", "indextargets", "--format", fields, *filters]
    uris = call(targets, hint=HINT).split()
    if not uris:
        # The machine's own lists may have been cleaned away.
        call(["apt-get", "update"], hint=HINT)
        uris = call(targets, hint=HINT).split()
    if not uris:
        raise lacking(
            "apt knows no Debian archive on this machine",
            "see /etc/apt/sources.list, or set KSMD_CTL_GUEST_MIRROR to an archive's URI",
        )
    return uris[0]


def source(suite: str) -> str:
    """Return the line of sources.list for a suite, signed by the machine's keyring."""
    if not KEYRING.exists():
        raise lacking(
            f"no keyring of the Debian archive: {KEYRING}",
            "apt-get install --no-install-recommends debian-archive-keyring",
        )
    return f"deb [signed-by={KEYRING}] {mirror()} {suite} main"


@dataclass(frozen=True, slots=True)
class Suite:
    """One suite of the archive, with lists and state of its own in `folder`; of this architecture if none is named."""

    name: str
    folder: Path
    architecture: str = ""

    def update(self) -> None:
        """Fetch the suite's package lists."""
        require(["apt-get", "apt-cache", "dpkg-deb"])
        for part in ("state/lists/partial", "cache/archives/partial"):
            (self.folder / part).mkdir(parents=True)
        (self.folder / "status").touch()
        (self.folder / "sources.list").write_text(source(self.name) + "\n")
        call(["apt-get", *self._options(), "update"], hint=HINT)

    def depends(self, *packages: str) -> list[str]:
        """Return packages and all that they depend on, however far."""
        unwanted = ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")
        options = ["--recurse", *(f"--no-{kind}" for kind in unwanted)]
        printed = call(["apt-cache", *self._options(), "depends", *options, *packages], hint=HINT)
        return [line for line in printed.splitlines() if not line.startswith((" ", "<"))]

    def unpack(self, packages: list[str], target: Path) -> None:
        """Fetch packages, checked by apt, and unpack their files under `target`."""
        debs = self.folder / "debs"
        debs.mkdir()
        call(["apt-get", *self._options(), "download", *packages], hint=HINT, cwd=debs)
        for deb in sorted(debs.iterdir()):
            call(["dpkg-deb", "-x", deb, target], hint=f"{deb.name} is damaged; try again")

    def _options(self) -> list[str]:
        settings = {
            "Dir::Etc::SourceList": self.folder / "sources.list",
            "Dir::Etc::SourceParts": "/dev/null",
            "Dir::State": self.folder / "state",
            "Dir::State::status": self.folder / "status",
            "Dir::Cache": self.folder / "cache",
            # Else lists that cannot be fetched are only warned of.
            "APT::Update::Error-Mode": "any",
            # The user that apt drops to may not read a person's cache folder.
            "APT::Sandbox::User": "root",
        }
        if self.architecture:
            settings |= {"APT::Architecture": self.architecture, "APT::Architectures::": self.architecture}
        return [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
