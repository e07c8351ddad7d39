# SPDX-License-Identifier: GPL-2.0-or-later
"""Orders to switch merging: whom they mean, what is recorded, and what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from ksmd_ctl.errors import Cancelled, Denied, ExitCode, NoSuchProcess, Refused, TimedOut, UsageError
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.memory import ProcessClass, ProcessId
from ksmd_ctl.host.operation import finish
from ksmd_ctl.host.switching import Method, Switch
from ksmd_ctl.switch.keep import SwitchJournal
from ksmd_ctl.transactions.plan import Limits
from ksmd_ctl.transactions.switching import Switching, SwitchOrder, exit_code
from tests.engine.test_host import lab
from tests.fakes.host import process
from tests.fakes.switching import SwitchHost, switched
from tests.transactions.test_unmerging import across

LIMITS = Limits(0, 1.0, 0.01, 1.0)
NOTHING = frozenset({ProcessClass.NOT_ELIGIBLE})


def machine() -> SwitchHost:
    """A service with two workers, one of them without mergeable memory, and a virtual machine."""
    host = SwitchHost()
    host.running = [
        process(11, "web.service", 100, unit="web.service"),
        process(20, "vm-1", 500, unit="vm.scope", machine=True),
    ]
    host.alive = {12, 13}
    host.units = {"web.service": [11, 12]}
    return host


def done(
    host: Any, order: SwitchOrder, journal: SwitchJournal | None = None, limits: Limits = LIMITS
) -> dict[str, Any]:
    found = finish(Switching(cast(Host, host), order, limits, journal, "somebody")).document()
    return cast(dict[str, Any], found)


@pytest.mark.parametrize(
    "order",
    [
        SwitchOrder(True),
        SwitchOrder(True, 11, "a.service"),
        SwitchOrder(True, unit="a.service", vm="b"),
        SwitchOrder(True, unit="a.service", ranges=((0, 1),)),
        SwitchOrder(True, 11, ranges=((4096, 0),)),
        SwitchOrder(True, 11, ranges=((0, 1 << 57),)),
        SwitchOrder(True, 11, ranges=((0, 4097),)),
        SwitchOrder(True, 11, ranges=((0, 4096),), method=Method.QMP),
    ],
)
def test_what_can_not_be(order: SwitchOrder) -> None:
    with pytest.raises(UsageError):
        Switching(cast(Host, machine()), order, LIMITS)


def test_off_un_merges_within_the_limits() -> None:
    host = machine()
    document = done(host, SwitchOrder(on=False, pid=11), limits=Limits(7, 0.5, 0.02, 0.75))
    assert host.switches == [(11, False, None, False)]
    assert host.asked == [Switch(ProcessId(11, 1100), False, (), 0.02, 7, 0.5, 0.75)]
    (one,) = document["processes"]
    assert (one["pid"], one["name"], one["unmerged"], one["after"]) == (11, "p11", 100, False)
    assert exit_code(document) is ExitCode.DONE


def test_on_un_merges_nothing_and_names_the_process_afterwards(tmp_path: Path) -> None:
    host = machine()

    def becomes_mergeable() -> None:
        host.running.append(process(13, "batch.service", 0, unit="batch.service"))

    host.before_switch = becomes_mergeable
    journal = SwitchJournal(tmp_path, host.identity)
    document = done(host, SwitchOrder(on=True, pid=13), journal)
    assert (document["processes"][0]["name"], document["processes"][0]["unit"]) == ("p13", "batch.service")
    assert [(one.name, one.unit, one.on, one.done) for one in journal.records] == [("p13", "batch.service", True, True)]


def test_a_unit_and_a_machine() -> None:
    host = machine()
    document = done(host, SwitchOrder(on=True, unit="web", method=Method.INJECT))
    assert host.switches == [(11, True, Method.INJECT, False), (12, True, Method.INJECT, False)]
    assert [one["start"] for one in document["processes"]] == [{"starter": "systemd", "name": "web.service"}] * 2
    done(host, SwitchOrder(on=False, vm="vm-1"))
    assert host.switches[2:] == [(20, False, None, False)]


@pytest.mark.parametrize(
    ("order", "kind", "said"),
    [
        (SwitchOrder(True, 99), UsageError, "there is no process 99"),
        (SwitchOrder(True, unit="none"), Refused, "unit none.service has no process"),
        (SwitchOrder(True, vm="p11"), Refused, "there is no virtual machine 'p11'"),
        (SwitchOrder(True, vm="\x1b[31m"), Refused, r"'\\x1b\[31m'"),
    ],
)
def test_who_is_not_there(order: SwitchOrder, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        done(machine(), order)


def test_without_room_nothing_begins(tmp_path: Path) -> None:
    host = machine()
    host.room_bytes = 50 * 4096
    journal = SwitchJournal(tmp_path, host.identity)
    with pytest.raises(Refused, match="on the host it takes"):
        done(host, SwitchOrder(on=False, pid=11), journal)
    assert (host.switches, journal.records) == ([], ())
    # It takes none to switch it on, and a dry run says so.
    assert exit_code(done(host, SwitchOrder(on=True, pid=11))) is ExitCode.DONE
    document = done(host, SwitchOrder(on=False, pid=11, dry_run=True))
    assert (document["fits"], exit_code(document)) == (False, ExitCode.REFUSED)


@pytest.mark.parametrize("kind", [ProcessClass.MIGRATING, ProcessClass.USERFAULTFD])
def test_what_is_being_migrated_is_not_switched_off(kind: ProcessClass) -> None:
    host = machine()
    host.running[0] = process(11, "web", 100, classes=frozenset({ProcessClass.MERGEABLE, kind}))
    with pytest.raises(Refused, match="p11"):
        done(host, SwitchOrder(on=False, pid=11))
    assert host.switches == []
    done(host, SwitchOrder(on=True, pid=11))
    assert len(host.switches) == 1


def test_a_dry_run_changes_and_records_nothing(tmp_path: Path) -> None:
    host = machine()
    journal = SwitchJournal(tmp_path, host.identity)
    document = done(host, SwitchOrder(on=False, pid=11, dry_run=True), journal)
    assert (host.switches, journal.records) == ([(11, False, None, True)], ())
    assert document["processes"][0]["unmerged"] == 100
    assert not journal.path.exists()


def test_only_what_ranges_touch_needs_room() -> None:
    host = machine()
    host.room_bytes = 0
    done(host, SwitchOrder(on=False, pid=11, ranges=((0, 4096),)))
    assert host.asked[0].ranges == ((0, 4096),)
    with pytest.raises(Refused, match="on the host it takes"):
        done(host, SwitchOrder(on=False, pid=11, ranges=((11 << 24, (11 << 24) + 4096),)))
    # Not what all of the mapping takes.
    host.room_bytes = 4096
    one_page = SwitchOrder(on=False, pid=11, ranges=((11 << 24, (11 << 24) + 4096),), dry_run=True)
    document = done(host, one_page)
    assert (document["processes"][0]["unmerged"], document["fits"]) == (1, True)


def test_the_record_is_on_disk_before_the_switch(tmp_path: Path) -> None:
    host = machine()
    journal = SwitchJournal(tmp_path, host.identity)
    seen: list[tuple[bool, str]] = []
    host.before_switch = lambda: seen.extend(
        (one.done, one.by) for one in SwitchJournal(tmp_path, host.identity).records
    )
    done(host, SwitchOrder(on=False, pid=11), journal)
    assert seen == [(False, "somebody")]
    (record,) = journal.records
    assert (record.done, record.on, record.how) == (True, False, "prctl(PR_SET_MEMORY_MERGE)")


def test_a_switch_that_fails_leaves_the_record_as_it_was(tmp_path: Path) -> None:
    host = machine()
    journal = SwitchJournal(tmp_path, host.identity)
    done(host, SwitchOrder(on=False, pid=11), journal)
    before = journal.records
    for outcome in (
        Denied("switching", "no permission"),
        NoSuchProcess("process 11", "it is gone"),
        Refused("switching", "it is being debugged"),
    ):
        host.switch_outcomes = [outcome]
        with pytest.raises(type(outcome)):
            done(host, SwitchOrder(on=True, pid=11), journal)
        assert SwitchJournal(tmp_path, host.identity).records == before
    # It did as it was told, and the memory is as it was.
    host.switch_outcomes = [switched(host.find(11), on=True, after=False)]
    assert exit_code(done(host, SwitchOrder(on=True, pid=11), journal)) is ExitCode.CHECK_FAILED
    assert journal.records == before
    # Of this nobody knows what came of it.
    host.switch_outcomes = [TimedOut("switching", "it did not end")]
    with pytest.raises(TimedOut):
        done(host, SwitchOrder(on=True, pid=11), journal)
    assert [(one.on, one.done) for one in journal.records] == [(True, False)]


def test_one_of_several_fails() -> None:
    host = machine()
    host.switch_outcomes = [Denied("switching", "no permission")]
    document = done(host, SwitchOrder(on=True, unit="web"))
    assert [one["error"] and one["error"]["why"] for one in document["processes"]] == ["no permission", None]
    assert exit_code(document) is ExitCode.CHECK_FAILED


def test_what_is_left_fails_the_check() -> None:
    host = machine()
    host.switch_outcomes = [switched(host.find(11), on=False, after=None, left=("2.4 MiB are no backend's",))]
    assert exit_code(done(host, SwitchOrder(on=False, pid=11))) is ExitCode.CHECK_FAILED
    # Some addresses are only a part of it.
    host.switch_outcomes = [switched(host.find(11), on=False, after=None)]
    assert exit_code(done(host, SwitchOrder(on=False, pid=11, ranges=((0, 4096),)))) is ExitCode.DONE


def test_it_stops_between_processes() -> None:
    host = machine()
    switching = Switching(cast(Host, host), SwitchOrder(on=True, unit="web"), LIMITS)
    host.before_switch = switching.cancel
    document = cast(dict[str, Any], finish(switching).document())
    assert document["cancelled"] is True
    assert len(host.switches) == 1
    assert exit_code(document) is ExitCode.TIMED_OUT


def test_a_cancel_that_leaves_nothing_done_has_a_document() -> None:
    host = machine()
    switching = Switching(cast(Host, host), SwitchOrder(on=True, pid=11), LIMITS)
    host.before_switch = switching.cancel
    host.switch_outcomes = [Cancelled("switching", "it was cancelled")]
    document = cast(dict[str, Any], finish(switching).document())
    assert (document["cancelled"], document["processes"][0]["error"]["why"]) == (True, "it was cancelled")
    assert exit_code(document) is ExitCode.TIMED_OUT


def test_the_engine_has_the_same() -> None:
    host = lab()
    target, starts = across(host)
    order = SwitchOrder(on=False, pid=target.pid)
    document = done(host, order)
    assert (document["processes"][0]["unmerged"], document["processes"][0]["after"]) == (8, False)
    assert not any(page.ksm for page in host.pages(target, starts[0], 4))
    assert done(host, SwitchOrder(on=True, pid=target.pid))["processes"][0]["after"] is True
    with pytest.raises(Exception, match="prctl"):
        done(host, SwitchOrder(on=True, pid=target.pid, method=Method.QMP))
