# SPDX-License-Identifier: GPL-2.0-or-later
"""The package in a Debian system that has booted: the whole job, with the steps that take minutes."""

from __future__ import annotations

import json
import os
import re

import pytest

from tests.guest.system_job import WHOLE
from tests.guest.test_system import Facts, boot, of

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(os.geteuid() != 0, reason="building the image needs root"),
]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    return boot(tmp_path_factory.mktemp("system"), WHOLE)


def test_domains_get_nodes_by_systemd_and_give_them_back(facts: Facts) -> None:
    found = of(facts, "assigned")
    free = {"gold": ["", "0-1"], "silver": ["", "0-1"]}
    assert found["before"] == found["still"] == free
    planned = json.loads(found["dry"]["out"])["units"]
    assert [(one["unit"], one["nodes"]) for one in planned] == [("gold.service", [0]), ("silver.slice", [1])]
    assert found["done"]["status"] == 0, found["done"]
    assert found["during"] == {"gold": ["0", "0"], "silver": ["1", "1"]}
    assert {unit: one["before"] for unit, one in found["kept"].items()} == {"gold.service": "", "silver.slice": ""}
    assert json.loads(found["undone"]["out"])["undone"] == ["gold.service", "silver.slice"]
    assert found["after"] == free
    assert found["ended"]["status"] == 6
    assert "the domain gold has no member with mergeable memory" in found["ended"]["err"]
    plan = json.loads(found["plan"]["out"])
    # Nothing has to be moved, so it does not matter which of them gets which.
    assert sorted(one["nodes"] for one in plan["domains"].values()) == [[0], [1]]


def test_merging_is_switched_by_the_broker_where_configuration_and_unit_allow_it(facts: Facts) -> None:
    found = of(facts, "switching")
    assert found["not allowed"]["status"] == 6
    assert "[switch] allow = false" in found["not allowed"]["err"]
    # As installed the broker may not trace.
    assert found["no ptrace"]["status"] == 3
    assert "SystemCallFilter=ptrace" in found["no ptrace"]["err"]
    flagged, pages = found["untouched"]
    assert flagged > 0
    assert pages > 450
    # docs/security.md: 0.1 more.
    assert float(re.findall(r"service: ([0-9.]+)", found["exposure"])[0]) <= 2.1
    assert found["reader"]["status"] == 3
    assert json.loads(found["dry"]["out"])["processes"][0]["before"] is not False
    (one,) = json.loads(found["off"]["out"])["processes"]
    assert (found["off"]["status"], one["after"], one["left"], one["method"]) == (0, False, [], "inject")
    assert one["unmerged"] > 450
    # The kernel's count of its merged pages is as old as ksmd's last visit.
    assert found["after"] == 0
    assert f"off: web.service (pid {found['pid']})" in " ".join(found["text"].split())
    assert found["broker"] == "active"


def test_what_was_switched_off_and_starts_again_is_reported_and_kept_off(facts: Facts) -> None:
    found = of(facts, "started_again")
    assert found["restarted"]["mergeable"] > 0
    pid = found["restarted"]["pid"]
    assert found["again"][0]["again"] == {"pid": pid}
    assert f"started again as pid {pid}, and is mergeable" in " ".join(found["text"].split())
    assert [(one["pid"], one["on"]) for one in found["kept"]] == [(pid, False)]
    assert "the service, [switch] keep" in found["journal"]
    told = [(event["event"], event["who"]) for event in json.loads(found["history"]["out"])["events"]]
    assert ("switched", "the service, [switch] keep") in told
    assert {"switched", "switch_failed", "started_again"} <= {event for event, _ in told}


def test_a_drop_in_switches_merging_at_the_next_start(facts: Facts) -> None:
    found = of(facts, "persisted")
    assert found["before"]["mergeable"] == 0
    for word, said in (("on", "yes"), ("off", "no")):
        came = found[word]
        assert came["done"]["status"] == 0, came
        # Trixie has 257, and a kernel with the prctl.
        assert came["file"] == f"[Service]\nMemoryKSM={said}\n"
        assert [(count > 0) for count in (came["now"], came["mergeable"])] == [word == "on"] * 2
    came = found["by command"]
    assert "/usr/bin/ksmd-ctl merge on --pid $MAINPID" in came["file"]
    assert came["status"]["status"] == 0
    assert came["mergeable"] > 0


def test_ksmd_runs_where_and_how_the_configuration_says_and_is_put_back(facts: Facts) -> None:
    found = of(facts, "scheduling")
    configured = [[1], os.SCHED_IDLE, 7]
    # `adaptive` has made ksmd an idle task; without a service it is as the kernel starts it.
    assert found["before"] == [[0, 1], os.SCHED_IDLE, 5]
    assert {state for state, _ in found["knobs"].values()} == {"held"}, found["knobs"]
    assert [found["held"], found["after"], found["again"]] == [configured] * 3
    # Killed, it is started anew and still knows how ksmd was.
    assert found["killed"]["restarts"] == 1
    assert (found["stop"], found["stopped"]) == (0, [[0, 1], os.SCHED_OTHER, 5])
    state, reason = found["missing"]["ksmd_cpus"]
    assert (state, "this host has no CPU 7" in reason) == ("failed", True), found["missing"]
    assert {found["missing"][name][0] for name in ("ksmd_scheduling", "ksmd_nice")} == {"held"}
    assert "(ksmd-refused)" in found["doctor"]
    assert found["end"] == found["stopped"]


def test_a_service_that_hangs_is_started_anew(facts: Facts) -> None:
    # Stopped by SIGSTOP, it would hang for ever if nothing watched it.
    found = of(facts, "watchdog")
    assert found["restarts"] >= 1
    assert found["run"] == ["1"]
    assert found["knob"]["at_first"] == 0


def test_scenarios_with_domains_are_equal_under_systemd(facts: Facts) -> None:
    found = of(facts, "verified")
    assert not found["controllers_changed"]
    for mode in ("separate", "across"):
        said = found[mode]["out"]
        print(said)
        # This guest's memory is fragmented by now: where no huge page is to be had, the kernel collapses nothing.
        different = re.findall(r"^different .*$", said, re.MULTILINE)
        assert all("(collapse)" in line for line in different), said
        totals = re.search(r": (\d+) equal, \d+ different, 0 skipped$", said, re.MULTILINE)
        assert totals
        assert int(totals[1]) >= 15
        assert ("frame across domains" in said) == (mode == "across")
