# SPDX-License-Identifier: GPL-2.0-or-later
"""The folder that keeps kernels and images between runs."""

import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def folder() -> Path:
    """Return the cache folder, made if need be; KSMD_CTL_GUEST_CACHE moves it."""
    moved = os.environ.get("KSMD_CTL_GUEST_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(moved) if moved else Path(base) / "ksmd-ctl" / "guest"
    path.mkdir(parents=True, exist_ok=True)
    return path.resolve()


def keep(name: str, build: Callable[[Path], None], why: str) -> Path:
    """Return the cached folder `name`; where it is missing, `build` fills it.

    A half-built folder is never seen: it gets its name only when it is whole.
    """
    root = folder()
    path = root / name
    if path.is_dir():
        return path
    with _lock(root):
        if path.is_dir():  # another run built it while this one waited
            return path
        if sys.stderr.isatty():
            print(why, file=sys.stderr, flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=path.parent))
        try:
            build(draft)
            draft.chmod(0o755)
            draft.rename(path)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return path


@contextmanager
def _lock(root: Path) -> Iterator[None]:
    with open(root / "lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
