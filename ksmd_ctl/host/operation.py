# SPDX-License-Identifier: GPL-2.0-or-later
"""`Operation`: what takes time on a host; and the requests to move and to un-merge memory."""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Final, Generic, Never, TypeVar

from ksmd_ctl.codec import between
from ksmd_ctl.errors import KsmdError, TimedOut
from ksmd_ctl.host.memory import ProcessId

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

#: An operation is polled at least so often: its descriptor is not readable when its deadline passes.
LOOK_SECONDS: Final = 5.0
_LOOK_AGAIN_SECONDS: Final = 0.05


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an operation is; `total` is 0 if it is not known."""

    done: int = 0
    total: int = 0
    unit: str = ""


#: The work of an operation. It yields another operation to wait for, or `Progress` when it can't go on now, and returns
#: the result.
Steps = Generator["Operation[Any] | Progress", None, T]


class Operation(Generic[T_co]):
    """Something that takes time on a host. The caller polls it until it is over, and does other work meanwhile.

    :param steps: the work; see also `done` and `failed`
    :param descriptor: is readable when the steps can go on; -1: they can at any time
    :ivar cancelled: whether it has been asked to stop
    """

    def __init__(self, steps: Steps[T_co], descriptor: int = -1) -> None:
        self.cancelled = False
        self._steps = steps
        self._descriptor = descriptor
        self._inner: Operation[Any] | None = None
        self._progress = Progress()
        self._outcome: list[T_co | KsmdError] = []

    @staticmethod
    def done(value: T) -> Operation[T]:
        """An operation that is over, with a result."""
        return _over(value)

    @staticmethod
    def failed(error: KsmdError) -> Operation[Never]:
        """An operation that is over, with an error."""
        return _over(error)

    def fileno(self) -> int:
        """A descriptor that is readable when `poll` can go on; -1 if there is none (poll at any time)."""
        if self._outcome:
            return -1
        return self._descriptor if self._inner is None else self._inner.fileno()

    def poll(self) -> bool:
        """Do what can be done without waiting; True once it is over."""
        while not self._outcome:
            if self._inner is not None and not self._inner.poll():
                break
            self._inner = None
            try:
                step = next(self._steps)
            except StopIteration as stop:
                self._outcome.append(stop.value)
            except KsmdError as error:
                self._outcome.append(error)
            else:
                if isinstance(step, Progress):
                    self._progress = step
                    break
                self._inner = step
                if self.cancelled:
                    step.cancel()
        return bool(self._outcome)

    @property
    def progress(self) -> Progress:
        return self._progress if self._inner is None else self._inner.progress

    @property
    def pause_seconds(self) -> float:
        """How long `poll` can't go on, if there is no descriptor."""
        return 0.0 if self._inner is None else self._inner.pause_seconds

    def cancel(self) -> None:
        """Ask it to stop at the next safe point. It then fails with `Cancelled`, or is done if it ended before."""
        self.cancelled = True
        if self._inner is not None:
            self._inner.cancel()

    def result(self) -> T_co:
        """The result of an operation that is over.

        :raises KsmdError: it failed, was cancelled, or its deadline passed
        """
        found = outcome(self)
        if isinstance(found, KsmdError):
            raise found.with_traceback(None)
        return found


def _over(outcome: object) -> Operation[Any]:
    def steps() -> Steps[Any]:
        yield from ()

    operation = Operation(steps())
    operation._outcome.append(outcome)
    return operation


def outcome(operation: Operation[T]) -> T | KsmdError:
    """The result of an operation that is over, or its error."""
    if not operation._outcome:
        raise RuntimeError("the operation is not over: poll() has not said so")
    return operation._outcome[0]


class Timer(Operation[None]):
    """Over after so many seconds of a clock, or when it is cancelled."""

    def __init__(self, clock: Callable[[], float], seconds: float) -> None:
        self._clock = clock
        self._until = clock() + seconds
        super().__init__(self._wait())

    def _wait(self) -> Steps[None]:
        while not self.cancelled and self._clock() < self._until:
            yield Progress()

    @property
    def pause_seconds(self) -> float:
        # The clock may be a simulated one that is quicker.
        return max(0.0, min(_LOOK_AGAIN_SECONDS, self._until - self._clock()))


def waited(operation: Operation[T]) -> Steps[T]:
    """Steps that wait for another operation and return its result."""
    yield operation
    return operation.result()


