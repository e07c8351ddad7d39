# SPDX-License-Identifier: GPL-2.0-or-later
"""The steps of a scenario that are about ksmd and the host as a whole (`ksmd_ctl.scenario.steps`)."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from ksmd_ctl.errors import Rejected
from ksmd_ctl.host.knobs import SYSFS_KNOBS, Knob, parse_wanted
from ksmd_ctl.scenario import values
from ksmd_ctl.scenario.memory_steps import move_frames
from ksmd_ctl.scenario.model import SETTABLE, Argument, Lacking, Step

if TYPE_CHECKING:
    from ksmd_ctl.scenario.check import State
    from ksmd_ctl.scenario.format import Reading
    from ksmd_ctl.scenario.generate import Abilities, Draw
    from ksmd_ctl.scenario.runner import Run

#: `fails` of a step that may be refused or not: the hosts only have to agree.
ANY_ERROR = "any"

#: Knobs that a `set` step with `fails` may write: not the advisor's mode, which would undo pages_to_scan.
WRITABLE = frozenset(SYSFS_KNOBS) - {Knob.ADVISOR_MODE}


# -- ksmd ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scan(Step):
    """So many full scans; one that is under way is finished first, and counts."""

    kind, bare, weight = "scan", True, 4
    times: Annotated[int, Argument(values.COUNT, "how many")]

    def run(self, run: Run) -> int:
        done = 0
        while done < self.times and run.whole_batch():
            done += 1
        return done

    @classmethod
    def random(cls, draw: Draw) -> Iterator[Step]:
        yield Scan(draw.choice((1, 1, 1, 2, 3)))
        if draw.chance(0.5):
            yield draw.observe()

    def smaller(self) -> Iterator[Step]:
        if self.times > 1:
            yield replace(self, times=self.times - 1)


@dataclass(frozen=True, slots=True)
class Batch(Step):
    """One batch of so many pages: a scan stopped in the middle."""

    kind, bare, weight = "batch", True, 4
    size: Annotated[int, Argument(values.COUNT, "pages_to_scan")]

    def run(self, run: Run) -> None:
        run.batch(self.size)

    @classmethod
    def random(cls, draw: Draw) -> Iterator[Step]:
        yield Batch(draw.choice((1, 1, 2, 3, 5, 8)))
        if draw.chance(0.3):
            yield draw.observe()

    def smaller(self) -> Iterator[Step]:
        if self.size > 1:
            yield replace(self, size=self.size - 1)


# -- the host ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Set(Step):
    """Write knobs."""

    kind, bare, weight = "set", True, 0.8
    knobs: Mapping[Knob, int | str]
    fails: str = ""

    @classmethod
    def read(cls, reading: Reading, where: str, table: Mapping[str, Any]) -> dict[str, Any]:
        reading.unknown(f"{where}: ", table, {cls.kind, "fails"})
        given, fails = table[cls.kind], table.get("fails", "")
        if not isinstance(given, dict) or not given:
            reading.wrong(where, "takes a table of knobs and their values")
            return {}
        if fails not in ("", ANY_ERROR, *errno.errorcode.values()):
            reading.wrong(f"{where}: fails", f"{fails!r} is not the name of an errno")
        knobs = {}
        for key, value in given.items():
            # What the kernel has to refuse can be any knob and any value.
            if key not in (WRITABLE if fails else SETTABLE):
                reading.wrong(f"{where}: {key}", f"is not one of {', '.join(sorted(WRITABLE if fails else SETTABLE))}")
                continue
            try:
                knobs[Knob(key)] = _any_value(value) if fails else parse_wanted(Knob(key), value)
            except ValueError as error:
                reading.wrong(f"{where}: {key}", str(error))
        return {"knobs": knobs, "fails": fails}

    def write(self) -> Iterator[str]:
        yield f"set = {values.inline_table({knob.value: values.plain(value) for knob, value in self.knobs.items()})}"
        if self.fails:
            yield f"fails = {values.text(self.fails)}"

    def need(self, run: Run) -> None:
        for knob in self.knobs:
            run.need_knob(knob)

    def run(self, run: Run) -> dict[str, str]:
        said: dict[str, str] = {}
        for knob, value in self.knobs.items():
            try:
                run.lab.set(knob, value)
                said[knob] = ""
            except Rejected as error:
                said[knob] = errno.errorcode.get(error.errno or 0, "refused")
            run.outcome.expectations += self.fails not in ("", ANY_ERROR)
            if self.fails != ANY_ERROR and said[knob] != self.fails:
                found, wanted = said[knob] or "taken", self.fails or "taken"
                run.outcome.failures.append(f"{run.at}: {knob} = {value} was {found}, not {wanted}")
        return said

    @classmethod
    def random(cls, draw: Draw) -> Iterator[Step]:
        found: dict[Knob, tuple[int, ...]] = {
            Knob.MERGE_ACROSS_NODES: (0, 1),
            Knob.MAX_PAGE_SHARING: (2, 3, 256),
            Knob.SMART_SCAN: (0, 1),
            Knob.USE_ZERO_PAGES: (0, 1),
        }
        knob = draw.choice(sorted(found.keys() & draw.abilities.knobs))
        # Some are refused while pages are merged: then the hosts have to agree on that.
        yield Set({knob: draw.choice(found[knob])}, ANY_ERROR)


def _any_value(value: object) -> int | str:
    if isinstance(value, str) or (isinstance(value, int) and values.whole(value, -(2**63), 2**63)):
        return value
    raise ValueError(f"{value!r} is not a number or text")


@dataclass(frozen=True, slots=True)
class Unmerge(Step):
    """run=2, then run=0."""

    kind, bare, weight = "unmerge", True, 0.25

    def run(self, run: Run) -> None:
        run.unmerge()

    @classmethod
    def random(cls, draw: Draw) -> Iterator[Step]:
        yield Unmerge()


@dataclass(frozen=True, slots=True)
class Sleep(Step):
    """Let time pass on the host's clock, for pruning of chains."""

    kind, bare, weight = "sleep", True, 0.1
    milliseconds: Annotated[int, Argument(values.MILLISECONDS, "how long")]

    def run(self, run: Run) -> None:
        run.lab.sleep(self.milliseconds / 1000)

    @classmethod
    def random(cls, draw: Draw) -> Iterator[Step]:
        yield Sleep(1)


