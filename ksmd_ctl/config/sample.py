# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes the sample configuration out of the table of settings: ``python -m ksmd_ctl.config.sample``."""

from __future__ import annotations

import json
import textwrap

from ksmd_ctl.config.model import KNOB_SECTION, SECTIONS, SETTINGS
from ksmd_ctl.fields import FIELDS_BY_NAME
from ksmd_ctl.knobs import KNOBS, Knob

WIDTH = 100

HEADER = """\
ksmd-ctl.toml: what ksmd-ctl does on this host.

Read from /etc/ksmd-ctl/ksmd-ctl.toml, then from /etc/ksmd-ctl/conf.d/*.toml in the order of their names; where \
two set one key, the later wins. What is commented out here shows the default, or for a knob the kernel's. \
`ksmd-ctl daemon --check-config` checks everything and says all that is wrong; `systemctl reload ksmd-ctl` takes \
changes over, and keeps the old configuration where the new one is wrong.

As shipped, nothing is written to the kernel. To switch merging on, set policy = "adaptive". \
Know first what that means:

Merging crosses every boundary on the host. A page of one tenant and an equal page of another become one page. \
Writing to a merged page takes measurably longer than writing to an own one, so a tenant can find out which pages \
others have (a program's version, a key it can guess), and faults in memory cells reach further. Merge \
only where all that mark their memory as mergeable trust each other: QEMU marks all of a guest's unless told \
otherwise (mem-merge=off), other programs only what they choose.
"""

SECTION_TEXTS = {
    KNOB_SECTION: "The files of /sys/kernel/mm/ksm. Only those that are set here are held; the others are left alone, "
    "and one that is taken out here stays as it is until the stop or restart. "
    'Under policy = "observe", the default, a knob here is an error: nothing would hold it. '
    'Under the policies "adaptive", "kernel" and "ksmtuned" run, pages_to_scan, sleep_millisecs, smart_scan and the '
    "advisor's are steered and can't stand here. "
    "A knob that this kernel lacks is an error, unless it is written as { value = VALUE, optional = true }.",
    "adaptive": 'The limits of policy = "adaptive". They may be prepared while another policy is set.',
    "kernel": 'The goal and limits of policy = "kernel". They may be prepared while another policy is set.',
    "ksmtuned": 'The quantities of policy = "ksmtuned", under ksmtuned\'s own names where it has one. '
    "They may be prepared while another policy is set.",
    "healing": "What is done about savings that the kernel leaves behind; each kind by itself. "
    'Nothing of it under policy = "observe", where true is an error.',
    "limits": "How far a change may go that un-merges pages (`ksmd-ctl set`). "
    "Nothing is un-merged unless a person asks.",
    "census": "Where merged pages are and whose they are, for status, metrics and `ksmd-ctl nodes`.",
    "service": "The service itself.",
}


KNOB_NOTES: dict[Knob, str] = {
    Knob.RUN: "Here only 0 or 1: run = 2 un-merges everything, which is a deed and not a state to hold.",
    Knob.PAGES_TO_SCAN: 'Not together with advisor_mode = "scan-time": the kernel refuses it then.',
    Knob.MERGE_ACROSS_NODES: "Can't be changed while anything is merged: pending until `ksmd-ctl set` does it.",
    Knob.MAX_PAGE_SHARING: "Can't be changed while anything is merged: pending until `ksmd-ctl set` does it.",
    Knob.ADVISOR_MODE: "On a host where ksmd has already worked, scan-time can slow it to a crawl for hours.",
}


def knob_help(knob: Knob) -> tuple[str, ...]:
    """What the sample and the manual page say of a knob, in lines."""
    spec = KNOBS[knob]
    if spec.choices:
        takes = " or ".join(f'"{choice}"' for choice in spec.choices)
    elif spec.maximum == 1 or knob is Knob.RUN:
        takes = "0 or 1"
    else:
        takes = f"{spec.unit or 'a number'}, {spec.minimum} to {spec.maximum}"
    default = f'"{spec.default}"' if spec.choices else str(spec.default)
    lines = [FIELDS_BY_NAME[knob].help, f"  {takes}; the kernel's default is {default}; since Linux {spec.since}"]
    if knob in KNOB_NOTES:
        lines.append(KNOB_NOTES[knob])
    return tuple(lines)


def sample() -> str:
    """The text of the shipped sample: every setting, with its unit, range and default."""
    lines: list[str] = []
    for paragraph in HEADER.split("\n\n"):
        _comment(lines, paragraph)
        lines.append("#")
    lines.pop()
    for section in SECTIONS:
        if section:
            lines.append("")
            lines.append("")
            _comment(lines, SECTION_TEXTS[section])
            lines.append(f"[{section}]")
        if section == KNOB_SECTION:
            for knob in Knob:
                lines.append("")
                for line in knob_help(knob):
                    _comment(lines, line)
                default = KNOBS[knob].default
                lines.append(f"#{knob} = {json.dumps(default)}")
        for setting in SETTINGS:
            if setting.section != section:
                continue
            lines.append("")
            _comment(lines, setting.help)
            for line in setting.type.lines:
                _comment(lines, line)
            if not setting.reloadable:
                _comment(lines, "  takes effect at the next start, not on a reload")
            # A text or a number reads the same in JSON and in TOML.
            lines.append(f"#{setting.key} = {json.dumps(setting.default)}")
    return "\n".join(lines) + "\n"


def _comment(lines: list[str], text: str) -> None:
    """Append a paragraph; what hangs in keeps its indent. "# " tells prose from a "#key" to be uncommented."""
    indent = "    " if text.startswith("  ") else ""
    lines.extend(
        f"# {line}"
        for line in textwrap.wrap(
            text.strip(), WIDTH, initial_indent=indent[:2], subsequent_indent=indent, break_long_words=False
        )
    )


if __name__ == "__main__":
    print(sample(), end="")
