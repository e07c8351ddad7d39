# SPDX-License-Identifier: GPL-2.0-or-later
"""A blocking Varlink client for the control socket.

It trusts the service no more than the service trusts it: an answer has a deadline and a size. No asyncio, which
would cost more than the whole rest of a command.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Mapping
from typing import get_args

from ksmd_ctl.cli.common import DEFAULT_SOCKET
from ksmd_ctl.errors import ConfigError, Denied, ExitCode, KsmdError, Problem, Unreachable, errno_text

__all__ = ["INTERFACE", "Conversation", "NoService", "call", "read_answer", "socket_path"]

INTERFACE = "io.ksmd-ctl"

TIMEOUT_SECONDS = 5.0

_MAX_ANSWER_BYTES = 4 * 1024 * 1024


class NoService(Unreachable):
    """Nobody listens on the control socket; commands that can do without the service then do."""


class Failed(KsmdError):
    """The service says that it failed; the exit code is the one that it would have had here."""

    def __init__(self, what: str, why: str, *, hint: str, exit_code: ExitCode) -> None:
        super().__init__(what, why, hint=hint)
        # The class says it for all other errors, and this one is any of them.
        self.exit_code = exit_code  # type: ignore[misc]


def socket_path(given: str | None) -> str:
    """The control socket: as given, else the environment's, else where the packaged service has it."""
    return given or os.environ.get("KSMD_CTL_SOCKET") or DEFAULT_SOCKET


def call(
    path: str,
    method: str,
    parameters: object = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> dict[str, object]:
    """Call a method of the service and wait for the answer.

    :param method: its name in the interface io.ksmd-ctl
    :param parameters: a dataclass of `ksmd_ctl.daemon.varlink_wire`, None for none
    :raises NoService: nobody listens
    :raises Unreachable: it doesn't answer in time, or what it says is no answer
    :raises Denied: this user may not
    :raises KsmdError: what the service says that failed
    """
    what = f"asking the service at {path}"
    deadline = time.monotonic() + timeout_seconds
    with _connect(path, what, deadline) as sock:
        try:
            message = _exchange(sock, _request(method, parameters), deadline)
        except TimeoutError as error:
            why = f"no answer within {timeout_seconds:g} s"
            raise Unreachable(what, why, hint="it may hang: systemctl status ksmd-ctl, or restart it") from error
        except (OSError, EOFError, ValueError) as error:
            raise Unreachable(what, str(error), hint="is that the socket of ksmd-ctl?") from error
    return read_answer(what, message)


class Conversation:
    """A call with several answers. Each may take as long as it wants to: there is somebody who can stop it.

    :raises NoService, Unreachable, Denied: as `call`
    """

    def __init__(self, path: str, method: str, parameters: object) -> None:
        self._what = f"asking the service at {path}"
        self._buffer = bytearray()
        self._over = False
        deadline = time.monotonic() + TIMEOUT_SECONDS
        self._socket = _connect(path, self._what, deadline)
        try:
            self._socket.sendall(_request(method, parameters, more=True))
        except OSError:
            # A service with too many clients says so and hangs up before it reads.
            pass
        self._socket.settimeout(None)

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def stop(self) -> None:
        """Say that there is nothing more to say: what runs is stopped, and the last answer tells what came of it."""
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def answer(self) -> dict[str, object] | None:
        """The next answer, None after the last one. After an interruption it can be asked for again.

        :raises Unreachable: it hung up, or what it says is no answer
        :raises KsmdError: what the service says that failed
        """
        if self._over:
            return None
        while (end := self._buffer.find(0)) < 0:
            try:
                part = self._socket.recv(64 * 1024)
            except OSError as error:
                raise Unreachable(self._what, str(error), hint="systemctl status ksmd-ctl") from error
            if not part:
                raise Unreachable(self._what, "it hung up before it was done", hint="systemctl status ksmd-ctl")
            self._buffer += part
            if len(self._buffer) > _MAX_ANSWER_BYTES:
                raise Unreachable(self._what, f"its answer is longer than {_MAX_ANSWER_BYTES} bytes")
        message = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        parameters = read_answer(self._what, message)
        self._over = json.loads(message).get("continues") is not True
        return parameters


def _request(method: str, parameters: object, *, more: bool = False) -> bytes:
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
        _until(sock, deadline)
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


def _until(sock: socket.socket, deadline: float) -> None:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    sock.settimeout(left)


def _exchange(sock: socket.socket, request: bytes, deadline: float) -> bytes:
    try:
        _until(sock, deadline)
        sock.sendall(request)
    except (BrokenPipeError, ConnectionResetError):
        # A service with too many clients says so and hangs up before it reads.
        pass
    answer = bytearray()
    while True:
        _until(sock, deadline)
        part = sock.recv(64 * 1024)
        if not part:
            raise EOFError("it hung up without an answer")
        end = part.find(0)
        answer += part if end < 0 else part[:end]
        if len(answer) > _MAX_ANSWER_BYTES:
            raise ValueError(f"its answer is longer than {_MAX_ANSWER_BYTES} bytes")
        if end >= 0:
            return bytes(answer)


def read_answer(what: str, message: bytes) -> dict[str, object]:
    """The parameters of an answer.

    :raises KsmdError: what the service says that failed, or it is no answer
    """
    try:
        answer = json.loads(message)
    except (ValueError, RecursionError) as error:
        raise Unreachable(what, "its answer is not JSON", hint="is that the socket of ksmd-ctl?") from error
    parameters = answer.get("parameters", {}) if isinstance(answer, dict) else None
    if not isinstance(parameters, dict) or not isinstance(answer.get("error", ""), str):
        raise Unreachable(what, "its answer is not of Varlink's form", hint="is that the socket of ksmd-ctl?")
    if "error" in answer:
        raise _error(what, answer["error"], parameters)
    return parameters


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
