# SPDX-License-Identifier: GPL-2.0-or-later
"""What others changed: kept for a day and a boot, bounded, and never in anybody's way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.host.knobs import Knob, KnobValue
from ksmd_ctl.knobs.foreign import DAY_SECONDS, MOST_OF_A_KNOB, ForeignChange, ForeignChanges, foreign_section
from tests.fakes.host import FakeHost

IDENTITY = FakeHost().identity


def change(knob: Knob, before: KnobValue, after: KnobValue, at: float, *writers: str) -> ForeignChange:
    return ForeignChange(knob, before, after, True, writers, at, at)


def test_it_outlives_the_service_and_not_the_boot(tmp_path: Path) -> None:
    changes = ForeignChanges(tmp_path, IDENTITY)
    changes.add([replace(change(Knob.RUN, 1, 2, 100.0, "ksmtuned"), who="bash (pid 7)")], 100.0)
    again = ForeignChanges(tmp_path, IDENTITY)
    assert again.entries == changes.entries
    assert foreign_section(again.entries, 130.0) == [
        {
            "knob": "run",
            "from": 1,
            "to": 2,
            "held": True,
            "writers": ["ksmtuned"],
            "who": "bash (pid 7)",
            "times": 1,
            "age_seconds": 30.0,
            "first_age_seconds": 30.0,
        }
    ]
    assert ForeignChanges(tmp_path, replace(IDENTITY, boot_id="boot-2")).entries == ()


def test_after_a_day_it_is_forgotten(tmp_path: Path) -> None:
    changes = ForeignChanges(tmp_path, IDENTITY)
    changes.add([change(Knob.RUN, 1, 2, 100.0)], 100.0)
    assert len(foreign_section(changes.entries, 100.0 + DAY_SECONDS)) == 1
    assert foreign_section(changes.entries, 101.0 + DAY_SECONDS) == []
    changes.add([], 101.0 + DAY_SECONDS)
    assert ForeignChanges(tmp_path, IDENTITY).entries == ()


def test_the_same_again_is_one_entry_with_a_number(tmp_path: Path) -> None:
    changes = ForeignChanges(tmp_path, IDENTITY)
    for at in (1.0, 2.0, 3.0):
        changes.add([change(Knob.RUN, 1, 0, at), change(Knob.RUN, 0, 1, at)], at)
    assert [(entry.after, entry.times, entry.first_seconds, entry.last_seconds) for entry in changes.entries] == [
        (0, 3, 1.0, 3.0),
        (1, 3, 1.0, 3.0),
    ]


def test_a_knob_that_is_changed_all_the_time_pushes_no_other_out(tmp_path: Path) -> None:
    changes = ForeignChanges(tmp_path, IDENTITY)
    changes.add([change(Knob.RUN, 1, 2, 0.0)], 0.0)
    for number in range(1000):
        changes.add([change(Knob.PAGES_TO_SCAN, number, number + 1, number)], number)
    assert changes.entries[0].knob is Knob.RUN
    assert len(changes.entries) == 1 + MOST_OF_A_KNOB
    assert changes.entries[-1].after == 1000


def test_whoever_changes_a_knob_all_the_time_has_the_disk_written_now_and_then(tmp_path: Path) -> None:
    changes = ForeignChanges(tmp_path, IDENTITY)
    on_disk = []
    for number in range(120):
        changes.add([change(Knob.PAGES_TO_SCAN, number, number + 1, number)], number)
        on_disk.append(changes.path.read_bytes())
    assert 2 <= len(set(on_disk)) <= 24


def test_who_flips_a_knob_ten_times_a_second_has_the_disk_written_each_half_minute(tmp_path: Path) -> None:
    changes = ForeignChanges(tmp_path, IDENTITY)
    on_disk = []
    for number in range(1200):
        changes.add([change(Knob.RUN, number % 2, 1 - number % 2, number / 10)], number / 10)
        on_disk.append(changes.path.read_bytes())
    assert len(set(on_disk)) <= 6


def test_a_new_change_is_on_disk_at_once_whatever_was_saved_before_it(tmp_path: Path) -> None:
    changes = ForeignChanges(tmp_path, IDENTITY)
    changes.add([change(Knob.PAGES_TO_SCAN, 100, 77, 1.0)], 1.0)
    changes.add([change(Knob.USE_ZERO_PAGES, 0, 1, 3.5)], 3.5)
    changes.add([change(Knob.RUN, 1, 2, 5.0)], 5.0)
    changes.add([change(Knob.RUN, 2, 0, 6.0)], 6.0)
    # Nobody saves when the service is killed.
    after_kill = ForeignChanges(tmp_path, IDENTITY).entries
    assert [(entry.knob, entry.after) for entry in after_kill] == [
        (Knob.PAGES_TO_SCAN, 77),
        (Knob.USE_ZERO_PAGES, 1),
        (Knob.RUN, 2),
        (Knob.RUN, 0),
    ]
    changes.save(120.0)
    assert ForeignChanges(tmp_path, IDENTITY).entries == changes.entries


def test_where_it_can_not_be_written_nothing_fails_and_it_is_tried_again(tmp_path: Path) -> None:
    blocked = tmp_path / "state"
    changes = ForeignChanges(blocked, IDENTITY)
    blocked.write_text("a file where the directory should be")
    changes.add([change(Knob.RUN, 1, 2, 100.0)], 100.0)
    blocked.unlink()
    changes.add([], 200.0)
    assert json.loads(changes.path.read_text())["changes"][0]["after"] == 2


@given(
    st.binary(max_size=60)
    | st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3)).map(
        lambda value: json.dumps({"format": 1, "boot_id": "boot-1", "changes": [value]}).encode()
    )
)
def test_a_damaged_file_is_put_aside_and_not_believed(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    directory = tmp_path_factory.mktemp("state")
    path = directory / "foreign-kernel.json"
    path.write_bytes(content)
    assert ForeignChanges(directory, IDENTITY, keep=True).entries == ()
    assert path.exists()
    changes = ForeignChanges(directory, IDENTITY)
    assert (changes.entries, Path(changes.damaged).read_bytes()) == ((), content)


@pytest.mark.parametrize(
    "wrong",
    [
        {"after": 3},
        {"knob": "nothing"},
        {"writers": ["\x1b[2J"]},
        {"who": "\x1b[2J"},
        {"times": "x"},
        {"last_seconds": None},
    ],
)
def test_nothing_that_a_knob_does_not_take_or_that_can_not_be_shown_is_taken(
    tmp_path: Path, wrong: dict[str, object]
) -> None:
    changes = ForeignChanges(tmp_path, IDENTITY)
    changes.add([change(Knob.RUN, 1, 2, 100.0, "ksmtuned")], 100.0)
    document = json.loads(changes.path.read_text())
    document["changes"][0] |= wrong
    changes.path.write_text(json.dumps(document))
    assert ForeignChanges(tmp_path, IDENTITY).entries == ()
