# SPDX-License-Identifier: GPL-2.0-or-later
"""What waits in memory to be written to the history: bounded, also while nothing can be written."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, Final

from ksmd_ctl.history.model import Entry, Kind, Means

#: At most so many events, and as many samples.
MOST: Final = 500
# So many at once fit into what is kept free of the smallest file.
_AT_ONCE: Final = 32

#: Events and samples of one transaction.
Batch = tuple[Sequence[Entry], Sequence[Means]]


class Waiting:
    """Events and samples that are not in the file, oldest first."""

    def __init__(self) -> None:
        self.entries: deque[Entry] = deque()
        self.means: deque[Means] = deque(maxlen=MOST)
        # Of these, what is on the disk by now. A thread adds to it.
        self._written: list[Entry | Means] = []

    def add(self, entry: Entry) -> None:
        """Take an event. As in the file, what happens often pushes out nothing that happens rarely."""
        if len(self.entries) == MOST:
            kinds = Counter(one.kind for one in self.entries)
            most = Kind.POLICY if Kind.POLICY in kinds else kinds.most_common(1)[0][0]
            self.entries.remove(next(one for one in self.entries if one.kind is most))
        self.entries.append(entry)

    def batches(self) -> list[Batch]:
        """What waits now, in parts for one transaction each."""
        entries, means = tuple(self.entries), tuple(self.means)
        starts = range(0, max(len(entries), len(means)), _AT_ONCE)
        return [(entries[at : at + _AT_ONCE], means[at : at + _AT_ONCE]) for at in starts]

    def written(self, batch: Batch) -> None:
        """This is on the disk now; for a thread."""
        self._written += [*batch[0], *batch[1]]

    def take_off(self) -> None:
        """What is on the disk waits no more. Not while a thread writes."""
        queues: tuple[deque[Any], ...] = (self.entries, self.means)
        written, self._written = self._written, []
        for one in written:
            for queue in queues:
                # Some may have been pushed out meanwhile.
                if queue and queue[0] is one:
                    queue.popleft()

    def clear(self) -> None:
        """Forget all."""
        self.entries.clear()
        self.means.clear()
