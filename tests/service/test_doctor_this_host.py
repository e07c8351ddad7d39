# SPDX-License-Identifier: GPL-2.0-or-later
"""The doctor on this host's kernel: each finding provoked for real, and none where merging goes well.

What is the matter with memory alone is in test_doctor_memory.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.service.programs import Ksm, Visit, equal, program, visit
from tests.service.running import PROGRAM, ROOT, configure, service, until

pytestmark = pytest.mark.ksm


@pytest.fixture
def ksm(ksm_host: Path) -> Ksm:
    return Ksm(ksm_host)


@contextmanager
def two_equal(pages: int = 2000) -> Iterator[None]:
    with program(equal(pages)), program(equal(pages)):
        yield


def merged(ksm: Ksm, pages: int) -> None:
    until(f"{pages} pages to be saved", lambda: True if ksm["pages_sharing"] >= pages else None)


def test_a_healthy_host(ksm: Ksm, tmp_path: Path) -> None:
    with two_equal():
        ksm.merging(smart_scan=1)
        merged(ksm, 2000)
        found = visit(tmp_path)
        assert (found.codes, found.code) == ([], 0)
        looked = found.document["looked"]
        assert looked["contents"]["apart"] == 0
        assert looked["contents"]["frames"] == 2000
        assert looked["saved_bytes"]["from"] == looked["saved_bytes"]["to"] > 7_000_000
        words = [PROGRAM, "doctor", "--socket", str(tmp_path / "socket"), "--interval", "0.5"]
        wide = os.environ | {"COLUMNS": "1000"}
        said = subprocess.run(words, capture_output=True, text=True, check=True, env=wide).stdout
        (line,) = (line for line in said.splitlines() if line.startswith("healthy"))
        assert line.startswith("healthy    nothing is wrong, kernel ")
        assert "2 processes with 15.6 MiB of mergeable memory, 4,000 pages merged" in line


def test_off_and_unmerged_and_switched_on_by_its_own_advice(ksm: Ksm, tmp_path: Path) -> None:
    with two_equal():
        found = visit(tmp_path)
        assert found.codes == ["ksm-off"], found
        assert found.figure("ksm-off", "to be saved at least") == 2000 * 4096
        ksm.set(run=2)
        found = visit(tmp_path)
        assert "everything was un-merged" in found["ksm-off"]["title"]
        ksm.set(pages_to_scan=5000)
        command = found["ksm-off"]["command"].replace("ksmd-ctl", PROGRAM)
        subprocess.run([*command.split(), "--socket", str(tmp_path / "socket")], check=True, capture_output=True)
        merged(ksm, 2000)
        # So fast a scan that finds nothing more is dear.
        ksm.set(pages_to_scan=100)
        assert visit(tmp_path).codes == []


def test_there_is_nothing_to_merge(ksm: Ksm, tmp_path: Path) -> None:
    ksm.merging()
    assert visit(tmp_path).codes == ["nothing-mergeable"]
    with program("", ["/usr/bin/qemu-system-x86_64"], ["-machine", "q35,mem-merge=off"]):
        found = visit(tmp_path)
    assert found.codes == ["nothing-mergeable"], found
    assert "it was started with mem-merge=off" in str(found["nothing-mergeable"]["evidence"])


def test_it_does_not_scan_or_hardly(ksm: Ksm, tmp_path: Path) -> None:
    with two_equal():
        ksm.set(pages_to_scan=0, run=1)
        assert visit(tmp_path).codes == ["nothing-scanned"]
        ksm.set(pages_to_scan=100, sleep_millisecs=3_600_000)
        assert visit(tmp_path).codes == ["long-sleep"]
        ksm.set(pages_to_scan=1, sleep_millisecs=1000)
        assert visit(tmp_path).codes == ["slow-scan"]


def crawl(ksm: Ksm) -> None:
    """Have the kernel's advisor slow ksmd down to a crawl."""
    # ksmd has to have worked, and it has: for tests before this one, or for this.
    ksm.merging()
    until("ksmd to have worked", lambda: True if worked() > 20 else None, 120)
    ksm.set(run=2)
    ksm.set(sleep_millisecs=20, advisor_target_scan_time=1, advisor_mode="scan-time", run=1)
    until("the advisor's first decision", lambda: True if ksm["pages_to_scan"] < 100 else None, 120)


