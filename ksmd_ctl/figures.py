# SPDX-License-Identifier: GPL-2.0-or-later
"""Figures for people; exact ones are in the JSON."""

from __future__ import annotations

from collections.abc import Iterable

_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")

#: A huge page that was split for fewer pages than these, a sixteenth of it, was worth more than they are.
LOW_YIELD_PAGES = 32
#: Pages of a huge page of the largest size (a PMD of x86-64).
HUGE_PAGE_PAGES = 512


def bytes_text(value: float) -> str:
    """As in ``976.6 MiB``."""
    if abs(value) < 1024:
        return "1 byte" if round(value) == 1 else f"{value:.0f} bytes"
    for unit in _UNITS:
        value /= 1024
        # What would round to 1024.0 is 1.0 of the next unit.
        if abs(value) < 1023.95 or unit == _UNITS[-1]:
            break
    return f"{value:.1f} {unit}"


def count_text(value: float) -> str:
    """As in ``250,000``; what is small and no whole number keeps one place."""
    return f"{value:,.1f}" if value != int(value) and abs(value) < 100 else f"{value:,.0f}"


def plural(value: float, one: str, many: str = "") -> str:
    """As in ``1 page`` and ``250,000 pages``."""
    return f"{count_text(value)} {one if value == 1 else many or one + 's'}"


def ratio_text(value: float) -> str:
    """A share in percent."""
    return f"{value * 100:.1f} %"


def seconds_text(value: float) -> str:
    """As in ``12.8 s``, ``3 min 5 s`` or ``2 d 4 h``: two units at most."""
    if value < 60:
        return f"{value:.3g} s" if value < 59.95 else "1 min"
    whole = round(value)
    for size, unit, below, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"


def room_text(
    where: str, growth_bytes: float, free_bytes: float, *, upper_bound: bool, floor_bytes: float | None = None
) -> str:
    """What un-merging takes somewhere and what is there, as a phrase with figures.

    :param where: ``host``, ``node N``, or the path of a memory cgroup
    :param free_bytes: above the floor, and in a memory cgroup above its reserve
    :param upper_bound: it takes at most so much
    :param floor_bytes: what has to stay free on the host and on nodes; None where no floor counts
    """
    cgroup = where.startswith("/")
    place = f"in the memory cgroup {where}" if cgroup else f"on {'the host' if where == 'host' else where}"
    above = "" if floor_bytes is None else f" above the floor of {bytes_text(floor_bytes)}"
    most = "up to " if upper_bound else ""
    free = f"{bytes_text(free_bytes)} are free{' above its reserve' if cgroup else above}"
    return f"{place} it takes {most}{bytes_text(growth_bytes)} more, and {free}"


def over_text(over_bytes: float, *, upper_bound: bool) -> str:
    """By how much that is more than there is."""
    return f"over by {'up to ' if upper_bound else ''}{bytes_text(over_bytes)}"


def rough_count(amount: float) -> str:
    """As in ``12,345``, and from ten million on ``12.3 million``."""
    return f"{amount:,.0f}" if abs(amount) < 10_000_000 else f"{amount / 1e6:,.1f} million"


def rough_percent(ratio: float) -> str:
    """As in ``1.2 %``: one or two digits."""
    amount = 100 * ratio
    return f"{amount:.0f} %" if amount >= 10 else f"{amount:.1f} %" if amount >= 1 else f"{amount:.2g} %"


def rough_seconds(amount: float) -> str:
    """As in ``0.4 s``, ``12 s``, ``3.5 min`` or ``2.1 h``: one unit."""
    if amount < 10:
        return f"{amount:.1f} s"
    if amount < 120:
        return f"{amount:.0f} s"
    return f"{amount / 60:.1f} min" if amount < 7200 else f"{amount / 3600:.1f} h"


def ranges_text(numbers: Iterable[int]) -> str:
    """Numbers as the kernel writes a list of them (lib/bitmap.c, %*pbl): ``0,2-5``."""
    runs: list[list[int]] = []
    for one in sorted(set(numbers)):
        if runs and runs[-1][1] == one - 1:
            runs[-1][1] = one
        else:
            runs.append([one, one])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
