# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether the domains of a scenario stay apart: no frame is mapped from two of them, in any state.

Domains have no node in common. So where two of them map a frame, one has a page on a node of another: a stray. With
merge_across_nodes = 0 ksmd leaves each page on its node (docs/engine.md 15.2), and so it puts a frame into two domains
only where a stray was there before. That is what is looked for after each step, and after each batch of ksmd.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ksmd_ctl.host.memory import PageState
from ksmd_ctl.scenario.model import Domain


class Separation:
    """The domains on one host, look by look.

    :param domains: by process; may grow by forks
    :param indices: the index of each node number
    :ivar with_strays: looks at which a page was on a node that is not its domain's
    :ivar with_across: looks at which a frame was mapped from two domains
    """

    def __init__(self, domains: Mapping[str, Domain], indices: Mapping[int, int]) -> None:
        self._domains = domains
        self._indices = indices
        # Pages that were strays at the last look, or in a frame of two domains.
        self._known: set[str] = set()
        self.with_strays = 0
        self.with_across = 0

    def look(self, pages: Iterable[tuple[str, PageState]]) -> list[list[str]]:
        """The pages of each frame that is mapped from two domains, though none strayed there before.

        :param pages: every mapped page, by name
        """
        frames: dict[int, dict[str, list[str]]] = {}
        strays: set[str] = set()
        for name, page in pages:
            domain = self._domains.get(name.partition(".")[0])
            # The zero page is on no node, and one for all.
            if domain is None or page.frame is None or page.node is None:
                continue
            frames.setdefault(page.frame, {}).setdefault(domain.name, []).append(name)
            if self._indices[page.node] not in domain.nodes:
                strays.add(name)
        across = [[name for each in names.values() for name in each] for names in frames.values() if len(names) > 1]
        self.with_strays += bool(strays)
        self.with_across += bool(across)
        new = [names for names in across if not strays.intersection(names) <= self._known]
        self._known = strays.union(*across)
        return new
