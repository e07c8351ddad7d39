# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl estimate``: what merging would save, told from contents; it writes nothing."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn, TextIO

from ksmd_ctl.cli.common import (
    LEAST_CPU_SHARE,
    Parsers,
    add_command,
    add_config,
    add_process,
    handling,
    interrupt,
    seconds,
    share,
    write_json,
)
from ksmd_ctl.cli.estimate_lines import interval_text, lines
from ksmd_ctl.cli.terminal import ProgressLine, text_width, write_wrapped
from ksmd_ctl.errors import Denied, ExitCode, Refused
from ksmd_ctl.figures import bytes_text, ratio_text
from ksmd_ctl.reports.document import part

if TYPE_CHECKING:
    from ksmd_ctl.host.estimate import Estimate, Rules
    from ksmd_ctl.host.interface import Host
    from ksmd_ctl.host.memory import Process
    from ksmd_ctl.reports.estimate import LookedAt

_CPU_SHARE: Final = 0.5
_INTERVAL_SECONDS: Final = 10.0
# Until all guests of the simulated host are there, and have written.
_ARRIVED_SECONDS: Final = 40.0
# SIGHUP is left out: whoever used nohup wants it to go on.
_INTERRUPTING: Final = (signal.SIGINT, signal.SIGTERM)
_TELL_SECONDS: Final = 0.2


def add_parser(parsers: Parsers) -> None:
    parser = add_command(
        parsers,
        "estimate",
        "tell what merging would save, from the contents of memory; nothing is written, and ksmd need not run",
        host_help="this machine's kernel, or a simulated host (default: the kernel)",
    )
    add_config(parser)
    parser.add_argument("--root", default="/", help=argparse.SUPPRESS)
    add_process(
        parser, "only memory of this process", "only memory of this systemd unit or virtual machine", required=False
    )
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
        type=share(LEAST_CPU_SHARE),
        default=_CPU_SHARE,
        metavar="SHARE",
        help=f"share of one CPU that it may take, from {LEAST_CPU_SHARE} to 1 (default: {_CPU_SHARE:g})",
    )
    parser.add_argument("--by", choices=("unit", "process"), default="unit", help="what is listed (default: unit)")


def run(args: argparse.Namespace, out: TextIO) -> int:
    from ksmd_ctl.cli.host import open_host

    if args.host != "engine" and os.geteuid() != 0:
        why = "only root may compare the contents of others' memory"
        hint = "run it as root; `ksmd-ctl status` shows without root what is merged and saved now"
        raise Denied("estimating what merging would save", why, hint=hint)
    with open_host(args.host or "kernel", args.root) as host, handling(_INTERRUPTING, interrupt):
        look = _simulated if args.host == "engine" else _of_kernel
        try:
            document = look(args, host)
        except KeyboardInterrupt:
            sys.stderr.write("interrupted before there was a figure\n")
            raise
    if args.json:
        write_json(document, out)
    else:
        width = text_width(out)
        write_wrapped(lines(document, args.by, width), width, out)
    return ExitCode.INTERRUPTED if part(document, "look").get("interrupted") else ExitCode.DONE


# -- looking -------------------------------------------------------------------------------------------------------


def _wanted(args: argparse.Namespace, host: Host) -> Callable[[Process], bool]:
    """Whose memory was asked for. A unit may be named as it is listed, too: a virtual machine by its own name.

    :raises UsageError: there is no such process
    """
    from ksmd_ctl.transactions.migration import named_process, unit_name

    if args.pid is not None:
        named = named_process(host, args.pid)
        return lambda process: process.id == named
    if args.unit:
        unit = unit_name(args.unit)
        return lambda process: process.unit == unit or process.group == args.unit
    return lambda _: True


def _need_some(args: argparse.Namespace, host: Host) -> NoReturn:
    """Nothing that can be merged was found of those that were asked for.

    :raises UsageError: there is no such process any more
    :raises Refused: those that were asked for have no memory that can be merged, or there is no such unit: a unit
        without processes, or whose processes may not be looked at, can't be told from that
    """
    from ksmd_ctl.host.operation import finish
    from ksmd_ctl.transactions.migration import named_process

    what = "estimating what merging would save"
    hint = "--all looks at memory that nobody has marked, too; `ksmd-ctl processes` names units"
    if args.all:
        hint = "`ksmd-ctl processes --all` shows what memory processes have"
    if args.pid is not None:
        named_process(host, args.pid)
        raise Refused(what, f"process {args.pid} has no mergeable memory", hint=hint)
    groups = {process.group for process in finish(host.processes()).processes if process.group}
    if groups and args.unit not in groups:
        hint = f"with mergeable memory there are: {', '.join(sorted(groups)[:8])}"
    raise Refused(what, f"no process of unit {args.unit[:100]} has mergeable memory", hint=hint)


def _looked(args: argparse.Namespace, found: Sequence[Process], rules: Rules) -> LookedAt:
    from ksmd_ctl.config.loader import load
    from ksmd_ctl.domains.members import domain_of
    from ksmd_ctl.reports.estimate import LookedAt

    only = f"process {args.pid}" if args.pid is not None else f"unit {args.unit}" if args.unit else ""
    config = load(args.config).domains
    domains = None if config is None else [domain_of(config, process) for process in found]
    empty = [] if config is None or only else [one.name for one in config.domains if one.name not in (domains or ())]
    return LookedAt(
        found,
        rules,
        args.cpu,
        args.interval,
        domains=domains,
        empty_domains=empty,
        only=only,
    )


def _simulated(args: argparse.Namespace, host: Host) -> Mapping[str, object]:
    from dataclasses import replace
    from functools import partial

    from ksmd_ctl.engine import estimate as engine
    from ksmd_ctl.engine.host import EngineHost
    from ksmd_ctl.reports.estimate import estimate_document

    assert isinstance(host, EngineHost)
    host.advance(_ARRIVED_SECONDS)
    machine = host.machine
    found = engine.chosen(machine, _wanted(args, host), more=args.all)
    if not found and (args.unit or args.pid):
        _need_some(args, host)
    looked = _looked(args, found, engine.rules(machine))
    wait = partial(host.advance, args.interval) if args.interval else None
    result = engine.look(machine, found, more=args.all, domain_of=looked.domains, wait=wait)
    gone = [one.id.pid for one in found if not engine.running(machine, one)]
    return estimate_document(host.identity, result, replace(looked, gone=gone), ())


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
        left_out.need(targets)
        if not targets and (args.unit or args.pid):
            _need_some(args, host)
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
    left_out.need(look.read or look.drawn)
    assert best is not None
    looked = replace(
        looked,
        interval_seconds=look.interval_seconds,
        seconds=pace.seconds,
        cpu_seconds=pace.cpu_seconds,
        page_cpu_seconds=look.page_cpu_seconds,
        left_out={pid: error.why for pid, error in left_out.errors.items()},
        gone=sorted(look.gone),
        interrupted=interrupted,
    )
    return estimate_document(host.identity, best, looked, (sample, host.sample(fresh=True)))


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
        self._figure = f"; frees {bytes_text(found)} ({interval_text(low, high)})"
        self._told = 0.0
        self.at(done, total)

    def at(self, done: int, total: int) -> None:
        """So many of all pages were read."""
        now = time.monotonic()
        if now - self._told >= _TELL_SECONDS:
            self._told = now
            share = ratio_text(min(1.0, done / max(1, total)))
            self._line.say(f"{share} of {bytes_text(total * self._page)} read{self._figure}")
