# SPDX-License-Identifier: GPL-2.0-or-later
"""What a command sees by itself where no service runs: the host, and what a service left on disk."""

from __future__ import annotations

import argparse
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ksmd_ctl.cli.client import socket_path
from ksmd_ctl.errors import Absent, KsmdError
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.knobs import RUN_OFFLINE, Knob
from ksmd_ctl.host.memory import Attempts, Process
from ksmd_ctl.host.operation import finish
from ksmd_ctl.host.sample import HostKind, Sample
from ksmd_ctl.reports.report import Report, document, report_of_samples
from ksmd_ctl.reports.saving import merged_pages

#: The defaults of the settings state_directory and runtime_directory in [service]; a test holds that they agree.
STATE_DIRECTORY = "/var/lib/ksmd-ctl"
RUNTIME_DIRECTORY = "/run/ksmd-ctl"
_MERGED_AFTER_SECONDS = 30.0

T = TypeVar("T")


@contextmanager
def open_host(kind: str | None, root: str = "/", *, merged: bool = False) -> Iterator[Host]:
    """The host of a kind, the kernel where none is named; its files are closed afterwards.

    :param root: where the kernel's files are found below
    :param merged: the demonstration's processes on a simulated host are merged first
    """
    if kind == HostKind.ENGINE:
        from ksmd_ctl.engine.host import open_engine_host

        simulated = open_engine_host()
        if merged:
            simulated.set(Knob.RUN, 1)
            simulated.advance(_MERGED_AFTER_SECONDS)
        yield simulated
        return
    from ksmd_ctl.privileged.host import open_kernel_host

    with closing(open_kernel_host(Path(root), fork=threading.active_count() == 1)) as host:
        yield host


def floor_bytes(config: str | None = None) -> int:
    """What has to stay free on the host and on every node by the configuration, or by default where that is wrong."""
    from ksmd_ctl.config.loader import load
    from ksmd_ctl.config.model import Config

    try:
        return load(config).floor_bytes
    except KsmdError:
        return Config().floor_bytes


def look(
    args: argparse.Namespace, interval_seconds: float | None, left: Mapping[str, object] | None = None
) -> Mapping[str, object]:
    """The report of the host (docs/json.md).

    :param interval_seconds: look twice, so long apart, so that rates are known; None for one look without rates
    :param left: what a service left changed
    :raises Absent: this kernel has no KSM
    """
    where = folders(args)
    with open_host(args.host, args.root) as host:
        samples = [host.sample()]
        need_ksm(samples[0])
        if interval_seconds is not None:
            time.sleep(interval_seconds)
            samples.append(host.sample())
        report = dataclasses.replace(
            report_of(host, samples, args.root),
            transactions=_kept(where, lambda places: transactions(host, places.state)),
            foreign_changes=_kept(where, lambda places: _foreign_changes(host, places, samples[-1].time_seconds)),
            left_by_service=left,
            switched=kept_switches(host, where),
        )
    return document(report)


def need_ksm(sample: Sample) -> None:
    """
    :raises Absent: this kernel has no KSM
    """
    reading = sample.readings.get(Knob.RUN)
    if isinstance(reading, Absent):
        raise Absent(
            "looking at KSM",
            "this kernel doesn't have it",
            hint="boot a kernel with CONFIG_KSM=y; --host engine shows a simulated one",
            path=reading.path,
            errno=reading.errno,
        ) from reading


def report_of(host: Host, samples: Sequence[Sample], root: str) -> Report:
    """What samples say of a host, and whether KSM's counters still say what is merged.

    :param root: where the kernel's files are found below
    """
    last, pages, mapped = samples[-1], None, None
    run = last.number("run")
    # Where ksmd can't be seen, in a container, others' processes can't be either: theirs would seem to have ended.
    seen = host.identity.kind is HostKind.KERNEL and last.number("ksmd_cpu_seconds") is not None
    if seen and run is not None and int(run) & ~RUN_OFFLINE != 1 and merged_pages(last):
        from ksmd_ctl.kernel.proc_pid import mapped_ksm_pages, merging_pages

        pages, mapped = merging_pages(Path(root)), mapped_ksm_pages(Path(root))
    return report_of_samples(host.identity, samples, finish(host.writers()), pages, mapped)


