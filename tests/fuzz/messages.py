# SPDX-License-Identifier: GPL-2.0-or-later
"""Varlink messages, right and wrong, and a client that says them on several connections at once."""

from __future__ import annotations

import json
import selectors
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from ksmd_ctl.daemon.varlink import INTERFACE
from ksmd_ctl.daemon.varlink_wire import BadMessage, parse_call
from ksmd_ctl.host.knobs import KNOBS
from tests.fuzz.chance import mutated, noise, to_json

__all__ = ["Talk", "say", "talk"]

#: The longest message that is taken (`ksmd_ctl.daemon.varlink.LIMITS`).
_LIMIT = 64 * 1024
#: A hang, and no busy machine.
_PATIENCE_SECONDS = 300.0

_KNOBS = {knob.value: spec.default for knob, spec in KNOBS.items()}
# What there is, with parameters that are right; how often each: what takes a survey or a plan takes its time.
_CALLS: tuple[tuple[int, str, dict[str, Any]], ...] = (
    (60, "org.varlink.service.GetInfo", {}),
    (60, "org.varlink.service.GetInterfaceDescription", {"interface": INTERFACE}),
    (60, f"{INTERFACE}.Status", {}),
    (10, f"{INTERFACE}.Metrics", {}),
    (1, f"{INTERFACE}.Nodes", {}),
    (1, f"{INTERFACE}.Processes", {}),
    (40, f"{INTERFACE}.Migrate", {"to": 1, "pid": 1000, "ranges": [{"start": 0, "end": 4096}], "dry_run": True}),
    (40, f"{INTERFACE}.Migrate", {"to": 0, "unit": "a.service", "everything": False, "dry_run": False}),
    (20, f"{INTERFACE}.Plan", {"knobs": {"pages_to_scan": 200, "merge_across_nodes": 0}}),
    (30, f"{INTERFACE}.Set", {"knobs": _KNOBS, "wait_seconds": 1}),
    (30, f"{INTERFACE}.Unmerge", {"pid": 1000, "unit": "", "to": 0, "dry_run": True}),
    (20, f"{INTERFACE}.Collapse", {"pid": 1000, "unit": "", "keep_pages": 32, "dry_run": True}),
    (20, f"{INTERFACE}.Merge", {"on": True, "pid": 1000, "ranges": None, "method": "inject", "dry_run": True}),
    (2, f"{INTERFACE}.Reload", {}),
)
_WEIGHTS = tuple(weight for weight, _, _ in _CALLS)
_FLAGS = ("more", "oneway", "upgrade")
_NEVER = (
    *(b"", b" ", b"{}", b"[]", b"null", b"0", b'""', b"\xef\xbb\xbf{}", b"{" * 9000, b"[" * 9000, b'{"a":' * 9000),
    *('{"method":"a.b.C"}'.encode(code) for code in ("utf-16", "utf-32")),
    *(b'{"method":"io.ksmd-ctl.Status","method":"a.b.C"}', b'{"method":' + b"9" * 5000 + b"}", b'{"method":"\xff.x"}'),
    *(b"x" * (_LIMIT + 1), b'{"method":"' + b"a." * _LIMIT + b'"}', b"GET /metrics HTTP/1.1\r\n\r\n"),
)


def _message(chance: Random) -> bytes:
    """A message without its NUL."""
    kind = chance.randrange(20)
    if kind == 0:
        return chance.choice(_NEVER)
    if kind == 1:
        return chance.randbytes(chance.randrange(200)).replace(b"\0", b"\1")
    (_, method, parameters), *_ = chance.choices(_CALLS, _WEIGHTS)
    call: Any = {"method": method}
    if parameters or chance.random() < 0.2:
        call["parameters"] = parameters
    if chance.random() < 0.1:
        call[chance.choice(_FLAGS)] = chance.choice((True, False, None))
    for _ in range(chance.choice((0, 1, 1, 1, 2))):
        if call.get("parameters") and chance.random() < 0.8:
            # Inside: what is wrong outside is refused before anybody looks at it.
            call["parameters"] = mutated(chance, call["parameters"])
        else:
            call = mutated(chance, call)
        if not isinstance(call, dict):
            break
    text = to_json(call)
    if kind == 2:
        text = noise(chance, text)
    if kind == 3:
        text = text.replace(b":", b" :\n\t")
    # What comes after a NUL is another message.
    return text.partition(b"\0")[0]


