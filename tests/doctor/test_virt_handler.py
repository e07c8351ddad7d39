# SPDX-License-Identifier: GPL-2.0-or-later
"""Each state of the move from virt-handler to the service that can be seen from a node."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from ksmd_ctl.doctor.finding import Code, Severity
from tests.doctor.test_diagnose import diagnose, knob, look, only, service, writing

HANDLER = "virt-handler (pid 812)"


def change(name: str, before: object, after: object, age: float = 60.0, **more: object) -> Mapping[str, object]:
    found = {"knob": name, "from": before, "to": after, "held": True, "writers": ["virt-handler"], "who": HANDLER}
    return {**found, "times": 3, "age_seconds": age, "first_age_seconds": age, **more}


def beside(*changes: Mapping[str, object], uptime: float = 3600.0, **knobs: Mapping[str, object]) -> dict[str, object]:
    """A service that manages KSM, and virt-handler."""
    report = service("adaptive", **(knobs or {"run": knob("held", 1, 1)})) | writing("virt-handler")
    return report | {"daemon": {"pid": 1, "uptime_seconds": uptime}, "foreign_changes": list(changes)}


@pytest.mark.parametrize(
    "changes",
    [
        [],
        [change("pages_to_scan", 1000, 950, age=700)],
        [change("run", 1, 0, who="bash (pid 7)")],
        [change("run", 1, 0, who="", writers=["ksmtuned"])],
    ],
)
def test_after_the_move_virt_handler_runs_and_nothing_is_said(changes: list[Mapping[str, object]]) -> None:
    assert diagnose(look(report=beside(*changes))) == ()


@pytest.mark.parametrize("who", [HANDLER, ""])
def test_ksm_configuration_is_still_set(who: str) -> None:
    changes = [change("pages_to_scan", 1000, 950, who=who), change("run", 1, 0, who=who)]
    found = only(look(report=beside(*changes)))
    assert (found.code, found.severity) == (Code.VIRT_HANDLER, Severity.COSTS)
    assert found.title == "KubeVirt's virt-handler still writes the knobs"
    assert "/spec/configuration/ksmConfiguration" in found.command
    values = [(figure.name, figure.value) for figure in found.evidence]
    assert ("pages_to_scan was changed from 1000", "to 950, 3 times") in values
    # A knob that is not put back any more is no unknown program's.
    drifted = {"run": knob("held", 1, 1), "pages_to_scan": knob("drifted", 1000, 950, "somebody else wrote it")}
    assert only(look(report=beside(*changes, **drifted))).code is Code.VIRT_HANDLER


def test_the_annotation_is_still_true() -> None:
    found = only(look(report=beside(change("run", 1, 0))))
    assert (found.code, found.severity) == (Code.VIRT_HANDLER, Severity.COSTS)
    assert "again and again" in found.title
    assert "ksm-handler-managed-" in found.command
    once = only(look(report=beside(change("run", 1, 0, times=1))))
    assert (once.code, once.severity, once.command) == (Code.VIRT_HANDLER, Severity.NOTE, "")


def test_soon_after_the_start_it_is_not_known() -> None:
    found = only(look(report=beside(uptime=599.0)))
    assert (found.severity, "not known yet" in found.title) == (Severity.NOTE, True)


def test_another_manager_beside_is_told_as_well() -> None:
    report = beside() | writing("virt-handler", "momd")
    found = only(look(report=report | {"daemon": {"pid": 1, "uptime_seconds": 3600.0}}))
    assert (found.code, "virt-handler" in found.title) == (Code.TWO_MANAGERS, False)


def test_without_a_service_that_manages_it_may_be_that_nobody_does() -> None:
    for report in (writing("virt-handler"), service("observe") | writing("virt-handler")):
        found = only(look(report=report))
        assert found.code is Code.OTHER_WRITER
        assert "Where it has none, virt-handler writes nothing, and nobody manages KSM here" in found.advice
