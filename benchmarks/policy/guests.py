# SPDX-License-Identifier: GPL-2.0-or-later
"""The demonstration with real guests: the same Debian system three times, emulated, each with all its memory mergeable.

QEMU asks for huge pages by itself. The guests boot one after the other, each with the same time. What could be saved is
counted at the end of that time, from what the guests hold then, while they are stopped; it is taken to have been so
since the guest was up. Running guests write all the time, and pages that are equal only for a moment are counted, too:
all of it may be out of reach (`fixed` at full speed had 92 % on a busy machine).
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.policy.cgroups import Group
from benchmarks.policy.contenders import Contender, Place
from benchmarks.policy.figures import Arrival, Run, Step
from benchmarks.policy.held import Holder
from benchmarks.policy.host import Unfit
from benchmarks.policy.oracle import saving
from benchmarks.policy.pages import ZERO, present
from benchmarks.policy.watch import INTERVAL, watched
from ksmd_ctl.kernel.zero_pages import HUGE_BYTES
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
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def up(self) -> bool:
        """Whether its boot is over."""
        return self._console.exists() and _UP in self._console.read_bytes()


def play(contender: Contender, seconds: float, place: Place) -> Run:
    """One run; afterwards nothing is merged, and nobody is there.

    :raises Unfit: a guest did not come up in its time
    """
    system = image.fetch()
    guests: list[Guest] = []
    steps: list[Step] = []
    arrivals: list[Arrival] = []
    with watched(contender, place) as watch:
        for number in range(GUESTS):
            until = seconds * (number + 1) / GUESTS
            guests.append(Guest(system, place.host.tenants, place.scratch / f"console-{number}"))
            watch.add(guests[-1].process.pid)
            while (now := watch.now) < until:
                if len(arrivals) == number and guests[-1].up():
                    arrivals.append(Arrival(number, round(now, 3), until))
                watch.take()
                time.sleep(max(0.0, watch.origin + (now // INTERVAL + 1) * INTERVAL - time.monotonic()))
            if len(arrivals) == number:
                raise Unfit(f"guest {number} did not come up within {until - seconds * number / GUESTS:.0f} s\n"
                            "hint: --seconds gives them more")  # fmt: skip
            contents = _contents(watch.tenants)
            counts = Counter(page for pages in contents.values() for page in pages)
            free = hash(ZERO) if place.host.zeroes_free else None
            steps.append(Step(arrivals[-1].filled, counts.total(), saving(counts, free=free)))
        watch.end()
    for guest in guests:
        guest.process.wait()
    return watch.run(steps, arrivals, contents, hash(ZERO))


def _contents(holders: Mapping[int, Holder]) -> Mapping[tuple[int, int], Sequence[int]]:
    """Hashes of the pages that the guests hold, by process and by address divided by the size of a huge page."""
    found: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    with _stopped(holders.keys()):
        for pid, holder in holders.items():
            for address, page in present(pid, holder.mergeable(), zero_pages=True):
                found[pid, address // HUGE_BYTES].append(hash(page))
    return found


@contextmanager
def _stopped(pids: Collection[int]) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
