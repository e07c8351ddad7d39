# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs that are done, on disk: one file each, so that a comparison of hours can be made in parts.

A run is only used again if nothing that it depends on has changed: the machine, the case, the contents of the traces,
what plays and measures, and the service where it is under test.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.policy.contenders import Contender, Service
from benchmarks.policy.figures import Arrival, Run, Sample, Step, area, end_share
from benchmarks.policy.host import Unfit
from benchmarks.policy.latency import Latency
from benchmarks.policy.oracle import HugePages
from benchmarks.policy.pages import PAGE
from benchmarks.policy.thp import Memory

__all__ = ["Case", "Results", "document", "machine", "restored"]

FORMAT = 3
#: What only tells others about runs.
_TELLING = frozenset({"__main__.py", "figures.py", "picture.py", "report.py"})
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Case:
    """What is the same for all policies that are compared.

    :ivar seed: of the script; None: real guests
    :ivar busy: neighbours that take CPU time
    """

    seed: int | None
    seconds: float
    memory: Memory
    busy: int

    @property
    def file(self) -> str:
        """What its files are called."""
        return f"{self._who}-{self.memory}-busy-{self.busy}".replace(" ", "-")

    @property
    def about(self) -> str:
        """What people read."""
        return f"{self._who}, {self.group}"

    @property
    def group(self) -> str:
        """What people read of it without its script."""
        load = f"{self.busy} busy neighbours" if self.busy else "no busy neighbours"
        return f"{self.memory.about}, {load}"

    @property
    def _who(self) -> str:
        return "guests" if self.seed is None else f"seed {self.seed}"


class Results:
    """A folder of them."""

    def __init__(self, folder: Path, contents: str) -> None:
        """
        :param contents: a digest of the pages of all traces
        """
        self._folder, self._contents = folder, contents

    def find(self, case: Case, contender: Contender) -> Run | None:
        """The run, if there is one that still holds.

        :raises Unfit: its file is damaged
        """
        path = self._path(case, contender)
        if not path.exists():
            return None
        depends_on = self._depends_on(case, contender)
        try:
            found = json.loads(path.read_text())
            return restored(found) if found.get("depends_on") == depends_on else None
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise Unfit(
                f"--resume: {path} is damaged: {type(error).__name__}: {error}\n"
                "hint: remove it, and this run is repeated"
            ) from error

    def keep(self, case: Case, contender: Contender, run: Run, more: Mapping[str, Any]) -> None:
        """Write it down.

        :param more: that readers of the file may want to know
        """
        head = {"format": FORMAT, "depends_on": self._depends_on(case, contender), "page_bytes": PAGE}
        path = self._path(case, contender)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps({**head, **more, **document(run)}) + "\n")
        draft.replace(path)

    def _path(self, case: Case, contender: Contender) -> Path:
        return self._folder / case.file / f"{contender.name}.json"

    def _depends_on(self, case: Case, contender: Contender) -> Mapping[str, Any]:
        code = [_ROOT / "benchmarks/policy"]
        if isinstance(contender, Service):
            code.append(_ROOT / "ksmd_ctl")
        return {"case": asdict(case), "contents": self._contents, "machine": machine(), "code": _digest(code)}


def machine() -> str:
    """Kernel, processors and memory of this machine."""
    memory = os.sysconf("SC_PHYS_PAGES") * PAGE / 2**30
    return f"kernel {os.uname().release}, {os.cpu_count()} CPUs ({_processor()}), {memory:.0f} GiB"


def _processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    for line in cpuinfo.read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return os.uname().machine


def _digest(folders: Iterable[Path]) -> str:
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            if path.parent.name == "policy" and path.name in _TELLING:
                continue
            found.update(str(path.relative_to(_ROOT)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def document(run: Run) -> Mapping[str, Any]:
    """A run as JSON: its samples by columns, and figures for those who don't want to compute them."""
    lost, could = area(run.samples, run.steps)
    return {
        "policy": run.policy,
        "cpu_seconds": round(run.cpu, 4),
        "others_cpu_seconds": run.others,
        "page_seconds_lost": round(lost),
        "page_seconds_possible": round(could),
        "end_share": end_share(run.samples, run.steps),
        "seconds_to_95": run.times(),
        "huge_pages": asdict(run.huge_pages),
        "huge_pages_not_given": run.not_huge,
        "zeroes_free": run.zeroes_free,
        "latency": asdict(run.latency),
        "arrivals": [asdict(arrival) for arrival in run.arrivals],
        "oracle": [asdict(step) for step in run.steps],
        "samples": {field.name: [getattr(sample, field.name) for sample in run.samples] for field in fields(Sample)},
    }


def restored(document: Mapping[str, Any]) -> Run:
    """The run of a `document`."""
    columns: Sequence[Sequence[Any]] = [document["samples"][field.name] for field in fields(Sample)]
    return Run(
        document["policy"],
        samples=[Sample(*row) for row in zip(*columns, strict=True)],
        steps=[Step(**step) for step in document["oracle"]],
        arrivals=[Arrival(**arrival) for arrival in document["arrivals"]],
        huge_pages=HugePages(**document["huge_pages"]),
        latency=Latency(**document["latency"]),
        others=document["others_cpu_seconds"],
        not_huge=document["huge_pages_not_given"],
        zeroes_free=document["zeroes_free"],
    )
