# SPDX-License-Identifier: GPL-2.0-or-later
"""The exposition of the metrics, in the format that a scrape asks for, rendered at most once a tick.

How a format is written only prometheus_client knows, and it does so anew for every line. Its lines differ from tick
to tick in their values alone; so its last rendering is kept as a form with holes, and as long as the series are the
same, only the holes are filled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import groupby

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from ksmd_ctl.render.cells import Cells, Series, cells

_OPENMETRICS = "application/openmetrics-text"


class Exposition:
    """The metrics of the latest report.

    :param source: gives the latest report; it is asked once a tick, and only if somebody scrapes
    """

    def __init__(self, source: Callable[[], Mapping[str, object]]) -> None:
        self._source = source
        self._cells: Cells | None = None
        self._rendered: dict[str, bytes] = {}
        self._forms: dict[str, _Form] = {}

    def invalidate(self) -> None:
        """There is a new report."""
        self._cells = None
        self._rendered.clear()

    def render(self, accept: str = "") -> tuple[str, bytes]:
        """Content type and body for the Accept header of a request.

        :raises KsmdError: there is no report yet
        """
        encoder, content_type = choose_encoder(_OPENMETRICS if _asks_for_openmetrics(accept) else "")
        body = self._rendered.get(content_type)
        if body is not None:
            return content_type, body
        if self._cells is None:
            self._cells = cells(self._source())
        form = self._forms.get(content_type)
        if form is not None and form.series == self._cells.series:
            body = form.fill(self._cells.values)
        else:
            registry = CollectorRegistry(auto_describe=False)
            registry.register(_Families(self._cells))
            body = encoder(registry)
            self._forms[content_type] = _Form(self._cells.series, body)
        self._rendered[content_type] = body
        return content_type, body

    def text(self) -> str:
        """Prometheus' text format, as node_exporter's textfile collector takes it."""
        return self.render()[1].decode()


def _asks_for_openmetrics(accept: str) -> bool:
    # The library gives back the version that was asked for as it came, and nobody is to choose what an answer's header
    # says. Without one it is its own.
    try:
        return choose_encoder(accept)[1].startswith(_OPENMETRICS)
    except (TypeError, ValueError):
        # A version that is none: the library compares it with numbers.
        return False


class _Families(Collector):
    # What prometheus_client renders: the cells as its own families.

    def __init__(self, found: Cells) -> None:
        self._found = found

    def collect(self) -> Iterator[Metric]:
        both = zip(self._found.series, self._found.values, strict=True)
        for _, group in groupby(both, lambda sample: sample[0][0].name):
            found = list(group)
            first = found[0][0][0]
            metric = Metric(first.name, first.help, first.kind)
            for (family, labels), value in found:
                metric.add_sample(family.name + family.suffix, dict(labels), value)
            yield metric


class _Form:
    # A rendering with a hole where each value stands: at the end of every line that is no comment. Neither
    # timestamps nor exemplars, which would stand behind it, are ever given.

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
        # What is behind the last line's end is no line.
        self._end = text.removesuffix("\n")

    def fill(self, values: list[float]) -> bytes:
        go: Callable[[float], str] = floatToGoString
        pieces = [part + go(value) for part, value in zip(self._parts, values, strict=True)]
        return ("".join(pieces) + self._end).encode()
