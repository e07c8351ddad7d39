# SPDX-License-Identifier: GPL-2.0-or-later
"""Switches merging of a virtual machine by its QEMU monitor, and looks at its mappings whether that is so."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ksmd_ctl.errors import Absent, Cancelled, CheckFailed, KsmdError, Refused
from ksmd_ctl.figures import bytes_text
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.switching import Method, SwitchResult
from ksmd_ctl.kernel.monitors import Monitor, backend_names, connect, libvirt_domain, monitors
from ksmd_ctl.kernel.proc_pid import Held, command_words, printable, read_process_file
from ksmd_ctl.kernel.process_counts import read_counts
from ksmd_ctl.kernel.ranges import holds_pages, mappings
from ksmd_ctl.switch.qmp import Backend, Qmp

_WHAT: Final = "switching merging by the QEMU monitor"
_TRY_INJECT: Final = "--method inject has the process make the system calls itself"


@dataclass(frozen=True, slots=True)
class Marked:
    """What of a process is mergeable now (VmFlags, ksm_stat).

    :ivar sizes: of its mergeable mappings, in bytes
    :ivar merge_any: prctl(PR_SET_MEMORY_MERGE) is on; None where this kernel doesn't tell
    :ivar mappings: how many hold pages of its own
    """

    sizes: tuple[int, ...]
    merging_pages: int
    merge_any: bool | None
    mappings: int = 0

    @property
    def mergeable_bytes(self) -> int:
        return sum(self.sizes)

    @classmethod
    def of(cls, process: ProcessId, root: Path = Path("/")) -> Marked:
        """
        :raises NoSuchProcess, Denied, ReadError: it can't be looked at
        """
        with Held(process, root) as held:
            counts = read_counts(process.pid, root)
            found = mappings(process.pid, root)
            held.verify()
        sizes = tuple(item.end - item.start for item in found if item.mergeable)
        holding = sum(holds_pages(item) or item.mergeable for item in found)
        return cls(sizes, counts.merging_pages or 0, counts.merge_any, holding)

    @property
    def state(self) -> bool | None:
        """Whether its memory is mergeable; None: a part of it."""
        return None if 0 < len(self.sizes) < self.mappings else bool(self.sizes)

    def would(self, process: ProcessId, method: Method, how: str, *, on: bool) -> SwitchResult:
        """What a dry run says of a process that is so: nothing was done."""
        return SwitchResult(
            process=process,
            on=on,
            method=method,
            how=how,
            before=self.state,
            after=self.state,
            mergeable_bytes=self.mergeable_bytes,
            merging_pages=self.merging_pages,
            stopped_seconds=0.0,
        )

    def shows(self, backends: Sequence[Backend], *, on: bool) -> bool:
        """Whether the memory of backends is mergeable, or is not: which mapping is whose only its size says."""
        sizes = [backend.size_bytes for backend in backends]
        return self.mergeable_bytes >= sum(sizes) if on else all(size < min(sizes) for size in self.sizes)


def monitored(process: ProcessId, root: Path = Path("/")) -> bool:
    """Whether a process is a QEMU whose monitor may be used, by its command line.

    :raises NoSuchProcess: it is gone
    """
    command = _command(process, root)
    return not libvirt_domain(command) and any(not monitor.unusable for monitor in monitors(command))


def need_monitor(process: ProcessId, root: Path = Path("/")) -> None:
    """
    :raises KsmdError: the monitor can't be used, as `switch_by_monitor`
    """
    command = _command(process, root)
    _need_ours(command, on=False)
    with _opened(process, command, root) as qmp:
        _private(qmp, qmp.backends())


def switch_by_monitor(
    process: ProcessId,
    *,
    on: bool,
    dry_run: bool = False,
    root: Path = Path("/"),
    stop: Callable[[], bool] = lambda: False,
) -> SwitchResult:
    """Switch merging of a virtual machine's memory. It may block: run it in a child.

    :param dry_run: only find out what would be done, without a connection: the monitor takes one at a time
    :raises Absent: it is no QEMU with a monitor that can be reached
    :raises Refused: the monitor is libvirt's, or somebody else's
    :raises CheckFailed: QEMU did as it was told, and its memory is as before
    :raises KsmdError: the monitor can't be used
    """
    command = _command(process, root)
    _need_ours(command, on=on)
    if dry_run:
        return _would_set(process, command, on=on, root=root)
    with _opened(process, command, root) as qmp:
        backends = qmp.backends()
        private = _private(qmp, backends)
        before = Marked.of(process, root)
        seconds = _switched(process, qmp, private, before, on=on, root=root, stop=stop)
        if stop():
            raise Cancelled(_WHAT, "it was asked to stop; some backends may be switched")
        after = Marked.of(process, root)
        names = _names(private)
        shown = after.shows(private, on=on)
        if not shown:
            why = f"{qmp.version} says that merge of {names} is {_word(on=on)}, and the memory is as before"
            raise CheckFailed(
                _WHAT, why, hint=f"so it is with QEMU 9.1, and on hugetlbfs nothing merges; {_TRY_INJECT}"
            )
        return SwitchResult(
            process=process,
            on=on,
            method=Method.QMP,
            how=f"qom-set merge={_word(on=on)} of {names} ({qmp.version})",
            before=_all(private, before),
            after=_all(private, after),
            mergeable_bytes=after.mergeable_bytes,
            merging_pages=after.merging_pages,
            stopped_seconds=seconds,
            left=tuple(_left(backends, after, on=on)),
        )


def _need_ours(command: Sequence[str], *, on: bool) -> None:
    """
    :raises Refused: the monitor is libvirt's
    """
    if domain := libvirt_domain(command):
        hint = f"--method inject; or, which taints the domain: {passthrough(domain, backend_names(command), on=on)}"
        raise Refused(_WHAT, f"libvirt keeps the monitor of domain {domain} to itself", hint=hint)


def _private(qmp: Qmp, backends: Sequence[Backend]) -> tuple[Backend, ...]:
    """
    :raises Absent: no memory of it could be merged
    """
    private = tuple(backend for backend in backends if not backend.share)
    if not private:
        why = "it has no memory backend that is private" if backends else "it has no memory backend"
        raise Absent(_WHAT, f"{why} ({qmp.version})", hint=_TRY_INJECT)
    return private


def _command(process: ProcessId, root: Path) -> list[str]:
    with Held(process, root) as held:
        command = command_words(read_process_file(process.pid, "cmdline", root))
        held.verify()
    return command


def _would_set(process: ProcessId, command: Sequence[str], *, on: bool, root: Path) -> SwitchResult:
    """What would be done, by the command line.

    :raises Absent: there is no monitor that could be used
    """
    found = _found(process, command)
    if found[0].unusable:
        raise Absent(_WHAT, f"its QMP monitor can't be used: {found[0].unusable}", hint=_TRY_INJECT)
    marked = Marked.of(process, root)
    names = ", ".join(map(printable, backend_names(command))) or "the machine's memory"
    how = f"qom-set merge={_word(on=on)} of {names}, by {printable(found[0].path)}"
    return marked.would(process, Method.QMP, how, on=on)


def _found(process: ProcessId, command: Sequence[str]) -> list[Monitor]:
    """The monitors of a command line, those first that can be used.

    :raises Absent: there is none
    """
    found = monitors(command)
    if not found:
        raise Absent(_WHAT, f"process {process.pid} was started without a QMP monitor", hint=_TRY_INJECT)
    return sorted(found, key=lambda one: bool(one.unusable))


def _opened(process: ProcessId, command: Sequence[str], root: Path) -> Qmp:
    error: KsmdError | None = None
    # One that somebody else is connected to may have another beside it.
    for monitor in _found(process, command):
        try:
            return Qmp(connect(process, monitor, root))
        except KsmdError as came:
            error = error or came
    assert error is not None
    raise error


def _switched(
    process: ProcessId,
    qmp: Qmp,
    backends: Sequence[Backend],
    before: Marked,
    *,
    on: bool,
    root: Path,
    stop: Callable[[], bool],
) -> float:
    """Set the property of each backend, and where that has no effect, both values; the longest time that one took."""
    longest = 0.0

    def put(backend: Backend, value: bool) -> None:
        nonlocal longest
        began = time.monotonic()
        qmp.set_merge(backend, on=value)
        longest = max(longest, time.monotonic() - began)

    for backend in backends:
        if stop():
            break
        put(backend, on)
    if not before.shows(backends, on=on) and not Marked.of(process, root).shows(backends, on=on):
        # To set what QEMU believes already does nothing, whatever the memory is.
        for backend in backends:
            if stop():
                break
            put(backend, not on)
            put(backend, on)
    return longest


def _all(backends: Sequence[Backend], marked: Marked) -> bool | None:
    """Whether all of the machine's memory is mergeable; None where something else of the process is."""
    if not marked.shows(backends, on=False):
        return True
    return None if marked.sizes else False


def _left(backends: Sequence[Backend], after: Marked, *, on: bool) -> list[str]:
    shared = [backend for backend in backends if backend.share]
    if on:
        return [f"{_names(shared)}: shared memory never merges"] if shared else []
    if not after.mergeable_bytes:
        return []
    size = bytes_text(after.mergeable_bytes)
    return [f"{size} that are no backend's (firmware, video memory) stay mergeable: {_TRY_INJECT}"]


def passthrough(domain: str, names: Sequence[str], *, on: bool) -> str:
    """The commands by which virsh(1) does the same with a domain of libvirt's.

    :param names: of its memory backends; none: the one that QEMU makes for -m of a PC
    """
    commands = []
    for name in names or ("pc.ram",):
        arguments = {"path": f"/objects/{name}", "property": "merge", "value": on}
        message = json.dumps({"execute": "qom-set", "arguments": arguments})
        commands.append(f"virsh qemu-monitor-command {shlex.quote(domain)} {shlex.quote(message)}")
    return " && ".join(commands)


def _names(backends: Sequence[Backend]) -> str:
    return ", ".join(printable(backend.name) for backend in backends)


def _word(*, on: bool) -> str:
    return "true" if on else "false"