@dataclass(frozen=True, slots=True)
class Offline(Step):
    """The memory of a node goes offline, as far as it can, and comes back; whether it went."""

    kind, bare, weight = "offline", True, 0.6
    node: Annotated[int, Argument(values.NODE, "which node")]

    def check(self, state: State) -> None:
        if state.domains:
            raise ValueError("with domains no memory goes offline: cpusets and policies would lose the node")

    def need(self, run: Run) -> None:
        if run.nodes[self.node] not in run.lab.removable_nodes():
            raise Lacking(f"needs two nodes, and memory of node {self.node} that can go offline")

    def run(self, run: Run) -> bool:
        return run.lab.offline(run.nodes[self.node])

    @classmethod
    def possible(cls, abilities: Abilities) -> bool:
        return bool(abilities.offline)

    @classmethod
    def random(cls, draw: Draw) -> Iterator[Step]:
        # A mapping that ksmd has not seen yet keeps a KSM page where it is.
        yield Scan(2)
        yield Offline(draw.choice(sorted(draw.abilities.offline)))
        yield draw.observe()


@dataclass(frozen=True, slots=True)
class Observe(Step):
    """Look at counters and page tables; the label is for [[expect]] and reports."""

    kind, bare, weight = "observe", True, 3
    label: Annotated[str, Argument(values.TEXT, "the observation's label")]

    def check(self, state: State) -> None:
        if self.label in state.labels:
            raise ValueError(f"there is an observation {self.label!r} already")
        state.labels.add(self.label)

    def run(self, run: Run) -> None:
        run.outcome.observations[self.label] = run.look()

    @classmethod
    def random(cls, draw: Draw) -> Iterator[Step]:
        yield draw.observe()


@dataclass(frozen=True, slots=True)
class Home(Step):
    """Pages that are not on a node of their domain move to its first one, with all who map them; the statuses."""

    kind, bare = "home", True

    def check(self, state: State) -> None:
        if not state.domains:
            raise ValueError("there is no domain")

    def run(self, run: Run) -> dict[str, list[int] | str]:
        return {
            process: move_frames(run, process, run.strays(process), domain.nodes[0])
            for process, domain in run.state.domains.items()
            if process in run.processes
        }

    @classmethod
    def possible(cls, abilities: Abilities) -> bool:
        # Only scenarios with domains have it (ksmd_ctl.scenario.generate_domains).
        return False
