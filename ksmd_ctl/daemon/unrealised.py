# SPDX-License-Identifier: GPL-2.0-or-later
"""The service counts what could be merged and is not, besides twins; it changes nothing (docs/healing.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ksmd_ctl.config.model import Config
from ksmd_ctl.control.unrealised import Apart, Copies
from ksmd_ctl.daemon.running import Running
from ksmd_ctl.errors import KsmdError
from ksmd_ctl.host.duplicates import DuplicatePages
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.sample import Sample


class UnrealisedWatch:
    """Keeps the figures.

    :param config: gives the configuration that is in force
    :param changed: is called when there is something new to be reported
    """

    def __init__(self, host: Host, config: Callable[[], Config], changed: Callable[[], None]) -> None:
        self._host = host
        self._config = config
        self._changed = changed
        self._copies = Copies()
        self._apart = Apart()
        self._sample: Sample | None = None
        self._running: Running[DuplicatePages] | None = None

    def reasons(self) -> Mapping[str, int | None]:
        """By reason, how many pages; None where that isn't known."""
        return {"swapin": self._copies.pages, **self._apart.pages}

    def tick(self, sample: Sample) -> None:
        """Take a sample in, and look where that tells more."""
        self._sample = sample
        self._copies = self._copies.step(sample)
        self._apart, look = self._apart.step(sample, self._config().census_cpu_share)
        if look is not None and self._running is None:
            self._running = Running(self._host.duplicates(look.budget_frames), self._looked)

    def _looked(self, came: DuplicatePages | KsmdError) -> None:
        assert self._sample is not None
        self._running = None
        config = self._config()
        found = None if isinstance(came, KsmdError) else came
        self._apart = self._apart.took(found, self._sample, config.census_cpu_share, config.census_interval)
        self._changed()

    def close(self) -> None:
        """The service ends: stop what runs."""
        if self._running is not None:
            self._running.abandon()
            self._running = None
