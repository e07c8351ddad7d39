# SPDX-License-Identifier: GPL-2.0-or-later
"""The running kernel as a lab: equal to the engine, in lockstep, and everything put back, whatever happens."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ksmd_ctl.errors import Refused, Rejected, Unparsable
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.kernel.ksmfs import KsmFs
from ksmd_ctl.kernel.procfs import find_ksmd
from ksmd_ctl.scenario import lab_restore
from ksmd_ctl.scenario.format import LIBRARY, load_all
from ksmd_ctl.scenario.kernel_lab import KernelLab, open_kernel_lab
from ksmd_ctl.scenario.lab_restore import find_users
from ksmd_ctl.scenario.regions import spawn
from ksmd_ctl.scenario.session import Session, find_profile
from tests.kernel.test_processes import stat
from tests.service.running import knobs, service

PAGE = os.sysconf("SC_PAGE_SIZE")


def page(text: str) -> bytes:
    return (text.encode() + b"\0").ljust(PAGE, b".")


@pytest.fixture
def lab(ksm_host: Path, tmp_path: Path) -> Iterator[KernelLab]:
    with open_kernel_lab(directory=tmp_path) as lab:
        yield lab


def counter(lab: KernelLab, name: str) -> int:
    return int(lab.sample().value(name))


@pytest.fixture
def ksm() -> Iterator[KsmFs]:
    files = KsmFs()
    yield files
    files.close()


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it didn't come to that"
        time.sleep(0.01)


@pytest.mark.ksm
def test_batches_are_exact(lab: KernelLab) -> None:
    lab.set(Knob.RUN, 2)
    lab.set(Knob.RUN, 0)
    process = lab.spawn("p")
    start = lab.map(process, 40, None)
    lab.store(process, start, [page(f"{number}") for number in range(40)])
    # Nobody is registered: nothing happens.
    lab.batch(10)
    assert counter(lab, "full_scans") == 0
    lab.advise(process, start, 40, mergeable=True)
    scanned = [counter(lab, "pages_volatile")]
    for size in (1, 3, 16, 10, 10):
        lab.batch(size)
        scanned.append(counter(lab, "pages_volatile"))
    # Each page that was seen once is volatile: its checksum is new.
    assert scanned == [0, 1, 4, 20, 30, 40]
    assert counter(lab, "full_scans") == 0
    lab.batch(1)
    assert counter(lab, "full_scans") == 1
    for number in range(2, 30):
        lab.batch(1000)
        assert counter(lab, "full_scans") == number
    lab.exit(process)
    lab.batch(1000)
    lab.batch(1000)
    assert counter(lab, "full_scans") == 30


@pytest.mark.ksm
def test_the_library_and_random_scenarios_are_equal_here(lab: KernelLab) -> None:
    session = Session(find_profile(lab, lab.ksm_stat_names()).profile, lab)
    differences = []
    for scenario in load_all([LIBRARY]):
        differences += [(scenario.name, str(each)) for each in session.run(scenario).differences]
    assert differences == []
    # What needs several nodes is for guests.
    assert session.verdicts["equal"] >= 40


@pytest.mark.ksm
def test_all_is_put_back(ksm_host: Path, ksm: KsmFs, tmp_path: Path) -> None:
    for knob, value in ((Knob.RUN, 1), (Knob.PAGES_TO_SCAN, 123), (Knob.MAX_PAGE_SHARING, 77)):
        ksm.store(knob, value)
    before = lab_restore.Before.look(ksm)
    with open_kernel_lab(directory=tmp_path) as lab:
        process = lab.spawn("p")
        lab.set(Knob.MERGE_ACROSS_NODES, 0)
        assert json.loads((tmp_path / lab_restore.FILE).read_text())["knobs"]["max_page_sharing"] == 77
        with pytest.raises(Refused, match="is running scenarios"):
            open_kernel_lab(directory=tmp_path)
    assert lab_restore.Before.look(ksm) == before
    assert not Path(f"/proc/{process.pid}").exists()
    assert list(tmp_path.iterdir()) == []


_VICTIM = """
import sys
from pathlib import Path
from ksmd_ctl.scenario.kernel_lab import open_kernel_lab
from ksmd_ctl.scenario.generate import Abilities, generate
from ksmd_ctl.scenario.session import Session
from tests.service.running import knobs, service
with open_kernel_lab(directory=Path(sys.argv[1])) as lab:
    session = Session("6.12", lab)
    abilities = session.abilities()
    for number in range(10**6):
        session.run(generate(1, number, abilities))
        print(number, flush=True)
