# SPDX-License-Identifier: GPL-2.0-or-later
"""Gives a process, or a unit's processes, huge pages back that were split: what is asked for, and the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ksmd_ctl.errors import ExitCode, Refused, UsageError
from ksmd_ctl.figures import LOW_YIELD_PAGES
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.operation import Collapse, CollapsedProcess, CollapseResult, Operation, Steps, waited
from ksmd_ctl.reports.document import number, part, parts, text
from ksmd_ctl.transactions.migration import MOVE_DEADLINE_SECONDS, check_pid_or_unit, named_process, unit_name
from ksmd_ctl.transactions.plan import Limits

_WHAT: Final = "what is to become huge pages"
#: A block has so many pages: with this all that could be huge pages become some.
MOST_KEEP_PAGES: Final = 512


@dataclass(frozen=True, slots=True)
class CollapseOrder:
    """Memory of a process, or of a unit's processes.

    :ivar keep_pages: blocks are left alone for which a huge page would take so many pages or more
    """

    pid: int | None = None
    unit: str = ""
    keep_pages: int = LOW_YIELD_PAGES
    dry_run: bool = False

    def check(self) -> None:
        """
        :raises UsageError: it asks for something that can't be
        """
        check_pid_or_unit(_WHAT, self.pid, self.unit)
        if not 1 <= self.keep_pages <= MOST_KEEP_PAGES:
            raise UsageError(_WHAT, f"keep_pages is not from 1 to {MOST_KEEP_PAGES}, the pages of a huge page")


@dataclass(frozen=True, slots=True)
class Collapsed:
    """The result of an order."""

    order: CollapseOrder
    came: CollapseResult
    page_size_bytes: int

    def document(self) -> dict[str, object]:
        """As JSON (docs/json.md)."""
        return {
            "format": 1,
            "dry_run": self.order.dry_run,
            "keep_pages": self.order.keep_pages,
            "stopped": self.came.stopped,
            "processes": [_document(one, self.page_size_bytes) for one in self.came.processes],
        }


def _document(one: CollapsedProcess, page_size_bytes: int) -> dict[str, object]:
    return {
        "pid": one.process.pid,
        "name": one.name,
        "huge_before": one.huge_before,
        "huge_after": one.huge_after,
        "blocks": one.blocks,
        "taken_bytes": one.pages * page_size_bytes,
        "kept": one.kept,
        "left": dict(one.left),
        "error": one.error,
    }


class Collapsing(Operation[Collapsed]):
    """Makes huge pages. After a cancel, what became huge pages until then stays so.

    :raises UsageError: the order asks for something that can't be
    """

    def __init__(self, host: Host, order: CollapseOrder, limits: Limits) -> None:
        order.check()
        super().__init__(self._collapse(host, order, limits))

    def _collapse(self, host: Host, order: CollapseOrder, limits: Limits) -> Steps[Collapsed]:
        """
        :raises KsmdError: nothing could be done
        """
        request = Collapse(
            process=None if order.pid is None else named_process(host, order.pid),
            unit=unit_name(order.unit) if order.unit else "",
            keep_pages=order.keep_pages,
            floor_bytes=limits.floor_bytes,
            headroom_share=limits.headroom_share,
            max_pressure=limits.max_pressure,
            dry_run=order.dry_run,
        )
        came = yield from waited(host.make_huge(request, MOVE_DEADLINE_SECONDS))
        if not came.processes and not came.stopped:
            why = f"no process of unit {request.unit} could be looked at"
            raise Refused(_WHAT, why, hint=f"`systemctl status {request.unit}` shows its processes")
        return Collapsed(order, came, host.identity.page_size_bytes)


def exit_code(document: Mapping[str, object]) -> ExitCode:
    """The exit code that a document stands for; of a dry run the one that it would end with now."""
    processes = parts(document, "processes")
    incomplete = any(part(one, "left") or text(one, "error") for one in processes)
    if not incomplete and not text(document, "stopped"):
        return ExitCode.DONE
    if any(number(one, "blocks") for one in processes):
        return ExitCode.CHECK_FAILED
    return ExitCode.REFUSED if not text(document, "stopped") else ExitCode.TIMED_OUT