def in_thread(work: Callable[[], T], timeout_seconds: float = 3600.0) -> Operation[T]:
    """Do work that may wait in a thread. After the timeout the operation fails, and the thread goes on."""
    # Imported here, because few programs need them.
    import socket
    import threading

    ours, theirs = socket.socketpair()
    found: list[T | Exception] = []

    def run() -> None:
        with theirs:
            try:
                found.append(work())
            except Exception as error:
                found.append(error)

    def steps() -> Steps[T]:
        until = time.monotonic() + timeout_seconds
        with ours:
            while not found and not operation.cancelled and time.monotonic() < until:
                yield Progress()
        came = found[0] if found else TimedOut("waiting for a thread", f"it was not done within {timeout_seconds:g} s")
        if isinstance(came, Exception):
            raise came
        return came

    operation = Operation(steps(), ours.fileno())
    threading.Thread(target=run, daemon=True).start()
    return operation


def readable(descriptor: int, seconds: float) -> bool:
    """Wait until a descriptor is readable; whether it is. With poll(2): select(2) takes none above 1023."""
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(seconds * 1000))


def finish(
    operation: Operation[T],
    timeout_seconds: float | None = None,
    tell: Callable[[Progress], None] = lambda _: None,
) -> T:
    """Wait until an operation is over: its result.

    :param tell: called with the progress after each poll
    :raises KsmdError: as `Operation.result`; `TimedOut` if nothing came for `timeout_seconds`
    """
    silent_seconds = 0.0
    while not operation.poll():
        tell(operation.progress)
        descriptor = operation.fileno()
        if descriptor < 0:
            if operation.pause_seconds:
                time.sleep(operation.pause_seconds)
            continue
        seconds = LOOK_SECONDS if timeout_seconds is None else min(LOOK_SECONDS, timeout_seconds - silent_seconds)
        silent_seconds = 0.0 if readable(descriptor, seconds) else silent_seconds + seconds
        if timeout_seconds is not None and silent_seconds >= timeout_seconds:
            operation.cancel()
            raise TimedOut("waiting for the host", f"no progress for {timeout_seconds:g} s")
    return operation.result()


def _address_range(found: tuple[int, int]) -> None:
    # The largest user address space: five levels of page tables on x86.
    if not 0 <= found[0] < found[1] <= 1 << 56:
        raise ValueError("does not begin at 0 or above, or ends before its start or above 2^56")


# What is asked for crosses to the privileged part, which takes these and nothing else, whoever asks.
AddressRange = Annotated[tuple[int, int], _address_range]
NodeNumber = Annotated[int, between(0, (1 << 10) - 1)]  # the largest MAX_NUMNODES
Nodes = tuple[NodeNumber, ...]
Pages = Annotated[int, between(0, 1 << 44)]
FloorBytes = Annotated[int, between(0, 1 << 50)]
LatencySeconds = Annotated[float, between(0.0001, 10)]
MoveLatencySeconds = Annotated[float, between(0, 10)]
HeadroomShare = Annotated[float, between(0.001, 1)]
MaxPressure = Annotated[float, between(0, 1)]


@dataclass(frozen=True, slots=True)
class Move:
    """Mergeable memory of one process to be moved to a node.

    :ivar ranges: (start, end) addresses; empty for all of the process's mergeable memory
    :ivar everything: also memory that is not mergeable
    :ivar keep: nodes whose pages stay there
    :ivar latency_seconds: how long one call may keep the process from its memory; 0 for as long as it takes
    """

    process: ProcessId
    to: NodeNumber
    ranges: tuple[AddressRange, ...] = ()
    everything: bool = False
    latency_seconds: MoveLatencySeconds = 0.01
    floor_bytes: FloorBytes = 0
    keep: Nodes = ()

    @property
    def homes(self) -> frozenset[int]:
        """The nodes whose pages are where they may be: the target, and those that keep theirs."""
        return frozenset((self.to, *self.keep))


@dataclass(frozen=True, slots=True)
class MovePlan:
    """What a move would have to do, counted in frames.

    :ivar nodes: frames that would be moved, by the node that they are on
    :ivar shared: of these, frames that are mapped more than once, as merged pages are
    :ivar already: frames that are there, or on a node that keeps its pages
    :ivar left: frames that would stay, by the cause in words
    :ivar room: where there is the least room for them, as a phrase
    """

    nodes: Mapping[int, int]
    shared: int
    already: int
    left: Mapping[str, int]
    room: str
    room_bytes: int

    def within_room(self, page_size_bytes: int, cause: str) -> MovePlan:
        """The same with what there is no room for among what would stay.

        :param cause: why that stays, in words
        """
        room = self.room_bytes // page_size_bytes
        over = sum(self.nodes.values()) - room
        if over <= 0:
            return self
        nodes, rest = {}, room
        for node, pages in self.nodes.items():
            nodes[node] = min(pages, rest)
            rest -= nodes[node]
        left = {**self.left, cause: self.left.get(cause, 0) + over}
        return replace(self, nodes=nodes, shared=min(self.shared, room), left=left)


