# SPDX-License-Identifier: GPL-2.0-or-later
"""Every write to /sys goes through one function: seen by tracing every file that is opened while knobs are changed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar

from ksmd_ctl.config.model import Config
from ksmd_ctl.errors import KsmdError
from ksmd_ctl.host.knobs import Knob, KnobValue
from ksmd_ctl.host.operation import Operation
from ksmd_ctl.kernel import ksmfs
from ksmd_ctl.knobs.saved_knobs import SavedKnobs
from ksmd_ctl.privileged.client import OwnBroker
from ksmd_ctl.privileged.host import KernelHost
from ksmd_ctl.privileged.requests import Context, Request
from ksmd_ctl.transactions.executor import Executor, TransactionRunner, run_to_end
from ksmd_ctl.transactions.journal import TransactionJournal
from ksmd_ctl.transactions.plan import limits_of, make_plan
from ksmd_ctl.transactions.transaction import Result
from tests.fakes.ksmfs import FakeKsmFs

T = TypeVar("T")

_FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_traces: list[list[tuple[str, str, str]]] = []


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if event != "open" or not _traces or not isinstance(arguments[2], int) or not arguments[2] & _FOR_WRITING:
        return
    if not isinstance(arguments[0], str | Path):
        # A descriptor that is open already.
        return
    frame: FrameType | None = sys._getframe(1)
    assert frame is not None
    _traces[-1].append((os.fspath(arguments[0]), frame.f_code.co_filename, frame.f_code.co_name))


sys.addaudithook(_audit)


@contextmanager
def traced() -> Iterator[list[tuple[str, str, str]]]:
    """What is opened for writing: path, and the file and the function that did."""
    found: list[tuple[str, str, str]] = []
    _traces.append(found)
    try:
        yield found
    finally:
        _traces.pop()


class Here(KernelHost):
    """A host whose requests are carried out in this process, where they can be watched."""

    def start(self, request: Request[T], deadline_seconds: float) -> Operation[T]:
        try:
            return Operation.done(request.run(Context(self._root)))
        except KsmdError as error:
            return Operation.failed(error)


def test_a_transaction_writes_knobs_in_one_place(tmp_path: Path) -> None:
    root, state = tmp_path / "root", tmp_path / "state"
    root.mkdir()
    FakeKsmFs(root)
    host = Here(root, OwnBroker(root))
    wanted: dict[Knob, KnobValue] = {
        Knob.RUN: 1,
        Knob.MERGE_ACROSS_NODES: 0,
        Knob.MAX_PAGE_SHARING: 17,
        Knob.PAGES_TO_SCAN: 1234,
        Knob.SMART_SCAN: 0,
    }
    plan = make_plan(wanted, host.sample(), None, limits_of(Config()))
    executor, journal = Executor(host, SavedKnobs(state, host.identity)), TransactionJournal(state, host.identity)
    with traced() as opened:
        end = run_to_end(TransactionRunner.of_plan(host, executor, journal, limits_of(Config()), plan, "a test"))
    assert end.result is Result.DONE
    assert {knob: host.read(knob) for knob in wanted} == wanted
    inside = [(Path(path).name, file, function) for path, file, function in opened if path.startswith(str(root))]
    assert {name for name, _, _ in inside} == set(wanted)
    assert {(file, function) for _, file, function in inside} == {(ksmfs.__file__, "store")}
    host.close()
    # What else was written is the journals.
    assert {Path(path).parent for path, _, _ in opened if not path.startswith(str(root))} == {state}
