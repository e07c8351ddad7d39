# SPDX-License-Identifier: GPL-2.0-or-later
"""Who has changed a knob, on this host's kernel: the service without privilege, and its broker."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.guest_tests.foreign import (  # noqa: F401
    test_an_unmerge_and_a_stop_soon_after_it_have_their_names,
    test_each_write_of_virt_handler_is_named,
    test_whoever_ends_at_once_has_a_pid_at_least,
    watched,
)
from tests.service.running import PROGRAM

pytestmark = [
    pytest.mark.ksm,
    pytest.mark.skipif(
        not all(
            path.stat().st_mode & 0o001 for path in (*Path(sys.executable).resolve().parents, *Path(PROGRAM).parents)
        ),
        reason="only some users can start the program where it is",
    ),
]
