# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes to a history for as long as it lives, and says after each write which number is on disk:

python -m tests.history.writing FILE MAX_BYTES FIRST
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from ksmd_ctl.history.file import HistoryFile
from ksmd_ctl.history.model import Entry, Kind, Means, Severity


def main() -> None:
    file = HistoryFile(Path(sys.argv[1]), int(sys.argv[2]))
    for number in itertools.count(int(sys.argv[3])):
        kind = Kind.POLICY if number % 3 else Kind.FOREIGN
        entry = Entry(
            60.0 * number, kind, "drift", Severity.WARNING, f"change {number}", fields={"number": str(number)}
        )
        file.write([entry], [Means(60 * number, number, ksm_pages={"0": number, "1": 1})])
        if number % 10 == 0:
            file.forget(60.0 * number, 86400.0 * 3)
        sys.stdout.write(f"{number}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
