# SPDX-License-Identifier: GPL-2.0-or-later
"""Trust domains as a configuration has them: ``[domains]``, and a table ``[domains.NAME]`` for each."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ksmd_ctl.config.values import Type
from ksmd_ctl.errors import did_you_mean
from ksmd_ctl.figures import ranges_text
from ksmd_ctl.host.cpus import parse_nodes
from ksmd_ctl.tomltext import shown

DOMAIN_SECTION = "domains"

#: As a value of ``unmatched``: each group of processes (`ksmd_ctl.host.memory.Process.group`) is a domain of its own.
EACH_ITS_OWN = "each its own"
#: As that, but all pods of a namespace are one domain.
EACH_NAMESPACE = "each namespace"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", re.ASCII)
_GLOB = re.compile(r"[*?\[]")
_LARGEST_UID = (1 << 32) - 2


class DomainMode(StrEnum):
    """What is done about domains."""

    REPORT = "report"
    NODES = "nodes"


class OnViolation(StrEnum):
    """What is done while a domain is not isolated, with `DomainMode.NODES`."""

    REPORT = "report"
    UNMERGE = "unmerge"
    STOP = "stop"


def _patterns(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{shown(value)} is not a list of names or patterns")
    for pattern in value:
        if not isinstance(pattern, str) or not pattern or not pattern.isprintable():
            raise ValueError(f"{shown(pattern)} is not a name or pattern")
    return tuple(dict.fromkeys(value))


def _units(value: object) -> tuple[str, ...]:
    for pattern in (found := _patterns(value)):
        if "." not in pattern and not _GLOB.search(pattern):
            raise ValueError(f"{shown(pattern)} is not the name of a unit: {shown(f'{pattern}.service')} is one")
    return found


def _slices(value: object) -> tuple[str, ...]:
    for pattern in (found := _patterns(value)):
        if not pattern.endswith(".slice") and not _GLOB.search(pattern):
            raise ValueError(f"{shown(pattern)} is not the name of a slice: that ends in .slice")
        if pattern == "-.slice":
            raise ValueError('"-.slice" is above all units: unmatched = "NAME" is a domain for all others')
    return found


def _cgroups(value: object) -> tuple[str, ...]:
    for pattern in (found := _patterns(value)):
        if not pattern.startswith("/"):
            raise ValueError(f"{shown(pattern)} is not the path of a cgroup: that begins with /")
        _, mounted, below = pattern.partition("/fs/cgroup")
        if mounted:
            raise ValueError(f"{shown(pattern)} is the path of a file: the cgroup is {shown(below or '/')}")
    return found


def _users(value: object) -> Mapping[str, int]:
    # Only here: it is needed where a domain names users only.
    import pwd

    found = {}
    for name in _patterns(value):
        if name.isascii() and name.isdigit():
            if len(name) > 10 or int(name) > _LARGEST_UID:
                raise ValueError(f"{shown(name)} is not the number of a user")
            found[name] = int(name)
            continue
        try:
            found[name] = pwd.getpwnam(name).pw_uid
        except KeyError:
            raise ValueError(f"there is no user {shown(name)} on this host") from None
    return found


@dataclass(frozen=True, slots=True)
class DomainKey:
    """One key of a domain's table: its type, what it means, and an example as a file would have it."""

    type: Type
    help: str
    example: object


_PATTERNS = Type(_patterns, ("  a list of names or patterns; * and ? as in a shell, * also matches /",))

#: The keys of ``[domains.NAME]``; each is a field of `Domain`.
DOMAIN_KEYS: Mapping[str, DomainKey] = {
    "nodes": DomainKey(
        Type(parse_nodes, ('  a list of nodes, as in "0,2-3"',)),
        "The NUMA nodes that are this domain's alone. Nothing but its members may allocate there, and they nowhere "
        'else. mode = "nodes" needs it.',
        "0",
    ),
    "units": DomainKey(Type(_units, _PATTERNS.lines), "systemd units of its members.", ["gold-*.service"]),
    "slices": DomainKey(
        Type(_slices, _PATTERNS.lines), "systemd slices, whatever is in them at any depth.", ["gold.slice"]
    ),
    "machines": DomainKey(_PATTERNS, "Names of virtual machines.", ["gold-*"]),
    "pods": DomainKey(_PATTERNS, "Namespaces of pods (Kubernetes).", ["gold"]),
    "users": DomainKey(
        Type(_users, ("  a list of names or numbers of users of this host",)),
        "Effective users of its members. Names are looked up when the configuration is read.",
        ["1000"],
    ),
    "cgroups": DomainKey(
        Type(_cgroups, _PATTERNS.lines), "Paths of control groups, below /sys/fs/cgroup.", ["/gold/*"]
    ),
}