@dataclass(frozen=True, slots=True)
class MoveResult:
    """What a query found after the calls, not what the calls said.

    :ivar moved: frames that are on the target now and were not before
    :ivar already: frames that were there before, or on a node that keeps its pages
    :ivar left: frames that stayed, by the cause in words
    """

    moved: int
    already: int
    left: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class UnsharePart:
    """Merged pages of one process to be un-merged, each onto `to`, or where its range's policy says.

    :ivar ranges: (start, end) addresses, ascending; empty for all of the process's mergeable memory
    :ivar pages: how many are expected, for progress; 0 where nobody knows
    :ivar keep: nodes on which pages stay merged
    """

    process: ProcessId
    ranges: tuple[AddressRange, ...] = ()
    to: NodeNumber | None = None
    pages: Pages = 0
    keep: Nodes = ()


@dataclass(frozen=True, slots=True)
class Unshare:
    """Merged pages of one or more processes to be un-merged, one part after the other.

    :ivar latency_seconds: how long one call may keep a process from its memory
    :ivar floor_bytes: what has to stay free on the host and on every node
    :ivar headroom_share: how much of what is free above the floor may be taken before it is looked at again
    :ivar max_pressure: the share of time that some task may wait for memory; above it un-merging pauses
    """

    parts: tuple[UnsharePart, ...]
    latency_seconds: LatencySeconds = 0.01
    floor_bytes: FloorBytes = 0
    headroom_share: HeadroomShare = 0.25
    max_pressure: MaxPressure = 1.0


@dataclass(frozen=True, slots=True)
class UnsharedPart:
    """What pagemap showed afterwards of one part.

    :ivar unshared: pages that got a frame of their own
    :ivar left: pages that are still merged, by the cause in words
    :ivar ended: the process ended, or replaced its memory (execve), before or meanwhile
    """

    unshared: int
    left: Mapping[str, int]
    ended: bool = False


@dataclass(frozen=True, slots=True)
class UnshareResult:
    """What came of each part, in the request's order.

    :ivar parts: fewer than asked for where it was stopped
    :ivar stopped: why it was stopped before its end, empty where it was not
    """

    parts: tuple[UnsharedPart, ...]
    stopped: str = ""

    @property
    def unshared(self) -> int:
        return sum(part.unshared for part in self.parts)

    @property
    def left(self) -> Mapping[str, int]:
        found: dict[str, int] = {}
        for part in self.parts:
            for cause, pages in part.left.items():
                found[cause] = found.get(cause, 0) + pages
        return found


def _unit_name(found: str) -> None:
    # systemd's longest name of a unit is 255 characters.
    if len(found) > 255:
        raise ValueError("is longer than 255 characters")


UnitName = Annotated[str, _unit_name]
#: A block has 512 pages.
BlockPages = Annotated[int, between(1, 512)]


@dataclass(frozen=True, slots=True)
class Collapse:
    """Memory of one process, or of all of a systemd unit, to be made huge pages again.

    :ivar process: None for the processes of `unit`
    :ivar keep_pages: blocks are left alone for which a huge page would take so many pages or more
    :ivar floor_bytes: what has to stay free on the host and on every node
    :ivar max_pressure: the share of time that some task may wait for memory; above it this pauses
    :ivar dry_run: only find out what would be done
    """

    process: ProcessId | None
    unit: UnitName = ""
    keep_pages: BlockPages = 32
    floor_bytes: FloorBytes = 0
    headroom_share: HeadroomShare = 0.25
    max_pressure: MaxPressure = 1.0
    dry_run: bool = False


#: The cause of `CollapsedProcess.left` while ksmd runs.
KSMD_IS_RUNNING: Final = "ksmd is running and would split them again"


@dataclass(frozen=True, slots=True)
class CollapsedProcess:
    """One process: what was found, and what smaps showed afterwards.

    :ivar huge_before: huge pages that it had, `huge_after` has (of a dry run: would have)
    :ivar blocks: blocks that became huge pages; of a dry run: that would
    :ivar pages: pages that these take (of a dry run: would take): merged, freed, swapped out and empty ones
    :ivar kept: blocks that were left alone, as they save as many pages as are to be kept
    :ivar left: blocks that could not be made huge pages, by the cause in words
    :ivar error: why the process could not be looked at or changed, empty where it could
    """

    process: ProcessId
    name: str
    huge_before: int = 0
    huge_after: int = 0
    blocks: int = 0
    pages: int = 0
    kept: int = 0
    left: Mapping[str, int] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True, slots=True)
class CollapseResult:
    """What came of each process.

    :ivar stopped: why it was stopped before its end, empty where it was not
    """

    processes: tuple[CollapsedProcess, ...]
    stopped: str = ""
