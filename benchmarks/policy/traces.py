# SPDX-License-Identifier: GPL-2.0-or-later
"""Real page contents: the memory of emulated guests after their boot, and of programs at work.

A trace is recorded on the spot where the cache has none, and kept there compressed, each content once. Nothing
is left out: zero pages stay, and their share is told.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from array import array
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.policy.pages import PAGE, ZERO, present, processes_below
from ksmd_ctl.host.memory import Range
from ksmd_ctl.kernel.ranges import mappings

__all__ = ["RECIPES", "Recipe", "Trace", "fetch"]

ROOT = Path(__file__).parents[2]
READY = "ready to be recorded"
_FORMAT = 2
_BOOT_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a trace is made.

    :ivar kind: ``guest`` or ``program``
    :ivar source: a guest: the runner's options; a program: what its Python runs
    :ivar number: tells recordings of the same thing apart
    """

    kind: str
    name: str
    source: tuple[str, ...]
    number: int

    @property
    def key(self) -> str:
        digest = hashlib.sha256(json.dumps([_FORMAT, asdict(self)]).encode()).hexdigest()[:10]
        return f"{self.name}-{self.number}-{digest}"

    @property
    def path(self) -> Path:
        """Where the trace is, or will be."""
        return folder() / self.key


@dataclass(frozen=True, slots=True)
class Trace:
    """The pages of one recording.

    :ivar pages: for each page the number of its content
    :ivar contents: each content once
    """

    name: str
    kind: str
    pages: array[int]
    contents: bytes

    @property
    def zero_pages(self) -> int:
        distinct = len(self.contents) // PAGE
        zero = next((at for at in range(distinct) if self.contents[at * PAGE : (at + 1) * PAGE] == ZERO), None)
        return 0 if zero is None else self.pages.count(zero)


_SYSTEM = ("--system", "trixie", "--nodes", "1", "--memory", "256", "--cpus", "1")
_STDLIB = (
    "import argparse, asyncio, ctypes, csv, decimal, difflib, email.mime.text, encodings.idna, fractions, http.server\n"
    "import imaplib, inspect, json, logging.config, multiprocessing.pool, pdb, pydoc, sqlite3, ssl, tarfile, unittest\n"
    "import xml.dom.minidom, xmlrpc.server, zipfile, zoneinfo, ast, pathlib\n"
    # A program has data, too: the syntax trees of a hundred modules.
    "files = sorted(pathlib.Path(ast.__file__).parent.glob('[a-m]*.py'))[:100]\n"
    "data = [(str(file), ast.parse(file.read_bytes())) for file in files]\n"
)
_CHECKER = (
    "import mypy.build, mypy.main, mypy.options\n"
    "options = mypy.options.Options(); options.incremental = False; options.preserve_asts = True\n"
    "data = mypy.build.build([mypy.build.BuildSource('ksmd_ctl/host/knobs.py', 'ksmd_ctl.host.knobs')], options)\n"
)
# One that holds the same files in memory as the next one like it, as servers of models or of maps do.
_LOADER = (
    "import pathlib, sys, sysconfig\n"
    "places = [pathlib.Path(sysconfig.get_path(name)) for name in ('stdlib', 'purelib')]\n"
    "files = [file for place in places for file in place.rglob('*.so')]\n"
    "files.sort(key=lambda file: -file.stat().st_size)\n"
    "data = [file.read_bytes() for file in files[:40]]\n"
)
RECIPES = (
    *(Recipe("guest", "debian-13", _SYSTEM, number) for number in range(4)),
    *(Recipe("guest", f"linux-{kernel}", ("--kernel", kernel, "--nodes", "1", "--memory", "192", "--cpus", "1"), number)
      for kernel, number in (("6.1", 0), ("6.1", 1), ("7.2", 0))),
    *(Recipe("program", name, (source,), number)
      for name, source in (("stdlib", _STDLIB), ("checker", _CHECKER), ("loader", _LOADER)) for number in range(2)),
)  # fmt: skip


def folder() -> Path:
    """Where traces are kept; XDG_CACHE_HOME is heeded."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base) / "ksmd-ctl" / "traces"
    path.mkdir(parents=True, exist_ok=True)
    return path


def fetch(recipes: Iterable[Recipe] = RECIPES) -> list[Trace]:
    """The traces of these recipes, recorded where they are missing."""
    return [_fetch(recipe) for recipe in recipes]


def _fetch(recipe: Recipe) -> Trace:
    path = recipe.path
    if not path.exists():
        print(f"recording {recipe.key}", flush=True)
        pages, contents = _record_guest(recipe) if recipe.kind == "guest" else _record_program(recipe)
        head = json.dumps({"format": _FORMAT, "recipe": asdict(recipe), "pages": len(pages)}).encode() + b"\n"
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as draft:
            draft.write(zlib.compress(head + pages.tobytes() + contents, level=1))
        Path(draft.name).rename(path)
    data = zlib.decompress(path.read_bytes())
    end = data.index(b"\n") + 1
    size = array("I").itemsize * json.loads(data[:end])["pages"]
    pages = array("I", data[end : end + size])
    return Trace(f"{recipe.name}-{recipe.number}", recipe.kind, pages, data[end + size :])


def _private(pid: int) -> list[Range]:
    return [item for item in mappings(pid) if "sh" not in item.flags]


def _gather(pages: Iterable[tuple[int, bytes]]) -> tuple[array[int], bytes]:
    numbers: dict[bytes, int] = {}
    found = array("I", (numbers.setdefault(page, len(numbers)) for _, page in pages))
    return found, b"".join(numbers)


def _record_guest(recipe: Recipe) -> tuple[array[int], bytes]:
    """A guest's memory once it has come up; QEMU is stopped meanwhile."""
    command = [str(ROOT / "tests/guest/run"), *recipe.source, "--timeout", str(_BOOT_SECONDS),
               "--", "sh", "-c", f"echo {READY}; sleep {_BOOT_SECONDS}"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as runner:
        try:
            assert runner.stdout is not None
            if runner.stdout.readline().strip() != READY:
                raise RuntimeError(f"{recipe.key}: the guest did not come up")
            # What a boot has left to do in the background.
            time.sleep(3)
            qemu = next(pid for pid in processes_below(runner.pid) if _comm(pid).startswith("qemu-system"))
            os.kill(qemu, signal.SIGSTOP)
            try:
                # QEMU has greater mappings, for translated code.
                size = int(recipe.source[recipe.source.index("--memory") + 1]) << 20
                memory = [item for item in _private(qemu) if "wr" in item.flags and item.end - item.start == size]
                if len(memory) != 1:
                    raise RuntimeError(f"{recipe.key}: QEMU has {len(memory)} mappings of the memory's size")
                return _gather(present(qemu, memory))
            finally:
                os.kill(qemu, signal.SIGCONT)
        finally:
            runner.send_signal(signal.SIGTERM)


def _record_program(recipe: Recipe) -> tuple[array[int], bytes]:
    program = f"{recipe.source[0]}\nprint({READY!r}, flush=True)\ninput()\n"
    command = [sys.executable, "-c", program]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            if process.stdout.readline().strip() != READY:
                raise RuntimeError(f"{recipe.key}: the program did not come up")
            return _gather(present(process.pid, _private(process.pid)))
        finally:
            process.kill()


def _comm(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text()
