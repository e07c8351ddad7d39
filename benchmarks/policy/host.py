# SPDX-License-Identifier: GPL-2.0-or-later
"""This host's KSM for one run alone, its knobs at the kernel's defaults, and all restored however the run ends."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.policy import thp
from benchmarks.policy.cgroups import Group
from benchmarks.policy.thp import Memory
from ksmd_ctl.kernel.ksmfs import KsmFs
from ksmd_ctl.kernel.procfs import find_ksmd
from ksmd_ctl.kernel.zero_pages import splits_free_zeroes
from ksmd_ctl.scenario.lab_restore import Before, find_users

__all__ = ["Alone", "Ksm", "Unfit", "busy_seconds", "guarded", "ksm_alone"]

KSM = Path("/sys/kernel/mm/ksm")
#: As a kernel has them after its boot; pages_to_scan after the advisor, which changes it. Not every kernel has all.
DEFAULTS = {
    "advisor_mode": "none",
    "merge_across_nodes": "1",
    "max_page_sharing": "256",
    "use_zero_pages": "0",
    "smart_scan": "1",
    "stable_node_chains_prune_millisecs": "2000",
    "sleep_millisecs": "20",
    "advisor_max_cpu": "70",
    "advisor_min_pages_to_scan": "500",
    "advisor_max_pages_to_scan": "30000",
    "advisor_target_scan_time": "200",
    "pages_to_scan": "100",
}
_QUIET_SECONDS = 0.5
_DEADLINE_SECONDS = 120.0
_COMPANY_SECONDS = 20.0


class Unfit(Exception):
    """This host can't be measured now; two lines for people."""


class Ksm:
    """The knobs, the counters, and ksmd."""

    def __init__(self) -> None:
        self._schedstat = Path(f"/proc/{find_ksmd(Path('/proc'))}/schedstat")

    def read(self, name: str) -> int:
        """A number; 0 where this kernel lacks the file."""
        try:
            return int((KSM / name).read_text())
        except FileNotFoundError:
            return 0

    def write(self, name: str, value: object) -> None:
        """Set a knob."""
        (KSM / name).write_text(str(value))

    def cpu_seconds(self) -> float:
        """What ksmd used since its start, from schedstat (first field, nanoseconds)."""
        return int(self._schedstat.read_text().split()[0]) / 1e9

    def reset(self) -> None:
        """Nothing merged, every knob at its default, ksmd stopped and asleep."""
        for value in ("0", "2", "0"):
            self.write("run", value)
        for name, text in DEFAULTS.items():
            if (KSM / name).exists():
                self.write(name, text)
        used, since = self.cpu_seconds(), time.monotonic()
        deadline = since + _DEADLINE_SECONDS
        while time.monotonic() < since + _QUIET_SECONDS:
            time.sleep(0.05)
            if (now := self.cpu_seconds()) != used:
                used, since = now, time.monotonic()
            if since > deadline:
                raise Unfit("ksmd does not come to rest\nhint: see who else uses KSM: ksmd-ctl status")


@dataclass(frozen=True, slots=True)
class Alone:
    """This host for us alone.

    :ivar service: for what drives KSM
    :ivar tenants: for whose memory is merged
    :ivar neighbours: for those who only use the same CPUs
    :ivar memory: what pages tenants get
    :ivar zeroes_free: whether tenants' zeroes take no frame once a huge page with them was split
    """

    ksm: Ksm
    service: Group
    tenants: Group
    neighbours: Group
    memory: Memory
    zeroes_free: bool


def busy_seconds(stat: Path = Path("/proc/stat")) -> float:
    """CPU seconds that this host has worked since its start, of all CPUs. Source: proc_stat(5)."""
    user, nice, system, _, _, irq, softirq = map(int, stat.read_text().split(maxsplit=8)[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


@contextmanager
def ksm_alone(memory: Memory) -> Iterator[Alone]:
    """KSM for us alone, on a host with huge pages as tenants with this memory want them.

    :raises Unfit: no KSM, no right to use it, or somebody else uses it
    """
    if not KSM.is_dir():
        raise Unfit("this kernel has no KSM\nhint: boot one with CONFIG_KSM=y")
    if os.geteuid() != 0:
        raise Unfit("writing KSM's knobs takes root\nhint: run it as root, on a host where nothing else uses KSM")
    if memory is not Memory.SMALL and not thp.settings():
        raise Unfit(f"this kernel has no huge pages\nhint: --memory {Memory.SMALL}")
    # Whoever ends this by a signal has everything restored all the same.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with open(Path(tempfile.gettempdir()) / "ksmd-ctl-ksm.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another user of this host's KSM", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        _be_alone()
        with guarded(memory, lock.fileno()) as alone:
            yield alone


@contextmanager
def guarded(memory: Memory, *locks: int) -> Iterator[Alone]:
    """As `ksm_alone`, for who holds the lock. A guardian ends all that is in the groups and restores what was set,
    also after a SIGKILL.

    :param locks: descriptors that the guardian holds as long as it works
    """
    before = Before.look(KsmFs())
    groups = Group.make("cpuacct", "service"), Group.make("memory", "tenants"), Group.make("cpuacct", "neighbours")
    state = {"knobs": before.knobs, "ksmd": before.ksmd, "cpus": sorted(before.cpus), "thp": thp.settings(),
             "groups": [str(group.path) for group in groups]}  # fmt: skip
    # Its own session: a Ctrl-C is for us alone.
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.policy.guardian"],
        stdin=subprocess.PIPE, pass_fds=locks, start_new_session=True, text=True,
    ) as guardian:  # fmt: skip
        assert guardian.stdin is not None
        guardian.stdin.write(json.dumps(state) + "\n")
        guardian.stdin.flush()
        ksm = Ksm()
        try:
            ksm.reset()
            thp.use(memory)
            yield Alone(ksm, *groups, memory, memory is not Memory.SMALL and bool(splits_free_zeroes()))
        finally:
            guardian.stdin.close()
            guardian.wait()


def _be_alone() -> None:
    """Who had the lock before may still be putting things back."""
    deadline = time.monotonic() + _COMPANY_SECONDS
    while True:
        try:
            return _refuse_company()
        except Unfit:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _refuse_company() -> None:
    if int((KSM / "run").read_text()) & 1:
        raise Unfit("ksmd runs already\nhint: stop what uses it, then: echo 0 > /sys/kernel/mm/ksm/run")
    for user in find_users():
        raise Unfit(f"process {user.pid} ({user.name}) has memory for KSM\nhint: end it first, or wait")
