# SPDX-License-Identifier: GPL-2.0-or-later
"""A blocking Varlink client for the control socket.

It trusts the service no more than the service trusts it: an answer has a deadline and a size. No asyncio, which
would cost more than the whole rest of a command.
"""

from __future__ import annotations

import errno
import json
import math
import os
import select
import socket
import time
from collections.abc import Mapping
from typing import get_args

from ksmd_ctl.cli.common import DEFAULT_SOCKET
from ksmd_ctl.errors import ConfigError, Denied, ExitCode, KsmdError, Problem, Unreachable, errno_text

INTERFACE = "io.ksmd-ctl"

#: The service accepts a connection within this time.
_CONNECT_SECONDS = 5.0
_MAX_ANSWER_BYTES = 4 * 1024 * 1024
_OTHER_SOCKET = "is that the socket of ksmd-ctl?"


class NoService(Unreachable):
    """Nobody listens on the control socket; commands that can do without the service then do."""


class HungUp(Unreachable):
    """The service has closed the connection, as when it ends."""


class Failed(KsmdError):
    """The service says that it failed; the exit code is the one that it would have had here."""

    def __init__(self, what: str, why: str, *, hint: str, exit_code: ExitCode) -> None:
        super().__init__(what, why, hint=hint)
        # The class says it for all other errors, and this one is any of them.
        self.exit_code = exit_code  # type: ignore[misc]


def socket_path(given: str | None) -> str:
    """The control socket: as given, else the environment's, else where the packaged service has it."""
    return given or os.environ.get("KSMD_CTL_SOCKET") or DEFAULT_SOCKET


def wait(seconds: float, *descriptors: int) -> set[int]:
    """Wait until one of several descriptors can be read (those below 0 are none): those that can."""
    poller = select.poll()
    for descriptor in descriptors:
        if descriptor >= 0:
            poller.register(descriptor, select.POLLIN)
    return {descriptor for descriptor, _ in poller.poll(math.ceil(seconds * 1000))}


class Conversation:
    """A call of a method, and its answers.

    :param method: its name in the interface io.ksmd-ctl
    :param parameters: a dataclass of `ksmd_ctl.daemon.varlink_wire`, None for none
    :param more: there may be several answers
    :param timeout_seconds: for all of it; None for answers that may take as long as they want to, because there is
        somebody who can stop it
    :raises NoService: nobody listens
    :raises Unreachable: it doesn't accept the connection in time
    :raises Denied: this user may not
    """

    def __init__(
        self,
        path: str,
        method: str,
        parameters: object = None,
        *,
        more: bool = True,
        timeout_seconds: float | None = None,
    ) -> None:
        self._what = f"asking the service at {path}"
        self._seconds = timeout_seconds
        self._deadline = time.monotonic() + (timeout_seconds or _CONNECT_SECONDS)
        self._buffer = bytearray()
        self._continues = True
        self._socket = _connect(path, self._what, self._deadline)
        try:
            self._socket.sendall(_request(method, parameters, more=more))
        except OSError:
            # A service with too many clients says so and hangs up before it reads.
            pass

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def stop(self) -> None:
        """Say that there is nothing more to say: what runs is stopped, and the last answer tells what came of it."""
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def fileno(self) -> int:
        """A descriptor that is readable when `arrived` can go on."""
        return self._socket.fileno()

    def arrived(self) -> dict[str, object] | None:
        """The next answer if it has arrived, None if not; it never waits.

        :raises Unreachable: there are no more answers, or what the service says is none
        :raises KsmdError: what the service says that failed
        """
        if not self._continues:
            raise Unreachable(self._what, "it has ended the answers", hint=_OTHER_SOCKET)
        if self._buffer.find(0) < 0:
            self._receive(wait=False)
        return self.answer() if self._buffer.find(0) >= 0 else None

    def answer(self) -> dict[str, object] | None:
        """The next answer, None after the last one. After an interruption it can be asked for again.

        :raises Unreachable: none came in time, it hung up, or what it says is no answer
        :raises KsmdError: what the service says that failed
        """
        if not self._continues:
            return None
        while (end := self._buffer.find(0)) < 0:
            self._receive(wait=True)
        message = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        answer = _message(self._what, message)
        self._continues = answer.get("continues") is True
        parameters = answer["parameters"]
        assert isinstance(parameters, dict)
        if "error" in answer:
            raise _error(self._what, str(answer["error"]), parameters)
        return parameters

    def _receive(self, *, wait: bool) -> None:
        try:
            if wait:
                _limit(self._socket, None if self._seconds is None else self._deadline)
            else:
                self._socket.settimeout(0)
            part = self._socket.recv(64 * 1024)
        except BlockingIOError:
            return
        except TimeoutError as error:
            why = f"no answer within {self._seconds:g} s"
            raise Unreachable(self._what, why, hint="it may hang: systemctl status ksmd-ctl, or restart it") from error
        except OSError as error:
            raise HungUp(self._what, str(error), hint="systemctl status ksmd-ctl") from error
        if not part:
            hint = "systemctl status ksmd-ctl; is that its socket?"
            raise HungUp(self._what, "it hung up without an answer", hint=hint)
        self._buffer += part
        if len(self._buffer) > _MAX_ANSWER_BYTES:
            raise Unreachable(self._what, f"its answer is longer than {_MAX_ANSWER_BYTES} bytes")


