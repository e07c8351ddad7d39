# SPDX-License-Identifier: GPL-2.0-or-later
"""A report in a few lines for people, for `status` and the status page.

What the report does not have is unknown, with the reason, and never 0. It imports few modules, because `status` has to
start quickly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ksmd_ctl.figures import LOW_YIELD_PAGES, bytes_text, count_text, plural, ratio_text, seconds_text
from ksmd_ctl.render.switched import switched_texts
from ksmd_ctl.reports.document import doubted, number, part, parts, restore_command, room_said, text

PLAIN, GOOD, BAD = "", "good", "bad"

_LABEL_WIDTH = 10

_RUN = ("stopped", "merging", "everything was un-merged, stopped")


class Line:
    """One line.

    :ivar tone: `BAD` if it needs attention, `GOOD` if it is as wanted, otherwise `PLAIN`
    """

    __slots__ = ("label", "text", "tone")

    def __init__(self, label: str, text: str, tone: str = PLAIN) -> None:
        self.label = label
        self.text = text
        self.tone = tone

    @property
    def indent(self) -> int:
        """The column where its text begins."""
        return max(len(self.label), _LABEL_WIDTH) + 1

    def __str__(self) -> str:
        return f"{self.label:{_LABEL_WIDTH}} {self.text}"


def summary(report: Mapping[str, object], *, everything: bool = False) -> Iterator[Line]:
    """The lines of a report (docs/json.md).

    :param everything: also knobs with default values
    """
    yield _host(report)
    yield from _service(report)
    yield from left_lines(part(report, "left_by_service"))
    yield from _decision(report)
    yield _run(report)
    yield from _knobs(report, everything)
    yield from _merged(report)
    yield from _unrealised(report)
    yield _scanning(report)
    yield from _nodes(report)
    yield from _numa(report)
    yield from _domains(report)
    yield from (Line("switched", said, BAD if bad else PLAIN) for said, bad in switched_texts(report))
    yield _writers(report)
    yield from foreign_lines(report)
    yield from _transactions(report)
    for field in part(report, "errors"):
        error = part(report, "errors", field)
        kind, said = text(error, "kind"), text(error, "text")
        if kind != "absent":
            yield Line(kind, said if field in said else f"{field}: {said}", BAD)


def explanation(report: Mapping[str, object]) -> Iterator[Line]:
    """What the policy decided and why, what it decided before, what others changed; for ``status --explain``."""
    yield from _decided(report)
    yield from every_change(report)


# What the lines of reasons are called, where not by the reason's subject.
_SUBJECTS = {"speed": "scan rate"}


def _decided(report: Mapping[str, object]) -> Iterator[Line]:
    decision = part(report, "decision")
    if not decision:
        yield Line("why", "no service runs, so no policy makes decisions")
        return
    for index, reason in enumerate(parts(decision, "reasons")):
        subject = text(reason, "subject")
        # The summary has the main reason in its line "why".
        if index or subject == "policy":
            yield Line(_SUBJECTS.get(subject, subject), text(reason, "text"))
    healed = part(decision, "healed")
    for kind in healed:
        pulses, pages = (number(part(healed, kind), name) or 0 for name in ("pulses", "pages"))
        if pulses:
            yield Line("healed", f"{kind}: {plural(pulses, 'time')}, {plural(pages, 'page')} merged meanwhile")
    for past in parts(decision, "recent"):
        knobs = part(past, "knobs")
        said = ", ".join(f"{knob} = {knobs[knob]}" for knob in knobs)
        ago = f"{seconds_text(round(number(past, 'age_seconds') or 0))} ago"
        yield Line("decided", f"{ago}: {text(past, 'text')}" + (f" ({said})" if said else ""))


def summary_text(report: Mapping[str, object]) -> str:
    """All lines as one text."""
    return "\n".join(map(str, summary(report))) + "\n"


def _why(report: Mapping[str, object], name: str) -> str:
    error = part(report, "errors", name)
    return f"unknown ({text(error, 'kind')})" if error else "unknown"


def _figure(report: Mapping[str, object], name: str, one: str) -> str:
    value = number(part(report, "readings"), name)
    return _why(report, name) if value is None else plural(value, one)


def _host(report: Mapping[str, object]) -> Line:
    host = part(report, "host")
    release = text(host, "release", "unknown")
    if host.get("simulated"):
        return Line("host", f"SIMULATED (profile {release}): these figures are not about this machine", BAD)
    return Line("host", f"this machine, kernel {release}")


def _service(report: Mapping[str, object]) -> Iterator[Line]:
    daemon = part(report, "daemon")
    if not daemon:
        return
    said = [f"ksmd-ctl {text(daemon, 'version', '(unknown version)')}"]
    uptime = number(daemon, "uptime_seconds")
    if uptime is not None:
        said.append(f"up {seconds_text(uptime)}")
    if text(daemon, "metrics_address"):
        said.append(f"metrics on {text(daemon, 'metrics_address')}")
    yield Line("service", ", ".join(said))
    error = text(daemon, "reload_error")
    if error:
        yield Line("config", f"the new configuration is invalid and the old one stays in force: {error}", BAD)
    policy = text(report, "policy", "unknown")
    said = [policy + (" (nothing is written)" if policy == "observe" else "")]
    if policy != "observe":
        said += [f"on drift {text(report, 'on_drift', 'unknown')}", f"at stop {text(report, 'at_stop', 'unknown')}"]
    yield Line("policy", ", ".join(said))


def _decision(report: Mapping[str, object]) -> Iterator[Line]:
    # The names of "observe" and "fixed" say it all.
    for main in parts(part(report, "decision"), "reasons")[:1]:
        if text(main, "subject") != "policy":
            yield Line("why", text(main, "text"))


def _run(report: Mapping[str, object]) -> Line:
    run = number(part(report, "readings"), "run")
    if run is None:
        return Line("ksm", _why(report, "run"), BAD)
    value = int(run)
    said = _RUN[value & 3] if value & 3 < len(_RUN) else "unknown"
    if value & 4:
        said += ", and waits while memory goes offline"
    return Line("ksm", f"{said} (run = {value})")


def _knobs(report: Mapping[str, object], everything: bool) -> Iterator[Line]:
    knobs = part(report, "knobs")
    held = []
    found = []
    for name in knobs:
        knob = part(knobs, name)
        state, value = text(knob, "state"), knob.get("found")
        shown = "unknown" if value is None else value
        if state == "held":
            held.append(f"{name} {shown}")
        elif state in ("unmanaged", ""):
            # `run` has a line of its own; what depends on the host has no default.
            if value is not None and (everything or not (name == "run" or knob.get("default") in (value, ""))):
                found.append(f"{name} {shown}")
        else:
            drift = number(knob, "drift_total") or 0
            often = f", {plural(drift, 'time')} so far" if drift else ""
            reason = f": {text(knob, 'reason')}" if text(knob, "reason") else ""
            yield Line(state, f"{name}: wanted {knob.get('wanted')}, found {shown}{reason}{often}", BAD)
    if held:
        yield Line("held", ", ".join(held), GOOD)
    if found:
        yield Line("found", ", ".join(found))


def _merged(report: Mapping[str, object]) -> Iterator[Line]:
    derived = part(report, "derived")
    merged = number(derived, "merged_pages")
    if merged is None:
        yield Line("merged", _why(report, "pages_sharing"))
    else:
        size = number(part(report, "host"), "page_size_bytes")
        amount = f" ({bytes_text(merged * size)})" if size else ""
        yield Line("merged", f"{plural(merged, 'page')}{amount} onto {_figure(report, 'pages_shared', 'KSM page')}")
    zeroes = number(part(report, "readings"), "ksm_zero_pages")
    if zeroes and zeroes > 0:
        yield Line("zero pages", f"{plural(zeroes, 'page')} of zeroes replaced by the zero page")
    yield from _split_zeroes(report)
    yield from _split_blocks(part(report, "numa"))
    yield from _stale(derived)
    yield _saved(derived, merged, _left_out(report))


def _split_zeroes(report: Mapping[str, object]) -> Iterator[Line]:
    numa = part(report, "numa")
    pages, age = number(numa, "split_zero_pages"), number(numa, "age_seconds")
    since = number(numa, "split_since_pages")
    if pages is not None and (pages or since):
        facts = [] if age is None else [f"counted {seconds_text(max(1, round(age)))} ago"]
        if since:
            facts.append(f"{plural(since, 'page')} of huge pages split since then")
        freed = f"{plural(pages, 'page')} of zeroes freed by splits of huge pages"
        yield Line("zeroes", f"{freed}, in no counter of the kernel" + (f" ({'; '.join(facts)})" if facts else ""))


def _split_blocks(numa: Mapping[str, object]) -> Iterator[Line]:
    blocks, pages = number(numa, "split_blocks"), number(numa, "split_block_pages")
    low, kept = number(numa, "low_yield_blocks"), number(numa, "huge_bytes")
    if blocks and pages is not None and low is not None and kept is not None:
        said = f"{bytes_text(kept)} in mergeable memory; merging prevents {count_text(blocks)} more"
        said += f": {plural(round(pages / blocks), 'page')} saved for each"
        if low:
            said += f", fewer than {LOW_YIELD_PAGES} for {count_text(low)}"
        yield Line("huge pages", said)


def _left_out(report: Mapping[str, object]) -> str:
    """What is not in the figure of the saving though it may be saved, as a phrase; empty for nothing."""
    if _zeroes_uncounted(report):
        return ", without pages of zeroes, which this kernel does not count"
    derived, readings = part(report, "derived"), part(report, "readings")
    if not number(derived, "merged_pages") or number(derived, "split_zero_bytes") is not None:
        return ""
    if not number(readings, "split_folio_pages") or derived.get("stale") is True:
        return ""
    return ", by the kernel's count, without pages of zeroes that splits of huge pages may have freed"


def _zeroes_uncounted(report: Mapping[str, object]) -> bool:
    """Whether ksmd replaces pages of zeroes, and this kernel has no counter for them."""
    lacks = text(part(report, "errors", "ksm_zero_pages"), "kind") == "absent"
    return lacks and number(part(report, "readings"), "use_zero_pages") == 1


def _stale(derived: Mapping[str, object]) -> Iterator[Line]:
    said = text(derived, "stale_text")
    if said:
        yield Line("stale", said, BAD if derived.get("stale") is True else PLAIN)


def _saving_text(derived: Mapping[str, object], left_out: str) -> str:
    """What is saved, and what that is the sum of (docs/saving.md)."""
    saved = number(derived, "saved_bytes")
    if derived.get("stale") is True:
        return "unknown until ksmd has scanned all memory again"
    if saved is None:
        return "unknown"
    counted, low = saved, number(derived, "saved_low_bytes")
    split = number(derived, "split_zero_bytes")
    if split:
        saved, low = number(derived, "saved_frames_bytes") or 0, number(derived, "saved_frames_low_bytes")
    said = bytes_text(saved) if low is None or low >= saved else f"{bytes_text(low)} to {bytes_text(saved)}"
    if split:
        said += " in frames"
    freed, zero, records = (number(derived, name) for name in ("freed_bytes", "zero_bytes", "metadata_bytes"))
    zero = (zero or 0) + (split or 0)
    stale_text = text(derived, "stale_text")
    if freed is None or records is None:
        return doubted(said + left_out, stale_text)
    zeroes = f" + {bytes_text(zero)} zero pages" if zero else ""
    most = "" if low is None or low >= saved else "at most "
    said = f"{said} = {most}{bytes_text(freed)} merged{zeroes} - {bytes_text(records)} for ksmd's records"
    if split:
        said += f"; the kernel counts {bytes_text(counted)}"
    return doubted(said + left_out, stale_text)


def _saved(derived: Mapping[str, object], merged: float | None, left_out: str) -> Line:
    saved, zero = number(derived, "saved_bytes"), number(derived, "zero_bytes")
    split, records = number(derived, "split_zero_bytes") or 0, number(derived, "metadata_bytes")
    if merged == 0 and not zero and not split and not left_out and saved is not None and records is not None:
        costs = f": ksmd's records of the pages it has looked at take {bytes_text(records)}" if records else ""
        return Line("saved", f"nothing{costs}")
    costs_more = saved is not None and saved + split < 0 and not left_out
    return Line("saved", _saving_text(derived, left_out), BAD if costs_more else PLAIN)


# What a reason of unrealised pages means, and what recovers them.
_REASONS = {
    "twins": ("duplicate KSM pages", "healing.twins = true merges them"),
    "swapin": ("copies that swap made of merged pages", "two full scans merge them again"),
    "advisor": (
        "identical pages that are not merged because the kernel's advisor made ksmd very slow",
        "policy = kernel or adaptive avoids that",
    ),
    "khugepaged": (
        "identical pages that are not merged because khugepaged undoes what ksmd does",
        "its max_ptes_shared = 0 stops that",
    ),
    "smart_scan": (
        "identical pages that are not merged because of smart_scan, estimated from past recoveries",
        "the next one merges them",
    ),
}


def _unrealised(report: Mapping[str, object]) -> Iterator[Line]:
    healing = part(report, "healing")
    pages = part(healing, "unrealised")
    size = number(part(report, "host"), "page_size_bytes")
    for reason in pages:
        count = number(pages, reason)
        if not count:
            continue
        name, cure = _REASONS.get(reason, (reason.replace("_", " "), ""))
        if reason == "twins" and healing.get("allowed"):
            stuck = sum(number(part(healing, "left"), cause) or 0 for cause in part(healing, "left"))
            cure = text(healing, "text") or ("nothing recovers these" if stuck >= count else "being recovered")
        about = "at least " if reason == "twins" and healing.get("complete") is False else ""
        amount = f" ({bytes_text(count * size)})" if size else ""
        yield Line("unrealised", f"{about}{plural(count, 'page')}{amount}: {name}{f'; {cure}' if cure else ''}")


def _scanning(report: Mapping[str, object]) -> Line:
    derived = part(report, "derived")
    period = number(derived, "rate_seconds")
    speed, ratio = number(derived, "pages_scanned_per_second"), number(derived, "ksmd_cpu_ratio")
    scan = number(derived, "full_scan_seconds")
    scans = _figure(report, "full_scans", "full scan")
    if not period:
        return Line("scanning", f"{scans}; scan rate unknown: needs two samples (status --interval 1)")
    said = [f"{count_text(speed)} pages/s" if speed is not None else f"scan rate {_why(report, 'pages_scanned')}"]
    said.append(f"ksmd takes {ratio_text(ratio)} of a CPU" if ratio is not None else "ksmd's CPU share unknown")
    said.append(scans + (f", one in {seconds_text(scan)}" if scan is not None else ""))
    return Line("scanning", "; ".join(said) + f" (over {seconds_text(period)})")


def _nodes(report: Mapping[str, object]) -> Iterator[Line]:
    nodes = part(report, "nodes")
    said = []
    for node in nodes:
        free, total = (number(part(nodes, node), name) for name in ("free_bytes", "total_bytes"))
        if free is not None and total is not None:
            said.append(f"{node}: {bytes_text(free)} of {bytes_text(total)} free")
    if said:
        yield Line("nodes", "; ".join(said))


def _numa(report: Mapping[str, object]) -> Iterator[Line]:
    numa = part(report, "numa")
    error = text(numa, "error")
    if error:
        yield Line("census", f"failed: {error}", BAD)
    nodes = part(numa, "nodes")
    if len(nodes) > 1:
        yield _where(numa, nodes)
    for place in parts(numa, "exposure"):
        if number(place, "over_bytes"):
            yield Line("exposed", f"un-merging everything now: {room_said(place, number(numa, 'floor_bytes'))}")


def _where(numa: Mapping[str, object], nodes: Mapping[str, object]) -> Line:
    # Where merged pages are, and the share of mappings that are on another node than their memory belongs on.
    pages = {node: number(part(nodes, node), "ksm_pages") for node in nodes}
    about = "about " if numa.get("complete") is False else ""
    said = ", ".join(f"{count_text(count)} on node {node}" for node, count in pages.items() if count is not None)
    said = f"KSM pages: {about}{said}" if said else "where KSM pages are is unknown"
    found = [(number(part(nodes, node), "mapped_pages"), number(part(nodes, node), "remote_pages")) for node in nodes]
    mapped = sum(one for one, _ in found if one is not None)
    if any(remote is None for _, remote in found):
        said += "; share away from home unknown"
    elif mapped:
        said += f"; {ratio_text(sum(remote for _, remote in found if remote is not None) / mapped)} away from home"
    age = number(numa, "age_seconds")
    if age is not None:
        said += f" (surveyed {seconds_text(max(1, round(age)))} ago)"
    return Line("merged on", said)


def _domains(report: Mapping[str, object]) -> Iterator[Line]:
    domains = part(report, "domains")
    error = text(domains, "error")
    if error:
        yield Line("domains", f"the audit failed: {error}", BAD)
    elif domains and number(domains, "age_seconds") is None:
        yield Line("domains", "no audit yet")
    if stopped := text(part(domains, "measures"), "stopped"):
        yield Line("stopped", f"ksmd, by on_violation: {stopped}", BAD)
    verdicts: dict[str, list[str]] = {}
    for one in parts(domains, "domains"):
        verdicts.setdefault(text(one, "verdict"), []).append(text(one, "domain"))
        reasons = [text(reason, "text") for reason in parts(one, "reasons")]
        if reasons:
            more = f", and {plural(len(reasons) - 1, 'more reason')}" if len(reasons) > 1 else ""
            yield Line("domain", f"{text(one, 'domain')}: {text(one, 'verdict')}: {reasons[0]}{more}", BAD)
    if verdicts:
        bad = domains.get("isolated") is False
        said = "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in verdicts.items())
        yield Line("domains", said, BAD if bad else GOOD)
    others = part(domains, "others")
    if bad_ones := number(others, "not_isolated"):
        said = f"{count_text(bad_ones)} of {plural(number(others, 'domains') or 0, 'that is', 'that are')}"
        yield Line("domains", f"{said} domains of their own are not isolated", BAD)


def _writers(report: Mapping[str, object]) -> Line:
    if not isinstance(report.get("writers"), list | tuple):
        return Line("writers", "unknown")
    said = []
    for writer in parts(report, "writers"):
        pid = number(writer, "pid")
        said.append(text(writer, "name", "unknown") + (f" (pid {pid})" if pid is not None else ""))
    if not said:
        # The lines about changes by others follow.
        nobody = "no running program is known" if parts(report, "foreign_changes") else "no other program is known"
        return Line("writers", f"{nobody} to write the knobs")
    return Line("writers", f"also written by {', '.join(said)}", BAD)


def _carried(process: Mapping[str, object]) -> str:
    """Whether the process that carries out a transaction is alive."""
    pid, recover = number(process, "pid"), "`ksmd-ctl set --recover` ends the transaction"
    name = "its process" if pid is None else f"process {pid}"
    if process.get("alive") is True:
        return f"; {name} carries it out"
    if process.get("alive") is False:
        return f"; {name}, which carried it out, has ended: {recover}"
    return f"; whether {name} still carries it out can't be seen; if it has ended, {recover}"


def _transactions(report: Mapping[str, object]) -> Iterator[Line]:
    running, last = part(report, "transaction", "running"), part(report, "transaction", "last")
    if not (running or last):
        return
    # Not imported otherwise: it imports this module, and most hosts never had a transaction.
    from ksmd_ctl.render.transaction import changes_text, killed_text, progress_text, share_text

    if running:
        doing = progress_text(running)
        if not part(report, "daemon"):
            doing += _carried(part(running, "process"))
        yield Line("running", f"transaction: {changes_text(running)}: {doing} ({text(running, 'who')})", BAD)
    elif last:
        result = text(last, "result")
        # Without a knob only run was changed.
        changed = changes_text(last) or f"run = {last.get('run_after')}"
        killed = killed_text(last)
        said = [f"transaction {result.replace('_', ' ')}: {changed}", text(last, "reason"), share_text(last), killed]
        yield Line("last", ", ".join(filter(None, said)), PLAIN if result == "done" and not killed else BAD)


def left_lines(left: Mapping[str, object]) -> Iterator[Line]:
    """The lines for what a service left (docs/json.md, ``left_by_service``); none where it left nothing."""
    if not left:
        return
    yield Line("ended", left_text(left), PLAIN if left.get("may_be_restarted") else BAD)
    knobs = part(left, "knobs")
    changed = (
        f"{name} = {_value(part(knobs, name).get('found'))} (was {_value(part(knobs, name).get('at_start'))})"
        for name in knobs
    )
    yield Line("left", ", ".join(changed), BAD)
    yield Line(
        "restore",
        f"`{restore_command(left)}` restores the values from before the first change in this boot. Or start the "
        "service again: when it stops, it restores the values in parentheses",
    )


def left_text(left: Mapping[str, object]) -> str:
    """Which service ended, and since when, as a sentence without a full stop."""
    started, seen = number(left, "started_age_seconds") or 0, number(left, "seen_age_seconds")
    when = f"last seen {_ago(seen)}" if seen is not None else "no longer there"
    said = f"a service (pid {number(left, 'pid')}, started {_ago(started)}, {when}) died and left knobs changed"
    return f"{said}; systemd may be starting it again" if left.get("may_be_restarted") else said


def foreign_lines(report: Mapping[str, object]) -> Iterator[Line]:
    """What others changed within a day in a line: the latest change, and how many there were."""
    changes = parts(report, "foreign_changes")
    if not changes:
        return
    times = sum(int(number(change, "times") or 1) for change in changes)
    knobs = {text(change, "knob") for change in changes}
    of_knobs = f" of {len(knobs)} knobs" if len(knobs) > 1 else ""
    more = f"; {times} changes{of_knobs} in a day" if times > 1 else ""
    shown = ": `ksmd-ctl history --kind foreign`" if len(changes) > 1 else ""
    tone = BAD if any(_tone(change) == BAD for change in changes) else PLAIN
    yield Line("changed", _change(changes[0]) + more + shown, tone)


def every_change(report: Mapping[str, object]) -> Iterator[Line]:
    """A line for each change by others within a day, the latest first."""
    for change in parts(report, "foreign_changes"):
        times = int(number(change, "times") or 1)
        first = f"; {times} times, first {_ago(number(change, 'first_age_seconds') or 0)}" if times > 1 else ""
        yield Line("changed", _change(change) + first, _tone(change))


def _change(change: Mapping[str, object]) -> str:
    names = change.get("writers")
    running = ", ".join(map(str, names)) if isinstance(names, list | tuple) else ""
    somebody = f"somebody else (running: {running})" if running else "somebody else"
    who = f"by {text(change, 'who') or somebody}"
    held = "" if change.get("held") else ", not held"
    ago = _ago(number(change, "age_seconds") or 0)
    return f"{text(change, 'knob')} {_value(change.get('from'))} to {_value(change.get('to'))} {who}, {ago}{held}"


def _tone(change: Mapping[str, object]) -> str:
    return BAD if change.get("held") else PLAIN


def _ago(seconds: float) -> str:
    return f"{seconds_text(round(seconds))} ago" if seconds >= 1 else "just now"


def _value(value: object) -> str:
    return "unknown" if value is None else str(value)
