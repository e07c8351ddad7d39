# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl estimate``: what merging would save, told from contents; it writes nothing."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Final, TextIO

from ksmd_ctl.cli.common import Parsers, add_command, add_config, add_process, seconds, write_json
from ksmd_ctl.cli.terminal import WIDTH, Column, ProgressLine, bytes_or_unknown, table, wrapped
from ksmd_ctl.errors import Absent, Denied, ExitCode, Refused
from ksmd_ctl.figures import bytes_text, plural, ratio_text, rough_seconds, seconds_text
from ksmd_ctl.reports.document import number, part, parts, text

if TYPE_CHECKING:
    from ksmd_ctl.host.estimate import Estimate, Rules
    from ksmd_ctl.host.interface import Host
    from ksmd_ctl.host.memory import Process
    from ksmd_ctl.kernel.proc_pid import LeftOut
    from ksmd_ctl.reports.estimate import LookedAt

_CPU_SHARE: Final = 0.5
_INTERVAL_SECONDS: Final = 10.0
_LIMIT: Final = 20
# Until all guests of the simulated host are there, and have written.
_ARRIVED_SECONDS: Final = 40.0
_TELL_SECONDS: Final = 0.2

_OUTCOMES: Final = (
    Column("merge_across_nodes", right=True),
    Column("use_zero_pages", right=True),
    Column("frees", right=True),
    Column("records", right=True),
    Column("saves", right=True),
    Column("95 % interval"),
)
_GROUPS: Final = (
    Column("group", wraps=True),
    Column("marked", right=True),
    Column("would save", right=True),
    Column("unmarked", right=True),
    Column("would save with it", right=True),
)
_DOMAINS: Final = (
    Column("domain", wraps=True),
    Column("marked", right=True),
    Column("would save", right=True),
    Column("if kept apart", right=True),
)


def _share(text: str) -> float:
    # As `ksmd_ctl.cli.common.seconds`: float() alone takes too much.
    if not (text.isascii() and text.replace(".", "", 1).isdigit() and 0 < float(text) <= 1):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a share of a CPU, above 0 and up to 1")
    return float(text)


def add_parser(parsers: Parsers) -> None:
    parser = add_command(
        parsers,
        "estimate",
        "tell what merging would save, from the contents of memory; nothing is written, and ksmd need not run",
        host_help="this machine's kernel, or a simulated host (default: the kernel)",
    )
    add_config(parser)
    parser.add_argument("--root", default="/", help=argparse.SUPPRESS)
    add_process(parser, "only memory of this process", "only memory of processes of this systemd unit", required=False)
    parser.add_argument("--all", action="store_true", help="also memory that nobody has marked mergeable")
    parser.add_argument(
        "--interval",
        type=seconds(3600, 0),
        default=_INTERVAL_SECONDS,
        metavar="SECONDS",
        help="time between two looks: pages that changed meanwhile are left out; 0: one look "
        f"(default: {_INTERVAL_SECONDS:g})",
    )
    parser.add_argument(
        "--cpu",
        type=_share,
        default=_CPU_SHARE,
        metavar="SHARE",
        help=f"share of one CPU that it may take, above 0 and up to 1 (default: {_CPU_SHARE:g})",
    )
    parser.add_argument("--by", choices=("unit", "process"), default="unit", help="what is listed (default: unit)")


def run(args: argparse.Namespace, out: TextIO) -> int:
    from ksmd_ctl.cli.host import open_host

    if args.host != "engine" and os.geteuid() != 0:
        why = "only root may compare the contents of others' memory"
        hint = "run it as root; `ksmd-ctl status` shows without root what is merged and saved now"
        raise Denied("estimating what merging would save", why, hint=hint)
    with open_host(args.host or "kernel", args.root) as host:
        look = _simulated if args.host == "engine" else _of_kernel
        document = look(args, host)
    if args.json:
        write_json(document, out)
    else:
        for line in lines(document, args.by):
            for piece in wrapped(line, WIDTH, 2):
                out.write(f"{piece}\n")
    return ExitCode.INTERRUPTED if part(document, "look").get("interrupted") else ExitCode.DONE


