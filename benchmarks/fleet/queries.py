# SPDX-License-Identifier: GPL-2.0-or-later
"""The queries of the dashboards, asked of the real Prometheus.

An empty answer is right only where no instance exports what is asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from benchmarks.fleet.prometheus import Prometheus, Sample
from benchmarks.steady import ROOT

DASHBOARDS = tuple(ROOT / "packaging/grafana" / name for name in ("ksmd-ctl.json", "ksmd-ctl-fleet.json"))
#: Grafana's own words, as it would put them in with everything chosen.
_WORDS = {"$__rate_interval": "1m", "$job": ".*", "$instance": ".*", "$cluster": ".*", "$zone": ".*", "$pool": ".*"}
_METRIC = re.compile(r"\b(?:\w+:)?(?:ksmd?|process)_\w+(?::\w+)?|\bup\b|\bALERTS\b")
#: Panels of what is not made wrong with any host.
_NOTHING_WRONG = ("Refused configuration", "Other programs that write knobs", "Audits that failed in an hour")


@dataclass(frozen=True, slots=True)
class Asked:
    """A query of a panel and what came."""

    dashboard: str
    panel: str
    query: str
    came: list[Sample]


def expressions() -> Iterator[tuple[str, str, str]]:
    """Dashboard, panel and query of each query of all dashboards."""
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                query = target["expr"]
                for word, value in _WORDS.items():
                    query = query.replace(word, value)
                yield path.stem, panel["title"], query


def ask_all(prometheus: Prometheus) -> list[Asked]:
    """Ask all of them.

    :raises ValueError: Prometheus refuses one
    """
    return [Asked(*one, prometheus.query(one[2])) for one in expressions()]


def wrongly_empty(asked: Collection[Asked], exported: Collection[str]) -> list[str]:
    """Queries that came to nothing although all that they ask for is exported.

    :param exported: names of samples that some instance has, and of recorded ones
    """
    said = []
    for one in asked:
        names = set(_METRIC.findall(re.sub(r'"[^"]*"', '""', one.query)))
        if not one.came and one.panel not in _NOTHING_WRONG and names <= set(exported):
            said.append(f"{one.dashboard}, {one.panel}: {one.query}")
    return said
