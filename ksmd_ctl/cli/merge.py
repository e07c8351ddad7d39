# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl merge``: switches merging on or off for a process, a unit or a virtual machine that runs."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, TextIO

from ksmd_ctl.cli.common import Parsers, add_command, add_config, add_source, whole_number, write_json
from ksmd_ctl.cli.source import Outcome, ask, carry_out, change
from ksmd_ctl.cli.terminal import ProgressLine, write_lines
from ksmd_ctl.errors import ExitCode, Refused
from ksmd_ctl.figures import bytes_text, plural, seconds_text
from ksmd_ctl.host.sample import HostKind
from ksmd_ctl.host.switching import Method
from ksmd_ctl.render.summary import BAD, GOOD, Line
from ksmd_ctl.render.transaction import room_line
from ksmd_ctl.reports.document import number, part, parts, text

if TYPE_CHECKING:
    from ksmd_ctl.transactions.switching import SwitchOrder

#: In the runtime directory: two commands never switch at the same time.
LOCK: Final = "switch-lock"
_AUTO: Final = "auto"


def add_parser(parsers: Parsers) -> None:
    parser = add_command(
        parsers, "merge", "switch merging on or off for a process, a unit or a virtual machine, without a restart"
    )
    add_source(parser)
    parser.add_argument("action", choices=("on", "off"), metavar="on|off", help="what to switch it to")
    whose = parser.add_mutually_exclusive_group(required=True)
    whose.add_argument("--pid", type=whole_number(1), metavar="P", help="one process")
    whose.add_argument("--unit", default="", metavar="U", help="the processes of a systemd unit")
    whose.add_argument("--vm", default="", metavar="NAME", help="a virtual machine, as `ksmd-ctl processes` calls it")
    parser.add_argument(
        "--method",
        choices=(_AUTO, *(method.value for method in Method)),
        default=_AUTO,
        help="by QEMU's monitor, or by a system call that is injected into the process (default: the first that works)",
    )
    parser.add_argument(
        "--range",
        dest="ranges",
        type=_range,
        action="append",
        default=[],
        metavar="A-B",
        help="only these addresses of the process, in hexadecimal as in /proc/PID/maps; may be repeated",
    )
    parser.add_argument(
        "--persist",
        nargs="?",
        choices=("print", "write"),
        const="print",
        metavar="write",
        help="also print what belongs into the unit, the domain or the machine's configuration for the next start; "
        "with `write`, write the drop-in of a unit",
    )
    parser.add_argument("--dry-run", action="store_true", help="only print what would be switched")
    add_config(parser)


