# SPDX-License-Identifier: GPL-2.0-or-later
"""What can be asked of the privileged part: a closed table of typed requests.

A request is a frozen dataclass; its fields are its parameters, checked when it is decoded. It runs in a process of
its own (`ksmd_ctl.kernel.worker`), which may be killed at any moment where it isn't shielded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from ksmd_ctl.errors import Cancelled, ReadError
from ksmd_ctl.host import Progress
from ksmd_ctl.kernel.ksmfs import KsmFs
from ksmd_ctl.knobs import KNOBS, Knob, KnobValue

__all__ = ["REQUESTS", "Context", "Request", "WriteKnob"]

T_co = TypeVar("T_co", covariant=True)


class Context:
    """What a running request has of its surroundings.

    :ivar root: where sysfs and procfs are found below
    """

    def __init__(self, root: Path, tell: Callable[[Progress], None] = lambda _: None) -> None:
        self.root = root
        self._tell = tell
        self._shields = 0
        self._stopped = False

    @property
    def stopping(self) -> bool:
        """It has been asked to stop."""
        return self._stopped

    def progress(self, done: int, total: int = 0, unit: str = "") -> None:
        """Tell how far it is. A safe point."""
        self._tell(Progress(done, total, unit))
        self.check()

    def check(self) -> None:
        """A safe point, also where it is shielded.

        :raises Cancelled: it has been asked to stop
        """
        if self._stopped:
            raise Cancelled("the request", "it was asked to stop")

    @contextmanager
    def shield(self) -> Iterator[None]:
        """Within, being asked to stop interrupts nothing; `check` and `progress` tell. There is little time."""
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1
        self.check()

    def stop(self, *_: object) -> None:
        """Ask it to stop: a signal handler.

        :raises Cancelled: at once where nothing is shielded, so a system call that waits is not taken up again
        """
        self._stopped = True
        if not self._shields:
            self.check()


class Request(ABC, Generic[T_co]):
    """Something that needs privilege.

    :cvar name: what it is called on the wire
    :cvar result: the type of what comes of it, for decoding
    """

    __slots__ = ()
    name: ClassVar[str]
    result: ClassVar[object]

    @property
    def blocks(self) -> bool:
        """It may take long, or wait in the kernel; else it is done at once wherever it can be."""
        return True

    @abstractmethod
    def run(self, context: Context) -> T_co:
        """Do it.

        :raises KsmdError: it failed
        """

    def state(self, root: Path) -> str:
        """After it was stopped half way: what state things are in, as a phrase; empty where nothing has changed."""
        return ""


@dataclass(frozen=True, slots=True)
class WriteKnob(Request[KnobValue]):
    """Give a knob a value: `KsmFs.write`."""

    name: ClassVar[str] = "write_knob"
    result: ClassVar[object] = KnobValue

    knob: Knob
    value: KnobValue

    @property
    def blocks(self) -> bool:
        return KNOBS[self.knob].blocks

    def run(self, context: Context) -> KnobValue:
        ksm = KsmFs(context.root)
        try:
            return ksm.write(self.knob, self.value)
        finally:
            ksm.close()

    def state(self, root: Path) -> str:
        ksm = KsmFs(root)
        try:
            # Reading takes no lock of the kernel's (mm/ksm.c, run_show), so this can't wait for the writer.
            return f"{self.knob} reads {ksm.read(self.knob)} now"
        except ReadError as error:
            return f"{self.knob} can't be read: {error.why}"
        finally:
            ksm.close()


#: Every request there is, by its name.
REQUESTS: dict[str, type[Request[Any]]] = {kind.name: kind for kind in (WriteKnob,)}
