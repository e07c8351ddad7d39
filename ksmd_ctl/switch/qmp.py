# SPDX-License-Identifier: GPL-2.0-or-later
"""A QMP client: as much of QEMU's monitor protocol as it takes to switch merging of its memory backends.

Sources: QEMU's QMP specification, qapi/qom.json (qom-list, qom-get, qom-set), and backends/hostmem.c
(host_memory_backend_set_merge): a change of the property ``merge`` calls madvise(2) for the backend's memory. Two
things keep it from that, so the mappings have to be looked at afterwards:

- a backend with merge=off of a machine with mem-merge=on is mergeable all the same (system/physmem.c:ram_block_add),
  and to set what is set already does nothing: then both values have to be set, one after the other;
- QEMU 9.1 has the condition the wrong way round: the property changes, and madvise is not called at all.

Who is at the other end may be anybody: each answer has a limit in bytes and in time, and none is believed.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ksmd_ctl.codec import load
from ksmd_ctl.errors import HostError, Rejected, TimedOut, Unparsable, errno_text
from ksmd_ctl.kernel.proc_pid import printable

_WHAT: Final = "asking the QEMU monitor"
_ANSWER_SECONDS: Final = 5.0
#: A change un-merges what has merged again, with the machine waiting; all else was un-merged before.
_CHANGE_SECONDS: Final = 30.0
_OTHERWISE: Final = "--method inject does without it"
# The list of all objects of a large machine has some hundred kilobytes.
_MOST_BYTES: Final = 4 << 20
_MOST_BACKENDS: Final = 4096
_OBJECTS: Final = "/objects"
_BACKEND: Final = "child<memory-backend-"


@dataclass(frozen=True, slots=True)
class Backend:
    """A memory backend of a machine.

    :ivar merge: what QEMU believes of it
    :ivar share: its memory is shared, which never merges
    """

    name: str
    size_bytes: int
    merge: bool
    share: bool = False

    @property
    def path(self) -> str:
        return f"{_OBJECTS}/{self.name}"


class Qmp:
    """A conversation with a monitor, which begins with its creation.

    :param sock: connected; it belongs to this from now on
    :ivar version: what QEMU calls itself, fit to be shown
    :raises TimedOut: no greeting comes: a monitor takes one connection at a time
    :raises HostError: it hangs up, or is none
    """

    def __init__(self, sock: socket.socket, answer_seconds: float = _ANSWER_SECONDS) -> None:
        self._socket = sock
        self._seconds = answer_seconds
        self._buffer = bytearray()
        self._number = 0
        try:
            greeting = self._message(time.monotonic() + answer_seconds).get("QMP")
            if not isinstance(greeting, dict):
                raise self._nonsense("its first message is no greeting")
            self.version = _version(greeting)
            self.execute("qmp_capabilities")
        except BaseException:
            sock.close()
            raise

    def __enter__(self) -> Qmp:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def execute(self, command: str, seconds: float | None = None, **arguments: object) -> object:
        """What a command returns.

        :raises Rejected: QEMU refuses it
        :raises TimedOut: no answer comes
        :raises HostError: it hangs up, or answers something else
        """
        self._number += 1
        message: dict[str, object] = {"execute": command, "id": self._number}
        if arguments:
            message["arguments"] = arguments
        deadline = time.monotonic() + (self._seconds if seconds is None else seconds)
        try:
            self._socket.settimeout(self._seconds)
            self._socket.sendall(json.dumps(message).encode() + b"\r\n")
        except OSError as error:
            why = f"it hung up ({errno_text(error.errno or 0)})"
            raise HostError(_WHAT, why, hint=_OTHERWISE, errno=error.errno) from error
        while True:
            answer = self._message(deadline)
            if "event" in answer or answer.get("id") != self._number:
                # What happens to the machine meanwhile.
                continue
            if isinstance(refusal := answer.get("error"), dict):
                why = printable(str(refusal.get("desc") or refusal.get("class")), 300)
                raise Rejected(f"{_WHAT} ({command})", why, hint=_OTHERWISE)
            if "return" not in answer:
                raise self._nonsense(f"its answer to {command} has neither result nor error")
            return answer["return"]

    def _message(self, deadline: float) -> Mapping[str, object]:
        while (end := self._buffer.find(b"\n")) < 0:
            self._receive(deadline)
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        if not line.strip():
            return {}
        try:
            found = load(line)
        except ValueError as error:
            raise self._nonsense("a message is no JSON") from error
        if not isinstance(found, dict):
            raise self._nonsense("a message is not an object")
        return found

    def _receive(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        try:
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            part = self._socket.recv(64 << 10)
        except TimeoutError as error:
            why = "it does not answer: it takes one connection at a time, or the machine's main loop hangs"
            raise TimedOut(_WHAT, why, hint="end the other connection, or use --method inject") from error
        except OSError as error:
            raise HostError(_WHAT, errno_text(error.errno or 0), hint=_OTHERWISE, errno=error.errno) from error
        if not part:
            raise HostError(_WHAT, "it hung up", hint=_OTHERWISE)
        self._buffer += part
        if len(self._buffer) > _MOST_BYTES:
            raise self._nonsense(f"a message is longer than {_MOST_BYTES} bytes")

    def _nonsense(self, why: str) -> HostError:
        return Unparsable(_WHAT, f"what answers is no QMP monitor: {why}", hint=_OTHERWISE)

    # -- memory ----------------------------------------------------------------------------------------------

    def backends(self) -> tuple[Backend, ...]:
        """The machine's memory backends: also the one that QEMU makes for -m (since 5.0).

        :raises KsmdError: as `execute`
        """
        listed = self.execute("qom-list", path=_OBJECTS)
        if not isinstance(listed, list):
            raise self._nonsense("its list of objects is none")
        names = [
            name
            for one in listed
            if isinstance(one, dict)
            and str(one.get("type", "")).startswith(_BACKEND)
            and isinstance(name := one.get("name"), str)
        ]
        return tuple(self._backend(name) for name in names[:_MOST_BACKENDS])

    def _backend(self, name: str) -> Backend:
        values = {key: self._get(name, key) for key in ("size", "merge", "share")}
        size, merge = values["size"], values["merge"]
        if not isinstance(size, int) or size < 0 or not isinstance(merge, bool):
            raise self._nonsense(f"{printable(name)} has no size and merge")
        return Backend(name, size, merge, values["share"] is True)

    def _get(self, name: str, key: str) -> object:
        try:
            return self.execute("qom-get", path=f"{_OBJECTS}/{name}", property=key)
        except Rejected:
            # share came with 6.1 for all kinds, and merge and size are looked at.
            return None

    def set_merge(self, backend: Backend, *, on: bool) -> None:
        """Set the property of a backend.

        :raises Rejected: QEMU, or madvise, refuses it
        :raises KsmdError: as `execute`
        """
        self.execute("qom-set", _CHANGE_SECONDS, path=backend.path, property="merge", value=on)


def _version(greeting: Mapping[str, object]) -> str:
    version = greeting.get("version")
    parts = version.get("qemu") if isinstance(version, dict) else None
    if not isinstance(parts, dict):
        return "QEMU of an unknown version"
    return "QEMU " + ".".join(printable(str(parts.get(key)), 20) for key in ("major", "minor", "micro"))
