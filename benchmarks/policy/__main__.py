# SPDX-License-Identifier: GPL-2.0-or-later
"""Policies beside each other: `make bench-policy`.

The same script of tenants, drawn from a seed, under the kernel's defaults, Debian's ksmtuned, the kernel's advisor,
and the adaptive policy, one after the other. It uses this host's KSM alone, and leaves it as it was.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.policy import guests, picture, report, stage
from benchmarks.policy.contenders import CONTENDERS, MINE, PEERS, Contender, Place
from benchmarks.policy.figures import Run, Verdict, verdict
from benchmarks.policy.host import Unfit, ksm_alone
from benchmarks.policy.pages import PAGE
from benchmarks.policy.script import Kind, Script, draw
from benchmarks.policy.stage import INTERVAL, Library
from benchmarks.policy.thp import Memory
from benchmarks.policy.traces import RECIPES, fetch

_FORMAT = 2
ALL = (*PEERS, MINE)
FEW = ("defaults", MINE)


@dataclass(frozen=True, slots=True)
class Case:
    """What is the same for all policies that are compared.

    :ivar file: what its files are called
    :ivar about: what people read
    :ivar play: one run
    """

    file: str
    about: str
    seconds: float
    memory: Memory
    play: Callable[[Contender, Place], Run]


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    try:
        (_demonstrate if options.guests else _compare)(options)
    except Unfit as error:
        print(f"bench-policy: {error}", file=sys.stderr)
        return 6
    except KeyboardInterrupt:
        print("bench-policy: interrupted; everything is restored", file=sys.stderr)
        return 130
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-policy", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=_numbers, default="1", metavar="A,B,C", help="scripts to play (default: 1)")
    parser.add_argument("--seconds", type=float, help="length of a script (default: 120; with --guests: 210)")
    parser.add_argument("--policies", type=_policies, help=f"which, of {','.join(CONTENDERS)} (default: {','.join(ALL)}"
                        f"; with --guests: {','.join(FEW)})")  # fmt: skip
    parser.add_argument("--memory", type=_memories, default=Memory.QEMU,
                        help="; ".join(f"{memory}: {memory.about}" for memory in Memory)
                        + f" (default: {Memory.QEMU}; several: {','.join(Memory)})")  # fmt: skip
    parser.add_argument("--traces", type=int, metavar="N", help="only the first N traces of each kind")
    parser.add_argument("--output", type=Path, default=Path("build/bench-policy"), help="folder for JSON and pictures")
    parser.add_argument("--guests", action="store_true", help="the demonstration with real emulated guests")
    options = parser.parse_args(arguments)
    if options.guests and options.memory != [Memory.QEMU]:
        parser.error(f"--guests: QEMU asks for huge pages by itself: --memory can only be {Memory.QEMU}")
    options.output.mkdir(parents=True, exist_ok=True)
    return options


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _policies(text: str) -> list[str]:
    for name in (names := text.split(",")):
        if name not in CONTENDERS:
            raise argparse.ArgumentTypeError(f"no {name!r}; there are {', '.join(CONTENDERS)}")
    return names


def _memories(text: str) -> list[Memory]:
    try:
        return [Memory(word) for word in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; there are {', '.join(Memory)}") from error


def _compare(options: argparse.Namespace) -> None:
    seconds = options.seconds or 120.0
    names = options.policies or ALL
    recipes = [recipe for kind in ("guest", "program")
               for recipe in [recipe for recipe in RECIPES if recipe.kind == kind][: options.traces]]  # fmt: skip
    traces = fetch(recipes)
    for trace in traces:
        print(f"trace {trace.name:14} {_mib(len(trace.pages))}, {trace.zero_pages / len(trace.pages):5.1%} zero pages")
    library = Library(traces)
    verdicts: list[Verdict] = []
    for memory, seed in itertools.product(options.memory, options.seeds):
        script = draw(seed, seconds, library.traces)
        print(f"\nseed {seed}, {memory.about}: {seconds:g} s, {_told(script)}", flush=True)

        def play(contender: Contender, place: Place, script: Script = script) -> Run:
            return stage.play(contender, script, library, place)

        case = Case(f"seed-{seed}-{memory}", f"seed {seed}, {memory.about}", seconds, memory, play)
        runs = _runs(case, names, options.output)
        if MINE in names and len(names) > 1:
            own = next(run for run in runs if run.policy == MINE)
            verdicts.append(verdict(own, [run for run in runs if run is not own], INTERVAL))
            print("\n".join(report.marks(MINE, verdicts[-1:])), flush=True)
    if len(verdicts) > 1:
        print(f"\nall {len(verdicts)} scripts")
        print("\n".join(report.marks(MINE, verdicts)))


def _demonstrate(options: argparse.Namespace) -> None:
    seconds = options.seconds or 210.0

    def play(contender: Contender, place: Place) -> Run:
        return guests.play(contender, seconds, place)

    case = Case("guests", f"{guests.GUESTS} emulated guests", seconds, Memory.QEMU, play)
    _runs(case, options.policies or FEW, options.output)


def _runs(case: Case, names: Sequence[str], output: Path) -> list[Run]:
    """The same under each policy: told, and written down."""
    runs: list[Run] = []
    documents: list[dict[str, Any]] = []
    for name in names:
        contender = CONTENDERS[name]
        with tempfile.TemporaryDirectory(prefix="bench-policy-") as scratch, ksm_alone(case.memory) as host:
            life = host.ksm.cpu_seconds()
            print(f"-- {contender.about} (ksmd has used {life:.0f} s of CPU since the host's start)", flush=True)
            place = Place(host, Path(scratch), case.seconds)
            runs.append(case.play(contender, place))
            notes = contender.notes(place)
        documents.append({**report.document(runs[-1]), "notes": notes, "ksmd_cpu_seconds_before": life})
        if runs[-1].not_huge:
            notes = [*notes, f"the host could not give {runs[-1].not_huge} huge pages: they count as not left"]
        print("".join(f"   {line}\n" for line in notes[-12:]), end="", flush=True)
    print(f"at most {_mib(max(step.pages for step in runs[0].steps))} of tenants' pages")
    print("\n".join([*report.table(runs), *report.LEGEND]))
    when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    machine = f"kernel {os.uname().release}, {os.cpu_count()} CPUs, {when}"
    head = {"format": _FORMAT, "about": case.about, "seconds": case.seconds, "memory": case.memory, "machine": machine,
            "page_bytes": PAGE}  # fmt: skip
    stem = output / case.file
    stem.with_suffix(".json").write_text(json.dumps(head | {"runs": documents}) + "\n")
    stem.with_suffix(".svg").write_text(picture.draw(f"KSM, {case.about}; {machine}", runs, case.seconds))
    print(f"raw figures in {stem}.json, picture in {stem}.svg", flush=True)
    return runs


def _told(script: Script) -> str:
    parts = []
    for moment in range(script.events[-1].moment + 1):
        events = [event for event in script.events if event.moment == moment]
        kinds = ", ".join(f"{count} {kind}" for kind in Kind if (count := sum(event.kind is kind for event in events)))
        parts.append(f"at {events[0].at:.0f} s: {kinds}")
    return "; ".join(parts)


def _mib(pages: int) -> str:
    return f"{pages * PAGE / 2**20:,.0f} MiB"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
