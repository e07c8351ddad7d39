# SPDX-License-Identifier: GPL-2.0-or-later
"""The HTML report: one file, no scripts, nothing fetched. Each step of a scenario with who shares what after it, on
each host, and the engine's trees as pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from ksmd_ctl.scenario.check import step_key
from ksmd_ctl.scenario.compare import Result, Verdict
from ksmd_ctl.scenario.model import Observe, Step
from ksmd_ctl.scenario.observation import Observation
from ksmd_ctl.scenario.pictures import Labels, stable_trees, unstable_trees
from ksmd_ctl.scenario.runner import Run, Watch
from ksmd_ctl.scenario.session import ENGINE, Session
from ksmd_ctl.scenario.write import step_text

__all__ = ["Report"]

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em; color: #1a1a1a }
h2 { margin: 2em 0 .3em } code, .p { font-family: ui-monospace, monospace; font-size: 13px }
table { border-collapse: collapse } td, th { padding: .25em .7em; text-align: left; vertical-align: top }
tr.s { border-top: 1px solid #ddd } .equal { color: #17692b } .different { color: #b3261e; font-weight: 600 }
.skipped { color: #6b6b6b } .g { display: inline-block; margin: 2px; padding: 1px 5px; border: 1px solid #888;
border-radius: 4px } .g.k { border-width: 2px; border-color: #1a1a1a } .d { background: #fbe3e1 }
.n0 { background: #dbe9fb } .n1 { background: #fdebc8 } .n2 { background: #dcf2dc } .n3 { background: #eddff5 }
.c { color: #444; font-size: 13px } svg text { font: 12px ui-monospace, monospace } details { margin: .4em 0 1em }
"""

# One look for each step would be a book for thousands of pages.
_MOST_PAGES = 400


@dataclass(slots=True)
class _Frame:
    """What one host showed after a step."""

    observation: Observation
    state: Mapping[str, Any] | None = None
    labels: Labels = field(default_factory=Labels)


class Report:
    """Collects while scenarios run; pass `watch` to `Session.run`."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._frames: dict[str, dict[int, _Frame]] = {}
        self._parts: list[tuple[Result, str]] = []

    def watch(self, host: str) -> Watch:
        """The watcher of one host for the scenario that comes next."""
        frames = self._frames[host] = {}

        def look(number: int, _step: Step | None, run: Run) -> None:
            if sum(len(region.pages) for region in run.scenario.regions) > _MOST_PAGES:
                return
            frame = frames[number] = _Frame(run.look())
            state = getattr(run.lab, "state", None)
            if host == ENGINE and state is not None:
                frame.state = state()
                frame.labels = Labels.of(run)

        return look

    def add(self, result: Result) -> None:
        """The scenario is over."""
        # Of made-up scenarios only those that differ are of interest.
        whole = result.scenario.file or result.verdict is Verdict.DIFFERENT
        self._parts.append((result, "\n".join(self._steps(result)) if whole else ""))
        self._frames.clear()

    def write(self, path: Path, kernel: Mapping[str, object] | None, profile: str) -> None:
        """Write the file."""
        path.write_text("\n".join(self._page(kernel, profile)), encoding="utf-8")

    def _page(self, kernel: Mapping[str, object] | None, profile: str) -> Iterator[str]:
        sides = f"engine {profile}" if kernel is None else f"kernel {kernel['release']} and engine {profile}"
        yield f'<!doctype html><html lang="en"><meta charset="utf-8"><title>KSM: {escape(sides)}</title>'
        yield f"<style>{_STYLE}</style><h1>{escape(sides)}</h1>"
        yield f"<p>{self._session.counts()}. "
        yield "A box is a frame: its pages share it; its colour is its node; a thick border says KSM page. "
        yield "In the trees a filled node is black, one with a dashed border is misplaced, a grey one stale.</p><table>"
        for number, (result, steps) in enumerate(self._parts):
            name = escape(result.scenario.name)
            link = f'<a href="#s{number}">{name}</a>' if steps else name
            yield f'<tr><td class="{result.verdict}">{result.word}<td>{link}<td>{escape(result.reason)}'
        yield "</table>"
        for number, (result, steps) in enumerate(self._parts):
            if steps:
                yield f'<h2 id="s{number}">{escape(result.scenario.name)}</h2>'
                if result.scenario.text:
                    yield f"<p>{escape(result.scenario.text)}</p>"
                yield f'<p class="{result.verdict}">{result.word}{": " if result.reason else ""}'
                yield f"{escape(result.reason)}</p>"
                for difference in result.differences:
                    yield f'<div class="different">{escape(str(difference))}</div>'
                yield steps
        yield "</html>"

    def _steps(self, result: Result) -> Iterator[str]:
        hosts = [host for host in result.outcomes if self._frames.get(host)]
        if not hosts:
            return
        yield f"<table><tr><th>step{''.join(f'<th>{host}' for host in hosts)}"
        steps: Sequence[Step | None] = (None, *result.scenario.steps)
        for number, step in enumerate(steps):
            frames = {host: self._frames[host][number] for host in hosts if number in self._frames[host]}
            if not frames:
                continue
            if isinstance(step, Observe) and number > 0:
                # It changes nothing: the frame before shows the same.
                yield f'<tr class="s"><td colspan="{len(hosts) + 1}">observed as <b>{escape(step.label)}</b>'
                continue
            title = "start" if step is None else escape(step_key(number, step))
            text = "" if step is None else "<br>".join(escape(line) for line in step_text(step))
            yield f'<tr class="s"><td>{title}<br><code>{text}</code>'
            for host in hosts:
                if host in frames:
                    other = next((frames[name] for name in frames if name != host), None)
                    yield f"<td>{_groups(frames[host], other)}{_counters(frames[host], other)}{_trees(frames[host])}"
        yield "</table>"


def _groups(frame: _Frame, other: _Frame | None) -> str:
    ksm = set(frame.observation.ksm)
    there = set(other.observation.groups) if other else None
    found = []
    for group in frame.observation.groups:
        node = frame.observation.nodes.get(group[0])
        classes = ["g", "p"] + ([f"n{node % 4}"] if node is not None else []) + (["k"] if group[0] in ksm else [])
        if there is not None and group not in there:
            classes.append("d")
        where = "zero page" if node is None else f"node {node}"
        found.append(f'<span class="{" ".join(classes)}" title="{where}">{escape(" ".join(group))}</span>')
    return "".join(found)


def _counters(frame: _Frame, other: _Frame | None) -> str:
    mine, theirs = frame.observation.counters, other.observation.counters if other else {}
    shown = []
    for name, value in mine.items():
        if value or theirs.get(name):
            text = f"{name} {value}"
            shown.append(f'<span class="d">{text}</span>' if theirs.get(name, value) != value else text)
    return f'<div class="c">{", ".join(shown)}</div>'


def _trees(frame: _Frame) -> str:
    if frame.state is None:
        return ""
    pictures = stable_trees(frame.state, frame.labels) + unstable_trees(frame.state, frame.labels)
    return f"<details><summary>trees</summary>{pictures}</details>" if pictures else ""
