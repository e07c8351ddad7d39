# SPDX-License-Identifier: GPL-2.0-or-later
"""Gives systemd units the nodes of their domain, for as long as this boot lasts (``AllowedMemoryNodes=``).

What a unit had before is on disk before it is changed. So an assignment that was interrupted is put back by the next
one, and any can be undone. The file belongs to one boot, as what ``systemctl set-property --runtime`` sets does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol

from ksmd_ctl.errors import Absent, Refused, Rejected
from ksmd_ctl.figures import bytes_text, ranges_text
from ksmd_ctl.host.cpus import parse_nodes
from ksmd_ctl.host.memory import Process
from ksmd_ctl.host.sample import HostIdentity
from ksmd_ctl.statefiles import JournalFile

_WHAT: Final = "assigning nodes"
# What systemd allows in names of units (systemd.unit(5)); not -.slice, which is all of the host.
_UNIT: Final = re.compile(r"[A-Za-z0-9:_.\\@][A-Za-z0-9:_.\\@-]{0,246}\.(service|scope|slice)", re.ASCII)


class UnitManager(Protocol):
    """systemd, as far as it is needed."""

    def allowed_nodes(self, unit: str) -> str:
        """``AllowedMemoryNodes=`` of a unit, as a list; empty where it is not limited.

        :raises Absent: it has ended, or there is none
        """

    def effective_nodes(self, unit: str) -> str:
        """The nodes where its processes may allocate; empty where its control group has no cpuset."""

    def set_allowed_nodes(self, unit: str, nodes: str) -> None:
        """Set ``AllowedMemoryNodes=`` for this boot; empty for no limit. It need not run.

        :raises Absent: there is no such unit
        :raises KsmdError: systemd refuses
        """


@dataclass(frozen=True, slots=True)
class DomainUnit:
    """A unit whose processes all belong to one domain."""

    unit: str
    domain: str
    nodes: frozenset[int]
    processes: tuple[Process, ...] = ()

    @property
    def elsewhere_pages(self) -> int:
        """Pages of mergeable memory on other nodes."""
        found = (item for one in self.processes for item in one.resident_nodes.items())
        return sum(pages for node, pages in found if node not in self.nodes)


@dataclass(frozen=True, slots=True)
class AssignedUnit:
    """A unit that was given nodes.

    :ivar before: its nodes before that; empty for no limit
    :ivar done: that is over; else it was interrupted
    """

    domain: str
    before: str
    done: bool = False


@dataclass(frozen=True, slots=True)
class _Document:
    boot_id: str
    units: Mapping[str, AssignedUnit]


class Assignments:
    """What was assigned on one host in this boot.

    :ivar units: never changed in place
    :ivar damaged: where a file is now that could not be understood, empty for none

    :raises Unreadable: the file is there and can't be read
    """

    def __init__(self, directory: Path, identity: HostIdentity, everywhere: frozenset[int]) -> None:
        """
        :param everywhere: all nodes of the host that have memory
        """
        self._everywhere = ranges_text(everywhere)
        self.path = directory / f"assigned-{identity.kind}.json"
        self._file = JournalFile(self.path, _Document, "what was assigned to units")
        self._boot_id = identity.boot_id
        found = self._file.read(_checked, keep=False)
        self.damaged = self._file.damaged
        self.units = found.units if found is not None and found.boot_id == identity.boot_id else {}

    def _save(self, units: Mapping[str, AssignedUnit]) -> None:
        self._file.write(_Document(self._boot_id, units) if units else None)
        self.units = units

    def assign(self, manager: UnitManager, wanted: Sequence[DomainUnit]) -> None:
        """Give units their nodes: all of them, or none. What they were given before counts no more.

        :raises Absent: one of them has ended
        :raises KsmdError: one can't be changed; then all are as before any assignment
        """
        names = {one.unit for one in wanted}
        found = {one.unit: self._found(manager, one) for one in wanted}
        new = {unit: replace(one, done=False) for unit, one in found.items()}
        self._save({**self.units, **new})
        try:
            for one in wanted:
                nodes = ranges_text(one.nodes)
                manager.set_allowed_nodes(one.unit, nodes)
                effective = manager.effective_nodes(one.unit)
                if not effective or not parse_nodes(effective) <= one.nodes:
                    raise Rejected(
                        _WHAT,
                        f"{one.unit} has AllowedMemoryNodes={nodes} and can allocate on {effective or 'all nodes'}",
                        hint="its control group has no cpuset of its own, or a slice above it allows other nodes only. "
                        "All units are as they were before",
                    )
        except BaseException:
            self.undo(manager, lambda unit, _: unit in names)
            raise
        self._save({unit: replace(one, done=True) for unit, one in self.units.items()})

    def _found(self, manager: UnitManager, one: DomainUnit) -> AssignedUnit:
        allowed = manager.allowed_nodes(one.unit)
        if one.unit in self.units:
            return replace(self.units[one.unit], domain=one.domain)
        return AssignedUnit(one.domain, allowed)

    def undo(self, manager: UnitManager, meant: Callable[[str, AssignedUnit], bool]) -> tuple[str, ...]:
        """Give units the nodes back that they had before they were first assigned; which ones.

        :raises KsmdError: one can't be changed; it stays on disk
        """
        names = tuple(unit for unit, one in self.units.items() if meant(unit, one))
        for unit in names:
            # One that was made at run time has taken its limit with it; another one has it when it starts again.
            with suppress(Absent):
                if not self.units[unit].before:
                    # systemd forgets a limit that is taken away, and leaves cpuset.mems as it is (seen with 257).
                    manager.set_allowed_nodes(unit, self._everywhere)
                manager.set_allowed_nodes(unit, self.units[unit].before)
            self._save({name: one for name, one in self.units.items() if name != unit})
        return names


def _checked(document: _Document) -> _Document:
    """
    :raises ValueError: it has a value that nobody assigns
    """
    # Root reads it in a directory that the service's user owns, and gives the values to systemd.
    for unit, found in document.units.items():
        if not is_unit_name(unit):
            raise ValueError(f"{unit!r} is no unit")
        if found.before:
            parse_nodes(found.before)
    return document


def is_unit_name(text: str) -> bool:
    """Whether it is the name of a service, a scope or a slice."""
    return _UNIT.fullmatch(text) is not None


def need_room(units: Sequence[DomainUnit], free_bytes: Mapping[int, int], page_size_bytes: int) -> None:
    """See that the memory of each domain fits on its nodes.

    :param free_bytes: of each node, above the floor
    :raises Refused: with the figures
    """
    for domain, nodes in {one.domain: one.nodes for one in units}.items():
        moved = sum(one.elsewhere_pages for one in units if one.domain == domain) * page_size_bytes
        free = sum(free_bytes.get(node, 0) for node in nodes)
        if moved > free:
            said = f"{bytes_text(moved)} of {domain} would come to node {ranges_text(nodes)}"
            hint = "free memory there, give the domain more nodes, or lower [limits] floor_bytes"
            raise Refused(_WHAT, f"{said}, and {bytes_text(free)} are free above the floor", hint=hint)
