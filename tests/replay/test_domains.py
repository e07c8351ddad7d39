# SPDX-License-Identifier: GPL-2.0-or-later
"""Trust domains of a recording: in what is recorded, in its report, and in a replay that keeps them apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from ksmd_ctl.engine.memory import page_content
from ksmd_ctl.errors import UsageError
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.memory import Process
from ksmd_ctl.recording.reader import Recording
from ksmd_ctl.recording.writer import Writer
from ksmd_ctl.replay.player import Choices, Player
from ksmd_ctl.reports.recording import recording_report
from tests.replay.recordings import Stage

APART = Choices({Knob.MERGE_ACROSS_NODES: 0, Knob.USE_ZERO_PAGES: 0}, apart=True)
#: All four processes have these pages; the two of a domain have as many more in common.
COMMON, OWN = 30, 20


def domain_of(process: Process) -> str:
    return process.name.rstrip("12")


def recorded(path: Path, nodes: dict[str, tuple[int, ...]], *, domains: bool = True) -> Path:
    """Two processes of each of two domains, on two nodes; each domain has one on each."""
    stage = Stage(path, domains="report" if domains else None)
    if domains:
        stage.writer.domains(nodes, domain_of)
    stage.host.set(Knob.PAGES_TO_SCAN, 500)
    for domain in ("gold", "silver"):
        for number in (1, 2):
            contents = [page_content(f"common {page}") for page in range(COMMON)]
            contents += [page_content(f"{domain} {page}") for page in range(OWN)]
            pid = stage.spawn(contents, number - 1)
            stage.host.machine.processes[pid].name = f"{domain}{number}"
    stage.change(lambda: stage.host.set(Knob.RUN, 1))
    stage.pass_time(3)
    return stage.end()


def test_a_report_has_what_domains_share_and_would_save_apart(tmp_path: Path) -> None:
    path = recorded(tmp_path / "r", {"gold": (0,), "silver": ()})
    with Recording(path) as recording:
        assert recording.facts.domains == "report"
        assert recording.domains() == {"gold": frozenset({0}), "silver": frozenset()}
        assert [process.domain for process in recording.processes()] == ["gold", "gold", "silver", "silver"]
        report = recording_report(recording)
    for found, nodes in zip(report.domains, ((0,), ()), strict=True):
        assert (found.nodes, found.processes) == (nodes, 2)
        assert found.mergeable_bytes == 2 * (COMMON + OWN) * 4096
        assert found.shared_bytes == 2 * COMMON * 4096
        assert found.could_save_bytes == (COMMON + OWN) * 4096
    # Together they save more.
    assert report.contents.could_save_bytes == (3 * COMMON + 2 * OWN) * 4096


@pytest.mark.parametrize("nodes", [{"gold": (0,), "silver": (1,)}, {"gold": (5,), "silver": ()}, {}])
def test_a_replay_keeps_domains_apart(tmp_path: Path, nodes: dict[str, tuple[int, ...]]) -> None:
    path = recorded(tmp_path / "r", nodes)
    with Recording(path) as recording:
        player = Player(recording, Choices({}))
        together = list(player.play())[-1]
        assert together.replayed.number("pages_sharing") == 3 * COMMON + 2 * OWN
        assert [one.shared for one in player.domain_pages()] == [2 * COMMON, 2 * COMMON]
        player = Player(recording, APART)
        apart = list(player.play())[-1]
    assert player.refused == {}
    assert apart.replayed.number("pages_sharing") == 2 * (COMMON + OWN)
    found = player.domain_pages()
    assert [(one.domain, one.processes, one.merged, one.shared) for one in found] == [
        ("gold", 2, 2 * (COMMON + OWN), 0),
        ("silver", 2, 2 * (COMMON + OWN), 0),
    ]


def test_without_domains_there_is_nothing_to_keep_apart(tmp_path: Path) -> None:
    path = recorded(tmp_path / "r", {}, domains=False)
    with Recording(path) as recording:
        assert recording_report(recording).domains == ()
        with pytest.raises(UsageError, match="no domains were recorded") as caught:
            Player(recording, APART)
        assert "[domains]" in caught.value.hint


def test_names_of_domains_are_replaced_too(tmp_path: Path) -> None:
    with Writer(tmp_path / "r", 0, anonymous=True) as writer:
        writer.domains({"gold": (0,), "silver": ()}, domain_of)
        assert [writer._shown("domain", name) for name in ("silver", "gold")] == ["domain 2", "domain 1"]
    assert b"gold" not in (tmp_path / "r").read_bytes()
