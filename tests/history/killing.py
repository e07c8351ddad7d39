# SPDX-License-Identifier: GPL-2.0-or-later
"""Kills the writer of a history again and again, at any moment."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from pathlib import Path

from ksmd_ctl.history.file import HistoryFile
from ksmd_ctl.history.model import Query
from ksmd_ctl.history.reading import read_copy


def kill_again_and_again(
    path: Path, times: int, seed: int, most_bytes: int = 1 << 20, *, as_service: bool = False
) -> None:
    """After each kill the file can be read, it has all that was said to be on disk, and nothing twice.

    :param as_service: a thread of the service's own writes
    """
    chance = random.Random(seed)
    first = 1
    for _ in range(times):
        command = [sys.executable, "-m", "tests.history.writing", str(path), str(most_bytes), str(first)]
        command += ["as-service"] if as_service else []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            # From its beginning, or when it has begun to write.
            said = writer.stdout.readline() if chance.random() < 0.8 else ""
            timer = threading.Timer(chance.random() * 0.05, writer.kill)
            timer.start()
            numbers = [line for line in (said + writer.stdout.read()).splitlines() if line]
            timer.join()
        assert writer.returncode == -9, writer.returncode
        last = int(numbers[-1]) if numbers else first - 1
        found = (
            [int(entry.fields["number"]) for entry in read_copy(path, Query(limit=1 << 30))] if path.exists() else []
        )
        assert found == sorted(set(found)), "twice, or out of order"
        assert last == 0 or found[-1] in (last, last + 1), (found[-3:], last)
        if chance.random() < 0.2:
            # As the service opens it.
            file = HistoryFile(path, most_bytes)
            assert [entry.text for entry in file.entries(Query(limit=1))] == [
                f"change {number}" for number in found[-1:]
            ]
            file.means(0, 60)
            file.close()
        first = (found[-1] if found else 0) + 1