@dataclass(slots=True)
class Talk:
    """What is said on one connection.

    :ivar messages: how many
    :ivar wanted: how many last words are due, None where that can't be told
    """

    data: bytes
    messages: int
    wanted: int | None
    cuts: list[int] = field(default_factory=list)


def talk(chance: Random) -> Talk:
    """Messages for one connection: one that the service can't read ends it, and so comes last."""
    data, wanted, count, whole = bytearray(), 0, 0, True
    while count < 24 and len(data) < 4 * _LIMIT:
        message = _message(chance)
        data += message + b"\0"
        count += 1
        try:
            if len(message) > _LIMIT:
                raise BadMessage("too long")
            call = parse_call(message)
        except BadMessage:
            whole = False
            break
        if call.more and call.name == f"{INTERFACE}.Status":
            # What is behind a subscription waits for its end, which is that of the connection.
            whole = False
            break
        wanted += not call.oneway
    else:
        if chance.random() < 0.1:
            # Half a message.
            data += b'{"method":"io.ksmd'
    if len(data) and chance.random() < 0.02:
        whole, data = False, data[: chance.randrange(len(data))]
    cuts = sorted(chance.randrange(1, len(data) + 1) for _ in range(chance.choice((0, 0, 1, 3)))) if data else []
    return Talk(bytes(data), count, wanted if whole else None, cuts)


class _Line:
    """One connection while something is said on it."""

    def __init__(self, path: Path, name: str, what: Talk) -> None:
        self.name = name
        self.talk = what
        self.until = time.monotonic() + _PATIENCE_SECONDS
        self.sent = 0
        self.heard = bytearray()
        self.last_words = 0
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(str(path))
        self.socket.setblocking(False)

    def push(self) -> bool:
        """Say the next piece; False when all is said."""
        data = self.talk.data
        end = next((cut for cut in self.talk.cuts if cut > self.sent), len(data))
        try:
            self.sent += self.socket.send(memoryview(data)[self.sent : end])
        except BlockingIOError:
            return True
        except OSError:
            # It ended the connection: it has heard enough.
            return False
        if self.sent < len(data):
            return True
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        return False

    def hear(self) -> bool:
        """Take in what is answered; False when the other side has hung up."""
        try:
            part = self.socket.recv(1 << 18)
        except BlockingIOError:
            return True
        except ConnectionError:
            part = b""
        self.heard += part
        *replies, rest = self.heard.split(b"\0")
        self.heard = bytearray(rest)
        for reply in replies:
            self._look(json.loads(reply))
        return bool(part)

    def _look(self, reply: dict[str, Any]) -> None:
        assert reply.keys() <= {"parameters", "error", "continues"}, reply
        if reply.get("continues"):
            return
        self.last_words += 1
        hint = reply["parameters"].get("hint", "") if "error" in reply else ""
        assert "bug" not in str(hint), f"{self.name}: {reply}"

    def end(self) -> None:
        self.socket.close()
        wanted = self.talk.wanted
        if wanted is not None:
            assert not self.heard, f"{self.name}: half a reply: {bytes(self.heard[:200])!r}"
            assert self.last_words == wanted, f"{self.name}: {self.last_words} replies to {wanted} calls"


def say(path: Path, messages: int, seed: int, lines: int = 12) -> int:
    """Say so many messages to the service that listens there; how many calls were answered.

    Of a talk that goes wrong the name is said: ``talk(Random(NAME))`` is it.
    """
    selector = selectors.DefaultSelector()
    both = selectors.EVENT_READ | selectors.EVENT_WRITE
    answered = 0

    def talks() -> Iterator[tuple[str, Talk]]:
        said = number = 0
        while said < messages:
            name = f"{seed}/{number}"
            what = talk(Random(name))
            said, number = said + what.messages, number + 1
            yield name, what

    coming = talks()
    free = lines
    while True:
        while free and (following := next(coming, None)) is not None:
            line = _Line(path, *following)
            selector.register(line.socket, both, line)
            free -= 1
        if free == lines:
            return answered
        now = time.monotonic()
        for key, mask in selector.select(1.0):
            line = key.data
            if mask & selectors.EVENT_WRITE and not line.push():
                selector.modify(line.socket, selectors.EVENT_READ, line)
            if mask & selectors.EVENT_READ:
                line.until = now + _PATIENCE_SECONDS
                if not line.hear():
                    selector.unregister(line.socket)
                    line.end()
                    answered += line.last_words
                    free += 1
        for key in tuple(selector.get_map().values()):
            assert key.data.until > now, f"{key.data.name}: no word for {_PATIENCE_SECONDS:g} s"
