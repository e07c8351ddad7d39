# SPDX-License-Identifier: GPL-2.0-or-later
"""Hours of it: only for ``make soak``."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("KSMD_CTL_SOAK") else ["test_*.py"]
