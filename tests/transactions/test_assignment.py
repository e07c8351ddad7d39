# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ksmd_ctl.errors import Absent, KsmdError, Refused, Rejected
from ksmd_ctl.host.sample import HostIdentity, HostKind
from ksmd_ctl.transactions.assignment import (
    AssignedUnit,
    Assignments,
    DomainUnit,
    UnitManager,
    is_unit_name,
    need_room,
)
from tests.fakes.host import process

GOLD = DomainUnit("gold.service", "gold", frozenset({0}))
SILVER = DomainUnit("silver.slice", "silver", frozenset({1, 2}))


class Units(UnitManager):
    """systemd with these units: the nodes of each; None for one that has ended.

    :ivar mems: where processes of each can allocate: an empty limit leaves it as it is, as with systemd 257
    :ivar fails: by unit, what each call that sets it raises
    :ivar confined: False where limits have no effect
    """

    def __init__(self, **units: str | None) -> None:
        self.units = {name.replace("_", "."): nodes for name, nodes in units.items()}
        self.mems = {name: nodes or "0-5" for name, nodes in self.units.items()}
        self.fails: dict[str, BaseException] = {}
        self.confined = True
        self.calls: list[tuple[str, str]] = []

    def allowed_nodes(self, unit: str) -> str:
        found = self.units.get(unit)
        if found is None:
            raise Absent(f"looking at {unit}", "it has ended")
        return found

    def effective_nodes(self, unit: str) -> str:
        self.allowed_nodes(unit)
        return self.mems[unit] if self.confined else ""

    def set_allowed_nodes(self, unit: str, nodes: str) -> None:
        self.allowed_nodes(unit)
        if unit in self.fails:
            raise self.fails[unit]
        self.calls.append((unit, nodes))
        self.units[unit] = nodes
        self.mems[unit] = nodes or self.mems[unit]


def kept(folder: Path, boot_id: str = "boot-1") -> Assignments:
    return Assignments(folder, HostIdentity(HostKind.KERNEL, "6.12", 4096, boot_id), frozenset(range(6)))


def test_units_get_their_nodes_and_get_back_what_they_had(tmp_path: Path) -> None:
    there = Units(gold_service="0-3", silver_slice="")
    kept(tmp_path).assign(there, [GOLD, SILVER])
    assert there.units == {"gold.service": "0", "silver.slice": "1-2"}
    found = kept(tmp_path)
    assert found.units == {
        "gold.service": AssignedUnit("gold", "0-3", True),
        "silver.slice": AssignedUnit("silver", "", True),
    }
    assert found.undo(there, lambda _, one: one.domain == "silver") == ("silver.slice",)
    assert there.units == {"gold.service": "0", "silver.slice": ""}
    assert kept(tmp_path).undo(there, lambda *_: True) == ("gold.service",)
    assert there.units == {"gold.service": "0-3", "silver.slice": ""}
    assert there.mems == {"gold.service": "0-3", "silver.slice": "0-5"}
    assert not kept(tmp_path).path.exists()


def test_another_assignment_keeps_what_was_there_at_first(tmp_path: Path) -> None:
    there = Units(gold_service="0-3")
    kept(tmp_path).assign(there, [GOLD])
    kept(tmp_path).assign(there, [DomainUnit("gold.service", "gold", frozenset({5}))])
    assert there.units == {"gold.service": "5"}
    kept(tmp_path).undo(there, lambda *_: True)
    assert there.units == {"gold.service": "0-3"}


def test_where_one_can_not_be_changed_all_are_as_before(tmp_path: Path) -> None:
    there = Units(gold_service="0-3", silver_slice="")
    there.fails["silver.slice"] = Rejected("systemctl", "no")
    with pytest.raises(KsmdError, match="no"):
        kept(tmp_path).assign(there, [GOLD, SILVER])
    assert there.units == {"gold.service": "0-3", "silver.slice": ""}


