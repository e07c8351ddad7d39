# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes the pictures of the status page in the documents, in a browser:

python -m tests.daemon.page_picture hour docs/status-page.png
python -m tests.daemon.page_picture day docs/status-page-day.png

The hour is of a service with the policy `adaptive` on the simulated host; it has run for twenty minutes of its time.
"""

from __future__ import annotations

import asyncio
import math
import sys
import tempfile
from pathlib import Path

from ksmd_ctl.history.model import Entry, Kind, Means, Severity
from ksmd_ctl.render.page import page
from ksmd_ctl.render.page_history import PageHistory, Span
from tests.daemon.test_page_browser import Pages, browser, served
from tests.render.test_page import report
from tests.render.watch_picture import watched

NOW = 100_000.0
CALENDAR = 1_795_951_815.0
#: So long ago, of which kind, what, and whether it is a warning.
EVENTS = (
    (80000, Kind.SERVICE, "started: merging: 250,000 pages merged, 4 knobs held, 0 drifted", False),
    (53000, Kind.SERVICE, "the service that ran before ended without a stop, after 2026-11-28 20:46:40", True),
    (52990, Kind.SERVICE, "started: merging: 250,000 pages merged, 4 knobs held, 0 drifted", False),
    (30000, Kind.FOREIGN, "run was changed from 1 to 2 by bash (pid 4711, login uid 1000): is being put back", True),
    (20000, Kind.TRANSACTION, "transaction done (ksmd-ctl set merge_across_nodes=0, pid 4711, uid 0)", False),
    (300, Kind.POLICY, "quick: 2,048 new anonymous pages: about 546 may merge, for about 0.1 s of ksmd's time", False),
    (200, Kind.POLICY, "background: the last burst merged 534 pages in 0.4 s, 0.3 s of ksmd's time", False),
)


def a_day() -> PageHistory:
    """A day with a time in which no service ran, and a run = 2 that somebody wrote."""
    history = PageHistory(Span.DAY)
    means = []
    for step in range(288):
        ago = 86400 - 300 * step
        merged = 0.2 if 30000 >= ago > 28000 else 1.0 - 0.2 * math.cos(step / 40)
        known = not 57000 > ago > 53000
        means.append(
            Means(
                int(CALENDAR) - ago,
                2**30 * merged if known else None,
                pages_scanned_per_second=3000 + 20000 * abs(math.sin(step / 9)) ** 8 if known else None,
                ksm_pages={"0": 1000 + step, "1": 2000 - step},
            )
        )
    entries = [
        Entry(CALENDAR - ago, kind, "", Severity.WARNING if bad else Severity.INFO, text)
        for ago, kind, text, bad in EVENTS
    ]
    history.take(means, entries, CALENDAR, NOW)
    return history


def an_hour() -> bytes:
    """The page of a service that runs."""
    with tempfile.TemporaryDirectory() as directory:
        service = asyncio.run(watched(Path(directory), 1200.0, lambda *_: None))
        found = service.page()
        assert isinstance(found, bytes)
        return found


class _Page(Pages):
    def __init__(self, content: bytes) -> None:
        self._content = content

    def page(self, span: Span) -> bytes:
        return self._content


def main() -> None:
    what, path = sys.argv[1:]
    content = an_hour() if what == "hour" else page(report(1 << 30), a_day(), NOW)
    with served(_Page(content)) as address, browser(Path(tempfile.mkdtemp())) as opened:
        opened.size(1000, 600)
        opened.show(address)
        opened.size(1000, int(opened.run("document.documentElement.scrollHeight")))
        Path(path).write_bytes(opened.picture())


if __name__ == "__main__":
    main()
