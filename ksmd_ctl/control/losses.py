# SPDX-License-Identifier: GPL-2.0-or-later
"""What died while a transaction ran: counted before it and after it, for un-merging takes memory."""

from __future__ import annotations

from dataclasses import replace

from ksmd_ctl.control.transaction import State
from ksmd_ctl.host.memory import Losses, ProcessId

__all__ = ["counted", "planned_processes"]


def planned_processes(state: State) -> tuple[ProcessId, ...]:
    """The processes whose memory a transaction is about."""
    homes, batches = (item.process for item in state.homes), (item.process for item in state.batches)
    return tuple(dict.fromkeys((*homes, *batches)))


def counted(state: State, after: Losses) -> State:
    """A transaction that is over, with what was killed since it began and who of its processes is gone."""
    kills = {
        where: after.oom_kills[where] - before
        for where, before in state.oom_kills.items()
        if after.oom_kills.get(where, 0) > before
    }
    home_after = state.home_after
    if home_after is not None and state.nodes == 1:
        # On one node nobody has looked where pages are.
        lost = sum(item.pages for item in state.homes if item.process in after.gone)
        home_after = max(0, home_after[0] - lost), max(0, home_after[1] - lost)
    gone = tuple(dict.fromkeys((*state.gone, *after.gone)))
    return replace(state, killed=kills, gone=gone, home_after=home_after)
