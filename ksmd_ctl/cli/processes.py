# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl processes``: who gains how much from merging, and of which class each process is."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TextIO

from ksmd_ctl.cli.common import Parsers, add_command, add_process, add_source, whole_number
from ksmd_ctl.cli.source import show, survey_text
from ksmd_ctl.cli.terminal import UNKNOWN, WIDTH, Column, bytes_or_unknown, count_or_unknown, table
from ksmd_ctl.errors import KsmdError, Refused, UsageError
from ksmd_ctl.figures import LOW_YIELD_PAGES, plural, ratio_text
from ksmd_ctl.render.switched import switched_texts
from ksmd_ctl.reports.document import doubted, number, part, parts, text

_COLUMNS = (
    Column("pid", right=True),
    Column("name", wraps=True),
    Column("group", wraps=True),
    Column("merged pages", right=True),
    Column("saved", right=True),
    Column("share", right=True),
    Column("freed zeroes", right=True),
    Column("home"),
    Column("away from home", right=True),
    Column("on nodes", wraps=True),
    Column("class", wraps=True),
)
_GROUP, _SHARE, _FREED, _CLASS = 2, 5, 6, 10
_NUMA = frozenset({7, 8, 9})

# Of a name within a sentence: a process may have one of 100 characters without a blank.
_NAME_WIDTH = 40

# Whoever isn't root may not look at hundreds.
_FEW = 5

# Marks a saving that says too much.
_FORKED = "*"


def add_parser(parsers: Parsers) -> None:
    parser = add_command(
        parsers, "processes", "show what each process saves by merging, and what kind of memory it has"
    )
    add_source(parser)
    parser.add_argument(
        "--sort",
        choices=tuple(_KEYS),
        help="order: what un-merging it takes, share of the host's saving, most merged pages, or name "
        "(default: saved, docs/saving.md)",
    )
    parser.add_argument("--top", type=whole_number(1), metavar="N", help="show only the first N; the total is of all")
    parser.add_argument(
        "--all",
        action="store_true",
        help="also show processes that have only shared or hugetlb memory, which never merges",
    )
    add_process(parser, "only this process", "only the processes of a systemd unit", required=False)


def _by(key: str) -> Callable[[Mapping[str, object]], tuple[bool, float, str]]:
    # What isn't known comes last: a saving may be below 0.
    return lambda process: (number(process, key) is None, -(number(process, key) or 0), text(process, "name"))


_KEYS: dict[str, Callable[[Mapping[str, object]], tuple[bool, float, str]]] = {
    "saved": _by("saved_bytes"),
    "share": _by("share_bytes"),
    "merged": _by("merging_pages"),
    "name": lambda process: (False, 0, text(process, "name")),
}


def run(args: argparse.Namespace, out: TextIO) -> int:
    def chosen(document: Mapping[str, object]) -> Mapping[str, object]:
        # The first N of JSON are those of the table; without N its order is the document's.
        sort = args.sort or (None if args.json and args.top is None else "saved")
        found = choose(document, sort=sort, pid=args.pid, unit=args.unit, everything=args.all)
        if args.pid is not None and not (parts(found, "processes") or parts(found, "unmergeable")):
            raise _nothing_of(args, document)
        return {**found, "processes": parts(found, "processes")[: args.top]} if args.json else found

    def shown(document: Mapping[str, object]) -> Iterator[str]:
        return lines(document, args.top, everything=args.all)

    return show(args, out, "Processes", "processes", _look, shown, chosen)


def choose(
    document: Mapping[str, object],
    *,
    sort: str | None = None,
    pid: int | None = None,
    unit: str = "",
    everything: bool = False,
) -> Mapping[str, object]:
    """A document with some of its processes, sorted where that is asked for.

    :param everything: processes without mergeable memory are meant, too
    :raises Refused: a unit has no process that could be shown
    """
    found, others = parts(document, "processes"), parts(document, "unmergeable")
    if pid is not None:
        found, others = ([one for one in some if number(one, "pid") == pid] for some in (found, others))
        # Without --all they only say why there is nothing to be shown.
        others = others if everything else []
    if unit:
        from ksmd_ctl.transactions.migration import unit_name

        name = unit_name(unit)
        found, others = ([one for one in some if text(one, "unit") == name] for some in (found, others))
        if not (found or (everything and others)):
            why = f"no process of unit {name} has mergeable memory"
            if others:
                why += f": process {number(others[0], 'pid')} has {text(others[0], 'reason')}"
            raise Refused("looking for the unit", why, hint="see `ksmd-ctl processes --all`")
    return {
        **document,
        "processes": list(found) if sort is None else sorted(found, key=_KEYS[sort]),
        "unmergeable": list(others),
    }


