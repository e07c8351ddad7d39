# SPDX-License-Identifier: GPL-2.0-or-later
"""The service as a process, on a tree of files that looks like a kernel: starts, refusals, kills, stops."""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ksmd_ctl.errors import ExitCode
from tests.fakes.ksmfs import FILES_6_1, FakeKsmFs

# Only where something is broken; nothing waits so long.
PATIENCE_SECONDS = 30


class Place:
    """A fake kernel, a configuration, and services on them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.kernel: FakeKsmFs | None = None
        self.config = directory / "ksmd-ctl.toml"
        self.running: list[subprocess.Popen[str]] = []
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify.bind(str(directory / "notify"))
        # A service waits for systemd to read, and here for nobody.
        self.messages: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.listener = threading.Thread(target=self._listen)
        self.listener.start()

    def _listen(self) -> None:
        while message := self.notify.recv(65536):
            self.messages.put(message.decode())

    def configure(self, text: str, *, service: str = "") -> None:
        self.config.write_text(
            f"{text}\n[service]\nsample_interval = 0.1\nmetrics_listen = '127.0.0.1:0'\n"
            f"socket = '{self.directory}/socket'\nruntime_directory = '{self.directory}/run'\n"
            f"state_directory = '{self.directory}/state'\n{service}\n"
        )

    def command(self, *options: str) -> list[str]:
        return [
            *(sys.executable, "-m", "ksmd_ctl.cli.main", "daemon", "--config", str(self.config)),
            *("--root", str(self.directory / "root"), *options),
        ]

    def start(self, *options: str) -> subprocess.Popen[str]:
        """A service that is ready."""
        environment = {**os.environ, "NOTIFY_SOCKET": str(self.directory / "notify")}
        process = subprocess.Popen(self.command(*options), env=environment, stderr=subprocess.PIPE, text=True)
        self.running.append(process)
        self.told("READY=1")
        return process

    def told(self, what: str) -> str:
        """Wait until a service tells systemd something."""
        while True:
            message = self.messages.get(timeout=PATIENCE_SECONDS)
            if what in message:
                return message

    def refused(self, *options: str) -> tuple[int, str]:
        """The exit code and what it says of a service that doesn't start."""
        done = subprocess.run(
            self.command(*options), capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
        )
        return done.returncode, done.stderr

    def end(self, process: subprocess.Popen[str], number: int = signal.SIGTERM) -> str:
        """End a service; what it said."""
        process.send_signal(number)
        said = process.communicate(timeout=PATIENCE_SECONDS)[1]
        assert process.returncode == (0 if number != signal.SIGKILL else -signal.SIGKILL), said
        return said

    def knobs(self) -> dict[str, str]:
        assert self.kernel is not None
        return {name: self.kernel.text(name) for name in ("run", "pages_to_scan", "sleep_millisecs")}

    def until(self, name: str, value: str) -> None:
        """Wait until a knob has a value."""
        assert self.kernel is not None
        limit = time.monotonic() + PATIENCE_SECONDS
        while self.kernel.text(name) != value:
            assert time.monotonic() < limit, f"{name} is {self.kernel.text(name)} and not {value}"
            time.sleep(0.01)

    def report(self) -> dict[str, object]:
        done = subprocess.run(
            [sys.executable, "-m", "ksmd_ctl.cli.main", "status", "--json", "--socket", str(self.directory / "socket")],
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=True,
        )
        found: dict[str, object] = json.loads(done.stdout)
        return found


HOLDING = 'policy = "fixed"\n[knobs]\nrun = 1\npages_to_scan = 1000\n'
FOUND = {"run": "0", "pages_to_scan": "100", "sleep_millisecs": "20"}
HELD = {"run": "1", "pages_to_scan": "1000", "sleep_millisecs": "20"}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    place.kernel = FakeKsmFs(tmp_path / "root")
    place.configure(HOLDING)
    yield place
    for process in place.running:
        if process.poll() is None:
            process.kill()
        process.communicate()
    place.notify.shutdown(socket.SHUT_RDWR)
    place.listener.join()
    place.notify.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_holds_and_puts_back(place: Place, number: int) -> None:
    process = place.start()
    assert place.knobs() == HELD
    said = place.end(process, number)
    assert place.knobs() == FOUND
    assert "restored what was found before the start: run = 0 (was 1), pages_to_scan = 100 (was 1000)" in said
    assert "the configuration was read again" not in said
    assert sorted(os.listdir(place.directory / "state")) == ["history-kernel.sqlite", "lock"]
    assert not (place.directory / "socket").exists()


