# SPDX-License-Identifier: GPL-2.0-or-later
"""The steady cost of the whole service beside Debian's prometheus-node-exporter with only its ksmd collector.

Beside both runs the service without a history (``[history] days = 0``), to see what that costs. All run for the same
time; the services sample each second. Each is scraped every 5 s as Prometheus does it: on a connection that is kept,
with its headers, gzip among them.
CPU is what the scheduler accounts to all threads, in nanoseconds; memory is what the last reading shows.
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = int(os.environ.get("KSMD_CTL_BENCH_SECONDS", "120"))
SETTLE_SECONDS = 10
SCRAPE_SECONDS = 5
OURS, WITHOUT = "ksmd-ctl", "no history"
HEADERS = {
    "User-Agent": "Prometheus/2.53.3",
    "Accept": "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
    "Accept-Encoding": "gzip",
    "X-Prometheus-Scrape-Timeout-Seconds": "5",
}


@dataclass(frozen=True, slots=True)
class Cost:
    cpu_seconds: float
    rss_mib: float
    pss_mib: float


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def cpu_seconds(pid: int) -> float:
    """What all threads used, from /proc/PID/task/TID/schedstat (first field, nanoseconds)."""
    return sum(int(task.read_text().split()[0]) for task in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def memory_mib(pid: int, name: str) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/{pid}/smaps_rollup has no {name}")


def scrape(connection: http.client.HTTPConnection) -> int:
    connection.request("GET", "/metrics", headers=HEADERS)
    return len(connection.getresponse().read())


def wait_for(port: int) -> http.client.HTTPConnection:
    for _ in range(100):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            scrape(connection)
            return connection
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"nothing answers on port {port}")


def measure(processes: dict[str, subprocess.Popen[bytes]], ports: dict[str, int]) -> dict[str, Cost]:
    connections = [wait_for(port) for port in ports.values()]
    for _ in range(SETTLE_SECONDS // SCRAPE_SECONDS):
        for connection in connections:
            scrape(connection)
        time.sleep(SCRAPE_SECONDS)
    before = {name: cpu_seconds(process.pid) for name, process in processes.items()}
    for _ in range(SECONDS // SCRAPE_SECONDS):
        for connection in connections:
            scrape(connection)
        time.sleep(SCRAPE_SECONDS)
    return {
        name: Cost(
            cpu_seconds(process.pid) - before[name],
            memory_mib(process.pid, "Rss"),
            memory_mib(process.pid, "Pss"),
        )
        for name, process in processes.items()
    }


def service(folder: Path, port: int, more: str) -> subprocess.Popen[bytes]:
    folder.mkdir()
    configuration = folder / "ksmd-ctl.toml"
    configuration.write_text(
        'policy = "fixed"\n'
        "[knobs]\n"
        "pages_to_scan = 100\n"
        "[service]\n"
        "sample_interval = 1\n"
        f'socket = "{folder}/socket"\n'
        f'state_directory = "{folder}/state"\n'
        f'runtime_directory = "{folder}/run"\n'
        f"{more}"
    )
    return subprocess.Popen(
        [sys.executable, "-I", "-m", "ksmd_ctl.cli.main", "daemon", "--config", str(configuration),
         "--metrics-listen", f"127.0.0.1:{port}"],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip


def run() -> None:
    exporter = subprocess.run(
        [ROOT / "tools/deb-program", "prometheus-node-exporter", "prometheus-node-exporter"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    ports = {name: free_port() for name in ("node_exporter", OURS, WITHOUT)}
    with tempfile.TemporaryDirectory() as scratch:
        processes = {
            "node_exporter": subprocess.Popen(
                [exporter, "--collector.disable-defaults", "--collector.ksmd",
                 f"--web.listen-address=127.0.0.1:{ports['node_exporter']}"],
                stderr=subprocess.DEVNULL,
            ),
            OURS: service(Path(scratch) / "with", ports[OURS], ""),
            WITHOUT: service(Path(scratch) / "without", ports[WITHOUT], "[history]\ndays = 0\n"),
        }  # fmt: skip
        try:
            costs = measure(processes, ports)
        finally:
            for process in processes.values():
                process.send_signal(signal.SIGTERM)
                process.wait(timeout=10)
    for name, cost in costs.items():
        print(
            f"{name:14} CPU {cost.cpu_seconds * 1000:7.1f} ms in {SECONDS} s, "
            f"RSS {cost.rss_mib:5.1f} MiB, PSS {cost.pss_mib:5.1f} MiB"
        )
    ours, without, theirs = costs[OURS], costs[WITHOUT], costs["node_exporter"]
    print(f"CPU ratio {ours.cpu_seconds / theirs.cpu_seconds:.2f} (mark 1.5, goal 1); RSS mark 30 MiB")
    ratio, more = ours.cpu_seconds / without.cpu_seconds, ours.rss_mib - without.rss_mib
    print(f"the history: CPU ratio {ratio:.2f} (mark 1.1), {more:.1f} MiB more (mark 2 MiB)")
