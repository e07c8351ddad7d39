# SPDX-License-Identifier: GPL-2.0-or-later
"""Trust domains of a recording in its replay: nodes of their own for each, and what they share at its end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ksmd_ctl.engine.memory import Page
from ksmd_ctl.engine.mm import Vma
from ksmd_ctl.engine.state import folio_test_ksm
from ksmd_ctl.errors import UsageError
from ksmd_ctl.recording.reader import Recording


@dataclass(frozen=True, slots=True)
class DomainPages:
    """The merged pages of a domain at one moment.

    :ivar processes: that it has then
    :ivar merged: its mappings of KSM pages
    :ivar shared: those of a KSM page that another domain maps, too
    """

    domain: str
    processes: int
    merged: float
    shared: float


class DomainNodes:
    """Where each process has its pages if domains are kept apart, as with mode ``nodes`` (docs/domains.md).

    A domain has the nodes that its configuration names. One that has none gets one here that no other has.

    :ivar nodes: how many nodes that takes
    """

    def __init__(self, recording: Recording, nodes: int) -> None:
        """
        :param nodes: that were recorded
        :raises UsageError: no domains were recorded
        """
        named = recording.domains()
        processes = recording.processes()
        if all(one.domain is None for one in processes):
            hint = "ksmd-ctl record takes them from the [domains] of its configuration (--config)"
            raise UsageError("keeping domains apart", "no domains were recorded", hint=hint)
        self._own: dict[str, frozenset[int]] = {name: own for name, own in named.items() if own}
        self.nodes = max(nodes, *(max(own) + 1 for own in self._own.values()), 1)
        for name in sorted({one.domain or "" for one in processes} - self._own.keys()):
            self._own[name] = frozenset({self.nodes})
            self.nodes += 1
        self._of = {one.process: self._own[one.domain or ""] for one in processes}

    def node(self, process: int, recorded: int) -> int:
        """The node of a page: the recorded one if it is the domain's, else the domain's first."""
        own = self._of[process]
        return recorded if recorded in own else min(own)


def domain_pages(domains: Mapping[int, str], there: Iterable[tuple[int, Vma, float]]) -> tuple[DomainPages, ...]:
    """The merged pages of each domain.

    :param domains: the domain of each process
    :param there: processes, their mappings, and for how many pages one of theirs stands
    """
    known = [(domains[number], vma, weight) for number, vma, weight in there if number in domains]
    holders: dict[Page, set[str]] = {}
    for name, vma, _ in known:
        for page in vma.ptes:
            if isinstance(page, Page) and folio_test_ksm(page):
                holders.setdefault(page, set()).add(name)
    found = {name: [0, 0.0, 0.0] for name in sorted(domains.values())}
    for name, vma, weight in known:
        merged = [page for page in vma.ptes if isinstance(page, Page) and page in holders]
        found[name][0] += 1
        found[name][1] += weight * len(merged)
        found[name][2] += weight * sum(len(holders[page]) > 1 for page in merged)
    return tuple(DomainPages(name, int(count), merged, shared) for name, (count, merged, shared) in found.items())
