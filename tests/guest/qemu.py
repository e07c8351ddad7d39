# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs of another Debian, unpacked in the cache with all that they need: that folder is to be their root."""

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tests.guest import cache
from tests.guest.apt import Suite


def fetch(suite: str) -> Path:
    """Return a root file system with this suite's QEMU in it, from the cache or else from the archive."""
    return fetch_programs(f"qemu/{suite}", suite, "qemu-system-x86")


def fetch_programs(name: str, suite: str, *packages: str) -> Path:
    """Return a root file system with packages of this suite, from the cache by its name or else from the archive."""
    return cache.keep(name, partial(_build, suite, packages), f"fetching {' '.join(packages)} from Debian {suite}")


def _build(suite: str, packages: Sequence[str], tree: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".apt-", dir=tree.parent) as folder:
        archive = Suite(suite, Path(folder))
        archive.update()
        archive.unpack(archive.depends(*packages), tree)
    # As base-files makes them: packages that were built before /usr was merged have their files there.
    for name in ("bin", "sbin", "lib", "lib64"):
        if not (tree / name).exists():
            (tree / name).symlink_to(f"usr/{name}")
    for name in ("dev", "mnt", "proc", "tmp"):
        (tree / name).mkdir(exist_ok=True)
