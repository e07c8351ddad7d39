# SPDX-License-Identifier: GPL-2.0-or-later
"""The picture of a replay in docs/recordings.md: `python -m tests.render.recording_picture >docs/replay.svg`."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from ksmd_ctl.engine.memory import page_content
from ksmd_ctl.figures import bytes_text
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.render.recording import Curve, chart
from ksmd_ctl.replay.player import Choices
from ksmd_ctl.reports.saving import saving
from tests.replay.recordings import Stage, contents, replayed

_STYLE = """<style>text{font:12px system-ui,sans-serif;fill:#5b6470}.title{font-weight:600;fill:#1b1f24}path{fill:none}
.rule{stroke:#d9dee4}.mark{stroke:#5b6470;stroke-dasharray:3 3}.line{stroke-width:2;stroke-linejoin:round}
.c0{stroke:#0072b2}.c1{stroke:#d55e00;stroke-dasharray:6 3}</style>"""


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

    def curve(side: str) -> list[tuple[float, float | None]]:
        found = [(point.recorded.time_seconds, saving(getattr(point, side), 4096)) for point in points]
        return [(seconds, None if saved is None else saved.saved_bytes) for seconds, saved in found]

    drawn = chart("saved", [Curve(side, curve(side)) for side in ("recorded", "replayed")], (), bytes_text)
    found = re.search(r"<svg[^>]*>(.*?)</svg>", drawn, re.DOTALL)
    assert found is not None
    legend = "".join(
        f'<path class="line c{index}" d="M{x} 17h30"/><text x="{x + 38}" y="21">{text}</text>'
        for index, (x, text) in enumerate(((130, "recorded, merge_across_nodes = 1"), (400, "replayed with 0")))
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="820" height="226" viewBox="0 0 820 226">'
        f'{_STYLE}<rect width="820" height="226" rx="8" fill="#fff"/><text class="title" x="78" y="21">saved</text>'
        f'{legend}<g transform="translate(4 36)">{found[1]}</g></svg>\n'
    )


if __name__ == "__main__":
    print(picture(), end="")
