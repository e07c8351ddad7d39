# SPDX-License-Identifier: GPL-2.0-or-later
"""systemctl by a script in its place; the real one is in tests/guest_tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from ksmd_ctl.cli.systemctl import Systemctl
from ksmd_ctl.errors import Absent, Denied, Rejected


class Script:
    """A systemctl that says this and ends so, and notes what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "run/systemd/system").mkdir(parents=True)
        path = folder / "systemctl"
        lines = [
            "#!/bin/sh",
            f'echo "$*" >>{folder}/asked',
            f"cat {folder}/out",
            f"cat {folder}/err >&2",
            f"exit $(cat {folder}/code)",
        ]
        path.write_text("\n".join(lines))
        path.chmod(0o755)
        self.say("LoadState=loaded\nActiveState=active\nAllowedMemoryNodes=0-1 3\nEffectiveMemoryNodes=0-1\n")

    def say(self, out: str, err: str = "", code: int = 0) -> None:
        for name, text in {"out": out, "err": err, "code": str(code)}.items():
            (self.folder / name).write_text(text)

    def asked(self) -> list[str]:
        return (self.folder / "asked").read_text().splitlines()


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return Script(tmp_path)


def test_nodes_are_read_and_set(script: Script) -> None:
    there = Systemctl(script.folder)
    assert there.allowed_nodes("a.service") == "0-1,3"
    assert there.effective_nodes("a.service") == "0-1"
    there.set_allowed_nodes("a.service", "2-3")
    there.set_allowed_nodes("a.service", "")
    assert script.asked() == [
        "show --property=ActiveState,AllowedMemoryNodes -- a.service",
        "show --property=ActiveState,EffectiveMemoryNodes -- a.service",
        "show --property=LoadState -- a.service",
        "set-property --runtime -- a.service AllowedMemoryNodes=2-3",
        "show --property=LoadState -- a.service",
        "set-property --runtime -- a.service AllowedMemoryNodes=",
    ]


@pytest.mark.parametrize("state", ["inactive", "failed"])
def test_a_unit_that_has_ended(script: Script, state: str) -> None:
    script.say(f"ActiveState={state}\nAllowedMemoryNodes=\nEffectiveMemoryNodes=\n")
    with pytest.raises(Absent, match="it has ended, or there is no such unit"):
        Systemctl(script.folder).allowed_nodes("a.service")


def test_a_limit_is_taken_back_from_a_unit_that_will_start_again(script: Script) -> None:
    script.say("LoadState=loaded\nActiveState=inactive\n")
    Systemctl(script.folder).set_allowed_nodes("a.service", "")
    assert script.asked()[-1].startswith("set-property")
    script.say("LoadState=not-found\nActiveState=inactive\n")
    with pytest.raises(Absent, match="there is no such unit"):
        Systemctl(script.folder).set_allowed_nodes("a.service", "")


def test_a_systemd_that_is_too_old(script: Script) -> None:
    script.say("ActiveState=active\n")
    with pytest.raises(Absent, match="it came with 244"):
        Systemctl(script.folder).allowed_nodes("a.service")


def test_what_systemd_says_is_the_error(script: Script) -> None:
    script.say("", "Failed to set unit properties: Access denied\n", 1)
    with pytest.raises(Denied, match="Access denied") as caught:
        Systemctl(script.folder).allowed_nodes("a.service")
    assert caught.value.hint == "run as root"
    script.say("", "Failed to parse\nit\n", 1)
    with pytest.raises(Rejected, match="Failed to parse; it"):
        Systemctl(script.folder).allowed_nodes("a.service")


def test_a_host_without_systemd(tmp_path: Path) -> None:
    with pytest.raises(Absent, match="was not started with systemd") as caught:
        Systemctl(tmp_path)
    assert "cpuset.mems" in caught.value.hint
