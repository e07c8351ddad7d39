# SPDX-License-Identifier: GPL-2.0-or-later
"""Notifications to systemd (sd_notify(3)), and the status as a sentence, as `systemctl status` shows it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Final

from systemd import daemon

from ksmd_ctl.config.model import Config
from ksmd_ctl.daemon.log import Event
from ksmd_ctl.figures import bytes_text
from ksmd_ctl.host.knobs import RUN_OFFLINE, Knob
from ksmd_ctl.host.sample import HostIdentity, Sample
from ksmd_ctl.knobs.reconcile import GIVEN_UP, WRITING, Decision, KnobRecord, KnobState, found_value
from ksmd_ctl.reports.document import doubted
from ksmd_ctl.reports.saving import CURRENT, Counters, merged_pages, saved_frames_bytes, saving

# Notifications in each interval of the watchdog.
_WATCHDOG_SHARE: Final = 4
# The status text is updated this often.
_STATUS_SECONDS: Final = 10.0


class Notifier:
    """Sends notifications, if NOTIFY_SOCKET is set.

    :param send: `systemd.daemon.notify`
    """

    def __init__(
        self, environment: Mapping[str, str] = os.environ, send: Callable[[str], object] = daemon.notify
    ) -> None:
        self.active = bool(environment.get("NOTIFY_SOCKET"))
        self._send = send
        self._every = _watchdog_seconds(environment) / _WATCHDOG_SHARE
        self._alive_at = -1e9
        self._status = ""
        self._status_at = -1e9

    def ready(self, status: str) -> None:
        """The service is ready; also after a reload."""
        self._send_lines("READY=1", f"STATUS={status}")
        self._status = status

    def reloading(self) -> None:
        """A reload has begun; `ready` ends it."""
        # MONOTONIC_USEC is for Type=notify-reload (systemd 253); older releases ignore it.
        self._send_lines("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, status: str) -> None:
        self._send_lines("STOPPING=1", f"STATUS={status}")

    def progress(self, now: float, status: Callable[[], str], *, news: bool) -> None:
        """After a tick: notify the watchdog, and update the status, if it is time to.

        :param news: update the status at once
        """
        if not self.active:
            return
        lines = []
        # Not at each tick, because each notification wakes up systemd.
        if now >= self._alive_at + self._every:
            self._alive_at = now
            lines.append("WATCHDOG=1")
        if news or now >= self._status_at + _STATUS_SECONDS:
            self._status_at = now
            text = status()
            if text != self._status:
                self._status = text
                lines.append(f"STATUS={text}")
        if lines:
            self._send_lines(*lines)

    def _send_lines(self, *lines: str) -> None:
        if self.active:
            self._send("\n".join(lines))


def _watchdog_seconds(environment: Mapping[str, str]) -> float:
    """The interval of the watchdog, 0 for none: sd_watchdog_enabled(3), which systemd-python lacks."""
    microseconds, pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
    if not microseconds.isdigit() or (pid and pid != str(os.getpid())):
        return 0
    return int(microseconds) / 1e6


_RUNS = {0: "stopped", 1: "merging", 2: "un-merged and stopped"}


def sentence(
    identity: HostIdentity,
    config: Config,
    sample: Sample,
    decision: Decision,
    counters: Counters = CURRENT,
    *,
    reload_failed: bool = False,
    split_zero_pages: int | None = None,
) -> str:
    """The status: ``merging: 1.9 GiB saved, 3 knobs held, 0 drifted``."""
    run, raw = found_value(sample, Knob.RUN), sample.knob(Knob.RUN)
    parts = [_RUNS.get(run, f"run is {run}") if isinstance(run, int) else "run can't be read"]
    if isinstance(raw, int) and raw & RUN_OFFLINE:
        parts.append("memory going offline")
    if identity.simulated:
        parts.append("simulated")
    facts = [_saved(identity, sample, counters, split_zero_pages or 0)]
    if not config.policy.writes:
        facts.append("observing only")
    else:
        held = decision.count(KnobState.HELD)
        facts.append(f"{held} knob{'' if held == 1 else 's'} held")
        facts.append(f"{decision.count(KnobState.DRIFTED)} drifted")
        for state in (KnobState.PENDING, KnobState.FAILED, KnobState.LACKING):
            count = decision.count(state)
            if count:
                facts.append(f"{count} {state}")
    if reload_failed:
        facts.append("the new configuration is wrong and the old one stays")
    return f"{', '.join(parts)}: {', '.join(facts)}"


def _saved(identity: HostIdentity, sample: Sample, counters: Counters, split_zero_pages: int) -> str:
    page = identity.page_size_bytes
    found = saving(sample, page)
    saved = saved_frames_bytes(found, counters, split_zero_pages, page)
    if found is None or saved is None:
        return "saving not known"
    if merged_pages(sample) == 0 and not found.zero_bytes and not split_zero_pages:
        return "nothing merged yet" if sample.knob(Knob.RUN) == 1 else "nothing merged"
    if saved < 0:
        return f"costs {bytes_text(-saved)} more than it saves"
    return doubted(f"{bytes_text(saved)} saved", counters.text)


def state_event(before: KnobRecord | None, record: KnobRecord) -> tuple[Event | None, str]:
    """The event and its text for a knob whose state has changed; None for a write that has just begun."""
    match record.state:
        case KnobState.PENDING if record.reason != WRITING:
            return Event.PENDING, record.reason
        case KnobState.LACKING:
            return Event.LACKING, record.reason
        case KnobState.FAILED:
            return Event.FAILED, record.reason
        case KnobState.DRIFTED if record.reason == GIVEN_UP:
            return Event.GIVEN_UP, record.reason
        case KnobState.HELD if before is not None and before.reason not in ("", WRITING):
            return Event.HELD, f"is {record.found} again, as wanted"
        case _:
            return None, ""