def test_drift_is_put_back(place: Place) -> None:
    place.start()
    assert place.kernel is not None
    place.kernel.set("pages_to_scan", 7)
    place.until("pages_to_scan", "1000")
    knobs = place.report()["knobs"]
    assert isinstance(knobs, dict)
    assert knobs["pages_to_scan"]["drift_total"] == 1


def test_killed_and_started_again_it_still_knows_what_was_there(place: Place) -> None:
    place.end(place.start(), signal.SIGKILL)
    assert place.knobs() == HELD
    place.end(place.start(), signal.SIGKILL)
    place.end(place.start())
    assert place.knobs() == FOUND


def test_a_new_boot_makes_the_old_journal_worthless(place: Place) -> None:
    place.end(place.start(), signal.SIGKILL)
    assert place.kernel is not None
    place.kernel.write(place.kernel.proc / "sys/kernel/random/boot_id", "00000000-0000-4000-8000-000000000002\n")
    place.kernel.set("run", 0)
    place.kernel.set("pages_to_scan", 64)
    place.end(place.start())
    assert place.knobs() == {**FOUND, "pages_to_scan": "64"}


def test_what_a_killed_one_left_can_be_put_back_by_hand(place: Place) -> None:
    place.end(place.start(), signal.SIGKILL)
    code, said = place.refused("--restore")
    assert (code, place.knobs()) == (0, FOUND)
    assert "restored what was found at first in this boot: run = 0 (was 1)" in said
    assert "nothing to put back" in place.refused("--restore")[1]


def test_no_file_of_the_services_user_holds_a_restore_up(place: Place) -> None:
    place.end(place.start(), signal.SIGKILL)
    path = place.directory / "state/found-kernel.json"
    for put in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        path.unlink(missing_ok=True)
        put(path)
        code, said = place.refused("--restore")
        assert code == ExitCode.CHECK_FAILED
        assert f"could not be understood and was put aside as {path}.damaged; no knob is put back" in said
        assert "Traceback" not in said
        put(path)
        assert place.refused("--restore", "--unit", "x.service")[0] == 0
    assert place.knobs() == HELD


def test_a_damaged_file_that_can_not_be_put_aside_is_said_to_stay(place: Place) -> None:
    state = place.directory / "state"
    for name in ("found-kernel.json", "transactions-kernel.json"):
        (state / f"{name}.damaged" / "full").mkdir(parents=True)
        (state / name).write_text('{"done": 1e400}')
    said = place.end(place.start())
    assert f"could not be understood and stays at {state}/found-kernel.json; the current values are recorded" in said
    assert f"could not be understood and stays at {state}/transactions-kernel.json; " in said
    assert "put aside" not in said


def run(place: Place, *words: str) -> subprocess.CompletedProcess[str]:
    options = ["--config", str(place.config), "--root", str(place.directory / "root")]
    return subprocess.run(
        [sys.executable, "-m", "ksmd_ctl.cli.main", *words, *options],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )


def status(place: Place) -> str:
    """What it says without a service, in one line."""
    return " ".join(run(place, "status").stdout.split())


def set_by_hand(place: Place, *words: str) -> None:
    done = run(place, "set", *words)
    assert done.returncode == 0, done.stderr


