# SPDX-License-Identifier: GPL-2.0-or-later
"""The picture of ``ksmd-ctl watch`` in the documents: ``python -m tests.render.watch_picture >docs/watch.svg``.

A service with the policy `adaptive` runs on the simulated host for two minutes of its time, in which somebody else
writes a knob once. So it is the same each time.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from rich.console import Console

from ksmd_ctl.config.loader import load
from ksmd_ctl.config.model import Config, PolicyName
from ksmd_ctl.daemon.log import Log
from ksmd_ctl.daemon.loop import ServiceLoop
from ksmd_ctl.daemon.notify import Notifier
from ksmd_ctl.engine.host import open_engine_host
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.knobs.saved_knobs import SavedKnobs
from ksmd_ctl.render.live import View, screen
from ksmd_ctl.render.live_events import Events
from ksmd_ctl.render.live_figures import Sort, Trends
from ksmd_ctl.reports.history import history_document
from ksmd_ctl.transactions.executor import Executor

WIDTH: Final = 100
HEIGHT: Final = 30
_SECONDS: Final = 120
_FOREIGN_AT: Final = 75
# 2026-11-30 12:00 UTC; the view shows the time of day.
_BEGAN: Final = 1796040000.0

# rich's own has fonts from the network.
_FORMAT: Final = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 20 {width} {height}" role="img" aria-label="ksmd-ctl watch">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: {char_height}px;
line-height: {line_height}px }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/></clipPath>{lines}</defs>
<rect y="20" width="{width}" height="{height}" rx="8" fill="#14171b"/>
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}<g class="{unique_id}-matrix">
{matrix}
</g></g></svg>
"""


async def watched(directory: Path, seconds: float, look: Callable[[ServiceLoop, float], None]) -> ServiceLoop:
    """A service after so much of its time.

    :param look: called after each tick, with Unix seconds
    """
    host = open_engine_host(source=None)
    config = dataclasses.replace(_config(directory), policy=PolicyName.ADAPTIVE, census_interval=20.0)
    executor = Executor(host, SavedKnobs(directory, host.identity))
    service = ServiceLoop(config, host, executor, Log(lambda *_: None), Notifier({}), lambda: config)
    service.history.calendar = lambda: _BEGAN + host.clock()
    foreign = False
    while host.clock() < seconds:
        host.advance(min(service._interval(), 1.0))
        if host.clock() >= _FOREIGN_AT and not foreign:
            foreign = True
            host.set(Knob.PAGES_TO_SCAN, 100)
        service.tick()
        while service.tasks.running:
            await asyncio.sleep(0)
        look(service, service.history.calendar())
    return service


def _config(directory: Path) -> Config:
    path = directory / "c.toml"
    path.write_text("")
    return load(str(path))


def picture() -> str:
    """The picture as SVG. The time zone has to be UTC."""
    trends, events = Trends(), Events()

    def look(service: ServiceLoop, now: float) -> None:
        if not trends.saved:
            service.history.follow(lambda entry: events.hear(history_document([entry], 1), anew=False))
        trends.add(service.document(), now)

    with tempfile.TemporaryDirectory() as directory:
        report = asyncio.run(watched(Path(directory), _SECONDS, look)).document()
    console = Console(
        file=io.StringIO(), record=True, width=WIDTH, height=HEIGHT, force_terminal=True, color_system="truecolor"
    )
    console.print(screen(View(report, trends, events, _BEGAN + _SECONDS, Sort.SHARING), WIDTH, HEIGHT))
    return console.export_svg(code_format=_FORMAT, unique_id="watch")


if __name__ == "__main__":
    os.environ["TZ"] = "UTC"
    time.tzset()
    sys.stdout.write(picture())
