# SPDX-License-Identifier: GPL-2.0-or-later
"""Who else writes the knobs, and how to take over from them; and what could not be seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from ksmd_ctl.doctor import virt_handler
from ksmd_ctl.doctor.finding import Code, Figure, Finding, Severity, Unknown
from ksmd_ctl.doctor.snapshot import NODES, SERVICE, WRITERS, Snapshot, stop_command
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.memory import KsmDetection
from ksmd_ctl.host.sample import Writer
from ksmd_ctl.reports.document import number, part, text

ADVISOR: Final = "advisor"


@dataclass(frozen=True, slots=True)
class Way:
    """What can be done about somebody who writes the knobs.

    :ivar advice: how to take over from it
    :ivar command: what that takes; empty where it is to be stopped
    :ivar merge: how to have it switch KSM on itself; empty where it never switches KSM off
    :ivar stops: it is a program of this host, which can be stopped; then nobody takes back what is written
    """

    advice: str
    command: str = ""
    merge: str = ""
    stops: bool = False

    def take_over(self, manager: Writer) -> str:
        """The command after which it writes no more; empty where that is done elsewhere."""
        return stop_command(manager) if self.stops else self.command


#: By the name of a writer (ksmd_ctl.kernel.writers).
WAYS: Final[Mapping[str, Way]] = {
    "ksmtuned": Way(
        "It is Debian's, Red Hat's or Proxmox VE's (ksm-control-daemon): stop it.",
        merge="it switches KSM on once less than KSM_THRES_COEF percent of memory (20 by default) are free: raise that "
        "in /etc/ksmtuned.conf and restart it",
        stops=True,
    ),
    "momd": Way(
        "It is oVirt's Memory Overcommitment Writer: stop it.",
        merge="it switches KSM on when memory is short: where oVirt manages this host, KSM control is in the cluster's "
        "properties, else in the rules that its configuration names (ksm.rules)",
        stops=True,
    ),
    "supervdsmd": Way("vdsm writes for oVirt's engine: switch KSM control off in the cluster's properties."),
    "virt-handler": Way(
        "It is KubeVirt's: remove ksmConfiguration from its custom resource. Where it has none, virt-handler writes "
        "nothing, and nobody manages KSM here.",
        virt_handler.UNSET,
        merge="it switches KSM on once less than 20 % of memory are available, and looks each three minutes: the "
        "annotation kubevirt.io/ksm-free-percent-override of the node sets another share (1.0: always)",
    ),
    "harvester-node-manager": Way(
        "It is Harvester's, and it writes run = 0 again while its Ksmtuned resource says stop. Leave KSM to it, or run "
        "this node without it.",
        merge="set spec.run of the node's Ksmtuned resource to 'run'; it then switches KSM on once less than "
        "spec.thresCoef percent of memory are available (100: always)",
        command="kubectl edit ksmtuned",
    ),
    "kata-ksm-throttler": Way("It is Kata Containers': stop it.", stops=True),
    "vc-ksm-throttler": Way("It is Clear Containers': stop it.", stops=True),
    "tuned": Way(
        "Its active profile writes run: choose one that doesn't.",
        "tuned-adm profile virtual-host",
        merge="its active profile switches KSM off when it is applied: another profile leaves it alone",
    ),
    ADVISOR: Way("The kernel's own advisor sets pages_to_scan.", "ksmd-ctl set advisor_mode=none"),
}


def take_over(managers: list[Writer]) -> tuple[str, str]:
    """How to take over from all of these: in words, and as one command."""
    known = [(WAYS[one.name], one) for one in managers if one.name in WAYS]
    advice = " ".join(dict.fromkeys(way.advice for way, _ in known))
    commands = [way.take_over(manager) for way, manager in known]
    return advice, " && ".join(dict.fromkeys(command for command in commands if command))


def keepers(seen: Snapshot) -> list[Writer]:
    """Those who switch KSM off, and would do it again."""
    return [one for one in seen.writers if one.name in WAYS and WAYS[one.name].merge]


def _others(seen: Snapshot) -> list[Writer]:
    # The advisor is nobody else's where the service wants it, and harmless where nobody wants another speed.
    own = seen.wanted(Knob.ADVISOR_MODE) == "scan-time" or not seen.manages or seen.wanted(Knob.PAGES_TO_SCAN) is None
    # Beside a service that manages it is told apart whether virt-handler writes: it runs on each node of KubeVirt's.
    beside = {ADVISOR} if own else set()
    beside |= {virt_handler.NAME} if seen.manages else set()
    return [one for one in seen.writers if one.name not in beside]


def writers(seen: Snapshot) -> Iterator[Finding]:
    """Programs that are known to write the knobs and run now; two managers work against each other."""
    others = _others(seen)
    drifted = [(name, knob) for name, knob in seen.knobs("drifted")]
    if not others and (not drifted or virt_handler.changes_by(seen)):
        return
    names = list(dict.fromkeys(one.name for one in others))
    figures = [Figure(one.name, "the kernel" if one.pid is None else f"pid {one.pid}", WRITERS) for one in others]
    figures += [
        Figure(f"{name} wanted {knob.get('wanted')}, found", str(knob.get("found")), SERVICE) for name, knob in drifted
    ]
    advice, command = take_over(others)
    if not others:
        yield Finding.of(
            Code.OTHER_WRITER,
            Severity.COSTS,
            "An unknown program changes knobs that the service holds",
            "A shell script, a boot parameter or an orchestrator: look for who writes to /sys/kernel/mm/ksm.",
            *figures,
            command="grep -rl mm/ksm /etc /usr/local 2>/dev/null",
        )
    elif seen.manages or len(names) > 1:
        both = ", ".join(["ksmd-ctl", *names] if seen.manages else names)
        yield Finding.of(
            Code.TWO_MANAGERS,
            Severity.COSTS,
            f"More than one program writes KSM's knobs: {both}",
            f"They undo each other's work. Keep one. {advice}",
            *figures,
            command=command,
        )
    elif seen.run == 1 or not keepers(seen):
        # Where it keeps KSM off that was told, and this was said there.
        yield Finding.of(
            Code.OTHER_WRITER,
            Severity.NOTE,
            f"{names[0]} manages KSM here",
            f"That is fine as long as nothing else writes the knobs. To have ksmd-ctl take over: {advice}",
            *figures,
            command=command,
        )


def service_blind(seen: Snapshot) -> Iterator[Finding]:
    """The service could not look at nodes and processes: what it asks of the broker fails."""
    numa = part(seen.after, "numa")
    error = text(numa, "error")
    if seen.service and error:
        yield Finding.of(
            Code.SERVICE_BLIND,
            Severity.COSTS,
            "The service can't look at processes and nodes",
            "Its metrics of nodes and groups are no longer updated, and it can neither move nor un-merge anything.",
            Figure("why", error, SERVICE),
            Figure("failures", number(numa, "failures") or 0, SERVICE),
            command="systemctl status ksmd-ctl-broker.socket ksmd-ctl-broker.service",
        )


def unseen(seen: Snapshot) -> Iterator[Finding]:
    """What could not be looked at (findings F8: who needs what), or made no sense, so that nothing is said about it."""
    errors = part(seen.after, "errors")
    bad = [name for name in errors if text(part(errors, name), "kind") not in ("absent", "")]
    unknown = [*seen.unknown, *(Unknown(name, text(part(errors, name), "text"), "") for name in bad)]
    if not unknown:
        return
    hints = dict.fromkeys(one.hint for one in unknown if one.hint)
    yield Finding.of(
        Code.UNSEEN,
        Severity.NOTE,
        f"Could not be looked at: {', '.join(one.what for one in unknown)}",
        "The doctor says nothing about these." + (f" What would help: {'; '.join(hints)}." if hints else ""),
        *(Figure(one.what, one.why, SERVICE) for one in unknown),
        command="sudo ksmd-ctl doctor" if seen.unknown else "ksmd-ctl status",
    )


def kpageflags(seen: Snapshot) -> Iterator[Finding]:
    """This kernel's kpageflags calls every anonymous page a KSM page (findings F19, fs/proc/page.c of 6.12)."""
    detection = text(part(seen.nodes or {}, "survey"), "detection") or text(part(seen.after, "numa"), "detection")
    if detection == KsmDetection.PAGEMAP:
        yield Finding.of(
            Code.KPAGEFLAGS,
            Severity.NOTE,
            "This kernel's /proc/kpageflags marks every anonymous page as a KSM page",
            "ksmd-ctl counts them by pagemap and smaps instead; other tools that count bit 21 show far too many here.",
            Figure("KSM pages detected by", detection, NODES),
        )