def test_the_advisor_at_a_crawl(ksm: Ksm, tmp_path: Path) -> None:
    with two_equal(20_000):
        crawl(ksm)
        # The scan before took what it took: only from the next one on the doctor sees how slow it is.
        found = visit(tmp_path, seconds=2)
        assert "advisor-crawl" in found.codes
        assert found["advisor-crawl"]["command"].startswith("ksmd-ctl set advisor_mode=none pages_to_scan=")


def test_the_service_counts_what_the_advisor_leaves(ksm: Ksm, tmp_path: Path) -> None:
    often = "policy = 'observe'\n[census]\ninterval = 5\ncpu_share = 0.5\n"
    with two_equal(20_000), service(tmp_path, often) as running:

        def left() -> int:
            return int(running.status()["healing"]["unrealised"]["advisor"] or 0)

        assert left() == 0
        crawl(ksm)
        with program(equal(20_000, 100_000)), program(equal(20_000, 100_000)):
            until("what has come since to be counted", lambda: True if left() > 10_000 else None)
            found = visit(tmp_path)
            assert found.figure("advisor-crawl", "identical pages that are not merged") > 0
            ksm.set(advisor_mode="none")
            until("nothing to be left to the advisor", lambda: True if left() == 0 else None)


def worked() -> float:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        if " (ksmd) " in text:
            words = text.rpartition(")")[2].split()
            return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
    raise AssertionError("there is no ksmd")


# -- others ------------------------------------------------------------------------------------------------


@contextmanager
def named_program(folder: Path, name: str) -> Iterator[int]:
    """A program of a name; its pid."""
    script = folder / name
    script.write_text("#!/bin/bash\nwhile :; do sleep 1; done\n")
    script.chmod(0o755)
    with subprocess.Popen([script]) as process:
        try:
            comm = Path(f"/proc/{process.pid}/comm")
            until("it to have its name", lambda: True if comm.read_text() == f"{name}\n" else None)
            yield process.pid
        finally:
            process.kill()


# ksmd takes a few per cent of a CPU with that: scanning that finds nothing new is reported from ten on.
MERGING = "policy = 'fixed'\n[knobs]\nrun = 1\npages_to_scan = 1000\n"


def test_ksmtuned_waits_and_is_the_only_one(ksm: Ksm, tmp_path: Path) -> None:
    with two_equal(), named_program(tmp_path, "ksmtuned") as pid:
        found = visit(tmp_path)
        assert found.codes == ["ksmtuned-waits"], found
        assert found.figure("ksmtuned-waits", "ksmtuned") == f"pid {pid}"
        # It runs in no unit: nothing is named that there isn't.
        assert found["ksmtuned-waits"]["command"] == f"kill {pid} && ksmd-ctl set run=1"
        ksm.merging()
        merged(ksm, 2000)
        assert (found := visit(tmp_path)).codes == ["other-writer"]
        assert found.code == 0


def test_with_a_service(ksm: Ksm, tmp_path: Path) -> None:
    with two_equal(), service(tmp_path, MERGING):
        merged(ksm, 2000)
        found = visit(tmp_path)
        assert (found.codes, found.document["looked"]["service"]) == ([], True), found
        assert found.document["looked"]["contents"]["apart"] == 0
        with named_program(tmp_path, "ksmtuned") as pid:
            found = visit(tmp_path)
        assert found["two-managers"]["command"] == f"kill {pid}"


def test_another_manager_keeps_ksm_off(ksm: Ksm, tmp_path: Path) -> None:
    with two_equal(), named_program(tmp_path, "virt-handler"):
        found = visit(tmp_path)
        assert found.codes == ["kept-off"], found
        assert "virt-handler keeps KSM off" in found["kept-off"]["title"]
        assert "set run=1" not in found["kept-off"]["command"]


