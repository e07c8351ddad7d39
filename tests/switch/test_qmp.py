# SPDX-License-Identifier: GPL-2.0-or-later
"""The QMP client against monitors that answer as QEMU does, and against whatever else may be at the other end."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksmd_ctl.errors import HostError, KsmdError, Rejected, TimedOut, Unparsable
from ksmd_ctl.switch.qmp import Backend, Qmp

GREETING = b'{"QMP": {"version": {"qemu": {"major": 9, "minor": 1, "micro": 0}}, "capabilities": []}}\r\n'
SECONDS = 5.0


def against(*answers: bytes | Callable[[int], bytes], then_close: bool = True, seconds: float = SECONDS) -> Qmp:
    """A conversation with one that says each of these in answer to one command, or for the number of that command."""
    ours, theirs = socket.socketpair()

    def serve() -> None:
        # The other side may have enough before the end.
        with suppress(OSError), theirs:
            lines = theirs.makefile("rb")
            for answer in answers:
                if not (line := lines.readline()):
                    return
                number = json.loads(line)["id"]
                theirs.sendall(answer(number) if callable(answer) else answer)
            if not then_close:
                lines.read()

    theirs.sendall(GREETING)
    threading.Thread(target=serve, daemon=True).start()
    return Qmp(ours, seconds)


def returns(value: object) -> Callable[[int], bytes]:
    return lambda number: json.dumps({"return": value, "id": number}).encode() + b"\r\n"


def test_a_conversation() -> None:
    with against(returns({}), returns(["a"]), then_close=False) as qmp:
        assert qmp.version == "QEMU 9.1.0"
        assert qmp.execute("qom-list", path="/objects") == ["a"]


def test_what_is_no_answer_to_it_is_passed_over() -> None:
    def late(number: int) -> bytes:
        event = b'{"event": "STOP", "timestamp": {}}\r\n\r\n'
        return event + returns("another's")(number + 7) + returns("mine")(number)

    with against(returns({}), late) as qmp:
        assert qmp.execute("query-status") == "mine"


def test_what_qemu_refuses() -> None:
    def refusal(number: int) -> bytes:
        error = {"class": "GenericError", "desc": "Property not\x1b[31m found"}
        return json.dumps({"error": error, "id": number}).encode() + b"\r\n"

    with against(returns({}), refusal) as qmp, pytest.raises(Rejected) as caught:
        qmp.execute("qom-get", path="/objects/a", property="merge")
    assert caught.value.what.endswith("(qom-get)")
    assert "\x1b" not in caught.value.why


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"220 mail ESMTP\r\n", Unparsable),
        (b"[]\r\n", Unparsable),
        (b'{"a": 1, "a": 2}\r\n', Unparsable),
        (b"[" * 100_000 + b"\r\n", Unparsable),
        (lambda number: b'{"id": %d}\r\n' % number, Unparsable),
        (b'{"return": {', HostError),
    ],
)
def test_another_answer(answer: bytes, kind: type[KsmdError]) -> None:
    with against(returns({}), answer) as qmp, pytest.raises(kind):
        qmp.execute("qom-list", path="/objects")


def test_no_greeting_and_no_answer_end_after_their_time() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        began = time.monotonic()
        with pytest.raises(TimedOut, match="one connection at a time") as caught:
            Qmp(ours, 0.1)
        assert "inject" in caught.value.hint
        # It ends at all: what a busy machine takes for that is nobody's concern.
        assert time.monotonic() - began < 60
    with against(returns({}), b"", then_close=False, seconds=0.2) as qmp, pytest.raises(TimedOut):
        qmp.execute("qom-list", path="/objects")


def test_one_that_drips_does_not_prolong_it() -> None:
    ours, theirs = socket.socketpair()
    over = threading.Event()

    def drip() -> None:
        with theirs:
            while not over.wait(0.02):
                try:
                    theirs.sendall(b" ")
                except OSError:
                    return

    threading.Thread(target=drip, daemon=True).start()
    try:
        with pytest.raises(TimedOut):
            Qmp(ours, 0.3)
    finally:
        over.set()


def test_an_endless_answer_is_cut() -> None:
    def flood(_: int) -> bytes:
        return b"x" * (5 << 20)

    with against(returns({}), flood) as qmp, pytest.raises(Unparsable, match="longer than"):
        qmp.execute("qom-list", path="/objects")


def test_one_that_hangs_up() -> None:
    with against(returns({})) as qmp, pytest.raises(HostError):
        qmp.execute("qom-list", path="/objects")


def test_backends() -> None:
    listed = [
        {"name": "ram0", "type": "child<memory-backend-ram>"},
        {"name": "mem", "type": "child<memory-backend-memfd>"},
        {"name": "rng0", "type": "child<rng-random>"},
        {"name": 7, "type": "child<memory-backend-ram>"},
        "x",
    ]
    first = [returns(1 << 20), returns(True), returns(False)]
    # share came later than merge.
    second = [returns(2 << 20), returns(False), lambda number: b'{"error": {"class": "x"}, "id": %d}\n' % number]
    with against(returns({}), returns(listed), *first, *second, then_close=False) as qmp:
        assert qmp.backends() == (Backend("ram0", 1 << 20, True), Backend("mem", 2 << 20, False))


@pytest.mark.parametrize("values", [("a", True, False), (-1, True, False), (1, "on", False), (None, None, None)])
def test_backends_without_size_or_merge(values: tuple[object, ...]) -> None:
    listed = [{"name": "ram0", "type": "child<memory-backend-ram>"}]
    said = [returns({}), returns(listed), *map(returns, values)]
    with against(*said, then_close=False) as qmp, pytest.raises(Unparsable, match="no size and merge"):
        qmp.backends()


@settings(max_examples=100)
@given(st.lists(st.binary(max_size=200), max_size=4), st.booleans())
def test_whatever_answers_it_ends_with_a_result_or_an_error(answers: list[bytes], greets: bool) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall((GREETING if greets else b"") + b"\n".join(answers) + b"\n")
        theirs.shutdown(socket.SHUT_WR)
        said = ""
        try:
            with Qmp(ours, 1.0) as qmp:
                qmp.backends()
        except KsmdError as error:
            said = str(error)
        assert not said or said.isprintable()
