# SPDX-License-Identifier: GPL-2.0-or-later
"""``make matrix``: the shipped library and random scenarios on every kernel, in guests; prints tables in Markdown.

One boot a kernel and topology, with the tests that are about this kernel only. A scenario may be skipped for what the
kernel lacks, and for nothing else; scenarios that need four nodes, or memory to be taken offline, are left to the
guests that have it. What has to happen in random scenarios is counted, and a guest where it did not has failed.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from tests.guest.inside import inside

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "ksmd_ctl/scenario/library"
#: Folders of the library that are for guests with so many nodes only.
NODES = {"nodes-4": 4, "offline": 2}
GUESTS = (("5.10", 2), ("6.1", 2), ("6.12", 2), ("7.2", 2), ("6.12", 4))
#: What is to be seen on one kernel only, and takes too long for `make test`.
TESTS = {("5.10", 2): "tests/guest_tests/holes.py"}
FAILED = "tests of this kernel have failed"

# The least share of random scenarios in which something has to have happened, or they show nothing.
LEAST = {
    "migration": 0.2,
    "exile": 0.1,
    "chain": 0.05,
    "fork": 0.3,
    "limit": 0.05,
    "partial scan": 0.5,
    "zero page": 0.1,
    "smart-scan skip": 0.05,
    "exec": 0.05,
    "mremap": 0.05,
    "swap-in": 0.02,
    "huge-page split": 0.05,
    "zero subpage": 0.03,
    "collapse": 0.005,
    "offlined block": 0.1,
}

# What can't happen on a kernel, and why.
_NOT_YET = {"zero page": "no ksm_zero_pages (6.6)", "smart-scan skip": "no smart_scan (6.7)"}
_NO_COLLAPSE = "no MADV_COLLAPSE (6.1), which makes the huge pages"
NEVER = {
    "5.10": _NOT_YET | dict.fromkeys(("huge-page split", "zero subpage", "collapse"), _NO_COLLAPSE),
    "6.1": _NOT_YET | {"zero subpage": "a split gives no zeroes back (6.12)"},
}

# For steps that take memory offline: a block of it on the second node.
REMOVABLE = {2: "0,128"}

# What steps that swap need (docs/scenarios.md). Tests that come later in the same guest have no swap.
NO_SWAP = "swapoff /dev/zram0"
SWAP = (
    "modprobe zram num_devices=1 && echo 256M >/sys/block/zram0/disksize && mkswap /dev/zram0 >/dev/null && "
    "swapon /dev/zram0 && echo 0 >/proc/sys/vm/page-cluster"
)

_TOTALS = re.compile(
    r"^kernel (?P<release>\S+) with (?P<nodes>\d+) nodes and engine (?P<profile>\S+): (?P<equal>\d+) equal, "
    r"(?P<different>\d+) different, (?P<skipped>\d+) skipped$",
    re.MULTILINE,
)
_HAPPENED = re.compile(r"^scenarios by what happened in them: (.*)$", re.MULTILINE)
_LACKS = re.compile(r"this kernel has no ")


@dataclass
class Part:
    """What one run of verify said."""

    release: str
    profile: str
    equal: int
    different: int
    skipped: int
    happened: dict[str, int] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    @property
    def wrong_skips(self) -> list[str]:
        return [reason for reason in self.reasons if not _LACKS.search(reason)]


def parse(text: str) -> list[Part]:
    """The runs of verify in a guest's output."""
    parts = []
    rest = text
    while match := _TOTALS.search(rest):
        before, rest = rest[: match.start()], rest[match.end() :]
        counts = _HAPPENED.match(rest.lstrip("\n"))
        happened = {}
        for item in counts[1].split(", ") if counts else ():
            count, _, name = item.partition(" ")
            happened[name] = int(count)
        reasons = [line for line in before.splitlines() if line.startswith("skipped")]
        numbers = {key: int(match[key]) for key in ("equal", "different", "skipped")}
        parts.append(Part(match["release"], match["profile"], **numbers, happened=happened, reasons=reasons))
    return parts


def commands(nodes: int, seed: int, count: int, save: Path) -> str:
    """What is run in a guest."""
    folders = sorted(path.name for path in (ROOT / LIBRARY).iterdir() if path.is_dir())
    chosen = [f"{LIBRARY}/{name}" for name in folders if NODES.get(name, nodes) == nodes]
    library = shlex.join(["ksmd-ctl", "verify", *chosen])
    random = shlex.join(["ksmd-ctl", "verify", "--random", str(seed), "--count", str(count), "--save", str(save)])
    return "; ".join([SWAP, library, *([random] if count else []), NO_SWAP])