def _range(word: str) -> tuple[int, int]:
    """The type of --range: ``7f0000000000-7f0000100000``."""
    match = re.fullmatch(r"(?:0x)?([0-9a-f]{1,16})-(?:0x)?([0-9a-f]{1,16})", word, re.ASCII | re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{word[:60]!r} is no range of addresses, as in 7f0000000000-7f0000100000")
    return int(match[1], 16), int(match[2], 16)


def run(args: argparse.Namespace, out: TextIO) -> int:
    from ksmd_ctl.cli.merge_persist import settings
    from ksmd_ctl.transactions.switching import SwitchOrder, exit_code

    method = None if args.method == _AUTO else Method(args.method)
    on = args.action == "on"
    order = SwitchOrder(on, args.pid, args.unit, args.vm, tuple(args.ranges), method, args.dry_run)
    order.check()
    write, root = args.persist == "write", Path(args.root)
    if write and not args.dry_run:
        # Where there is no drop-in to write, that is refused before anything is switched.
        settings(_switched(args, dataclasses.replace(order, dry_run=True))[0], root, write=True)
    document, stopped = _switched(args, order)
    if args.persist and not stopped:
        document = {**document, "persist": settings(document, root, write=write)}
    if args.json:
        write_json(document, out)
    else:
        write_lines(lines(document), out)
    return ExitCode.INTERRUPTED if stopped else exit_code(document)


def _switched(args: argparse.Namespace, order: SwitchOrder) -> Outcome:
    """Have the service switch, or do it here: so does root where the service may not."""
    from ksmd_ctl.daemon.varlink_wire import AddressRange, MergeParameters

    ranges = tuple(AddressRange(start, end) for start, end in order.ranges) or None
    method = None if order.method is None else order.method.value
    parameters = MergeParameters(
        order.on, order.pid, order.unit or None, order.vm or None, ranges, method, order.dry_run
    )
    with ProgressLine(sys.stderr) as line:
        if args.host is None and os.geteuid() == 0 and _is_to_do_it_here(args):
            return _here(args, order, line)
        return change(args, "Merge", "result", parameters, lambda: _here(args, order, line), line.tell)


def _is_to_do_it_here(args: argparse.Namespace) -> bool:
    """Whether no service runs that may switch; root does it then, and no service of this machine has to stop for that.

    :raises Refused: the service un-merges pages at this moment
    """
    report = ask(args).result or {}
    if report.get("switch_allow") is True or text(part(report, "host"), "kind", HostKind.KERNEL) != HostKind.KERNEL:
        return False
    if running := part(report, "transaction", "running"):
        why = f"the service carries out a transaction ({text(running, 'who')})"
        raise Refused("switching merging", why, hint="try again when it is done; `ksmd-ctl status` shows it")
    return True


def _here(args: argparse.Namespace, order: SwitchOrder, line: ProgressLine) -> Outcome:
    from contextlib import ExitStack

    from ksmd_ctl.cli.change import local
    from ksmd_ctl.statefiles import HostLock, became_of
    from ksmd_ctl.switch.keep import SwitchJournal
    from ksmd_ctl.transactions.switching import Switching

    by = f"ksmd-ctl merge {order.words}, pid {os.getpid()}, uid {os.getuid()}"
    with ExitStack() as stack:
        # Not the lock of the host: a service holds that, and switches nothing meanwhile.
        here = stack.enter_context(local(args.host, args.root, args.config, by, change=False))
        journal = None
        if not order.dry_run:
            stack.enter_context(HostLock(Path(here.config.runtime_directory) / LOCK, by))
            journal = SwitchJournal(Path(here.config.state_directory), here.host.identity)
            if journal.damaged:
                what = f"{journal.path} could not be understood and {became_of(journal.path, journal.damaged)}"
                print(f"ksmd-ctl: {what}", file=sys.stderr)
        came, stopped = carry_out(Switching(here.host, order, here.limits, journal, by), line)
        document = came.document()
    if not order.dry_run and args.host is None:
        _log(document, by)
    return document, stopped


def _log(document: Mapping[str, object], by: str) -> None:
    """Tell the system log, as the service does."""
    import syslog

    syslog.openlog("ksmd-ctl", 0, syslog.LOG_AUTHPRIV)
    for line in lines(document):
        syslog.syslog(syslog.LOG_NOTICE, f"merge: {line} ({by})")


def lines(document: Mapping[str, object]) -> Iterator[Line]:
    """The lines for people of a document (docs/json.md)."""
    on, dry = bool(document.get("on")), bool(document.get("dry_run"))
    word = "on" if on else "off"
    for one in parts(document, "processes"):
        whose = f"{text(one, 'name')} (pid {number(one, 'pid')})"
        if error := part(one, "error"):
            yield Line("failed", f"{whose}: {text(error, 'why')}", BAD)
            continue
        if unmerged := number(one, "unmerged"):
            yield Line(
                "would" if dry else "un-merged", f"{'un-merge ' if dry else ''}{plural(unmerged, 'page')} of {whose}"
            )
        if not text(one, "how"):
            continue
        if dry:
            yield Line(
                "would", f"switch merging {word} for {whose}: {text(one, 'how')}; it is {_state(one, 'before')} now"
            )
            continue
        done = one.get("after") is not (not on)
        yield Line("switched" if done else "failed", f"{word} for {whose}: {text(one, 'how')}", GOOD if done else BAD)
        size, stopped = number(one, "mergeable_bytes") or 0, number(one, "stopped_seconds") or 0
        # The kernel's count of merged pages is as old as ksmd's last visit.
        merged = f", {plural(number(one, 'merging_pages') or 0, 'page')} merged" if size else ""
        now = f"{_state(one, 'after')}, it was {_state(one, 'before')}: {bytes_text(size)} mergeable{merged}"
        yield Line("now", now)
        yield Line("stopped", f"for {seconds_text(stopped)} at most at once")
        left = one.get("left")
        yield from (Line("left", str(cause), BAD) for cause in left) if isinstance(left, list) else ()
    if dry and not on:
        for room in parts(document, "room"):
            yield room_line(room, number(document, "floor_bytes"))
        if document.get("fits") is False:
            yield Line("verdict", "there is not enough room to un-merge it: this would be refused", BAD)
    if document.get("cancelled"):
        yield Line("stopped", "what was switched until then stays so", BAD)
    elif not dry and "persist" not in document:
        yield Line("note", "this lasts until the process ends: --persist says what belongs into its configuration")
    for setting in parts(document, "persist"):
        yield Line("next start", text(setting, "text"))
        yield from (Line("", line) for line in text(setting, "content").splitlines())
        if setting.get("written"):
            yield Line("written", f"{text(setting, 'path')}; systemd has read its units again", GOOD)


def _state(one: Mapping[str, object], key: str) -> str:
    state = one.get(key)
    return "on" if state is True else "off" if state is False else "on for a part"
