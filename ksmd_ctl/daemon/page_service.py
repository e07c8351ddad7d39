# SPDX-License-Identifier: GPL-2.0-or-later
"""The status page while the service runs: it gathers the last hour, and is made once a tick at most."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from ksmd_ctl.daemon.page_history import PageHistory, Point

__all__ = ["StatusPage"]


class StatusPage:
    """The page of a service.

    :param point: what the page draws of this moment; it is asked every ten seconds
    :param clock: the host's
    :param status_text: renders a report for people
    """

    def __init__(
        self,
        point: Callable[[], Point],
        clock: Callable[[], float],
        status_text: Callable[[Mapping[str, object]], str] | None = None,
    ) -> None:
        self._point = point
        self._clock = clock
        self._status_text = status_text or (lambda found: json.dumps(found, indent=2))
        self._history = PageHistory()
        self._body: bytes | None = None

    def tick(self, now: float) -> None:
        """There is a new sample, at this time of the host's clock."""
        self._body = None
        if self._history.due(now):
            self._history.add(now, self._point())

    def happened(self, text: str, bad: bool) -> None:
        """Something was logged."""
        self._history.mark(self._clock(), text, bad=bad)

    def body(self, report: Mapping[str, object]) -> bytes:
        """The page, with this report as the present state."""
        if self._body is None:
            # Only here: on most hosts nobody ever looks.
            from ksmd_ctl.daemon.page import page

            self._body = page(report, self._history, self._clock(), self._status_text(report))
        return self._body
