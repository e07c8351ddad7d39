# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs of one script as a picture: memory saved over time with the oracle's, and CPU seconds below. Pure; SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from benchmarks.policy.figures import Run, Step
from benchmarks.policy.pages import PAGE

__all__ = ["draw"]

_WIDTH, _LEFT, _RIGHT = 900, 64, 20
_TOP, _HIGH, _LOW, _GAP, _BOTTOM = 74, 280, 150, 46, 44
_MIB = PAGE / 2**20
# Told apart also by those who don't see red and green apart (Okabe and Ito).
_COLOURS = ("#0072b2", "#e69f00", "#cc79a7", "#009e73", "#d55e00", "#56b4e9", "#8a6d3b")
_INK, _FAINT, _PAPER = "#222", "#ddd", "#fff"


@dataclass(frozen=True, slots=True)
class _Panel:
    """Where a diagram is, and what its axes span."""

    top: int
    height: int
    seconds: float
    most: float

    def x(self, at: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * at / self.seconds

    def y(self, value: float) -> float:
        return self.top + self.height * (1 - value / self.most)

    def line(self, points: Sequence[tuple[float, float]], colour: str, more: str = "") -> str:
        path = " ".join(f"{self.x(at):.1f},{self.y(value):.1f}" for at, value in points)
        return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8" {more}/>'

    def axes(self, title: str) -> list[str]:
        parts = []
        step = _round_step(self.most / 4)
        for number in range(int(self.most / step) + 1):
            y = self.y(number * step)
            parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="{_FAINT}"/>')
            parts.append(_text(_LEFT - 8, y + 4, f"{number * step:g}", "end"))
        parts.append(_text(_LEFT, self.top - 10, title, weight="600"))
        return parts


def draw(title: str, below: str, runs: Sequence[Run], seconds: float) -> str:
    """The picture, with a line of text below; it has paper of its own, for dark pages, too."""
    most = max(step.saving for run in runs for step in run.steps) * _MIB
    high = _Panel(_TOP, _HIGH, seconds, 1.05 * max(1.0, most))
    low = _Panel(_TOP + _HIGH + _GAP, _LOW, seconds, 1.05 * max(0.1, *(run.cpu for run in runs)))
    height = low.top + low.height + _BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}"'
        f' viewBox="0 0 {_WIDTH} {height}" font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" rx="8" fill="{_PAPER}"/>',
        _text(_LEFT, 22, title, size=14, weight="600"),
        *high.axes("MiB saved; dashed: what could be saved (oracle)"),
        *low.axes("CPU seconds, ksmd and service or script together"),
    ]
    for at in _ticks(seconds):
        parts.append(_text(low.x(at), low.top + low.height + 18, f"{at:g}", "middle"))
    parts.append(_text(_WIDTH - _RIGHT, height - 8, "seconds", "end"))
    parts.append(_text(_LEFT, height - 8, below, size=11))
    # All had the same events; when they were done differs by fractions of a second.
    parts.append(high.line(_steps(runs[0].steps, seconds), _INK, 'stroke-dasharray="6 4"'))
    for number, run in enumerate(runs):
        colour = _COLOURS[number % len(_COLOURS)]
        parts.append(high.line([(sample.at, max(0.0, sample.saved * _MIB)) for sample in run.samples], colour))
        parts.append(low.line([(sample.at, sample.ksmd + sample.service) for sample in run.samples], colour))
        x = _LEFT + 150 * number
        parts.append(f'<path d="M{x} 41h22" stroke="{colour}" stroke-width="3"/>{_text(x + 28, 45, run.policy)}')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _steps(steps: Sequence[Step], seconds: float) -> list[tuple[float, float]]:
    points, value = [(0.0, 0.0)], 0.0
    for step in steps:
        points += [(step.at, value), (step.at, step.saving * _MIB)]
        value = step.saving * _MIB
    return [*points, (seconds, value)]


def _ticks(seconds: float) -> list[float]:
    step = _round_step(seconds / 8)
    return [number * step for number in range(int(seconds / step) + 1)]


def _round_step(least: float) -> float:
    """The next of 1, 2, 5, 10, 20, 50..."""
    power = 1.0
    while power * 10 <= least:
        power *= 10
    while power > least:
        power /= 10
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least)


def _text(x: float, y: float, text: str, anchor: str = "start", *, size: int = 12, weight: str = "400") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{_INK}" text-anchor="{anchor}" font-size="{size}"'
        f' font-weight="{weight}">{escape(text)}</text>'
    )
