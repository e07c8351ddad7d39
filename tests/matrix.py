# SPDX-License-Identifier: GPL-2.0-or-later
"""``make matrix``: the shipped library and random scenarios on every kernel, in guests; prints tables in Markdown.

Random ones are without domains, with domains that have to stay apart, and with the same domains while pages merge
across nodes: there frames have to be found that two domains map. Guests with numa=fake have those with domains only.
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
from typing import NamedTuple

from tests.guest.inside import inside

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "ksmd_ctl/scenario/library"
#: Folders of the library that are for guests with so many nodes only.
NODES = {"nodes-4": 4, "offline": 2}


class Guest(NamedTuple):
    """A kernel and its nodes.

    :ivar nodes: with memory, as the kernel sees them
    :ivar fake: numa=fake=NU makes so many of one, which is all there is; 0: they are the machine's
    """

    kernel: str
    nodes: int
    fake: int = 0

    def __str__(self) -> str:
        return f"{self.kernel} with {self.nodes} {'fake ' if self.fake else ''}nodes"

    @property
    def options(self) -> list[str]:
        """Of tests/guest/run."""
        words = ["--kernel", self.kernel, "--nodes", str(1 if self.fake else self.nodes)]
        if self.fake:
            words += ["--memory", str(512 * self.fake), "--append", f"numa=fake={self.fake}U"]
        if self.nodes in REMOVABLE:
            words += ["--removable", REMOVABLE[self.nodes]]
        return words


GUESTS = (
    *(Guest(kernel, 2) for kernel in ("5.10", "6.1", "6.12", "7.2")),
    *(Guest(kernel, 4) for kernel in ("6.1", "6.12", "7.2")),
    *(Guest(kernel, 4, fake=4) for kernel in ("6.1", "6.12", "7.2")),
)
#: What is to be seen on one kernel only, and takes too long for `make test`.
TESTS = {Guest("5.10", 2): "tests/guest_tests/holes.py"}
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

# The same for scenarios with domains. Frames across have to be in none of those that stay apart.
ACROSS = "frame across domains"
LEAST_DOMAINS = {
    "migration": 0.1,
    "refused migration": 0.2,
    "refused knob": 0.1,
    "stray page": 0.02,
    "fork": 0.2,
    "swap-in": 0.02,
    "huge-page split": 0.03,
}
LEAST_ACROSS = 0.5
#: Of so many with domains one is run with merge_across_nodes = 1 as well.
ACROSS_EVERY = 5

# What can't happen on a kernel, and why.
_NOT_YET = {"zero page": "no ksm_zero_pages (6.6)", "smart-scan skip": "no smart_scan (6.7)"}
_NO_COLLAPSE = "no MADV_COLLAPSE (6.1), which makes the huge pages"
NEVER = {
    "5.10": _NOT_YET | dict.fromkeys(("huge-page split", "zero subpage", "collapse"), _NO_COLLAPSE),
    "6.1": _NOT_YET | {"zero subpage": "a split gives no zeroes back (6.12)"},
}

# For steps that take memory offline: a block of it on the second node.
REMOVABLE = {2: "0,128"}

# What domains need.
CGROUPS = "{ test -e /sys/fs/cgroup/cgroup.controllers || mount -t cgroup2 none /sys/fs/cgroup; }"

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
    nodes: int
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
        sides = (match["release"], int(match["nodes"]), match["profile"])
        parts.append(Part(*sides, **numbers, happened=happened, reasons=reasons))
    return parts


RANDOM = ((), ("--domains", "separate"), ("--domains", "across"))


def counts(count: int, domains: int) -> tuple[int, int, int]:
    """How many random scenarios there are without domains, apart, and across."""
    return count, domains, -(-domains // ACROSS_EVERY)


def commands(
    nodes: int, seed: int, count: int, save: Path, domains: int = 0, library: Container[str] | None = None
) -> str:
    """What is run in a guest.

    :param library: folders of the library; None for all
    :param count: random scenarios without domains
    :param domains: with domains
    """
    folders = sorted(path.name for path in (ROOT / LIBRARY).iterdir() if path.is_dir())
    folders = [name for name in folders if NODES.get(name, nodes) == nodes and (library is None or name in library)]
    chosen = [f"{LIBRARY}/{name}" for name in folders]
    words = [["ksmd-ctl", "verify", *chosen]]
    for more, number in zip(RANDOM, counts(count, domains), strict=True):
        if number:
            options = ["--random", str(seed), "--count", str(number), "--save", str(save), *more]
            words.append(["ksmd-ctl", "verify", *options])
    return "; ".join([CGROUPS, SWAP, *map(shlex.join, words), NO_SWAP])


def run_guest(guest: Guest, seed: int, count: int, domains: int, save: Path, more: str = "") -> str:
    """The output of one guest, also passed on as it comes.

    :param more: a command to be run there afterwards
    """
    # A scenario takes a second where nothing else runs; a slow machine gets six times as long.
    timeout = 900 + 6 * sum(counts(count, domains))
    shell = commands(guest.nodes, seed, count, save, domains) + (f"; {more}" if more else "")
    words = [*guest.options, "--timeout", str(timeout), "--share", str(save)]
    process = subprocess.Popen(
        [ROOT / "tests/guest/run", *words, "--", "sh", "-c", shell], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if not line.startswith("equal"):
            print(f"{guest}: {line}", end="", flush=True)
    status = process.wait()
    if status not in (0, 1):
        print(f"{guest}: the guest ended with status {status}", file=sys.stderr)
    return "".join(lines)


def row(guest: Guest, library: Part, randoms: Sequence[Part | None]) -> str:
    """A line of the table."""
    cells = [guest.kernel, library.release, f"{guest.nodes}{' fake' if guest.fake else ''}", library.profile]
    for part in (library, *randoms):
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


def what_happened(title: str, names: Sequence[str], randoms: Mapping[Guest, Part]) -> list[str]:
    """A table of how many random scenarios something happened in, by guest, and why it could not."""
    lines = [f"| {title} | {' | '.join(map(str, randoms))} |", "|---" * (len(randoms) + 1) + "|"]
    for name in names:
        cells = [
            "-" if name in never(guest.kernel, guest.nodes) else str(part.happened.get(name, 0))
            for guest, part in randoms.items()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    reasons = [
        f"{guest}, {name}: {why}"
        for guest in randoms
        for name, why in never(guest.kernel, guest.nodes).items()
        if name in names
    ]
    return ["", *lines, "", *reasons]


def by_kind(parts: Sequence[Part], count: int, domains: int) -> list[Part | None]:
    """The random ones among a guest's runs: without domains, apart, and across; None where there are none."""
    rest = iter(parts[1:])
    return [next(rest, None) if number else None for number in counts(count, domains)]


