# SPDX-License-Identifier: GPL-2.0-or-later
"""The history is sound after a kill at any moment."""

from __future__ import annotations

from pathlib import Path

import pytest

from ksmd_ctl.history.model import history_path
from tests.history.killing import kill_again_and_again

pytestmark = pytest.mark.soak


@pytest.mark.parametrize("as_service", [False, True], ids=["the file", "the service's thread"])
def test_a_thousand_kills_leave_no_file_that_cannot_be_read(tmp_path: Path, as_service: bool) -> None:
    kill_again_and_again(history_path(tmp_path, "kernel"), 1000, seed=2016, as_service=as_service)