# -- looking -------------------------------------------------------------------------------------------------------


def _wanted(args: argparse.Namespace, host: Host) -> Callable[[Process], bool]:
    """Whose memory was asked for.

    :raises UsageError: there is no such process
    """
    from ksmd_ctl.transactions.migration import named_process, unit_name

    if args.pid is not None:
        named = named_process(host, args.pid)
        return lambda process: process.id == named
    if args.unit:
        unit = unit_name(args.unit)
        return lambda process: process.unit == unit
    return lambda _: True


def _looked(args: argparse.Namespace, found: Sequence[Process], rules: Rules) -> LookedAt:
    """
    :raises Refused: nobody of those that were asked for has memory that can be merged
    """
    from ksmd_ctl.config.loader import load
    from ksmd_ctl.domains.members import domain_of
    from ksmd_ctl.reports.estimate import LookedAt

    only = f"process {args.pid}" if args.pid is not None else f"unit {args.unit}" if args.unit else ""
    if only and not found:
        hint = "--all looks at memory that nobody has marked, too; `ksmd-ctl processes` names units"
        if args.all:
            hint = "`ksmd-ctl processes --all` shows what memory processes have"
        raise Refused("estimating what merging would save", f"{only} has no mergeable memory", hint=hint)
    domains = load(args.config).domains
    return LookedAt(
        found,
        rules,
        args.cpu,
        args.interval,
        domains=None if domains is None else [domain_of(domains, process) for process in found],
        only=only,
    )


def _simulated(args: argparse.Namespace, host: Host) -> Mapping[str, object]:
    from dataclasses import replace

    from ksmd_ctl.engine import estimate as engine
    from ksmd_ctl.engine.host import EngineHost
    from ksmd_ctl.reports.estimate import estimate_document

    assert isinstance(host, EngineHost)
    host.advance(_ARRIVED_SECONDS)
    machine = host.machine
    found = engine.chosen(machine, _wanted(args, host), more=args.all)
    looked = _looked(args, found, engine.rules(machine))
    result = engine.look(machine, found, more=args.all, domain_of=looked.domains)
    return estimate_document(host.identity, result, replace(looked, interval_seconds=0.0), ())


def _of_kernel(args: argparse.Namespace, host: Host) -> Mapping[str, object]:
    from dataclasses import replace

    from ksmd_ctl.cli.host import need_ksm
    from ksmd_ctl.host.estimate import Rules
    from ksmd_ctl.host.knobs import Knob
    from ksmd_ctl.kernel.contents import merge_rules
    from ksmd_ctl.kernel.estimate import Look
    from ksmd_ctl.kernel.estimate_targets import find_targets
    from ksmd_ctl.kernel.pace import Pace
    from ksmd_ctl.kernel.proc_pid import LeftOut
    from ksmd_ctl.reports.estimate import estimate_document

    root, wanted = Path(args.root), _wanted(args, host)
    sample, pace, left_out = host.sample(fresh=True), Pace(args.cpu), LeftOut()
    need_ksm(sample)
    merging = merge_rules(root)
    nodes = len(host.topology().with_memory())
    rules = Rules(
        merging.max_page_sharing, merging.merge_across_nodes, sample.number(Knob.USE_ZERO_PAGES) == 1, max(1, nodes)
    )
    with ProgressLine(sys.stderr) as line:
        line.say("looking for memory that can be merged")
        targets = find_targets(wanted, left_out, more=args.all, pid=args.pid, root=root, pause=pace.keep)
        _need_some(targets, left_out)
        looked = _looked(args, [target.process for target in targets], rules)
        progress = _Progress(line, host.identity.page_size_bytes)
        look = Look(
            targets,
            rules,
            pace,
            interval_seconds=args.interval,
            left_out=left_out,
            domain_of=looked.domains,
            more=args.all,
            root=root,
            tell=lambda: progress.at(look.read, look.pages),
        )
        best: Estimate | None = None
        interrupted = False
        estimates = look.estimates()
        try:
            with closing(estimates):
                for best in estimates:
                    progress.found(best, look.read, look.pages)
        except KeyboardInterrupt:
            if best is None:
                raise
            interrupted = True
    _need_some(look.read, left_out)
    assert best is not None
    looked = replace(
        looked,
        seconds=pace.seconds,
        cpu_seconds=pace.cpu_seconds,
        left_out={pid: error.why for pid, error in left_out.errors.items()},
        gone=sorted(look.gone),
        interrupted=interrupted,
    )
    return estimate_document(host.identity, best, looked, (sample, host.sample(fresh=True)))


