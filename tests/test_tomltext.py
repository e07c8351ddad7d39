# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import pytest

from ksmd_ctl import tomltext


def test_a_document() -> None:
    found = tomltext.parse(b"a = 1\r\n[b]\nc = [{d = 18446744073709551615}]\n")
    assert found == {"a": 1, "b": {"c": [{"d": 2**64 - 1}]}}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"a = ", "is not TOML"),
        (b"a = '\xff'", "is not TOML"),
        (b"a = " + b"9" * 5000, "is not TOML"),
        (b"a = 0x" + b"f" * 5000, "more than 64 bits"),
        (b"a = [{b = 18446744073709551616}]", "more than 64 bits"),
        (b"a = " + b"[" * 5000, "nested too deeply"),
        (b"a = " + b"[" * 40 + b"]" * 40, "nested too deeply"),
        # Dotted keys nest without any recursion of the reader's, and so as deep as one likes.
        (b"a" + b".a" * 5000 + b" = 1", "nested too deeply"),
    ],
    ids=range(8),
)
def test_what_is_none(text: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        tomltext.parse(text)
