# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's trees as SVG: stable trees with chains and exiles, and unstable trees."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from ksmd_ctl.scenario.runner import Run

__all__ = ["Labels", "stable_trees", "unstable_trees"]

_WIDTH, _HEIGHT, _GAP = 128, 46, 12


@dataclass(slots=True)
class Labels:
    """Names for what the engine knows by address.

    :ivar pages: the name of a page by (process's name, address)
    """

    pages: dict[tuple[str, int], str] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Run) -> Labels:
        """The names of one scenario's pages."""
        found = cls()
        for process, regions in run.regions.items():
            for address, region in regions.values():
                for page in range(len(region.pages)):
                    found.pages[process, address + page * run.size] = f"{process}.{region.name}.{page}"
        return found

    def item(self, item: Mapping[str, Any]) -> str:
        """A name for an rmap_item."""
        key = (item["process"], item["address"])
        return self.pages.get(key, f"{key[0]}.{key[1]:#x}")


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


def stable_trees(state: Mapping[str, Any], labels: Labels) -> str:
    """All stable trees that have nodes, and the exiles."""
    parts = []
    for tree in state["stable_trees"]:
        if tree["nodes"]:
            boxes = [_stable(node, labels) for node in tree["nodes"]]
            parts.append(f"<div>stable tree {tree['nid']}</div>{_tree(boxes)}")
    if state["migrate_nodes"]:
        boxes = [_stable(node, labels) for node in state["migrate_nodes"]]
        for box in boxes:
            box.parent = None
        parts.append(f"<div>migrate_nodes</div>{_row(boxes)}")
    return "".join(parts)


def unstable_trees(state: Mapping[str, Any], labels: Labels) -> str:
    """All unstable trees that have items."""
    parts = []
    for tree in state["unstable_trees"]:
        boxes = []
        for item in tree["items"]:
            parent = item["parent"] and labels.item(item["parent"])
            name = labels.item(item)
            boxes.append(_Box(name, parent, [name], item["digest"] or "gone", _fill(item["black"], False)))
        if boxes:
            parts.append(f"<div>unstable tree {tree['nid']}</div>{_tree(boxes)}")
    return "".join(parts)


def _stable(node: Mapping[str, Any], labels: Labels) -> _Box:
    if node["kind"] == "chain":
        dups = [f"dup {dup['id']}: {len(dup['items'])} on {dup['node_of_kpfn']}" for dup in node["dups"]]
        names = "; ".join(", ".join(map(labels.item, dup["items"])) for dup in node["dups"])
        misplaced = any(dup["misplaced"] for dup in node["dups"])
        return _Box(node["id"], node["parent"], ["chain", *dups], names, _fill(node["black"], False), misplaced)
    names = ", ".join(map(labels.item, node["items"])) or "no items"
    lines = [f"{len(node['items'])} items, node {node['node_of_kpfn']}", names[:17] + ("…" if len(names) > 17 else "")]
    return _Box(node["id"], node["parent"], lines, names, _fill(node["black"], node["stale"]), node["misplaced"])


def _fill(black: bool | None, stale: bool) -> str:
    if stale:
        return "#d9d9d9"
    return "#c9cdd6" if black else "#f6c9c4" if black is False else "#fff"


def _row(boxes: Sequence[_Box]) -> str:
    return _draw(boxes, {box.key: 0 for box in boxes})


def _tree(boxes: Sequence[_Box]) -> str:
    """Boxes in order of their contents: so x is the place in that order, y the depth."""
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