def _need_some(found: object, left_out: LeftOut) -> None:
    """
    :raises Denied, Absent: nothing could be looked at; of several reasons the last, for init may be special
    """
    refusals = [error for error in left_out.errors.values() if isinstance(error, Denied | Absent)]
    if refusals and not found:
        raise refusals[-1]


class _Progress:
    """How far it is, and the figure so far, on a terminal."""

    def __init__(self, line: ProgressLine, page: int) -> None:
        self._line = line
        self._page = page
        self._figure = ""
        self._told = 0.0

    def found(self, best: Estimate, done: int, total: int) -> None:
        """A better figure."""
        found, low, high = ((best.outcomes_with_more or best.outcomes)[0].freed[at] * self._page for at in range(3))
        self._figure = f"; frees {bytes_text(found)} ({_interval(low, high)})"
        self._told = 0.0
        self.at(done, total)

    def at(self, done: int, total: int) -> None:
        """So many of all pages were read."""
        now = time.monotonic()
        if now - self._told >= _TELL_SECONDS:
            self._told = now
            share = ratio_text(min(1.0, done / max(1, total)))
            self._line.say(f"{share} of {bytes_text(total * self._page)} read{self._figure}")


# -- telling -------------------------------------------------------------------------------------------------------


def _interval(low: float | None, high: float | None) -> str:
    return "exact" if low == high else f"{bytes_or_unknown(low)} to {bytes_or_unknown(high)}"


def lines(document: Mapping[str, object], by: str = "unit") -> Iterator[str]:
    """The lines for people of a document (docs/json.md).

    :param by: `unit` or `process`: what is listed
    """
    if part(document, "host").get("simulated"):
        yield "SIMULATED: these processes are not on this machine"
    yield from _summary(document)
    if number(document, "marked_bytes"):
        yield from _outcomes(document, "outcomes")
    if parts(document, "outcomes_with_unmarked"):
        unmarked = bytes_or_unknown(number(document, "unmarked_bytes"))
        yield f"with {unmarked} more that nobody has marked mergeable:"
        yield from _outcomes(document, "outcomes_with_unmarked")
    yield from _groups(document, "units" if by == "unit" else "processes")
    yield from _domains(document)
    yield from _notes(document)


def _now(document: Mapping[str, object], key: str = "outcomes") -> Mapping[str, object]:
    return next((one for one in parts(document, key) if one.get("current")), {})


def _summary(document: Mapping[str, object]) -> Iterator[str]:
    look, now = part(document, "look"), _now(document)
    whose = text(look, "only") or plural(number(look, "processes") or 0, "process", "processes")
    marked = bytes_or_unknown(number(document, "marked_bytes"))
    if not number(document, "marked_bytes"):
        if look.get("gone"):
            yield f"{whose}: nobody is left whose memory is marked mergeable"
            return
        hint = "" if parts(document, "outcomes_with_unmarked") else "; --all looks at memory that is not marked, too"
        yield f"{whose}: no memory is marked mergeable{hint}"
        return
    low, high = number(now, "saved_low_bytes"), number(now, "saved_high_bytes")
    said = f"merging would save {bytes_or_unknown(number(now, 'saved_bytes'))}"
    said += "" if low == high else f" ({_interval(low, high)})"
    said += f" of {marked} that {'has' if text(look, 'only') else 'have'} been marked mergeable ({whose})"
    yield said
    if already := number(document, "freed_already_bytes"):
        yield f"{bytes_text(already)} of it is merged already"


