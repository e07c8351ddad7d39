# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl doctor``: why nothing merges, what is left on the table, who else writes, whether it is worth it."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO, TypeVar

from ksmd_ctl.cli.common import Parsers, add_command, add_config, add_source, seconds, write_json
from ksmd_ctl.cli.source import Answer, ask
from ksmd_ctl.cli.terminal import write_lines
from ksmd_ctl.errors import ExitCode, KsmdError
from ksmd_ctl.figures import bytes_text, count_text, plural, ratio_text, seconds_text
from ksmd_ctl.render.summary import BAD, GOOD, PLAIN, Line
from ksmd_ctl.reports.document import doubted, part, text

if TYPE_CHECKING:
    from pathlib import Path

    from ksmd_ctl.doctor.finding import Diagnosis, Figure, Finding, Unknown
    from ksmd_ctl.doctor.snapshot import Snapshot
    from ksmd_ctl.host.duplicates import DuplicatePages
    from ksmd_ctl.host.interface import Host

T = TypeVar("T")

# Somebody waits for it and nothing else: a census may take this much CPU time, and so many contents be compared.
_BUDGET_CPU_SECONDS = 2.0
_BUDGET_FRAMES = 1 << 18
# Where a process has so much empty address space, it matters whether the kernel walks it.
_SPARSE_BYTES = 1 << 30
# The service reads what is around ksmd each 5 s (`ksmd_ctl.privileged.host.SURROUNDINGS_SECONDS`).
_SECONDS = 5.5


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
        "--no-contents",
        action="store_true",
        help="do not compare memory contents to find equal pages (comparing needs root)",
    )


def run(args: argparse.Namespace, out: TextIO) -> int:
    from ksmd_ctl.codec import encode
    from ksmd_ctl.doctor.diagnose import diagnose
    from ksmd_ctl.doctor.lost import remember
    from ksmd_ctl.doctor.snapshot import write_advised

    answer = ask(args)
    seen = _look(args, answer)
    found = diagnose(seen, answer.note)
    advised, place = remember(seen, found.findings), _record(args, seen)
    if advised != seen.advised and place is not None:
        # What can't be kept is no reason not to say it.
        with suppress(KsmdError):
            write_advised(*place, advised)
    if args.json:
        write_json(encode(found), out)
    else:
        for index, block in enumerate(blocks(found)):
            out.write("\n" if index else "")
            write_lines(block, out)
    return ExitCode.DONE if found.healthy else ExitCode.CHECK_FAILED


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
        from ksmd_ctl.doctor.finding import Unknown

        self.unknown.append(Unknown(what, why, hint))


def _look(args: argparse.Namespace, answer: Answer) -> Snapshot:
    """Look at everything, and count meanwhile what ksmd tries to merge."""
    import dataclasses
    from pathlib import Path

    from ksmd_ctl.cli.host import counted_attempts, open_host
    from ksmd_ctl.doctor.snapshot import read_advised

    report = answer.result
    kind = text(part(report, "host"), "kind") if report else args.host
    with counted_attempts(args.root, kernel=kind != "engine") as attempts, open_host(kind, args.root) as host:
        seen = _of_service(args, report, host) if report else _of_host(args, answer.left, host)
        seen = dataclasses.replace(seen, attempts=attempts())
        if kind != "engine" and args.root == "/" and any(one.hole_bytes >= _SPARSE_BYTES for one in seen.processes):
            from ksmd_ctl.kernel.sparse_walk import seconds_per_gib

            seen = dataclasses.replace(seen, sparse_seconds_per_gib=seconds_per_gib())
        if kind != "engine" and args.root == "/":
            from ksmd_ctl.cli.memory_ksm import systemds_answer, units
            from ksmd_ctl.kernel.namespaces import container

            state, version = systemds_answer(Path("/"))
            seen = dataclasses.replace(
                seen, memory_ksm=state, systemd=version, memory_ksm_units=units(Path("/")), container=container()
            )
    place = _record(args, seen)
    if place is not None:
        with suppress(KsmdError):
            seen = dataclasses.replace(seen, advised=read_advised(*place))
    return seen


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


def _of_service(args: argparse.Namespace, before: Mapping[str, object], host: Host) -> Snapshot:
    """What a service shows; contents it doesn't: for these this process looks itself."""
    from ksmd_ctl.codec import encode_fields
    from ksmd_ctl.doctor.snapshot import ProcessView, Snapshot
    from ksmd_ctl.host.operation import finish

    began, tries = time.monotonic(), _Tries()
    nodes = tries("nodes", lambda: ask(args, "Nodes", "nodes").result)
    processes = tries("processes", lambda: ProcessView.all_of(ask(args, "Processes", "processes").result))
    # A simulated host of this process is not the service's.
    kernel = host.identity.kind == "kernel"
    duplicates = _duplicates(args, host, tries) if kernel else None
    after = before
    while time.monotonic() < began + args.interval or after is before:
        time.sleep(max(0.0, began + args.interval - time.monotonic()))
        after = ask(args).result or before
        if after is before:
            # It ended meanwhile: what it said is all that there is.
            break
    if kernel:
        # The service looks for them once a minute: who has ended since is not to be blamed.
        after = {**after, "writers": [encode_fields(one) for one in finish(host.writers())]}
    return Snapshot(before, after, time.monotonic() - began, nodes, processes, duplicates, unknown=tuple(tries.unknown))


