# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from ksmd_ctl.config.model import Config
from ksmd_ctl.daemon import service
from ksmd_ctl.daemon.log import Event, Log
from ksmd_ctl.daemon.service import DaemonOptions, restore_after_verify
from ksmd_ctl.errors import Refused, Rejected
from ksmd_ctl.host.sample import HostKind
from ksmd_ctl.scenario import lab_restore


def told(options: DaemonOptions) -> list[tuple[Event, str]]:
    found: list[tuple[Event, str]] = []

    def sink(text: str, fields: Mapping[str, str]) -> None:
        found.append((Event(fields["MESSAGE_ID"]), text))

    restore_after_verify(options, Log(sink))
    return found


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Root, on a machine where nothing was left."""
    monkeypatch.setattr(service.os, "geteuid", lambda: 0)
    monkeypatch.setattr(lab_restore, "repair", lambda: False)
    return monkeypatch


def test_nothing_was_left_and_nothing_is_said(machine: pytest.MonkeyPatch) -> None:
    assert told(DaemonOptions()) == []


def test_root_puts_it_back_and_says_so(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(lab_restore, "repair", lambda: True)
    [(event, text)] = told(DaemonOptions())
    assert event is Event.RESTORED
    assert "verify" in text


def test_what_can_not_be_put_back_is_said_and_does_not_keep_the_service_from_starting(
    machine: pytest.MonkeyPatch,
) -> None:
    def fails() -> bool:
        raise Rejected("writing max_page_sharing", "EBUSY")

    machine.setattr(lab_restore, "repair", fails)
    [(event, text)] = told(DaemonOptions())
    assert event is Event.NOT_RESTORED
    assert text.endswith("writing max_page_sharing: EBUSY")


def test_scenarios_under_way_do(machine: pytest.MonkeyPatch) -> None:
    def runs() -> bool:
        raise Refused("taking KSM", "process 7 is running scenarios here")

    machine.setattr(lab_restore, "repair", runs)
    with pytest.raises(Refused):
        told(DaemonOptions())


@pytest.mark.parametrize("options", [DaemonOptions(host=HostKind.ENGINE), DaemonOptions(root=Path("/elsewhere"))])
def test_another_host_has_none_of_it(machine: pytest.MonkeyPatch, options: DaemonOptions) -> None:
    machine.setattr(lab_restore, "repair", lambda: pytest.fail("this machine was touched"))
    assert told(options) == []


def test_who_may_not_write_says_who_has_to(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Here(lab_restore.Recovery):
        def __init__(self) -> None:
            super().__init__(directory=tmp_path)

    machine.setattr(service.os, "geteuid", lambda: 998)
    machine.setattr(lab_restore, "repair", lambda: pytest.fail("it may not"))
    machine.setattr(lab_restore, "Recovery", Here)
    assert told(DaemonOptions()) == []
    (tmp_path / lab_restore.FILE).write_text("{}")
    [(event, text)] = told(DaemonOptions())
    assert event is Event.NOT_RESTORED
    assert "no known form" in text
    document = {
        "format": 1,
        "boot_id": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "pid": 2**22 + 1,
        "start_time_ticks": 1,
        "knobs": {"run": 0},
        "ksmd": 2**22 + 1,
        "cpus": [0],
    }
    (tmp_path / lab_restore.FILE).write_text(json.dumps(document))
    [(event, text)] = told(DaemonOptions())
    assert event is Event.NOT_RESTORED
    assert "`ksmd-ctl daemon --restore` as root" in text


# -- the broker of another container -----------------------------------------------------------------------


def test_a_broker_whose_socket_is_named_is_waited_for_and_named_when_it_does_not_come(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(service, "_BROKER_SECONDS", 0.2)
    monkeypatch.setattr(service.os, "geteuid", lambda: 1000)
    path = tmp_path / "broker.socket"
    _, close = service.open_host(DaemonOptions(), Config(broker_socket=str(path)))
    close()
    said = capsys.readouterr().err
    assert f"waiting for the broker at {path}" in said
    assert "no broker within 0.2 s" in said


def test_the_broker_of_the_unit_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.time, "sleep", lambda _: pytest.fail("it waits"))
    monkeypatch.setattr(service.os, "geteuid", lambda: 1000)
    _, close = service.open_host(DaemonOptions(), Config())
    close()
