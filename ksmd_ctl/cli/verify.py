# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl verify``: the same scenarios on the running kernel and on the engine, compared page by page."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from ksmd_ctl.cli.common import ENDING, Parsers, add_command, handling, whole_number, write_json
from ksmd_ctl.cli.terminal import ProgressLine
from ksmd_ctl.errors import Absent, ExitCode, UsageError

if TYPE_CHECKING:
    from ksmd_ctl.scenario.compare import Result
    from ksmd_ctl.scenario.model import Scenario
    from ksmd_ctl.scenario.report import Report
    from ksmd_ctl.scenario.session import Kernel, Session

_COUNT = 100
_RUNTIME = Path("/run/ksmd-ctl")


def add_parser(parsers: Parsers) -> None:
    parser = add_command(
        parsers,
        "verify",
        "run scenarios on kernel and engine and compare them; on the kernel it un-merges everything first",
        hosts=("kernel", "engine", "both"),
        host_help="only this machine's kernel, only the engine, or both, compared (default: both)",
    )
    parser.add_argument("paths", nargs="*", type=Path, metavar="FILE|DIR", help="scenario files (default: the library)")
    seed = whole_number(most=2**64 - 1)
    parser.add_argument("--random", type=seed, metavar="SEED", help="generate random scenarios from this seed instead")
    parser.add_argument(
        "--count", type=whole_number(1), metavar="N", help=f"number of random scenarios (default: {_COUNT})"
    )
    parser.add_argument("--first", type=seed, default=0, metavar="N", help="start with scenario N of the seed's series")
    parser.add_argument(
        "--domains",
        choices=("separate", "across"),
        help="with --random: processes in domains with nodes of their own, where frames stay apart "
        "(merge_across_nodes=0), or the same ones where they don't (1)",
    )
    parser.add_argument("--profile", metavar="NAME", help="the engine's profile (default: detected on the kernel)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write an HTML report")
    parser.add_argument(
        "--save", type=Path, metavar="DIR", help="directory for shrunk random scenarios that fail (default: .)"
    )
    parser.add_argument("--take-over", action="store_true", help="run even if a service or another program manages KSM")


def run(args: argparse.Namespace, out: TextIO) -> int:
    from ksmd_ctl.codec import encode
    from ksmd_ctl.scenario.compare import Verdict
    from ksmd_ctl.scenario.session import results_document

    _check(args)
    results: list[Result] = []
    with ExitStack() as stack:
        session, kernel, note = _session(args, stack)
        if note:
            sys.stderr.write(f"{note}\n")
        report = _report(args, session)
        show = ProgressLine(sys.stderr)
        total, scenarios = _scenarios(args, session)
        for number, scenario in enumerate(scenarios, 1):
            show.say(f"{number} of {total}: {scenario.name[:60]}")
            result = session.run(scenario, report.watch if report else None)
            if report:
                report.add(result)
            results.append(result)
            show.clear()
            if not args.json and (args.random is None or result.verdict is not Verdict.EQUAL):
                _print(result, out)
            if args.random is not None and result.verdict is Verdict.DIFFERENT:
                _save(args, session, scenario, show)
        totals = {verdict.value: session.verdicts[verdict] for verdict in Verdict}
        happened = {fact.value: count for fact, count in session.happened.items()}
    if report:
        report.write(args.report, kernel, session.profile)
    if args.json:
        documents = [results_document(result) for result in results]
        sides = {"kernel": encode(kernel), "profile": session.profile}
        write_json({"format": 1, **sides, "scenarios": documents, "totals": totals, "happened": happened}, out)
    else:
        _print_totals(session, kernel, happened, out)
    if totals["different"]:
        return ExitCode.CHECK_FAILED
    return ExitCode.DONE if totals["equal"] else ExitCode.LACKING


def _check(args: argparse.Namespace) -> None:
    from ksmd_ctl.engine.profile import profile

    if args.random is not None and args.paths:
        raise UsageError("verify", "--random can't be combined with files", hint="leave one of them out")
    if args.random is None and (args.count is not None or args.first or args.domains):
        raise UsageError("verify", "--count, --first and --domains need --random", hint="add --random SEED")
    if args.profile is not None:
        try:
            profile(args.profile)
        except ValueError as error:
            raise UsageError("--profile", str(error)) from error
    for path in (args.report and args.report.parent, args.save):
        if path and not path.is_dir():
            raise UsageError(f"writing to {path}", "there is no such folder")


