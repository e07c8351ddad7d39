# SPDX-License-Identifier: GPL-2.0-or-later
"""How long a busy process waits at most while it is switched off and on, beside un-merging its pages alone.

A thread of it writes, maps and unmaps memory all the time; another one makes the calls, and is stopped for that. With
and without a sparse mapping, of which the kernel looks at every page. Uses this host's KSM; every knob is put back.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

from benchmarks.transaction import KSM, PAGES, ROUNDS, SPARSE_GIB, Busy, busy, ksm, merge
from benchmarks.unmerging import middle

_UNMERGE = """
import sys
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.operation import Unshare, UnsharePart
from ksmd_ctl.kernel.detection import open_reader
from ksmd_ctl.kernel.proc_pid import start_time_ticks
from ksmd_ctl.kernel.unshare import unshare
pid = int(sys.argv[1])
with open_reader() as reader:
    print(unshare(Unshare((UnsharePart(ProcessId(pid, start_time_ticks(pid))),)), reader=reader).unshared and 0.0)
"""
_SWITCH = """
import json, sys
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.switching import Switch
from ksmd_ctl.kernel.proc_pid import start_time_ticks
from ksmd_ctl.kernel.switching import switch
pid, on = int(sys.argv[1]), sys.argv[2] == "on"
found = switch(Switch(ProcessId(pid, start_time_ticks(pid)), on))
if found.after is not on or found.left:
    sys.exit(f"{found}")
print(found.stopped_seconds)
"""


def python(code: str, *words: str) -> float:
    """What code prints, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr + done.stdout)
    return float(json.loads(done.stdout))


def nothing(_: Busy) -> float:
    time.sleep(1)
    return 0.0


def unmerge(process: Busy) -> float:
    return python(_UNMERGE, str(process.pid))


def off(process: Busy) -> float:
    return python(_SWITCH, str(process.pid), "off")


def on(process: Busy) -> float:
    return python(_SWITCH, str(process.pid), "on")


def run() -> None:
    ways: tuple[tuple[str, Callable[[Busy], float]], ...] = (
        ("nothing", nothing),
        ("unmerge", unmerge),
        ("off", off),
        ("on", on),
    )
    with ksm():
        for sparse_gib in (0, SPARSE_GIB):
            gaps: dict[str, list[float]] = {name: [] for name, _ in ways}
            stops: dict[str, list[float]] = {name: [] for name, _ in ways}
            with busy(sparse_gib) as process:
                for _ in range(ROUNDS):
                    for name, way in ways:
                        if name != "on":
                            merge()
                        process.longest_gap_seconds()
                        stops[name].append(way(process))
                        # The round that it is in counts as well, once that is over.
                        time.sleep(0.2)
                        gaps[name].append(process.longest_gap_seconds())
            print(f"{PAGES:,} merged pages" + (f", and {sparse_gib} GiB with one page in it" if sparse_gib else ""))
            for name, _ in ways:
                print(
                    f"  {name:8} longest gap, median {1000 * middle(gaps[name]):.1f} ms, worst "
                    f"{1000 * max(gaps[name]):.1f} ms; its calling thread stopped, median "
                    f"{1000 * middle(stops[name]):.1f} ms, worst {1000 * max(stops[name]):.1f} ms"
                )
            beyond = middle(gaps["off"]) - middle(gaps["unmerge"])
            print(f"  off beyond unmerge alone: {1000 * beyond:+.1f} ms in the median")


if __name__ == "__main__":
    if not os.access(KSM / "run", os.W_OK):
        sys.exit("needs root and a kernel with KSM")
    run()