"""


def children(pid: int) -> set[int]:
    found = set()
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(file.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            found |= {int(file.parent.name), *children(int(file.parent.name))}
    return found


@pytest.mark.ksm
@pytest.mark.parametrize("scenarios", [0, 1, 5, 12])
def test_what_a_killed_run_left_is_put_back_at_the_next_start(
    ksm_host: Path, ksm: KsmFs, tmp_path: Path, scenarios: int
) -> None:
    before = lab_restore.Before.look(ksm)
    victim = subprocess.Popen([sys.executable, "-c", _VICTIM, tmp_path], stdout=subprocess.PIPE)
    assert victim.stdout is not None
    wait_for((tmp_path / lab_restore.FILE).exists)
    for _ in range(scenarios):
        victim.stdout.readline()
    family = children(victim.pid)
    victim.kill()
    victim.wait()
    victim.stdout.close()
    wait_for(
        lambda: not any(Path(f"/proc/{pid}/exe").exists() and os.path.exists(f"/proc/{pid}/exe") for pid in family)
    )
    with open_kernel_lab(directory=tmp_path) as lab:
        lab.set(Knob.RUN, 2)
    assert lab_restore.Before.look(ksm) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ksm
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_puts_back_when_told_to_stop(ksm_host: Path, ksm: KsmFs, number: signal.Signals) -> None:
    before = lab_restore.Before.look(ksm)
    words = [sys.executable, "-m", "ksmd_ctl.cli.main", "verify", "--random", "1", "--count", "100000"]
    running = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    wait_for(lambda: ksm.read(Knob.SLEEP_MILLISECS) != before.knobs[Knob.SLEEP_MILLISECS])
    running.send_signal(number)
    assert running.wait(60) == 130
    assert lab_restore.Before.look(ksm) == before


@pytest.mark.ksm
def test_foreign_memory_is_refused_and_nothing_changes(ksm_host: Path, ksm: KsmFs, tmp_path: Path) -> None:
    with spawn("foreign") as other:
        start = other.map(4)
        other.store(start, [page("x")] * 4)
        other.advise(start, 4, mergeable=True)
        assert other.id.pid in {user.pid for user in find_users()}
        before = lab_restore.Before.look(ksm)
        with pytest.raises(Refused, match=r"others have mergeable memory: .*\("):
            open_kernel_lab(directory=tmp_path)
        assert lab_restore.Before.look(ksm) == before
        words = [sys.executable, "-m", "ksmd_ctl.cli.main", "verify"]
        assert subprocess.run(words, capture_output=True, check=False).returncode == 6
        words += ["--take-over", str(LIBRARY / "corners")]
        found = subprocess.run(words, capture_output=True, text=True, check=False)
        assert (found.returncode, "others have mergeable memory" in found.stderr) == (6, True)
    assert other.id.pid not in {user.pid for user in find_users()}


@pytest.fixture
def small_scenario(tmp_path: Path) -> str:
    (tmp_path / "small.toml").write_text(
        'format = 1\nname = "small"\n[[region]]\nprocess = "p"\nname = "a"\npages = ["x", "x"]\n'
        "[[step]]\nscan = 2\n[[step]]\nobserve = 'end'\n"
    )
    return str(tmp_path / "small.toml")


def verify(*words: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "ksmd_ctl.cli.main", "verify", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.ksm
def test_a_program_that_writes_the_knobs_is_in_the_way_unless_told_to_take_over(
    ksm_host: Path, ksm: KsmFs, tmp_path: Path, small_scenario: str
) -> None:
    before = lab_restore.Before.look(ksm)
    program = tmp_path / "ksmtuned"
    shutil.copy("/bin/sleep", program)
    with subprocess.Popen([program, "600"]) as writer:
        try:
            code, said = verify(small_scenario)
            assert code == 6
            assert f"it is managed by ksmtuned ({writer.pid})" in said
            assert "--take-over" in said
            assert verify("--take-over", small_scenario) == (0, "")
        finally:
            writer.kill()
    assert lab_restore.Before.look(ksm) == before


@pytest.mark.ksm
@pytest.mark.parametrize(("policy", "holds"), [("observe", ""), ("fixed", "[knobs]\nrun = 0\nsleep_millisecs = 50\n")])
def test_a_service_is_in_the_way_unless_told_to_take_over(
    ksm_host: Path, tmp_path: Path, small_scenario: str, policy: str, holds: str
) -> None:
    """One that only looks may go on looking; one that holds `run` ends the scenarios as soon as it puts it back."""
    with service(tmp_path, f"policy = '{policy}'\n{holds}", runtime_directory="/run/ksmd-ctl") as running:
        held = knobs(ksm_host)
        code, said = verify(small_scenario)
        assert (code, f"ksmd-ctl daemon (pid {running.process.pid})" in said) == (6, True)
        assert knobs(ksm_host) == held
        # Long enough for a service that puts knobs back to do so.
        code, said = verify("--take-over", "--random", "1", "--count", "100000" if policy == "fixed" else "50")
        if policy == "fixed":
            assert (code, "somebody else wrote run or sleep_millisecs" in said) == (6, True)
        else:
            assert code == 0
        assert knobs(ksm_host) == held
        assert running.end() == 0


@pytest.mark.ksm
def test_another_writer_is_noticed(lab: KernelLab, ksm_host: Path) -> None:
    lab.batch(10)
    (ksm_host / "sleep_millisecs").write_text("20")
    with pytest.raises(Refused, match="somebody else wrote run or sleep_millisecs"):
        lab.batch(10)


# -- the file, on a made-up tree -----------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    boot = tmp_path / "proc/sys/kernel/random"
    boot.mkdir(parents=True)
    (boot / "boot_id").write_text("this-boot\n")
    (tmp_path / f"proc/{os.getpid()}").mkdir()
    (tmp_path / f"proc/{os.getpid()}/stat").write_text(Path("/proc/self/stat").read_text())
    ksm = tmp_path / "sys/kernel/mm/ksm"
    ksm.mkdir(parents=True)
    for name, text in (("run", "1"), ("pages_to_scan", "7"), ("max_page_sharing", "5")):
        (ksm / name).write_text(text + "\n")
    return tmp_path


def document(tree: Path, **changes: Any) -> None:
    found = {
        "format": 1,
        "boot_id": "this-boot",
        "pid": 2**22 + 1,
        "start_time_ticks": 1,
        "ksmd": 2**22 + 1,
        "cpus": [0],
    }
    knobs = {"run": 0, "pages_to_scan": 100, "max_page_sharing": 256}
    (tree / lab_restore.FILE).write_text(json.dumps({**found, "knobs": knobs, **changes}))


def test_repair_puts_back_and_forgets(tree: Path) -> None:
    document(tree)
    assert lab_restore.repair(tree, tree)
    ksm = tree / "sys/kernel/mm/ksm"
    assert [(ksm / name).read_text() for name in ("run", "pages_to_scan", "max_page_sharing")] == ["0", "100", "256"]
    assert not (tree / lab_restore.FILE).exists()
    assert not lab_restore.repair(tree, tree)


def test_where_others_have_memory_by_now_nothing_is_unmerged(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    store = KsmFs.store
    monkeypatch.setattr(KsmFs, "store", lambda ksm, *words: (written.append(words), store(ksm, *words))[1])
    document(tree)
    (tree / "proc/77").mkdir()
    (tree / "proc/77/smaps").write_text("VmFlags: rd wr mg ac\n")
    (tree / "proc/77/stat").write_text(stat(77, "qemu"))
    assert lab_restore.repair(tree, tree, wait_seconds=0)
    assert (Knob.RUN, 2) not in written
    assert (Knob.MAX_PAGE_SHARING, 256) in written
    (tree / "proc/77/smaps").write_text("VmFlags: rd wr ac\n")
    document(tree)
    assert lab_restore.repair(tree, tree, wait_seconds=0)
    assert (Knob.RUN, 2) in written


def test_what_the_kernel_refuses_is_tried_again_the_next_time(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(ksm: KsmFs, knob: Knob, value: object) -> None:
        if knob is Knob.MAX_PAGE_SHARING:
            raise Rejected("writing max_page_sharing", "EBUSY")
        store(ksm, knob, value)

    store: Any = KsmFs.store
    document(tree)
    with monkeypatch.context() as patched:
        patched.setattr(KsmFs, "store", refuse)
        with pytest.raises(Rejected):
            lab_restore.repair(tree, tree)
    assert (tree / "sys/kernel/mm/ksm/pages_to_scan").read_text() == "100"
    assert (tree / lab_restore.FILE).exists()
    assert lab_restore.repair(tree, tree)
    assert (tree / "sys/kernel/mm/ksm/max_page_sharing").read_text() == "256"


def test_one_that_nobody_waited_for_has_ended(tree: Path) -> None:
    line = Path("/proc/self/stat").read_text()
    head, _, rest = line.rpartition(") ")
    state, *fields = rest.split()
    document(tree, pid=os.getpid(), start_time_ticks=int(fields[18]))
    for letter, ended in ((state, False), ("Z", True)):
        (tree / f"proc/{os.getpid()}/stat").write_text(" ".join([f"{head})", letter, *fields]))
        if ended:
            assert lab_restore.repair(tree, tree)
        else:
            with pytest.raises(Refused, match="is running scenarios"):
                lab_restore.repair(tree, tree)


def test_another_boots_file_is_of_no_concern(tree: Path) -> None:
    document(tree, boot_id="another")
    assert not lab_restore.repair(tree, tree)
    assert (tree / "sys/kernel/mm/ksm/run").read_text() == "1\n"
    assert not (tree / lab_restore.FILE).exists()


@pytest.mark.parametrize("changes", [{"format": 2}, {"knobs": {"speed": 1}}, {"pid": "x"}, {"cpus": None}])
def test_a_file_that_makes_no_sense_is_left_for_people(tree: Path, changes: dict[str, Any]) -> None:
    document(tree, **changes)
    with pytest.raises(Unparsable, match="no known form"):
        lab_restore.repair(tree, tree)
    assert (tree / lab_restore.FILE).exists()


def test_a_run_under_way_is_not_disturbed(tree: Path) -> None:
    ksm = KsmFs(tree)
    recovery = lab_restore.Recovery(tree, tree)
    recovery.begin(lab_restore.Before(lab_restore.read_knobs(ksm), find_ksmd(Path("/proc")), frozenset({0})))
    with pytest.raises(Refused, match=f"process {os.getpid()} is running scenarios"):
        lab_restore.repair(tree, tree)
    assert (tree / "sys/kernel/mm/ksm/run").read_text() == "1\n"
