# SPDX-License-Identifier: GPL-2.0-or-later
"""What happens to an installed package, from installing to purging; runs as root inside the guest:

    system_job.py FIRST.deb SECOND.deb FACTS.json [whole]

It judges nothing: what it found goes to FACTS.json, step by step. tests/guest/test_system.py judges, and
tests/soak/test_system.py those steps that only the whole has, because they take minutes where the guest is emulated.
A step that fails leaves its error there, and the others run all the same. One of them reboots the machine; run anew
after that, it goes on with the next.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

KSM = Path("/sys/kernel/mm/ksm")
# A knob that no policy steers.
PRUNE = "stable_node_chains_prune_millisecs"
CHECKOUT = Path(__file__).resolve().parents[2]
UNIT = "ksmd-ctl.service"
BROKER = "ksmd-ctl-broker.service"
SOCKET = "/run/ksmd-ctl/socket"
VERIFY = Path("/run/ksmd-ctl-verify.json")
METRICS = "http://127.0.0.1:19753/metrics"
PROMETHEUS = "http://127.0.0.1:9090/api/v1"
CONFIGURATION = Path("/etc/ksmd-ctl/conf.d")
QUICK = Path(f"/run/systemd/system/{UNIT}.d/quick.conf")
PAGES = 3000
# Emulated, a start of the service takes 10 s.
PATIENCE = 300.0

# The guest's own files and units, which run this.
GUEST = re.compile(r"ksmd-ctl[.-]guest")

FACTS: dict[str, Any] = {}
STEPS: list[Callable[[], Any]] = []
WHOLE = "whole"


def step(function: Callable[[], Any]) -> Callable[[], Any]:
    """Have this function run in its turn; what it returns is a fact under its name."""
    STEPS.append(function)
    return function


def long_step(function: Callable[[], Any]) -> Callable[[], Any]:
    """A step that only the whole job has."""
    return step(function) if WHOLE in sys.argv else function


def run(*words: str, timeout: float = 600) -> dict[str, Any]:
    """Run a command: its status and output."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "SYSTEMD_COLORS": "0", "SYSTEMD_PAGER": "cat"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    return {"status": done.returncode, "out": done.stdout, "err": done.stderr}


def until(what: str, look: Callable[[], Any], patience: float = PATIENCE) -> Any:
    """What `look` gives as soon as that is true."""
    end = time.monotonic() + patience
    while True:
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
            found = look()
            if found:
                return found
        if time.monotonic() > end:
            raise TimeoutError(f"waited {patience} s for {what}")
        time.sleep(0.2)


def knobs() -> dict[str, str]:
    return {path.name: path.read_text().strip() for path in sorted(KSM.iterdir()) if path.stat().st_mode & 0o200}


def knob(name: str) -> str:
    return (KSM / name).read_text().strip()


def metrics() -> dict[str, float]:
    with urllib.request.urlopen(METRICS, timeout=10) as response:
        lines = response.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {series: float(value) for series, value in pairs}


def drifted() -> float:
    """How often run was put back."""
    return metrics().get('ksmd_ctl_drift_total{knob="run"}', 0.0)


def counted(times: float) -> bool:
    return drifted() >= times


def prometheus(query: str) -> Any:
    with urllib.request.urlopen(f"{PROMETHEUS}/{query}", timeout=10) as response:
        return json.load(response)["data"]


def shown(name: str) -> str:
    return str(run("systemctl", "show", "--value", f"--property={name}", UNIT)["out"].strip())


def pid() -> int:
    return int(shown("MainPID"))


def serving() -> bool:
    return bool(metrics())


def held(name: str) -> Any:
    """What the service says of a knob, once that is as wanted."""
    found = json.loads(run("ksmd-ctl", "status", "--json")["out"])["knobs"][name]
    return found if found["state"] == "held" else None


def journal(*words: str) -> str:
    return str(run("journalctl", "--no-pager", "-o", "short-monotonic", "-u", "ksmd-ctl*", *words)["out"])


def as_user(name: str, *words: str) -> dict[str, Any]:
    return run("runuser", "-u", name, "--", *words)


def varlink(method: str, *options: str, user: str = "root") -> dict[str, Any]:
    return as_user(user, "varlinkctl", "--json=short", *options, "call", SOCKET, f"io.ksmd-ctl.{method}", "{}")