def _outcomes(document: Mapping[str, object], key: str) -> Iterator[str]:
    rows = [
        [
            f"{'now ' if one.get('current') else ''}{number(one, 'merge_across_nodes')}",
            str(number(one, "use_zero_pages")),
            *(bytes_or_unknown(number(one, name)) for name in ("freed_bytes", "records_bytes", "saved_bytes")),
            _interval(number(one, "saved_low_bytes"), number(one, "saved_high_bytes")),
        ]
        for one in parts(document, key)
    ]
    yield from table(_OUTCOMES, rows, WIDTH)


def _groups(document: Mapping[str, object], key: str) -> Iterator[str]:
    found = parts(document, key)
    if not found:
        if text(part(document, "look"), "stage") in ("sample", "reading"):
            yield "whose part it is, is known once everything was read"
        return
    more = number(document, "unmarked_bytes") is not None
    names = ("marked_bytes", "saved_bytes", "unmarked_bytes", "saved_with_unmarked_bytes")[: None if more else 2]
    rows = [[text(one, "group"), *(bytes_or_unknown(number(one, name)) for name in names)] for one in found[:_LIMIT]]
    yield from table(_GROUPS[: None if more else 3], rows, WIDTH)
    if len(found) > _LIMIT:
        yield f"{plural(len(found) - _LIMIT, 'more', 'more')}; --json has all"


def _domains(document: Mapping[str, object]) -> Iterator[str]:
    names = ("marked_bytes", "saved_bytes", "saved_apart_bytes")
    rows = [
        [text(one, "domain"), *(bytes_or_unknown(number(one, name)) for name in names)]
        for one in parts(document, "domains")
    ]
    if rows:
        yield from table(_DOMAINS, rows, WIDTH)
        apart = sum(number(one, "saved_apart_bytes") or 0 for one in parts(document, "domains"))
        yield f"kept apart from one another, all domains together would save {bytes_text(apart)}"


def _notes(document: Mapping[str, object]) -> Iterator[str]:
    look, cost = part(document, "look"), part(document, "ksmd")
    first, scan = number(cost, "first_cpu_seconds") or 0.0, number(cost, "scan_cpu_seconds") or 0.0
    source = "as measured now" if cost.get("measured") else "by costs measured elsewhere"
    if first:
        yield (
            f"ksmd would take about {rough_seconds(first)} of CPU until all is merged, "
            f"then {rough_seconds(scan)} for a scan of every page ({source})"
        )
    left_out = parts(look, "left_out")
    if left_out:
        pids = ", ".join(str(number(one, "pid")) for one in left_out[:5])
        yield f"{plural(len(left_out), 'process', 'processes')} could not be looked at: pid {pids}"
    gone = look.get("gone")
    if isinstance(gone, list) and gone:
        pids = ", ".join(map(str, gone[:5]))
        if text(look, "stage") == "final":
            left = " and is left out" if len(gone) == 1 else " and are left out"
        else:
            left = f"; what was read of {'it' if len(gone) == 1 else 'them'} is counted"
        yield f"{plural(len(gone), 'process', 'processes')} ended meanwhile{left}: pid {pids}"
    yield _how(look)


def _how(look: Mapping[str, object]) -> str:
    stage, said = text(look, "stage"), []
    if look.get("interrupted"):
        said.append("interrupted")
    read = ratio_text(number(look, "read_share") or 0.0)
    if stage == "sample":
        said.append(f"from a sample of {read} of all pages")
    elif stage == "reading":
        said.append(f"{read} of all pages read")
    else:
        share = number(look, "content_share") or 1.0
        said.append("all pages read" + (f", {ratio_text(share)} of contents kept" if share < 1 else ""))
    unchanged = number(look, "unchanged_share")
    if stage == "read":
        said.append("looked at once: pages that change are in these figures")
    elif unchanged is not None and number(look, "interval_seconds"):
        after = seconds_text(number(look, "interval_seconds") or 0.0)
        changed = "nothing" if unchanged == 1 else f"{ratio_text(1 - unchanged)} of that"
        said.append(f"{changed} changed within {after}" + ("" if unchanged == 1 else " and is left out"))
    cpu = number(look, "cpu_seconds")
    if cpu:
        said.append(f"{rough_seconds(cpu)} of CPU in {rough_seconds(number(look, 'seconds') or 0.0)}")
    return ", ".join(said)
