# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes the sample configuration:   python3 packaging/man/sample.py > ksmd_ctl/config/ksmd-ctl.toml

It is made from the table of settings, so that it can't lag. Nothing of it is needed at run time.
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ksmd_ctl.config.domains import DOMAIN_KEYS, DOMAIN_SECTION, DomainKey
from ksmd_ctl.config.model import HOUSEKEEPING, KNOB_KEYS, KNOB_SECTION, KSMD_SECTION, SECTIONS, SETTINGS
from ksmd_ctl.host.fields import FIELDS_BY_NAME
from ksmd_ctl.host.knobs import KNOBS, Knob

WIDTH = 100

HEADER = """\
ksmd-ctl.toml: what ksmd-ctl does on this host.

ksmd-ctl reads /etc/ksmd-ctl/ksmd-ctl.toml, then /etc/ksmd-ctl/conf.d/*.toml in the order of their names. If two \
files set a key, the later one wins. Commented settings show the default, or for a knob the kernel's default. \
`ksmd-ctl daemon --check-config` checks everything and reports all mistakes. `systemctl reload ksmd-ctl` applies \
changes; if the new configuration is wrong, the old one stays.

As shipped, nothing is written to the kernel. To switch merging on, set policy = "adaptive". \
First know what that means:

Merging crosses every boundary on the host. A page of one tenant and an equal page of another become one page. \
Writing to a merged page takes measurably longer than writing to another page, so a tenant can find out which pages \
others have (a program's version, a key that it can guess), and a fault of a memory cell affects more tenants. Merge \
only if all programs that mark memory as mergeable trust each other, or keep those apart that do not ([domains]). \
QEMU marks all memory of a guest, unless it was \
started with mem-merge=off; other programs mark what they choose.
"""

SECTION_TEXTS = {
    KNOB_SECTION: "The files of /sys/kernel/mm/ksm. Knobs that are set here are held; the others are left alone. "
    "A knob that is removed from here keeps its value until the stop or restart. "
    'With policy = "observe", the default, a knob here is an error, because nothing would hold it. '
    'The policies "adaptive", "kernel", "ksmtuned" and "kubevirt" set run, pages_to_scan, sleep_millisecs, smart_scan '
    "and the knobs of the advisor themselves, so these can't be set here. "
    "A knob that this kernel lacks is an error, unless it is written as { value = VALUE, optional = true }.",
    KSMD_SECTION: "Where and how the kernel thread ksmd runs, so that it disturbs nobody else. These are held, watched "
    'and restored like knobs, under every policy but "observe", with which a key here is an error. '
    'With policy = "fixed" they may be all that is held, while another program writes the knobs. '
    "On a host where ksmd can't be seen (in a container) the rest of the configuration is held all the same.",
    "adaptive": 'The limits of policy = "adaptive". They may be set while another policy is in use.',
    "kernel": 'The goal and limits of policy = "kernel". They may be set while another policy is in use.',
    "ksmtuned": 'The quantities of policy = "ksmtuned", under ksmtuned\'s own names where it has one. '
    "They may be set while another policy is in use.",
    "kubevirt": 'The quantities of policy = "kubevirt", under the names of virt-handler\'s annotations: '
    "kubevirt.io/ksm-pages-boost-override of the node is pages_boost here, with the same value. "
    "They may be set while another policy is in use.",
    "healing": "What is done to recover savings that the kernel misses; each kind is set separately. "
    'With policy = "observe" nothing is done, and true is an error.',
    "limits": "Limits of changes that un-merge pages (`ksmd-ctl set`). Nothing is un-merged unless a person asks.",
    "census": "Surveys of merged pages by node and process, for status, metrics and `ksmd-ctl nodes`.",
    DOMAIN_SECTION: "Trust domains: who may share memory with whom. Without any setting here nobody is asked. A table "
    "[domains.NAME] says who belongs to a domain; who belongs to several belongs to the first, in the order of the "
    "file. docs/domains.md says what the separation is worth.",
    "history": "What happened, for `ksmd-ctl history` and the status page: events and samples, in a file in "
    "state_directory. docs/history.md says what is in it.",
    "switch": "Merging switched on or off for processes and virtual machines that run (`ksmd-ctl merge`).",
    "service": "The service itself.",
}


KNOB_NOTES: dict[Knob, str] = {
    Knob.RUN: "Here only 0 or 1: run = 2 un-merges everything, which is an action and not a state.",
    Knob.PAGES_TO_SCAN: 'Not together with advisor_mode = "scan-time", because the kernel then refuses it.',
    Knob.MERGE_ACROSS_NODES: "Can't be changed while anything is merged: pending until `ksmd-ctl set` changes it.",
    Knob.MAX_PAGE_SHARING: "Can't be changed while anything is merged: pending until `ksmd-ctl set` changes it.",
    Knob.KSMD_CPUS: f'"{HOUSEKEEPING}" are the CPUs that are not isolated (isolcpus=, nohz_full=, cpusets) and to '
    "which no virtual CPU is pinned. They are looked for once a minute. If none is left, ksmd stays where it is, and "
    "status and doctor say so.",
    Knob.KSMD_SCHEDULING: 'With "idle" (SCHED_IDLE) ksmd runs almost only when a CPU has nothing else to do, so on a '
    'busy host it merges little. policy = "adaptive" chooses between "idle" and "other" itself unless this is set. '
    "A real-time class that somebody gave to ksmd is left as it is.",
    Knob.KSMD_NICE: 'It counts with "other" and "batch" only.',
    Knob.ADVISOR_MODE: "On a host where ksmd has already run, scan-time can make ksmd very slow for hours.",
}


def knob_help(knob: Knob) -> tuple[str, ...]:
    """What the sample and the manual page say of a knob, in lines."""
    spec = KNOBS[knob]
    if spec.cpus:
        takes = f'"{HOUSEKEEPING}", or a list as of taskset(1), for example "0,2-3"'
    elif spec.choices:
        takes = " or ".join(f'"{choice}"' for choice in spec.choices)
    elif spec.maximum == 1 or knob is Knob.RUN:
        takes = "0 or 1"
    else:
        takes = f"{spec.unit or 'a number'}, {spec.minimum} to {spec.maximum}"
    default = (
        "all CPUs that are not isolated" if spec.cpus else f'"{spec.default}"' if spec.words else str(spec.default)
    )
    lines = [FIELDS_BY_NAME[knob].help, f"  {takes}; the kernel's default is {default}; since Linux {spec.since}"]
    if knob in KNOB_NOTES:
        lines.append(KNOB_NOTES[knob])
    return tuple(lines)


def domain_help(key: DomainKey) -> tuple[str, ...]:
    """What the sample and the manual page say of a key of a domain, in lines."""
    return (key.help, *key.type.lines)


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
        for key, knob in KNOB_KEYS.get(section, {}).items():
            lines.append("")
            for line in knob_help(knob):
                _comment(lines, line)
            default = HOUSEKEEPING if KNOBS[knob].cpus else KNOBS[knob].default
            lines.append(f"#{key} = {json.dumps(default)}")
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
        if section == DOMAIN_SECTION:
            lines += ["", "# A domain, here one with the name gold.", f"#[{DOMAIN_SECTION}.gold]"]
            for name, domain_key in DOMAIN_KEYS.items():
                lines.append("")
                for line in domain_help(domain_key):
                    _comment(lines, line)
                lines.append(f"#{name} = {json.dumps(domain_key.example)}")
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
