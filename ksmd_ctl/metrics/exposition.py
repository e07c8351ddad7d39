# SPDX-License-Identifier: GPL-2.0-or-later
"""The exposition of the metrics, in the format that a scrape asks for, rendered at most once a tick."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from ksmd_ctl.metrics.collector import ReportCollector

__all__ = ["Exposition"]

# A client chooses the format, so it must not choose how many are kept.
_KEPT = 8


class Exposition:
    """The metrics of the latest report.

    :param source: gives the latest report; it is asked once a tick, and only if somebody scrapes
    """

    def __init__(self, source: Callable[[], Mapping[str, object]]) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(ReportCollector(source))
        self._rendered: dict[str, bytes] = {}

    def invalidate(self) -> None:
        """There is a new report."""
        self._rendered.clear()

    def render(self, accept: str = "") -> tuple[str, bytes]:
        """Content type and body for the Accept header of a request.

        :raises KsmdError: there is no report yet
        """
        try:
            encoder, content_type = choose_encoder(accept)
        except (TypeError, ValueError):
            # A version that is none: the library compares it with numbers.
            encoder, content_type = choose_encoder("")
        body = self._rendered.get(content_type)
        if body is None:
            body = encoder(self._registry)
            if len(self._rendered) < _KEPT:
                self._rendered[content_type] = body
        return content_type, body

    def text(self) -> str:
        """Prometheus' text format, as node_exporter's textfile collector takes it."""
        return self.render()[1].decode()
