# SPDX-License-Identifier: GPL-2.0-or-later
"""Transactions on this host's KSM: a knob changed while memory is merged, by a command, by the service, and killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from benchmarks.transaction import busy
from ksmd_ctl.kernel.ranges import mappings
from ksmd_ctl.scenario.regions import spawn
from tests.service.running import LIMIT_SECONDS, PROGRAM, ROOT, Service, configure, equal_pages, service, until

pytestmark = pytest.mark.ksm

PAGES = 3000
ATTEMPTS = 3
LIMITS = "[limits]\nfloor_bytes = 16777216\nmax_pressure = 1.0\n"


def read(ksm: Path, name: str) -> int:
    return int((ksm / name).read_text())


def merging(ksm: Path) -> None:
    """ksmd at work, and everything equal merged."""
    (ksm / "sleep_millisecs").write_text("10")
    (ksm / "pages_to_scan").write_text("2000")
    (ksm / "run").write_text("1")
    merged(ksm)


def merged(ksm: Path) -> None:
    until("the pages to be merged", lambda: read(ksm, "pages_sharing") >= PAGES * 0.95 or None)


def command(config: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PROGRAM, *words, "--config", str(config)], capture_output=True, text=True, timeout=120, check=False
    )


def transaction(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(done.stdout)["transaction"]
    return document


def test_without_a_service(ksm_host: Path, tmp_path: Path) -> None:
    config = configure(tmp_path, LIMITS)
    with equal_pages(PAGES):
        merging(ksm_host)
        plan = command(config, "set", "max_page_sharing=100", "--dry-run", "--json")
        assert plan.returncode == 0, plan.stderr
        assert json.loads(plan.stdout)["pages"]["merged"] >= PAGES * 0.95
        assert read(ksm_host, "max_page_sharing") == 256
        done = command(config, "set", "max_page_sharing=100", "--json")
        assert done.returncode == 0, done.stderr
        found = transaction(done)
        assert found["result"] == "done"
        assert found["pages"]["unshared"] >= PAGES * 0.95
        assert (read(ksm_host, "max_page_sharing"), read(ksm_host, "run")) == (100, 1)
        merged(ksm_host)
        # Again: it is so already.
        assert transaction(command(config, "set", "max_page_sharing=100", "--json"))["knobs"] == {}


def test_a_login_session_that_ends_abandons_it(ksm_host: Path, tmp_path: Path) -> None:
    config = configure(tmp_path, LIMITS + "batch_latency = 0.001\n")
    with equal_pages(20 * PAGES):
        merging(ksm_host)
        until("all to be merged", lambda: read(ksm_host, "pages_sharing") >= 19 * PAGES or None)
        # What it says nobody reads any more, as when its terminal is gone.
        reader, writer = os.pipe()
        with subprocess.Popen(
            [PROGRAM, "set", "max_page_sharing=100", "--config", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=writer,
        ) as process:
            os.close(writer)
            with os.fdopen(reader) as said:
                until("it to un-merge", lambda: "un-merging" in said.readline() or None)
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGHUP)
            assert process.wait(LIMIT_SECONDS) == 7
        assert (read(ksm_host, "max_page_sharing"), read(ksm_host, "run")) == (256, 1)
        status = json.loads((tmp_path / "transactions-kernel.json").read_text())
        assert (status["last"]["result"], status["last"]["reason"]) == ("abandoned", "interrupted")


PAIR = """
import mmap, sys
pages = int(sys.argv[1])
sys.stdin.readline()
memory = mmap.mmap(-1, pages * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
memory.madvise(mmap.MADV_MERGEABLE)
for page in range(pages):
    memory[page * mmap.PAGESIZE : (page + 1) * mmap.PAGESIZE] = b"%015d\\n" % page * (mmap.PAGESIZE // 16)
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def pair(folder: Path, pages: int) -> Iterator[None]:
    """Two processes in one memory cgroup that have each page in common."""
    processes = []
    try:
        for _ in range(2):
            command = [sys.executable, "-S", "-c", PAIR, str(pages)]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            processes.append(process)
            (folder / "cgroup.procs").write_text(str(process.pid))
            assert process.stdin is not None
            process.stdin.write(b"go\n")
            process.stdin.flush()
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        yield
        assert [process.poll() for process in processes] == [None, None], "a process was killed"
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_tenant_whose_own_copies_fit_is_not_refused(ksm_host: Path, tmp_path: Path, cgroup: Path) -> None:
    """Of what is merged within one cgroup a copy is charged there already; with 10 MiB less it is refused."""
    old = (cgroup / "memory.limit_in_bytes").exists()
    limit = cgroup / ("memory.limit_in_bytes" if old else "memory.max")
    usage = cgroup / ("memory.usage_in_bytes" if old else "memory.current")
    config, pages, reserve = configure(tmp_path, LIMITS), 20_000, 32
    with pair(cgroup, pages):
        (ksm_host / "smart_scan").write_text("0")
        merging(ksm_host)
        until("all pairs to be merged", lambda: read(ksm_host, "pages_sharing") >= pages or None)
        needed = int(usage.read_text()) + pages * 4096
        # The reserve is a part of the limit.
        limit.write_text(str((needed - (10 << 20)) * reserve // (reserve - 1)))
        refused = command(config, "set", "max_page_sharing=100")
        assert refused.returncode == 6
        takes, free = re.findall(r"it takes ([\d.]+) MiB more, and ([\d.]+) MiB are free", refused.stderr)[0]
        assert float(takes) == pytest.approx(pages * 4096 / (1 << 20), abs=1)
        assert float(takes) - float(free) == pytest.approx(10, abs=1)
        limit.write_text(str((needed + (2 << 20)) * reserve // (reserve - 1)))
        done = command(config, "set", "max_page_sharing=100", "--json")
        assert done.returncode == 0, done.stderr
        assert transaction(done)["result"] == "done"
    limit.write_text("-1" if old else "max")


def test_mostly_empty_address_space_is_not_walked(ksm_host: Path, tmp_path: Path) -> None:
    # Findings F11: run = 2 would, page by page, with the process stopped; and it begins to count scans anew.
    config = configure(tmp_path, LIMITS)
    with busy(64, 5 * PAGES) as process:
        merging(ksm_host)
        scans = read(ksm_host, "full_scans")
        found = transaction(command(config, "set", "max_page_sharing=100", "--json"))
        assert (found["result"], found["pages"]["rest"]) == ("done", 0)
        assert read(ksm_host, "full_scans") >= scans > 0
        assert (read(ksm_host, "max_page_sharing"), read(ksm_host, "sleep_millisecs")) == (100, 10)
        assert process.longest_gap_seconds() > 0
        merged(ksm_host)


def test_one_process_un_merged_and_others_untouched(ksm_host: Path, tmp_path: Path) -> None:
    config = configure(tmp_path, LIMITS)
    with equal_pages(PAGES) as one, equal_pages(PAGES) as other:
        merging(ksm_host)
        until("both to be merged", lambda: read(ksm_host, "pages_sharing") >= 2 * PAGES * 0.95 or None)
        (ksm_host / "run").write_text("0")
        done = command(config, "unmerge", "--pid", str(one), "--json")
        assert done.returncode == 0, done.stderr + done.stdout
        (process,) = json.loads(done.stdout)["processes"]
        assert process["unshared"] == process["merged"] >= PAGES * 0.95
        plan = json.loads(command(config, "unmerge", "--pid", str(other), "--dry-run", "--json").stdout)
        assert plan["processes"][0]["merged"] >= PAGES * 0.95


def test_a_process_with_thousands_of_mappings_is_un_merged(ksm_host: Path, tmp_path: Path) -> None:
    """By both commands page by page: none is left to run = 2 because there are too many ranges."""
    config, pages = configure(tmp_path, LIMITS), 8000
    contents = [b"%015d\n" % (number // 2) * 256 for number in range(pages)]
    with spawn("many-mappings") as process:
        start = process.map(pages)
        process.advise(start, pages, mergeable=True)
        process.store(start, contents)
        process.split(start, pages, on=True)
        assert len(mappings(process.id.pid)) > 4000
        (ksm_host / "smart_scan").write_text("0")
        merging(ksm_host)
        until("all pairs to be merged", lambda: read(ksm_host, "pages_sharing") >= pages / 2 or None)
        (ksm_host / "run").write_text("0")
        done = command(config, "unmerge", "--pid", str(process.id.pid), "--json")
        (one,) = json.loads(done.stdout)["processes"]
        assert (done.returncode, one["unshared"], one["left"]) == (0, pages, {}), done.stderr
        (ksm_host / "run").write_text("1")
        until("all pairs to be merged", lambda: read(ksm_host, "pages_sharing") >= pages / 2 or None)
        found = transaction(command(config, "set", "max_page_sharing=100", "--json"))
        assert (found["result"], found["pages"]["unshared"], found["pages"]["rest"]) == ("done", pages, 0)
        assert process.load(start, pages) == tuple(contents)


def dying(config: Path, entry: int, when: str, word: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.service.dying", str(config), str(entry), when, word],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
    )


def killed_at_every_entry(ksm: Path, folder: Path, when: str) -> list[str]:
    """Kill -9 at each entry of the journal; what came of each.

    How many entries there are depends on how long batches take: so it goes on until one is not killed any more, and
    from a few entries before that again while none was killed after its last step.
    """
    config = configure(folder, LIMITS)
    results: list[str] = []
    entry, whole = 2, 0
    with equal_pages(PAGES):
        merging(ksm)
        for number in range(60):
            if whole and ("done" in results or whole == ATTEMPTS):
                break
            merged(ksm)
            before = read(ksm, "max_page_sharing")
            wanted = 300 + number
            killed = dying(config, entry, when, f"max_page_sharing={wanted}")
            if killed.returncode == 0:
                assert entry > 8
                entry, whole = entry - 3, whole + 1
                continue
            assert killed.returncode == -signal.SIGKILL, killed.stderr
            done = command(config, "set", "--recover", "--json")
            assert done.returncode == 0, done.stderr
            found = transaction(done)
            assert found["recovered"]
            results.append(found["result"])
            expected = wanted if found["result"] == "done" else before
            assert read(ksm, "max_page_sharing") == expected, (entry, found)
            pace = (read(ksm, "pages_to_scan"), read(ksm, "sleep_millisecs"))
            assert (read(ksm, "run"), *pace) == (1, 2000, 10), (entry, found)
            assert transaction(command(config, "set", "--recover", "--json")) is None
            entry += 1
    return results


def test_killed_at_every_entry_of_the_journal(ksm_host: Path, tmp_path: Path) -> None:
    assert set(killed_at_every_entry(ksm_host, tmp_path, "before")) == {"rolled_back", "abandoned", "done"}


def orphaning(config: Path, step: int, milliseconds: int, word: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.service.orphaning", str(config), str(step), str(milliseconds), word],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def child_killed_at_every_step(ksm: Path, folder: Path, milliseconds: int) -> dict[str, set[str]]:
    """Kill the process of each step, and of nothing else; what came of the transaction, by what was killed."""
    config = configure(folder, LIMITS)
    results: dict[str, set[str]] = {}
    killed: set[int] = set()
    with equal_pages(PAGES):
        merging(ksm)
        steps = orphaning(config, 0, 0, "max_page_sharing=200")["steps"]
        # What only writes a knob may be over before it is found: then once more.
        for step, attempt in product(steps, range(ATTEMPTS)):
            if step in killed:
                continue
            merged(ksm)
            before = read(ksm, "max_page_sharing")
            wanted = 300 + ATTEMPTS * step + attempt
            found = orphaning(config, step, milliseconds, f"max_page_sharing={wanted}")
            transaction = found["transaction"]
            if found["killed"]:
                killed.add(step)
            results.setdefault(found["killed"], set()).add(transaction["result"])
            expected = wanted if transaction["result"] == "done" else before
            assert read(ksm, "max_page_sharing") == expected, found
            pace = (read(ksm, "pages_to_scan"), read(ksm, "sleep_millisecs"))
            assert (read(ksm, "run"), *pace) == (1, 2000, 10), found
            # None is left for anybody to take up, and everything merges again.
            assert json.loads((folder / "transactions-kernel.json").read_text())["running"] is None
        merged(ksm)
    return results


def test_the_process_of_each_step_killed_alone(ksm_host: Path, tmp_path: Path) -> None:
    results = child_killed_at_every_step(ksm_host, tmp_path, 0)
    print(results)
    assert set().union(*results.values()) <= {"done", "abandoned", "rolled_back"}
    # Who killed it, and why, nobody knows: perhaps memory was short. run = 2 would take as much.
    assert results["UnshareStep"] == {"abandoned"}
    # Where the machine has little time for the test, what only writes a knob is over before it can be killed.
    assert len(results.keys() - {""}) >= 2


def ended(running: Service) -> dict[str, Any] | None:
    found = running.status()["transaction"]
    return None if found["running"] is not None else found["last"]


HOLDING = "policy = 'fixed'\n[knobs]\nrun = 1\npages_to_scan = 2000\nsleep_millisecs = 10\n" + LIMITS


def service_killed_at_every_entry(ksm: Path, folder: Path, when: str) -> list[str]:
    """Kill -9 of the service at each entry of the journal, and what its successor makes of it."""
    journal = folder / "transactions-kernel.json"
    results = []
    with equal_pages(PAGES):
        for entry in range(2, 100):
            program = [sys.executable, "-m", "tests.service.dying_service", str(entry), when]
            with service(folder, HOLDING, program) as dying:
                merged(ksm)
                before, wanted = read(ksm, "max_page_sharing"), 300 + entry
                words = [PROGRAM, "set", f"max_page_sharing={wanted}", "--socket", str(folder / "socket")]
                client = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
                if client.returncode == 0:
                    # It has fewer entries than that.
                    assert dying.process.poll() is None
                    return results
                assert client.returncode == 5, client.stderr
                assert dying.process.wait(LIMIT_SECONDS) == -signal.SIGKILL
            assert json.loads(journal.read_text())["running"] is not None
            with service(folder, HOLDING) as again:
                last = until("its end", lambda again=again: ended(again))  # type: ignore[misc]
                assert last["recovered"]
                results.append(last["result"])
                assert read(ksm, "max_page_sharing") == (wanted if last["result"] == "done" else before), last
                held = [read(ksm, name) for name in ("run", "pages_to_scan", "sleep_millisecs")]
                assert held == [1, 2000, 10], last
                merged(ksm)
                again.process.kill()
                again.process.wait(LIMIT_SECONDS)
    raise AssertionError("a transaction has a hundred entries")


def test_a_killed_service_takes_its_transaction_up_again(ksm_host: Path, tmp_path: Path) -> None:
    with equal_pages(PAGES), service(tmp_path, HOLDING) as running:
        merged(ksm_host)
        journal = tmp_path / "transactions-kernel.json"
        words = [PROGRAM, "set", "max_page_sharing=77", "--socket", str(tmp_path / "socket")]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as client:
            until("a transaction", lambda: True if journal.exists() and '"running":{' in journal.read_text() else None)
            running.process.send_signal(signal.SIGKILL)
            running.process.wait(LIMIT_SECONDS)
            client.communicate(timeout=LIMIT_SECONDS)
            assert client.returncode == 5
        left = json.loads(journal.read_text())["running"] is not None
        with service(tmp_path, HOLDING) as again:
            last = until("its end", lambda: ended(again))
            assert bool(last["recovered"]) == left
            assert read(ksm_host, "max_page_sharing") == (77 if last["result"] == "done" else 256)
            # The sample in the report may be older than the end.
            until("run = 1", lambda: again.has("run", 1))
            merged(ksm_host)
            # Nor is it in anybody's way afterwards.
            done = command(tmp_path / "ksmd-ctl.toml", "set", "max_page_sharing=78", "--json")
            assert transaction(done)["result"] == "done"
            assert again.status()["knobs"]["run"]["drift_total"] == 0
