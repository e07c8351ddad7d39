# SPDX-License-Identifier: GPL-2.0-or-later
"""What the policy benchmark reads of processes, cgroups and a script's log."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.policy import thp
from benchmarks.policy.__main__ import main
from benchmarks.policy.cgroups import Group
from benchmarks.policy.contenders import CONTENDERS, MINE, PEERS, Place
from benchmarks.policy.figures import Sample
from benchmarks.policy.host import busy_seconds
from benchmarks.policy.pages import PAGE, present, processes_below
from benchmarks.policy.pages import _runs as runs
from benchmarks.policy.thp import Memory
from benchmarks.policy.traces import RECIPES
from ksmd_ctl.host.memory import Range

PRESENT, FILE = 1 << 63, 1 << 61
SAMPLE = Sample(0, 0, 0, 0, 0, 0, 0, 1, 100, 20, 1)


@given(st.lists(st.sampled_from([0, PRESENT, PRESENT | FILE, PRESENT | 77]), max_size=3000))
def test_runs_are_the_anonymous_pages_that_are_present(entries: list[int]) -> None:
    found = [number for first, last in runs(array("Q", entries)) for number in range(first, last)]
    assert found == [number for number, entry in enumerate(entries) if entry & PRESENT and not entry & FILE]


@pytest.mark.ksm
def test_present_pages_and_no_others() -> None:
    with mmap.mmap(-1, 6 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        for page in (1, 2, 5):
            memory[page * PAGE : (page + 1) * PAGE] = bytes([page]) * PAGE
        assert memory[3 * PAGE] == 0  # it maps the zero page now
        view = ctypes.c_char.from_buffer(memory)
        start = ctypes.addressof(view)
        item = Range(start, start + 6 * PAGE, frozenset())
        found, more = (list(present(os.getpid(), [item], zero_pages=choice)) for choice in (False, True))
        del view
    own = [(start + page * PAGE, bytes([page]) * PAGE) for page in (1, 2, 5)]
    assert found == own
    assert more == sorted([*own, (start + 3 * PAGE, bytes(PAGE))])


def test_children_and_theirs() -> None:
    with subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout is not None
        sleeper = int(shell.stdout.readline())
        assert {shell.pid, sleeper} <= set(processes_below(os.getpid()))
        os.kill(sleeper, 9)


def test_a_command_enters_its_group_and_bears_its_name(tmp_path: Path) -> None:
    program = "import sys; print(open('/proc/self/cmdline').read().split(chr(0))[0], sys.argv[1:])"
    command = Group(tmp_path).inside([sys.executable, "-c", program, "a b", ""], "qemu-system-x")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "qemu-system-x ['a b', '']\n"
    assert (tmp_path / "cgroup.procs").read_text() == "0\n"


@pytest.mark.parametrize(
    ("files", "cpu", "frames"),
    [
        ({"cpuacct.usage": "1500000000\n", "memory.stat": "cache 1\nrss 8192\nrss_huge 0\n"}, 1.5, 2),
        ({"cpu.stat": "usage_usec 1500000\nuser_usec 1\n", "memory.stat": "anon 8192\nfile 5\n"}, 1.5, 2),
    ],
)
def test_both_versions_of_cgroups(tmp_path: Path, files: dict[str, str], cpu: float, frames: int) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert (Group(tmp_path).cpu_seconds(), Group(tmp_path).frames()) == (cpu, frames)


def test_a_host_is_busy_where_it_does_not_idle_or_wait(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text("cpu  100 200 300 9999 8888 10 20 7777 6666 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    assert busy_seconds(tmp_path / "stat") == 630 / os.sysconf("SC_CLK_TCK")


def test_what_ksmtuned_wrote_is_told(tmp_path: Path) -> None:
    (tmp_path / "ksmtuned.log").write_text(
        "Mon Nov 23 05:21:33 UTC 2026: thres 22737522\n"
        "Mon Nov 23 05:21:33 UTC 2026: 22737522 < 24683656 and free > 22737522, stop ksm\n"
        "Mon Nov 23 05:21:35 UTC 2026: KSMCTL start 300 10\n"
        "Mon Nov 23 05:21:36 UTC 2026: KSMCTL start 600 10\n"
        "Mon Nov 23 05:21:37 UTC 2026: KSMCTL start 600 10\n"
    )
    place = Place(cast(Any, None), tmp_path, 120.0)
    assert CONTENDERS["ksmtuned"].notes(place) == [
        "it wrote 4 times: run=0, then run=1 pages_to_scan=300 sleep_millisecs=10,"
        " then run=1 pages_to_scan=600 sleep_millisecs=10"
    ]


@pytest.mark.parametrize("policy", PEERS)
def test_knobs_that_nobody_here_writes_are_noticed(policy: str) -> None:
    assert CONTENDERS[policy].may_be(SAMPLE)
    assert not CONTENDERS[policy].may_be(replace(SAMPLE, run=0, pages_to_scan=16777216, sleep_millisecs=3600000))


def test_all_that_is_compared_is_there() -> None:
    assert {MINE, *PEERS} <= set(CONTENDERS)
    assert len({recipe.key for recipe in RECIPES}) == len(RECIPES)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--policies", "none-such"], "none-such"),
        (["--memory", "qemu,large"], "there are qemu, always, small"),
        (["--seeds", "one"], "one"),
        (["--seeds", "1,-2"], "'-2' is not a whole number"),
        (["--seconds", "nan"], "'nan' is not a number of seconds from 5 to 86400"),
        (["--seconds", "-5"], "'-5' is not a number of seconds"),
        (["--seconds", "0"], "'0' is not a number of seconds"),
        (["--busy", "99999"], "'99999' is not a whole number from 0 to 1024"),
        (["--traces", "0"], "'0' is not a whole number from 1 to 1000"),
        (["--guests", "--memory", "small"], "QEMU asks for huge pages by itself"),
    ],
)
def test_wrong_usage_exits_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--output", str(tmp_path)])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_an_output_that_can_be_no_folder_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        main(["--output", str(tmp_path / "file")])
    assert ended.value.code == 2
    assert "can't be made a folder: File exists" in capsys.readouterr().err


def thp_tree(folder: Path) -> Path:
    """As another host might have it: one file of the defaults is missing."""
    files = {"enabled": "always madvise [never]\n", "defrag": "always defer [defer+madvise] madvise never\n",
             "use_zero_page": "1\n", "khugepaged/scan_sleep_millisecs": "10\n"}  # fmt: skip
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("memory", Memory)
def test_settings_of_huge_pages_are_set_and_restored(tmp_path: Path, memory: Memory) -> None:
    before = thp.settings(thp_tree(tmp_path))
    assert before == {
        "enabled": "never",
        "defrag": "defer+madvise",
        "use_zero_page": "1",
        "khugepaged/scan_sleep_millisecs": "10",
    }
    thp.use(memory, tmp_path)
    now = thp.settings(tmp_path)
    assert now.keys() == before.keys()
    assert now["enabled"] == ("always" if memory is Memory.ALWAYS else "madvise")
    assert now["khugepaged/scan_sleep_millisecs"] == "10000"
    thp.restore(before, tmp_path)
    assert thp.settings(tmp_path) == before
