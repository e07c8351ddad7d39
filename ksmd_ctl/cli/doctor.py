# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl doctor``: why nothing merges, what is left on the table, who else writes, whether it is worth it."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO, TypeVar

from ksmd_ctl.cli import source
from ksmd_ctl.cli.common import Parsers, add_command, add_config, add_source, seconds, write_json
from ksmd_ctl.cli.terminal import write_lines
from ksmd_ctl.errors import ExitCode, KsmdError
from ksmd_ctl.figures import bytes_text, count_text, plural, ratio_text, seconds_text
from ksmd_ctl.render.summary import BAD, GOOD, PLAIN, Line
from ksmd_ctl.reports.document import doubted, number, part, parts, text

if TYPE_CHECKING:
    from pathlib import Path

    from ksmd_ctl.doctor.finding import Finding
    from ksmd_ctl.doctor.snapshot import Snapshot, Unknown
    from ksmd_ctl.host.duplicates import DuplicatePages
    from ksmd_ctl.host.interface import Host
    from ksmd_ctl.host.operation import Operation

T = TypeVar("T")

# Somebody waits for it and nothing else: a census may take this much CPU time, and so many contents be compared.
_BUDGET_CPU_SECONDS = 2.0
_BUDGET_FRAMES = 1 << 18
# The service reads what is around ksmd each 5 s (`ksmd_ctl.privileged.host.SURROUNDINGS_SECONDS`).
_SECONDS = 5.5

_LABELS = {"blocks merging": "blocks", "loses saving": "loses", "costs": "costs", "note": "note"}


def add_parser(parsers: Parsers) -> None:
    parser = add_command(
        parsers, "doctor", "find out why nothing merges and what more could be saved, and say what to do"
    )
    add_source(parser)
    add_config(parser)
    parser.add_argument(
        "--interval",
        type=seconds(600),
        default=_SECONDS,
        metavar="SECONDS",
        help=f"take two samples this far apart (0.1 to 600, default {_SECONDS:g}); a longer time shows slower changes",
    )
    parser.add_argument(
        "--no-contents", action="store_true", help="do not compare memory contents to find equal pages (only root can)"
    )


def run(args: argparse.Namespace, out: TextIO) -> int:
    from ksmd_ctl.doctor.diagnose import diagnose, document

    found = source.from_service(args)
    seen = _look(args, found)
    diagnosed = diagnose(seen)
    findings = document(seen, diagnosed, found.note)
    _remember(args, seen, diagnosed)
    if args.json:
        write_json(findings, out)
    else:
        for index, block in enumerate(blocks(findings)):
            out.write("\n" if index else "")
            write_lines(block, out)
    return ExitCode.DONE if findings["healthy"] else ExitCode.CHECK_FAILED


# -- looking -----------------------------------------------------------------------------------------------


class _Tries:
    """Looks at what may be refused, and keeps what was."""

    def __init__(self) -> None:
        self.unknown: list[Unknown] = []

    def __call__(self, what: str, look: Callable[[], T]) -> T | None:
        try:
            return look()
        except KsmdError as error:
            self.refused(what, str(error), error.hint)
            return None

    def refused(self, what: str, why: str, hint: str) -> None:
        """Note that something could not be looked at."""
        from ksmd_ctl.doctor.snapshot import Unknown

        self.unknown.append(Unknown(what, why, hint))


def _look(args: argparse.Namespace, found: source.Found) -> Snapshot:
    """Look at everything, and count meanwhile what ksmd tries to merge."""
    import dataclasses

    from ksmd_ctl.cli.host import counted_attempts
    from ksmd_ctl.doctor.snapshot import read_advised

    report = found.document
    kernel = part(report, "host").get("kind") == "kernel" if report else args.host != "engine"
    with counted_attempts(args.root, kernel=kernel) as attempts:
        seen = _of_service(args, report) if report else _of_host(args, found.left)
        seen = dataclasses.replace(seen, attempts=attempts())
    place = _record(args, seen)
    if place is not None:
        with suppress(KsmdError):
            seen = dataclasses.replace(seen, advised=read_advised(*place))
    return seen


def _remember(args: argparse.Namespace, seen: Snapshot, findings: Iterable[Finding]) -> None:
    """Keep what was advised. What can't be kept is no reason not to say it."""
    from ksmd_ctl.doctor.lost import remember
    from ksmd_ctl.doctor.snapshot import write_advised

    advised, place = remember(seen, findings), _record(args, seen)
    if advised != seen.advised and place is not None:
        with suppress(KsmdError):
            write_advised(*place, advised)


