# SPDX-License-Identifier: GPL-2.0-or-later
"""The scan-time advisor: pages_to_scan from the length of the last full scan (engine.md 13)."""

from __future__ import annotations

from typing import Final

from ksmd_ctl.engine.state import AdvisorCtx, AdvisorMode, Ksm

__all__ = ["advisor_start_scan", "advisor_stop_scan", "scan_time_advisor", "set_advisor_defaults"]

_DEFAULT_PAGES_TO_SCAN: Final = 100
_EWMA_WEIGHT: Final = 30
_MIN_CPU: Final = 10


def set_advisor_defaults(ksm: Ksm) -> None:
    """What switching the mode does to pages_to_scan (engine.md 13.6, 13.7)."""
    if ksm.advisor is AdvisorMode.NONE:
        ksm.pages_to_scan = _DEFAULT_PAGES_TO_SCAN
    else:
        ksm.advisor_ctx = AdvisorCtx()
        ksm.pages_to_scan = ksm.advisor_min_pages_to_scan


def advisor_start_scan(ksm: Ksm) -> None:
    """A full scan begins."""
    if ksm.advisor is AdvisorMode.SCAN_TIME:
        ksm.advisor_ctx.start_scan_ns = ksm.now_ns


def advisor_stop_scan(ksm: Ksm) -> None:
    """A full scan has ended."""
    if ksm.advisor is AdvisorMode.SCAN_TIME:
        scan_time_advisor(ksm)


def scan_time_advisor(ksm: Ksm) -> None:
    """Evaluate: whole numbers, truncated as the kernel does (engine.md 13.1 to 13.5).

    The CPU time is that since the last evaluation, and at the first one since ksmd was born.
    """
    ctx = ksm.advisor_ctx
    scan_time = max(1, (ksm.now_ns - ctx.start_scan_ns) // 1_000_000_000)
    cpu_ms = (ksm.cpu_ns - ctx.cpu_time_ns) // 1_000_000
    cpu_percent = max(1, cpu_ms * 100 // (scan_time * 1000))
    factor = max(1, ksm.advisor_target_scan_time * 100 // scan_time)
    change = max(1, scan_time * 100 // (ctx.scan_time or scan_time))
    change = ((100 - _EWMA_WEIGHT) * ctx.change + _EWMA_WEIGHT * change) // 100
    pages = ksm.pages_to_scan * 100 // factor
    pages = pages * change // 100
    per_page_cost = max(1, ksm.pages_to_scan // cpu_percent)
    pages = min(pages, per_page_cost * ksm.advisor_max_cpu)
    pages = max(pages, per_page_cost * _MIN_CPU)
    pages = min(pages, ksm.advisor_max_pages_to_scan)
    ctx.change = change
    ctx.scan_time = scan_time
    ctx.cpu_time_ns = ksm.cpu_ns
    ksm.pages_to_scan = pages & 0xFFFFFFFF