def seen(folder: Path, code: str) -> Visit | None:
    found = visit(folder, "--no-contents", seconds=0.2)
    return found if code in found.codes else None


def test_a_service_that_watches(ksm: Ksm, tmp_path: Path) -> None:
    with two_equal(), service(tmp_path, "policy = 'observe'\n"):
        assert visit(tmp_path).codes == ["policy-observes"]


def test_a_policy_that_waits_for_memory_to_be_short(ksm: Ksm, tmp_path: Path) -> None:
    with two_equal(), service(tmp_path, "policy = 'ksmtuned'\n"):
        found = until("it to have decided", lambda: seen(tmp_path, "policy-waits"))
        assert found.figure("policy-waits", "policy") == "ksmtuned"
        # It says why in its own words.
        assert len(found.figure("policy-waits", "it says")) > 20, found


def test_a_knob_that_waits(ksm: Ksm, tmp_path: Path) -> None:
    with two_equal():
        ksm.merging()
        merged(ksm, 2000)
        with service(tmp_path, MERGING + "max_page_sharing = 512\n"):
            found = until("the knob to wait", lambda: seen(tmp_path, "knob-pending"))
            assert found["knob-pending"]["command"] == "ksmd-ctl set max_page_sharing=512 --dry-run"


def test_somebody_switches_the_advisor_on_in_the_middle(ksm: Ksm, tmp_path: Path) -> None:
    with two_equal(), service(tmp_path, MERGING):
        merged(ksm, 2000)
        ksm.set(advisor_mode="scan-time")
        # From then on the kernel refuses pages_to_scan.
        found = until("the service to be refused", lambda: seen(tmp_path, "knob-pending"))
        assert "pages_to_scan" in found["knob-pending"]["title"]
        assert found["knob-pending"]["command"] == "ksmd-ctl set advisor_mode=none"
        until("who it is to be named", lambda: seen(tmp_path, "two-managers"))


def test_somebody_whom_nobody_knows(ksm: Ksm, tmp_path: Path) -> None:
    with two_equal(), service(tmp_path, MERGING, on_drift="observe"):
        merged(ksm, 2000)
        ksm.set(pages_to_scan=4321)
        found = until("drift to be seen", lambda: seen(tmp_path, "other-writer"))
        assert found["other-writer"]["severity"] == "costs"


def test_a_new_configuration_that_is_bad(ksm: Ksm, tmp_path: Path) -> None:
    with two_equal(), service(tmp_path, MERGING) as running:
        configure(tmp_path, MERGING.replace("run = 1", "run = 7"))
        running.process.send_signal(signal.SIGHUP)
        found = until("it to be refused", lambda: seen(tmp_path, "config-refused"))
        assert "run" in found.figure("config-refused", "why")


def test_a_service_without_privilege(ksm: Ksm, tmp_path: Path) -> None:
    config = configure(tmp_path, "policy = 'observe'\n[census]\ninterval = 5\n")
    drop = ["setpriv", "--bounding-set", "-sys_admin,-sys_ptrace"]
    command = [*drop, PROGRAM, "daemon", "--config", str(config), "--metrics-listen", ""]
    with two_equal(), subprocess.Popen(command) as process:
        try:
            found = until("a look to fail", lambda: seen(tmp_path, "service-blind"))
            assert "unseen" in found.codes, found
            assert "its pagemap shows pages without their frames" in str(found["service-blind"]["evidence"])
        finally:
            process.terminate()


#: Runs a command where something is mounted over KSM's folder, as containers have it.
HIDDEN = (
    *("unshare", "--mount", "--propagation", "private"),
    *("sh", "-c", 'mount -t tmpfs none /sys/kernel/mm && exec "$@"', "sh"),
)


def test_where_the_folder_is_hidden_ksm_is_not_said_to_be_lacking(tmp_path: Path) -> None:
    # A kernel that really has none: tests/guest/test_no_ksm.py.
    found = visit(tmp_path, prefix=HIDDEN)
    assert (found.codes, found.code) == (["ksm-absent"], 1)
    assert "but this kernel has KSM" in found["ksm-absent"]["title"]
    assert found.figure("ksm-absent", "cow_ksm") >= 0


