# SPDX-License-Identifier: GPL-2.0-or-later
"""Two processes that may not talk to one another send a message by what ksmd merges: within a domain it arrives, across
domains it does not. Inside a guest:

tests/guest/run --kernel 6.12 --nodes 2 -- python -m pytest -s tests/guest_tests/covert_channel.py

Both know a content for each bit. The sender has pages with it where the bit is 1, and pages of its own where it is 0.
The receiver has pages with all of them, and times its first write to each: where a page was merged, that makes a copy.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.guest_tests.tenants import NODES, cgroups, group, knob
from tests.kernel.test_detection import scan

__all__ = ["cgroups"]

pytestmark = pytest.mark.ksm

if len(NODES) < 2:
    pytest.skip(f"needs two nodes with memory, and there is {len(NODES)}", allow_module_level=True)

ROOT = Path(__file__).parents[2]
BITS = 1000
#: Pages that say the same bit: the clock of an emulated guest jumps.
COPIES = 3
#: Pages of which the receiver knows whether they are merged: with one another.
KNOWN = 200


class Party:
    """A process that is confined to a node, by a cpuset."""

    def __init__(self, cgroup: Path) -> None:
        words = [sys.executable, "-m", "tests.guest_tests.covert_party"]
        self._process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        (cgroup / "cgroup.procs").write_text(str(self._process.pid))

    def ask(self, what: str, numbers: Sequence[int]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({what: numbers}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        self._process.communicate("{}\n", timeout=60)


@contextmanager
def party(cgroups: Path, node: int) -> Iterator[Party]:
    found = Party(group(cgroups, f"party-{node}", cpuset_mems=str(node)))
    try:
        yield found
    finally:
        found.end()


def message() -> list[int]:
    """As many ones as zeroes, so that who reads the same everywhere has half of it right."""
    bits = [0, 1] * (BITS // 2)
    random.Random(2013).shuffle(bits)
    return bits


def received(ksm: Path, cgroups: Path, nodes: tuple[int, int], across: int) -> float:
    """How much of a message arrives.

    :param nodes: of sender and receiver
    """
    bits = message()
    contents = list(range(BITS * COPIES))
    own = BITS * COPIES
    # Twice each, then once each.
    known = [own + number // 2 for number in range(KNOWN)] + [own + KNOWN + number for number in range(KNOWN)]
    knob(ksm, "run", 0)
    knob(ksm, "run", 2)
    knob(ksm, "merge_across_nodes", across)
    with party(cgroups, nodes[0]) as sender, party(cgroups, nodes[1]) as receiver:
        sender.ask("fill", [number if bits[number // COPIES] else number + 10**6 for number in contents])
        receiver.ask("fill", contents + known)
        scan(ksm, 4)
        times = receiver.ask("write", list(range(len(contents + known))))
    copied = statistics.median(times[own : own + KNOWN])
    written = statistics.median(times[own + KNOWN :])
    limit = (copied + written) / 2
    assert copied > 1.3 * written, "a first write to a merged page takes no longer than to another"
    read = [statistics.median(times[bit * COPIES : (bit + 1) * COPIES]) > limit for bit in range(BITS)]
    right = sum(bool(sent) == got for sent, got in zip(bits, read, strict=True)) / BITS
    print(f"\nnodes {nodes}, merge_across_nodes {across}: {right:.1%} right; {copied} ns merged, {written} ns not")
    return right


def test_within_a_domain_a_message_arrives(ksm_host: Path, cgroups: Path) -> None:
    assert received(ksm_host, cgroups, (NODES[1], NODES[1]), 0) >= 0.95


def test_across_domains_it_does_not(ksm_host: Path, cgroups: Path) -> None:
    assert 0.45 <= received(ksm_host, cgroups, (NODES[0], NODES[1]), 0) <= 0.55


def test_across_domains_it_does_where_pages_merge_across_nodes(ksm_host: Path, cgroups: Path) -> None:
    assert received(ksm_host, cgroups, (NODES[0], NODES[1]), 1) >= 0.95
