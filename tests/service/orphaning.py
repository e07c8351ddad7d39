# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl set`` whose n-th step loses the process that does it, killed; the command itself goes on.

python -m tests.service.orphaning CONFIG STEP MILLISECONDS KNOB=VALUE

It says as JSON how many steps there were, what the killed one was, and what came of the transaction.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from ksmd_ctl.cli.change import local
from ksmd_ctl.control import carrier
from ksmd_ctl.control.change import parse_assignments

LIMIT_SECONDS = 10.0


def child_of(pid: int) -> int | None:
    """The child that does the work for a broker of one request; None once the broker has ended."""
    end = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < end:
        try:
            # Fields 3 and 4 of proc(5): its state, its parent.
            if Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"Z":
                return None
            for stat in Path("/proc").glob("[0-9]*/stat"):
                if int(stat.read_bytes().rpartition(b")")[2].split()[1]) == pid:
                    return int(stat.parent.name)
        except (OSError, IndexError):
            # It, or somebody else, ended meanwhile.
            if not Path(f"/proc/{pid}").exists():
                return None
    raise TimeoutError(f"process {pid} has no child")


def main() -> None:
    config, number, milliseconds, word = sys.argv[1:]
    steps, killed = 0, ""
    perform = carrier.perform

    def perform_and_kill(host: Any, step: Any) -> Any:
        nonlocal steps, killed
        operation = perform(host, step)
        steps += 1
        if steps == int(number) and (broker := getattr(operation, "_pid", None)) is not None:
            child = child_of(broker)
            time.sleep(int(milliseconds) / 1000)
            if child is not None and Path(f"/proc/{child}").exists():
                # It is its parent's to reap, so the pid is its own until then, or it was over just now.
                os.kill(child, signal.SIGKILL)
                killed = f"{type(step).__name__} {getattr(step, 'knob', '')}".strip()
        return operation

    carrier.perform = perform_and_kill
    with local("kernel", "/", config, "a test", change=True) as here:
        document = here.document(here.change(parse_assignments([word]), None, lambda _: None))
    print(json.dumps({"steps": steps, "killed": killed, "transaction": document}))


if __name__ == "__main__":
    main()
