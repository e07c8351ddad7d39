# SPDX-License-Identifier: GPL-2.0-or-later
"""``[domains]``: what is read, what contradicts it, and what it holds."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from ksmd_ctl.config.domains import EACH_ITS_OWN, Domain, DomainMode, OnViolation
from ksmd_ctl.config.loader import load
from ksmd_ctl.config.model import Want
from ksmd_ctl.errors import ConfigError
from ksmd_ctl.host.knobs import Knob

GOLD = '[domains.gold]\nnodes = "0-1"\nunits = ["gold-*.service"]\n'
SILVER = '[domains.silver]\nnodes = "2"\nslices = ["silver.slice"]\n'
NODES = 'policy = "adaptive"\n[domains]\nmode = "nodes"\n'


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def problems(path: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path)
    return [str(problem).removeprefix(f"{path}: ") for problem in caught.value.problems]


def test_without_any_setting_there_are_no_domains(tmp_path: Path) -> None:
    assert load(write(tmp_path / "a.toml", "")).domains is None
    assert load(write(tmp_path / "b.toml", "[domains]\n")).domains is None


def test_each_group_may_be_its_own_domain_and_nothing_else_is_said(tmp_path: Path) -> None:
    domains = load(write(tmp_path / "b.toml", '[domains]\nunmatched = "each namespace"\n')).domains
    assert domains is not None
    assert domains.unmatched == "each namespace"
    domains = load(path := write(tmp_path / "a.toml", '[domains]\nunmatched = "each its own"\n')).domains
    assert domains is not None
    assert (domains.domains, domains.mode, domains.unmatched) == ((), DomainMode.REPORT, EACH_ITS_OWN)
    assert domains.origin == path


def test_every_key(tmp_path: Path) -> None:
    me = pwd.getpwuid(os.getuid()).pw_name
    text = (
        '[domains]\nunmatched = "rest"\n'
        f'[domains.gold]\nnodes = "0,2-3"\nunits = ["a*.service", "b.scope"]\nslices = ["gold.slice"]\n'
        f'machines = ["vm-?"]\npods = ["gold"]\nusers = ["{me}", "4294967294"]\ncgroups = ["/gold/*"]\n'
        "[domains.rest]\n"
    )
    domains = load(path := write(tmp_path / "a.toml", text)).domains
    assert domains is not None
    assert domains.domains == (
        Domain(
            "gold",
            frozenset({0, 2, 3}),
            ("a*.service", "b.scope"),
            ("gold.slice",),
            ("vm-?",),
            ("gold",),
            {me: os.getuid(), "4294967294": 4294967294},
            ("/gold/*",),
            path,
        ),
        # It takes the rest, so it needs no members.
        Domain("rest", origin=path),
    )


def test_later_files_win_key_by_key_and_the_order_is_that_of_the_first_mention(tmp_path: Path) -> None:
    main = write(tmp_path / "a.toml", GOLD + SILVER)
    second = write(tmp_path / "conf.d/1.toml", '[domains.silver]\nnodes = "3"\n[domains.iron]\nusers = ["0"]\n')
    write(tmp_path / "conf.d/2.toml", '[domains.gold]\nunits = ["au.service"]\n')
    domains = load(main).domains
    assert domains is not None
    assert [(found.name, found.origin) for found in domains.domains] == [
        ("gold", main),
        ("silver", main),
        ("iron", second),
    ]
    assert domains.domains[0].units == ("au.service",)
    assert (domains.domains[1].nodes, domains.domains[1].slices) == (frozenset({3}), ("silver.slice",))


def test_mode_nodes_holds_what_separates(tmp_path: Path) -> None:
    config = load(path := write(tmp_path / "a.toml", f'{NODES}on_violation = "stop"\n{GOLD}{SILVER}'))
    assert config.domains is not None
    assert (config.domains.mode, config.domains.on_violation) == (DomainMode.NODES, OnViolation.STOP)
    held = Want(0, True, f"{path}: domains.mode")
    assert config.knobs == {Knob.MERGE_ACROSS_NODES: held, Knob.USE_ZERO_PAGES: held}
    # The policy would hold it at 1 otherwise.
    assert not config.holds_zero_pages
    assert load(write(tmp_path / "b.toml", 'policy = "adaptive"\n' + GOLD)).holds_zero_pages


def test_mode_nodes_is_all_that_a_fixed_policy_needs(tmp_path: Path) -> None:
    config = load(write(tmp_path / "a.toml", NODES.replace("adaptive", "fixed") + GOLD))
    assert config.knobs[Knob.MERGE_ACROSS_NODES].value == 0


def test_a_knob_that_is_declared_as_it_must_be_is_no_contradiction(tmp_path: Path) -> None:
    path = write(tmp_path / "a.toml", NODES + GOLD + "[knobs]\nmerge_across_nodes = 0\n")
    assert load(path).knobs[Knob.MERGE_ACROSS_NODES] == Want(0, False, path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            NODES + GOLD + "[knobs]\nmerge_across_nodes = 1\n",
            'knobs.merge_across_nodes: domains.mode = "nodes" (PATH) needs 0: leave one of them out',
        ),
        (
            NODES + GOLD + "[knobs]\nuse_zero_pages = 1\n",
            'knobs.use_zero_pages: domains.mode = "nodes" (PATH) needs 0: leave one of them out',
        ),
        (
            NODES + GOLD + "[census]\ncpu_share = 0\n",
            'domains.mode: "nodes" has no effect: census.cpu_share = 0 (PATH) switches the audits off that it needs',
        ),
        (
            NODES + GOLD + "[healing]\nzero_pages = true\n",
            "healing.zero_pages: true has no effect: knobs.use_zero_pages = 0 (PATH: domains.mode) holds it off",
        ),
        (
            '[domains]\nmode = "nodes"\n' + GOLD,
            'domains.mode: "nodes" has no effect: no file sets policy, and the default is "observe", '
            "which writes no knob",
        ),
        (NODES, 'domains.mode: "nodes" needs domains: there is no table [domains.NAME]'),
        (
            NODES + '[domains.gold]\nunits = ["a.scope"]\n',
            'domains.gold.nodes: is missing: mode = "nodes" separates domains by their nodes',
        ),
        (
            GOLD + '[domains.iron]\nnodes = "1-4"\nusers = ["0"]\n',
            "domains.iron.nodes: 1 belongs to the domain gold too: each node is one domain's alone",
        ),
        (
            '[domains.gold]\nnodes = "0"\n',
            "domains.gold: says nothing of who belongs to it: it needs one of units, slices, machines, pods, users, "
            "cgroups",
        ),
        (
            '[domains]\nunmatched = "glod"\n' + GOLD,
            "domains.unmatched: there is no domain 'glod'; did you mean gold?",
        ),
        (
            '[domains]\non_violation = "stop"\n' + GOLD,
            'domains.on_violation: "stop" has no effect: mode = "report" changes nothing',
        ),
        ('[domains]\nmode = "node"\n' + GOLD, "domains.mode: 'node' is not one of report, nodes"),
        ("[domains]\nunmatched = 1\n", "domains.unmatched: 1 is not a text"),
        ("[domains]\ngold = 1\n", "domains.gold: unknown setting"),
        ('[domains."a b"]\n', "domains.a b: 'a b' can't be the name of a domain: up to 63 letters, digits, _ . and -"),
        (GOLD + "node = 1\n", "domains.gold.node: unknown setting; did you mean nodes?"),
        (
            "[domains.gold]\nnodes = 1\n",
            "domains.gold.nodes: '1' is not a list of nodes: write it in quotes, as in \"0,2-3\"",
        ),
        ('[domains.gold]\nnodes = "1-"\n', "domains.gold.nodes: '1-' is not a list of nodes, as in 0,2-3"),
        ('[domains.gold]\nunits = "a.service"\n', "domains.gold.units: 'a.service' is not a list of names or patterns"),
        ("[domains.gold]\nunits = []\n", "domains.gold.units: [] is not a list of names or patterns"),
        ('[domains.gold]\nunits = ["a", ""]\n', "domains.gold.units: '' is not a name or pattern"),
        (
            '[domains.gold]\ncgroups = ["gold"]\n',
            "domains.gold.cgroups: 'gold' is not the path of a cgroup: that begins with /",
        ),
        (
            '[domains.gold]\ncgroups = ["/sys/fs/cgroup/gold"]\n',
            "domains.gold.cgroups: '/sys/fs/cgroup/gold' is the path of a file: the cgroup is '/gold'",
        ),
        (
            '[domains.gold]\nunits = ["gold"]\n',
            "domains.gold.units: 'gold' is not the name of a unit: 'gold.service' is one",
        ),
        (
            '[domains.gold]\nslices = ["gold-*", "gold"]\n',
            "domains.gold.slices: 'gold' is not the name of a slice: that ends in .slice",
        ),
        (
            '[domains.gold]\nslices = ["-.slice"]\n',
            'domains.gold.slices: "-.slice" is above all units: unmatched = "NAME" is a domain for all others',
        ),
        ('[domains.gold]\n"a\\u001b[2J" = 1\n', "domains.gold.a\\x1b[2J: unknown setting"),
        (
            '[domains.gold]\nusers = ["no-such-user"]\n',
            "domains.gold.users: there is no user 'no-such-user' on this host",
        ),
        (
            '[domains.gold]\nusers = ["4294967295"]\n',
            "domains.gold.users: '4294967295' is not the number of a user",
        ),
    ],
)
def test_what_is_no_configuration_of_domains(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path / "main.toml", text)
    assert problems(path) == [said.replace("PATH", path)]
