# SPDX-License-Identifier: GPL-2.0-or-later
"""What a scenario file says, as values: regions, steps and expectations (docs/scenarios.md).

The annotations of the fields say what the file may have there: reading, writing and the JSON Schema follow them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_type_hints

from ksmd_ctl.host.knobs import SYSFS_KNOBS, Knob
from ksmd_ctl.scenario import values
from ksmd_ctl.scenario.values import Type

if TYPE_CHECKING:
    from ksmd_ctl.scenario.check import State
    from ksmd_ctl.scenario.format import Reading
    from ksmd_ctl.scenario.generate import Abilities, Draw
    from ksmd_ctl.scenario.runner import Run

#: The version of the format that this code reads and writes.
FORMAT = 1

# The runner steps ksmd with the first three; the advisor's effects depend on ksmd's CPU time.
_NOT_AT_START = {Knob.RUN, Knob.PAGES_TO_SCAN, Knob.SLEEP_MILLISECS}
_ADVISOR = {knob for knob in SYSFS_KNOBS if knob.value.startswith("advisor_")}

#: Knobs that a scenario may have at its start.
SETTABLE = frozenset(SYSFS_KNOBS) - _NOT_AT_START - _ADVISOR


class Lacking(Exception):
    """The host lacks something that the scenario needs."""


#: `fails` of a step that may be refused or not: the hosts only have to agree.


@dataclass(frozen=True, slots=True)
class Argument:
    """A key of a table in the file. A field that is annotated with two has one of these keys, not both.

    :ivar key: empty in an annotation: the field's name
    :ivar attribute: the field; this and `required` are filled in by `arguments`
    """

    type: Type
    text: str
    key: str = ""
    required: bool = True
    attribute: str = ""


def arguments(kind: type[Any]) -> tuple[Argument, ...]:
    """The keys of the table that a dataclass is read from."""
    hints = get_type_hints(kind, include_extras=True)
    found = []
    for each in fields(kind):
        required = each.default is MISSING and each.default_factory is MISSING
        for argument in getattr(hints[each.name], "__metadata__", ()):
            found.append(replace(argument, key=argument.key or each.name, required=required, attribute=each.name))
    return tuple(found)


def written(item: Any) -> dict[str, str]:
    """The TOML of a dataclass's fields by key, without those that have their defaults."""
    defaults = {each.name: each.default_factory() for each in fields(item) if each.default_factory is not MISSING}
    defaults |= {each.name: each.default for each in fields(item) if each.default is not MISSING}
    found: dict[str, str] = {}
    seen: set[str] = set()
    for argument in arguments(type(item)):
        name = argument.attribute
        value = getattr(item, name)
        if name not in seen and (argument.required or value != defaults[name]):
            found[argument.key] = argument.type.write(value)
        seen.add(name)
    return found


Process = Annotated[str, Argument(values.NAME, "the process")]


class Step:
    """One step of a scenario. A subclass is all that there is about one kind (`ksmd_ctl.scenario.steps`).

    :cvar kind: the key that names it in a file
    :cvar bare: it takes one value, not a table of arguments
    :cvar weight: how often a random scenario has it, relative to other kinds
    """

    __slots__ = ()

    kind: ClassVar[str]
    bare: ClassVar[bool] = False
    weight: ClassVar[float]

    @classmethod
    def read(cls, reading: Reading, where: str, table: Mapping[str, Any]) -> dict[str, Any]:
        """The values of its fields; what is wrong goes to the reading's problems."""
        reading.unknown(f"{where}: ", table, {cls.kind})
        given = table[cls.kind]
        if not cls.bare:
            return reading.fields(where, cls, given)
        keys = arguments(cls)
        value = reading.value(where, keys[0].type if keys else values.TRUE, given)
        return {keys[0].attribute: value} if keys else {}

    def write(self) -> Iterator[str]:
        """The lines of its table."""
        found = written(self)
        value = next(iter(found.values()), "true") if self.bare else values.inline_table(found)
        yield f"{self.kind} = {value}"

    def check(self, state: State) -> None:
        """Carry it out on the state.

        :raises ValueError: it can't be carried out, and the state is as it was
        """

    def need(self, run: Run) -> None:
        """Find out whether the host can do it.

        :raises Lacking: it can't
        """

    def run(self, run: Run) -> object:
        """Carry it out on the host; what it gave, which hosts have to agree on, None for nothing."""
        raise NotImplementedError

    @classmethod
    def possible(cls, abilities: Abilities) -> bool:
        """Whether the hosts that a random scenario is for can do it."""
        return True

    @classmethod
    def random(cls, draw: Draw) -> Iterator[Step]:
        """Steps for a random scenario; those that can't be carried out are left out."""
        raise NotImplementedError

    def smaller(self) -> Iterator[Step]:
        """The same step with smaller numbers."""
        yield from ()


