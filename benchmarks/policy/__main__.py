# SPDX-License-Identifier: GPL-2.0-or-later
"""Policies beside each other: `make bench-policy`.

The same script of tenants, drawn from a seed, with KSM off, and under the kernel's defaults, Debian's ksmtuned, the
kernel's advisor, and the adaptive policy, one after the other. It uses this host's KSM alone, and leaves it as it was.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from benchmarks.policy import guests, picture, report, stage, traces
from benchmarks.policy.contenders import CONTENDERS, MINE, OFF, PEERS, Contender, Place
from benchmarks.policy.figures import Run, Total, Verdict, verdict
from benchmarks.policy.host import Unfit, ksm_alone
from benchmarks.policy.oracle import MAX_PAGE_SHARING
from benchmarks.policy.pages import PAGE
from benchmarks.policy.results import Case, Results, machine
from benchmarks.policy.script import Kind, Script, draw
from benchmarks.policy.stage import Library
from benchmarks.policy.thp import Memory
from benchmarks.policy.watch import INTERVAL, LEAD_SECONDS

ALL = (OFF, *PEERS, MINE)
#: How long it takes beside the script: until ksmd rests, and everybody has ended.
_AROUND_SECONDS = LEAD_SECONDS + 6

#: Shorter ones have no time for arrivals; longer ones than a day are mistakes.
_LEAST_SECONDS, _MOST_SECONDS = 5, 86400
_MOST_BUSY = 1024

#: Up to this load average a machine is quiet.
_QUIET_LOAD = 0.5

Player = Callable[[Contender, Place], Run]


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    try:
        (_demonstrate if options.guests else _compare)(options)
    except Unfit as error:
        print(f"bench-policy: {error}", file=sys.stderr)
        return 6
    except KeyboardInterrupt:
        print("bench-policy: interrupted; everything is restored. --resume keeps the runs that are done",
              file=sys.stderr)  # fmt: skip
        return 130
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-policy", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--seeds", type=_list_of(0, 2**31 - 1), default="1", metavar="A,B,C", help="scripts to play (default: 1)"
    )
    parser.add_argument("--seconds", type=_seconds, help="length of a script (default: 120; with --guests: 210)")
    parser.add_argument("--policies", type=_policies, default=",".join(ALL),
                        help=f"which, of {','.join(CONTENDERS)} (default: %(default)s)")  # fmt: skip
    parser.add_argument("--memory", type=_memories, default=Memory.QEMU,
                        help="; ".join(f"{memory}: {memory.about}" for memory in Memory)
                        + f" (default: {Memory.QEMU}; several: {','.join(Memory)})")  # fmt: skip
    parser.add_argument("--busy", type=_list_of(0, _MOST_BUSY), default="0", metavar="N",
                        help="neighbours that take CPU time (default: 0; several: 0,2)")  # fmt: skip
    parser.add_argument("--traces", type=_whole(1, 1000), metavar="N", help="only the first N traces of each kind")
    parser.add_argument("--output", type=Path, default=Path("build/bench-policy"), help="folder for JSON and pictures")
    parser.add_argument("--resume", action="store_true",
                        help="don't repeat runs in the folder that were made in the same way")  # fmt: skip
    parser.add_argument("--guests", action="store_true", help="real emulated guests that boot instead of scripts")
    options = parser.parse_args(arguments)
    if options.guests and options.memory != [Memory.QEMU]:
        parser.error(f"--guests: QEMU asks for huge pages by itself: --memory can only be {Memory.QEMU}")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --output: {options.output} can't be made a folder: {error.strerror}")
    return options


def _whole(least: int, most: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if text.isascii() and text.isdigit() and len(text) <= len(str(most)) and least <= int(text) <= most:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")

    return number


def _list_of(least: int, most: int) -> Callable[[str], list[int]]:
    return lambda text: [_whole(least, most)(word) for word in text.split(",")]


def _seconds(text: str) -> float:
    with suppress(ValueError):
        # Neither a NaN nor infinity is in the range.
        if _LEAST_SECONDS <= (seconds := float(text)) <= _MOST_SECONDS:
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from {_LEAST_SECONDS} to {_MOST_SECONDS}")


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
    recipes = list(
        itertools.chain.from_iterable(
            [recipe for recipe in traces.RECIPES if recipe.kind == kind][: options.traces]
            for kind in ("guest", "program")
        )
    )
    cases = [Case(seed, seconds, memory, busy)
             for memory, busy, seed in itertools.product(options.memory, options.busy, options.seeds)]  # fmt: skip
    print(f"{_duration(cases, options.policies)}{_recording(recipes)}", flush=True)
    found = traces.fetch(recipes)
    for trace in found:
        print(f"trace {trace.name:14} {_mib(len(trace.pages))}, {trace.zero_pages / len(trace.pages):5.1%} zero pages")
    library = Library(found)

    def player(case: Case) -> Player:
        assert case.seed is not None
        script = draw(case.seed, case.seconds, library.traces)
        print(_told(script), flush=True)
        return lambda contender, place: stage.play(contender, script, library, place)

    _play(cases, player, Results(options.output, library.digest), options)


def _demonstrate(options: argparse.Namespace) -> None:
    cases = [Case(None, options.seconds or 210.0, Memory.QEMU, busy) for busy in options.busy]
    print(_duration(cases, options.policies), flush=True)

    def player(case: Case) -> Player:
        return lambda contender, place: guests.play(contender, case.seconds, place)

    _play(cases, player, Results(options.output, f"{guests.GUESTS} guests"), options)


def _play(
    cases: Sequence[Case], player: Callable[[Case], Player], results: Results, options: argparse.Namespace
) -> None:
    """All cases: told one by one and together, and written down."""
    runs_of: dict[Case, list[Run]] = {}
    if options.resume:
        done = sum(results.find(case, CONTENDERS[name]) is not None for case in cases for name in options.policies)
        print(f"{done} of these runs are done already")
    for case in cases:
        print(f"\n== {case.about}: {case.seconds:g} s", flush=True)
        play = player(case)
        runs = [_run(case, CONTENDERS[name], play, results, resume=options.resume) for name in options.policies]
        runs_of[case] = runs
        zeroes = "no frame, as splits free them" if runs[0].zeroes_free else f"a frame for {MAX_PAGE_SHARING} of them"
        pages = max(step.pages for step in runs[0].steps)
        print(f"at most {_mib(pages)} of tenants' pages; at best pages of zeroes take {zeroes}")
        print("\n".join(report.table(runs)))
        if (found := _judged(runs)) is not None:
            print("\n".join(report.marks(MINE, Total([found]))))
        sys.stdout.flush()
        merging = [run for run in runs if run.policy != OFF] or runs
        drawn = picture.draw(f"KSM, {case.about}", f"{_today()}, {machine()}", merging, case.seconds)
        (options.output / f"{case.file}.svg").write_text(drawn)
    _conclude(runs_of, options.output)


def _judged(runs: Sequence[Run]) -> Verdict | None:
    """The policy that is to be shown against the others; None where there are no others, or it isn't there."""
    by_name = {run.policy: run for run in runs}
    own, off = by_name.pop(MINE, None), by_name.pop(OFF, None)
    return verdict(own, list(by_name.values()), off, INTERVAL) if own is not None and by_name else None


