# SPDX-License-Identifier: GPL-2.0-or-later
"""The demonstration with real guests: the same Debian system three times, emulated, each with all its memory mergeable.

They boot one after the other, each with the same time. What could be saved is counted at the end of that time, from
what the guests hold then, while they stand still; it is taken to have been so since the guest was up.
Running guests write all the time, and pages that are alike only for a moment are counted, too: all of it may be out of
reach (`fixed` at full speed had 92 % on a busy machine).
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.policy.cgroups import Group
from benchmarks.policy.contenders import Contender, Place
from benchmarks.policy.figures import Arrival, Run, Step
from benchmarks.policy.host import Unfit
from benchmarks.policy.oracle import saving
from benchmarks.policy.pages import anonymous_pages, mappings, present
from benchmarks.policy.stage import INTERVAL, LEAD_SECONDS, Watch
from tests.guest import image
from tests.guest.boot import CPU
from tests.guest.image import System

__all__ = ["GUESTS", "play"]

GUESTS = 3
_MIB = 256
_UP = b"Reached target multi-user.target"
_LINE = (
    "root=/dev/vda rw console=ttyS0 quiet systemd.show_status=yes systemd.log_color=no systemd.unit=multi-user.target"
)


class Guest:
    """QEMU with one guest."""

    def __init__(self, system: System, group: Group, console: Path) -> None:
        self._console = console
        self.process = subprocess.Popen(
            group.inside(
                ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-machine", "q35,mem-merge=on", "-cpu", CPU,
                 "-m", f"{_MIB}M", "-smp", "1", "-no-reboot", "-nodefaults", "-nic", "none", "-display", "none",
                 "-serial", f"file:{console}", "-kernel", system.kernel, "-initrd", system.initramfs, "-append", _LINE,
                 "-drive", f"file={system.disk},format=raw,if=virtio,snapshot=on,cache=unsafe"]
            ),
            stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def up(self) -> bool:
        """Whether its boot is over."""
        return self._console.exists() and _UP in self._console.read_bytes()


def play(contender: Contender, seconds: float, place: Place, tenants: Group) -> Run:
    """One run; afterwards nothing is merged, and nobody is there.

    :raises Unfit: a guest did not come up in its time
    """
    system = image.fetch()
    watch = Watch(contender, place, tenants)
    guests: list[Guest] = []
    steps: list[Step] = []
    arrivals: list[Arrival] = []
    contender.start(place)
    try:
        time.sleep(LEAD_SECONDS)
        watch.begin()
        for number in range(GUESTS):
            until = seconds * (number + 1) / GUESTS
            guests.append(Guest(system, tenants, place.scratch / f"console-{number}"))
            while (now := watch.now) < until:
                if len(arrivals) == number and guests[-1].up():
                    arrivals.append(Arrival(number, round(now, 3), until))
                watch.take(sum(anonymous_pages(guest.process.pid) for guest in guests))
                time.sleep(max(0.0, watch.origin + (now // INTERVAL + 1) * INTERVAL - time.monotonic()))
            if len(arrivals) == number:
                raise Unfit(f"guest {number} did not come up within {until - seconds * number / GUESTS:.0f} s\n"
                            "hint: --seconds gives them more")  # fmt: skip
            steps.append(Step(arrivals[-1].filled, *_possible(guests)))
        others = watch.others()
    finally:
        contender.stop(place)
        tenants.empty()
        for guest in guests:
            guest.process.wait()
        place.ksm.reset()
    return Run(contender.name, watch.samples, steps, arrivals, round(others, 1))


def _possible(guests: Sequence[Guest]) -> tuple[int, int]:
    """Pages for KSM that the guests have, and frames that could be saved of them."""
    counts: Counter[int] = Counter()
    pids = [guest.process.pid for guest in guests]
    with _stopped(pids):
        for pid in pids:
            counts.update(map(hash, present(pid, [mapping for mapping in mappings(pid) if mapping.mergeable])))
    return counts.total(), saving(counts)


@contextmanager
def _stopped(pids: Sequence[int]) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