def _session(args: argparse.Namespace, stack: ExitStack) -> tuple[Session, Kernel | None, str]:
    """The hosts, taken until the stack is unwound; what the report says of the kernel; and a note for people."""
    from ksmd_ctl.engine.profile import CURRENT
    from ksmd_ctl.scenario.session import Kernel, Session

    if args.host == "engine":
        return Session(args.profile or CURRENT.name), None, ""
    from ksmd_ctl.scenario.kernel_lab import open_kernel_lab
    from ksmd_ctl.scenario.session import find_profile

    if not args.take_over:
        from ksmd_ctl.statefiles import LOCK, HostLock

        stack.enter_context(HostLock(_RUNTIME / LOCK, "ksmd-ctl verify"))
    stack.enter_context(handling(ENDING, _stop))
    lab = open_kernel_lab(take_over=args.take_over)
    # Not enter_context: a signal could come between what it enters and its remembering to leave it.
    stack.push(lab)
    lab.take()
    note, name = "", args.profile
    if name is None:
        found = find_profile(lab, lab.ksm_stat_names())
        name = found.profile
        if not found.certain:
            note = f"no profile behaves exactly like this kernel; the closest, judging by its files, is {name}"
    kernel = Kernel(lab.identity.release, len(lab.topology().with_memory()), lab.detection, lab.detection)
    return Session(name, lab, engine=args.host != "kernel"), kernel, note


def _stop(_number: int, _frame: object) -> None:
    """SIGTERM and SIGHUP end it like Ctrl-C does: everything is put back. A second one is not to interrupt that."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _scenarios(args: argparse.Namespace, session: Session) -> tuple[int, Iterable[Scenario]]:
    """How many, and what they are; random ones are made up when their turn comes."""
    from ksmd_ctl.scenario.format import LIBRARY, load_all
    from ksmd_ctl.scenario.generate import generate
    from ksmd_ctl.scenario.generate_domains import Mode
    from ksmd_ctl.scenario.generate_domains import generate as with_domains

    if args.random is None:
        found = load_all(args.paths or [LIBRARY])
        return len(found), found
    abilities, count = session.abilities(), args.count or _COUNT
    numbers = range(args.first, args.first + count)
    if args.domains is None:
        return count, (generate(args.random, number, abilities) for number in numbers)
    if lacks := session.lacks_domains():
        hint = "boot with numa=fake=4U on the kernel command line and cgroup version 2, or use --host engine"
        raise Absent("making scenarios with domains", lacks, hint=hint)
    return count, (with_domains(args.random, number, abilities, Mode(args.domains)) for number in numbers)


def _save(args: argparse.Namespace, session: Session, scenario: Scenario, show: ProgressLine) -> None:
    """Shrink a scenario that differs, and save what is left."""
    from ksmd_ctl.scenario.compare import Verdict
    from ksmd_ctl.scenario.format import text_of
    from ksmd_ctl.scenario.generate import shrink
    from ksmd_ctl.scenario.session import Session as Fresh

    # Its tries must not count among the results.
    trying = Fresh(session.profile, session.kernel, session.engine)
    tries = 0

    def differs(candidate: Scenario) -> bool:
        nonlocal tries
        tries += 1
        show.say(f"{tries}: shrinking {scenario.name[:60]}")
        return trying.run(candidate).verdict is Verdict.DIFFERENT

    small = shrink(scenario, differs)
    show.clear()
    path = (args.save or Path()) / f"ksmd-ctl-{scenario.name.replace(' ', '-').replace('/', '-')}.toml"
    path.write_text(text_of(small, f"Found by ksmd-ctl verify; profile {session.profile}."))
    sys.stderr.write(f"the smallest scenario that still differs is in {path}\n")


def _report(args: argparse.Namespace, session: Session) -> Report | None:
    if args.report is None:
        return None
    from ksmd_ctl.scenario.report import Report as Html

    return Html(session)


def _print(result: Result, out: TextIO) -> None:
    reason = f": {result.reason}" if result.reason else ""
    name = f"{Path(result.scenario.file).stem}: " if result.scenario.file else ""
    out.write(f"{result.word:9}  {name}{result.scenario.name}{reason}\n")
    for difference in result.first()[1]:
        out.write(f"           {difference}\n")
    if result.differences and result.scenario.text:
        out.write(f"           note: {result.scenario.text}\n")
    # Seen at once where somebody waits for it in a pipe.
    out.flush()


def _print_totals(
    session: Session,
    kernel: Kernel | None,
    happened: dict[str, int],
    out: TextIO,
) -> None:
    sides = [] if kernel is None else [f"kernel {kernel.release} with {kernel.nodes} nodes"]
    sides += [f"engine {session.profile}"] if session.engine else []
    out.write(f"{' and '.join(sides)}: {session.counts()}\n")
    if happened:
        counts = ", ".join(f"{count} {fact}" for fact, count in sorted(happened.items()))
        out.write(f"scenarios by what happened in them: {counts}\n")
