# SPDX-License-Identifier: GPL-2.0-or-later
"""What two trust domains save together, beside what each saves alone, with the page contents of `make bench-policy`.

In a guest with two nodes, a domain on each, confined by cpusets as mode ``nodes`` wants it: once with each domain
alone, once with both, and once with both while pages merge across nodes, which is what keeping them apart costs.
"""

from __future__ import annotations

import mmap
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.policy.traces import RECIPES, fetch

ROOT = Path(__file__).parents[1]
MARK = 0.95
KSM = Path("/sys/kernel/mm/ksm")
CGROUP = Path("/sys/fs/cgroup")
#: The traces of each domain, every second one.
DOMAINS = {"gold": RECIPES[0::2], "silver": RECIPES[1::2]}
_LIMIT_SECONDS = 900.0
_MERGE_SECONDS = 600.0


def run() -> None:
    # They are recorded here where they are missing: a guest can't.
    fetch()
    words = ["--kernel", "6.12", "--nodes", "2", "--memory", "2400,2400", "--timeout", f"{3 * _LIMIT_SECONDS:g}"]
    command = [str(ROOT / "tests/guest/run"), *words, "--", "python3", "-m", "benchmarks.domains"]
    subprocess.run(command, cwd=ROOT, check=True)


# -- inside the guest ----------------------------------------------------------------------------------------


def inside() -> None:
    if not (CGROUP / "cgroup.controllers").exists():
        subprocess.run(["mount", "-t", "cgroup2", "none", CGROUP], check=True)
    (CGROUP / "cgroup.subtree_control").write_text("+cpuset")
    alone = [saved([name], across=0) for name in DOMAINS]
    both = saved(list(DOMAINS), across=0)
    across = saved(list(DOMAINS), across=1)
    total = sum(alone)
    print(f"alone: {' + '.join(f'{pages:,}' for pages in alone)} = {total:,} pages saved")
    print(f"both, kept apart: {both:,}, {both / total:.1%} of that (mark {MARK:.0%})")
    print(f"both, merged across nodes: {across:,}; keeping them apart costs {1 - both / across:.1%} of the saving")


def saved(names: Sequence[str], across: int) -> int:
    """Pages saved once three more full scans save nothing more."""
    _knob("run", 2)
    _knob("merge_across_nodes", across)
    _knob("pages_to_scan", 5000)
    _knob("sleep_millisecs", 5)
    with _tenants(names):
        _knob("run", 1)
        best, since = 0, _knob("full_scans")
        end = time.monotonic() + _MERGE_SECONDS
        while _knob("full_scans") < since + 3 and time.monotonic() < end:
            time.sleep(1.0)
            if (now := _knob("pages_sharing")) > best * 1.001:
                best, since = now, _knob("full_scans")
        _knob("run", 0)
        found = _knob("pages_sharing")
        more = f"{_knob('pages_shared'):,} KSM pages, {_knob('full_scans') - since} full scans since"
        print(f"{', '.join(names)}, merge_across_nodes = {across}: {found:,} pages saved, {more}", flush=True)
        return found


def _knob(name: str, value: int | None = None) -> int:
    if value is not None:
        (KSM / name).write_text(str(value))
    return int((KSM / name).read_text())


@contextmanager
def _tenants(names: Sequence[str]) -> Iterator[None]:
    """A process for each trace of these domains, one after the other, each in its domain's cpuset."""
    processes = []
    try:
        for node, name in enumerate(DOMAINS):
            path = CGROUP / name
            path.mkdir(exist_ok=True)
            (path / "cpuset.mems").write_text(str(node))
            for number in range(len(DOMAINS[name]) if name in names else 0):
                command = [sys.executable, "-m", "benchmarks.domains", name, str(number)]
                processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
                stdout = processes[-1].stdout
                assert stdout is not None
                assert stdout.readline() == b"ready\n"
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def tenant(domain: str, number: int) -> None:
    """Hold a trace in mergeable memory until nobody asks any more."""
    (CGROUP / domain / "cgroup.procs").write_text("0")
    (trace,) = fetch([DOMAINS[domain][number]])
    size = mmap.PAGESIZE
    memory = mmap.mmap(-1, len(trace.pages) * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_MERGEABLE)
    for page, content in enumerate(trace.pages):
        memory[page * size : (page + 1) * size] = trace.contents[content * size : (content + 1) * size]
    del trace
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    if len(sys.argv) == 3:
        tenant(sys.argv[1], int(sys.argv[2]))
    else:
        inside()
