# SPDX-License-Identifier: GPL-2.0-or-later
"""The privileged part: who may ask, for what, how much, and that it goes away again."""

from __future__ import annotations

import gc
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ksmd_ctl.codec import decode_error, dump
from ksmd_ctl.errors import (
    Busy,
    Cancelled,
    Denied,
    HostError,
    KsmdError,
    Refused,
    Rejected,
    TimedOut,
    Unreachable,
    UsageError,
)
from ksmd_ctl.host.knobs import Knob, KnobValue
from ksmd_ctl.host.memory import LEAST_FLOOR_BYTES, ProcessId
from ksmd_ctl.host.operation import Collapse, Move, Operation, Unshare, UnsharePart, finish
from ksmd_ctl.host.switching import Method, Switch
from ksmd_ctl.kernel.knob_writes import WriteReader
from ksmd_ctl.privileged.broker import Broker, Limits, main
from ksmd_ctl.privileged.host import open_kernel_host
from ksmd_ctl.privileged.requests import (
    CANCEL,
    MESSAGE_BYTES,
    REQUESTS,
    Request,
    WriteKnob,
    above_floor,
    parse_request,
    request_message,
)
from tests.fakes.ksmfs import FakeKsmFs
from tests.kernel.stuck import stuck_process
from tests.kernel.test_processes import stat
from tests.kernel.trees import write_tree, zone
from tests.privileged.serving import (
    PATIENCE_SECONDS,
    TABLE,
    Compared,
    Echo,
    Held,
    Queued,
    Sleep,
    client_of,
    in_child,
    outlive,
    wait,
)
from tests.service.running import until

NOBODY = 65534
CHECKOUT = Path(__file__).resolve().parents[2]
GOOD = {"kind": "request", "request": "write_knob", "parameters": {"knob": "run", "value": 1}, "deadline_seconds": 5}

Serve = Callable[..., Path]