def _record(args: argparse.Namespace, seen: Snapshot) -> tuple[Path, str] | None:
    """Where it is kept what was advised, and the boot that this is of; None for who isn't root, and the simulated."""
    from pathlib import Path

    from ksmd_ctl.config.loader import load

    host = part(seen.after, "host")
    if args.root != "/" or os.geteuid() != 0 or host.get("kind") != "kernel":
        return None
    try:
        return Path(load(args.config).state_directory), text(host, "boot_id")
    except KsmdError:
        return None


def _of_service(args: argparse.Namespace, before: Mapping[str, object]) -> Snapshot:
    """What a service shows; contents it doesn't: for these this process looks itself."""
    from ksmd_ctl.cli.host import open_host
    from ksmd_ctl.codec import encode_fields
    from ksmd_ctl.doctor.snapshot import ProcessView, Snapshot
    from ksmd_ctl.host.operation import finish

    began, tries = time.monotonic(), _Tries()
    nodes = tries("nodes", lambda: source.from_service(args, "Nodes", "nodes").document)
    processes = tries(
        "processes", lambda: ProcessView.all_of(source.from_service(args, "Processes", "processes").document)
    )
    duplicates = None
    if part(before, "host").get("kind") == "kernel":
        duplicates = _duplicates(args, lambda: open_host("kernel", args.root), tries)
    after = before
    while time.monotonic() < began + args.interval or after is before:
        time.sleep(max(0.0, began + args.interval - time.monotonic()))
        after = source.from_service(args).document or before
        if after is before:
            # It ended meanwhile: what it said is all that there is.
            break
    if part(before, "host").get("kind") == "kernel":
        # The service looks for them once a minute: who has ended since is not to be blamed.
        writers = [encode_fields(one) for one in finish(open_host("kernel", args.root).writers())]
        after = {**after, "writers": writers}
    return Snapshot(before, after, time.monotonic() - began, nodes, processes, duplicates, unknown=tuple(tries.unknown))


def _of_host(args: argparse.Namespace, left: Mapping[str, object]) -> Snapshot:
    """What this process sees itself.

    :param left: what a service left changed
    """
    import dataclasses

    from ksmd_ctl.cli.host import floor_bytes, open_host, report_of
    from ksmd_ctl.doctor.snapshot import ProcessView, Snapshot
    from ksmd_ctl.errors import Absent
    from ksmd_ctl.host.memory import Survey
    from ksmd_ctl.host.operation import finish
    from ksmd_ctl.reports.numa import nodes_document, processes_document
    from ksmd_ctl.reports.report import document

    host = open_host(args.host, args.root)
    first, tries = host.sample(fresh=True), _Tries()
    before = document(report_of(host, [first], args.root))
    if isinstance(first.readings.get("run"), Absent):
        return Snapshot(before, before, 0.0)
    survey: Survey | None = tries("nodes and KSM pages", lambda: finish(host.survey(_BUDGET_CPU_SECONDS)))
    floor = floor_bytes(args.config)
    nodes = None if survey is None else nodes_document(host.identity, first, survey, floor)
    # Who isn't root sees at least their own.
    own = survey.listed if survey is not None else tries("processes", lambda: finish(host.processes()))
    processes = None
    if own is not None:
        processes = ProcessView.all_of(processes_document(host.identity, own, first, survey))
    if host.identity.kind == "kernel" and os.geteuid() != 0:
        tries.refused("other users' processes", "only root sees all of them", "run it as root, or start the service")
    duplicates = _duplicates(args, lambda: host, tries)
    time.sleep(max(0.0, first.time_seconds + args.interval - host.clock()))
    last = host.sample(fresh=True)
    report = report_of(host, [first, last], args.root)
    journal, at_it = _transactions(args, host, tries)
    after = document(dataclasses.replace(report, transactions=journal, left_by_service=left or None))
    seconds = last.time_seconds - first.time_seconds
    return Snapshot(before, after, seconds, nodes, processes, duplicates, unknown=tuple(tries.unknown), holder=at_it)


def _transactions(args: argparse.Namespace, host: Host, tries: _Tries) -> tuple[Mapping[str, object] | None, str]:
    """The journal of transactions, and who holds the lock of this host."""
    from pathlib import Path

    from ksmd_ctl.cli.host import transactions
    from ksmd_ctl.config.loader import load
    from ksmd_ctl.statefiles import LOCK, holder

    # One that was named has to be right; the service's own is looked at as far as that can be.
    config = load(args.config) if args.config else tries("the configuration", load)
    if config is None or args.root != "/" or host.identity.kind != "kernel":
        return None, ""
    at_it = holder(Path(config.runtime_directory) / LOCK)
    return transactions(host, Path(config.state_directory)), at_it