# -- install, and what it changes --------------------------------------------------------------------------


@step
def before() -> Any:
    # Another program that is known to write the knobs, under the name of its unit.
    Path("/usr/local/sbin/ksmtuned").write_text("#!/bin/bash\nwhile :; do sleep 3600; done\n")
    Path("/usr/local/sbin/ksmtuned").chmod(0o755)
    Path("/etc/systemd/system/ksmtuned.service").write_text("[Service]\nExecStart=/usr/local/sbin/ksmtuned\n")
    run("systemctl", "start", "ksmtuned.service")
    for name in ("reader", "writer", "stranger"):
        run("useradd", "--create-home", name)
    run("groupadd", "operators")
    return knobs()


@step
def probed() -> Any:
    active = run("systemctl", "is-active", "multi-user.target")["out"].strip()
    first = knobs()
    found = json.loads(run("python3", str(CHECKOUT / "tests/guest/probe.py"))["out"])
    for name in ("pages_to_scan", "run"):
        (KSM / name).write_text(first[name])
    return {"active": active, **found}


@step
def install() -> Any:
    done = run("apt-get", "install", "-y", sys.argv[1])
    if done["status"] != 0:
        # Nothing below would say anything.
        raise SystemExit(f"installing failed: {done}")
    until("the service", serving)
    return done