def _nothing_of(args: argparse.Namespace, document: Mapping[str, object]) -> KsmdError:
    """Why there is nothing to be shown of the process that was named: it isn't there, can't be read, has nothing."""
    what, pid = "looking for the process", args.pid
    hint = "see `ksmd-ctl processes --all`"
    for other in parts(document, "unmergeable"):
        if number(other, "pid") == pid:
            return Refused(what, f"process {pid} has no mergeable memory: it has {text(other, 'reason')}", hint=hint)
    from ksmd_ctl.cli.host import open_host
    from ksmd_ctl.host.memory import Skipped
    from ksmd_ctl.transactions.migration import named_process, unreadable

    skipped = [
        Skipped(pid, text(one, "name"), text(one, "why"))
        for one in parts(document, "skipped")
        if number(one, "pid") == pid
    ]
    if (error := unreadable(what, pid, skipped, _denied(document))) is not None:
        return error

    with open_host(text(part(document, "host"), "kind") or args.host, args.root) as host:
        try:
            named_process(host, pid)
        except UsageError as gone:
            return gone
    why = f"process {pid} has no mergeable memory: neither madvise nor prctl asked for it"
    return Refused(what, why, hint="`ksmd-ctl doctor` says how processes ask for it")


def _look(args: argparse.Namespace) -> Mapping[str, object]:
    from ksmd_ctl.cli.host import folders, kept_switches, open_host
    from ksmd_ctl.host.operation import finish
    from ksmd_ctl.reports.numa import processes_document

    where = folders(args)
    with open_host(args.host, args.root) as host:
        # No survey: who isn't root sees at least their own processes like this.
        listed = finish(host.processes())
        switched = kept_switches(host, where, listed.processes)
        return processes_document(host.identity, listed, host.sample(), switched=switched)


def lines(document: Mapping[str, object], top: int | None = None, *, everything: bool = False) -> Iterator[str]:
    """The lines for people of a document (docs/json.md); of the first `top` processes, and the total of all.

    :param everything: also processes without mergeable memory
    """
    if part(document, "host").get("simulated"):
        yield "SIMULATED: these processes are not on this machine"
    processes = parts(document, "processes")
    others = parts(document, "unmergeable") if everything else []
    if not processes:
        yield "no process has mergeable memory"
    if processes or others:
        rows = [_row(process) for process in processes[:top]] + [_other_row(process) for process in others]
        kept = [index for index in range(len(_COLUMNS)) if index not in _needless(processes, rows)]
        yield from table([_COLUMNS[index] for index in kept], [[row[index] for index in kept] for row in rows], WIDTH)
        yield from _reasons([*processes[:top], *others])
    if processes:
        yield _total(processes, text(document, "stale_text"))
        yield from _of_the_host(part(document, "total"))
    yield from _prevented(processes)
    if stale := text(document, "stale_text"):
        yield f"stale: {stale}"
    for process in processes:
        if gone := _gone(process):
            yield f"{_called(process)}: the kernel still counts {plural(gone, 'page')} as merged that are not any more"
    forked = [process for process in processes if number(process, "relatives") and number(process, "merging_pages")]
    if forked:
        pages = sum(int(number(process, "merging_pages") or 0) for process in forked)
        most = max(int(number(process, "merging_pages") or 0) for process in forked)
        yield (
            f"{_FORKED} {plural(len(forked), 'process', 'processes')} may be forks of one another. Their "
            f"{plural(pages, 'merged page')} may include pages that fork already shared; the real saving may be below "
            f"{plural(most, 'page')}."
        )
    for process in parts(document, "skipped"):
        yield f"not shown: {_called(process)}: {text(process, 'why')}"
    for said, _ in switched_texts(document, None):
        yield f"switched {said}"
    denied = _denied(document)
    if denied:
        which = f" (pid {', '.join(map(str, denied))})" if len(denied) <= _FEW else ""
        yield f"not shown: {plural(len(denied), 'process', 'processes')} that this user may not look at{which}"
    said = survey_text(document)
    if said:
        yield said


def _denied(document: Mapping[str, object]) -> list[int]:
    """Pids of processes that may not be looked at."""
    found = document.get("denied")
    return [pid for pid in found if isinstance(pid, int)] if isinstance(found, list) else []


def _needless(processes: Sequence[Mapping[str, object]], rows: Sequence[Sequence[str]]) -> set[int]:
    """Columns that say nothing here; a line has no room for all that there are."""
    needless = set()
    if not any(row[_GROUP] for row in rows):
        # Each is what it is called.
        needless.add(_GROUP)
    if not any(number(process, "split_zero_pages") for process in processes):
        needless.add(_FREED)
    if len({node for process in processes for node in part(process, "nodes")}) <= 1:
        return needless | _NUMA
    needless.add(_FREED)
    if all(row[_CLASS] == "mergeable" for row in rows):
        return needless | {_CLASS}
    return needless | {_SHARE}