def judged(parts: Sequence[Part], count: int, without: Container[str] = (), domains: int = 0) -> list[str]:
    """What is wrong with a guest's results.

    :param without: what can't happen there
    """
    numbers = counts(count, domains)
    wanted = 1 + sum(number > 0 for number in numbers)
    if len(parts) != wanted:
        return [f"{len(parts)} of {wanted} runs came to their end"]
    wrong = [f"{part.different} differences" for part in parts if part.different]
    wrong += [reason for part in parts for reason in part.wrong_skips]
    # On two nodes each domain has one, and nowhere to migrate to.
    apart_least = {name: share for name, share in LEAST_DOMAINS.items() if name != "migration" or parts[0].nodes > 2}
    least = (LEAST, apart_least, {ACROSS: LEAST_ACROSS})
    for part, number, shares in zip(by_kind(parts, count, domains), numbers, least, strict=True):
        if part is not None:
            wrong += too_few(part.happened, number, shares, without)
    apart = by_kind(parts, count, domains)[1]
    if apart is not None and apart.happened.get(ACROSS):
        wrong.append(f"{apart.happened[ACROSS]} of {domains} random scenarios with a {ACROSS}, and none may have one")
    return wrong


def too_few(
    happened: Mapping[str, int], number: int, shares: Mapping[str, float], without: Container[str]
) -> list[str]:
    """What happened in too few random scenarios of a number to be a comparison of it."""
    return [
        f"only {happened.get(name, 0)} of {number} random scenarios with a {name}"
        for name, share in shares.items()
        if name not in without and happened.get(name, 0) < share * number
    ]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="make matrix", description=__doc__)
    parser.add_argument("--count", type=int, default=500, help="random scenarios on each guest (default: 500)")
    parser.add_argument("--domains", type=int, default=500, help="with domains, on all guests of a kernel (500)")
    parser.add_argument("--seed", type=int, default=2013, help="their seed")
    parser.add_argument(
        "--only", metavar="KERNEL/NODES", action="append", help="only this guest, as in 6.12/4 or 6.12/fake"
    )
    parser.add_argument("--save", type=Path, default=ROOT / "build/matrix", help="where failing scenarios are saved")
    args = parser.parse_args(arguments)
    args.save.mkdir(parents=True, exist_ok=True)
    table = [
        "| kernel | release | nodes | profile | library | differences | random | differences "
        "| domains apart | differences | domains across | differences |",
        "|---" * 12 + "|",
    ]
    wrong = []
    found: list[dict[Guest, Part]] = [{} for _ in RANDOM]
    for guest in GUESTS:
        if args.only and f"{guest.kernel}/{'fake' if guest.fake else guest.nodes}" not in args.only:
            continue
        count = 0 if guest.fake else args.count
        domains = -(-args.domains // sum(other.kernel == guest.kernel for other in GUESTS))
        tests = TESTS.get(guest)
        more = f"{shlex.join(inside('-q', tests))} || echo {FAILED}" if tests else ""
        output = run_guest(guest, args.seed, count, domains, args.save.resolve(), more)
        parts = parse(output)
        texts = judged(parts, count, never(guest.kernel, guest.nodes), domains)
        wrong += [f"{guest}: {text}" for text in texts + ([FAILED] if FAILED in output else [])]
        if parts:
            randoms = by_kind(parts, count, domains)
            table.append(row(guest, parts[0], randoms))
            for part, parts_of in zip(randoms, found, strict=True):
                if part is not None:
                    parts_of[guest] = part
    titles = ("random scenarios with a", "with domains apart", "with domains across")
    names = (list(LEAST), [*LEAST_DOMAINS, ACROSS], [*LEAST_DOMAINS, ACROSS])
    happened = [
        line
        for title, of, parts_of in zip(titles, names, found, strict=True)
        if parts_of
        for line in what_happened(title, of, parts_of)
    ]
    print("\n".join(["", *table, *happened, "", f"{date.today():%Y-%m-%d}, seed {args.seed}."]))
    for text in wrong:
        print(text, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
