# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes a recording of a host: samples at equal distances, and looks at page contents in between, in small steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from ksmd_ctl.errors import ReadError
from ksmd_ctl.host.fields import FIELDS_BY_NAME
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.knobs import KNOBS, Knob
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.page_sample import LookSteps, PageSampler
from ksmd_ctl.host.sample import Reading, Sample
from ksmd_ctl.recording.writer import Writer

#: Between the beginnings of two looks.
LOOK_SECONDS: Final = 10.0
_COMMIT_SECONDS: Final = 10.0
_TICKS: Final = 100
# How soon a change of these is seen; of others, with the next sample.
_KNOBS_SECONDS: Final = 0.1
_WATCHED: Final = (Knob.RUN, Knob.MERGE_ACROSS_NODES, Knob.SMART_SCAN, Knob.PAGES_TO_SCAN, Knob.SLEEP_MILLISECS)
# What one step of a look may take at most.
_STEP_SECONDS: Final = 0.05


class ServiceEvent(NamedTuple):
    """What a service tells: when, in seconds since 1970, what kind of event (docs/history.md), and what."""

    time_seconds: float
    kind: str
    text: str


class Heard(NamedTuple):
    """What others told: who wrote a knob, and a service's events."""

    writers: Mapping[Knob, str] = {}
    events: tuple[ServiceEvent, ...] = ()


def nobody(seconds: float) -> Heard:
    """Wait; nobody tells anything."""
    if seconds > 0:
        time.sleep(seconds)
    return Heard()


class Recorder:
    """One recording.

    :param cpu: the share of a CPU that looks may take
    :param boot_offset: what has to be added to `Host.clock` for the time since boot, which processes' starts have
    :param listen: waits so many seconds at most for what others tell
    :ivar looks: how many were made
    """

    def __init__(
        self,
        host: Host,
        sampler: PageSampler,
        writer: Writer,
        *,
        cpu: float = 0.05,
        boot_offset: float = 0.0,
        look_seconds: float = LOOK_SECONDS,
        listen: Callable[[float], Heard] = nobody,
    ) -> None:
        self._host = host
        self._sampler = sampler
        self._writer = writer
        self._cpu = cpu
        self._offset = boot_offset
        self._look_seconds = look_seconds
        self._began = host.clock()
        self._listen = listen
        self._begun = time.time()
        # Who wrote knobs last, of which no sample has seen the change yet; and whether somebody has since the last one.
        self._writers: dict[Knob, str] = {}
        self._written = False
        # The first sample is committed at once: without one a file is no recording.
        self._committed = -math.inf
        self._before: Sample | None = None
        self._steps: LookSteps | None = None
        # Looks may begin from here on, and the next step may be done.
        self._look_at = self._step_at = self._began
        self.looks = 0

    @property
    def seconds(self) -> float:
        """How long it has been recording."""
        return self._host.clock() - self._began

    def sample(self) -> Sample:
        """Take a sample; knobs that have changed and processes that are gone are events."""
        self._written = False
        sample = self._host.sample(fresh=True)
        # Who wrote what it has seen may not have been told yet.
        self._hear(0.0)
        seconds = sample.time_seconds - self._began
        self._writer.sample(seconds, sample)
        for knob, text in _changes(self._before, sample):
            who = self._writers.pop(knob, "")
            self._writer.event(seconds, "knob", f"{text} by {who}" if who else text)
        ended = seconds if self._before is None else (self._before.time_seconds + sample.time_seconds) / 2 - self._began
        self._before = sample
        counts = self._sampler.counts(self._writer.processes)
        self._writer.counts(seconds, counts)
        for process in self._writer.processes:
            if process not in counts:
                self._writer.event(seconds, "process", f"{self._writer.ended(ended, process)} ended")
        if self._host.clock() - self._committed >= _COMMIT_SECONDS:
            self._committed = self._host.clock()
            self._writer.commit()
        return sample

    def look(self) -> None:
        """Look at all pages now, in one go."""
        while not self._step(within_seconds=60.0):
            pass

    def pages_until(self, time_seconds: float, stop: Callable[[], bool]) -> None:
        """Look at pages until a time on the host's clock or a stop, as far as the CPU share allows; else wait.

        A knob that changes meanwhile is seen soon: a sample is taken then.
        """
        while (now := self._host.clock()) < time_seconds and not stop():
            due = self._look_at if self._steps is None else self._step_at
            if now < due:
                self._hear(min(due - now, time_seconds - now, _KNOBS_SECONDS))
            else:
                self._step(min(_STEP_SECONDS, time_seconds - now))
            if self._written or self._knob_changed():
                self.sample()

    def _hear(self, seconds: float) -> None:
        heard = self._listen(seconds)
        self._writers |= heard.writers
        self._written |= bool(heard.writers)
        for event in heard.events:
            self._writer.event(event.time_seconds - self._begun, event.kind, event.text, service=True)

    def _knob_changed(self) -> bool:
        if self._before is None:
            return False
        for knob in _WATCHED:
            was = self._before.knob(knob)
            try:
                if was is not None and self._host.read(knob) != was:
                    return True
            except ReadError:
                continue
        return False

    def _step(self, within_seconds: float) -> bool:
        """Go on with a look, or begin one; whether it has come to its end."""
        if self._steps is None:
            zero_pages = self._before is not None and self._before.number(Knob.USE_ZERO_PAGES) == 1
            self._steps = self._sampler.look(zero_pages=zero_pages)
            self._look_at = self._host.clock() + self._look_seconds
        before = time.process_time()
        until = time.monotonic() + within_seconds
        try:
            while True:
                next(self._steps)
                # Who writes a knob may be another program, or gone, soon after.
                self._hear(0.0)
                if time.monotonic() >= until:
                    break
        except StopIteration as end:
            self._steps = None
            self.looks += 1
            self._writer.look(end.value, lambda at: at - self._began, self._started)
            self._writer.commit()
        spent = time.process_time() - before
        self._step_at = self._host.clock() + spent * (1 / self._cpu - 1)
        if self._steps is None:
            self._look_at = max(self._look_at, self._step_at)
        return self._steps is None

    def _started(self, process: ProcessId) -> float:
        return process.start_time_ticks / _TICKS - self._offset - self._began

    def run(self, stop: Callable[[], bool], for_seconds: float, every_seconds: float, tell: Callable[[], None]) -> None:
        """Record until somebody stops it or the time is over; the end has a sample, too.

        :param tell: called after each sample
        """
        next_sample = self._began
        ending = False
        while True:
            before = self._host.clock()
            self.sample()
            tell()
            if ending:
                return
            # On a slow host with many processes samples must not take all the time.
            now = self._host.clock()
            next_sample = max(next_sample + every_seconds, now + (now - before))
            self.pages_until(min(next_sample, self._began + for_seconds), stop)
            ending = stop() or self.seconds >= for_seconds


def _changes(before: Sample | None, sample: Sample) -> list[tuple[Knob, str]]:
    if before is None:
        return []
    found = []
    for name in FIELDS_BY_NAME.keys() & KNOBS.keys():
        was, now = before.readings.get(name), sample.readings.get(name)
        if _known(was) and _known(now) and was != now:
            found.append((Knob(name), f"{name}: {was} → {now}"))
    return sorted(found)


def _known(reading: Reading | None) -> bool:
    return reading is not None and not isinstance(reading, ReadError)
