# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl report``: what a recording holds, anywhere, without root and KSM."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

from ksmd_ctl.cli.common import PROGRAM, Parsers, add_command, file_name, write_json
from ksmd_ctl.cli.terminal import (
    WIDTH,
    Column,
    bytes_or_unknown,
    count_or_unknown,
    more,
    table,
    text_width,
    write_wrapped,
)
from ksmd_ctl.errors import ExitCode, Unwritable, UsageError
from ksmd_ctl.figures import bytes_text, plural, ratio_text, seconds_text
from ksmd_ctl.render.recording import (
    DOMAIN_TITLES,
    GROUP_TITLES,
    TITLE_ENDS,
    apart_text,
    domain_cells,
    host_lines,
    pair_names,
)
from ksmd_ctl.reports.document import number, part, parts, text

_ROWS = 12
_GROUPS = 10
_PAIRS = 8
_EVENTS = 12
# In so many bytes the title of a page ends.
_BEGINS_BYTES = 500

_TIMELINE = (
    Column("at", right=True),
    Column("run", right=True),
    Column("KSM pages", right=True),
    Column("sharing", right=True),
    Column("saved", right=True),
    Column("scanned/s", right=True),
    Column("ksmd", right=True),
)


def add_parser(parsers: Parsers) -> None:
    parser = add_command(
        parsers, "report", "show what a recording holds: saving, cost, who has contents in common, events", hosts=()
    )
    add_recording(parser)


def add_recording(parser: argparse.ArgumentParser) -> None:
    """The options of commands that read a recording."""
    parser.add_argument("recording", type=file_name, metavar="FILE", help="a recording (ksmd-ctl record)")
    parser.add_argument("--html", type=file_name, metavar="FILE", help="also write one HTML file with charts")


def run(args: argparse.Namespace, out: TextIO) -> int:
    from ksmd_ctl.codec import encode_fields
    from ksmd_ctl.recording.reader import Recording
    from ksmd_ctl.render.recording import recording_page
    from ksmd_ctl.reports.recording import recording_report

    with Recording(args.recording) as recording:
        document = encode_fields(recording_report(recording))
    if args.html is not None:
        write_html(args.html, args.recording, recording_page(document))
    show(args, out, document, lines(document, text_width(out)))
    return ExitCode.DONE


def show(args: argparse.Namespace, out: TextIO, document: Mapping[str, object], said: Iterator[str]) -> None:
    """Print a document as JSON or in lines."""
    if args.json:
        write_json(document, out)
        return
    write_wrapped(said, text_width(out), out)


def write_html(path: Path, recording: Path, page: str) -> None:
    """Write a page; only an earlier page is replaced.

    :raises UsageError: it would replace the recording, or another file
    :raises Unwritable: it can't be written
    """
    what, hint = f"writing {path}", "name another file after --html"
    if path.exists() and recording.exists() and path.samefile(recording):
        raise UsageError(what, "that is the recording", hint=hint)
    try:
        if path.is_file() and not _replaceable(path):
            raise UsageError(what, f"there is another file, which is no page of {PROGRAM}", hint=hint)
        # It names units and programs, as the recording does.
        # A FIFO that nobody reads is an error.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
        os.set_blocking(descriptor, True)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(page)
    except OSError as error:
        raise Unwritable.of(what, path, error) from error


def _replaceable(path: Path) -> bool:
    with open(path, "rb") as file:
        begins = file.read(_BEGINS_BYTES)
    return not begins or TITLE_ENDS.encode() in begins


def lines(document: Mapping[str, object], width: int = WIDTH) -> Iterator[str]:
    """The lines for people of a report (docs/json.md); tables are made narrower for the width."""
    yield from host_lines(part(document, "recording"))
    contents = part(document, "contents")
    page = number(part(document, "recording"), "page_size_bytes") or 0
    if number(contents, "looks"):
        yield (
            f"{plural(number(contents, 'looks') or 0, 'look')} at pages, {number(contents, 'cpu_seconds') or 0:.1f} s "
            f"of CPU; the last found {bytes_text(page * (number(contents, 'pages') or 0))} of mergeable memory; "
            f"merging all equal pages would free about {bytes_text(number(contents, 'could_save_bytes') or 0)}"
        )
    else:
        yield "no look at pages came to its end: only counters were recorded"
    yield ""
    points = parts(document, "timeline")
    yield from table(_TIMELINE, [_row(point) for point in every(points, _ROWS)], width)
    if groups := parts(document, "groups"):
        yield ""
        columns = [Column(title, right=index > 0, wraps=index == 0) for index, title in enumerate(GROUP_TITLES)]
        keys = ("mergeable_bytes", "merged_bytes", "equal_bytes", "shared_bytes")
        rows = [
            [
                text(one, "group"),
                count_or_unknown(number(one, "processes")),
                *(bytes_or_unknown(number(one, key)) for key in keys),
            ]
            for one in groups[:_GROUPS]
        ]
        yield from table(columns, rows, width)
        yield from more(len(groups) - _GROUPS, "group")
    if domains := parts(document, "domains"):
        yield ""
        columns = [Column(title, right=index > 0, wraps=index == 0) for index, title in enumerate(DOMAIN_TITLES)]
        yield from table(columns, [domain_cells(one) for one in domains[:_GROUPS]], width)
        yield from more(len(domains) - _GROUPS, "domain")
        yield apart_text(document)
    if pairs := parts(document, "pairs"):
        yield ""
        columns = [Column("one", wraps=True), Column("other", wraps=True), Column("contents in common", right=True)]
        rows = [[*pair_names(pair), bytes_or_unknown(number(pair, "common_bytes"))] for pair in pairs[:_PAIRS]]
        yield from table(columns, rows, width)
        yield from more(len(pairs) - _PAIRS, "pair")
    if events := parts(document, "events"):
        yield ""
        # What a policy decides every few seconds would hide all else.
        rare = [event for event in events if text(event, "kind") != "policy"]
        shown = rare[-_EVENTS:]
        for event in shown:
            kind = f"{text(event, 'kind')}: " if event.get("service") else ""
            yield f"{seconds_text(number(event, 'seconds') or 0.0):>10}  {kind}{text(event, 'text')}"
        left = len(events) - len(shown)
        yield from more(left + int(number(document, "events_left_out") or 0), "event")


def every(points: list[Mapping[str, object]], most: int) -> list[Mapping[str, object]]:
    """At most so many of the points, at equal distances."""
    from ksmd_ctl.reports.recording import thinned

    return list(thinned(points, most))


def _row(point: Mapping[str, object]) -> list[str]:
    ratio = number(point, "ksmd_cpu_ratio")
    return [
        seconds_text(number(point, "seconds") or 0.0),
        count_or_unknown(number(point, "run")),
        count_or_unknown(number(point, "pages_shared")),
        count_or_unknown(number(point, "pages_sharing")),
        bytes_or_unknown(number(point, "saved_bytes")),
        count_or_unknown(None if (rate := number(point, "pages_scanned_per_second")) is None else round(rate)),
        "?" if ratio is None else ratio_text(ratio),
    ]