def _request(method: str, parameters: object, *, more: bool) -> bytes:
    request: dict[str, object] = {"method": f"{INTERFACE}.{method}", "parameters": {}}
    if parameters is not None:
        # Only here: `status` has none, and is quicker without the codec.
        from ksmd_ctl.codec import encode

        given = encode(parameters)
        assert isinstance(given, dict)
        request["parameters"] = {name: value for name, value in given.items() if value is not None}
    if more:
        request["more"] = True
    return json.dumps(request).encode() + b"\0"


def _connect(path: str, what: str, deadline: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _limit(sock, deadline)
        sock.connect(path)
    except OSError as error:
        sock.close()
        if isinstance(error, FileNotFoundError | ConnectionRefusedError):
            raise NoService(what, "it isn't running", hint="systemctl start ksmd-ctl") from error
        if isinstance(error, PermissionError):
            hint = "run as root, or as a member of the group of the socket"
            raise Denied(what, errno_text(errno.EACCES), hint=hint, path=path, errno=errno.EACCES) from error
        raise Unreachable(what, str(error), hint="systemctl status ksmd-ctl") from error
    return sock


def _limit(sock: socket.socket, deadline: float | None) -> None:
    left = None if deadline is None else deadline - time.monotonic()
    if left is not None and left <= 0:
        raise TimeoutError
    sock.settimeout(left)


def _message(what: str, message: bytes) -> dict[str, object]:
    try:
        answer = json.loads(message)
    except (ValueError, RecursionError) as error:
        raise Unreachable(what, "its answer is not JSON", hint=_OTHER_SOCKET) from error
    if (
        isinstance(answer, dict)
        and isinstance(answer.get("error", ""), str)
        and isinstance(answer.setdefault("parameters", {}), dict)
    ):
        return answer
    raise Unreachable(what, "its answer is not of Varlink's form", hint=_OTHER_SOCKET)


def _error(what: str, name: str, parameters: Mapping[str, object]) -> KsmdError:
    # Only here: an answer that is none of these needs no codec.
    from ksmd_ctl.codec import DecodeError, decode
    from ksmd_ctl.daemon import varlink_wire as wire

    kinds = {kind.__name__: kind for kind in get_args(wire.OwnError)}
    try:
        found = decode(kinds[name.removeprefix(f"{INTERFACE}.")], parameters)
    except (KeyError, DecodeError):
        return Unreachable(what, f"it answers {name}", hint="the service may be of another version than this command")
    match found:
        case wire.Failed(failed, why, hint, exit_code):
            known = exit_code in set(ExitCode)
            return Failed(failed, why, hint=hint, exit_code=ExitCode(exit_code) if known else ExitCode.CHECK_FAILED)
        case wire.PermissionDenied(needs):
            return Denied(what, f"only {needs} may do this", hint="run it with sudo")
        case wire.ReloadFailed(problems):
            listed = [Problem(problem.path, problem.key, problem.text) for problem in problems]
            return ConfigError("the new configuration", listed, hint="the old one stays in force")
        case wire.TooManyClients(limit):
            return Unreachable(what, f"it has {limit} clients already", hint="try again in a few seconds")
    raise AssertionError(found)