@step
def installed() -> Any:
    started = run("systemctl", "start", UNIT)
    process = Path(f"/proc/{pid()}")
    status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())
    return {
        "started": started["status"],
        "active": run("systemctl", "is-active", UNIT, "ksmd-ctl-broker.socket", "ksmtuned.service")["out"].split(),
        "broker": run("systemctl", "is-active", BROKER)["out"].strip(),
        "enabled": run("systemctl", "is-enabled", UNIT, "ksmd-ctl-broker.socket")["out"].split(),
        "failed": run("systemctl", "--failed", "--plain", "--no-legend")["out"],
        "knobs": knobs(),
        "command": (process / "cmdline").read_text().split("\0")[:3],
        "uid": int(status["Uid"].split()[0]),
        "memory": status["VmRSS"],
        "capabilities": [int(status[name], 16) for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb")],
        "status": json.loads(run("ksmd-ctl", "status", "--json")["out"]),
        "text": run("ksmd-ctl", "status")["out"],
    }


@step
def security() -> Any:
    return {unit: run("systemd-analyze", "security", "--no-pager", unit)["out"] for unit in (UNIT, BROKER)}


# -- Prometheus --------------------------------------------------------------------------------------------


@step
def scraping() -> Any:
    example = Path("/usr/share/ksmd-ctl/prometheus/scrape.yml").read_text()
    configuration = Path("/run/prometheus.yml")
    configuration.write_text("global: {scrape_interval: 2s, evaluation_interval: 2s}\n" + example)
    Path("/run/prometheus-data").mkdir(mode=0o777)
    Path("/run/prometheus-data").chmod(0o777)
    options = ["--config.file=/run/prometheus.yml", "--storage.tsdb.path=/run/prometheus-data"]
    run("systemd-run", "--unit=scraper", "--property=User=prometheus", "/usr/bin/prometheus", *options)
    # It starts while the next steps run.
    return run("promtool", "check", "config", "/run/prometheus.yml")


# -- switching it on, by what the manual page says ---------------------------------------------------------


def tenant() -> None:
    """Somebody else's process with pages to be merged."""
    command = ["/usr/bin/python3", str(CHECKOUT / "examples/equal_pages.py"), str(PAGES)]
    subprocess.Popen(["runuser", "-u", "stranger", "--", *command], stdout=subprocess.DEVNULL)


@step
def enable() -> Any:
    (CONFIGURATION / "merge.toml").write_text('policy = "adaptive"\n')
    reload = run("systemctl", "reload", UNIT)
    until("merging", lambda: knob("run") == "1")
    tenant()
    merged = until("merged pages", lambda: int(knob("pages_sharing")) > PAGES * 0.9 and int(knob("pages_sharing")))
    return {
        "reload": reload,
        "sharing": merged,
        "asked": until("it in the metrics", lambda: metrics()["ksm_pages_sharing"] >= merged * 0.9),
        "knob": until("run to be held", lambda: held("run")),
        "journal": journal("-n", "20"),
    }


# -- the privileged part, asked as the service's user ------------------------------------------------------

ASK = """
import json, subprocess, sys
from pathlib import Path
from ksmd_ctl.errors import KsmdError
from ksmd_ctl.host.operation import Move, Unshare, UnsharePart, finish
from ksmd_ctl.privileged.host import open_kernel_host

host = open_kernel_host(broker_socket=Path("/run/ksmd-ctl-broker.socket"))
process = host.find(int(sys.argv[1]))
found = {}

def pages_shared():
    return int(Path("/sys/kernel/mm/ksm/pages_shared").read_text())

def ask(name, operation, show):
    try:
        found[name] = show(finish(operation, 60))
    except KsmdError as error:
        found[name] = f"{type(error).__name__}: {error}; {error.hint}"

for name in sys.argv[2:]:
    if name == "processes":
        ask(name, host.processes(), lambda all: {p.id.pid: [p.merging_pages, p.nodes] for p in all.processes})
    elif name == "survey":
        before = pages_shared()
        ask(name, host.survey(10.0), lambda survey: [dict(survey.census.pages), before, pages_shared()])
    elif name == "duplicates":
        show = lambda alike: [alike.mergeable_pages, alike.frames, alike.pages, alike.complete]
        ask(name, host.duplicates(65_536), show)
    elif name == "duplicate_ksm_pages":
        ask(name, host.duplicate_ksm_pages(10.0, 1000), lambda found: [found.frames, found.reclaimable, found.complete])
    elif name == "move":
        ask(name, host.move(Move(process, 1), 60), lambda moved: [moved.moved, moved.already, dict(moved.left)])
    elif name == "unshare":
        request = Unshare((UnsharePart(process),))
        ask(name, host.unshare(request, 60), lambda result: [result.unshared, dict(result.left)])
print(json.dumps(found))
"""


def ask_broker(*names: str) -> Any:
    merging = run("pgrep", "-f", "-u", "stranger", "equal_pages.py")["out"].split()[-1]
    done = as_user("ksmd-ctl", "/usr/bin/python3", "-I", "-c", ASK, merging, *names)
    return {"pid": merging, **json.loads(done["out"])} if done["status"] == 0 else done


@step
def through_the_broker() -> Any:
    asked = ask_broker("processes", "survey", "duplicates", "duplicate_ksm_pages", "move")
    return {"asked": asked, "broker": run("systemctl", "is-active", BROKER)["out"].strip()}


@step
def unsharing() -> Any:
    # What is un-merged would merge again.
    (CONFIGURATION / "still.toml").write_text('policy = "fixed"\nknobs.run = 0\n')
    run("systemctl", "reload", UNIT)
    until("a ksmd that rests", lambda: knob("run") == "0")
    asked = ask_broker("unshare")
    (CONFIGURATION / "still.toml").unlink()
    run("systemctl", "reload", UNIT)
    until("merging", lambda: knob("run") == "1")
    return asked


@step
def transaction() -> Any:
    until("merging", lambda: int(knob("pages_sharing")) > 0.9 * PAGES)
    done = run("ksmd-ctl", "set", "merge_across_nodes=0", "--json")
    found = {"done": done, "knobs": knobs(), "broker": run("systemctl", "is-active", BROKER)["out"].strip()}
    return {**found, "back": run("ksmd-ctl", "set", "merge_across_nodes=1", "--json")["status"]}


# -- trust domains -----------------------------------------------------------------------------------------


@long_step
def assigned() -> Any:
    """Two domains on nodes of their own: a service, and a slice with one."""
    (CONFIGURATION / "domains.toml").write_text(
        '[domains.gold]\nnodes = "0"\nunits = ["gold.service"]\n'
        '[domains.silver]\nnodes = "1"\nslices = ["silver.slice"]\n'
    )
    run("systemctl", "reload", UNIT)
    member = ["/usr/bin/python3", str(CHECKOUT / "examples/equal_pages.py"), "500"]
    run("systemd-run", "--unit=gold.service", *member)
    run("systemd-run", "--unit=silver.service", "--slice=silver.slice", *member)
    until("merged pages", lambda: int(knob("pages_sharing")) > 0.9 * (PAGES + 1000))

    def limits() -> dict[str, list[str]]:
        found = {}
        for name, unit in (("gold", "gold.service"), ("silver", "silver.slice")):
            process = run("systemctl", "show", "--value", "--property=MainPID", f"{name}.service")["out"].strip()
            status = Path(f"/proc/{process}/status").read_text()
            said = run("systemctl", "show", "--value", "--property=AllowedMemoryNodes", unit)["out"].strip()
            found[name] = [said, re.findall(r"Mems_allowed_list:\t(\S+)", status)[0]]
        return found

    def assign(*words: str) -> dict[str, Any]:
        return run("ksmd-ctl", "domains", "assign", *words, "--json")

    found = {"before": limits(), "dry": assign("gold", "silver", "--dry-run"), "still": limits()}
    found |= {"done": assign("gold", "silver"), "during": limits()}
    kept = json.loads(Path("/var/lib/ksmd-ctl/assigned-kernel.json").read_text())["units"]
    found |= {"kept": kept, "undone": assign("--undo"), "after": limits()}
    run("systemctl", "stop", "gold.service", "silver.service")
    found["ended"] = assign("gold")
    found["plan"] = run("ksmd-ctl", "domains", "plan", "--json")
    (CONFIGURATION / "domains.toml").unlink()
    run("systemctl", "reload", UNIT)
    return found


# -- the control socket ------------------------------------------------------------------------------------


@step
def control_socket() -> Any:
    run("usermod", "-a", "-G", "ksmd-ctl", "reader")
    run("usermod", "-a", "-G", "ksmd-ctl,operators", "writer")
    path = Path("/etc/ksmd-ctl/conf.d/groups.toml")
    path.write_text('service.socket_write_group = "operators"\n')
    # As shipped, but for the times that it takes; `as_shipped` takes it back.
    QUICK.parent.mkdir(parents=True)
    QUICK.write_text("[Service]\nWatchdogSec=20\nTimeoutStartSec=300\n")
    run("systemctl", "daemon-reload")
    run("systemctl", "restart", UNIT)
    until("the service", serving)
    more = ["timeout", "8", "varlinkctl", "--json=short", "--more", "call", SOCKET, "io.ksmd-ctl.Status", "{}"]
    return {
        "introspect": run("varlinkctl", "introspect", SOCKET, "io.ksmd-ctl"),
        "info": run("varlinkctl", "info", SOCKET),
        "reader": {
            "status": varlink("Status", user="reader"),
            "command": as_user("reader", "ksmd-ctl", "status", "--json"),
            "reload": varlink("Reload", user="reader"),
        },
        "subscribed": as_user("reader", *more),
        "writer": varlink("Reload", user="writer"),
        "root": varlink("Reload"),
        "stranger": varlink("Status", user="stranger"),
    }


# -- merging switched for units that run -------------------------------------------------------------------

TRACING = Path(f"/run/systemd/system/{BROKER}.d/ptrace.conf")
UNITS = {
    # It asks for merging itself; the other one does not.
    "web.service": f"/usr/bin/python3 {CHECKOUT}/examples/equal_pages.py 500",
    "plain.service": "/usr/bin/python3 -c 'import signal; kept = bytearray(4 << 20); signal.pause()'",
}
DROP_IN = """
from ksmd_ctl.switch.persist import MemoryKsm, Start, Starter, setting_for
start = Start(Starter.SYSTEMD, "plain.service")
print(setting_for(start, on=True, machine=False, state=MemoryKsm.UNKNOWN, version="252").content)
"""


def main_pid(unit: str) -> int:
    return int(run("systemctl", "show", "--value", "--property=MainPID", unit)["out"])


def mergeable(unit: str) -> int:
    """How many mappings of a unit's process are."""
    lines = Path(f"/proc/{main_pid(unit)}/smaps").read_text().splitlines()
    return sum(line.startswith("VmFlags:") and " mg" in line for line in lines)


def merged(unit: str) -> int:
    return int(Path(f"/proc/{main_pid(unit)}/ksm_merging_pages").read_text())


def configure_switch(words: str) -> None:
    # Surveys cost an emulated guest more than the share of a CPU that they have by default.
    (CONFIGURATION / "switch.toml").write_text(f"census.interval = 5\ncensus.cpu_share = 0.5\n{words}")
    run("systemctl", "reload", UNIT)


def whose() -> Any:
    return json.loads(run("ksmd-ctl", "status", "--json")["out"])["switched"]


def restarted(unit: str) -> dict[str, Any]:
    """How a unit's process is after a restart."""
    run("systemctl", "daemon-reload")
    done = run("systemctl", "restart", unit)
    time.sleep(5)
    return {"status": done, "pid": main_pid(unit), "mergeable": mergeable(unit)}


@long_step
def switching() -> Any:
    for unit, command in UNITS.items():
        # What a drop-in runs after the start counts to it.
        Path(f"/etc/systemd/system/{unit}").write_text(f"[Service]\nTimeoutStartSec=300\nExecStart={command}\n")
    run("systemctl", "daemon-reload")
    run("systemctl", "start", *UNITS)
    until("merged pages", lambda: merged("web.service") > 450)
    off = ("ksmd-ctl", "merge", "off", "--unit", "web.service")
    found: dict[str, Any] = {"not allowed": as_user("writer", *off)}
    configure_switch("switch.allow = true\n")
    found["no ptrace"] = as_user("writer", *off)
    found["untouched"] = [mergeable("web.service"), merged("web.service")]
    TRACING.parent.mkdir(parents=True)
    said = (CHECKOUT / "docs/security.md").read_text()
    TRACING.write_text(re.findall(r"```\n(\[Service\]\n.*ptrace\n)```", said)[0])
    run("systemctl", "daemon-reload")
    # One that runs has the filter that it was started with.
    run("systemctl", "stop", BROKER)
    found["exposure"] = run("systemd-analyze", "security", "--no-pager", BROKER)["out"].splitlines()[-1]
    found["reader"] = as_user("reader", *off)
    found["dry"] = as_user("writer", *off, "--dry-run", "--json")
    found["off"] = as_user("writer", *off, "--json")
    found["pid"] = main_pid("web.service")
    found["after"] = mergeable("web.service")
    found["text"] = run("ksmd-ctl", "status")["out"]
    found["broker"] = run("systemctl", "is-active", BROKER)["out"].strip()
    return found


@long_step
def started_again() -> Any:
    """What was switched off asks for merging again at its next start: reported, and with `keep` switched off again."""
    found: dict[str, Any] = {"restarted": restarted("web.service")}
    found["again"] = until("it to be reported", lambda: [one for one in whose() if one["again"]])
    found["text"] = run("ksmd-ctl", "status")["out"]
    configure_switch("switch.allow = true\nswitch.keep = true\n")
    until("it to be switched off again", lambda: mergeable("web.service") == 0)
    found["kept"] = until("it to be recorded", lambda: [one for one in whose() if "keep" in one["by"] and one["done"]])
    found["history"] = run("ksmd-ctl", "history", "--kind", "transaction", "--json")
    found["journal"] = journal("-n", "40")
    return found


@long_step
def persisted() -> Any:
    configure_switch("switch.allow = true\n")
    drop_in = Path("/etc/systemd/system/plain.service.d/50-ksmd-ctl-merge.conf")
    found: dict[str, Any] = {"before": restarted("plain.service")}
    for word in ("on", "off"):
        done = run("ksmd-ctl", "merge", word, "--unit", "plain.service", "--persist", "write", "--json")
        now = mergeable("plain.service")
        found[word] = {"done": done, "now": now, "file": drop_in.read_text(), **restarted("plain.service")}
    # As it is written where systemd does not know MemoryKSM=.
    # Emulated, the command takes longer than its limit.
    drop_in.write_text(run("python3", "-I", "-c", DROP_IN)["out"].replace("timeout 30", "timeout 250"))
    found["by command"] = {"file": drop_in.read_text(), **restarted("plain.service")}
    run("systemctl", "stop", *UNITS)
    shutil.rmtree(drop_in.parent)
    for unit in UNITS:
        Path(f"/etc/systemd/system/{unit}").unlink()
    TRACING.unlink()
    TRACING.parent.rmdir()
    configure_switch("")
    (CONFIGURATION / "switch.toml").unlink()
    run("systemctl", "daemon-reload")
    run("systemctl", "stop", BROKER)
    run("systemctl", "reload", UNIT)
    return found


# -- what hosts do to services -----------------------------------------------------------------------------


@step
def drift() -> Any:
    until("Prometheus", lambda: prometheus("query?query=ksmd_ctl_drift_total")["result"])
    first = drifted()
    for times in range(1, 7):
        (KSM / "run").write_text("0")
        until("run to be put back", lambda: knob("run") == "1")
        # Counted as well: a change that comes before the service has read its own write back is the same drift.
        until("the drift to be counted", partial(counted, first + times))
    expression = "query?query=ALERTS%7Balertstate%3D%22firing%22%7D"
    alerts = until("an alert", lambda: prometheus(expression)["result"])
    rules = prometheus("rules")["groups"]
    return {
        "drift": drifted() - first,
        "up": prometheus("query?query=up")["result"],
        "alerts": [alert["metric"] for alert in alerts],
        "rules": {rule["name"]: rule["health"] for group in rules for rule in group["rules"]},
        "recorded": until("a recorded figure", lambda: prometheus("query?query=instance:ksm_saved:ratio")["result"]),
    }


@step
def scraper_stopped() -> Any:
    return run("systemctl", "stop", "scraper.service")


@step
def bad_reload() -> Any:
    (CONFIGURATION / "wrong.toml").write_text("knobs.nonsense = 1\n")
    reload = run("systemctl", "reload", UNIT)
    wrong = until("the refusal", lambda: metrics()["ksmd_ctl_config_reload_successful"] == 0)
    check = run("ksmd-ctl", "daemon", "--check-config")
    state = {"active": run("systemctl", "is-active", UNIT)["out"].strip(), "run": knob("run")}
    shown_status = shown("StatusText")
    (CONFIGURATION / "wrong.toml").unlink()
    run("systemctl", "reload", UNIT)
    good = until("the recovery", lambda: metrics()["ksmd_ctl_config_reload_successful"] == 1)
    return {"reload": reload, "wrong": wrong, "check": check, "status": shown_status, "good": good, **state}


def ended(how: Callable[[int], Any]) -> Any:
    """What is there after the service's process has been ended in some way and systemd has started another."""
    first, seen = pid(), set()

    def another() -> bool:
        seen.add(knob("run"))
        return pid() not in (0, first) and serving()

    restarts = int(shown("NRestarts"))
    how(first)
    until("another process", another)
    found = until("run to be held", lambda: held("run"))
    return {"restarts": int(shown("NRestarts")) - restarts, "run": sorted(seen), "knob": found}


@step
def killed() -> Any:
    return ended(kill)


# -- how ksmd is scheduled ---------------------------------------------------------------------------------


def ksmd() -> list[Any]:
    """The CPUs, the class and the nice value of ksmd."""
    found = int(run("pgrep", "-x", "ksmd")["out"])
    return [sorted(os.sched_getaffinity(found)), os.sched_getscheduler(found), os.getpriority(os.PRIO_PROCESS, found)]


def configure_ksmd(cpus: str) -> None:
    # The service answers before it is ready; until it is, systemd makes a reload part of the start.
    until("the unit to be active", lambda: shown("ActiveState") == "active")
    (CONFIGURATION / "ksmd.toml").write_text(f'[ksmd]\ncpus = "{cpus}"\nscheduling = "idle"\nnice = 7\n')
    done = run("systemctl", "reload", UNIT)
    if done["status"] != 0:
        raise RuntimeError(f"the reload failed: {done}\n{unit_state()}")


def unit_state() -> str:
    """What systemd says of the service, and the end of its own journal."""
    status = run("systemctl", "status", "--no-pager", "--lines=0", UNIT)
    lines = run("journalctl", "--no-pager", "-o", "short-monotonic", "-n", "40", "-u", UNIT)
    return f"{status['out']}{lines['out']}"


def ksmd_knobs(cpus: str) -> Any:
    """What the service says of ksmd's knobs, once it says `cpus` of the one for its CPUs."""

    last: dict[str, Any] = {}

    def states() -> Any:
        found = json.loads(run("ksmd-ctl", "status", "--json")["out"])["knobs"]
        last.update({name: [found[name]["state"], found[name]["reason"]] for name in found if "ksmd_" in name})
        return last if last["ksmd_cpus"][0] == cpus and last["ksmd_nice"][0] == "held" else None

    try:
        return until(f"ksmd's CPUs to be {cpus}", states)
    except TimeoutError as error:
        raise TimeoutError(f"{error}; last: {last}\n{unit_state()}") from error


@long_step
def scheduling() -> Any:
    found: dict[str, Any] = {"before": ksmd()}
    configure_ksmd("1")
    found["knobs"], found["held"] = ksmd_knobs("held"), ksmd()
    found["killed"], found["after"] = ended(kill), ksmd()
    found["stop"], found["stopped"] = run("systemctl", "stop", UNIT)["status"], ksmd()
    run("systemctl", "start", UNIT)
    found["started"], found["again"] = ksmd_knobs("held"), ksmd()
    configure_ksmd("7")
    found["missing"] = ksmd_knobs("failed")
    found["doctor"] = run("ksmd-ctl", "doctor", "--interval", "2")["out"]
    (CONFIGURATION / "ksmd.toml").unlink()
    run("systemctl", "stop", UNIT)
    found["end"] = ksmd()
    run("systemctl", "start", UNIT)
    until("merging", lambda: knob("run") == "1" and serving())
    return found


@long_step
def watchdog() -> Any:
    return ended(lambda process: os.kill(process, signal.SIGSTOP))


@step
def as_shipped() -> Any:
    QUICK.unlink()
    QUICK.parent.rmdir()
    return run("systemctl", "daemon-reload")


@step
def upgrade() -> Any:
    seen = set()
    state = {path.name: path.read_text() for path in Path("/var/lib/ksmd-ctl").glob("*.json")}
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    first = pid()
    with subprocess.Popen(["dpkg", "-i", sys.argv[2]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as dpkg:
        while dpkg.poll() is None:
            seen.add(knob("run"))
            time.sleep(0.05)
    until("the service", lambda: pid() not in (0, first) and serving())
    seen.add(knob("run"))
    return {
        "status": dpkg.returncode,
        "version": run("dpkg-query", "-W", "-f", "${Version}", "ksmd-ctl")["out"],
        "run": sorted(seen),
        "sharing": int(knob("pages_sharing")),
        "state": [state, {path.name: path.read_text() for path in Path("/var/lib/ksmd-ctl").glob("*.json")}],
        "history": run("ksmd-ctl", "history", "--json"),
        "knob": until("run to be held", lambda: held("run")),
        "journal": journal("--since", since),
        "broker": run("systemctl", "is-active", BROKER)["out"].strip(),
    }


@step
def stop() -> Any:
    return {"status": run("systemctl", "stop", UNIT)["status"], "knobs": knobs()}


@long_step
def verified() -> Any:
    """Cpusets below a root that systemd manages."""
    run("systemctl", "stop", "ksmtuned")
    run("pkill", "-u", "stranger", "-f", "equal_pages.py")
    until("its end", lambda: run("pgrep", "-u", "stranger", "-f", "equal_pages.py")["status"] == 1)
    words = ("ksmd-ctl", "verify", "--random", "2013", "--count", "20", "--domains")
    kept = Path("/sys/fs/cgroup/cgroup.subtree_control").read_text()
    found = {mode: run(*words, mode, timeout=600) for mode in ("separate", "across")}
    changed = Path("/sys/fs/cgroup/cgroup.subtree_control").read_text() != kept
    run("systemctl", "start", "ksmtuned")
    tenant()
    return {**found, "controllers_changed": changed}


@step
def after_a_killed_verify() -> Any:
    stopped = knobs()
    ksmd = int(run("pgrep", "-x", "ksmd")["out"])
    record = {
        "format": 1,
        "boot_id": boot_id(),
        "pid": 2**22 + 1,
        "start_time_ticks": 1,
        "knobs": {PRUNE: int(stopped[PRUNE]), "run": 0},
        "ksmd": ksmd,
        "cpus": sorted(os.sched_getaffinity(ksmd)),
    }
    VERIFY.write_text(json.dumps(record))
    (KSM / PRUNE).write_text("3600000")
    run("systemctl", "start", UNIT)
    until("merging again", lambda: knob("run") == "1")
    until("the service", serving)
    return {"knobs": stopped, "started": knobs(), "record": VERIFY.exists()}


@step
def lsm_refuses() -> Any:
    # Scope 3 can't be taken back before the next boot.
    Path("/proc/sys/kernel/yama/ptrace_scope").write_text("3\n")
    merging = run("pgrep", "-f", "-u", "stranger", "equal_pages.py")["out"].split()[-1]
    return {**ask_broker("unshare"), "off": run("ksmd-ctl", "merge", "off", "--pid", merging)}


# -- a day that others were at work, and a reboot ----------------------------------------------------------


@step
def eventful() -> Any:
    """What the history is asked for later."""
    since = time.time()
    until("run to be held", lambda: held("run"))
    first = drifted()
    with subprocess.Popen(["bash", "-c", f"echo 2 > {KSM}/run; sleep 600"]) as foreign:
        until("it to be put back", lambda: counted(first + 1) and knob("run") == "1")
        foreign.kill()
    (KSM / "run").write_text("0")
    until("the drift to be put back", lambda: counted(first + 2) and knob("run") == "1")
    until("both to be told", lambda: len(told(since)) == 2)
    done = run("ksmd-ctl", "set", f"{PRUNE}=1234", "--json")
    # What others did is on the disk within five seconds; a reading from there is not before that.
    until(
        "it to be on the disk", lambda: not json.loads(run("ksmd-ctl", "status", "--json")["out"])["history"]["waiting"]
    )
    return {"since": since, "foreign": foreign.pid, "here": os.getpid(), "set": done, **ended(kill)}


def told(since: float) -> list[Any]:
    """The changes by others that the history has."""
    found = json.loads(run("ksmd-ctl", "history", "--kind", "foreign", "--json")["out"])["events"]
    return [event for event in found if event["time_seconds"] >= since]


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)


@step
def reboot() -> Any:
    """`main` does it when this has been noted."""
    return {"boot_id": boot_id(), "started": shown("ActiveEnterTimestamp")}


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@step
def a_day_later() -> Any:
    until("the service", serving)
    run("systemctl", "start", "ksmtuned.service")
    run("date", "--set", "+1 day")
    asked = run("ksmd-ctl", "history", "--since", "2d", "--json")
    return {
        "boot_id": boot_id(),
        "history": asked,
        "text": run("ksmd-ctl", "history", "--since", "2d", "--kind", "foreign")["out"],
        "recent": run("ksmd-ctl", "history", "--since", "1h", "--json"),
        "status": run("ksmd-ctl", "status")["out"],
        "knob": until("run to be held", lambda: held("run")),
    }


# -- and its end -------------------------------------------------------------------------------------------


def left_over() -> list[str]:
    found = []
    for top in ("/etc", "/usr", "/var", "/run", "/opt", "/srv"):
        for folder, folders, files in os.walk(top):
            here = Path(folder)
            if GUEST.search(folder) or here in (CHECKOUT, Path(sys.argv[3]).parent):
                folders.clear()
                continue
            found += [str(here / name) for name in [*folders, *files] if re.search("ksmd[-_]ctl", name)]
    return [name for name in found if not GUEST.search(name)]


@step
def remove() -> Any:
    done = run("apt-get", "remove", "-y", "ksmd-ctl")
    return {**done, "knobs": knobs(), "left": left_over(), "ksmtuned": run("systemctl", "is-active", "ksmtuned")["out"]}


@step
def purge() -> Any:
    done = run("apt-get", "purge", "-y", "ksmd-ctl")
    listed = run("systemctl", "list-units", "--all", "--plain", "--no-legend", "ksmd-ctl*")["out"]
    units = [line for line in listed.splitlines() if not GUEST.search(line)]
    processes = run("pgrep", "-u", "ksmd-ctl")["out"]
    user = run("getent", "passwd", "ksmd-ctl")["status"]
    return {**done, "left": left_over(), "units": units, "processes": processes, "user": user}


def main() -> None:
    """Run all steps, and write what they found."""
    facts = Path(sys.argv[3])
    if facts.exists():
        FACTS.update(json.loads(facts.read_text()))
    for function in STEPS:
        if function.__name__ in FACTS:
            continue
        began = time.monotonic()
        name = function.__name__
        try:
            FACTS[name] = function()
        except Exception:
            FACTS[name] = {"error": traceback.format_exc(), "journal": journal("-n", "30")}
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        facts.write_text(json.dumps(FACTS, indent=1))
        if function is reboot:
            run("systemctl", "reboot")
            # The service that runs this is stopped.
            signal.pause()


if __name__ == "__main__":
    main()
