# SPDX-License-Identifier: GPL-2.0-or-later
"""Which domain a process belongs to: the first that names it, else what the configuration says of the rest.

A process belongs by what its owner can't choose: its cgroup as systemd made it, its effective user, and the name of a
virtual machine as `ksmd_ctl.kernel.machines` believes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ksmd_ctl.config.domains import EACH_ITS_OWN, EACH_NAMESPACE, Domain, Domains
from ksmd_ctl.host.memory import Process


@dataclass(frozen=True, slots=True)
class DomainMembers:
    """A domain and its processes.

    :ivar name: the domain's, or of what is a domain of its own `own_domain`
    :ivar domain: None where no configuration names it
    """

    name: str
    domain: Domain | None
    processes: tuple[Process, ...]

    @property
    def nodes(self) -> frozenset[int]:
        """The nodes that are its alone; none where it has none."""
        return frozenset() if self.domain is None else self.domain.nodes


def belongs(process: Process, domain: Domain) -> bool:
    """Whether a domain names a process."""
    return (
        _matches(process.unit, domain.units)
        or any(_matches(slice_, domain.slices) for slice_ in slices_of(process.cgroup))
        or (process.machine and _matches(process.group, domain.machines))
        or _matches(process.namespace, domain.pods)
        or process.uid in domain.users.values()
        or any(_below(process.cgroup, pattern) for pattern in domain.cgroups)
    )


def slices_of(cgroup: str) -> tuple[str, ...]:
    """The slices that this host's systemd put a cgroup in, the outermost first.

    What is below a unit was made by whoever that was delegated to, and may have any name.
    """
    found = []
    for part in cgroup.strip("/").split("/"):
        if not part.endswith(".slice"):
            break
        found.append(part)
    return tuple(found)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return bool(name) and any(fnmatchcase(name, pattern) for pattern in patterns)


def _below(cgroup: str, pattern: str) -> bool:
    # Of processes that are in no cgroup that is known nothing can be said.
    return bool(cgroup) and any(fnmatchcase(cgroup, one) for one in (pattern, f"{pattern.rstrip('/')}/*"))


def domain_of(config: Domains, process: Process) -> str:
    """The name of the domain that a process belongs to; of what is a domain of its own `own_domain`."""
    domain = next((domain for domain in config.domains if belongs(process, domain)), None)
    if domain is not None:
        return domain.name
    if config.unmatched not in (EACH_ITS_OWN, EACH_NAMESPACE):
        return config.unmatched
    by_namespace = config.unmatched == EACH_NAMESPACE and process.namespace
    own = f"namespace/{process.namespace}" if by_namespace else own_domain(process)
    return f"{own} (unmatched)" if any(own == domain.name for domain in config.domains) else own


def own_domain(process: Process) -> str:
    """The virtual machine that a process is, or the unit that it is in.

    `Process.group` stays the same from start to start (docs/json.md, Groups). So instances of a unit, containers, and
    sessions of all users have one group, and they don't trust one another.
    """
    group = process.group or process.name
    place, slash, rest = group.partition("/")
    if not process.unit:
        known = place == "lxc" or (process.machine and place != "container")
        return group if known or process.cgroup in ("", "/") else f"{group} in {process.cgroup}"
    if process.machine:
        return f"{process.unit}/{rest}" if slash and place.endswith((".service", ".scope")) else group
    if group.endswith("-*") and process.namespace:
        # One of several pods that a controller has started.
        return f"{group} in {process.unit}"
    # A unit of a user's own systemd.
    return group if slash else process.unit


def domains_of(config: Domains, processes: Iterable[Process]) -> tuple[DomainMembers, ...]:
    """All domains with their members: those of the configuration in its order, also without any, then all others."""
    found: dict[str, list[Process]] = {domain.name: [] for domain in config.domains}
    for process in processes:
        found.setdefault(domain_of(config, process), []).append(process)
    named = [DomainMembers(domain.name, domain, tuple(found.pop(domain.name))) for domain in config.domains]
    return (*named, *(DomainMembers(name, None, tuple(those)) for name, those in sorted(found.items())))
