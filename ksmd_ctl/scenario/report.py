# SPDX-License-Identifier: GPL-2.0-or-later
"""The HTML report: one file without scripts. Each step of a scenario with who shares what after it, on each host, and
the engine's trees as SVG.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from ksmd_ctl.scenario.compare import Observation, Result, Verdict
from ksmd_ctl.scenario.host_steps import Observe
from ksmd_ctl.scenario.model import Step, step_key
from ksmd_ctl.scenario.runner import Run, Watch
from ksmd_ctl.scenario.session import ENGINE, Kernel, Session

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

# The steps of larger scenarios are not shown.
_MOST_PAGES = 400

# The engine knows pages by (process's name, address).
_Names = dict[tuple[str, int], str]


@dataclass(slots=True)
class _Frame:
    """What one host showed after a step."""

    observation: Observation
    state: Mapping[str, Any] | None = None
    names: _Names = field(default_factory=dict)


class Report:
    """Collects while scenarios run; pass `watch` to `Session.run`."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._frames: dict[str, dict[int, _Frame]] = {}
        self._parts: list[tuple[Result, str | None]] = []

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
                frame.names = _page_names(run)

        return look

    def add(self, result: Result) -> None:
        """The scenario is over."""
        # Of made-up scenarios only those that differ are of interest.
        whole = result.scenario.file or result.verdict is Verdict.DIFFERENT
        self._parts.append((result, "\n".join(self._steps(result)) if whole else None))
        self._frames.clear()

    def write(self, path: Path, kernel: Kernel | None, profile: str) -> None:
        """Write the file."""
        path.write_text("\n".join(self._page(kernel, profile)), encoding="utf-8")

    def _page(self, kernel: Kernel | None, profile: str) -> Iterator[str]:
        sides = f"engine {profile}" if kernel is None else f"kernel {kernel.release} and engine {profile}"
        yield f'<!doctype html><html lang="en"><meta charset="utf-8"><title>KSM: {escape(sides)}</title>'
        yield f"<style>{_STYLE}</style><h1>{escape(sides)}</h1>"
        yield f"<p>{self._session.counts()}. "
        yield "A box is a frame: its pages share it; its colour is its node; a thick border says KSM page. "
        yield "In the trees a filled node is black, one with a dashed border is misplaced, a grey one stale.</p><table>"
        for number, (result, steps) in enumerate(self._parts):
            name = escape(result.scenario.name)
            link = f'<a href="#s{number}">{name}</a>' if steps is not None else name
            yield f'<tr><td class="{result.verdict}">{result.word}<td>{link}<td>{escape(result.reason)}'
        yield "</table>"
        for number, (result, steps) in enumerate(self._parts):
            if steps is not None:
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
            yield "<p>It has too many pages for a picture of each step.</p>"
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
            text = "" if step is None else "<br>".join(escape(line) for line in step.write())
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
    pictures = _stable_trees(frame.state, frame.names) + _unstable_trees(frame.state, frame.names)
    return f"<details><summary>trees</summary>{pictures}</details>" if pictures else ""


# -- trees -----------------------------------------------------------------------------------------------------------


_WIDTH, _HEIGHT, _GAP = 128, 46, 12


def _page_names(run: Run) -> _Names:
    """The names of a scenario's pages."""
    return {(place[0], run.address(*place)): name for name, place in run.state.pages.items()}


def _item_name(item: Mapping[str, Any], names: _Names) -> str:
    key = (item["process"], item["address"])
    return names.get(key, f"{key[0]}.{key[1]:#x}")


@dataclass(slots=True)
class _Box:
    """A node of a picture.

    :ivar lines: of text
    """

    key: Hashable
    parent: Hashable
    lines: list[str]
    title: str
    fill: str
    dashed: bool = False


def _stable_trees(state: Mapping[str, Any], names: _Names) -> str:
    """All stable trees that have nodes, and migrate_nodes."""
    parts = []
    for tree in state["stable_trees"]:
        if tree["nodes"]:
            boxes = [_stable(node, names) for node in tree["nodes"]]
            parts.append(f"<div>stable tree {tree['nid']}</div>{_tree(boxes)}")
    if state["migrate_nodes"]:
        boxes = [_stable(node, names) for node in state["migrate_nodes"]]
        for box in boxes:
            box.parent = None
        parts.append(f"<div>migrate_nodes</div>{_draw(boxes, dict.fromkeys((box.key for box in boxes), 0))}")
    return "".join(parts)