@dataclass(frozen=True, slots=True)
class Domain:
    """Who may share memory with one another.

    :ivar nodes: the nodes that are its alone; none where it has no nodes of its own (mode ``report`` only)
    :ivar users: numbers by the names that the file has
    :ivar origin: the file that names it first
    """

    name: str
    nodes: frozenset[int] = frozenset()
    units: tuple[str, ...] = ()
    slices: tuple[str, ...] = ()
    machines: tuple[str, ...] = ()
    pods: tuple[str, ...] = ()
    users: Mapping[str, int] = dataclasses.field(default_factory=dict)
    cgroups: tuple[str, ...] = ()
    origin: str = ""

    @property
    def names_members(self) -> bool:
        """Whether it says who belongs to it."""
        return any((self.units, self.slices, self.machines, self.pods, self.users, self.cgroups))


@dataclass(frozen=True, slots=True)
class Domains:
    """What ``[domains]`` says.

    :ivar domains: in the order of the file: who belongs to several belongs to the first
    :ivar unmatched: the domain of who belongs to none, or `EACH_ITS_OWN` or `EACH_NAMESPACE`
    :ivar origin: the file that names the mode, or else the first file with domains
    """

    domains: tuple[Domain, ...] = ()
    mode: DomainMode = DomainMode.REPORT
    unmatched: str = EACH_ITS_OWN
    on_violation: OnViolation = OnViolation.REPORT
    origin: str = ""


def parse_name(name: str) -> None:
    """Check the name of a domain.

    :raises ValueError: it can't be one
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{shown(name)} can't be the name of a domain: up to 63 letters, digits, _ . and -")


def parse_key(key: str, value: object) -> Any:
    """The value of a key of ``[domains.NAME]``.

    :raises ValueError: there is no such key, or it does not take this
    """
    if key not in DOMAIN_KEYS:
        raise ValueError(f"unknown setting{did_you_mean(key, DOMAIN_KEYS)}")
    return DOMAIN_KEYS[key].type.parse(value)


def mistakes(domains: Domains) -> Iterator[tuple[str, str, str]]:
    """What is wrong with domains as a whole: the file, the key below ``[domains]``, and the problem."""
    names = [domain.name for domain in domains.domains]
    known = [*names, EACH_ITS_OWN, EACH_NAMESPACE]
    if domains.unmatched not in known:
        text = f"there is no domain {shown(domains.unmatched)}{did_you_mean(domains.unmatched, known)}"
        yield domains.origin, "unmatched", text
    if domains.mode is DomainMode.REPORT and domains.on_violation is not OnViolation.REPORT:
        text = f'"{domains.on_violation}" has no effect: mode = "{domains.mode}" changes nothing'
        yield domains.origin, "on_violation", text
    if domains.mode is DomainMode.NODES and not domains.domains:
        yield domains.origin, "mode", '"nodes" needs domains: there is no table [domains.NAME]'
    owners: dict[int, Domain] = {}
    for domain in domains.domains:
        if not domain.names_members and domain.name != domains.unmatched:
            keys = ", ".join(key for key in DOMAIN_KEYS if key != "nodes")
            yield domain.origin, domain.name, f"says nothing of who belongs to it: it needs one of {keys}"
        if domains.mode is DomainMode.NODES and not domain.nodes:
            yield domain.origin, f"{domain.name}.nodes", 'is missing: mode = "nodes" separates domains by their nodes'
        shared: dict[str, list[int]] = {}
        for node in sorted(domain.nodes):
            if (owner := owners.setdefault(node, domain)) is not domain:
                shared.setdefault(owner.name, []).append(node)
        for name, nodes in shared.items():
            text = f"{ranges_text(nodes)} belongs to the domain {name} too: each node is one domain's alone"
            yield domain.origin, f"{domain.name}.nodes", text
