# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl replay``: a recording on the simulated host, its knobs as recorded or others, beside what was recorded."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

from ksmd_ctl.cli.common import ENDING, Parsers, add_command, add_config, handling, interrupt
from ksmd_ctl.cli.report import add_recording, every, show, write_html
from ksmd_ctl.cli.terminal import (
    WIDTH,
    Column,
    ProgressLine,
    bytes_or_unknown,
    count_or_unknown,
    more,
    table,
    text_width,
)
from ksmd_ctl.errors import ExitCode, UsageError, did_you_mean
from ksmd_ctl.figures import bytes_text, seconds_text
from ksmd_ctl.render.recording import choices_text, difference_text, host_lines, sampling_text, unseen_text
from ksmd_ctl.reports.document import number, part, parts, text

if TYPE_CHECKING:
    from ksmd_ctl.config.model import Config
    from ksmd_ctl.host.knobs import Knob, KnobValue

_ROWS = 16
# Of a recording that is shorter, tenths of seconds are told.
_SHORT_SECONDS = 100.0
_POLICIES = ("observe", "fixed", "ksmtuned", "kubevirt", "kernel", "adaptive")

_COLUMNS = (
    Column("at", right=True),
    Column("KSM pages", right=True),
    Column("replayed", right=True),
    Column("sharing", right=True),
    Column("replayed", right=True),
    Column("saved", right=True),
    Column("replayed", right=True),
    Column("ksmd CPU", right=True),
    Column("replayed", right=True),
)

_DOMAINS = (
    Column("domain", wraps=True),
    Column("processes", right=True),
    Column("merged at the end", right=True),
    Column("with other domains", right=True),
)
_DOMAINS_SHOWN = 12


def add_parser(parsers: Parsers) -> None:
    parser = add_command(
        parsers,
        "replay",
        "play a recording on the simulated host, with the knobs as recorded or others, and compare",
        hosts=(),
    )
    add_recording(parser)
    parser.add_argument("words", nargs="*", metavar="KNOB=VALUE", help="a knob that has this value all the time")
    parser.add_argument("--policy", choices=_POLICIES, help="the policy that decides about the knobs")
    parser.add_argument(
        "--apart",
        action="store_true",
        help="keep the recorded trust domains apart: each on nodes of its own, with merge_across_nodes = 0",
    )
    parser.add_argument("--profile", default="", metavar="NAME", help="the engine's profile (default: as recorded)")
    add_config(parser)


def run(args: argparse.Namespace, out: TextIO) -> int:
    from ksmd_ctl.codec import encode_fields
    from ksmd_ctl.recording.reader import Recording
    from ksmd_ctl.render.recording import replay_page
    from ksmd_ctl.replay.comparison import replay_report
    from ksmd_ctl.replay.player import Choices, Player, Point
    from ksmd_ctl.reports.recording import recorded_host

    knobs, config = _knobs(args.words), _config(args)
    stopped = False
    with Recording(args.recording) as recording, handling(ENDING, interrupt), ProgressLine(sys.stderr) as line:
        line.say("reading the recording")
        if args.apart:
            knobs = _apart(knobs, recording.facts.profile if not args.profile else args.profile)
        player = Player(recording, Choices(knobs, config, args.profile, args.apart))
        points: list[Point] = []
        try:
            for point in player.play():
                points.append(point)
                line.at(round(point.recorded.time_seconds), round(player.samples[-1].time_seconds), "seconds")
        except KeyboardInterrupt:
            if not points:
                sys.stderr.write("interrupted before anything was replayed\n")
                raise
            stopped = True
        host = recorded_host(recording.facts, recording.nodes(), player.samples)
    profile = player.host.machine.ksm.profile.name
    chosen = {knob.value: value for knob, value in knobs.items()}
    policy = "" if config is None else str(config.policy)
    found = replay_report(
        host,
        profile,
        chosen,
        policy,
        points,
        tuple(player.refused),
        player.sampling_error,
        apart=args.apart,
        # In the middle of a scan nobody knows.
        domains=() if stopped else player.domain_pages(),
    )
    document = encode_fields(found)
    if args.html is not None:
        write_html(args.html, args.recording, replay_page(document))
    show(args, out, document, lines(document, text_width(out)))
    if stopped:
        replayed, recorded = points[-1].recorded.time_seconds, player.samples[-1].time_seconds
        sys.stderr.write(f"stopped: {seconds_text(replayed)} of {seconds_text(recorded)} were replayed\n")
    return ExitCode.INTERRUPTED if stopped else ExitCode.DONE


