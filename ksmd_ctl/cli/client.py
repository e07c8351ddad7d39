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

from ksmd_ctl.cli.common import DEFAULT_SOCKET
from ksmd_ctl.errors import ConfigError, Denied, ExitCode, KsmdError, Problem, Unreachable, errno_text

__all__ = ["INTERFACE", "NoService", "call", "socket_path"]

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
    parameters: Mapping[str, object] | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> dict[str, object]:
    """Call a method of the service and wait for the answer.

    :param method: its name in the interface io.ksmd-ctl
    :raises NoService: nobody listens
    :raises Unreachable: it doesn't answer in time, or what it says is no answer
    :raises Denied: this user may not
    :raises KsmdError: what the service says that failed
    """
    what = f"asking the service at {path}"
    deadline = time.monotonic() + timeout_seconds
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            _until(sock, deadline)
            sock.connect(path)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise NoService(what, "it isn't running", hint="systemctl start ksmd-ctl") from error
        except PermissionError as error:
            hint = "run as root, or as a member of the group of the socket"
            raise Denied(what, errno_text(errno.EACCES), hint=hint, path=path, errno=errno.EACCES) from error
        except OSError as error:
            raise Unreachable(what, str(error), hint="systemctl status ksmd-ctl") from error
        request = {"method": f"{INTERFACE}.{method}", "parameters": parameters or {}}
        try:
            message = _exchange(sock, json.dumps(request).encode() + b"\0", deadline)
        except TimeoutError as error:
            why = f"no answer within {timeout_seconds:g} s"
            raise Unreachable(what, why, hint="it may hang: systemctl status ksmd-ctl, or restart it") from error
        except (OSError, EOFError, ValueError) as error:
            raise Unreachable(what, str(error), hint="is that the socket of ksmd-ctl?") from error
    return _result(what, message)


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


def _result(what: str, message: bytes) -> dict[str, object]:
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
    def said(key: str) -> str:
        return str(parameters.get(key, ""))

    match name.removeprefix(f"{INTERFACE}."):
        case "Failed":
            try:
                exit_code = ExitCode(int(said("exit_code")))
            except ValueError:
                exit_code = ExitCode.CHECK_FAILED
            return Failed(said("what"), said("why"), hint=said("hint"), exit_code=exit_code)
        case "PermissionDenied":
            return Denied(what, f"only {said('needs')} may do this", hint="run it with sudo")
        case "ReloadFailed":
            listed = parameters.get("problems")
            problems = [
                Problem(*(str(item.get(key, "")) for key in ("path", "key", "text")))
                for item in (listed if isinstance(listed, list) else [])
                if isinstance(item, dict)
            ]
            return ConfigError("the new configuration", problems, hint="the old one stays in force")
        case "TooManyClients":
            return Unreachable(what, f"it has {said('limit')} clients already", hint="try again in a few seconds")
    version = "the service may be of another version than this command"
    return Unreachable(what, f"it answers {name}", hint=version)