def _gone(process: Mapping[str, object]) -> int:
    """Pages that the kernel counts as merged, and that page tables show are not any more."""
    counted, mapped = number(process, "merging_pages"), number(process, "ksm_mapped_pages")
    return 0 if counted is None or mapped is None else max(0, int(counted - mapped))


def _of_the_host(total: Mapping[str, object]) -> Iterator[str]:
    """What the host saves, by one definition with the shares of its processes."""
    frames, share, other, freed = (
        number(total, key) for key in ("saved_frames_bytes", "share_bytes", "other_bytes", "split_zero_pages")
    )
    if frames is None:
        return
    said = f"the host saves {bytes_or_unknown(frames)} in frames"
    if freed:
        said += f", {plural(freed, 'page')} of zeroes that splits of huge pages freed among them"
    if share is not None and other is not None:
        said += f": {bytes_or_unknown(share)} are the shares of its processes"
        if other:
            said += f", {bytes_or_unknown(other)} are left over"
    yield said


def _prevented(processes: Sequence[Mapping[str, object]]) -> Iterator[str]:
    """Processes with huge pages that were split for few pages, the worst first."""
    having = [one for one in processes if number(one, "low_yield_blocks")]
    for one in sorted(having, key=lambda one: -(number(one, "low_yield_blocks") or 0))[:_FEW]:
        keys = ("split_blocks", "split_block_pages", "low_yield_blocks")
        blocks, pages, low = (number(one, key) or 0 for key in keys)
        yield (
            f"{_called(one)}: {plural(blocks, 'block')} of 2 MiB not huge because of merging, which saves "
            f"{plural(pages, 'page')} there; {plural(low, 'block')} save fewer than {LOW_YIELD_PAGES} each"
        )


def _total(processes: Sequence[Mapping[str, object]], stale_text: str) -> str:
    merged = [found - _gone(one) for one in processes if (found := number(one, "merging_pages")) is not None]
    saved = [found for one in processes if (found := number(one, "saved_bytes")) is not None]
    said = f"total: {plural(len(processes), 'process', 'processes')}, "
    said += f"{'' if len(merged) == len(processes) else 'at least '}{plural(sum(merged), 'merged page')}, "
    unknown = len(processes) - len(saved)
    if not saved:
        return f"{said}the saving is unknown: this kernel does not report it (docs/saving.md)"
    said += f"{bytes_or_unknown(sum(saved))} saved (each un-merged alone)"
    if unknown:
        said += f", not counting {plural(unknown, 'process', 'processes')} whose saving is unknown"
    return f"{doubted(said, stale_text)} (docs/saving.md)"


def _row(process: Mapping[str, object]) -> list[str]:
    saved = bytes_or_unknown(number(process, "saved_bytes"))
    if number(process, "relatives") and number(process, "merging_pages"):
        saved += _FORKED
    home, remote, ratio = (number(process, key) for key in ("home", "remote_pages", "remote_ratio"))
    away = count_or_unknown(remote)
    if remote and ratio is not None:
        away += f" ({ratio_text(ratio)})"
    nodes, merged = part(process, "nodes"), number(process, "merging_pages")
    name, group = text(process, "name", UNKNOWN), text(process, "group", UNKNOWN)
    return [
        count_or_unknown(number(process, "pid")).replace(",", ""),
        name,
        "" if group == name else group,
        count_or_unknown(None if merged is None else merged - _gone(process)),
        saved,
        bytes_or_unknown(number(process, "share_bytes")),
        count_or_unknown(number(process, "split_zero_pages")),
        "-" if home is None else str(home),
        away,
        ", ".join(f"{node}:{count_or_unknown(number(nodes, node))}" for node in nodes) or "-",
        _class(process),
    ]


def _other_row(process: Mapping[str, object]) -> list[str]:
    """One without mergeable memory: nothing of it is merged, and it belongs nowhere."""
    pid = count_or_unknown(number(process, "pid")).replace(",", "")
    return [pid, text(process, "name", UNKNOWN), text(process, "unit"), "0", *["-"] * 6, _class(process)]


def _class(process: Mapping[str, object]) -> str:
    classes = process.get("classes")
    return ", ".join(map(str, classes)) if isinstance(classes, list) else UNKNOWN


def _reasons(processes: Iterable[Mapping[str, object]]) -> Iterator[str]:
    """Why processes are of another class than mergeable."""
    for process in processes:
        reason = text(process, "reason")
        if reason and process.get("classes") != ["mergeable"]:
            yield f"{_called(process)}: {reason}"


def _called(process: Mapping[str, object]) -> str:
    name = text(process, "name", UNKNOWN)
    return f"pid {number(process, 'pid')} ({name if len(name) <= _NAME_WIDTH else name[: _NAME_WIDTH - 1] + '~'})"
