# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl set`` whose process is killed at the n-th entry that it makes in the journal of transactions.

python -m tests.service.dying CONFIG ENTRY before|after KNOB=VALUE [stop]

With "stop" it is only stopped there until somebody has it go on.
"""

from __future__ import annotations

import os
import signal
import sys

from ksmd_ctl.cli.change import local
from ksmd_ctl.transactions.change import parse_assignments
from ksmd_ctl.transactions.transaction import TransactionState


def main() -> None:
    """Change the knob, and die on the way."""
    config, number, when, word, *still = sys.argv[1:]
    ends = signal.SIGSTOP if still else signal.SIGKILL
    entry, entries = int(number), 0
    with local("kernel", "/", config, "a test", change=True) as here:
        journal = here.journal
        save, close = journal.save, journal.close

        def die_at(before: bool) -> None:
            if entries == entry and (when == "before") == before:
                os.kill(os.getpid(), ends)

        def dying_save(state: TransactionState) -> None:
            nonlocal entries
            die_at(before=False)
            save(state)
            entries += 1
            die_at(before=True)

        def dying_close(state: TransactionState, page_size: int) -> None:
            die_at(before=False)
            close(state, page_size)

        journal.save, journal.close = dying_save, dying_close  # type: ignore[method-assign]
        here.change(parse_assignments([word]), None, lambda _: None)
    print(f"{entries} entries")


if __name__ == "__main__":
    main()