def _unstable_trees(state: Mapping[str, Any], names: _Names) -> str:
    """All unstable trees that have items."""
    parts = []
    for tree in state["unstable_trees"]:
        boxes = []
        for item in tree["items"]:
            parent = item["parent"] and _item_name(item["parent"], names)
            name = _item_name(item, names)
            boxes.append(_Box(name, parent, [name], item["digest"] or "gone", _fill(item["black"], False)))
        if boxes:
            parts.append(f"<div>unstable tree {tree['nid']}</div>{_tree(boxes)}")
    return "".join(parts)


def _stable(node: Mapping[str, Any], names: _Names) -> _Box:
    if node["kind"] == "chain":
        dups = [f"dup {dup['id']}: {len(dup['items'])} on {dup['node_of_kpfn']}" for dup in node["dups"]]
        title = "; ".join(", ".join(_item_name(item, names) for item in dup["items"]) for dup in node["dups"])
        misplaced = any(dup["misplaced"] for dup in node["dups"])
        return _Box(node["id"], node["parent"], ["chain", *dups], title, _fill(node["black"], False), misplaced)
    title = ", ".join(_item_name(item, names) for item in node["items"]) or "no items"
    lines = [f"{len(node['items'])} items, node {node['node_of_kpfn']}", title[:17] + ("…" if len(title) > 17 else "")]
    return _Box(node["id"], node["parent"], lines, title, _fill(node["black"], node["stale"]), node["misplaced"])


def _fill(black: bool | None, stale: bool) -> str:
    if stale:
        return "#d9d9d9"
    return "#c9cdd6" if black else "#f6c9c4" if black is False else "#fff"


def _tree(boxes: Sequence[_Box]) -> str:
    """Boxes in order of their contents: x is the place in that order, y the depth."""
    parents = {box.key: box.parent for box in boxes}
    depths: dict[Hashable, int] = {}
    for box in boxes:
        depth, at = 0, box.parent
        while at is not None and at in parents:
            depth, at = depth + 1, parents[at]
        depths[box.key] = depth
    return _draw(boxes, depths)


def _draw(boxes: Sequence[_Box], depths: Mapping[Hashable, int]) -> str:
    tall = _HEIGHT + 14 * max(0, max(len(box.lines) for box in boxes) - 2)
    places = {
        box.key: (number * (_WIDTH // 2 + _GAP), depths[box.key] * (tall + 2 * _GAP))
        for number, box in enumerate(boxes)
    }
    # Neighbours in order are never at the same depth next to each other, but in a row they are.
    if len(set(depths.values())) == 1:
        places = {box.key: (number * (_WIDTH + _GAP), 0) for number, box in enumerate(boxes)}
    width = max(x for x, _ in places.values()) + _WIDTH + 4
    height = max(y for _, y in places.values()) + tall + 4
    parts = [f'<svg width="{width}" height="{height}" viewBox="-2 -2 {width} {height}">']
    for box in boxes:
        if box.parent in places:
            (x1, y1), (x2, y2) = places[box.parent], places[box.key]
            middle = _WIDTH // 2
            parts.append(f'<line x1="{x1 + middle}" y1="{y1 + tall}" x2="{x2 + middle}" y2="{y2}" stroke="#888"/>')
    for box in boxes:
        x, y = places[box.key]
        dash = ' stroke-dasharray="5 3" stroke-width="2"' if box.dashed else ""
        parts.append(
            f'<g><title>{escape(box.title)}</title><rect x="{x}" y="{y}" width="{_WIDTH}" height="{tall}" rx="6"'
            f' fill="{box.fill}" stroke="#555"{dash}/>'
        )
        parts += [
            f'<text x="{x + 6}" y="{y + 17 + 15 * line}">{escape(text)}</text>' for line, text in enumerate(box.lines)
        ]
        parts.append("</g>")
    return "".join([*parts, "</svg>"])
