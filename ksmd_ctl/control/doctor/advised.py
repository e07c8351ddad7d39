# SPDX-License-Identifier: GPL-2.0-or-later
"""What the doctor advised last, kept in the state directory, so that nothing is advised twice that did not help."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ksmd_ctl.control.files import MALFORMED, read_file, replace_file
from ksmd_ctl.control.lock import make_directory
from ksmd_ctl.errors import Denied, HostError, errno_text

__all__ = ["FILE", "Advised", "read", "write"]

FILE: Final = "doctor.json"
_FORMAT: Final = 1
#: As many findings as there could be, and more.
_MOST: Final = 100
_MOST_BYTES: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Advised:
    """An advice, by what it was given for.

    :ivar pages: that it was to bring
    :ivar change: the last change of knobs before it, by its id; empty for none
    :ivar vain: it was followed, and brought nothing
    """

    pages: int
    change: str
    vain: bool = False


def read(directory: Path, boot_id: str) -> dict[str, Advised]:
    """What was advised since this boot, by the finding's code. A file that makes no sense says nothing.

    :raises Unreadable: there is one, and it can't be read
    """
    text = read_file(directory / FILE, "reading what was advised before", _MOST_BYTES)
    try:
        document = json.loads(text or "{}")
        if document.get("format") != _FORMAT or document["boot_id"] != boot_id:
            return {}
        entries = list(document["advised"].items())[:_MOST]
        return {str(code): Advised(int(one["pages"]), str(one["change"]), one["vain"] is True) for code, one in entries}
    except MALFORMED:
        return {}


def write(directory: Path, boot_id: str, advised: Mapping[str, Advised]) -> None:
    """Keep what was advised.

    :raises HostError: it can't be written
    """
    document = {
        "format": _FORMAT,
        "boot_id": boot_id,
        "advised": {code: dataclasses.asdict(one) for code, one in advised.items()},
    }
    try:
        make_directory(directory)
        replace_file(directory / FILE, json.dumps(document).encode())
    except OSError as error:
        kind = Denied if isinstance(error, PermissionError) else HostError
        why = f"{directory / FILE}: {errno_text(error.errno or 0)}"
        raise kind("keeping what was advised", why, path=str(directory / FILE), errno=error.errno) from error