def test_what_was_interrupted_is_still_on_disk(tmp_path: Path) -> None:
    """The process is killed between two units: nothing puts the first one back."""

    class Killed(BaseException):
        pass

    there = Units(gold_service="0-3", silver_slice="")
    there.fails["silver.slice"] = Killed()
    first = kept(tmp_path)
    first.undo = lambda *_: ()  # type: ignore[method-assign]
    with pytest.raises(Killed):
        first.assign(there, [GOLD, SILVER])
    assert there.units == {"gold.service": "0", "silver.slice": ""}
    there.fails.clear()
    after = kept(tmp_path)
    assert after.undo(there, lambda _, one: not one.done) == ("gold.service", "silver.slice")
    assert there.units == {"gold.service": "0-3", "silver.slice": ""}
    assert kept(tmp_path).units == {}


def test_a_limit_without_effect_is_an_error_and_put_back(tmp_path: Path) -> None:
    there = Units(gold_service="")
    there.confined = False
    with pytest.raises(Rejected, match="can allocate on all nodes") as caught:
        kept(tmp_path).assign(there, [GOLD])
    assert "cpuset" in caught.value.hint
    assert there.calls == [("gold.service", "0"), ("gold.service", "0-5"), ("gold.service", "")]
    assert kept(tmp_path).units == {}


def test_a_unit_that_has_ended_before(tmp_path: Path) -> None:
    there = Units(gold_service="", silver_slice=None)
    with pytest.raises(Absent, match="it has ended"):
        kept(tmp_path).assign(there, [GOLD, SILVER])
    assert there.calls == []
    assert not kept(tmp_path).path.exists()


def test_a_unit_that_has_ended_since_has_taken_its_limit_with_it(tmp_path: Path) -> None:
    there = Units(gold_service="")
    kept(tmp_path).assign(there, [GOLD])
    there.units["gold.service"] = None
    assert kept(tmp_path).undo(there, lambda *_: True) == ("gold.service",)
    assert kept(tmp_path).units == {}


def test_what_can_not_be_put_back_stays_on_disk(tmp_path: Path) -> None:
    there = Units(gold_service="", silver_slice="")
    kept(tmp_path).assign(there, [GOLD, SILVER])
    there.fails["silver.slice"] = Rejected("systemctl", "no")
    with pytest.raises(Rejected):
        kept(tmp_path).undo(there, lambda *_: True)
    assert list(kept(tmp_path).units) == ["silver.slice"]


def test_after_another_start_nothing_is_assigned(tmp_path: Path) -> None:
    there = Units(gold_service="")
    kept(tmp_path).assign(there, [GOLD])
    assert kept(tmp_path, "boot-2").units == {}


@pytest.mark.parametrize(
    ("unit", "before"),
    [
        ("-.slice", ""),
        ("../x.service", ""),
        ("--help.service", ""),
        ("x.socket", ""),
        ("x.service", "0 --runtime"),
        ("x", ""),
    ],
)
def test_a_file_with_what_nobody_assigns_is_put_aside(tmp_path: Path, unit: str, before: str) -> None:
    path = tmp_path / "assigned-kernel.json"
    units = {unit: {"domain": "gold", "before": before, "done": True}}
    path.write_text(json.dumps({"format": 1, "boot_id": "boot-1", "units": units}))
    found = kept(tmp_path)
    assert (found.units, found.damaged) == ({}, f"{path}.damaged")


def test_names_of_units() -> None:
    names = ["a.service", "qemu.slice", r"machine-qemu\x2d1\x2dvm.scope", "user@1000.service", "100.scope"]
    assert all(map(is_unit_name, names))
    assert not any(map(is_unit_name, ["", "a", "-.slice", "a.timer", "a b.service", "a/b.service", "a.service\n"]))


def test_what_does_not_fit_is_refused_with_figures() -> None:
    silver = replace(SILVER, processes=(process(1, resident_nodes={0: 500, 1: 7}), process(2, resident_nodes={3: 12})))
    assert silver.elsewhere_pages == 512
    need_room([GOLD, silver], {0: 0, 1: 1 << 20, 2: 1 << 20}, 4096)
    with pytest.raises(Refused, match=r"2\.0 MiB of silver would come to node 1-2, and 1\.5 MiB are free"):
        need_room([GOLD, silver], {0: 0, 1: 1 << 20, 2: 1 << 19}, 4096)
