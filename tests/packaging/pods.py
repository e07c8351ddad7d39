# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs the image by the commands of docs/container.md, with podman's storage and the host's directories elsewhere.

runc, because crun refuses a host with cgroups of both versions; vfs, because overlayfs need not work on overlayfs.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.packaging.building import ROOT

TIMEOUT_SECONDS = 60.0


def documented() -> list[str]:
    """The commands for root of docs/container.md, each in one line."""
    text = (ROOT / "docs/container.md").read_text().replace("\\\n", "")
    blocks = re.findall(r"^ *```console\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    return [command for block in blocks for command in re.findall(r"^ *# (.+)", block, re.MULTILINE)]


@dataclass
class Podman:
    """Containers of one test; `close` ends them all.

    :ivar image: as `podman load` calls it
    """

    folder: Path
    image: str = ""
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        files, processes = (resource.getrlimit(kind)[1] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))
        # Its own limits may be more than this host allows.
        limits = {"nofile": min(files, 1024), "nproc": min(processes, 4096) if processes > 0 else 4096}
        ulimits = json.dumps([f"{name}={most}:{most}" for name, most in limits.items()])
        storage = self.folder / "storage"
        (self.folder / "containers.conf").write_text(
            f"[containers]\ndefault_ulimits = {ulimits}\n[engine]\n"
            'cgroup_manager = "cgroupfs"\nevents_logger = "none"\nruntime = "runc"\n'
            f'static_dir = "{storage}/libpod"\nvolume_path = "{storage}/volumes"\ntmp_dir = "{self.folder}/tmp"\n'
        )
        (self.folder / "storage.conf").write_text(
            f'[storage]\ndriver = "vfs"\ngraphroot = "{storage}"\nrunroot = "{self.folder}/run"\n'
        )

    def shell(self, script: str, check: bool = True) -> str:
        """What a script for bash says; podman in it is this one."""
        variables = {
            "CONTAINERS_CONF": f"{self.folder}/containers.conf",
            "CONTAINERS_STORAGE_CONF": f"{self.folder}/storage.conf",
        }
        done = subprocess.run(
            ["bash", "-ec", script],
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{script}: {done.stdout}"
        return done.stdout

    def __call__(self, words: str, check: bool = True) -> str:
        return self.shell(f"podman {words}", check)

    def load(self, archive: Path) -> None:
        (command,) = (command for command in documented() if command.startswith("podman load"))
        said = self.shell(command.replace(f"dist/{archive.name}", str(archive)))
        self.image = f"ksmd-ctl:{archive.name.removeprefix('ksmd-ctl_').removesuffix('.oci.tar')}"
        assert self.image in said

    def close(self) -> None:
        for name in (*reversed(self.names), "service", "broker"):
            self(f"rm -f -t 0 {name}", check=False)
        self("volume rm -f ksmd-ctl-run", check=False)
        self.names.clear()


def wait_for(what: str, there: Callable[[], bool], seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < until, what
        time.sleep(0.2)


@dataclass
class Pod:
    """The two containers, with the host's directories in a folder of the test.

    :param knobs: how the broker has the knobs mounted
    """

    podman: Podman
    folder: Path
    knobs: str = "rw"

    def __post_init__(self) -> None:
        self._documented("podman volume create", "mkdir")

    def _documented(self, *beginnings: str) -> str:
        """Run the commands that begin so."""
        script = "\n".join(command for command in documented() if command.startswith(beginnings))
        assert script.count("\n") == len(beginnings) - 1, beginnings
        for path in ("/var/lib/ksmd-ctl", "/etc/ksmd-ctl/conf.d"):
            script = re.sub(rf"(?<=[ \"]){path}(?=[: \n]|$)", f"{self.folder}{path}", script)
        return self.podman.shell(script.replace("mm/ksm:rw", f"mm/ksm:{self.knobs}"))

    def configure(self, text: str) -> None:
        (self.folder / "etc/ksmd-ctl/conf.d/test.toml").write_text(text)

    def start_broker(self) -> None:
        self._documented("mounts=", "podman run -d --name broker ")

    def start_service(self) -> None:
        self._documented("mounts=", "podman run -d --name service ")

    def status(self) -> str:
        return self._documented("podman exec service ksmd-ctl status")

    def restore(self) -> str:
        return self._documented("mounts=", "podman run --rm ")

    def stop(self) -> None:
        self._documented("podman kill ")

    def start_tenant(self, name: str, options: str, command: str) -> None:
        """Start another container."""
        self.podman.names.append(name)
        self.podman(f"run -d --name {name} --network none --cap-drop all {options} {self.podman.image} {command}")

    def said(self, name: str) -> str:
        return self.podman(f"logs {name}")

    def command(self, words: str, check: bool = True, container: str = "service") -> str:
        """A command in a container."""
        return self.podman(f"exec {container} {words}", check)

    def running(self, name: str) -> bool:
        return self.podman(f"inspect -f '{{{{.State.Running}}}}' {name}").strip() == "true"
