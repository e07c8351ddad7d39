# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes to a history for as long as it lives, and says after each write which number is on disk:

python -m tests.history.writing FILE MAX_BYTES FIRST [as-service]

As the service does it, in a thread, or in this one.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from pathlib import Path

from ksmd_ctl.history.file import HistoryFile
from ksmd_ctl.history.model import Entry, Kind, Means, Severity


def means(number: int) -> Means:
    return Means(60 * number, number, ksm_pages={"0": number, "1": 1})


def say(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def main(path: Path, most_bytes: int, first: int) -> None:
    file = HistoryFile(path, most_bytes)
    for number in itertools.count(first):
        kind = Kind.POLICY if number % 3 else Kind.FOREIGN
        entry = Entry(
            60.0 * number, kind, "drift", Severity.WARNING, f"change {number}", fields={"number": str(number)}
        )
        file.write([entry], [means(number)])
        if number % 10 == 0:
            file.forget(60.0 * number, 86400.0 * 3)
        say(number)


async def as_service(path: Path, most_bytes: int, first: int) -> None:
    from ksmd_ctl.config.model import Config
    from ksmd_ctl.daemon.history import HistoryKeeper
    from ksmd_ctl.daemon.log import Event, Log
    from ksmd_ctl.daemon.tasks import Tasks
    from ksmd_ctl.host.sample import HostIdentity, HostKind

    now = 60.0 * first
    config = Config(history_max_bytes=most_bytes, history_days=3)
    identity = HostIdentity(kind=HostKind.KERNEL, release="6.12", page_size_bytes=4096, boot_id="b")
    log = Log(lambda text, fields: None, lambda: now)
    keeper = HistoryKeeper(path.parent, identity, Tasks(), lambda: config, log, lambda: now)
    assert keeper.path == path
    keeper.begin(now)
    for number in itertools.count(first):
        now = 60.0 * number
        log.event(Event.DRIFT, f"change {number}", knob=f"knob {number}", number=number)
        keeper.add(means(number))
        await keeper.write(now)
        assert not keeper._waiting.entries
        say(number)


if __name__ == "__main__":
    arguments = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    if sys.argv[4:]:
        asyncio.run(as_service(*arguments))
    else:
        main(*arguments)
