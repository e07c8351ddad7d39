# SPDX-License-Identifier: GPL-2.0-or-later
"""Lists of CPUs and of nodes as taskset(1) and cpuset(7) have them."""

from __future__ import annotations

import re

# A kernel has 8192 CPUs at most (CONFIG_NR_CPUS), and fewer nodes.
_MOST = 1 << 13
_PART = re.compile(r"(\d{1,5})(?:-(\d{1,5})(?::(\d{1,5}))?)?", re.ASCII)


def parse_cpus(value: object) -> frozenset[int]:
    """The CPUs in a list such as ``0,2-5,8-30:2``, where ``:2`` takes each second one.

    :raises ValueError: it is no such list, or empty
    """
    return _parse(value, "CPUs")


def parse_nodes(value: object) -> frozenset[int]:
    """The nodes in such a list.

    :raises ValueError: as `parse_cpus`
    """
    return _parse(value, "nodes")


def _parse(value: object, what: str) -> frozenset[int]:
    if not isinstance(value, str):
        raise ValueError(f'{str(value)[:40]!r} is not a list of {what}: write it in quotes, as in "0,2-3"')
    found: set[int] = set()
    for part in value.split(","):
        match = _PART.fullmatch(part.strip())
        given = (match[1], match[2] or match[1], match[3] or "1") if match else ("1", "0", "0")
        first, last, step = map(int, given)
        if not first <= last < _MOST or not step:
            raise ValueError(f"{value[:40]!r} is not a list of {what}, as in 0,2-3")
        found.update(range(first, last + 1, step))
    return frozenset(found)
