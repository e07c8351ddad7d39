# SPDX-License-Identifier: GPL-2.0-or-later
"""The status page in a browser without a window: it draws, loads nothing else, and fits where it is shown."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import shutil
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ksmd_ctl.daemon import http
from ksmd_ctl.render.page import page
from ksmd_ctl.render.page_history import Span
from tests.render.test_page import an_hour, report

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
PATIENCE_SECONDS = 60


class Pages:
    """A service of which an hour is known."""

    config = SimpleNamespace(metrics_names=())

    def exposition(self, accept: str) -> tuple[str, bytes]:
        raise NotImplementedError

    def page(self, span: Span) -> bytes:
        found = report(1 << 30)
        found["knobs"]["run"]["reason"] = "averyveryverylongword" * 20
        return page(found, an_hour(), 3600.0)


@contextmanager
def served(pages: Pages | None = None) -> Iterator[str]:
    """The page on this host; its address."""
    loop = asyncio.new_event_loop()
    sock = http.listen("127.0.0.1", 0)

    async def serve() -> http.HttpServer:
        return http.HttpServer(pages or Pages(), sock)

    server = loop.run_until_complete(serve())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://{server.address}/"
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class Browser:
    """As much of a WebDriver client as is needed here (W3C WebDriver, and Chromium's own cdp command)."""

    def __init__(self, port: int, profile: Path) -> None:
        self.driver = f"http://127.0.0.1:{port}"
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"capabilities": {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}}
        session = self.send("POST", "/session", wanted)["sessionId"]
        self.driver += f"/session/{session}"

    def send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.driver + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as response:
            return json.load(response)["value"]

    def show(self, address: str) -> None:
        self.send("POST", "/url", {"url": address})

    def run(self, script: str) -> Any:
        return self.send("POST", "/execute/sync", {"script": f"return {script}", "args": []})

    def command(self, name: str, **parameters: object) -> Any:
        return self.send("POST", "/goog/cdp/execute", {"cmd": name, "params": parameters})

    def size(self, width: int, height: int) -> None:
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def colours(self, scheme: str) -> None:
        self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def picture(self) -> bytes:
        return base64.b64decode(self.command("Page.captureScreenshot", format="png")["data"])


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    if shutil.which("chromedriver") is None or shutil.which("chromium") is None:
        pytest.skip("needs the packages chromium and chromium-driver")
    command = ["chromedriver", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as driver:
        assert driver.stdout is not None
        try:
            port = next(
                found for line in driver.stdout if (found := re.search(r"started successfully on port (\d+)", line))
            )
            opened = Browser(int(port[1]), folder / "profile")
            try:
                yield opened
            finally:
                opened.send("DELETE", "")
        finally:
            driver.terminate()


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with served() as address, browser(tmp_path_factory.mktemp("browser")) as opened:
        opened.size(1000, 1500)
        opened.show(address)
        yield opened


def test_it_draws_three_charts(shown: Browser) -> None:
    boxes = shown.run("[...document.querySelectorAll('svg')].map(e => [e.clientWidth, e.clientHeight])")
    assert len(boxes) == 3
    assert all(width > 400 and height > 80 for width, height in boxes)
    # A line that is drawn has a length, and a colour that is not the ground's.
    lengths = shown.run("[...document.querySelectorAll('path.line')].map(e => e.getTotalLength())")
    assert len(lengths) == 4
    assert all(length > 500 for length in lengths)


def test_it_asks_for_nothing_else(shown: Browser) -> None:
    assert shown.run("performance.getEntriesByType('resource').map(e => e.name)") == []
    assert shown.run("document.scripts.length") == 0


@pytest.mark.parametrize("width", [1600, 1000, 480, 320])
def test_it_fits(shown: Browser, width: int) -> None:
    shown.size(width, 800)
    beyond = "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
    assert shown.run(f"{beyond}.map(e => e.tagName)") == []
    assert shown.run("document.documentElement.scrollWidth <= innerWidth")
    assert shown.run("[...document.querySelectorAll('svg')].every(e => e.clientWidth > 200)")


def luminance(colour: str) -> float:
    """The relative luminance of ``rgb(r, g, b)`` (WCAG 2)."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_light_and_dark(shown: Browser, scheme: str) -> None:
    shown.size(1000, 1500)
    shown.colours(scheme)

    def colour(selector: str, name: str) -> str:
        return str(shown.run(f"getComputedStyle(document.querySelector('{selector}')).{name}"))

    ground = colour("body", "backgroundColor")
    assert (luminance(ground) < 0.5) is (scheme == "dark")
    card = colour(".chart", "backgroundColor")
    for selector in ("dd", "dt", ".scale", "td", ".bad td:last-child", "pre"):
        assert contrast(colour(selector, "color"), card) >= 4.5, selector
    for line in ("path.c0", "path.c1"):
        assert contrast(colour(line, "stroke"), card) >= 3, line
    assert shown.picture()[:4] == b"\x89PNG"
