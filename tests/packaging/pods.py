# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs the image as docs/container.md says: podman with a storage of its own, and runc, as root.

runc, because crun refuses a host with cgroups of both versions; vfs, because overlayfs need not work on overlayfs.
"""

from __future__ import annotations

import resource
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

IMAGE = "localhost/ksmd-ctl"
CAPABILITIES = "SYS_ADMIN,SYS_NICE,SYS_PTRACE,DAC_READ_SEARCH,CHOWN"
BROKER = "ksmd-ctl broker --standalone --user=ksmd-ctl --socket=/run/ksmd-ctl/broker.socket"
KNOBS = "/sys/kernel/mm/ksm"
TIMEOUT_SECONDS = 60.0


@dataclass
class Podman:
    """Containers of one test; `close` ends them all."""

    folder: Path
    names: list[str] = field(default_factory=list)

    def __call__(self, *words: str, check: bool = True) -> str:
        options = ["--root", self.folder / "storage", "--runroot", self.folder / "run", "--storage-driver", "vfs"]
        options += ["--cgroup-manager", "cgroupfs", "--events-backend", "none", "--runtime", "runc"]
        done = subprocess.run(
            ["podman", *options, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
        assert done.returncode == 0 or not check, f"podman {' '.join(words)}: {done.stdout}"
        return done.stdout

    def run(self, name: str, options: str, command: str = "") -> str:
        """Start a container; podman's own limits may be more than this host allows."""
        files, processes = (resource.getrlimit(kind)[1] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))
        nproc = min(processes, 4096) if processes > 0 else 4096
        limits = f"--ulimit nofile={min(files, 1024)} --ulimit nproc={nproc}"
        self.names.append(name)
        words = f"run -d --name {name} {limits} --network none --read-only --read-only-tmpfs=false --cap-drop all"
        words += f" --security-opt no-new-privileges {options} {IMAGE}:{self.version} {command}"
        return self(*words.split())

    version = ""

    def load(self, archive: Path) -> None:
        self.version = archive.name.removeprefix("ksmd-ctl_").removesuffix(".oci.tar")
        self("load", "-q", "-i", str(archive))

    def close(self) -> None:
        for name in reversed(self.names):
            self("rm", "-f", "-t", "0", name, check=False)
        self.names.clear()


def wait_for(what: str, there: Callable[[], bool], seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < until, what
        time.sleep(0.2)


@dataclass
class Pod:
    """The two containers over shared folders.

    :param knobs: how the broker has the knobs mounted, empty for not at all
    """

    podman: Podman
    folder: Path
    knobs: str = "rw"

    def __post_init__(self) -> None:
        for name in ("run", "state", "conf.d"):
            (self.folder / name).mkdir(exist_ok=True)

    def _mounts(self, knobs: str) -> str:
        shared = {"run": "/run/ksmd-ctl", "state": "/var/lib/ksmd-ctl", "conf.d": "/etc/ksmd-ctl/conf.d"}
        words = [f"-v {self.folder / name}:{path}" for name, path in shared.items()]
        words += ["--pid host", "-v /sys/fs/cgroup:/sys/fs/cgroup:ro,rslave"]
        return " ".join([*words, f"-v {KNOBS}:{KNOBS}:{knobs}"] if knobs else words)

    def start_broker(self) -> None:
        options = f"--user 0:0 --cap-add {CAPABILITIES} --cgroupns private {self._mounts(self.knobs)}"
        self.podman.run("broker", options, BROKER)

    def start_service(self) -> None:
        self.podman.run("service", self._mounts("ro"))

    def said(self, name: str) -> str:
        return self.podman("logs", name)

    def command(self, *words: str, check: bool = True) -> str:
        """A command in the service's container."""
        return self.podman("exec", "service", *words, check=check)
