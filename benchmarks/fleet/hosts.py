# SPDX-License-Identifier: GPL-2.0-or-later
"""The hosts of the rehearsal: where each is, what ails it, and how its service is configured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from ksmd_ctl import __version__

ZONE = "topology_kubernetes_io_zone"
GO = "go"
#: Virtual machines of a crowded host, and how many of them are trust domains by name; all others are one of these.
_CROWD, _NAMED = 200, 20
#: Further hosts are on the next network.
_HOSTS_IN_A_NETWORK = 250


class Ails(StrEnum):
    """What is made wrong with a host."""

    NOTHING = "nothing"
    #: Somebody else keeps changing a knob, and the service sets it again.
    DRIFT = "drift"
    #: Somebody else has changed a knob, and the service may only report it.
    OBSERVED = "observed"
    #: The service is stopped while Prometheus scrapes it.
    STOPPED = "stopped"
    #: A trust domain shares frames with others, on nodes that are not its own.
    DOMAINS = "domains"
    #: It runs another version than most.
    VERSION = "version"
    #: It has very many units, of which some are trust domains that share frames. The last host.
    CROWDED = "crowded"


#: The alerts that have to fire for it, and no others.
ALERTS: Mapping[Ails, frozenset[str]] = {
    Ails.NOTHING: frozenset(),
    Ails.DRIFT: frozenset({"KsmdCtlDrift"}),
    Ails.OBSERVED: frozenset({"KsmdCtlKnobNotHeld"}),
    Ails.STOPPED: frozenset({"KsmdCtlDown"}),
    Ails.DOMAINS: frozenset({"KsmDomainNotIsolated", "KsmFramesAcrossDomains"}),
    Ails.VERSION: frozenset({"KsmdCtlVersionDiffers"}),
    Ails.CROWDED: frozenset({"KsmFramesAcrossDomains"}),
}
#: One of so many hosts has each ailment, but at least one in all.
_ONE_OF = 50


@dataclass(frozen=True, slots=True)
class Spec:
    """One host, as the program of an instance (benchmarks.fleet.instance) reads it.

    :ivar guests: how many virtual machines it has
    :ivar go: a file with whose coming the rehearsal begins
    :ivar quiet_after: when its guests stop writing, in seconds after that
    """

    number: int
    address: str
    ails: Ails
    version: str
    guests: int
    guest_pages: int
    go: str
    quiet_after: float
    config: str
    socket: str


@dataclass(frozen=True, slots=True)
class Pace:
    """How quickly the hosts merge, and for how long their guests write.

    :ivar pages_to_scan: that ksmd scans at once
    :ivar sleep_millisecs: between these
    """

    pages_to_scan: int
    sleep_millisecs: int
    quiet_after: float


def specs(count: int, port: int, folder: Path, pace: Pace) -> list[Spec]:
    """The hosts; each has an address of its own on the loopback network."""
    found = []
    kinds: list[Ails] = [kind for kind in Ails if kind not in (Ails.NOTHING, Ails.CROWDED)]
    each = max(1, count // _ONE_OF)
    for number in range(count):
        # Spread over clusters, zones and pools, the healthy ones after them.
        ails: Ails = kinds[number % len(kinds)] if number < each * len(kinds) else Ails.NOTHING
        if number == count - 1:
            ails = Ails.CROWDED
        network, host = divmod(number, _HOSTS_IN_A_NETWORK)
        one = Spec(
            number,
            f"127.0.{network + 1}.{host + 1}:{port}",
            ails,
            "0.0.9" if ails is Ails.VERSION else __version__,
            _CROWD if ails is Ails.CROWDED else 2 + number % 3,
            # What users see of frames that domains share is in steps of 256.
            {Ails.DOMAINS: 1024, Ails.CROWDED: 16}.get(ails, 256 + 64 * (number % 5)),
            str(folder / GO),
            # So many guests that write would leave a slow scan nothing to merge.
            0.0 if ails is Ails.CROWDED else pace.quiet_after,
            str(folder / f"{number}.toml"),
            str(folder / f"{number}.socket"),
        )
        Path(one.config).write_text(_configuration(one, folder, pace))
        (folder / f"{number}.json").write_text(json.dumps(asdict(one)))
        found.append(one)
    return found


def _configuration(one: Spec, folder: Path, pace: Pace) -> str:
    text = f"""policy = "fixed"
[knobs]
run = 1
pages_to_scan = {pace.pages_to_scan}
sleep_millisecs = {pace.sleep_millisecs}
merge_across_nodes = 0
stable_node_chains_prune_millisecs = 2000
[service]
socket = "{one.socket}"
state_directory = "{folder}/{one.number}.state"
runtime_directory = "{folder}/{one.number}.run"
on_drift = "{"observe" if one.ails is Ails.OBSERVED else "enforce"}"
"""
    if one.ails in (Ails.CROWDED, Ails.DOMAINS):
        text += "[census]\ninterval = 5\ncpu_share = 0.2\n"
    if one.ails is Ails.CROWDED:
        text += '[domains]\nmode = "report"\nunmatched = "d0"\n'
        text += "".join(f'[domains.d{number}]\nunits = ["*-vm-{number}.scope"]\n' for number in range(_NAMED))
    if one.ails is Ails.DOMAINS:
        text += """[domains]
mode = "report"
[domains.gold]
nodes = "0"
units = ["machine-qemu-web-1.scope"]
"""
    return text


def labels(one: Spec) -> dict[str, str]:
    """Labels of its target, as relabelling in Kubernetes gives them; one host of 20 is none of a cluster."""
    if one.number % 20 == 19:
        return {}
    return {
        "cluster": ("east", "west")[one.number % 2],
        ZONE: f"zone-{'abc'[one.number % 3]}",
        "node_pool": ("general", "memory")[one.number // 2 % 2],
        "node": f"worker-{one.number}",
        "pod": f"ksmd-ctl-{one.number:05x}",
    }
