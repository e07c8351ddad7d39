# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian's kernels, unpacked in the cache with their modules."""

import re
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.guest import cache
from tests.guest.apt import Suite
from tests.guest.errors import lacking
from tests.guest.tools import call, require

SUITES = {"5.10": "bullseye", "6.1": "bookworm", "6.12": "trixie", "7.2": "sid"}

# The parts of a kernel are named after its release; linux-base and the like are not.
PART = re.compile(r"linux-[a-z]+-\d.*")


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel ready to boot: its image, and its release as uname prints it."""

    image: Path
    release: str


def fetch(version: str) -> Kernel:
    """Return the kernel of this version, from the cache or else from its suite."""
    suite = SUITES[version]
    why = f"fetching kernel {version} from Debian {suite}"
    tree = cache.keep(f"kernels/{version}", partial(_build, version, suite), why)
    modules = next((tree / "lib" / "modules").iterdir())
    # Newer packages put the image beside its modules.
    places = (tree / "boot" / f"vmlinuz-{modules.name}", modules / "vmlinuz")
    return Kernel(next(path for path in places if path.exists()), modules.name)


def _build(version: str, suite: str, tree: Path) -> None:
    require(["depmod"])
    with tempfile.TemporaryDirectory(prefix=".apt-", dir=tree.parent) as folder:
        archive = Suite(suite, Path(folder))
        archive.update()
        parts = [name for name in archive.depends("linux-image-amd64") if PART.fullmatch(name)]
        if not any(name.startswith(f"linux-image-{version}.") for name in parts):
            raise lacking(
                f"Debian {suite} no longer has kernel {version}, but {' '.join(parts)}",
                "change SUITES in tests/guest/kernels.py to what the archive has now",
            )
        archive.unpack(parts, tree)
    # Newer packages put modules under usr/lib; depmod looks in lib alone.
    if not (tree / "lib").exists():
        (tree / "lib").symlink_to("usr/lib")
    for modules in (tree / "lib" / "modules").iterdir():
        call(["depmod", "-b", tree, modules.name], hint=f"remove {tree} and try again")
