# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl domains assign``: limits units of domains to their nodes until the next start, and moves their memory."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from ksmd_ctl.cli import migrate, unmerge
from ksmd_ctl.cli.common import Parsers, add_command, add_config, add_source, write_json
from ksmd_ctl.cli.domains_plan import configured
from ksmd_ctl.cli.terminal import list_text, write_lines
from ksmd_ctl.errors import Absent, ExitCode, KsmdError, Refused, UsageError
from ksmd_ctl.figures import plural
from ksmd_ctl.render.summary import BAD, GOOD, Line
from ksmd_ctl.reports.document import number, parts, text

if TYPE_CHECKING:
    from ksmd_ctl.config.domains import Domain, Domains
    from ksmd_ctl.host.interface import Host
    from ksmd_ctl.host.memory import Process
    from ksmd_ctl.transactions.assignment import DomainUnit

#: In the runtime directory: two assignments never overlap.
LOCK = "assign-lock"
_WHAT = "assigning nodes"


def add_parser(parsers: Parsers) -> argparse.ArgumentParser:
    parser = add_command(
        parsers,
        "assign",
        "limit the systemd units of domains to their nodes until the next start, and move their memory there",
        hosts=("kernel",),
        host_help="this machine's kernel",
    )
    add_source(parser)
    parser.add_argument("names", nargs="*", metavar="DOMAIN", help="the domains; with --undo, none is all")
    parser.add_argument("--dry-run", action="store_true", help="only print what would be limited and moved")
    parser.add_argument(
        "--undo", action="store_true", help="give units the limits back that they had before; memory stays where it is"
    )
    add_config(parser)
    return parser


def run(args: argparse.Namespace, out: TextIO) -> int:
    from ksmd_ctl.cli.host import open_host
    from ksmd_ctl.cli.systemctl import Systemctl
    from ksmd_ctl.config.loader import load
    from ksmd_ctl.host.knobs import Knob
    from ksmd_ctl.host.operation import finish
    from ksmd_ctl.statefiles import HostLock, became_of
    from ksmd_ctl.transactions.assignment import Assignments, need_room

    if not (args.names or args.undo) or (args.dry_run and args.undo):
        why = "it takes domains, or --undo, which has no dry run"
        raise UsageError("reading the command line", why, hint="ksmd-ctl domains assign DOMAIN")
    config = load(args.config)
    domains = None if args.undo else configured(config, args.names)
    manager = Systemctl(Path(args.root))
    with open_host(None, args.root) as host:
        units, outside = ([], []) if domains is None else units_of(host, domains, args.names)
        rooms = finish(host.inventory(config.floor_bytes)).demands if units else ()
        free = {int(room.where[5:]): room.free_bytes for room in rooms if room.where.startswith("node ")}
        need_room(units, free, host.identity.page_size_bytes)
        found: list[dict[str, object]] = [
            {
                "unit": unit.unit,
                "domain": unit.domain,
                "nodes": sorted(unit.nodes),
                "processes": len(unit.processes),
                "elsewhere": unit.elsewhere_pages,
            }
            for unit in units
        ]
        undone: tuple[str, ...] = ()
        if not args.dry_run:
            with HostLock(Path(config.runtime_directory) / LOCK, "ksmd-ctl domains assign"):
                everywhere = frozenset(node.number for node in host.topology().with_memory())
                kept = Assignments(Path(config.state_directory), host.identity, everywhere)
                if kept.damaged:
                    _say(f"{kept.path} could not be understood and {became_of(kept.path, kept.damaged)}")
                if back := kept.undo(manager, lambda _, one: not one.done):
                    _say(f"an assignment was interrupted: {', '.join(back)} is as before it")
                if args.undo:
                    undone = kept.undo(manager, lambda _, one: not args.names or one.domain in args.names)
                # Before there is a limit: with it the kernel moves merged pages, and so those of other domains.
                for one, unit in zip(found, units, strict=True):
                    one["unmerge"] = _unmerged(args, unit, free)
                kept.assign(manager, units)
                for one, unit in zip(found, units, strict=True):
                    one.update(_moved(args, unit, free))
        document = {
            "format": 1,
            "dry_run": args.dry_run,
            "units": found,
            "outside": [{"pid": one.id.pid, "name": one.name} for one in outside],
            "undone": list(undone),
            "merge_across_nodes": host.sample().knob(Knob.MERGE_ACROSS_NODES),
        }
    if args.json:
        write_json(document, out)
    else:
        write_lines(lines(document), out)
    return exit_code(document)


def _say(text: str) -> None:
    print(f"ksmd-ctl: {text}", file=sys.stderr)