def test_a_service_that_was_killed_is_named_with_what_it_left_until_that_is_put_back(place: Place) -> None:
    process = place.start()
    assert " ended a service" not in status(place)
    place.end(process, signal.SIGKILL)
    said = status(place)
    assert f"ended a service (pid {process.pid}, started " in said
    assert "died and left knobs changed left run" in said
    assert "left run = 1 (was 0), pages_to_scan = 1000 (was 100) restore" in said
    assert f"restore `ksmd-ctl daemon --restore --config {place.config}` restores" in said
    left = json.loads(run(place, "status", "--json").stdout)["left_by_service"]
    assert (left["pid"], left["may_be_restarted"]) == (process.pid, False)
    assert left["knobs"]["run"] == {"found": 1, "at_start": 0, "at_first": 0}
    found = json.loads(run(place, "doctor", "--json", "--interval", "0.1", "--no-contents").stdout)["findings"]
    [died] = [finding for finding in found if finding["code"] == "service-died"]
    assert (died["severity"], died["command"]) == ("costs", f"ksmd-ctl daemon --restore --config {place.config}")
    # Whoever changes something without the service is told as well.
    assert "died and left knobs changed" in " ".join(run(place, "set", "sleep_millisecs=9").stderr.split())
    # What a person has set is the person's.
    assert "sleep_millisecs" not in status(place).partition(" left run")[2].partition("restore")[0]
    assert place.refused("--restore")[0] == 0
    assert " ended a service" not in status(place)


def test_a_unit_that_was_killed_may_be_started_again_and_is_an_alarm_only_later(place: Place) -> None:
    place.end(place.start("--unit", "x.service"), signal.SIGKILL)
    assert "systemd may be starting it again" in status(place)
    state = place.directory / "state/found-kernel.json"
    document = json.loads(state.read_text())
    document["service"]["started_seconds"] -= 1000
    state.write_text(json.dumps(document))
    # When it was there last, the lock's file tells.
    assert "systemd may be starting it again" in status(place)
    then = time.time() - 500
    os.utime(place.directory / "run/lock", (then, then))
    said = status(place)
    assert "last seen 8 min 2" in said
    assert "systemd may" not in said
    # And where systemd has removed it with the folder, its start is all that is known.
    (place.directory / "run/lock").unlink()
    assert "no longer there) died and left knobs changed left run" in status(place)


def test_a_service_that_goes_on_after_a_kill_or_was_stopped_has_left_nothing(place: Place) -> None:
    place.end(place.start(), signal.SIGKILL)
    process = place.start()
    assert " ended a service" not in status(place)
    place.end(process)
    assert " ended a service" not in status(place)
    place.configure(HOLDING, service="at_stop = 'leave'")
    place.end(place.start())
    assert " ended a service" not in status(place)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_observing_puts_back_what_a_service_before_it_held(place: Place, number: int) -> None:
    # A unit that is restarted leaves the knobs alone; the one that comes next wants nothing of them.
    place.end(place.start("--unit", "x.service"), number)
    assert place.knobs() == HELD
    place.configure('policy = "observe"\n')
    process = place.start()
    for name, value in FOUND.items():
        place.until(name, value)
    assert "ended a service" not in status(place)
    place.end(process)
    assert not (place.directory / "state/found-kernel.json").exists()


def test_a_stop_puts_back_what_was_held_also_where_the_policy_on_disk_is_observe_by_then(place: Place) -> None:
    place.end(place.start("--unit", "x.service"))
    place.configure('policy = "observe"\n')
    assert place.refused("--restore", "--unit", "x.service")[0] == 0
    assert place.knobs() == FOUND


def test_what_others_changed_is_told_without_a_service_too(place: Place) -> None:
    assert place.kernel is not None
    process = place.start()
    place.kernel.set("pages_to_scan", 7)
    place.until("pages_to_scan", "1000")
    place.end(process)
    # Somebody else, or this process by name.
    assert re.search(r"changed pages_to_scan 1000 to 7 by .+, (just now|.+ ago)", status(place))


