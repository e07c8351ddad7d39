# SPDX-License-Identifier: GPL-2.0-or-later
"""Has the service do something that takes a while, if there is one that works on the host that is meant."""

from __future__ import annotations

import argparse
import json
import socket
import time
from collections.abc import Callable, Mapping

from ksmd_ctl.cli import source
from ksmd_ctl.cli.client import INTERFACE, NoService, read_answer, socket_path
from ksmd_ctl.errors import Unreachable

__all__ = ["asked"]

# The service says something at each step; one that has been silent for so long is not there any more.
_SILENCE_SECONDS = 900.0
_MAX_MESSAGE_BYTES = 4 * 1024 * 1024


def asked(
    args: argparse.Namespace,
    method: str,
    parameters: Mapping[str, object],
    tell: Callable[[Mapping[str, object]], None] = lambda _: None,
) -> Mapping[str, object] | None:
    """The service's last answer; None where no service runs, or it works on another host.

    :param tell: told what it says on the way
    :raises KsmdError: what the service says that failed, or it doesn't answer
    """
    if args.config is not None:
        # Somebody names a configuration: the service has its own.
        from ksmd_ctl.config.loader import load

        path = args.socket or load(args.config).socket
    else:
        path = socket_path(args.socket)
    args.socket = path
    found = source.from_service(args)
    if not found.report:
        return None
    what = f"asking the service at {path}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.settimeout(_SILENCE_SECONDS)
            sock.connect(path)
            request = {"method": f"{INTERFACE}.{method}", "parameters": parameters, "more": True}
            sock.sendall(json.dumps(request).encode() + b"\0")
            return _last(sock, what, tell)
        except FileNotFoundError as error:
            raise NoService(what, "it has just ended", hint="try again") from error
        except (OSError, EOFError, ValueError) as error:
            why = str(error) or type(error).__name__
            raise Unreachable(what, why, hint="`ksmd-ctl status` shows whether it still goes on") from error
        except KeyboardInterrupt:
            # Hanging up on what was asked for abandons it; its last word says what became of it.
            sock.shutdown(socket.SHUT_WR)
            return _last(sock, what, tell)


def _last(sock: socket.socket, what: str, tell: Callable[[Mapping[str, object]], None]) -> Mapping[str, object]:
    buffer = bytearray()
    deadline = time.monotonic() + 86400
    while time.monotonic() < deadline:
        end = buffer.find(0)
        if end < 0:
            if len(buffer) > _MAX_MESSAGE_BYTES:
                raise ValueError(f"its answer is longer than {_MAX_MESSAGE_BYTES} bytes")
            part = sock.recv(64 * 1024)
            if not part:
                raise EOFError("it hung up without an answer")
            buffer += part
            continue
        message = bytes(buffer[:end])
        del buffer[: end + 1]
        parameters = read_answer(what, message)
        if json.loads(message).get("continues") is not True:
            return parameters
        tell(parameters)
    raise TimeoutError
