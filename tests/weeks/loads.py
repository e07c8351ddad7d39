# SPDX-License-Identifier: GPL-2.0-or-later
"""Loads for simulated weeks: each a coroutine that goes on for ever, until its task is cancelled.

Sizes are around the least that the policy takes notice of (512 pages).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from random import Random
from typing import Final

from ksmd_ctl.host.knobs import Knob
from tests.weeks.promises import Promises
from tests.weeks.world import World

__all__ = ["ADVERSARIES", "LOADS", "Load", "bursty", "periodic", "residents"]

Load = Callable[[World, Promises, Random], Awaitable[None]]
HOUR, DAY = 3600.0, 86400.0


def mixed(own: str, pages: int, system: str = "debian") -> list[str]:
    """Contents of a process that has three of four pages in common with all of its system."""
    return [f"{system} {index}" if index % 4 else f"{own} {index}" for index in range(pages)]


def residents(world: World, count: int = 3, pages: int = 600) -> None:
    """Those who are there all the time."""
    for number in range(count):
        world.start(f"resident {number}", mixed(f"r{number}", pages), number % 2)


# -- periodic and bursty ---------------------------------------------------------------------------------------


async def periodic(world: World, promises: Promises, random: Random) -> None:
    """Machines by day, a job each hour, a large one each night."""

    async def jobs() -> None:
        for number in range(1 << 30):
            await asyncio.sleep(HOUR * 5 / 6)
            world.start("job", mixed(f"job{number}", 1000))
            await asyncio.sleep(HOUR / 6)
            world.end("job")

    async def nights() -> None:
        for number in range(1 << 30):
            await asyncio.sleep(DAY / 2)
            world.start("night", mixed(f"night{number}", 2000), 1)
            await asyncio.sleep(DAY / 12)
            world.end("night")
            await asyncio.sleep(5 * DAY / 12)

    async def days() -> None:
        while True:
            for number in range(3):
                world.start(f"day {number}", mixed(f"d{number} {world.now:.0f}", 800), number % 2)
                await asyncio.sleep(600)
            await asyncio.sleep(DAY / 2 - 1800)
            for number in range(3):
                world.end(f"day {number}")
            await asyncio.sleep(DAY / 2)

    residents(world)
    await asyncio.gather(jobs(), nights(), days())


async def bursty(world: World, promises: Promises, random: Random) -> None:
    """Processes come and leave by chance, several at once at times, and rewrite what they have."""
    residents(world, 2)
    number, guests = 0, []
    while True:
        await asyncio.sleep(random.expovariate(1 / 1200))
        for _ in range(random.choice((1, 1, 1, 4))):
            what = random.random()
            if guests and (what < 0.35 or len(guests) > 5):
                world.end(guests.pop(random.randrange(len(guests))))
            elif guests and what < 0.6:
                tenant = world.tenants[random.choice(guests)]
                number += 1
                for index in range(random.randrange(len(tenant.labels))):
                    world.rewrite(tenant.name, index, random.choice((f"debian {index}", f"again {number} {index}")))
            else:
                number += 1
                labels = mixed(f"g{number}", random.randrange(50, 1500), random.choice(("debian", "fedora")))
                world.start(f"guest {number}", labels, random.choice((0, 1, None)))
                guests.append(f"guest {number}")


# -- adversarial: they watch what the policy does ----------------------------------------------------------------


async def phase_is(world: World, *phases: str, seconds: float = 600.0) -> bool:
    """Wait until the policy comes to one of these, though not for ever; whether it has."""
    until = world.now + seconds
    while world.phase not in phases and world.now < until:
        await world.tick()
    return world.phase in phases


async def spoils(world: World, promises: Promises, random: Random) -> None:
    """Writes to merged pages as soon as they have merged, so that they are equal to others or not, by turns."""
    residents(world)
    world.start("spoiler", mixed("s", 3000))
    world.start("victim", mixed("v", 3000))
    for number in range(1 << 30):
        await phase_is(world, "quick", "gentle")
        await phase_is(world, "background")
        for index in range(1, 3000, 2):
            world.rewrite("spoiler", index, f"debian {index}" if number % 2 else f"spoilt {number} {index}")


async def comes_as_it_goes_slow(world: World, promises: Promises, random: Random) -> None:
    """Memory appears just as ksmd has gone slow, and goes just as it has become quick."""
    residents(world)
    for number in range(1 << 30):
        await phase_is(world, "background")
        pages = random.choice((600, 700, 2500))
        world.start("comer", [f"own {number} {index}" for index in range(pages)], mergeable=random.random() < 0.7)
        if await phase_is(world, "quick", "gentle"):
            world.end("comer")
            await world.tick()
        else:
            world.end("comer")


async def pays_for_a_moment(world: World, promises: Promises, random: Random) -> None:
    """What comes merges at once, is gone as soon as it has merged, and comes again: each burst was worth it."""
    residents(world)
    for number in range(1 << 30):
        labels = [f"again {number} {index}" for index in range(1000)]
        world.start("one", labels)
        world.start("other", labels)
        if await phase_is(world, "quick", "gentle"):
            await phase_is(world, "background")
        world.end("one")
        world.end("other")
        await asyncio.sleep(random.choice((0.5, 20, 200)))


async def flips(world: World, promises: Promises, random: Random) -> None:
    """Contents are unique while ksmd is quick and equal while it is slow; new memory wakes it."""
    residents(world)
    world.start("flipper", mixed("f", 2000))
    for number in range(1 << 30):
        await phase_is(world, "background")
        for index in range(0, 2000, 2):
            world.rewrite("flipper", index, f"debian {index + 1}")
        if not await phase_is(world, "quick", "gentle"):
            world.start("bait", mixed(f"bait {number}", 1500))
            await phase_is(world, "quick", "gentle")
        for index in range(0, 2000, 2):
            world.rewrite("flipper", index, f"unique {number} {index}")
        if "bait" in world.tenants:
            world.end("bait")
        await world.tick()


async def presses(world: World, promises: Promises, random: Random) -> None:
    """Tasks wait for a CPU or for memory, by turns and just when ksmd is quick; work comes all the time."""
    residents(world)

    async def pressure() -> None:
        while True:
            if random.random() < 0.5:
                await phase_is(world, "quick")
            kind = random.random()
            world.host.wait(0.95 if kind < 0.7 else 0.0, 0.5 if kind > 0.4 else 0.0)
            if random.random() < 0.5:
                await phase_is(world, "gentle", "background")
            await asyncio.sleep(random.choice((0.0, 30.0, 300.0)))
            world.host.wait(0.0, 0.0)
            await asyncio.sleep(random.choice((0.0, 10.0, 100.0)))

    async def work() -> None:
        for number in range(1 << 30):
            world.start("work", mixed(f"w{number}", random.randrange(600, 4000)))
            await asyncio.sleep(random.choice((20, 60, 600)))
            world.end("work")
            await asyncio.sleep(random.choice((1, 30, 300)))

    await asyncio.gather(pressure(), work())


async def locks_out(world: World, promises: Promises, random: Random) -> None:
    """Pages with a twin that comes 13, 15 or 16 full scans later: smart_scan never looks at both (finding F2)."""
    residents(world)
    for number in range(1 << 30):
        labels = [f"pair {number} {index}" for index in range(random.choice((100, 300, 1000)))]
        world.start("first", labels)
        ksm = world.machine.ksm
        until = ksm.scan.seqnr + random.choice((13, 15, 16))
        while ksm.scan.seqnr < until:
            await world.tick()
        world.start("second", labels)
        await asyncio.sleep(random.choice((HOUR, 3 * HOUR)))
        world.end("first")
        world.end("second")


_STRANGERS: Final[tuple[tuple[tuple[Knob, int | str], ...], ...]] = (
    ((Knob.ADVISOR_MODE, "scan-time"),),
    ((Knob.RUN, 0),),
    ((Knob.PAGES_TO_SCAN, 30000), (Knob.SLEEP_MILLISECS, 0)),
    ((Knob.SMART_SCAN, 0),),
    ((Knob.RUN, 2), (Knob.RUN, 1)),
)


async def meddles(world: World, promises: Promises, random: Random) -> None:
    """Somebody else switches the advisor on, stops ksmd, un-merges everything, and now and then fights about it."""
    residents(world)
    while True:
        await asyncio.sleep(random.choice((200, 600, HOUR)))
        writes = random.choice(_STRANGERS)
        # Ten times in ten minutes would be the end of it: the service leaves such a knob alone until a reload.
        for _ in range(random.choice((1, 1, 1, 1, 3))):
            for knob, value in writes:
                if knob is Knob.PAGES_TO_SCAN and world.host.read(Knob.ADVISOR_MODE) != "none":
                    continue
                world.store(knob, value)
            promises.somebody_else()
            await world.tick()


async def all_of_them(world: World, promises: Promises, random: Random) -> None:
    """One adversary after the other, each for some hours."""
    while True:
        for load in random.sample(list(ADVERSARIES.values()), len(ADVERSARIES)):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(load(world, promises, random), 2 * HOUR)
            calm(world)


def calm(world: World) -> None:
    """Whoever was there goes, and nobody waits any more."""
    for name in list(world.tenants):
        world.end(name)
    world.host.wait(0.0, 0.0)


ADVERSARIES: Final[dict[str, Load]] = {
    "spoils": spoils,
    "comes as it goes slow": comes_as_it_goes_slow,
    "pays for a moment": pays_for_a_moment,
    "flips": flips,
    "presses": presses,
    "locks out": locks_out,
    "meddles": meddles,
}
LOADS: Final[dict[str, Load]] = {"periodic": periodic, "bursty": bursty, "adversarial": all_of_them, **ADVERSARIES}
