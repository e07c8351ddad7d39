# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading all of a recording."""

from __future__ import annotations

from pathlib import Path

from ksmd_ctl.recording.reader import Recording


def read_all(path: Path) -> None:
    with Recording(path) as recording:
        list(recording.samples())
        list(recording.changes())
        list(recording.counts())
        for part in (
            recording.nodes,
            recording.domains,
            recording.processes,
            recording.looks,
            recording.process_looks,
            recording.events,
        ):
            part()
