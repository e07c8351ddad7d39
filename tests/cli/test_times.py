# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.cli.times import moment

# 2026-11-29 12:30:15 in Berlin.
NOW = 1795951815.0


@pytest.fixture(autouse=True)
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patched:
        patched.setenv("TZ", "Europe/Berlin")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.parametrize(
    ("text", "ago"),
    [
        ("now", 0),
        ("0s", 0),
        ("90", None),
        ("10min", 600),
        ("10m", 600),
        ("2h", 7200),
        ("1d", 86400),
        ("1w", 7 * 86400),
        ("1h30min", 5400),
        ("1 hour 30 min ago", 5400),
        ("-2h", 7200),
        (" 2 days ago ", 2 * 86400),
        ("today", 12 * 3600 + 30 * 60 + 15),
        ("yesterday", 36 * 3600 + 30 * 60 + 15),
        ("yesterday 12:00", 86400 + 30 * 60 + 15),
        ("12:00", 30 * 60 + 15),
        ("12:30:14", 1),
        ("2026-11-29", 12 * 3600 + 30 * 60 + 15),
        ("2026-11-29 12:30", 15),
        ("2026-11-29T12:30:15", 0),
        # In summer the clock was an hour ahead.
        ("2026-10-01 12:30:15", 59 * 86400 + 3600),
        ("@1795951815", 0),
        ("@1795951814.5", 0.5),
        ("", None),
        ("2 fortnights", None),
        ("h", None),
        ("2h3", None),
        ("2026-02-30", None),
        ("2026-13-01", None),
        ("24:00", None),
        ("12:60", None),
        ("2026-11-29 12", None),
        ("tomorrow", -(11 * 3600 + 29 * 60 + 45)),
        ("tomorrow 00:30", -(11 * 3600 + 59 * 60 + 45)),
        ("2026-11-29 12:30:14.5", 0.5),
        ("2026-11-29 12:30.5", None),
        ("2026-11-29 11:30:14.5 UTC", 0.5),
        ("11:30 UTC", 15),
        ("2026-11-29 UTC", 11 * 3600 + 30 * 60 + 15),
        ("today UTC", 11 * 3600 + 30 * 60 + 15),
        ("2026-02-30 UTC", None),
        ("2026-13-01 UTC", None),
        (" UTC", None),
        ("UTC", None),
        ("2026-11-29 11:30 CET", None),
        ("@", None),
        ("@-5", NOW + 5),
        ("@--5", None),
        ("@1e3", None),
        ("٢h", None),
        ("9999999999h", None),
    ],
)
def test_a_moment(text: str, ago: float | None) -> None:
    if ago is None:
        with pytest.raises(argparse.ArgumentTypeError, match="is not a time"):
            moment(text, NOW)
    else:
        assert NOW - moment(text, NOW) == ago


@given(st.text(max_size=30))
def test_any_text_is_a_moment_or_refused(text: str) -> None:
    with contextlib.suppress(argparse.ArgumentTypeError):
        assert isinstance(moment(text, NOW), float)
