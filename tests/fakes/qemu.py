# SPDX-License-Identifier: GPL-2.0-or-later
"""A process that serves QMP as QEMU does, with memory of its own: what QEMU's versions do, and what they never would.

As a program:   qemu.py BEHAVIOUR -qmp unix:PATH,server=on,wait=off ...
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.kernel.proc_pid import start_time_ticks

#: Sizes of its backends' memory, and of what no backend has: no two mappings touch.
SIZES = {"ram0": 24 << 20, "ram1": 20 << 20}
FIRMWARE_BYTES = 1 << 20
#: What of each backend two "equal" ones have in common.
EQUAL_BYTES = 4 << 20

BEHAVIOURS = (
    "right",  # madvise follows the property
    "9.1",  # the property changes, and madvise is never called
    "unaware",  # merge=off with mem-merge=on: its memory is mergeable, and it believes that it is not
    "refuses",  # qom-set fails
    "shared",  # all of its memory is shared
    "none",  # it has no memory backend
    "silent",  # it never greets
    "hangs",  # it greets, and never answers
    "hangs-up",  # it greets, and hangs up
    "nonsense",  # what it says is no QMP
    "endless",  # its answer never ends
    "events",  # as the first, with events and answers to others in between
    "equal",  # as the first; two of them have equal memory, and x-digest tells what it holds
)


def _main() -> None:
    behaviour = sys.argv[1]
    path = sys.argv[sys.argv.index("-qmp") + 1].removeprefix("unix:").partition(",")[0]
    regions = {name: _region(size, shared=behaviour == "shared") for name, size in SIZES.items()}
    firmware = _region(FIRMWARE_BYTES)
    for region in (*regions.values(), firmware):
        region.madvise(mmap.MADV_MERGEABLE)
    if behaviour == "equal":
        for name, region in regions.items():
            for at in range(0, EQUAL_BYTES, 4096):
                region[at : at + 4096] = hashlib.sha256(f"{name} {at}".encode()).digest() * 128
    merge = dict.fromkeys(regions, behaviour != "unaware")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        print("ready", flush=True)
        while True:
            # One after the other, as a monitor does.
            client, _ = listener.accept()
            with suppress(OSError), client:
                _serve(client, behaviour, regions, merge)


def _region(size: int, *, shared: bool = False) -> mmap.mmap:
    # A guard on each side, so that the kernel joins it with nothing.
    kind = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
    made = mmap.mmap(-1, size, flags=kind | mmap.MAP_ANONYMOUS)
    made[:4096] = os.urandom(4096)
    _guards.append(mmap.mmap(-1, 4096, prot=mmap.PROT_READ))
    return made


_guards: list[mmap.mmap] = []


def _serve(client: socket.socket, behaviour: str, regions: dict[str, mmap.mmap], merge: dict[str, bool]) -> None:
    def say(document: object) -> None:
        client.sendall(json.dumps(document).encode() + b"\r\n")

    if behaviour == "silent":
        client.recv(1)
        return
    if behaviour == "nonsense":
        client.sendall(b"220 mail ESMTP\r\n")
        return
    version = {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": "\x1b[31m"}
    say({"QMP": {"version": version, "capabilities": ["oob"]}})
    for line in client.makefile("rb"):
        asked = json.loads(line)
        command, arguments, number = asked["execute"], asked.get("arguments", {}), asked["id"]
        if behaviour == "hangs-up":
            return
        if behaviour == "hangs":
            continue
        if behaviour == "endless":
            while True:
                client.sendall(b"x" * 65536)
        if behaviour == "events":
            say({"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}})
            say({"return": {}, "id": number + 1000})
        result: Any = {}
        if command == "qom-list":
            kind = "child<memory-backend-ram>"
            result = [{"name": name, "type": kind} for name in regions if behaviour != "none"]
            result.append({"name": "type", "type": "string"})
        elif command == "qom-get":
            name = arguments["path"].rpartition("/")[2]
            share = behaviour == "shared"
            result = {"size": SIZES[name], "merge": merge[name], "share": share}[arguments["property"]]
        elif command == "x-digest":
            result = [hashlib.sha256(region).hexdigest() for region in regions.values()]
        elif command == "qom-set":
            name, value = arguments["path"].rpartition("/")[2], arguments["value"]
            if behaviour == "refuses":
                say({"error": {"class": "GenericError", "desc": "Couldn't change property 'merge'"}, "id": number})
                continue
            if value != merge[name] and behaviour != "9.1":
                # 13 is MADV_UNMERGEABLE, which Python has no name for everywhere.
                regions[name].madvise(mmap.MADV_MERGEABLE if value else 13)
            merge[name] = value
        say({"return": result, "id": number})


@contextmanager
def qemu(folder: Path, behaviour: str = "right", *more: str) -> Iterator[ProcessId]:
    """Such a process, for as long as this lasts.

    :param more: words at the end of its command line
    """
    path = folder / "qmp"
    words = [sys.executable, "-m", "tests.fakes.qemu", behaviour, "-qmp", f"unix:{path},server=on,wait=off", *more]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield ProcessId(process.pid, start_time_ticks(process.pid))
        finally:
            process.kill()
            process.wait()


if __name__ == "__main__":
    _main()
