# SPDX-License-Identifier: GPL-2.0-or-later
"""Fifty clients of the control socket and twenty scrapes a second: good ones, slow ones, silent and half-open ones."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from ksmd_ctl.daemon.varlink import INTERFACE

__all__ = ["CLIENTS", "SCRAPES_PER_SECOND", "Load"]

SCRAPES_PER_SECOND = 20
#: A hang, and no busy machine.
PATIENCE_SECONDS = 60.0


def _call(method: str, **more: object) -> bytes:
    return json.dumps({"method": f"{INTERFACE}.{method}", **more}).encode() + b"\0"


class Load:
    """The clients, for as long as `run` says.

    :ivar seen: how often what happened
    :ivar wrong: what should not have
    """

    def __init__(self, path: Path, port: int) -> None:
        self.path = path
        self.port = port
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._over = asyncio.Event()

    async def run(self, seconds: float) -> None:
        tasks = [asyncio.ensure_future(self._again(client)) for count, client in CLIENTS for _ in range(count)]
        tasks.append(asyncio.ensure_future(self._scrapes()))
        await asyncio.sleep(seconds)
        self._over.set()
        _, late = await asyncio.wait(tasks, timeout=PATIENCE_SECONDS)
        for task in late:
            self.wrong.append(f"{task} does not end")
            task.cancel()

    # -- the control socket --------------------------------------------------------------------------------

    async def _again(self, client: Callable[[Load, _Wire], Awaitable[None]]) -> None:
        """One client after the other of a kind, until it is over."""
        name = client.__name__.strip("_")
        while not self._over.is_set():
            wire = _Wire(*await asyncio.open_unix_connection(str(self.path), limit=2**20))
            talk = asyncio.ensure_future(client(self, wire))
            over = asyncio.ensure_future(self._over.wait())
            try:
                async with asyncio.timeout(None) as limit:
                    await asyncio.wait({talk, over}, return_when=asyncio.FIRST_COMPLETED)
                    # It has what is left of its patience.
                    limit.reschedule(asyncio.get_running_loop().time() + PATIENCE_SECONDS)
                    if talk.done():
                        talk.result()
                        self.seen[name] += 1
            except Exception as error:
                self.wrong.append(f"{name}: {type(error).__name__}: {error}")
            finally:
                for task in (talk, over):
                    task.cancel()
                await asyncio.gather(talk, over, return_exceptions=True)
                wire.close()
            await asyncio.sleep(0.02)

    async def poller(self, wire: _Wire) -> None:
        """Asks now and then, as a script does."""
        for _ in range(20):
            wire.send(_call("Status"))
            reply = await wire.reply()
            assert reply["parameters"]["report"]["format"] == 1
            wire.send(_call("Metrics"))
            assert "ksmd_ctl_ticks_total" in (await wire.reply())["parameters"]["text"]
            self.seen["answers"] += 2
            await asyncio.sleep(0.4)

    async def asker(self, wire: _Wire) -> None:
        """Asks for what takes its time."""
        for method in ("Nodes", "Processes"):
            wire.send(_call(method))
            assert "error" not in await wire.reply(), method
            self.seen["answers"] += 1
            await asyncio.sleep(2)

    async def subscriber(self, wire: _Wire) -> None:
        """Takes every report."""
        wire.send(_call("Status", more=True))
        last = 0
        for _ in range(30):
            report = (await wire.reply())["parameters"]["report"]
            ticks = report["daemon"]["ticks"]
            assert last in (0, ticks - 1, ticks), f"from tick {last} to {ticks}"
            last = ticks
            self.seen["reports"] += 1

    async def slow_reader(self, wire: _Wire) -> None:
        """Subscribes, and reads less than comes: it is dropped in the end."""
        wire.narrow()
        wire.send(_call("Status", more=True))
        while await wire.some(64):
            await asyncio.sleep(0.2)

    async def never_reads(self, wire: _Wire) -> None:
        """Asks, and takes no answer: what it asks stays in its own socket."""
        wire.narrow()
        try:
            for _ in range(50):
                wire.send(_call("Status") * 20)
                await asyncio.sleep(0.3)
                if wire.broken():
                    return
        except OSError:
            return

    async def silent(self, wire: _Wire) -> None:
        """Says nothing: it is dropped."""
        assert await wire.some(1) == b""

    async def half_a_message(self, wire: _Wire) -> None:
        """Begins, and says no more."""
        wire.send(_call("Status")[:20])
        assert await wire.some(1) == b""

    async def dripper(self, wire: _Wire) -> None:
        """A byte now and then: that is no message either."""
        end = asyncio.ensure_future(wire.some(1))
        while not end.done():
            wire.send(b" ")
            await asyncio.wait({end}, timeout=0.3)
        try:
            assert end.result() == b""
        except OSError:
            pass

    async def half_open(self, wire: _Wire) -> None:
        """Says all that it has to say first, and then listens."""
        wire.send(_call("Status") + _call("Metrics"))
        wire.writer.write_eof()
        await asyncio.sleep(0.5)
        assert "report" in (await wire.reply())["parameters"]
        assert "text" in (await wire.reply())["parameters"]
        assert await wire.some(1) == b""
        self.seen["answers"] += 2

    async def leaves(self, wire: _Wire) -> None:
        """Hangs up in the middle, of a message or of an answer."""
        number = self.seen["leaves"] % 3
        wire.send((_call("Status"), _call("Nodes"), _call("Status")[:9])[number])
        await asyncio.sleep(0.01 * number)

    # -- the metrics ---------------------------------------------------------------------------------------

    async def _scrapes(self) -> None:
        """One each twentieth of a second, by the clock."""
        loop = asyncio.get_running_loop()
        began, number = loop.time(), 0
        running: set[asyncio.Task[None]] = set()
        while not self._over.is_set():
            scrape = _SCRAPES.get(number % SCRAPES_PER_SECOND, Load.scrape)
            task = asyncio.ensure_future(self._scrape(scrape))
            running.add(task)
            task.add_done_callback(running.discard)
            number += 1
            await asyncio.sleep(max(0.0, began + number / SCRAPES_PER_SECOND - loop.time()))
        self.seen["scrapes begun"] = number
        await asyncio.gather(*running)

    async def _scrape(self, kind: Callable[[Load, _Wire], Awaitable[None]]) -> None:
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                wire = _Wire(*await asyncio.open_connection("127.0.0.1", self.port, limit=2**20))
                try:
                    await kind(self, wire)
                finally:
                    wire.close()
        except Exception as error:
            self.wrong.append(f"{kind.__name__}: {type(error).__name__}: {error}")

    async def scrape(self, wire: _Wire) -> None:
        await self._get(wire, "/metrics")

    async def browse(self, wire: _Wire) -> None:
        await self._get(wire, "/")

    async def _get(self, wire: _Wire, path: str) -> None:
        wire.send(b"GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % path.encode())
        head = await wire.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head[:100]
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        assert len(await wire.reader.readexactly(length)) == length
        self.seen["scrapes"] += 1

    async def slow_scrape(self, wire: _Wire) -> None:
        """Reads a little at a time."""
        wire.send(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        while await wire.some(400):
            await asyncio.sleep(0.05)
        self.seen["slow scrapes"] += 1

    async def half_a_request(self, wire: _Wire) -> None:
        """Begins, and says no more: it is dropped."""
        wire.send(b"GET /metrics HTTP/1.1\r\nHost:")
        assert await wire.some(1) == b""
        self.seen["half requests"] += 1

    async def gone(self, wire: _Wire) -> None:
        """Hangs up as soon as it has asked."""
        wire.send(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")


class _Wire:
    # One connection.

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def narrow(self) -> None:
        """Take in next to nothing that isn't read."""
        self.writer.transport.set_write_buffer_limits(0)
        self.reader._limit = 1024  # type: ignore[attr-defined]

    def broken(self) -> bool:
        return self.reader.at_eof() or self.writer.is_closing()

    async def reply(self) -> Any:
        return json.loads((await asyncio.wait_for(self.reader.readuntil(b"\0"), PATIENCE_SECONDS))[:-1])

    async def some(self, most: int) -> bytes:
        """What comes; nothing once the other side has hung up."""
        try:
            return await asyncio.wait_for(self.reader.read(most), PATIENCE_SECONDS)
        except ConnectionError:
            return b""

    def close(self) -> None:
        self.writer.transport.abort()


#: So many of each kind at any time.
CLIENTS = (
    (14, Load.poller),
    (2, Load.asker),
    (10, Load.subscriber),
    (5, Load.slow_reader),
    (4, Load.never_reads),
    (4, Load.silent),
    (3, Load.half_a_message),
    (2, Load.dripper),
    (4, Load.half_open),
    (2, Load.leaves),
)
assert sum(count for count, _ in CLIENTS) == 50

# Of twenty scrapes these are of another kind.
_SCRAPES = {3: Load.slow_scrape, 7: Load.half_a_request, 11: Load.gone, 15: Load.browse, 17: Load.slow_scrape}