@dataclass(frozen=True, slots=True)
class KnobSetting:
    """A knob's value at the start; an optional one is left out on a kernel that lacks the knob."""

    value: int | str
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Region:
    """Private anonymous memory of one process, a label a page.

    :ivar node: an index among the nodes with memory, None for no VMA policy
    :ivar huge: made of huge pages at the start
    """

    process: Process
    name: Annotated[str, Argument(values.NAME, "the region's name")]
    pages: Annotated[tuple[str, ...], Argument(values.LABELS, "a label a page, at least one")]
    node: Annotated[int | None, Argument(values.NODE, "the node that it is bound to")] = None
    mergeable: Annotated[bool, Argument(values.FLAG, "false: only after a step says so")] = True
    huge: Annotated[bool, Argument(values.FLAG, "made of huge pages at the start")] = False


@dataclass(frozen=True, slots=True)
class Domain:
    """Processes that may have memory on some nodes only, and their children.

    :ivar nodes: indices among the nodes with memory, no other domain's; memory without a policy comes from the first
    """

    name: Annotated[str, Argument(values.NAME, "the domain's name")]
    nodes: Annotated[tuple[int, ...], Argument(values.NODE_SET, "its nodes")]
    processes: Annotated[tuple[str, ...], Argument(values.NAMES, "its processes")]


@dataclass(frozen=True, slots=True)
class Expect:
    """What an observation has to show, on each host by itself.

    :ivar at: the observation's label
    :ivar profiles: only where the host behaves like one of these engine profiles; empty: everywhere
    :ivar counters: by name; one that a kernel lacks is not checked there
    :ivar groups: sets of pages that share a frame, and share it with no other page
    """

    at: Annotated[str, Argument(values.TEXT, "the observation's label")]
    profiles: Annotated[tuple[str, ...], Argument(values.PROFILES, "where it holds", "profile")] = ()
    counters: Mapping[str, int] = field(default_factory=dict)
    groups: Annotated[tuple[tuple[str, ...], ...], Argument(values.GROUPS, "who shares a frame")] = ()
    nodes: Annotated[Mapping[str, int], Argument(values.PLACES, "where pages are")] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scenario:
    """One file.

    :ivar file: where it came from, empty for one that was generated
    :ivar nodes: how many nodes with memory it needs
    """

    name: Annotated[str, Argument(values.TEXT, "its name")]
    regions: tuple[Region, ...]
    steps: tuple[Step, ...]
    nodes: Annotated[int, Argument(values.NODES, "nodes with memory that it needs")] = 1
    text: Annotated[str, Argument(values.ANY_TEXT, "what it is about")] = ""
    knobs: Mapping[Knob, KnobSetting] = field(default_factory=dict)
    expects: tuple[Expect, ...] = ()
    domains: tuple[Domain, ...] = ()
    file: str = ""

    def processes(self) -> tuple[str, ...]:
        """The processes that are there from the start, in order of first appearance."""
        return tuple(dict.fromkeys(region.process for region in self.regions))


def step_key(number: int, step: Step) -> str:
    """How errors and reports name a step: its place in the file, from 1 on, and its kind."""
    return f"step {number} ({step.kind})"
