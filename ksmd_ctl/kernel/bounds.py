# SPDX-License-Identifier: GPL-2.0-or-later
"""What numbers of a request can be meant, whoever sends them, and what the broker does not go below."""

from __future__ import annotations

from typing import Final

from ksmd_ctl.host.memory import LEAST_FLOOR_BYTES
from ksmd_ctl.host.operation import Move

__all__ = [
    "LEAST_FLOOR_BYTES",
    "need_between",
    "need_limits",
    "need_move",
    "need_node",
    "need_process",
    "need_range",
]

# PID_MAX_LIMIT of 64-bit kernels (include/linux/threads.h), and the largest MAX_NUMNODES.
_MOST_PID: Final = 1 << 22
_MOST_NODE: Final = (1 << 10) - 1
# The largest user address space: five levels of page tables on x86.
_MOST_ADDRESS: Final = 1 << 56
_MOST_TICKS: Final = (1 << 63) - 1


def need_between(name: str, value: float, least: float, most: float) -> None:
    """
    :raises ValueError: a number is out of its range
    """
    if not least <= value <= most:
        raise ValueError(f"{name} is not between {least} and {most}")


def need_process(pid: int, start_time_ticks: int) -> None:
    """
    :raises ValueError: no process can have this pid or start time
    """
    need_between("pid", pid, 1, _MOST_PID)
    need_between("start_time_ticks", start_time_ticks, 0, _MOST_TICKS)


def need_node(node: int) -> None:
    """
    :raises ValueError: no node can have this number
    """
    need_between("node", node, 0, _MOST_NODE)


def need_range(start: int, end: int) -> None:
    """
    :raises ValueError: it is no range of a process's addresses
    """
    if not 0 <= start < end <= _MOST_ADDRESS:
        raise ValueError("a range does not begin at 0 or above, or does not end behind its start and below 2^56")


def need_limits(latency_seconds: float, floor_bytes: int) -> None:
    """
    :raises ValueError: a call may not take so long, or so much can't stay free
    """
    need_between("latency_seconds", latency_seconds, 0.0001, 10)
    need_between("floor_bytes", floor_bytes, 0, 1 << 50)


def need_move(move: Move) -> None:
    """
    :raises ValueError: no memory can be meant with it
    """
    need_process(move.process.pid, move.process.start_time_ticks)
    need_node(move.to)
    need_limits(move.latency_seconds, move.floor_bytes)
    for start, end in move.ranges:
        need_range(start, end)