def message_of(name: str, parameters: dict[str, Any]) -> bytes:
    return json.dumps({"kind": "request", "request": name, "parameters": parameters, "deadline_seconds": 5}).encode()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts a broker on a socket; ends it after the test."""
    pidfds: list[tuple[int, int]] = []

    def start(limits: Limits | None = None, uid: int | None = None, root: Path = tmp_path) -> Path:
        path = tmp_path / f"{len(pidfds)}.sock"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(path))
        path.chmod(0o666)
        listener.listen()

        def run() -> None:
            REQUESTS.update(TABLE)
            Broker(root, listener, os.getuid() if uid is None else uid, limits).run()

        pid = in_child(run)
        listener.close()
        pidfds.append((pid, os.pidfd_open(pid)))
        return path

    yield start
    for pid, pidfd in pidfds:
        try:
            os.kill(pid, 9)
        except ProcessLookupError:
            pass
        outlive(pidfd)
        os.close(pidfd)
        try:
            os.waitpid(pid, 0)
        except ChildProcessError:
            pass


def connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(PATIENCE_SECONDS)
    connection.connect(str(path))
    return connection


def answer(connection: socket.socket) -> list[Any]:
    """Every document that comes until the end."""
    data = b""
    while True:
        try:
            more = connection.recv(MESSAGE_BYTES)
        except ConnectionResetError:
            # It did not read all that was sent.
            continue
        if not more:
            return [json.loads(line) for line in data.splitlines()]
        data += more


def ask(path: Path, message: bytes) -> list[Any]:
    with connect(path) as connection:
        try:
            connection.send(message)
        except BrokenPipeError:
            pass
        return answer(connection)


def only_error(documents: list[Any]) -> KsmdError:
    (document,) = documents
    assert document["kind"] == "error"
    return decode_error(document["value"])


def finished(running: Operation[Any]) -> Any:
    return finish(running, PATIENCE_SECONDS)


# -- requests ----------------------------------------------------------------------------------------------


def test_a_request_is_decoded() -> None:
    assert parse_request(dump(GOOD)) == (WriteKnob(Knob.RUN, 1), 5.0)  # type: ignore[arg-type]
    made = request_message(WriteKnob(Knob.ADVISOR_MODE, "none"), 2)
    assert parse_request(made) == (WriteKnob(Knob.ADVISOR_MODE, "none"), 2.0)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"request": "exec"}, "no request"),
        ({"request": None}, "request is None"),
        ({"request": ["write_knob"]}, r"request is \['write_knob'\]"),
        ({"request": "WriteKnob"}, "no request"),
        ({"more": 1}, "more is not known"),
        ({"kind": "result"}, "kind"),
        ({"parameters": None}, "parameters"),
        ({"parameters": {}}, "parameters.knob is missing"),
        ({"parameters": {"knob": "run"}}, "parameters.value is missing"),
        ({"parameters": {"knob": "../../../etc/passwd", "value": 1}}, "parameters.knob"),
        ({"parameters": {"knob": "pages_shared", "value": 1}}, "parameters.knob"),
        ({"parameters": {"knob": "ksmd_nice", "value": "5"}}, "ksmd_nice takes a number"),
        ({"parameters": {"knob": "ksmd_scheduling", "value": "x" * 65}}, "longer than 64"),
        ({"parameters": {"knob": "ksmd_cpus", "value": "1," * 2049}}, "longer than 4096"),
        ({"parameters": {"knob": "run", "value": True}}, "parameters.value"),
        ({"parameters": {"knob": "run", "value": 1.0}}, "parameters.value"),
        ({"parameters": {"knob": "run", "value": None}}, "parameters.value"),
        ({"parameters": {"knob": "run", "value": 1, "path": "/"}}, "parameters.path is not known"),
        ({"deadline_seconds": 0}, "between"),
        ({"deadline_seconds": -1}, "between"),
        ({"deadline_seconds": 1e9}, "between"),
        ({"deadline_seconds": "5"}, "deadline_seconds"),
        ({"deadline_seconds": True}, "deadline_seconds"),
        ({"deadline_seconds": 10**400}, ""),
    ],
)
def test_what_is_no_request(change: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word or "reading a request"):
        parse_request(json.dumps({**GOOD, **change}).encode())


@pytest.mark.parametrize("left_out", list(GOOD))
def test_every_key_is_needed(left_out: str) -> None:
    with pytest.raises(UsageError, match=f"{left_out} is missing"):
        parse_request(json.dumps({key: value for key, value in GOOD.items() if key != left_out}).encode())


MOVE = {
    "process": {"pid": 1, "start_time_ticks": 1},
    "to": 0,
    "ranges": [],
    "everything": False,
    "latency_seconds": 0.01,
    "floor_bytes": 0,
}
UNSHARE = {
    "parts": [{"process": {"pid": 1, "start_time_ticks": 1}, "ranges": [[0, 4096]], "to": None, "pages": 1}],
    "latency_seconds": 0.01,
    "floor_bytes": 0,
    "headroom_share": 0.25,
    "max_pressure": 0.5,
}
COLLAPSE = {
    "process": {"pid": 1, "start_time_ticks": 1},
    "unit": "",
    "keep_pages": 32,
    "floor_bytes": 0,
    "headroom_share": 0.25,
    "max_pressure": 0.5,
    "dry_run": False,
}
HUGE = 10**400


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("duplicates", {"budget_frames": 0}),
        ("duplicates", {"budget_frames": -1}),
        ("duplicates", {"budget_frames": HUGE}),
        ("inventory", {"floor_bytes": -(10**18)}),
        ("inventory", {"floor_bytes": HUGE}),
        ("survey", {"budget_cpu_seconds": -1}),
        ("survey", {"budget_cpu_seconds": HUGE}),
        ("survey", {"budget_cpu_seconds": 1e300}),
        ("duplicate_ksm_pages", {"budget_cpu_seconds": 1, "most_pages": -1}),
        ("duplicate_ksm_pages", {"budget_cpu_seconds": -1, "most_pages": 1}),
        ("write_knob", {"knob": "run", "value": HUGE}),
        ("write_knob", {"knob": "run", "value": "9" * 5000}),
        ("write_knob", {"knob": "run", "value": "2"}),
        ("write_knob", {"knob": "advisor_mode", "value": "9" * 5000}),
        *(
            (name, {"move": {**MOVE, **change}})
            for name in ("plan_move", "move")
            for change in (
                {"process": {"pid": 1 << 40, "start_time_ticks": 1}},
                {"process": {"pid": 0, "start_time_ticks": 1}},
                {"process": {"pid": 1, "start_time_ticks": HUGE}},
                {"to": -1},
                {"to": 1 << 20},
                {"ranges": [[4096, 0]]},
                {"ranges": [[-4096, 4096]]},
                {"ranges": [[0, 1 << 70]]},
                {"latency_seconds": -1},
                {"floor_bytes": -(10**18)},
            )
        ),
        *(
            ("unshare", {"unshare": {**UNSHARE, **change}})
            for change in (
                *(
                    {"parts": [{**UNSHARE["parts"][0], **part}]}  # type: ignore[index,dict-item]
                    for part in (
                        {"process": {"pid": 1 << 40, "start_time_ticks": 1}},
                        {"to": -1},
                        {"pages": -1},
                        {"ranges": [[4096]]},
                        {"ranges": [[0, 4096, 8192]]},
                        {"ranges": [[0, 1 << 70]]},
                        {"ranges": [[-4096, 4096]]},
                        {"ranges": [[4096, 4096]]},
                    )
                ),
                {"latency_seconds": 0},
                {"floor_bytes": -1},
                {"headroom_share": 0},
                {"headroom_share": 2},
                {"max_pressure": -1},
                {"max_pressure": HUGE},
            )
        ),
        *(
            ("make_huge", {"collapse": {**COLLAPSE, **change}})
            for change in (
                {"process": {"pid": 1 << 40, "start_time_ticks": 1}},
                {"process": None},
                {"unit": "a.service"},
                {"process": None, "unit": "a" * 256},
                {"keep_pages": 0},
                {"keep_pages": 513},
                {"floor_bytes": -1},
            )
        ),
    ],
)
def test_numbers_that_nobody_can_mean_are_no_request(name: str, parameters: dict[str, Any]) -> None:
    message = message_of(name, parameters)
    with pytest.raises(UsageError):
        parse_request(message)


def test_what_is_in_range_is_a_request() -> None:
    for name, parameters in (
        ("move", {"move": MOVE}),
        ("unshare", {"unshare": UNSHARE}),
        ("make_huge", {"collapse": COLLAPSE}),
        ("make_huge", {"collapse": {**COLLAPSE, "process": None, "unit": "a.service"}}),
        ("duplicates", {"budget_frames": 1}),
    ):
        message = message_of(name, parameters)
        assert parse_request(message)[0].name == name


def with_one_number_changed(value: Any, number: float) -> Iterator[Any]:
    """The same dataclass, with one of the numbers in it another one; those in tuples are not changed."""
    for field in fields(value):
        found = getattr(value, field.name)
        if is_dataclass(found):
            for inner in with_one_number_changed(found, number):
                yield replace(value, **{field.name: inner})
        elif isinstance(found, int | float) and not isinstance(found, bool):
            yield replace(value, **{field.name: type(found)(number)})


@pytest.mark.parametrize("number", [-1e30, 1e30])
def test_each_number_of_each_request_has_a_range(number: float) -> None:
    for request in sample_requests():
        assert parse_request(request_message(request, 5))[0] == request
        for changed in with_one_number_changed(request, number):
            # Of a process that may be none, it is said that it is none.
            with pytest.raises(UsageError, match=r"is not between|not ProcessId \| None"):
                parse_request(request_message(changed, 5))


def test_what_stays_free_is_not_for_the_asker_to_choose() -> None:
    assert above_floor(Unshare(())).floor_bytes == LEAST_FLOOR_BYTES
    assert above_floor(Move(ProcessId(1, 1), 0, floor_bytes=1 << 40)).floor_bytes == 1 << 40


@given(st.binary(max_size=300))
def test_any_bytes_are_a_request_or_a_usage_error(data: bytes) -> None:
    with pytest.raises(UsageError):
        parse_request(data)


# -- being served ------------------------------------------------------------------------------------------


def test_a_knob_is_written_for_a_client(serve: Serve, tmp_path: Path) -> None:
    fake = FakeKsmFs(tmp_path / "host")
    client = client_of(serve(root=fake.root))
    for knob, value in ((Knob.RUN, 1), (Knob.PAGES_TO_SCAN, 4000), (Knob.MAX_PAGE_SHARING, 2)):
        assert finished(client.start(WriteKnob(knob, value), 10)) == value
        assert fake.text(knob) == str(value)


@pytest.mark.ksm
def test_ksmd_is_scheduled_for_a_client(serve: Serve, ksm_host: Path) -> None:
    client = client_of(serve(root=Path("/")))
    for knob, value in ((Knob.KSMD_SCHEDULING, "idle"), (Knob.KSMD_CPUS, "0"), (Knob.KSMD_NICE, 9)):
        assert finished(client.start(WriteKnob(knob, value), 10)) == value
        assert client.read(knob) == value
    for knob, value, why in (
        (Knob.KSMD_CPUS, "8000", "no CPU 8000"),
        (Knob.KSMD_CPUS, "0-", "is not a list of CPUs"),
        (Knob.KSMD_SCHEDULING, "fifo", "is not one of other, batch, idle"),
        (Knob.KSMD_NICE, -21, "is not between -20 and 19"),
    ):
        with pytest.raises(Rejected, match=why):
            finished(client.start(WriteKnob(knob, value), 10))
    client.close()


def test_the_kernel_host_writes_through_it(serve: Serve, tmp_path: Path) -> None:
    fake = FakeKsmFs(tmp_path / "host")
    host = open_kernel_host(fake.root, serve(root=fake.root))
    assert finished(host.write(Knob.RUN, 1, 10)) == 1
    assert host.read(Knob.RUN) == 1
    with pytest.raises(Rejected, match="is not between 0 and 2"):
        finished(host.write(Knob.RUN, 3, 10))
    host.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for fanotify(7)")
def test_a_client_gets_a_descriptor_of_who_writes(serve: Serve, tmp_path: Path) -> None:
    kernel = FakeKsmFs(tmp_path)
    host = open_kernel_host(tmp_path, serve())
    before = len(os.listdir("/proc/self/fd"))
    descriptor = finish(host.watch_writes())
    try:
        kernel.set("run", 1)
        assert [(write.knob, write.pid) for write in WriteReader(descriptor).read()] == [(Knob.RUN, os.getpid())]
        assert not os.get_inheritable(descriptor)
    finally:
        os.close(descriptor)
    assert len(os.listdir("/proc/self/fd")) == before
    # A client that does not take it gets it as an answer all the same, and it goes with the connection.
    (said,) = ask(serve(), message_of("watch_writes", {}))
    assert said["kind"] == "result"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for fanotify(7)")
@pytest.mark.parametrize("own", [True, False], ids=["a child", "a socket"])
def test_a_client_knows_which_writes_are_its_own(serve: Serve, tmp_path: Path, own: bool) -> None:
    """`run` is written by a process of its own, pages_to_scan by the broker, or, as root, by the client itself."""
    kernel = FakeKsmFs(tmp_path)
    host = open_kernel_host(tmp_path, None if own else serve())
    descriptor = finish(host.watch_writes())
    try:
        with subprocess.Popen(["sh", "-c", f"echo 7 > {kernel.ksm}/run; echo 7 > {kernel.ksm}/pages_to_scan"]):
            pass
        assert finish(host.write(Knob.RUN, 1, 30)) == 1
        assert finish(host.write(Knob.PAGES_TO_SCAN, 1234, 30)) == 1234
        found = [(write.knob, host.has_written(write.pid)) for write in WriteReader(descriptor).read()]
    finally:
        os.close(descriptor)
    assert list(dict.fromkeys(found)) == [
        *((Knob.RUN, False), (Knob.PAGES_TO_SCAN, False)),
        *((Knob.RUN, True), (Knob.PAGES_TO_SCAN, True)),
    ]


def test_a_watch_that_can_not_be_is_an_error(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(HostError, match="watching who writes the knobs"):
        finish(open_kernel_host(FakeKsmFs(tmp_path).root, serve(root=tmp_path / "empty")).watch_writes())


def test_what_is_so_already_needs_no_broker(tmp_path: Path) -> None:
    host = open_kernel_host(FakeKsmFs(tmp_path / "host").root, tmp_path / "nobody.sock")
    assert finished(host.write(Knob.RUN, 0, 10)) == 0
    with pytest.raises(Unreachable):
        finished(host.write(Knob.RUN, 1, 10))
    host.close()


@pytest.mark.parametrize("message", [b"x", b"\0" * 100, b"{}", b"[" * 60000, CANCEL, b'{"request":'])
def test_a_message_that_is_no_request_gets_an_error(serve: Serve, message: bytes) -> None:
    assert isinstance(only_error(ask(serve(), message)), UsageError)


def test_a_message_that_is_too_long_gets_an_error(serve: Serve, tmp_path: Path) -> None:
    path = serve(root=FakeKsmFs(tmp_path / "host").root)
    message = dump(GOOD).ljust(MESSAGE_BYTES)  # type: ignore[arg-type]
    assert ask(path, message)[-1] == {"kind": "result", "value": 1}
    error = only_error(ask(path, message + b" "))
    assert isinstance(error, UsageError)
    assert "longer" in error.why


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(message=st.binary(min_size=1, max_size=2000), hang_up=st.booleans())
def test_no_message_ends_the_broker(serve: Serve, message: bytes, hang_up: bool) -> None:
    path = _once(serve)
    with connect(path) as connection:
        connection.send(message)
        if not hang_up:
            assert isinstance(only_error(answer(connection)), UsageError)
    assert ask(path, request_message(Echo("alive"), 5))[-1] == {"kind": "result", "value": "alive"}


_started: dict[int, Path] = {}


def _once(serve: Serve) -> Path:
    """One broker for all examples of a property."""
    if id(serve) not in _started:
        _started.clear()
        _started[id(serve)] = serve()
    return _started[id(serve)]


def test_several_are_served_at_a_time(serve: Serve) -> None:
    client = client_of(serve())
    slow = client.start(Sleep(), PATIENCE_SECONDS)
    wait(slow, lambda: bool(slow.progress.done))
    assert finished(client.start(Echo("quick"), 5)) == "quick"
    slow.cancel()
    with pytest.raises(Cancelled):
        finished(slow)


@pytest.mark.parametrize("stubborn", [False, True])
def test_hanging_up_kills(serve: Serve, stubborn: bool) -> None:
    running: list[Operation[Any]] = [
        client_of(serve(Limits(stop_seconds=0.2))).start(Sleep(stubborn), PATIENCE_SECONDS)
    ]
    wait(running[0], lambda: bool(running[0].progress.done))
    worker = os.pidfd_open(running[0].progress.done)
    running.clear()
    gc.collect()
    outlive(worker)
    os.close(worker)


def test_talking_out_of_turn_kills(serve: Serve) -> None:
    with connect(serve()) as connection:
        connection.send(request_message(Sleep(), PATIENCE_SECONDS))
        worker = os.pidfd_open(json.loads(connection.recv(MESSAGE_BYTES))["value"]["done"])
        connection.send(b"hello?")
        outlive(worker)
        os.close(worker)
        assert isinstance(only_error(answer(connection)), Cancelled)


# -- bounds ------------------------------------------------------------------------------------------------


def test_only_the_configured_user_and_root_are_served(serve: Serve, tmp_path: Path) -> None:
    if os.getuid() != 0:
        assert isinstance(only_error(ask(serve(uid=os.getuid() + 1), dump(GOOD))), Denied)  # type: ignore[arg-type]
        return
    folder = tmp_path / "open"
    folder.mkdir(0o755)
    fake = FakeKsmFs(tmp_path / "host")
    strict, lax = serve(uid=NOBODY - 1, root=fake.root), serve(uid=NOBODY, root=fake.root)
    for path, name in ((strict, "strict"), (lax, "lax")):
        path.rename(folder / name)

    def as_nobody() -> None:
        # The folder is entered first: those above it are not for everybody.
        os.chdir(folder)
        os.setuid(NOBODY)
        error = only_error(ask(Path("strict"), dump(GOOD)))  # type: ignore[arg-type]
        assert isinstance(error, Denied)
        assert f"uid {NOBODY}" in error.why
        assert ask(Path("lax"), dump(GOOD)) == [{"kind": "result", "value": 1}]  # type: ignore[arg-type]

    _, status = os.waitpid(in_child(as_nobody), 0)
    assert os.waitstatus_to_exitcode(status) == 0
    # Root always may, whoever is configured.
    assert ask(folder / "strict", dump(GOOD)) == [{"kind": "result", "value": 1}]  # type: ignore[arg-type]


def test_a_silent_client_is_sent_away(serve: Serve) -> None:
    with connect(serve(Limits(request_seconds=0.2))) as connection:
        assert isinstance(only_error(answer(connection)), TimedOut)


def test_requests_at_a_time_are_bounded(serve: Serve) -> None:
    client = client_of(serve(Limits(children=1)))
    first = client.start(Sleep(), PATIENCE_SECONDS)
    wait(first, lambda: bool(first.progress.done))
    with pytest.raises(Refused):
        finished(client.start(Echo("a"), 5))
    first.cancel()
    with pytest.raises(Cancelled):
        finished(first)
    assert finished(client.start(Echo("a"), 5)) == "a"


def test_connections_at_a_time_are_bounded(serve: Serve) -> None:
    # Root has as many again as the service.
    most = 4 if os.getuid() == 0 else 2
    path = serve(Limits(connections=2))
    with ExitStack() as stack:
        first, *_ = [stack.enter_context(connect(path)) for _ in range(most)]
        assert isinstance(only_error(ask(path, request_message(Echo("a"), 5))), Busy)
        first.send(request_message(Echo("b"), 5))
        assert answer(first)[-1] == {"kind": "result", "value": "b"}
    assert ask(path, request_message(Echo("c"), 5))[-1] == {"kind": "result", "value": "c"}


def test_knobs_are_written_whatever_else_is_asked_for(serve: Serve, tmp_path: Path) -> None:
    fake = FakeKsmFs(tmp_path / "host")
    client = client_of(serve(Limits(children=1), root=fake.root))
    busy = client.start(Sleep(), PATIENCE_SECONDS)
    wait(busy, lambda: bool(busy.progress.done))
    with pytest.raises(Busy):
        finished(client.start(Echo("a"), 5))
    writes = [client.start(WriteKnob(Knob.RUN, 1), 10), client.start(WriteKnob(Knob.PAGES_TO_SCAN, 4000), 10)]
    assert [finished(write) for write in writes] == [1, 4000]
    busy.cancel()


def test_writes_of_one_knob_wait_for_each_other(serve: Serve) -> None:
    client = client_of(serve(Limits(children=0, stop_seconds=0.2)))
    first = client.start(Queued(), PATIENCE_SECONDS)
    wait(first, lambda: bool(first.progress.done))
    second = client.start(Queued(sleeps=False), PATIENCE_SECONDS)
    impatient = client.start(Queued(sleeps=False), 0.2)
    third = client.start(Queued(sleeps=False), PATIENCE_SECONDS)
    third.cancel()
    assert finished(client.start(Queued(name_of_queue="another", sleeps=False), 5)) == 1
    with pytest.raises(TimedOut, match="its turn did not come"):
        finished(impatient)
    with pytest.raises(Cancelled):
        finished(third)
    assert not second.poll()
    first.cancel()
    assert finished(second) == 1


def test_who_waits_for_a_knob_and_hangs_up_is_forgotten(serve: Serve) -> None:
    path = serve(Limits(stop_seconds=0.2))
    client = client_of(path)
    first = client.start(Queued(), PATIENCE_SECONDS)
    wait(first, lambda: bool(first.progress.done))
    with connect(path) as connection:
        connection.send(request_message(Queued(), PATIENCE_SECONDS))
    last = client.start(Queued(sleeps=False), PATIENCE_SECONDS)
    first.cancel()
    assert finished(last) == 1


def test_a_write_that_the_kernel_holds_for_ever_holds_up_writes_of_its_own_knob_alone(
    serve: Serve, ksm_host: Path, tmp_path: Path
) -> None:
    # stop_seconds leaves a write that the kernel doesn't hold time to be done.
    limits = Limits(children=1, left_behind=1, stop_seconds=1, kill_seconds=1)
    client = client_of(serve(limits, root=Path("/")))
    stop = WriteKnob(Knob.RUN, 0)
    with stuck_process(tmp_path, "stuck-one", uid=NOBODY, mergeable=True):
        (ksm_host / "run").write_text("1")
        until("ksmd to wait for the process", lambda: _ksmd_state() == "D" or None)
        with pytest.raises(TimedOut) as given_up:
            finished(client.start(stop, 0.5))
        assert "run reads 1 now; process " in given_up.value.why
        assert "can't be ended yet (state D" in given_up.value.why
        assert "it writes run = 0 once ksmd lets it, and ends then" in given_up.value.why
        for _ in range(3):
            with pytest.raises(Busy, match=r"an earlier write has not ended: process .* writes run = 0"):
                finished(client.start(stop, PATIENCE_SECONDS))
        # Another knob that waits for ksmd gets a process of its own, and one that doesn't is simply written.
        with pytest.raises(TimedOut, match="merge_across_nodes = 0 once ksmd lets it"):
            finished(client.start(WriteKnob(Knob.MERGE_ACROSS_NODES, 0), 0.5))
        assert finished(client.start(WriteKnob(Knob.PAGES_TO_SCAN, 200), PATIENCE_SECONDS)) == 200
        assert finished(client.start(Echo("alive"), PATIENCE_SECONDS)) == "alive"
        assert (ksm_host / "run").read_text() == "1\n"
    # What was given up takes place, as was said, and from then on everything goes on.
    until("the write to take place", lambda: (ksm_host / "run").read_text() == "0\n" or None)

    def merging_again() -> int | None:
        try:
            return int(finished(client.start(WriteKnob(Knob.RUN, 1), PATIENCE_SECONDS)))
        except Busy:
            return None

    assert until("both processes to be gone", merging_again) == 1
    assert (ksm_host / "run").read_text() == "1\n"


def _ksmd_state() -> str:
    (stat,) = (path for path in Path("/proc").glob("[0-9]*/stat") if " (ksmd) " in _text_of(path))
    return _text_of(stat).rpartition(")")[2].split()[0]


def _text_of(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def test_contents_are_compared_seldom_for_anybody_but_root(serve: Serve, tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root, who asks as somebody else")
    folder = tmp_path / "open"
    folder.mkdir(0o755)
    serve(uid=NOBODY).rename(folder / "s")

    def as_nobody() -> None:
        os.chdir(folder)
        os.setuid(NOBODY)
        message = request_message(Compared(), 5)
        assert ask(Path("s"), message) == [{"kind": "result", "value": NOBODY}]
        assert isinstance(only_error(ask(Path("s"), message)), Busy)

    _, status = os.waitpid(in_child(as_nobody), 0)
    assert os.waitstatus_to_exitcode(status) == 0
    for _ in range(2):
        assert ask(folder / "s", request_message(Compared(), 5)) == [{"kind": "result", "value": 0}]


def test_everything_is_unmerged_for_root_and_for_others_where_it_fits(serve: Serve, tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root, who asks as somebody else")
    folder = tmp_path / "open"
    folder.mkdir(0o755)
    fake = FakeKsmFs(tmp_path / "host", nodes={})
    write_tree(
        fake.root,
        {
            "proc/1/stat": stat(1, "tenant"),
            "proc/1/ksm_merging_pages": "2000000\n",
            "proc/1/smaps": "x" * (65 << 20),
            "proc/zoneinfo": zone(0, "Normal", 0, 1000),
        },
    )
    serve(uid=NOBODY, root=fake.root).rename(folder / "s")
    message = request_message(WriteKnob(Knob.RUN, 2), 30)

    def as_nobody() -> None:
        os.chdir(folder)
        os.setuid(NOBODY)
        error = only_error(ask(Path("s"), message))
        assert isinstance(error, Refused)
        assert "on the host it takes" in error.why

    _, status = os.waitpid(in_child(as_nobody), 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert fake.text("run") == "0"
    assert ask(folder / "s", message) == [{"kind": "result", "value": 2}]


def test_a_client_that_does_not_read_holds_up_nobody(serve: Serve) -> None:
    path = serve(Limits(request_seconds=0.5))
    with connect(path) as connection:
        connection.send(request_message(Echo("x", 5_000_000), PATIENCE_SECONDS))
        assert ask(path, request_message(Echo("a"), 5))[-1] == {"kind": "result", "value": "a"}
        # Nothing was read for so long that the rest was thrown away.
        poller = select.poll()
        poller.register(connection, select.POLLRDHUP)
        assert poller.poll(PATIENCE_SECONDS * 1000)
    assert ask(path, request_message(Echo("b"), 5))[-1] == {"kind": "result", "value": "b"}


# -- coming and going --------------------------------------------------------------------------------------

# As systemd does it: descriptors from 3 on, and the pid is the program's own; sd_listen_fds(3).
HANDED_OVER = ["sh", "-c", 'exec 3<&0 0</dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"', "sh"]


def program(*arguments: str) -> list[str]:
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); "
        "from ksmd_ctl.privileged.broker import main; status = main(); print(' '.join(sys.modules)); sys.exit(status)"
    )
    return [sys.executable, "-I", "-c", code, str(CHECKOUT), *arguments]


def run(command: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False, **more)


def test_it_ends_when_idle_and_imports_little(tmp_path: Path) -> None:
    found = run(program("--socket", str(tmp_path / "s"), "--user", str(os.getuid()), "--idle-seconds", "0.1"))
    assert (found.returncode, found.stderr) == (0, "")
    heavy = {"asyncio", "ctypes", "logging", "psutil", "prometheus_client", "subprocess", "http", "ssl", "threading"}
    assert not heavy & set(found.stdout.split())


def test_systemd_hands_over_the_socket(tmp_path: Path) -> None:
    fake = FakeKsmFs(tmp_path / "host")
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()
        command = program("--user", str(os.getuid()), "--idle-seconds", "0.5", "--root", str(fake.root))
        # The client is first: that is when systemd starts the broker.
        running = client_of(path).start(WriteKnob(Knob.RUN, 1), 20)
        found = run(HANDED_OVER + command, stdin=listener)
    assert finished(running) == 1
    assert found.returncode == 0
    assert fake.text("run") == "1"


def test_a_request_keeps_it_from_being_idle(serve: Serve) -> None:
    running = client_of(serve(Limits(idle_seconds=0.05))).start(Sleep(), 0.6)
    with pytest.raises(TimedOut, match=r"its deadline of 0\.6 s passed; it lies in bed"):
        finished(running)


def test_sigterm_stops_what_runs_and_then_it(tmp_path: Path) -> None:
    path = tmp_path / "s"

    def run_main() -> None:
        REQUESTS.update(TABLE)
        os._exit(main(["--socket", str(path), "--user", str(os.getuid())]))

    pid = in_child(run_main)

    def listens() -> bool | None:
        try:
            connect(path).close()
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        return True

    until("it to listen", listens)
    # From its first moment, whatever the umask: chmod(2) would follow a link.
    assert path.stat().st_mode & 0o777 == 0o666
    running = client_of(path).start(Held(), PATIENCE_SECONDS)
    wait(running, lambda: running.poll() or bool(running.progress.done))
    os.kill(pid, signal.SIGTERM)
    with pytest.raises(Cancelled, match="the broker is being stopped; 5 of 9 were done"):
        finished(running)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: --user"),
        (["--user", "0"], "has not handed over one socket"),
        (["--user", "no-such-user", "--socket", "s"], "there is no user"),
        (["--user", "0", "--socket", "missing/s"], "No such file"),
    ],
)
def test_what_it_cannot_start_with(tmp_path: Path, arguments: list[str], words: str) -> None:
    found = run(program(*arguments), cwd=tmp_path)
    assert found.returncode == 2
    assert words in found.stderr
    assert "Traceback" not in found.stderr


def test_a_socket_of_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        found = run(HANDED_OVER + program("--user", "0"), stdin=listener)
    assert found.returncode == 2
    assert "ListenSequentialPacket" in found.stderr


# -- no broker ---------------------------------------------------------------------------------------------


def test_no_broker_is_unreachable(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with pytest.raises(Unreachable, match="ENOENT"):
        finished(client_of(path).start(WriteKnob(Knob.RUN, 1), 5))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
    with pytest.raises(Unreachable, match="ECONNREFUSED") as caught:
        finished(client_of(path).start(WriteKnob(Knob.RUN, 1), 5))
    assert "ksmd-ctl-broker.socket" in caught.value.hint


def test_too_many_waiting_for_it_are_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(0)
        waiting = [client_of(tmp_path / "s").start(WriteKnob(Knob.RUN, 1), 5) for _ in range(3)]
        with pytest.raises(Refused):
            finished(waiting[-1])


# -- what people read of a request ------------------------------------------------------------------------------


def sample_requests() -> list[Request[Any]]:
    """One of each kind that there is, with parameters that a line could show."""
    process = ProcessId(1234, 99)
    # What a field of each type may hold.
    values: dict[object, object] = {
        Knob: Knob.RUN,
        KnobValue: 2,
        Move: Move(process, 1, ((4096, 8192),)),
        Unshare: Unshare((UnsharePart(process, ((4096, 8192),), 1, 5),)),
        Collapse: Collapse(process),
        Switch: Switch(process, on=False),
        Method | None: Method.INJECT,
        bool: True,
        tuple[tuple[ProcessId, ...], ...]: ((process,),),
        float: 0.5,
        int: 7,
    }
    types = {kind: get_type_hints(kind) for kind in REQUESTS.values()}
    return [kind(*(values[types[kind][field.name]] for field in fields(kind))) for kind in types]


def test_every_request_says_in_words_what_it_does() -> None:
    said = [request.description for request in sample_requests()]
    assert len(set(said)) == len(REQUESTS)
    for text in said:
        assert not any(kind.__name__ in text for kind in REQUESTS.values())
        assert not any(sign in text for sign in ("=", "(", "the request"))
    assert "un-merging pages of process 1234" in said
    assert "setting run to 2" in said


@pytest.mark.parametrize("journal", [True, False])
def test_the_log_and_errors_are_in_words(
    journal: bool, serve: Serve, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if journal:
        monkeypatch.setenv("JOURNAL_STREAM", "1:2")
    else:
        monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    (tmp_path / "proc").mkdir()
    path = serve()
    client = client_of(path)
    errors = []
    for request in sample_requests():
        # Nothing of what they need is below this root, and process 1234's start time is wrong: each of them fails.
        try:
            finished(client.start(request, PATIENCE_SECONDS))
        except KsmdError as error:
            errors.append(str(error))
    with connect(path) as connection:
        connection.send(request_message(Sleep(), PATIENCE_SECONDS))
        connection.recv(MESSAGE_BYTES)
    done = client.start(Echo("x"), PATIENCE_SECONDS)
    assert finished(done) == "x"
    deadline = time.monotonic() + PATIENCE_SECONDS
    said = ""
    while "its client is gone" not in said and time.monotonic() < deadline:
        said += capfd.readouterr().err
        time.sleep(0.01)
    assert "its client is gone" in said
    if journal:
        assert re.search("^<6>.*the request echo: done$", said, re.MULTILINE)
    for text in (said, *errors):
        for name in re.findall(r"([A-Z]\w+)\(\w+=", text):
            raise AssertionError(f"{name}: {text}")
        assert "{" not in text