def _of_host(args: argparse.Namespace, left: Mapping[str, object], host: Host) -> Snapshot:
    """What this process sees itself.

    :param left: what a service left changed
    """
    import dataclasses

    from ksmd_ctl.cli.host import floor_bytes, report_of
    from ksmd_ctl.doctor.snapshot import ProcessView, Snapshot
    from ksmd_ctl.errors import Absent
    from ksmd_ctl.host.operation import finish
    from ksmd_ctl.reports.numa import nodes_document, processes_document
    from ksmd_ctl.reports.report import document

    first, tries = host.sample(fresh=True), _Tries()
    before = document(report_of(host, [first], args.root))
    if isinstance(first.readings.get("run"), Absent):
        return Snapshot(before, before, 0.0)
    survey = tries("nodes and KSM pages", lambda: finish(host.survey(_BUDGET_CPU_SECONDS)))
    floor = floor_bytes(args.config)
    nodes = None if survey is None else nodes_document(host.identity, first, survey, floor)
    # Who isn't root sees at least their own.
    own = survey if survey is not None else tries("processes", lambda: finish(host.processes()))
    processes = None
    if own is not None:
        processes = ProcessView.all_of(processes_document(host.identity, own, first, survey))
    if host.identity.kind == "kernel" and os.geteuid() != 0:
        tries.refused("other users' processes", "only root sees all of them", "run it as root, or start the service")
    duplicates = _duplicates(args, host, tries)
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


def _duplicates(args: argparse.Namespace, host: Host, tries: _Tries) -> DuplicatePages | None:
    from ksmd_ctl.host.operation import finish

    if args.no_contents:
        return None
    found = tries("contents of memory", lambda: finish(host.duplicates(_BUDGET_FRAMES)))
    if found is not None and found.unread:
        whose = plural(found.unread, "process", "processes")
        tries.refused(f"contents of {whose}", "their memory could not be read", "`ksmd-ctl processes` names them")
    return found


# -- telling -----------------------------------------------------------------------------------------------


def blocks(diagnosis: Diagnosis) -> Iterator[Iterator[Line]]:
    """The lines for people: what was looked at, then a block a finding."""
    yield _head(diagnosis)
    for finding in diagnosis.findings:
        yield _finding(finding)


def _head(diagnosis: Diagnosis) -> Iterator[Line]:
    looked = diagnosis.looked
    if diagnosis.host.get("simulated"):
        yield Line("host", "SIMULATED: these figures are not about this machine", BAD)
    if looked.note:
        yield Line("service", looked.note)
    # Nobody is called healthy who could save more, whether the reason is known or not.
    healthy = diagnosis.healthy and not looked.unmerged_bytes
    yield Line("healthy" if healthy else "looked", _looked(diagnosis, healthy), GOOD if healthy else PLAIN)
    if looked.stale_text:
        yield Line("stale", looked.stale_text)


def _looked(diagnosis: Diagnosis, healthy: bool) -> str:
    host, looked = diagnosis.host, diagnosis.looked
    said = []
    if healthy:
        said.append("nothing is wrong" + (", as far as is known" if looked.unknown else ""))
    what = "the simulated host" if host.get("simulated") else f"kernel {text(host, 'release', 'unknown')}"
    said.append(f"{what}, for {seconds_text(looked.seconds)}")
    if looked.processes is not None:
        memory = bytes_text(looked.mergeable_bytes)
        said.append(f"{plural(looked.processes, 'process', 'processes')} with {memory} of mergeable memory")
    said.append(f"{plural(looked.merged_pages, 'page')} merged")
    if looked.saved_bytes is not None:
        least, most = looked.saved_bytes["from"], looked.saved_bytes["to"]
        saved = f"{bytes_text(most)} saved" if least == most else f"at most {bytes_text(most)} saved"
        said.append(doubted(saved, looked.stale_text))
    if looked.split_zero_bytes:
        said.append(f"{bytes_text(looked.split_zero_bytes)} more in pages of zeroes that splits of huge pages freed")
    contents = looked.contents
    if contents is not None and contents.frames:
        about = "" if contents.complete else "at least "
        many = plural(contents.apart, "identical page that is not merged", "identical pages that are not merged")
        more = f"{about}{many}" if contents.apart else "no identical pages that are not merged"
        more += f", {bytes_text(looked.unmerged_bytes)} to be saved" if looked.unmerged_bytes else ""
        said.append(f"contents of {plural(contents.frames, 'frame')} compared: {more}")
    return ", ".join(said)


def _finding(finding: Finding) -> Iterator[Line]:
    # "blocks merging", "loses saving", "costs", "note".
    label = finding.severity.partition(" ")[0]
    tone = BAD if label in ("blocks", "loses") else PLAIN
    yield Line(label, f"{finding.title} ({finding.code})", tone)
    if finding.evidence:
        yield Line("seen", _evidence(finding.evidence))
    if finding.advice:
        yield Line("advice", finding.advice)
    if finding.command:
        yield Line("command", finding.command)


def _evidence(figures: Sequence[Figure]) -> str:
    by_source: dict[str, list[str]] = {}
    for figure in figures:
        by_source.setdefault(figure.source, []).append(f"{figure.name} {_value(figure)}")
    return "; ".join(f"{', '.join(said)} ({source})" for source, said in by_source.items())


def _value(figure: Figure) -> str:
    value = figure.value
    if isinstance(value, str):
        return value
    match figure.unit:
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
        case unit:
            return f"{count_text(value)} {unit}".rstrip()
