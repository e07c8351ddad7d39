# SPDX-License-Identifier: GPL-2.0-or-later
"""Processes that have what the doctor is to find, and the doctor itself, for tests on this host."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ksmd_ctl.host.knobs import KNOBS
from tests.service.running import LIMIT_SECONDS, PROGRAM, configure, run_command, until

PAGE = 4096

#: What each of them begins with.
_PRELUDE = """
import ctypes, mmap, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
PAGE = 4096
def memory(pages, shared=False):
    kind = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
    return mmap.mmap(-1, pages * PAGE, flags=kind | mmap.MAP_ANONYMOUS)
def address(area):
    return ctypes.addressof(ctypes.c_char.from_buffer(area))
def content(number):
    return number.to_bytes(8, "little") * (PAGE // 8)
def mergeable(contents, huge=False, asked=True):
    area = memory(len(contents))
    area.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    if asked:
        area.madvise(mmap.MADV_MERGEABLE)
    for at, number in enumerate(contents):
        area[at * PAGE : (at + 1) * PAGE] = content(number)
    return area
def ready():
    print("ready", flush=True)
def command():
    return sys.stdin.readline().strip()
"""


class Program:
    """A process that waits for commands after what it has done; `say` gives it one and waits until it is done."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.pid = process.pid
        self.wait()

    def wait(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line == "ready\n", f"it said {line!r}"

    def say(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        self.wait()


@contextmanager
def program(code: str, name: Sequence[str] = ("program",), arguments: Sequence[str] = ()) -> Iterator[Program]:
    """A process that runs some Python, and then waits; killed at the end.

    :param name: what its command line begins with
    :param arguments: what it ends with
    """
    words = [*name, "-I", "-S", "-c", f"{_PRELUDE}{code}\nready()\nwhile command(): ready()\n", *arguments]
    with subprocess.Popen(
        words,
        executable=sys.executable,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield Program(process)
        finally:
            process.kill()


def equal(pages: int, first: int = 1) -> str:
    """Code for so many mergeable pages, each of another content than the others."""
    return f"area = mergeable(range({first}, {first + pages}))"


class Visit:
    """What the doctor said."""

    def __init__(self, code: int, text: str) -> None:
        self.code = code
        self.document: dict[str, Any] = json.loads(text)

    def __getitem__(self, code: str) -> dict[str, Any]:
        """The finding of a code."""
        found = {finding["code"]: finding for finding in self.document["findings"]}
        assert code in found, self
        finding: dict[str, Any] = found[code]
        return finding

    @property
    def codes(self) -> list[str]:
        return [finding["code"] for finding in self.document["findings"] if not _foreign(finding)]

    def __repr__(self) -> str:
        return json.dumps(self.document, indent=1)

    def figure(self, code: str, name: str) -> Any:
        """One figure of a finding."""
        return {figure["name"]: figure["value"] for figure in self[code]["evidence"]}[name]


def _foreign(finding: dict[str, Any]) -> bool:
    """Whether it is about real virtual machines, started beside the tests so that they don't merge."""
    names = [figure["name"] for figure in finding["evidence"]]
    return finding["code"] == "not-asked" and all(name.startswith(("qemu-system", "others")) for name in names)


def visit(folder: Path, *words: str, seconds: float = 1.0, prefix: Sequence[str] = ()) -> Visit:
    """Have the doctor look, at the service below a folder where there is one."""
    line = ["doctor", "--json", "--socket", str(folder / "socket"), "--interval", str(seconds)]
    if not prefix and "--config" not in words:
        # What it advised before is kept there, and not where this host's own service has it.
        path = folder / "ksmd-ctl.toml"
        line += ["--config", str(path if path.exists() else configure(folder, ""))]
    line += words
    if prefix:
        done = subprocess.run([*prefix, PROGRAM, *line], capture_output=True, text=True, timeout=180, check=False)
    else:
        done = run_command(*line, timeout=180)
    assert done.returncode in (0, 1), done.stderr
    found = Visit(done.returncode, done.stdout)
    assert found.document["healthy"] is (done.returncode == 0)
    return found


class Ksm:
    """This host's KSM, while the lock is held, with the kernel's own values to begin with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for knob, spec in KNOBS.items():
            if (folder / knob).exists():
                self.set(**{knob: spec.default})

    def set(self, **knobs: object) -> None:
        for name, value in knobs.items():
            (self.folder / name).write_text(str(value))

    def __getitem__(self, name: str) -> int:
        return int((self.folder / name).read_text())

    def scanned(self, times: int = 1) -> float:
        """Wait for so many full scans more, and say how many seconds that took: much longer on a busy machine."""
        begun, wanted = time.monotonic(), self["full_scans"] + times
        until(f"{times} full scans", lambda: True if self["full_scans"] >= wanted else None, 4 * LIMIT_SECONDS)
        return time.monotonic() - begun

    def merging(self, **knobs: object) -> None:
        """Scan everything in each batch, all pages in each scan, and not so often that it were dear."""
        wanted = {"pages_to_scan": 1_000_000, "sleep_millisecs": 500, "smart_scan": 0, **knobs}
        self.set(**{name: value for name, value in wanted.items() if (self.folder / name).exists()})
        self.set(run=1)