@contextmanager
def counted_attempts(root: str, *, kernel: bool) -> Iterator[Callable[[], Attempts | None]]:
    """Count what ksmd tries to merge for as long as this lasts: a call gives the counts, None where nothing counts."""
    counter = None
    if kernel and root == "/":
        from ksmd_ctl.kernel.ksmd import AttemptCounter

        with suppress(KsmdError):
            counter = AttemptCounter()
    try:
        yield lambda: None if counter is None else counter.read()
    finally:
        if counter is not None:
            counter.close()


def transactions(host: Host, folder: Path) -> Mapping[str, object] | None:
    """What the journal of transactions in a folder says; None where there is none, or it is not ours to read."""
    if not any(folder.glob("transactions-*.json")):
        return None
    from ksmd_ctl.transactions.journal import (
        TransactionJournal,
        process_document,
        transaction_document,
        transactions_section,
    )

    identity = host.identity
    try:
        journal = TransactionJournal(folder, identity, keep=True)
    except KsmdError:
        return None
    running, document = journal.running, None
    if running is None and journal.last is None:
        return None
    if running is not None:
        process = process_document(running, identity.boot_id, host.find)
        document = {**transaction_document(running, identity.page_size_bytes), "process": process}
    return transactions_section(journal, document)


@dataclass(frozen=True, slots=True)
class Folders:
    """Where one service has its files."""

    state: Path
    runtime: Path


def folders(args: argparse.Namespace) -> tuple[Folders, ...]:
    """Where a service may have its files: as a configuration that was named says, else by default or with its socket.

    The service's own configuration is not read: that takes longer than all that these commands do else.

    :raises ConfigError: a configuration was named, and it is wrong
    """
    named = getattr(args, "config", None)
    if named is not None:
        from ksmd_ctl.config.loader import load

        config = load(named)
        return (Folders(Path(config.state_directory), Path(config.runtime_directory)),)
    if getattr(args, "root", "/") != "/":
        return ()
    beside = Path(socket_path(getattr(args, "socket", None))).parent
    default = Folders(Path(STATE_DIRECTORY), Path(RUNTIME_DIRECTORY))
    return (default, Folders(beside, beside))


def left_by_service(args: argparse.Namespace) -> Mapping[str, object] | None:
    """What a service left changed that ended without a stop (docs/json.md); None for nothing, or not ours to read.

    It is for where no service answers.
    """
    if getattr(args, "host", None) == HostKind.ENGINE:
        return None
    return _kept(folders(args), lambda places: _left(places, getattr(args, "root", "/")))


def _kept(where: tuple[Folders, ...], read: Callable[[Folders], T | None]) -> T | None:
    """What the first of several services has kept; None where none has, or it is not ours to read."""
    for places in where:
        with suppress(KsmdError):
            if (found := read(places)) is not None:
                return found
    return None


def _left(places: Folders, root: str) -> Mapping[str, object] | None:
    if not (places.state / f"found-{HostKind.KERNEL}.json").exists():
        return None
    from ksmd_ctl.knobs.saved_knobs import SavedKnobs, left_section
    from ksmd_ctl.statefiles import LOCK, holder

    lock = places.runtime / LOCK
    if holder(lock):
        # It is being started or restored, or somebody makes a change: then that is to be waited for.
        return None
    try:
        seen = max(0.0, time.time() - lock.stat().st_mtime)
    except OSError:
        # systemd removes the folder of a service that has failed.
        seen = None
    with open_host(HostKind.KERNEL, root) as host:
        return left_section(SavedKnobs(places.state, host.identity, keep=True), host.sample(), seen)


def kept_switches(
    host: Host, where: tuple[Folders, ...], processes: Sequence[Process] = ()
) -> list[dict[str, object]] | None:
    """Who was switched on or off (`ksmd_ctl.switch.keep`); None where nobody was, or it is not ours to read.

    :param processes: what is known to run
    """

    def read(places: Folders) -> list[dict[str, object]] | None:
        if not (places.state / f"switched-{host.identity.kind}.json").exists():
            return None
        from ksmd_ctl.switch.keep import SwitchJournal, records_document

        journal = SwitchJournal(places.state, host.identity, keep=True)
        gone = host.losses(journal.running(), ()).gone
        return records_document(journal.as_ended(gone), host.clock(), processes)

    return _kept(where, read)


def _foreign_changes(host: Host, places: Folders, now: float) -> list[dict[str, object]] | None:
    if not (places.state / f"foreign-{host.identity.kind}.json").exists():
        return None
    from ksmd_ctl.knobs.foreign import ForeignChanges, foreign_section

    return foreign_section(ForeignChanges(places.state, host.identity, keep=True).entries, now)
