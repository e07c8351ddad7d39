# SPDX-License-Identifier: GPL-2.0-or-later
"""On a kernel that was built without KSM, and without NUMA: every command says so in two lines, and the doctor why."""

from __future__ import annotations

import json
import os

import pytest

from tests.guest.uml import run_without_ksm

pytestmark = pytest.mark.guest

#: What takes KSM.
COMMANDS = (
    "status",
    "nodes",
    "watch --json",
    "metrics",
    "set run=1",
    "set run=1 --dry-run",
    "verify --random 1 --count 1",
    "daemon --metrics-listen ''",
)
SCRIPT = """
ksmd-ctl doctor --json
echo "exit $?"
for command in {commands}; do
    echo "--- $command"
    eval "timeout 60 ksmd-ctl $command" 2>&1
    echo "exit $?"
done
"""


def test_the_doctor_names_it_and_every_command_says_so_in_two_lines() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to mount")
    words = " ".join(f'"{command}"' for command in COMMANDS)
    code, said = run_without_ksm(SCRIPT.format(commands=words))
    assert code == 0, said
    doctor, *others = said.split("--- ")
    text, _, status = doctor.rpartition("exit ")
    document = json.loads(text)
    assert int(status) == 1
    (finding,) = document["findings"]
    assert (finding["code"], finding["title"]) == ("ksm-absent", "This kernel has no KSM")
    assert document["host"]["release"] != os.uname().release
    for block in others:
        _, what, hint, *rest = block.splitlines()
        assert what.startswith("ksmd-ctl: "), block
        assert hint.startswith("hint: "), block
        assert rest == ["exit 4"], block
        assert "KSM" in what, block
    assert len(others) == len(COMMANDS)