def _knobs(words: Sequence[str]) -> dict[Knob, KnobValue]:
    """What the command line says of knobs.

    :raises UsageError: it is not of the form, or no knob that the engine simulates
    """
    from ksmd_ctl.host.knobs import SYSFS_KNOBS, Knob, parse_wanted

    found: dict[Knob, KnobValue] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise UsageError("reading the command line", f"{word[:40]!r} is not KNOB=VALUE", hint="as in smart_scan=0")
        if name not in SYSFS_KNOBS:
            why = f"{name[:40]!r} is no knob{did_you_mean(name, SYSFS_KNOBS)}"
            raise UsageError("reading the command line", why, hint=f"knobs are {', '.join(SYSFS_KNOBS)}")
        if name in found:
            raise UsageError("reading the command line", f"{name} is given twice", hint="give it once")
        try:
            found[Knob(name)] = parse_wanted(Knob(name), value)
        except ValueError as error:
            raise UsageError("reading the command line", f"{name}: {error}", hint="ksmd-ctl replay --help") from error
    return found


def _apart(knobs: Mapping[Knob, KnobValue], profile: str) -> dict[Knob, KnobValue]:
    """The knobs with those that keep nodes apart (docs/domains.md).

    :raises UsageError: another value was given
    """
    from ksmd_ctl.engine.profile import PROFILES
    from ksmd_ctl.host.knobs import Knob

    needed: dict[Knob, KnobValue] = {Knob.MERGE_ACROSS_NODES: 0, Knob.USE_ZERO_PAGES: 0}
    for knob, value in needed.items():
        if knobs.get(knob, value) != value:
            why = f"--apart needs {knob} = {value}"
            raise UsageError("reading the command line", why, hint=f"leave out {knob}, or --apart")
    known = PROFILES[profile].knobs if profile in PROFILES else needed.keys()
    return {**knobs, **{knob: value for knob, value in needed.items() if knob in known}}


def _config(args: argparse.Namespace) -> Config | None:
    """The configuration whose policy decides; None for the knobs as recorded.

    :raises ConfigError: one was named, and it is wrong
    """
    if args.policy is None and args.config is None:
        return None
    from ksmd_ctl.config.loader import load
    from ksmd_ctl.config.model import Config, PolicyName

    config = Config() if args.config is None else load(args.config)
    if args.policy is not None:
        config = dataclasses.replace(config, policy=PolicyName(args.policy))
    if config.policy is PolicyName.FIXED and not config.knobs:
        why = "there is no configuration" if args.config is None else f"{args.config} has none"
        hint = "--config FILE names one with [knobs]; or give KNOB=VALUE without --policy"
        raise UsageError("choosing the policy", f'policy "fixed" holds what [knobs] says, and {why}', hint=hint)
    return config


def lines(document: Mapping[str, object], width: int = WIDTH) -> Iterator[str]:
    """The lines for people of a replay (docs/json.md); tables are made narrower for the width."""
    yield from host_lines(part(document, "recording"))
    yield f"replayed with {choices_text(document)}, profile {text(document, 'profile')}"
    yield ""
    points = every(parts(document, "timeline"), _ROWS)
    digits = 0 if points and (number(points[-1], "seconds") or 0.0) >= _SHORT_SECONDS else 1
    yield from table(_COLUMNS, [_row(point, digits) for point in points], width)
    yield ""
    for side in ("recorded", "replayed"):
        found = part(document, side)
        saved, cpu = number(found, "saved_bytes"), number(found, "ksmd_cpu_seconds")
        mean = "an unknown amount" if saved is None else bytes_text(saved)
        spent = "unknown CPU time" if cpu is None else f"{cpu:.2f} s"
        yield f"{side:<10} {mean} saved in the mean, {spent} of ksmd"
    yield f"difference {difference_text(document)} (pages_sharing)"
    if unseen := unseen_text(document):
        yield f"note       {unseen}"
    if expected := sampling_text(document):
        yield f"sample     {expected}"
    if domains := parts(document, "domains"):
        yield ""
        yield from table(_DOMAINS, [_domain(one) for one in domains[:_DOMAINS_SHOWN]], width)
        yield from more(len(domains) - _DOMAINS_SHOWN, "domain")
    refused = document.get("refused")
    for why in refused if isinstance(refused, list | tuple) else ():
        yield f"refused    {why}"


def _domain(one: Mapping[str, object]) -> list[str]:
    figures = (bytes_or_unknown(number(one, name)) for name in ("merged_bytes", "shared_bytes"))
    return [text(one, "domain"), count_or_unknown(number(one, "processes")), *figures]


def _row(point: Mapping[str, object], digits: int) -> list[str]:
    cells = [f"{number(point, 'seconds') or 0.0:.{digits}f} s"]
    for name, show_value in (
        ("pages_shared", count_or_unknown),
        ("pages_sharing", count_or_unknown),
        ("saved_bytes", bytes_or_unknown),
        ("ksmd_cpu_seconds", _cpu),
    ):
        cells += [show_value(number(part(point, side), name)) for side in ("recorded", "replayed")]
    return cells


def _cpu(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f} s"
