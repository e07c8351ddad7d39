# SPDX-License-Identifier: GPL-2.0-or-later
"""This host's KSM: what is switched off is un-merged, holds what it held, and is not merged again."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

import pytest

from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.operation import finish
from ksmd_ctl.host.switching import Method
from ksmd_ctl.kernel.monitors import Monitor, connect
from ksmd_ctl.kernel.proc_pid import merging_pages_of
from ksmd_ctl.privileged.host import open_kernel_host
from ksmd_ctl.switch.keep import SwitchJournal
from ksmd_ctl.switch.qmp import Qmp
from ksmd_ctl.transactions.plan import Limits
from ksmd_ctl.transactions.switching import Switching, SwitchOrder
from tests.fakes.qemu import EQUAL_BYTES, SIZES, qemu

#: Of each of the two: those that have a twin in the other one.
PAGES = len(SIZES) * EQUAL_BYTES // 4096
#: Far more than it takes.
PATIENCE_SECONDS = 90.0


def scans(ksm: Path, count: int) -> None:
    """Wait for so many full scans."""
    wanted = int((ksm / "full_scans").read_text()) + count
    until = time.monotonic() + PATIENCE_SECONDS
    while int((ksm / "full_scans").read_text()) < wanted:
        assert time.monotonic() < until, "ksmd does not scan"
        time.sleep(0.02)


def digest(process: ProcessId, folder: Path) -> object:
    with Qmp(connect(process, Monitor(str(folder / "qmp")))) as monitor:
        return monitor.execute("x-digest")


def switched(process: ProcessId, folder: Path, *, on: bool) -> dict[str, Any]:
    host = open_kernel_host()
    try:
        journal = SwitchJournal(folder, host.identity)
        order = SwitchOrder(on, process.pid, method=Method.QMP)
        document = finish(Switching(host, order, Limits(16 << 20, 0.25, 0.01, 1.0), journal, "a test")).document()
        return cast(dict[str, Any], document)["processes"][0]
    finally:
        host.close()


@pytest.mark.ksm
def test_off_un_merges_and_nothing_merges_again(ksm_host: Path, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    with qemu(folders[0], "equal") as first, qemu(folders[1], "equal"):
        for knob, value in {"pages_to_scan": 20_000, "sleep_millisecs": 2, "smart_scan": 0, "run": 1}.items():
            if (ksm_host / knob).exists():
                (ksm_host / knob).write_text(str(value))
        scans(ksm_host, 3)
        assert (merging_pages_of(first.pid) or 0) >= PAGES
        held = digest(first, folders[0])
        came = switched(first, tmp_path, on=False)
        assert came["unmerged"] >= PAGES
        assert came["after"] is not True
        assert digest(first, folders[0]) == held
        scans(ksm_host, 20)
        # The other one keeps its pages, which nobody shares any more.
        assert merging_pages_of(first.pid) == 0
        assert digest(first, folders[0]) == held
        assert switched(first, tmp_path, on=True)["after"] is True
        scans(ksm_host, 3)
        assert (merging_pages_of(first.pid) or 0) >= PAGES
        assert digest(first, folders[0]) == held
