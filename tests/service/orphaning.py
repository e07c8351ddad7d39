# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl set`` whose n-th step loses the process that does it, killed; the command itself goes on.

python -m tests.service.orphaning CONFIG STEP MILLISECONDS KNOB=VALUE

It says as JSON which steps had a process, what the killed one was, and what came of the transaction.
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
from ksmd_ctl.privileged.client import RequestOperation
from ksmd_ctl.transactions import executor
from ksmd_ctl.transactions.change import parse_assignments

LIMIT_SECONDS = 10.0


def state(pid: int) -> str:
    """As proc(5) has it, one letter; empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def worker_of(operation: RequestOperation[Any]) -> int | None:
    """The child of this process's broker that does the work of an operation; None where that is over already."""
    end = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < end:
        if operation.poll():
            return None
        for broker in children_of(os.getpid()):
            for worker in children_of(broker):
                return worker
    raise TimeoutError("nobody does the work")


def main() -> None:
    """Change the knob, and kill the process of one step."""
    config, number, milliseconds, word = sys.argv[1:]
    steps, killed = 0, ""
    with_process = []
    perform = executor.perform

    def perform_and_kill(host: Any, step: Any) -> Any:
        nonlocal steps, killed
        operation = perform(host, step)
        steps += 1
        if isinstance(operation, RequestOperation):
            with_process.append(steps)
        if isinstance(operation, RequestOperation) and steps == int(number):
            child = worker_of(operation)
            time.sleep(int(milliseconds) / 1000)
            if child is not None and state(child) not in ("", "Z"):
                os.kill(child, signal.SIGKILL)
                killed = f"{type(step).__name__} {getattr(step, 'knob', '')}".strip()
        return operation

    executor.perform = perform_and_kill
    with local("kernel", "/", config, "a test", change=True) as here:
        document = here.document(here.change(parse_assignments([word]), None, lambda _: None))
    print(json.dumps({"steps": with_process, "killed": killed, "transaction": document}))


if __name__ == "__main__":
    main()
