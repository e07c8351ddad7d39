# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl daemon`` that is killed at the n-th entry that it makes in the journal of transactions.

python -m tests.service.dying_service ENTRY before|after ARGUMENTS...
"""

from __future__ import annotations

import os
import signal
import sys

from ksmd_ctl.cli.main import main as ksmd_ctl
from ksmd_ctl.transactions.journal import TransactionJournal
from ksmd_ctl.transactions.transaction import TransactionState


def main() -> int:
    """Run the service, and die on the way of its first transaction."""
    number, when, *arguments = sys.argv[1:]
    entries = 0
    save, close = TransactionJournal.save, TransactionJournal.close

    def die_at(before: bool) -> None:
        if entries == int(number) and (when == "before") == before:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying_save(journal: TransactionJournal, state: TransactionState) -> None:
        nonlocal entries
        die_at(before=False)
        save(journal, state)
        entries += 1
        die_at(before=True)

    def dying_close(journal: TransactionJournal, state: TransactionState, page_size: int) -> None:
        die_at(before=False)
        close(journal, state, page_size)

    TransactionJournal.save, TransactionJournal.close = dying_save, dying_close  # type: ignore[method-assign]
    return ksmd_ctl(arguments)


if __name__ == "__main__":
    sys.exit(main())
