# SPDX-License-Identifier: GPL-2.0-or-later
"""The picture of a replay in docs/recordings.md: `python -m tests.render.recording_picture >docs/replay.svg`."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from ksmd_ctl.engine.memory import page_content
from ksmd_ctl.figures import bytes_text
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.render.charts import HEIGHT, WIDTH, Axis, Curve, drawing
from ksmd_ctl.replay.player import Choices
from ksmd_ctl.reports.saving import saving
from tests.replay.recordings import Stage, contents, replayed

_STYLE = """<style>text{font:12px system-ui,sans-serif;fill:#5b6470}.title{font-weight:600;fill:#1b1f24}path{fill:none}
.grid{stroke:#d9dee4}.zero{stroke:#5b6470}.line{stroke-width:2;stroke-linejoin:round}
.c0{stroke:#0b62c4}.c1{stroke:#b35900}.dashed{stroke-dasharray:6 3}.middle{text-anchor:middle}.right{text-anchor:end}
</style>"""


def picture() -> str:
    """What a simulated host saved whose pages merged across nodes, and what it would have saved otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(Path(folder) / "r")
        stage.host.set(Knob.PAGES_TO_SCAN, 60)
        pids = [stage.spawn(contents(number, 800, common=0.6), number % 2) for number in range(2)]
        stage.change(lambda: stage.host.set(Knob.RUN, 1))
        for number in range(2, 8):
            stage.pass_time(4)
            stage.change(lambda: pids.append(stage.spawn(contents(len(pids), 800, common=0.6), len(pids) % 2)))
            for page in range(0, 800, 16):
                stage.write(pids[number - 2], page, page_content(f"written {number} {page}"))
            stage.change(lambda: None)
        stage.pass_time(6)
        points = replayed(stage.end(), Choices({Knob.MERGE_ACROSS_NODES: 0}))

    def curve(side: str) -> Curve:
        found = [saving(getattr(point, side), 4096) for point in points]
        values = [math.nan if saved is None else saved.saved_bytes for saved in found]
        return Curve(side, values, dashed=side == "replayed")

    times = [point.recorded.time_seconds for point in points]
    axis = Axis(0.0, times[-1], ("", "", ""), times[-1])
    drawn = drawing([curve(side) for side in ("recorded", "replayed")], times, (), axis)
    legend = "".join(
        f'<path class="line {kind}" d="M{x} 17h30"/><text x="{x + 38}" y="21">{text}</text>'
        for x, kind, text in (
            (130, "c0", "recorded, merge_across_nodes = 1"),
            (400, "c1 dashed", "replayed with 0"),
        )
    )
    scale = "".join(
        f'<text class="right" x="72" y="{y}">{bytes_text(value)}</text>'
        for y, value in ((48, drawn.high), (44 + HEIGHT, drawn.low))
    )
    labels = "".join(
        f'<text class="{kind}" x="{78 + WIDTH * part}" y="{60 + HEIGHT}">{times[-1] * part:.0f} s</text>'
        for part, kind in ((0, "left"), (0.5, "middle"), (1, "right"))
    )
    height = HEIGHT + 76
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="820" height="{height}" viewBox="0 0 820 {height}">'
        f'{_STYLE}<rect width="820" height="{height}" rx="8" fill="#fff"/>'
        f'<text class="title" x="78" y="21">saved</text>{legend}{scale}{labels}'
        f'<g transform="translate(78 40)">{drawn.svg}</g></svg>\n'
    )


if __name__ == "__main__":
    print(picture(), end="")
