# SPDX-License-Identifier: GPL-2.0-or-later
"""Names that a process or a user chose, made safe to show: in a terminal, a log, JSON and a metric's label alike.

Anybody may call a process anything: bytes that are not UTF-8, terminal escapes, line feeds, 128 KiB of it. What is
read of a process becomes text here, once, where it is read.
"""

from __future__ import annotations

import hashlib

__all__ = ["LONGEST_NAME", "printable"]

#: Characters of a name; what is longer ends with ``~`` and a digest, so that two long names stay two.
LONGEST_NAME = 100
_DIGEST_BYTES = 4


def printable(name: str, longest: int = LONGEST_NAME) -> str:
    r"""A name on one line: control, format and other invisible characters as ``\x1b`` or ``\u202e``, not too long."""
    shown = name if name.isprintable() else "".join(map(_shown, name))
    if len(shown) <= longest:
        return shown
    digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=_DIGEST_BYTES).hexdigest()
    return f"{shown[: longest - len(digest) - 1]}~{digest}"


def _shown(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
