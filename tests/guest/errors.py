# SPDX-License-Identifier: GPL-2.0-or-later
"""What can go wrong on the way to a guest, said in two lines."""

LACKING = 4
LOST = 128


class Failure(Exception):
    """A failure that a person reads: what failed and why, then what to do."""

    def __init__(self, what: str, hint: str, status: int) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint
        self.status = status


def lacking(what: str, hint: str) -> Failure:
    """Return the failure of a machine that lacks something a guest needs."""
    return Failure(what, hint, LACKING)


def lost(what: str, hint: str) -> Failure:
    """Return the failure of a guest that gave no exit status."""
    return Failure(what, hint, LOST)
