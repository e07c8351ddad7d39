# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/watch.svg is what the live view shows now."""

from __future__ import annotations

import html
import re
import time
from pathlib import Path

import pytest

from tests.render.watch_picture import picture

FILE = Path(__file__).parents[2] / "docs/watch.svg"


def text(svg: str) -> str:
    """What it says, without blanks. How that is placed and coloured changes with the release of rich."""
    return "".join(html.unescape("".join(re.findall(r"<text[^>]*>([^<]*)</text>", svg))).split())


def test_the_picture_is_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    found, documented = picture(), FILE.read_text()
    assert text(found) == text(documented), "python -m tests.render.watch_picture >docs/watch.svg"
    # A document loads nothing from elsewhere.
    assert "http" not in documented.replace("http://www.w3.org/2000/svg", "")
