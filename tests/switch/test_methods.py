# SPDX-License-Identifier: GPL-2.0-or-later
"""Which method switches: QEMU's monitor, an injected call, or one after the other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ksmd_ctl.errors import Absent, CheckFailed, KsmdError, NoSuchProcess, Refused
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.switching import Method, Switch, SwitchResult
from ksmd_ctl.kernel.proc_pid import start_time_ticks
from ksmd_ctl.kernel.ranges import mappings
from ksmd_ctl.switch import methods, qmp
from ksmd_ctl.switch.methods import switch_merging
from ksmd_ctl.switch.monitor import Marked
from tests.conftest import ksm_lock
from tests.fakes.qemu import FIRMWARE_BYTES, qemu
from tests.fakes.switching import switched


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with ksm_lock():
        yield


class Injection:
    """Notes what is injected."""

    def __init__(self, outcome: KsmdError | None = None) -> None:
        self.asked: list[Switch] = []
        self.outcome = outcome
        self.after: bool | None = False
        self.last: SwitchResult | KsmdError | None = None

    def inject(self, request: Switch, **_: Any) -> SwitchResult:
        self.asked.append(request)
        if self.outcome is not None:
            raise self.outcome
        if len(self.asked) > 1 and self.last is not None:
            if isinstance(self.last, KsmdError):
                raise self.last
            return self.last
        found = switched(request.process, on=request.on)
        return found if request.on else replace(found, after=self.after)


def switch(
    process: ProcessId, injection: Injection, *, on: bool = False, method: Method | None = None, **more: Any
) -> SwitchResult:
    request = Switch(process, on, more.pop("ranges", ()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "switch", injection.inject)
        return switch_merging(request, method, **more)


def test_on_by_the_monitor(tmp_path: Path) -> None:
    with qemu(tmp_path) as process:
        injection = Injection()
        came = switch(process, injection, on=True)
        assert (came.method, injection.asked) == (Method.QMP, [])


def test_off_by_injected_calls_and_then_the_monitor_notes_it(tmp_path: Path) -> None:
    """QEMU takes out a backend in one call, for which a large machine waits long; firmware has no backend."""
    with qemu(tmp_path) as process:
        injection = Injection()
        came = switch(process, injection)
        # And is looked at once more after that.
        assert injection.asked == [Switch(process, False)] * 2
        assert came.how == "prctl(PR_SET_MEMORY_MERGE); qom-set merge=false of ram0, ram1 (QEMU 7.2.22)"
        assert (came.method, came.before, came.after) == (Method.INJECT, True, False)


def test_a_monitor_that_has_done_the_opposite(tmp_path: Path) -> None:
    with qemu(tmp_path) as process:
        injection, off = Injection(), switched(process, on=False)
        injection.last = replace(off, after=True, left=("1 page of address space",), how="nothing was switched")
        came = switch(process, injection)
        assert (came.before, came.after, came.left) == (True, True, ("1 page of address space",))


def test_a_machine_that_has_ended_is_not_off(tmp_path: Path) -> None:
    with qemu(tmp_path) as process:
        injection = Injection()
        injection.last = NoSuchProcess(f"process {process.pid}", "it is gone")
        with pytest.raises(NoSuchProcess, match="it is gone"):
            switch(process, injection)


def test_where_some_stays_the_monitor_does_not_take_it_out(tmp_path: Path) -> None:
    """It would not ask whether there is room."""
    with qemu(tmp_path) as process:
        before = Marked.of(process)
        injection = Injection()
        injection.after = None
        assert switch(process, injection).how == "prctl(PR_SET_MEMORY_MERGE)"
        assert Marked.of(process) == before


def test_what_can_not_be_injected_is_left(tmp_path: Path) -> None:
    with qemu(tmp_path) as process:
        came = switch(process, Injection(Refused("injecting", "it is being debugged by process 7")))
        assert (came.method, came.mergeable_bytes) == (Method.QMP, FIRMWARE_BYTES)
        assert came.left[1:] == ("it is being debugged by process 7",)


def test_by_the_monitor_alone(tmp_path: Path) -> None:
    with qemu(tmp_path) as process:
        injection = Injection()
        assert len(switch(process, injection, method=Method.QMP).left) == 1
        assert injection.asked == []


def test_a_qemu_whose_monitor_does_nothing(tmp_path: Path) -> None:
    """QEMU 9.1."""
    with qemu(tmp_path, "9.1") as process:
        injection = Injection()
        came = switch(process, injection)
        assert len(injection.asked) == 2
        assert "the monitor did not do it: QEMU 7.2.22 says that merge of ram0, ram1 is false" in came.how
        with pytest.raises(CheckFailed):
            switch(process, injection, method=Method.QMP)
        # Without injection it is the monitor that people should know of.
        with pytest.raises(CheckFailed):
            switch(process, Injection(Absent("injecting", "not on this machine")))
        with pytest.raises(Refused, match="debugged"):
            switch(process, Injection(Refused("injecting", "it is being debugged")))


@pytest.mark.parametrize("more", [{"method": Method.INJECT}, {"ranges": ((0, 4096),)}])
def test_injected_alone(tmp_path: Path, more: dict[str, Any]) -> None:
    with qemu(tmp_path, "silent") as process:
        injection = Injection()
        assert switch(process, injection, **more).how == "prctl(PR_SET_MEMORY_MERGE)"
        assert len(injection.asked) == 1


def test_a_process_without_a_monitor() -> None:
    injection = Injection()
    me = ProcessId(os.getpid(), start_time_ticks(os.getpid()))
    assert switch(me, injection, on=True).method is Method.INJECT
    with pytest.raises(Absent, match="without a QMP monitor"):
        switch(me, injection, method=Method.QMP)


@pytest.mark.parametrize("on", [False, True])
def test_a_dry_run(tmp_path: Path, on: bool) -> None:
    with qemu(tmp_path) as process:
        before, injection = Marked.of(process), Injection()
        came = switch(process, injection, on=on, dry_run=True)
        assert came.method is (Method.QMP if on else Method.INJECT)
        assert f"qom-set merge={'true' if on else 'false'} of the machine's memory, by" in came.how
        came = switch(process, injection, on=on, dry_run=True, method=Method.INJECT)
        assert (came.method, came.after, came.stopped_seconds) == (Method.INJECT, came.before, 0.0)
        item = max(mappings(process.pid), key=lambda item: item.anonymous_pages)
        came = switch(process, injection, on=on, dry_run=True, ranges=((item.start, item.end),))
        assert came.how == "madvise of about 1 mapping"
        # What would be refused is.
        with pytest.raises(Refused, match="nothing there can be merged"):
            switch(process, injection, on=on, dry_run=True, ranges=((0, 4096),))
        assert (Marked.of(process), injection.asked) == (before, [])


@pytest.mark.parametrize("behaviour", ["silent", "shared", "nonsense"])
def test_without_a_monitor_nothing_is_un_merged_for_it(
    tmp_path: Path, behaviour: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmp.Qmp.__init__, "__defaults__", (0.5,))
    unmerged: list[Switch] = []
    monkeypatch.setattr(methods, "unmerge", lambda request, **_: unmerged.append(request) or 0)
    with qemu(tmp_path, behaviour) as process:
        with pytest.raises(KsmdError):
            switch(process, Injection(), method=Method.QMP)
        # Injected, it is un-merged there.
        assert switch(process, Injection()).method is Method.INJECT
    assert unmerged == []
