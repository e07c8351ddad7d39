# SPDX-License-Identifier: GPL-2.0-or-later
"""Who has changed a knob, on this host's kernel: the service without privilege, and its broker."""

from __future__ import annotations

import pytest

from tests.guest_tests.foreign import (  # noqa: F401
    test_an_unmerge_and_a_stop_soon_after_it_have_their_names,
    test_each_write_of_virt_handler_is_named,
    test_whoever_ends_at_once_has_a_pid_at_least,
    watched,
)

pytestmark = pytest.mark.ksm
