# SPDX-License-Identifier: GPL-2.0-or-later
"""The package in a Debian system that has booted, from installing to purging, over a reboot. See system_job.py.

What takes minutes where the guest is emulated is left to ``make soak`` (tests/soak/test_system.py).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.guest.probe import KSM_FILES, check
from tests.packaging.building import ROOT, build

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="building the image needs root"),
]

PRUNE = "stable_node_chains_prune_millisecs"
JOB = Path(__file__).with_name("system_job.py")
PAGES = 3000
LATER = "0.1.0+later"
LIMIT_SECONDS = 2400

Facts = dict[str, Any]


def boot(share: Path, *words: str) -> Facts:
    """What a boot has shown."""
    first, second = build(share / "first"), build(share / "second", "--version", LATER)
    found = share / "facts.json"
    options = ["--system", "trixie", "--timeout", f"{LIMIT_SECONDS}", "--reboots", "1", "--share", str(share), "--"]
    done = subprocess.run(
        [sys.executable, ROOT / "tests/guest/run", *options, "python3", JOB, first, second, found, *words],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS + 100,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    loaded: Facts = json.loads(found.read_text())
    return loaded


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    return boot(tmp_path_factory.mktemp("system"))


def of(facts: Facts, step: str) -> Any:
    """What a step found."""
    found = facts[step]
    assert not (isinstance(found, dict) and "error" in found), f"{found['error']}\n{found['journal']}"
    return found


def test_the_system_is_up_and_has_nodes_and_ksm(facts: Facts) -> None:
    found = of(facts, "probed")
    assert found["active"] == "active"
    check(found, KSM_FILES["6.12"])


def test_it_installs_with_what_the_archive_has(facts: Facts) -> None:
    found = of(facts, "install")
    assert "1 newly installed" in found["out"]
    state = of(facts, "installed")
    assert state["started"] == 0
    assert state["active"] == ["active", "active", "active"], "the other program that writes the knobs goes on"
    assert state["enabled"] == ["enabled", "enabled"]
    assert state["failed"] == ""


def test_installing_and_starting_writes_no_knob(facts: Facts) -> None:
    assert of(facts, "installed")["knobs"] == of(facts, "before")


def test_it_runs_isolated_as_its_user_without_a_capability(facts: Facts) -> None:
    found = of(facts, "installed")
    assert found["command"] == ["/usr/bin/python3", "-I", "/usr/bin/ksmd-ctl"]
    assert found["uid"] > 0
    assert found["capabilities"] == [0, 0, 0, 0]


def test_who_else_writes_the_knobs_is_named(facts: Facts) -> None:
    found = of(facts, "installed")
    assert [writer["name"] for writer in found["status"]["writers"]] == ["ksmtuned"]
    assert "also written by ksmtuned" in found["text"]
    assert found["status"]["policy"] == "observe"


def test_the_units_are_as_private_as_readme_says_or_more(facts: Facts) -> None:
    for unit, printed in of(facts, "security").items():
        print(printed)
        score = re.search(r"Overall exposure level for \S+: ([0-9.]+)", printed)
        said = re.search(rf"\| `{unit}` \| ([0-9.]+) \|", (ROOT / "README.md").read_text())
        assert score
        assert said
        assert float(score[1]) <= float(said[1]) <= 2.0


def test_the_documented_line_and_a_reload_switch_merging_on(facts: Facts) -> None:
    manual = (ROOT / "packaging/man/ksmd-ctl.toml.5.scd").read_text()
    assert 'policy = "adaptive"\n' in manual
    found = of(facts, "enable")
    assert found["reload"]["status"] == 0
    assert found["sharing"] > PAGES * 0.9
    assert found["asked"]
    assert found["knob"]["at_first"] == 0
    assert "not noticed at once" not in found["journal"]


def test_everything_that_needs_privilege_works_under_the_units_restrictions(facts: Facts) -> None:
    found = of(facts, "through_the_broker")
    asked = found["asked"]
    merging, nodes = asked["processes"][asked["pid"]]
    assert merging > PAGES * 0.9
    assert sum(nodes.values()) == merging
    # ksmd may go on meanwhile.
    nodes, before, after = asked["survey"]
    assert set(nodes) == {"0", "1"}
    assert min(before, after) <= sum(nodes.values()) <= max(before, after)
    mergeable, frames, _, complete = asked["duplicates"]
    assert mergeable > PAGES * 0.9
    # Whoever is not root gets counts of equal contents rounded down to 256 pages (ksmd_ctl.kernel.contents.Asker).
    assert frames % 256 == 0
    assert frames < PAGES * 0.2
    assert complete
    # Those that take no more mappings need no look.
    compared, unrealised, complete = asked["duplicate_ksm_pages"]
    assert compared > 0
    assert (unrealised, complete) == (0, True)
    moved, already, left = asked["move"]
    assert moved + already > 0
    assert left == {}
    assert found["broker"] == "active"
    unshared, left = of(facts, "unsharing")["unshare"]
    assert unshared > PAGES * 0.9
    assert left == {}


def test_a_knob_that_needs_unmerging_is_changed_by_a_service_without_privilege(facts: Facts) -> None:
    found = of(facts, "transaction")
    assert found["done"]["status"] == 0, found["done"]
    document = json.loads(found["done"]["out"])["transaction"]
    assert document["result"] == "done"
    assert document["pages"]["unshared"] > PAGES * 0.9
    assert document["home"]["after"]["ratio"] >= 0.99
    assert (found["knobs"]["merge_across_nodes"], found["knobs"]["run"]) == ("0", "1")
    assert (found["broker"], found["back"]) == ("active", 0)


def test_what_yama_refuses_is_reported_as_refused(facts: Facts) -> None:
    found = of(facts, "lsm_refuses")
    said = str(found["unshare"])
    assert re.search(r"Yama|ptrace", said), said
    assert found["off"]["status"] == 3
    assert "kernel.yama.ptrace_scope" in found["off"]["err"]
    assert len(found["off"]["err"].splitlines()) == 2


def test_varlinkctl_works(facts: Facts) -> None:
    found = of(facts, "control_socket")
    for method in ("Status", "Metrics", "Reload"):
        assert f"method {method}(" in found["introspect"]["out"]
    assert "Product: ksmd-ctl" in found["info"]["out"]
    # A sequence of documents, each after a record separator (RFC 7464).
    reports = [json.loads(text)["report"] for text in found["subscribed"]["out"].split("\x1e") if text.strip()]
    ticks = [report["daemon"]["ticks"] for report in reports]
    assert len(ticks) >= 2
    assert ticks == sorted(set(ticks))


def test_the_group_reads_a_second_one_writes_and_others_stay_out(facts: Facts) -> None:
    found = of(facts, "control_socket")
    reader = found["reader"]
    assert json.loads(reader["status"]["out"])["report"]["format"] == 1
    assert json.loads(reader["command"]["out"])["daemon"] is not None
    assert reader["reload"]["status"] != 0
    assert "PermissionDenied" in reader["reload"]["err"]
    assert json.loads(reader["reload"]["out"].strip("\x1e\n")) == {"needs": "root or a member of group operators"}
    assert [found[who]["status"] for who in ("writer", "root")] == [0, 0]
    assert found["stranger"]["status"] != 0
    assert "Permission denied" in found["stranger"]["err"]


def test_prometheus_scrapes_it_loads_the_rules_and_an_alert_fires(facts: Facts) -> None:
    checked = of(facts, "scraping")
    assert checked["status"] == 0, checked
    found = of(facts, "drift")
    assert [sample["value"][1] for sample in found["up"]] == ["1"]
    rules = (ROOT / "packaging/prometheus/ksmd-ctl.rules.yml").read_text()
    assert set(found["rules"]) == set(re.findall(r"- (?:alert|record): (\S+)", rules))
    assert set(found["rules"].values()) == {"ok"}
    fired = {(alert["alertname"], alert.get("knob")) for alert in found["alerts"]}
    assert ("KsmdCtlDrift", "run") in fired
    assert found["drift"] >= 6
    assert found["recorded"]


def test_a_wrong_configuration_changes_nothing(facts: Facts) -> None:
    found = of(facts, "bad_reload")
    assert (found["wrong"], found["good"]) == (True, True)
    assert (found["active"], found["run"]) == ("active", "1")
    assert found["check"]["status"] == 2
    assert "wrong.toml" in found["check"]["err"]
    assert "nonsense" in found["check"]["err"]


def test_a_kill_is_survived_and_the_knobs_stay(facts: Facts) -> None:
    found = of(facts, "killed")
    assert found["restarts"] == 1
    assert found["run"] == ["1"]
    assert found["knob"]["at_first"] == 0


def at_first(state: dict[str, str]) -> dict[str, Any]:
    """Files of state, with what the policy sets from moment to moment left out."""
    found = json.loads(state["found-kernel.json"])
    knobs = {knob: entry["at_first"] for knob, entry in found["knobs"].items()}
    # What others changed has been noted meanwhile, or not.
    kept = {name: text for name, text in state.items() if name != "foreign-kernel.json"}
    return {**kept, "found-kernel.json": {"boot_id": found["boot_id"], "knobs": knobs}}


def test_an_upgrade_keeps_state_and_restores_nothing(facts: Facts) -> None:
    found = of(facts, "upgrade")
    assert (found["status"], found["version"]) == (0, LATER)
    assert found["run"] == ["1"]
    assert found["sharing"] > PAGES * 0.9
    before, after = map(at_first, found["state"])
    assert before["found-kernel.json"]
    assert before == after
    assert found["knob"]["at_first"] == 0
    assert "restored what was found" not in found["journal"]
    assert found["broker"] != "failed"


def test_the_history_survives_it_all(facts: Facts) -> None:
    """After a kill, a hang and an upgrade, in order."""
    found = of(facts, "upgrade")["history"]
    assert found["status"] == 0, found
    events = [event["event"] for event in json.loads(found["out"])["events"]]
    print(events)
    assert events.count("killed") >= 1
    assert events.index("started") < events.index("killed") < len(events) - 1 - events[::-1].index("started")
    assert "reloaded" in events
    assert "transaction" in events


def test_a_stop_puts_the_knobs_back(facts: Facts) -> None:
    found = of(facts, "stop")
    assert found["status"] == 0
    assert found["knobs"] == of(facts, "before")


def test_a_start_puts_back_what_a_verify_that_was_killed_left(facts: Facts) -> None:
    found = of(facts, "after_a_killed_verify")
    prune = "stable_node_chains_prune_millisecs"
    assert found["started"][prune] == found["knobs"][prune]
    assert not found["record"]


def test_a_day_later_the_history_has_it_all_in_order_with_who(facts: Facts) -> None:
    """A change by another program, another drift, a transaction, a kill, a reboot."""
    did, rebooted, found = of(facts, "eventful"), of(facts, "reboot"), of(facts, "a_day_later")
    assert found["boot_id"] != rebooted["boot_id"]
    assert found["history"]["status"] == 0, found
    events = json.loads(found["history"]["out"])["events"]
    mine = [event for event in events if event["time_seconds"] >= did["since"] and event["kind"] != "policy"]
    print(*(f"{event['event']}: {event['text']}" for event in mine), sep="\n")
    wanted = ["drift", "drift", "transaction", "killed", "started", "stopped", "restored", "rebooted", "started"]
    told = [event["event"] for event in mine if event["event"] in wanted]
    # A transaction is told when it begins and when it ends.
    assert [event for at, event in enumerate(told) if [event] != told[at - 1 : at] or event == "drift"] == wanted
    foreign = [event for event in mine if event["event"] == "drift"]
    bash = f"bash (pid {did['foreign']}, ksmd-ctl-guest.service)"
    assert foreign[0]["who"] == bash
    assert f"run was changed from 1 to 2 by {bash}" in foreign[0]["text"]
    assert foreign[1]["who"] == f"python3 (pid {did['here']}, ksmd-ctl-guest.service)"
    assert "run was changed from 1 to 0 by python3" in foreign[1]["text"]
    asked = [event for event in mine if event["event"] == "transaction"]
    assert {re.sub(r"\d+", "N", event["who"]) for event in asked} == {f"ksmd-ctl set {PRUNE}=N, pid N, uid N"}
    (restored,) = [event for event in mine if event["event"] == "restored"]
    assert restored["who"] == "systemd, at the stop of ksmd-ctl.service"
    assert restored["boot_id"] == rebooted["boot_id"]
    assert mine[-1]["boot_id"] == found["boot_id"]
    assert f"run was changed from 1 to 2 by {bash}" in found["text"]
    assert not [event for event in json.loads(found["recent"]["out"])["events"] if event in mine]


def test_removing_puts_the_knobs_back_and_keeps_the_configuration(facts: Facts) -> None:
    found = of(facts, "remove")
    assert found["status"] == 0, found
    assert found["knobs"]["run"] == of(facts, "before")["run"]
    assert "/etc/ksmd-ctl/ksmd-ctl.toml" in found["left"]
    assert not [path for path in found["left"] if path.startswith("/usr")]
    assert found["ksmtuned"].strip() == "active"


def test_a_purge_leaves_the_user_and_nothing_else(facts: Facts) -> None:
    found = of(facts, "purge")
    assert found["status"] == 0, found
    assert found["left"] == []
    assert (found["units"], found["processes"]) == ([], "")
    assert found["user"] == 0
