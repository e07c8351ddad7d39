# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl daemon`` that is killed at the n-th entry that it makes in the journal of transactions.

python -m tests.service.dying_service ENTRY before|after ARGUMENTS...
"""

from __future__ import annotations

import os
import signal
import sys

from ksmd_ctl.cli.main import main as ksmd_ctl
from ksmd_ctl.control.ledger import Ledger
from ksmd_ctl.control.transaction import State


def main() -> int:
    """Run the service, and die on the way of its first transaction."""
    number, when, *arguments = sys.argv[1:]
    entries = 0
    save, close = Ledger.save, Ledger.close

    def die_at(before: bool) -> None:
        if entries == int(number) and (when == "before") == before:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying_save(ledger: Ledger, state: State) -> None:
        nonlocal entries
        die_at(before=False)
        save(ledger, state)
        entries += 1
        die_at(before=True)

    def dying_close(ledger: Ledger, state: State, page_size: int) -> None:
        die_at(before=False)
        close(ledger, state, page_size)

    Ledger.save, Ledger.close = dying_save, dying_close  # type: ignore[method-assign]
    return ksmd_ctl(arguments)


if __name__ == "__main__":
    sys.exit(main())