def _conclude(runs_of: Mapping[Case, Sequence[Run]], output: Path) -> None:
    """All cases together; those with the same memory and load are a group."""
    groups: defaultdict[str, list[Sequence[Run]]] = defaultdict(list)
    verdicts: defaultdict[str, list[Verdict]] = defaultdict(list)
    for case, runs in runs_of.items():
        groups[case.group].append(runs)
        if (found := _judged(runs)) is not None:
            verdicts[case.group].append(found)
    totals = {group: Total(found) for group, found in verdicts.items()}
    seconds = next(iter(runs_of)).seconds
    seeds = ", ".join(dict.fromkeys(str(case.seed) for case in runs_of if case.seed is not None))
    what = f"scripts of {seconds:g} s from seeds {seeds}" if seeds else f"{guests.GUESTS} emulated guests"
    lines = [f"{_today()}, {machine()}: {what}.", "", *report.summary(groups, totals, MINE)]
    (output / "summary.md").write_text("\n".join(lines))
    document = {"date": _today(), "machine": machine(), "cases": [asdict(case) for case in runs_of],
                "verdicts": {group: {"held": total.held, "scripts": [asdict(found) for found in total.verdicts]}
                             for group, total in totals.items()}}  # fmt: skip
    (output / "summary.json").write_text(json.dumps(document, indent=1) + "\n")
    print("\n".join(["", "== what the tables say", "", *report.LEGEND, "", "== all together", "", *lines]))
    print(f"this is {output}/summary.md and .json; all samples of each run and a picture of each script are beside it")


def _run(case: Case, contender: Contender, play: Player, results: Results, *, resume: bool) -> Run:
    """One run, told and written down; with `resume` one that is written down already."""
    if resume and (run := results.find(case, contender)) is not None:
        print(f"-- {contender.about}: done before", flush=True)
        return run
    with tempfile.TemporaryDirectory(prefix="bench-policy-") as scratch, ksm_alone(case.memory) as host:
        life, load = host.ksm.cpu_seconds(), os.getloadavg()[0]
        print(f"-- {contender.about} (ksmd has used {life:.0f} s of CPU since the host's start)", flush=True)
        place = Place(host, Path(scratch), case.seconds, case.busy)
        run = play(contender, place)
        notes = contender.notes(place)
    if run.not_huge:
        notes.append(f"the host could not give {run.not_huge} huge pages: they count as not left")
    print("".join(f"   {line}\n" for line in notes[-12:]), end="", flush=True)
    more = {"date": _today(), "notes": notes, "load_average_before": load, "ksmd_cpu_seconds_before": life}
    results.keep(case, contender, run, more)
    return run


def _duration(cases: Sequence[Case], policies: Sequence[str]) -> str:
    count, seconds = len(cases) * len(policies), cases[0].seconds
    minutes = max(1, round(count * (seconds + _AROUND_SECONDS) / 60))
    end = datetime.datetime.now() + datetime.timedelta(minutes=minutes)
    told = f"runs: {count}, {seconds:g} s each; about {minutes} min, until {end:%H:%M}"
    if (load := os.getloadavg()[0]) <= _QUIET_LOAD:
        return told
    return f"this machine is busy (load average {load:.1f}): times and latencies will say little\n{told}"


def _recording(recipes: Sequence[traces.Recipe]) -> str:
    missing = sum(not recipe.path.exists() for recipe in recipes)
    return f"; before that {missing} traces are recorded, up to two minutes each" if missing else ""


def _told(script: Script) -> str:
    parts = []
    for moment in range(script.events[-1].moment + 1):
        events = [event for event in script.events if event.moment == moment]
        kinds = ", ".join(f"{count} {kind}" for kind in Kind if (count := sum(event.kind is kind for event in events)))
        parts.append(f"at {events[0].at:.0f} s: {kinds}")
    return "; ".join(parts)


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")


def _mib(pages: int) -> str:
    return f"{pages * PAGE / 2**20:,.0f} MiB"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
