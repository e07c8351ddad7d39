# SPDX-License-Identifier: GPL-2.0-or-later
"""Services to ask: one that answers, and several that don't as they should. Each runs in a thread of its own."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

#: Far more than anything here takes: reaching it means that something hangs.
PATIENCE_SECONDS = 30

#: Takes a request and says what to send; what is sent is all, then the connection is closed.
Answer = Callable[[dict[str, object]], bytes]


def reply(error: str = "", **parameters: object) -> bytes:
    """A Varlink reply."""
    message: dict[str, object] = {"parameters": parameters}
    if error:
        message["error"] = error
    return json.dumps(message).encode() + b"\0"


def conversation(*answers: dict[str, object]) -> bytes:
    """What a service says that tells how far it is."""
    parts = [json.dumps({"parameters": answer, "continues": True}).encode() + b"\0" for answer in answers[:-1]]
    return b"".join(parts) + json.dumps({"parameters": answers[-1]}).encode() + b"\0"


@contextmanager
def listening(path: Path, answer: Answer | None) -> Iterator[list[dict[str, object]]]:
    """A service that answers each connection; with None it takes connections and says nothing.

    Gives the list of the requests that have come.
    """
    requests: list[dict[str, object]] = []
    stop = threading.Event()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def work() -> None:
            while True:
                connection, _ = server.accept()
                with connection:
                    if stop.is_set():
                        return
                    connection.settimeout(PATIENCE_SECONDS)
                    received = b""
                    while not received.endswith(b"\0"):
                        received += connection.recv(65536)
                    requests.append(json.loads(received[:-1]))
                    if answer is None:
                        # Until the other side has had enough of it.
                        connection.recv(1)
                        continue
                    try:
                        connection.sendall(answer(requests[-1]))
                    except BrokenPipeError:
                        pass

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield requests
        finally:
            stop.set()
            with socket.socket(socket.AF_UNIX) as last:
                last.connect(str(path))
            thread.join(PATIENCE_SECONDS)
            path.unlink()
