# SPDX-License-Identifier: GPL-2.0-or-later
"""Who belongs to which domain: the first that names it, and what becomes of the rest."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from ksmd_ctl.config.domains import Domain, Domains
from ksmd_ctl.domains.members import belongs, domain_of, domains_of, slices_of
from ksmd_ctl.reports.sharing import grouping
from tests.fakes.host import process


def one(**facts: Any) -> Any:
    return process(7, **{"group": "group", **facts})


@pytest.mark.parametrize(
    ("domain", "facts"),
    [
        (Domain("d", units=("gold-*.service",)), {"unit": "gold-1.service"}),
        (Domain("d", units=("a.scope", "b.scope")), {"unit": "b.scope"}),
        (Domain("d", slices=("gold.slice",)), {"cgroup": "/gold.slice/gold-a.slice/x.service"}),
        (Domain("d", slices=("gold-a.slice",)), {"cgroup": "/gold.slice/gold-a.slice/x.service/y"}),
        (Domain("d", machines=("vm-?",)), {"group": "vm-1", "machine": True}),
        (Domain("d", pods=("gold-*",)), {"namespace": "gold-eu", "group": "gold-eu/vm", "machine": True}),
        (Domain("d", users={"alice": 1000, "0": 0}), {"uid": 1000}),
        (Domain("d", users={"0": 0}), {"uid": 0}),
        (Domain("d", cgroups=("/gold/*",)), {"cgroup": "/gold/a/b"}),
        (Domain("d", cgroups=("/gold",)), {"cgroup": "/gold"}),
        (Domain("d", cgroups=("/gold", "/silver/")), {"cgroup": "/silver/a/b"}),
        (Domain("d", cgroups=("/*",)), {"cgroup": "/x"}),
        (Domain("d", units=("x",), users={"0": 0}), {"unit": "y", "uid": 0}),
    ],
)
def test_any_key_that_fits_is_enough(domain: Domain, facts: dict[str, Any]) -> None:
    assert belongs(one(**facts), domain)


@pytest.mark.parametrize(
    ("domain", "facts"),
    [
        (Domain("d"), {"unit": "a.service", "uid": 0}),
        (Domain("d", units=("*",)), {"unit": ""}),
        (Domain("d", units=("a.service",)), {"unit": "A.service"}),
        # A unit may be called as somebody's virtual machine.
        (Domain("d", machines=("vm-1",)), {"group": "vm-1", "machine": False}),
        # What is below a unit was made by whom that was delegated to.
        (Domain("d", slices=("gold.slice",)), {"cgroup": "/system.slice/box.service/gold.slice/x.service"}),
        (Domain("d", slices=("gold.slice",)), {"cgroup": "/lxc/gold.slice"}),
        (Domain("d", cgroups=("/gold",)), {"cgroup": "/golden"}),
        (Domain("d", cgroups=("/gold/*",)), {"cgroup": "/gold"}),
        (Domain("d", cgroups=("/*",)), {"cgroup": ""}),
        (Domain("d", users={"0": 0}), {"uid": None}),
        (Domain("d", pods=("*",)), {"namespace": ""}),
    ],
)
def test_nobody_belongs_by_what_is_not_certain(domain: Domain, facts: dict[str, Any]) -> None:
    assert not belongs(one(**facts), domain)


def test_slices() -> None:
    assert slices_of("/user.slice/user-1000.slice/user@1000.service/app.slice") == ("user.slice", "user-1000.slice")
    assert slices_of("/") == slices_of("") == ()


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        ({"group": "vm-1", "unit": "machine-qemu\\x2d1.scope", "machine": True}, "vm-1"),
        ({"group": "tenant@.service", "unit": "tenant@a.service"}, "tenant@a.service"),
        ({"group": "docker-*.scope", "unit": f"docker-{'0a' * 32}.scope"}, f"docker-{'0a' * 32}.scope"),
        ({"group": "session-*.scope", "unit": "session-7.scope"}, "session-7.scope"),
        ({"group": "m@.service/web", "unit": "m@a.service", "machine": True}, "m@a.service/web"),
        ({"group": "user-1000/app@.service", "unit": "user@1000.service"}, "user-1000/app@.service"),
        ({"group": "a-b.service", "unit": "a\\x2db.service"}, "a\\x2db.service"),
        ({"group": "lxc/101/web", "cgroup": "/lxc/101/init.scope", "machine": True}, "lxc/101/web"),
        ({"group": "app", "cgroup": "/docker/0a"}, "app in /docker/0a"),
        ({"group": "container/web", "cgroup": "/docker/0a", "machine": True}, "container/web in /docker/0a"),
        ({"group": "web", "cgroup": "/machine/qemu-1-web", "machine": True}, "web"),
        ({"group": "app", "cgroup": "/"}, "app"),
    ],
)
def test_instances_containers_and_sessions_are_domains_of_their_own(facts: dict[str, Any], name: str) -> None:
    assert domain_of(Domains(), one(**facts)) == name


GOLD, SILVER = Domain("gold", units=("gold*",)), Domain("silver", units=("*",))
PROCESSES = [process(1, "gold-1", unit="gold-1"), process(2, "b", unit="b"), process(3, "c"), process(4, "c")]


def pids(config: Domains) -> dict[str, list[int]]:
    return {found.name: [one.id.pid for one in found.processes] for found in domains_of(config, PROCESSES)}


def test_the_first_domain_that_fits_has_it() -> None:
    assert pids(Domains((GOLD, SILVER))) == {"gold": [1], "silver": [2], "c": [3, 4]}
    assert pids(Domains((SILVER, GOLD))) == {"silver": [1, 2], "gold": [], "c": [3, 4]}


def test_the_rest_is_each_its_own_or_one_domain() -> None:
    assert pids(Domains((GOLD,))) == {"gold": [1], "b": [2], "c": [3, 4]}
    assert pids(Domains((GOLD,), unmatched="gold")) == {"gold": [1, 2, 3, 4]}
    assert pids(Domains((GOLD, Domain("rest")), unmatched="rest")) == {"gold": [1], "rest": [2, 3, 4]}


def test_namespaces_can_be_domains_without_a_table() -> None:
    pods = [
        process(1, "shop/web-*", unit="a.scope", namespace="shop"),
        process(2, "shop/vm", unit="b.scope", namespace="shop", machine=True),
        process(3, "bank/vault-0", unit="c.scope", namespace="bank"),
        process(4, "x.service", unit="x.service"),
    ]
    config = Domains((Domain("tellers", pods=("bank",)),), unmatched="each namespace")
    assert [domain_of(config, one) for one in pods] == ["namespace/shop", "namespace/shop", "tellers", "x.service"]
    # Each pod is one of its own otherwise, also where a controller has started several.
    own = [domain_of(Domains(()), one) for one in pods]
    assert own == ["shop/web-* in a.scope", "shop/vm", "bank/vault-0", "x.service"]


def test_a_group_with_the_name_of_a_domain_is_not_taken_for_it() -> None:
    found = domains_of(Domains((GOLD,)), [process(1, "gold", unit="x", machine=True)])
    assert [(one.name, one.domain, len(one.processes)) for one in found] == [
        ("gold", GOLD, 0),
        ("gold (unmatched)", None, 1),
    ]


def test_processes_by_the_domains_that_they_belong_to() -> None:
    groups = grouping(PROCESSES, "domain", partial(domain_of, Domains((GOLD, SILVER))))
    # Without merged pages nobody shares any.
    assert groups.names == ()
    merged = [
        process(pid, unit, pages, unit=unit) for pid, unit, pages in ((1, "gold-1", 5), (2, "b", 9), (3, "gold-2", 2))
    ]
    groups = grouping(merged, "domain", partial(domain_of, Domains((GOLD,))))
    assert dict(zip(groups.names, ([one.pid for one in members] for members in groups.members), strict=True)) == {
        "b": [2],
        "gold": [1, 3],
    }