def test_what_a_person_set_before_the_start_stays_after_the_stop(place: Place) -> None:
    place.configure('policy = "observe"\n')
    set_by_hand(place, "run=1", "pages_to_scan=300")
    place.configure(HOLDING)
    said = place.end(place.start())
    assert place.knobs() == {**FOUND, "run": "1", "pages_to_scan": "300"}
    assert "restored what was found before the start: pages_to_scan = 300 (was 1000)" in said
    # A kill in between changes nothing about that.
    place.end(place.start(), signal.SIGKILL)
    place.end(place.start())
    assert place.knobs() == {**FOUND, "run": "1", "pages_to_scan": "300"}
    # The first state of the boot is kept for whoever asks for it.
    assert place.refused("--restore")[0] == 0
    assert place.knobs() == FOUND


def test_what_a_person_sets_through_the_service_is_the_persons(place: Place) -> None:
    process = place.start()
    set_by_hand(place, "sleep_millisecs=7")
    place.end(process)
    assert place.knobs() == {**FOUND, "sleep_millisecs": "7"}
    assert place.refused("--restore")[0] == 0
    assert place.knobs() == FOUND


@pytest.mark.parametrize(
    ("at_stop", "says"),
    [
        ("leave", 'at_stop = "leave": the knobs stay as they are: run = 1, pages_to_scan = 1000'),
        ("stop-scanning", 'at_stop = "stop-scanning": run = 0 (was 1); the others stay: pages_to_scan = 1000'),
    ],
)
def test_a_stop_says_what_it_did(place: Place, at_stop: str, says: str) -> None:
    place.configure(HOLDING, service=f"at_stop = '{at_stop}'")
    assert says in place.end(place.start())


def test_a_stop_that_has_nothing_to_do_says_so(place: Place) -> None:
    place.configure('policy = "fixed"\n[knobs]\nrun = 0\n')
    assert "nothing had to be restored: run = 0" in place.end(place.start())


def test_in_a_unit_the_stop_is_not_its_own(place: Place) -> None:
    # So that a restart leaves the knobs alone; what ExecStopPost= runs asks systemd, which is not there.
    place.end(place.start("--unit", "x.service"))
    assert place.knobs() == HELD
    assert place.refused("--restore", "--unit", "x.service")[0] == 0
    assert place.knobs() == FOUND


