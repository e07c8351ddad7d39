# SPDX-License-Identifier: GPL-2.0-or-later
"""Who else writes the knobs, and how to take over from them; and what could not be seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from ksmd_ctl.control.doctor.finding import Code, Figure, Finding, Severity
from ksmd_ctl.control.doctor.look import NODES, SERVICE, WRITERS, Look, Unknown
from ksmd_ctl.control.document import number, part, text
from ksmd_ctl.host.memory import KsmWitness
from ksmd_ctl.knobs import Knob

__all__ = ["TAKE_OVER", "kpageflags", "service_blind", "unseen", "writers"]

ADVISOR: Final = "advisor"


@dataclass(frozen=True, slots=True)
class _Way:
    """How to take over from somebody: in words, and as a command where there is one."""

    advice: str
    command: str = ""


#: By the name of a writer (ksmd_ctl.kernel.writers).
TAKE_OVER: Final[Mapping[str, _Way]] = {
    "ksmtuned": _Way(
        "It is Debian's, Red Hat's or Proxmox VE's (ksm-control-daemon); stopping it leaves run as it is.",
        "systemctl disable --now ksmtuned",
    ),
    "momd": _Way(
        "oVirt's Memory Overcommitment Manager: switch off KSM control of the cluster, or stop it.",
        "systemctl disable --now momd",
    ),
    "supervdsmd": _Way("vdsm writes for oVirt's engine: switch off KSM control in the cluster's properties."),
    "virt-handler": _Way(
        "KubeVirt: take ksmConfiguration out of its custom resource.",
        "kubectl -n kubevirt patch kubevirt kubevirt --type=json "
        '-p \'[{"op": "remove", "path": "/spec/configuration/ksmConfiguration"}]\'',
    ),
    "harvester-node-manager": _Way(
        "Harvester: set the node's Ksmtuned resource to run: stop.", "kubectl edit ksmtuned"
    ),
    "kata-ksm-throttler": _Way("Kata Containers' throttler.", "systemctl disable --now kata-ksm-throttler"),
    "vc-ksm-throttler": _Way("Clear Containers' throttler.", "systemctl disable --now vc-ksm-throttler"),
    "tuned": _Way("Its active profile writes run: choose one that doesn't.", "tuned-adm profile virtual-host"),
    ADVISOR: _Way("The kernel's own advisor sets pages_to_scan.", "ksmd-ctl set advisor_mode=none"),
}


def _others(look: Look) -> list[tuple[str, int | None]]:
    # The advisor is nobody else's where the service wants it, and harmless where nobody wants another speed.
    own = look.wanted(Knob.ADVISOR_MODE) == "scan-time" or not look.manages or look.wanted(Knob.PAGES_TO_SCAN) is None
    return [(name, pid) for name, pid in look.writers() if not (name == ADVISOR and own)]


def writers(look: Look) -> Iterator[Finding]:
    """Programs that are known to write the knobs and run now; two managers work against each other."""
    others = _others(look)
    drifted = [(name, knob) for name, knob in look.knobs("drifted")]
    if not others and not drifted:
        return
    names = list(dict.fromkeys(name for name, _ in others))
    figures = [Figure(name, "the kernel" if pid is None else f"pid {pid}", WRITERS) for name, pid in others]
    figures += [
        Figure(f"{name} wanted {knob.get('wanted')}, found", str(knob.get("found")), SERVICE) for name, knob in drifted
    ]
    ways = [TAKE_OVER[name] for name in names if name in TAKE_OVER]
    advice = " ".join([way.advice for way in ways])
    command = " && ".join(way.command for way in ways if way.command)
    if not others:
        yield Finding(
            Code.OTHER_WRITER,
            Severity.COSTS,
            "Somebody who is not known changes knobs that the service holds",
            tuple(figures),
            "A shell script, a boot parameter or an orchestrator: look for who writes to /sys/kernel/mm/ksm.",
            "grep -rl mm/ksm /etc /usr/local 2>/dev/null",
        )
    elif look.manages or len(names) > 1:
        both = ", ".join(["ksmd-ctl", *names] if look.manages else names)
        yield Finding(
            Code.TWO_MANAGERS,
            Severity.COSTS,
            f"More than one writes KSM's knobs: {both}",
            tuple(figures),
            f"They undo each other's work. Keep one. {advice}",
            command,
        )
    else:
        yield Finding(
            Code.OTHER_WRITER,
            Severity.NOTE,
            f"{names[0]} manages KSM here",
            tuple(figures),
            f"That is fine as long as it is alone. To have ksmd-ctl take over: {advice}",
            command,
        )


def service_blind(look: Look) -> Iterator[Finding]:
    """The service could not look at nodes and processes: what it asks of the broker fails."""
    numa = part(look.after, "numa")
    error = text(numa, "error")
    if look.service and error:
        yield Finding(
            Code.SERVICE_BLIND,
            Severity.COSTS,
            "The service can't look at processes and nodes",
            (Figure("why", error, SERVICE), Figure("failures", number(numa, "failures") or 0, SERVICE)),
            "Its metrics of nodes and groups stand still, and it can neither move nor un-merge anything.",
            "systemctl status ksmd-ctl-broker.socket ksmd-ctl-broker.service",
        )


def unseen(look: Look) -> Iterator[Finding]:
    """What could not be looked at (findings F8: who needs what), or made no sense, so that nothing is said about it."""
    errors = part(look.after, "errors")
    bad = [name for name in errors if text(part(errors, name), "kind") not in ("absent", "")]
    unknown = [*look.unknown, *(Unknown(name, text(part(errors, name), "text"), "") for name in bad)]
    if not unknown:
        return
    hints = dict.fromkeys(one.hint for one in unknown if one.hint)
    yield Finding(
        Code.UNSEEN,
        Severity.NOTE,
        f"Not seen: {', '.join(one.what for one in unknown)}",
        tuple(Figure(one.what, one.why, SERVICE) for one in unknown),
        "So nothing is said about these." + (f" What would help: {'; '.join(hints)}." if hints else ""),
        "sudo ksmd-ctl doctor" if look.unknown else "ksmd-ctl status",
    )


def kpageflags(look: Look) -> Iterator[Finding]:
    """This kernel's kpageflags calls every anonymous page a KSM page (findings F19, fs/proc/page.c of 6.12)."""
    witness = text(part(look.nodes or {}, "survey"), "witness") or text(part(look.after, "numa"), "witness")
    if witness == KsmWitness.PAGEMAP:
        yield Finding(
            Code.KPAGEFLAGS,
            Severity.NOTE,
            "This kernel's /proc/kpageflags calls every anonymous page a KSM page",
            (Figure("KSM pages told by", witness, NODES),),
            "ksmd-ctl counts them by pagemap and smaps instead; other tools that count bit 21 say far too much here.",
        )