def run_guest(kernel: str, nodes: int, seed: int, count: int, save: Path, more: str = "") -> str:
    """The output of one guest, also passed on as it comes.

    :param more: a command to be run there afterwards
    """
    # A scenario takes a second where nothing else runs; a slow machine gets six times as long.
    timeout = 900 + 6 * count
    shell = commands(nodes, seed, count, save) + (f"; {more}" if more else "")
    words = ["--kernel", kernel, "--nodes", str(nodes), "--timeout", str(timeout), "--share", str(save)]
    if nodes in REMOVABLE:
        words += ["--removable", REMOVABLE[nodes]]
    process = subprocess.Popen(
        [ROOT / "tests/guest/run", *words, "--", "sh", "-c", shell], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if not line.startswith("equal"):
            print(f"{kernel} with {nodes} nodes: {line}", end="", flush=True)
    status = process.wait()
    if status not in (0, 1):
        print(f"{kernel} with {nodes} nodes: the guest ended with status {status}", file=sys.stderr)
    return "".join(lines)


def row(kernel: str, nodes: int, library: Part, random: Part | None) -> str:
    """A line of the table."""
    cells = [kernel, library.release, str(nodes), library.profile]
    for part in (library, random):
        if part is None:
            cells += ["-", "-"]
        else:
            lacking = f", {part.skipped} that it lacks the knob for" if part.skipped else ""
            cells += [f"{part.equal} equal{lacking}", str(part.different)]
    return f"| {' | '.join(cells)} |"


def never(kernel: str, nodes: int) -> dict[str, str]:
    """What can't happen in a guest, and why."""
    offline = {} if nodes in REMOVABLE else {"offlined block": "with several other nodes the kernel chooses among them"}
    return NEVER.get(kernel, {}) | offline


def what_happened(randoms: Mapping[tuple[str, int], Part]) -> list[str]:
    """A table of how many random scenarios something happened in, by guest, and why it could not."""
    guests = {guest: f"{guest[0]} with {guest[1]} nodes" for guest in randoms}
    lines = [f"| random scenarios with a | {' | '.join(guests.values())} |", "|---" * (len(guests) + 1) + "|"]
    for name in LEAST:
        cells = ["-" if name in never(*guest) else str(part.happened.get(name, 0)) for guest, part in randoms.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    reasons = [f"{text}, {name}: {why}" for guest, text in guests.items() for name, why in never(*guest).items()]
    return [*lines, "", *reasons]


def judged(parts: Sequence[Part], count: int, without: Container[str] = ()) -> list[str]:
    """What is wrong with a guest's results.

    :param without: what can't happen there
    """
    wanted = 2 if count else 1
    if len(parts) != wanted:
        return [f"{len(parts)} of {wanted} runs came to their end"]
    wrong = [f"{part.different} differences" for part in parts if part.different]
    wrong += [reason for part in parts for reason in part.wrong_skips]
    if count:
        random = parts[1]
        wrong += [
            f"only {random.happened.get(name, 0)} of {count} random scenarios with a {name}"
            for name, share in LEAST.items()
            if name not in without and random.happened.get(name, 0) < share * count
        ]
    return wrong


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="make matrix", description=__doc__)
    parser.add_argument("--count", type=int, default=500, help="random scenarios on each guest (default: 500)")
    parser.add_argument("--seed", type=int, default=2013, help="their seed")
    parser.add_argument("--only", metavar="KERNEL/NODES", action="append", help="only this guest, as in 6.12/4")
    parser.add_argument("--save", type=Path, default=ROOT / "build/matrix", help="where failing scenarios are saved")
    args = parser.parse_args(arguments)
    args.save.mkdir(parents=True, exist_ok=True)
    table = [
        "| kernel | release | nodes | profile | library | differences | random | differences |",
        "|---|---|---|---|---|---|---|---|",
    ]
    wrong = []
    randoms = {}
    for kernel, nodes in GUESTS:
        if args.only and f"{kernel}/{nodes}" not in args.only:
            continue
        tests = TESTS.get((kernel, nodes))
        more = f"{shlex.join(inside('-q', tests))} || echo {FAILED}" if tests else ""
        output = run_guest(kernel, nodes, args.seed, args.count, args.save.resolve(), more)
        parts = parse(output)
        found = judged(parts, args.count, never(kernel, nodes)) + ([FAILED] if FAILED in output else [])
        wrong += [f"{kernel} with {nodes} nodes: {text}" for text in found]
        if parts:
            table.append(row(kernel, nodes, parts[0], parts[1] if len(parts) > 1 else None))
        if len(parts) > 1:
            randoms[kernel, nodes] = parts[1]
    happened = ["", *what_happened(randoms)] if randoms else []
    print("\n".join(["", *table, *happened, "", f"{date.today():%Y-%m-%d}, seed {args.seed}."]))
    for text in wrong:
        print(text, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
