# SPDX-License-Identifier: GPL-2.0-or-later
"""A real Prometheus (Debian's, taken out of its package) that scrapes the hosts with the packaged rules."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlencode

from benchmarks.fleet.hosts import Spec, labels
from benchmarks.steady import ROOT, free_port

RULES = ROOT / "packaging/prometheus/ksmd-ctl.rules.yml"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_PATIENCE_SECONDS = 60.0

#: Labels of a sample, and its value.
Sample = tuple[dict[str, str], float]


def shortened(rules: str, most_seconds: int) -> str:
    """The rules, with alerts that wait no longer than this; nothing else is changed."""

    def less(found: re.Match[str]) -> str:
        seconds = int(found[2]) * _UNITS[found[3]]
        return f"{found[1]}{min(seconds, most_seconds)}s"

    return re.sub(r"^( +for: )(\d+)([smhd])$", less, rules, flags=re.MULTILINE)


class Prometheus:
    """It, until the end of the block.

    :param wait_seconds: how long alerts wait at most
    """

    def __init__(self, specs: Sequence[Spec], folder: Path, interval_seconds: int, wait_seconds: int) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self.port = free_port()
        (folder / "rules.yml").write_text(shortened(RULES.read_text(), wait_seconds))
        config = {
            "global": {
                "scrape_interval": f"{interval_seconds}s",
                "scrape_timeout": f"{interval_seconds}s",
                "evaluation_interval": f"{interval_seconds}s",
            },
            "rule_files": [str(folder / "rules.yml")],
            "scrape_configs": [
                {
                    "job_name": "ksmd-ctl",
                    "static_configs": [{"targets": [one.address], "labels": labels(one)} for one in specs],
                }
            ],
        }
        # JSON is YAML.
        (folder / "prometheus.json").write_text(json.dumps(config))
        program = subprocess.run(
            [ROOT / "tools/deb-program", "prometheus", "prometheus"], capture_output=True, text=True, check=True
        ).stdout.strip()
        log = self._stack.enter_context((folder / "prometheus.log").open("w"))
        self.process = subprocess.Popen(
            [program, f"--config.file={folder}/prometheus.json", f"--storage.tsdb.path={folder}/data",
             f"--web.listen-address=127.0.0.1:{self.port}", "--web.console.templates=/nonexistent",
             "--web.console.libraries=/nonexistent"],
            stderr=log, stdout=log,
        )  # fmt: skip

    def __enter__(self) -> Prometheus:
        limit = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                self.get("/api/v1/query", query="1")
                return self
            except (OSError, ValueError, http.client.HTTPException):
                if self.process.poll() is not None or time.monotonic() > limit:
                    self.__exit__(None, None, None)
                    raise
                time.sleep(0.1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        self.process.wait(timeout=_PATIENCE_SECONDS)
        self._stack.close()

    def get(self, path: str, **parameters: str) -> Any:
        """What the API answers.

        :raises ValueError: it refuses
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_PATIENCE_SECONDS)
        connection.request("GET", f"{path}?{urlencode(parameters)}")
        answer = json.loads(connection.getresponse().read())
        connection.close()
        if answer["status"] != "success":
            raise ValueError(f"{parameters}: {answer.get('error')}")
        return answer["data"]

    def query(self, expression: str, at: float | None = None) -> list[Sample]:
        """An instant vector, without the names of metrics."""
        when = {} if at is None else {"time": f"{at:.3f}"}
        found = self.get("/api/v1/query", query=expression, **when)["result"]
        return [
            ({key: value for key, value in one["metric"].items() if key != "__name__"}, float(one["value"][1]))
            for one in found
        ]

    def raw(self, expression: str) -> list[list[float]]:
        """All samples of each series of a range."""
        found = self.get("/api/v1/query", query=expression)["result"]
        return [[float(value) for _, value in one["values"]] for one in found]
