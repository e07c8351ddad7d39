# SPDX-License-Identifier: GPL-2.0-or-later
"""Who drives KSM during a run: the kernel by itself, Debian's ksmtuned, or this service with one of its policies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.policy.figures import Sample
from benchmarks.policy.host import Alone, Unfit

__all__ = ["CONTENDERS", "MINE", "OFF", "PEERS", "Contender", "Place"]

ROOT = Path(__file__).parents[2]
#: The policy that is to be shown.
MINE = "adaptive"
#: What neighbours feel without KSM.
OFF = "off"
#: What it is compared with.
PEERS = ("defaults", "ksmtuned", "advisor")
_END_SECONDS = 30.0
#: KSM_NPAGES_MAX as packaged.
_MOST_PAGES = 1250
#: What others on the host may take before ksmtuned thinks that tenants did; the first ones take several times that.
_MARGIN_KIB = 64 * 1024


@dataclass(frozen=True, slots=True)
class Place:
    """What a contender works with.

    :ivar host: this host; all that a contender starts has to be in its group `service`
    :ivar scratch: a folder for its files
    :ivar seconds: length of the script
    :ivar busy: neighbours that take CPU time
    """

    host: Alone
    scratch: Path
    seconds: float
    busy: int = 0


@dataclass
class Contender:
    """The kernel with these knobs, and nobody beside it."""

    name: str
    about: str
    knobs: dict[str, str] = field(default_factory=dict)

    def start(self, place: Place) -> None:
        """Begin; tenants come soon after."""
        for name, value in self.knobs.items():
            place.host.ksm.write(name, value)

    def stop(self, place: Place) -> None:
        """End, whatever has been started."""
        place.host.service.empty()

    def may_be(self, sample: Sample) -> bool:
        """Whether the knobs can be its doing; else somebody else writes them, and the run is worth nothing."""
        pages = sample.pages_to_scan == 100 or "advisor_mode" in self.knobs
        return pages and (sample.run, sample.sleep_millisecs) == (int(self.knobs["run"]), 20)

    def notes(self, place: Place) -> list[str]:
        """What it said that has to be told."""
        return []


@dataclass
class Ksmtuned(Contender):
    """Debian's script as it is, its parameters as packaged but for three.

    Time: a script of two minutes stands for an hour, so its interval of a minute becomes two seconds. Its threshold
    is so set that it acts as soon as the first tenant is there; as packaged it would wait for a host that is nearly
    full. It looks for processes named like virtual machines, and tenants are.
    """

    def start(self, place: Place) -> None:
        script = subprocess.run(
            [ROOT / "tools/deb-program", "ksmtuned", "ksmtuned"], capture_output=True, text=True, check=True
        ).stdout.strip()
        threshold = _free_kib() - _MARGIN_KIB
        settings = {
            "KSM_MONITOR_INTERVAL": f"{60 * place.seconds / 3600:.2f}",
            "KSM_THRES_COEF": "0",
            "KSM_THRES_CONST": str(threshold),
            "PIDFILE": str(place.scratch / "ksmtuned.pid"),
            "DEBUG": "1",
            "LOGFILE": str(place.scratch / "ksmtuned.log"),
        }
        subprocess.run(
            place.host.service.inside(["bash", script]), env=os.environ | settings, check=True, start_new_session=True
        )

    def may_be(self, sample: Sample) -> bool:
        return sample.pages_to_scan <= _MOST_PAGES

    def notes(self, place: Place) -> list[str]:
        log = place.scratch / "ksmtuned.log"
        said = [line.split(": ", 1)[-1] for line in log.read_text().splitlines()] if log.exists() else []
        writes = [line for line in said if line.startswith("KSMCTL start") or line.endswith("stop ksm")]
        found: list[str] = []
        for line in writes:
            words = line.split()
            what = f"run=1 pages_to_scan={words[-2]} sleep_millisecs={words[-1]}" if words[1] == "start" else "run=0"
            if not found or not found[-1].startswith(what):
                found.append(what)
        return [f"it wrote {len(writes)} times: {', then '.join(found) or 'nothing'}"]


@dataclass
class Service(Contender):
    """`ksmd-ctl daemon` with a policy, nothing else configured but where its files are.

    :ivar table: what its configuration says beside
    """

    policy: str = MINE
    table: str = ""

    def configuration(self, place: Place) -> str:
        """What its configuration says beside its policy and its places."""
        return self.table

    def start(self, place: Place) -> None:
        configuration = place.scratch / "ksmd-ctl.toml"
        configuration.write_text(
            f'policy = "{self.policy}"\n{self.configuration(place)}\n'
            "[service]\n"
            'metrics_listen = ""\n'
            f'socket = "{place.scratch}/socket"\n'
            f'state_directory = "{place.scratch}/state"\n'
            f'runtime_directory = "{place.scratch}/run"\n'
        )
        log = place.scratch / "ksmd-ctl.log"
        with open(log, "w") as said:
            daemon = [sys.executable, "-I", "-m", "ksmd_ctl.cli.main", "daemon", "--config", str(configuration)]
            process = subprocess.Popen(
                place.host.service.inside(daemon), stdout=said, stderr=said, start_new_session=True
            )
        deadline = time.monotonic() + _END_SECONDS
        while not (place.scratch / "socket").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                words = log.read_text().strip()
                raise Unfit(f"the service does not start with policy {self.policy}: {words}\nhint: read {log}")
            time.sleep(0.05)
        self._process = process

    def may_be(self, sample: Sample) -> bool:
        return True

    def stop(self, place: Place) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            print(f"{self.name}: the service did not stop within {_END_SECONDS:.0f} s")
        place.host.service.empty()
        self._process.wait()

    def notes(self, place: Place) -> list[str]:
        return (place.scratch / "ksmd-ctl.log").read_text().splitlines()


class VirtHandler(Service):
    """virt-handler's rules with its defaults, but for time and threshold, which are as ksmtuned's here."""

    def configuration(self, place: Place) -> str:
        available, total = _memory_kib("MemAvailable"), _memory_kib("MemTotal")
        share = max(0.0, (available - _MARGIN_KIB) / total)
        return f"[kubevirt]\ninterval = {180 * place.seconds / 3600:.2f}\nfree_percent = {share:.4f}\n"


def _memory_kib(*names: str) -> int:
    """The sum of some figures of this host's memory."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return sum(int(lines[name].split()[0]) for name in names)


def _free_kib() -> int:
    """Free memory as ksmtuned counts it."""
    return _memory_kib("MemFree", "Buffers", "Cached")


_FAST = "[knobs]\nrun = 1\npages_to_scan = 5000\nsleep_millisecs = 10\n"
CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(OFF, "KSM off", {"run": "0"}),
        Contender("defaults", "the kernel's defaults: 100 pages each 20 ms", {"run": "1"}),
        Ksmtuned("ksmtuned", "Debian's ksmtuned"),
        Contender("advisor", "the kernel's advisor, scan-time", {"advisor_mode": "scan-time", "run": "1"}),
        Service(MINE, "ksmd-ctl, adaptive"),
        Service("own-ksmtuned", "ksmd-ctl, its ksmtuned", policy="ksmtuned"),
        VirtHandler("kubevirt", "ksmd-ctl, with virt-handler's rules", policy="kubevirt"),
        Service("own-kernel", "ksmd-ctl, its kernel", policy="kernel"),
        Service("own-fixed", "ksmd-ctl, fixed at 5000 pages each 10 ms", policy="fixed", table=_FAST),
    )
}
