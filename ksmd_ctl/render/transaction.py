# SPDX-License-Identifier: GPL-2.0-or-later
"""Plans and transactions (docs/json.md) as lines for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ksmd_ctl.figures import bytes_text, count_text, plural, ratio_text, seconds_text
from ksmd_ctl.render.summary import BAD, GOOD, PLAIN, Line
from ksmd_ctl.reports.document import number, part, parts, room_said, text

_DOING = {
    "stop": "stopping ksmd",
    "unshare": "un-merging page by page",
    "check": "checking whether the rest fits",
    "forget": "emptying the stable tree",
    "pace": "restoring ksmd's scan rate",
    "unmerge": "un-merging with run = 2",
    "write": "writing the knobs",
    "look": "checking where pages are",
    "home": "moving pages to their home nodes",
    "report": "checking where pages are now",
    "resume": "setting run",
    "undo": "restoring the knobs",
    "hasten": "raising ksmd's scan rate for a while",
    "abandon": "restoring run",
    "remerge": "waiting for ksmd to merge again",
    "slow": "restoring ksmd's scan rate",
}


_COUNTS = (
    ("unshared", "page", "un-merged page by page"),
    ("rest", "page", "by run = 2"),
    ("moved", "frame", "moved home"),
)


def progress_text(document: Mapping[str, object]) -> str:
    """What a transaction does now."""
    return _DOING.get(text(document, "phase"), "")


def changes_text(document: Mapping[str, object]) -> str:
    """The knobs that change, with their old and new values."""
    knobs = part(document, "knobs")
    changes = (f"{name} {part(knobs, name).get('from')} -> {part(knobs, name).get('to')}" for name in knobs)
    return ", ".join(changes)


def share_text(document: Mapping[str, object]) -> str:
    """The share of pages on their home nodes, before and after; empty if that is not known."""
    before, after = part(document, "home", "before"), part(document, "home", "after")
    ratio = number(after, "ratio")
    if not before:
        return ""
    return f"{_share(before)} at home before" + ("" if ratio is None else f", {ratio_text(ratio)} after")


def killed_text(document: Mapping[str, object]) -> str:
    """What the OOM killer killed meanwhile; empty for nothing."""
    kills = part(document, "oom_kills")
    known = {where: count for where in kills if (count := number(kills, where))}
    # "host" counts all. Before Linux 4.13 it is missing: then at least as many as in the cgroup with most.
    total = known.pop("host", 0) or max(known.values(), default=0)
    if not total:
        return ""
    places = ", ".join(f"{count_text(count)} in the memory cgroup {where}" for where, count in list(known.items())[:4])
    said = f"the OOM killer killed {plural(total, 'process', 'processes')} on this host meanwhile"
    return f"{said}: {places}" if places else f"{said}, in no memory cgroup of those that were un-merged"


def transaction_lines(document: Mapping[str, object]) -> Iterator[Line]:
    """The result of a transaction, or its progress."""
    result, reason = text(document, "result"), text(document, "reason")
    changes = changes_text(document)
    duration = number(document, "duration_seconds")
    took = "" if duration is None else f", in {seconds_text(duration)}"
    if not changes:
        changes = "no change needed" if not document.get("unmerge") else "everything un-merged"
    if not result:
        yield Line("running", f"{changes}: {progress_text(document)} ({text(document, 'who')})")
    else:
        killed = killed_text(document)
        tone = GOOD if result == "done" and not killed else BAD
        yield Line(result.replace("_", " "), changes + took + (f": {reason}" if reason else ""), tone)
        if killed:
            yield Line("killed", killed, BAD)
    if text(document, "recovered"):
        yield Line("recovered", f"its process had ended in the phase {text(document, 'recovered')}", BAD)
    forced = document.get("forced")
    for place in forced if isinstance(forced, list | tuple) else ():
        yield Line("forced", str(place), BAD)
    yield from _pages(document)
    estimate = number(document, "remerge_seconds")
    if result == "done" and estimate is not None and document.get("run_after") == 1:
        yield Line("merging", f"again; finished in about {seconds_text(max(1.0, estimate))}")
    if result == "abandoned":
        yield from _merging_again(document, estimate)


def _merging_again(document: Mapping[str, object], estimate: float | None) -> Iterator[Line]:
    pages = part(document, "pages")
    remerged, merged = number(pages, "remerged"), number(pages, "merged") or 0
    if remerged is not None and remerged >= merged:
        yield Line("merging", f"finished: all {plural(merged, 'page')} are merged again")
    elif remerged is not None:
        said = f"{count_text(remerged)} of {plural(merged, 'page')} are merged again after two full scans; ksmd goes on"
        yield Line("merging", said, BAD)
    elif estimate is not None:
        yield Line("merging", f"again what was un-merged; finished in about {seconds_text(max(1.0, estimate))}", BAD)


def _pages(document: Mapping[str, object]) -> Iterator[Line]:
    pages = part(document, "pages")
    if document.get("unmerge"):
        broken_off = "the process was killed" if text(document, "recovered") else "that was broken off"
        said = []
        for name, one, done in _COUNTS:
            if name in pages and number(pages, name) is None:
                said.append(f"some {one}s {done}; how many is not known, {broken_off}")
            elif name == "unshared" or number(pages, name):
                said.append(f"{plural(number(pages, name) or 0, one)} {done}")
        yield Line("pages", ", ".join(said))
    home = part(document, "home")
    before, after = part(home, "before"), part(home, "after")
    if before:
        said = [f"{_share(before)} before"]
        if after:
            said.append(f"{_share(after)} after")
        yield Line("at home", ", ".join(said))
    left = part(document, "left")
    for cause in left:
        count = number(left, cause) or 0
        yield Line("left", f"{plural(count, 'page')}: {cause}" if count else cause)
    yield from _gone(part(document, "gone"))


def _gone(gone: Mapping[str, object]) -> Iterator[Line]:
    processes, pages = number(gone, "processes") or 0, number(gone, "pages") or 0
    if processes:
        said = f"{plural(processes, 'process', 'processes')} ended or replaced {'its' if processes == 1 else 'their'}"
        yield Line("gone", f"{said} memory meanwhile" + (f" ({plural(pages, 'page')})" if pages else ""))


def _share(pages: Mapping[str, object]) -> str:
    there, of, ratio = (number(pages, name) for name in ("pages", "of", "ratio"))
    if ratio is None or of is None or there is None:
        return "no page has a home"
    return f"{ratio_text(ratio)} of {plural(of, 'page')}"


def plan_lines(document: Mapping[str, object]) -> Iterator[Line]:
    """A plan: its steps, and whether there is room for it."""
    changes = changes_text(document)
    yield Line("change", changes or "no change needed")
    steps = document.get("steps")
    for index, step in enumerate(steps if isinstance(steps, list | tuple) else (), 1):
        yield Line(f"step {index}", str(step))
    if not document.get("unmerge"):
        yield Line("un-merge", "not needed")
        return
    pages = part(document, "pages")
    size = number(pages, "size_bytes") or 0
    merged = number(pages, "merged") or 0
    processes = plural(number(pages, "processes") or 0, "process", "processes")
    yield Line("un-merge", f"{plural(merged, 'page')} ({bytes_text(merged * size)}) of {processes}")
    yield from _rooms(document)
    yield _homes(pages)
    skipped = part(document, "skipped")
    for name in skipped:
        yield Line("left alone", f"{name} until run = 2: {skipped[name]}")
    yield _time(document)
    verdict = "there is room for it" if document.get("fits") else "there is not enough room: it would be refused"
    yield Line("verdict", verdict, GOOD if document.get("fits") else BAD)


def _rooms(document: Mapping[str, object]) -> Iterator[Line]:
    shown = 0
    for room in parts(document, "room"):
        if shown >= 12 and not number(room, "over_bytes"):
            continue
        shown += 1
        yield room_line(room, number(document, "floor_bytes"))


def room_line(room: Mapping[str, object], floor_bytes: float | None = None) -> Line:
    """How much memory un-merging takes in a place, and how much is free there."""
    return Line("room", room_said(room, floor_bytes), BAD if number(room, "over_bytes") else PLAIN)


def _homes(pages: Mapping[str, object]) -> Line:
    there, total = number(pages, "at_home") or 0, number(pages, "with_home") or 0
    said = ["no page has a home that is one node"]
    if total:
        said = [f"{ratio_text(there / total)} of {plural(total, 'page')} are on their home node now"]
        leave = number(pages, "leave_home_by_plain_run_2") or 0
        said.append(f"a plain run = 2 could move {plural(leave, 'page')} away from it")
    homeless = number(pages, "homeless") or 0
    if homeless:
        said.append(f"{plural(homeless, 'merged page')} without a home of one node")
    return Line("home", "; ".join(said))


def _time(document: Mapping[str, object]) -> Line:
    seconds, sparse = number(document, "seconds") or 0.0, number(document, "sparse_seconds") or 0.0
    said = f"about {seconds_text(seconds)}"
    if sparse >= 0.1:
        said += f", and {seconds_text(sparse)} more where run = 2 is needed, for address space that is mostly empty"
    again = number(document, "remerge_seconds")
    if again is not None:
        said += f"; merged again in about {seconds_text(max(1.0, again))} after that"
    return Line("time", said)