def units_of(host: Host, domains: Domains, names: Sequence[str]) -> tuple[list[DomainUnit], list[Process]]:
    """The units of some domains, and members of theirs that are in none.

    :raises Absent: this host can't limit anybody to nodes
    :raises UsageError: a domain's nodes are not there
    :raises Refused: a domain has no nodes or no member, or a unit has processes of several domains
    """
    from ksmd_ctl.domains.members import domains_of, slices_of
    from ksmd_ctl.host.operation import finish
    from ksmd_ctl.transactions.assignment import DomainUnit, is_unit_name

    def is_in(process: Process, unit: str) -> bool:
        return process.unit == unit or unit in slices_of(process.cgroup)

    if not finish(host.placements(())).cpusets:
        raise Absent(_WHAT, "this kernel has no cpuset controller", hint="it needs CONFIG_CPUSETS")
    listed = domains_of(domains, finish(host.processes()).processes)
    found: list[DomainUnit] = []
    outside: list[Process] = []
    for domain, members in ((one.domain, one.processes) for one in listed):
        if domain is None or domain.name not in names:
            continue
        _check(host, domain)
        if not members:
            hint = "`ksmd-ctl domains` shows who belongs to which; [domains] in the configuration says so"
            raise Refused(_WHAT, f"the domain {domain.name} has no member with mergeable memory", hint=hint)
        by_unit: dict[str, list[Process]] = {}
        for process in members:
            # A slice also limits what is started in it later.
            unit = next((one for one in domain.slices if is_in(process, one)), process.unit)
            by_unit.setdefault(unit, []).append(process)
        for unit, own in by_unit.items():
            if not is_unit_name(unit):
                outside += own
                continue
            others = [
                one.name for one in listed if one.domain is not domain and any(is_in(p, unit) for p in one.processes)
            ]
            if others:
                why = f"{unit} has processes of {domain.name} and of {', '.join(others)}"
                raise Refused(_WHAT, why, hint="a unit is limited as a whole: give each domain units of its own")
            found.append(DomainUnit(unit, domain.name, domain.nodes, tuple(own)))
    return found, outside


def _check(host: Host, domain: Domain) -> None:
    from ksmd_ctl.transactions.migration import check_target

    topology, hint = host.topology(), "`ksmd-ctl domains plan` proposes nodes"
    if not domain.nodes:
        raise Refused(_WHAT, f"the domain {domain.name} has no nodes in the configuration", hint=hint)
    if len(topology.with_memory()) < 2:
        raise Refused(_WHAT, "this host has one node, and that separates nothing", hint=hint)
    for node in sorted(domain.nodes):
        check_target(topology, node, f"limiting the domain {domain.name}")


def _unmerged(args: argparse.Namespace, unit: DomainUnit, free: Mapping[int, int]) -> list[Mapping[str, object]]:
    """Un-merge what lies on other nodes than the unit's; the documents of that."""
    from ksmd_ctl.transactions.unmerging import UnmergeOrder

    names = {one.unit for one in unit.processes if not one.nodes.keys() <= unit.nodes}
    keep = tuple(sorted(unit.nodes))
    to = max(keep, key=lambda node: free.get(node, 0))
    return [_whole(unmerge.unmerged(args, UnmergeOrder(unit=name, to=to, keep=keep))) for name in sorted(names)]


def _moved(args: argparse.Namespace, unit: DomainUnit, free: Mapping[int, int]) -> dict[str, object]:
    """Move what is still elsewhere: the documents of that, and what failed."""
    from ksmd_ctl.transactions.migration import MigrationOrder

    keep = tuple(sorted(unit.nodes))
    to = max(keep, key=lambda node: free.get(node, 0))
    found, errors = [], []
    for name in sorted({one.unit for one in unit.processes}):
        try:
            found.append(_whole(migrate.migrated(args, MigrationOrder(to, unit=name, keep=keep))))
        except KsmdError as error:
            errors.append(str(error))
    return {"migrate": found, "errors": errors}


def _whole(came: tuple[Mapping[str, object], bool]) -> Mapping[str, object]:
    document, stopped = came
    if stopped:
        raise KeyboardInterrupt
    return document


def exit_code(document: Mapping[str, object]) -> ExitCode:
    """The exit code that a document stands for; of a dry run the one that it would end with now."""
    from ksmd_ctl.transactions.migration import exit_code

    units = parts(document, "units")
    moved = [exit_code(one) for unit in units for one in parts(unit, "migrate")]
    failed = any(moved) or any(unit.get("errors") for unit in units) or document.get("outside")
    return ExitCode.CHECK_FAILED if failed else ExitCode.DONE


def lines(document: Mapping[str, object]) -> Iterator[Line]:
    """The lines for people of a document (docs/json.md)."""
    units, undone = parts(document, "units"), document.get("undone")
    for one in units:
        nodes, errors = one.get("nodes"), one.get("errors")
        listed = list_text(nodes) if isinstance(nodes, list) else "?"
        said = f"{text(one, 'unit')} ({text(one, 'domain')}) to node {listed}"
        elsewhere = plural(number(one, "elsewhere") or 0, "page")
        if document.get("dry_run"):
            yield Line("would", f"limit {said}, and move {elsewhere}")
            continue
        yield Line("limited", f"{said}; {elsewhere} were elsewhere", GOOD)
        for inner in parts(one, "unmerge"):
            yield from unmerge.lines(inner)
        for inner in parts(one, "migrate"):
            yield from (Line("moved", line.strip()) for line in migrate.lines(inner))
        yield from (Line("failed", str(error), BAD) for error in errors) if isinstance(errors, list) else ()
    for one in parts(document, "outside"):
        who = f"{text(one, 'name')} (pid {number(one, 'pid')})"
        yield Line("left", f"{who} is in no unit of systemd: limit its control group", BAD)
    if not units:
        yield Line(
            "undone", ", ".join(map(str, undone)) if isinstance(undone, list) and undone else "nothing was assigned"
        )
    elif document.get("merge_across_nodes") == 1:
        yield Line("note", "merge_across_nodes is 1: equal pages of all nodes merge until `ksmd-ctl set` makes it 0")
