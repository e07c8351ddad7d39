# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU of another Debian, unpacked in the cache with all that it needs: to be run with that folder as its root."""

import tempfile
from functools import partial
from pathlib import Path

from tests.guest import cache
from tests.guest.apt import Suite

_PACKAGE = "qemu-system-x86"


def fetch(suite: str) -> Path:
    """Return a root file system with this suite's QEMU in it, from the cache or else from the archive."""
    return cache.keep(f"qemu/{suite}", partial(_build, suite), f"fetching QEMU from Debian {suite}")


def _build(suite: str, tree: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".apt-", dir=tree.parent) as folder:
        archive = Suite(suite, Path(folder))
        archive.update()
        archive.unpack(archive.depends(_PACKAGE), tree)
    # As base-files makes them: packages that were built before /usr was merged have their files there.
    for name in ("bin", "sbin", "lib", "lib64"):
        if not (tree / name).exists():
            (tree / name).symlink_to(f"usr/{name}")
    for name in ("dev", "mnt", "proc", "tmp"):
        (tree / name).mkdir(exist_ok=True)