def _duplicates(args: argparse.Namespace, host: Callable[[], Host], tries: _Tries) -> DuplicatePages | None:
    from ksmd_ctl.host.operation import finish

    if args.no_contents:
        return None

    def compare() -> Operation[DuplicatePages]:
        return host().duplicates(_BUDGET_FRAMES)

    found = tries("contents of memory", lambda: finish(compare()))
    if found is not None and found.unread:
        whose = plural(found.unread, "process", "processes")
        tries.refused(f"contents of {whose}", "their memory could not be read", "`ksmd-ctl processes` names them")
    return found


# -- telling -----------------------------------------------------------------------------------------------


def blocks(document: Mapping[str, object]) -> Iterator[Iterator[Line]]:
    """The lines for people of a document (docs/json.md): what was looked at, then a block a finding."""
    yield _head(document)
    for finding in parts(document, "findings"):
        yield _finding(finding)


def _head(document: Mapping[str, object]) -> Iterator[Line]:
    host, looked = part(document, "host"), part(document, "looked")
    if host.get("simulated"):
        yield Line("host", "SIMULATED: these figures are not about this machine", BAD)
    if text(looked, "note"):
        yield Line("service", text(looked, "note"))
    # Nobody is called healthy who could save more, whether the reason is known or not.
    healthy = document.get("healthy") is True and not number(looked, "unmerged_bytes")
    yield Line("healthy" if healthy else "looked", _looked(host, looked, healthy), GOOD if healthy else PLAIN)
    if text(looked, "stale_text"):
        yield Line("stale", text(looked, "stale_text"))


def _looked(host: Mapping[str, object], looked: Mapping[str, object], healthy: bool) -> str:
    said = []
    if healthy:
        said.append("nothing is wrong" + (", as far as is known" if looked.get("unknown") else ""))
    what = "the simulated host" if host.get("simulated") else f"kernel {text(host, 'release', 'unknown')}"
    said.append(f"{what}, for {seconds_text(number(looked, 'seconds') or 0)}")
    processes = number(looked, "processes")
    if processes is not None:
        memory = bytes_text(number(looked, "mergeable_bytes") or 0)
        said.append(f"{plural(processes, 'process', 'processes')} with {memory} of mergeable memory")
    said.append(f"{plural(number(looked, 'merged_pages') or 0, 'page')} merged")
    least, most = (number(part(looked, "saved_bytes"), end) for end in ("from", "to"))
    if least is not None and most is not None:
        said.append(f"{bytes_text(most)} saved" if least == most else f"at most {bytes_text(most)} saved")
        said[-1] = doubted(said[-1], text(looked, "stale_text"))
    frames, apart = (number(part(looked, "contents"), key) or 0 for key in ("frames", "apart"))
    if frames:
        about = "" if part(looked, "contents").get("complete") or not apart else "at least "
        more = f"{about}{plural(apart, 'duplicate')}" if apart else "no duplicates"
        unmerged = number(looked, "unmerged_bytes")
        more += f", {bytes_text(unmerged)} to be saved" if unmerged else ""
        said.append(f"contents of {plural(frames, 'frame')} compared: {more}")
    return ", ".join(said)


def _finding(finding: Mapping[str, object]) -> Iterator[Line]:
    severity = text(finding, "severity")
    tone = BAD if severity in ("blocks merging", "loses saving") else PLAIN
    yield Line(_LABELS.get(severity, severity), f"{text(finding, 'title')} ({text(finding, 'code')})", tone)
    seen = _evidence(parts(finding, "evidence"))
    if seen:
        yield Line("seen", seen)
    if text(finding, "advice"):
        yield Line("advice", text(finding, "advice"))
    if text(finding, "command"):
        yield Line("command", text(finding, "command"))


def _evidence(figures: list[Mapping[str, object]]) -> str:
    by_source: dict[str, list[str]] = {}
    for figure in figures:
        by_source.setdefault(text(figure, "source"), []).append(f"{text(figure, 'name')} {_value(figure)}")
    return "; ".join(f"{', '.join(said)} ({source})" for source, said in by_source.items())


def _value(figure: Mapping[str, object]) -> str:
    value, unit = number(figure, "value"), text(figure, "unit")
    if value is None:
        return text(figure, "value")
    match unit:
        case "bytes":
            return bytes_text(value)
        case "seconds":
            return seconds_text(value)
        case "seconds ago":
            return f"{seconds_text(value)} ago"
        case "ratio":
            return ratio_text(value)
        case "pages":
            return plural(value, "page")
        case _:
            return f"{count_text(value)} {unit}".rstrip()