def test_a_configuration_that_went_wrong_meanwhile_keeps_nothing_from_being_put_back(place: Place) -> None:
    place.end(place.start("--unit", "x.service"))
    place.config.write_text("[knobs]\nrun = 9\n")
    folders = {"STATE_DIRECTORY": f"{place.directory}/state", "RUNTIME_DIRECTORY": f"{place.directory}/run"}
    done = subprocess.run(
        place.command("--restore", "--unit", "x.service"),
        env={**os.environ, **folders},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert (done.returncode, place.knobs()) == (0, FOUND)
    assert "knobs.run: 9 is not between" in done.stderr
    # By hand, the person who wrote it is there to put it right.
    assert place.refused("--restore")[0] == ExitCode.USAGE


def test_looking_whether_it_is_a_restart_loads_no_service(place: Place) -> None:
    program = """
import sys
from pathlib import Path
from ksmd_ctl.daemon.service import DaemonOptions
from ksmd_ctl.daemon.service import run
run(DaemonOptions(config=sys.argv[1], restore=True, unit="x.service", root=Path(sys.argv[2])))
print(*sorted(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(place.config), str(place.directory / "root")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not {"asyncio", "prometheus_client", "psutil", "pyudev"} & set(done.stdout.split())


@pytest.mark.parametrize(
    ("at_stop", "after"), [("leave", HELD), ("stop-scanning", {**HELD, "run": "0"}), ("restore", FOUND)]
)
def test_at_stop(place: Place, at_stop: str, after: dict[str, str]) -> None:
    place.configure(HOLDING, service=f"at_stop = '{at_stop}'")
    place.end(place.start())
    assert place.knobs() == after


def test_observing_writes_nothing(place: Place) -> None:
    place.configure('policy = "observe"\n')
    place.end(place.start())
    assert place.knobs() == FOUND
    assert sorted(os.listdir(place.directory / "state")) == ["history-kernel.sqlite", "lock"]


def test_a_second_one_is_told_who_is_first(place: Place) -> None:
    first = place.start()
    code, said = place.refused()
    assert code == ExitCode.REFUSED
    assert f"ksmd-ctl daemon (pid {first.pid}) holds" in said
    assert place.knobs() == HELD


def test_reload_takes_over_and_a_bad_one_does_not(place: Place) -> None:
    process = place.start()
    place.configure(HOLDING.replace("1000", "2000"))
    process.send_signal(signal.SIGHUP)
    place.told("RELOADING=1")
    place.until("pages_to_scan", "2000")
    place.configure(HOLDING.replace("1000", '"many"'))
    process.send_signal(signal.SIGHUP)
    place.told("RELOADING=1")
    assert "the old one stays" in place.told("READY=1")
    daemon = place.report()["daemon"]
    assert isinstance(daemon, dict)
    assert daemon["reload_error"].endswith("knobs.pages_to_scan: 'many' is not a whole number")
    assert "'many' is not a whole number" in place.end(process)
    assert place.knobs() == FOUND


# The process sends itself SIGHUP once it has read the configuration, and then another configuration is written.
EARLY_RELOAD = """
import os, signal, sys
from pathlib import Path
from ksmd_ctl.cli.main import main
from ksmd_ctl.daemon import serving
opened = serving.open_host
def open_host(options, config):
    os.kill(os.getpid(), signal.SIGHUP)
    path = Path(options.config)
    path.write_text(path.read_text().replace("1000", "2000"))
    return opened(options, config)
serving.open_host = open_host
sys.exit(main(sys.argv[1:]))
"""


def test_a_reload_during_the_start_is_taken_once_it_is_up(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    words = place.command()
    start = words.index("daemon")
    monkeypatch.setattr(place, "command", lambda: [sys.executable, "-c", EARLY_RELOAD, *words[start:]])
    process = place.start()
    place.until("pages_to_scan", "2000")
    assert "the configuration was read again" in place.end(process)


def test_a_metrics_address_in_use(place: Place) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        code, said = place.refused("--metrics-listen", address)
    assert code == ExitCode.USAGE
    lines = said.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["ksmd-ctl", "hint"]
    assert address in lines[0]
    assert "EADDRINUSE" in lines[0]
    assert place.knobs() == FOUND


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:99999", "example.org:80"])
def test_a_metrics_address_that_is_none(place: Place, address: str) -> None:
    code, said = place.refused("--metrics-listen", address)
    assert (code, "hint: " in said) == (ExitCode.USAGE, True)
    assert place.knobs() == FOUND


def test_a_kernel_without_ksm(place: Place) -> None:
    shutil.rmtree(place.directory / "root")
    place.kernel = FakeKsmFs(place.directory / "root", files=None)
    code, said = place.refused()
    assert code == ExitCode.LACKING
    assert "--host engine" in said


def test_a_knob_that_this_kernel_lacks(place: Place) -> None:
    shutil.rmtree(place.directory / "root")
    place.kernel = FakeKsmFs(place.directory / "root", files=FILES_6_1)
    place.configure(HOLDING + "smart_scan = 0\n")
    code, said = place.refused()
    assert code == ExitCode.LACKING
    assert f"{place.config}: knobs.smart_scan: this kernel has no smart_scan" in said
    assert place.knobs() == FOUND
    code, said = place.refused("--check-config", "--host", "kernel")
    assert (code, "knobs.smart_scan" in said) == (ExitCode.USAGE, True)
    assert place.refused("--check-config")[0] == 0


def test_a_value_out_of_range(place: Place) -> None:
    place.configure(HOLDING + "max_page_sharing = 1\nuse_zero_pages = 2\n")
    for options in ((), ("--check-config",)):
        code, said = place.refused(*options)
        assert code == ExitCode.USAGE
        assert "knobs.max_page_sharing: 1 is not between 2 and" in said
        assert "knobs.use_zero_pages: 2 is not between 0 and 1" in said
    assert place.knobs() == FOUND


def test_a_file_of_the_kernel_that_makes_no_sense(place: Place) -> None:
    assert place.kernel is not None
    place.kernel.garble("pages_to_scan")
    place.start()
    report = place.report()
    knobs, errors = report["knobs"], report["errors"]
    assert isinstance(knobs, dict)
    assert isinstance(errors, dict)
    assert (knobs["pages_to_scan"]["state"], knobs["run"]["state"]) == ("failed", "held")
    assert errors["pages_to_scan"]["kind"] == "unparsable"
    assert place.kernel.text("pages_to_scan") == "garbage"


def test_no_permission(place: Place) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody who is not")
    for name in ("state", "run"):
        (place.directory / name).mkdir()
        (place.directory / name).chmod(0o777)
    nobody = {"user": 65534, "group": 65534, "extra_groups": []}
    for folder in (place.directory, *place.directory.parents):
        # A test's folder is its own; the user that it becomes has to get there.
        if folder.stat().st_mode & 0o001 == 0:
            folder.chmod(folder.stat().st_mode | 0o001)
    reading = [sys.executable, "-c", "import ksmd_ctl.daemon.service"]
    if subprocess.run(reading, stderr=subprocess.DEVNULL, check=False, **nobody).returncode != 0:
        pytest.skip("needs a checkout that every user can read")
    place.configure(HOLDING, service=f"broker_socket = '{place.directory}/none'")
    text = place.config.read_text().replace(
        f"socket = '{place.directory}/socket'", f"socket = '{place.directory}/run/s'"
    )
    place.config.write_text(text)
    done = subprocess.run(
        place.command(), capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False, **nobody
    )
    assert done.returncode == ExitCode.DENIED, done.stderr
    assert "hint: run as root, or through ksmd-ctl.service" in done.stderr
    assert place.knobs() == FOUND


def history(place: Place, *options: str) -> list[dict[str, object]]:
    """The events, as whoever may connect gets them, or from the file."""
    command = [sys.executable, "-m", "ksmd_ctl.cli.main", "history", "--json", "--config", str(place.config), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True)
    found: list[dict[str, object]] = json.loads(done.stdout)["events"]
    return found


def test_the_history_has_it_all_in_order_after_a_kill_and_another_boot(place: Place) -> None:
    process = place.start()
    assert place.kernel is not None
    place.kernel.set("run", 2)
    place.until("run", "1")
    set_by_hand(place, "sleep_millisecs=7")
    place.configure("knobs = 7\n")
    process.send_signal(signal.SIGHUP)
    place.told("READY=1")
    place.configure(HOLDING)
    # Also what is not written yet.
    before = [event for event in history(place) if event["kind"] != "policy"]
    assert [(event["kind"], event["event"]) for event in before] == [
        ("service", "started"),
        ("foreign", "drift"),
        ("knob", "held"),
        ("transaction", "transaction"),
        ("transaction", "transaction"),
        ("configuration", "reload_failed"),
    ]
    assert "run was changed from 1 to 2 by " in str(before[1]["text"])
    assert re.fullmatch(r"ksmd-ctl set sleep_millisecs=7, pid \d+, uid \d+", str(before[4]["who"]))
    place.end(process)
    # A start and a stop are on disk at once; a kill comes within the next minute.
    place.end(place.start(), signal.SIGKILL)
    place.end(place.start(), signal.SIGKILL)
    place.kernel.write(place.kernel.proc / "sys/kernel/random/boot_id", "00000000-0000-4000-8000-000000000002\n")
    place.end(place.start())
    place.kernel.write(place.kernel.proc / "sys/kernel/random/boot_id", "00000000-0000-4000-8000-000000000003\n")
    place.end(place.start())
    found = [event for event in history(place) if event["kind"] != "policy"]
    assert found[: len(before)] == before
    assert [event["event"] for event in history(place, "--kind", "service")] == [
        *("started", "stopped"),
        "started",
        *("killed", "started"),
        *("killed", "started", "stopped"),
        *("rebooted", "started", "stopped"),
    ]
    booted = [event["fields"] for event in found if event["event"] == "killed"]
    assert booted == [{"booted": "False"}, {"booted": "True"}]
    assert [event["time_seconds"] for event in found] == sorted(event["time_seconds"] for event in found)  # type: ignore


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_history_has_what_a_stop_of_the_unit_put_back(place: Place, number: int) -> None:
    process = place.start("--unit", "x.service")
    owner = 65534 if os.geteuid() == 0 else os.geteuid()
    for path in [place.directory / "state", *(place.directory / "state").iterdir()]:
        os.chown(path, owner, -1)
    for folder in (place.directory, *place.directory.parents[:2]):
        folder.chmod(folder.stat().st_mode | 0o011)
    place.end(process, number)
    assert place.refused("--restore", "--unit", "x.service")[0] == 0
    assert place.knobs() == FOUND
    # Written as the service's user, who is to write it afterwards.
    assert (place.directory / "state/history-kernel.sqlite").stat().st_uid == owner
    assert not (place.directory / "state/history-kernel.sqlite-wal").exists()
    ended = "killed" if number == signal.SIGKILL else "stopped"
    found = [event for event in history(place) if event["kind"] != "policy"]
    assert [event["event"] for event in found] == ["started", ended, "restored"]
    assert found[-1]["who"] == "systemd, at the stop of x.service"
    assert str(found[-1]["text"]).endswith("pages_to_scan = 100 (was 1000) (systemd, at the stop of x.service)")
    # It has been said how it ended.
    place.end(place.start())
    assert [event["event"] for event in history(place, "--kind", "service")] == [
        *("started", ended),
        *("started", "stopped"),
    ]


def test_the_history_has_what_a_person_put_back(place: Place) -> None:
    place.end(place.start(), signal.SIGKILL)
    assert place.refused("--restore")[0] == 0
    *_, killed, restored = history(place)
    assert killed["event"] == "killed"
    assert re.fullmatch(rf"ksmd-ctl daemon --restore, pid \d+, uid {os.getuid()}", str(restored["who"]))


def test_a_history_that_cannot_be_written_keeps_nothing_from_being_put_back(place: Place) -> None:
    place.end(place.start("--unit", "x.service"))
    path = place.directory / "state/history-kernel.sqlite"
    path.write_text("what is this?")
    path.with_name(f"{path.name}.damaged").mkdir()
    code, said = place.refused("--restore", "--unit", "x.service")
    assert (code, place.knobs()) == (0, FOUND)
    assert "the service tries again" in said
    assert "Traceback" not in said


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for fanotify(7)")
def test_who_changed_a_knob_has_a_name(place: Place) -> None:
    assert place.kernel is not None
    process = place.start()
    # A broker has to start first.
    shown = ["ls", "-l", f"/proc/{process.pid}/fd"]
    while "anon_inode:[fanotify]" not in subprocess.run(shown, capture_output=True, text=True, check=False).stdout:
        place.told("WATCHDOG=1")
    place.kernel.set("pages_to_scan", 7)
    place.told("1 drifted")
    place.end(process)
    (event,) = history(place, "--kind", "foreign")
    assert str(event["who"]).startswith(f"{Path('/proc/self/comm').read_text().strip()} (pid {os.getpid()}")
    assert f"changed from 1000 to 7 by {event['who']}: is being put back" in str(event["text"])
    assert f"pages_to_scan 1000 to 7 by {event['who']}, " in status(place)


def test_a_history_that_cannot_be_kept_stops_nothing(place: Place) -> None:
    (place.directory / "state").mkdir()
    (place.directory / "state/history-kernel.sqlite").mkdir()
    (place.directory / "state/history-kernel.sqlite.damaged").write_text("in the way")
    process = place.start()
    assert place.knobs() == HELD
    assert [event["event"] for event in history(place, "--kind", "service")] == ["no_history", "started"]
    found = place.report()["history"]
    assert isinstance(found, dict)
    assert found["errors"]
    assert "EISDIR" in found["error"]
    assert "the history" in place.end(process)
    assert place.knobs() == FOUND
