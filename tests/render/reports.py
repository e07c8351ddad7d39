# SPDX-License-Identifier: GPL-2.0-or-later
"""The example report that the documentation shows and that the contracts are about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONTRACTS = Path(__file__).parents[1] / "contracts"


def example() -> dict[str, Any]:
    """A fresh copy of tests/contracts/report.json."""
    document: dict[str, Any] = json.loads((CONTRACTS / "report.json").read_text())
    return document