# -- a change of knobs that was begun ----------------------------------------------------------------------


FLOOR = "[limits]\nfloor_bytes = 16777216\nmax_pressure = 1.0\nbatch_latency = 0.001\n"


def test_a_change_that_was_killed_in_the_middle_and_one_that_goes_on(ksm: Ksm, tmp_path: Path) -> None:
    config = configure(tmp_path, FLOOR)
    look = ("--config", str(config))
    with two_equal(3000):
        ksm.merging()
        merged(ksm, 3000)
        assert visit(tmp_path, *look).codes == []
        phases = set()
        for entry in (2, 3, 5, 7, 11):
            merged(ksm, 3000)
            dies = [sys.executable, "-m", "tests.service.dying", str(config), str(entry), "before"]
            done = subprocess.run([*dies, f"max_page_sharing={300 + entry}"], cwd=ROOT, check=False, timeout=120)
            assert done.returncode == -signal.SIGKILL
            found = visit(tmp_path, *look)
            assert found["transaction-left"]["severity"] == "blocks merging"
            assert found.codes == ["transaction-left"], found
            phases.add(found.figure("transaction-left", "phase"))
            assert found.figure("transaction-left", "knobs") == "max_page_sharing"
            command = found["transaction-left"]["command"].replace("ksmd-ctl", PROGRAM)
            subprocess.run([*command.split(), *look], check=True, capture_output=True)
            assert "transaction-left" not in visit(tmp_path, *look).codes
        assert {"stop", "unshare", "forget"} <= phases, phases


@contextmanager
def stopped_change(config: Path, entry: int, word: str) -> Iterator[subprocess.Popen[str]]:
    """A change that is stopped at an entry of its journal; then it goes on, to its end."""
    command = [sys.executable, "-m", "tests.service.dying", str(config), str(entry), "before", word, "stop"]
    with subprocess.Popen(command, cwd=ROOT, text=True) as process:
        try:
            stat = Path(f"/proc/{process.pid}/stat")
            until("it to stop", lambda: True if stat.read_text().rpartition(")")[2].split()[0] == "T" else None)
            yield process
            process.send_signal(signal.SIGCONT)
            assert process.wait(120) == 0
        finally:
            process.kill()


def test_a_change_that_goes_on_is_no_fault(ksm: Ksm, tmp_path: Path) -> None:
    config = configure(tmp_path, FLOOR)
    with two_equal():
        ksm.merging()
        merged(ksm, 2000)
        with stopped_change(config, 3, "max_page_sharing=400") as process:
            found = visit(tmp_path, "--config", str(config))
            assert (found.codes, found.code) == (["transaction-runs"], 0), found
            assert f"(pid {process.pid})" in found.figure("transaction-runs", "carried out by")
        assert ksm["max_page_sharing"] == 400
        assert visit(tmp_path, "--config", str(config)).codes == []


def test_a_change_that_could_not_put_everything_back(ksm: Ksm, tmp_path: Path) -> None:
    config = configure(tmp_path, FLOOR)
    with two_equal():
        ksm.merging()
        merged(ksm, 2000)
        # With the advisor on, the kernel takes no pages_to_scan.
        with stopped_change(config, 7, "max_page_sharing=400"):
            ksm.set(advisor_mode="scan-time")
        found = visit(tmp_path, "--config", str(config))
        assert found.codes == ["transaction-left"], found
        assert found["transaction-left"]["severity"] == "costs"
        assert found.figure("transaction-left", "why").startswith("pages_to_scan can't be put back")


def test_who_may_not_look_is_told_so(ksm: Ksm, tmp_path: Path) -> None:
    with two_equal():
        ksm.merging()
        merged(ksm, 2000)
        tmp_path.chmod(0o755)
        found = visit(tmp_path, prefix=["setpriv", "--reuid", "65534", "--clear-groups"])
    assert (found.codes, found.code) == (["unseen"], 0)
    assert {one["what"] for one in found.document["looked"]["unknown"]} >= {"contents of memory", "processes"}
    assert found.document["looked"]["merged_pages"] == 4000
