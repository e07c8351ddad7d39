# SPDX-License-Identifier: GPL-2.0-or-later
"""The exposition of the metrics, in the format that a scrape asks for, rendered at most once a tick.

prometheus_client writes the formats. Usually only values change from one tick to the next, so its last output is kept
as a template, and only the values are replaced as long as the series are the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec, module_from_spec
from itertools import groupby
from typing import Final

from ksmd_ctl.render.cells import Cells, Series, cells

# prometheus_client's __init__ loads HTTP servers and clients, mail and TLS: 4 MiB in the service for ever. With the
# package in place and __init__ not run, the modules that write the formats can be had alone.
if (_spec := find_spec("prometheus_client")) is not None:
    sys.modules.setdefault("prometheus_client", module_from_spec(_spec))

from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.utils import floatToGoString

_OPENMETRICS: Final = "application/openmetrics-text"
_TEXT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class Exposition:
    """The metrics of the latest report.

    :param source: gives the latest report; called once a tick at most, and only if somebody scrapes
    """

    def __init__(self, source: Callable[[], Mapping[str, object]]) -> None:
        self._source = source
        self._cells: Cells | None = None
        self._rendered: dict[str, bytes] = {}
        self._templates: dict[str, _Template] = {}

    def invalidate(self) -> None:
        """There is a new report."""
        self._cells = None
        self._rendered.clear()

    def render(self, accept: str = "") -> tuple[str, bytes]:
        """Content type and body for the Accept header of a request.

        :raises KsmdError: there is no report yet
        """
        content_type = openmetrics.CONTENT_TYPE_LATEST if _asks_for_openmetrics(accept) else _TEXT_TYPE
        body = self._rendered.get(content_type)
        if body is not None:
            return content_type, body
        if self._cells is None:
            self._cells = cells(self._source())
        template = self._templates.get(content_type)
        if template is not None and template.series == self._cells.series:
            body = template.fill(self._cells.values)
        else:
            body = _rendered(self._cells, as_text=content_type is _TEXT_TYPE)
            self._templates[content_type] = _Template(self._cells.series, body)
        self._rendered[content_type] = body
        return content_type, body

    def text(self) -> str:
        """Prometheus' text format, as node_exporter's textfile collector takes it."""
        return self.render()[1].decode()


def _asks_for_openmetrics(accept: str) -> bool:
    for item in accept.split(","):
        kind, *parameters = (word.strip() for word in item.split(";"))
        versions = [word.removeprefix("version=") for word in parameters if word.startswith("version=")]
        # Of version 0.0.1 scrapers that know 1.0.0 ask for both.
        if kind == _OPENMETRICS and all(version.startswith("1.") for version in versions):
            return True
    return False


def _rendered(found: Cells, *, as_text: bool) -> bytes:
    body: bytes = openmetrics.generate_latest(_Families(found, as_text=as_text))  # type: ignore[no-untyped-call]
    return body.removesuffix(b"# EOF\n") if as_text else body


class _Families:
    # What prometheus_client renders: the cells as its own families. The text format differs from OpenMetrics in that it
    # names a family like its samples, and has no infos and state sets.

    def __init__(self, found: Cells, *, as_text: bool) -> None:
        self._found = found
        self._as_text = as_text

    def collect(self) -> Iterator[Metric]:
        both = zip(self._found.series, self._found.values, strict=True)
        for _, group in groupby(both, lambda sample: sample[0][0].name):
            found = list(group)
            first = found[0][0][0]
            metric = Metric(first.name, first.help, first.kind)
            if self._as_text and first.kind in ("counter", "info"):
                metric.name += first.suffix
            if self._as_text and first.kind in ("info", "stateset"):
                metric.type = "gauge"
            for (family, labels), value in found:
                metric.add_sample(family.name + family.suffix, dict(labels), value)
            yield metric


class _Template:
    # An output without its values, each of which is at the end of a line that is no comment: there are no timestamps
    # and exemplars, which would follow it.

    __slots__ = ("_end", "_parts", "series")

    def __init__(self, series: list[Series], body: bytes) -> None:
        self.series = series
        self._parts: list[str] = []
        text = ""
        for line in body.decode().split("\n"):
            if line and not line.startswith("#"):
                self._parts.append(f"{text}{line.rpartition(' ')[0]} ")
                text = "\n"
            else:
                text += f"{line}\n"
        # The text ends with an end of line, so the last part of the split is no line.
        self._end = text.removesuffix("\n")

    def fill(self, values: list[float]) -> bytes:
        go: Callable[[float], str] = floatToGoString
        pieces = [part + go(value) for part, value in zip(self._parts, values, strict=True)]
        return ("".join(pieces) + self._end).encode()
