# SPDX-License-Identifier: GPL-2.0-or-later
"""A change that a command makes itself, where no service runs: the same lock, journal and code."""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ksmd_ctl.cli.common import ENDING, handling
from ksmd_ctl.cli.host import open_host
from ksmd_ctl.config import loader
from ksmd_ctl.config.model import Config, PolicyName
from ksmd_ctl.errors import Refused
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.knobs import Knob, KnobValue
from ksmd_ctl.host.operation import finish
from ksmd_ctl.host.sample import HostKind
from ksmd_ctl.knobs.saved_knobs import SavedKnobs
from ksmd_ctl.statefiles import became_of, host_locked
from ksmd_ctl.transactions.change import check_declared, fitting_plan, plan_document, planning
from ksmd_ctl.transactions.executor import Executor, TransactionRunner, run_to_end
from ksmd_ctl.transactions.journal import TransactionJournal, transaction_document
from ksmd_ctl.transactions.plan import Limits, Plan, limits_of
from ksmd_ctl.transactions.transaction import TransactionState


@contextmanager
def interruptions() -> Iterator[Callable[[], int]]:
    """Counts the signals of `ENDING` for as long as this lasts; a call says how many there were.

    They come in twos: a login session that ends sends SIGTERM and SIGHUP at once.
    """
    count = 0

    def note(*_: object) -> None:
        nonlocal count
        count += 1

    with handling(ENDING, note):
        yield lambda: count


class Local:
    """A host that this process may change, for it holds the lock.

    :ivar journal: the journal of transactions
    """

    def __init__(self, host: Host, config: Config) -> None:
        self.host = host
        self.config = config
        self.limits: Limits = limits_of(config)
        directory = Path(config.state_directory)
        self.journal = TransactionJournal(directory, host.identity)
        self.executor = Executor(host, SavedKnobs(directory, host.identity))

    def plan(self, wanted: Mapping[Knob, KnobValue]) -> Plan:
        """What a change would do.

        :raises KsmdError: it can't be planned
        """
        check_declared(self.config, wanted)
        return finish(planning(self.host, wanted, self.limits, self.config, self.journal.rates))

    def plan_document(self, plan: Plan) -> dict[str, object]:
        return plan_document(plan, self.limits, self.host.identity.page_size_bytes)

    def recover(self, tell: Callable[[Mapping[str, object]], None]) -> TransactionState | None:
        """End the transaction that another process left half done; None where there is none."""
        with interruptions() as interrupts:
            runner = TransactionRunner.of_journal(self.host, self.executor, self.journal, self.limits, tell)
            return None if runner is None else run_to_end(runner, interrupts)

    def change(
        self,
        wanted: Mapping[Knob, KnobValue],
        wait_seconds: float | None,
        tell: Callable[[Mapping[str, object]], None],
        *,
        force: bool = False,
    ) -> TransactionState:
        """Carry a change out; its end, whatever that is.

        :param force: also where there is too little room by the plan
        :raises KsmdError: it was not begun
        """
        check_declared(self.config, wanted)
        fitting = fitting_plan(
            self.host, wanted, lambda: self.config, self.journal.rates, wait_seconds or 0.0, force=force
        )
        try:
            plan = finish(fitting)
        except Refused:
            self.journal.refused()
            raise
        words = " ".join(f"{knob}={value}" for knob, value in wanted.items())
        who = f"ksmd-ctl set {words}, pid {os.getpid()}"
        with interruptions() as interrupts:
            runner = TransactionRunner.of_plan(
                self.host, self.executor, self.journal, self.limits, plan, who, tell, self.config.holds, force=force
            )
            return run_to_end(runner, interrupts)

    def document(self, state: TransactionState) -> dict[str, object]:
        return transaction_document(state, self.host.identity.page_size_bytes)


@contextmanager
def local(kind: str | None, root: str, config_path: str | None, who: str, *, change: bool) -> Iterator[Local]:
    """The host of a kind, to be looked at or changed by this process.

    :param change: hold the lock of the host
    :raises Refused: a service, or another command, holds it
    """
    config = loader.load(config_path)
    with ExitStack() as stack:
        host = stack.enter_context(open_host(kind, root, merged=True))
        if kind == HostKind.ENGINE:
            # It lives as long as this process, and so does its journal. What is declared is for the real one.
            directory = stack.enter_context(tempfile.TemporaryDirectory())
            config = dataclasses.replace(config, state_directory=directory, policy=PolicyName.OBSERVE)
        elif change:
            stack.enter_context(host_locked(config.runtime_directory, config.state_directory, who))
        made = Local(host, config)
        for journal in (made.journal, made.executor.journal):
            if change and journal.damaged:
                what = f"{journal.path} could not be understood and {became_of(journal.path, journal.damaged)}"
                print(f"ksmd-ctl: {what}", file=sys.stderr)
        yield made
