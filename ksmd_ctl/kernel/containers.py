# SPDX-License-Identifier: GPL-2.0-or-later
"""Containers of Docker and Podman outside of pods: which one a process is in by its cgroup, and what that is called.

Neither daemon is asked. The cgroup has the container's identifier, and files that only root writes say what it is
called. A user's own containers have no such files.

Sources: moby's daemon/oci_linux.go (cgroups under both drivers) and daemon/container/container.go (config.v2.json),
podman's libpod/container_internal_linux.go and libpod/oci_conmon_linux.go (machine.slice, libpod_parent, conmon's own
cgroup), containers/storage's containers.go (containers.json, and volatile-containers.json of those with --rm).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ksmd_ctl.regularfile import read_regular

_ID: Final = "(?P<{0}>[0-9a-f]{{64}})"
# Only what root has made: below a unit, a container or LXC's cgroup anybody may have called theirs so.
_PLACE: Final = re.compile(
    rf"(?:/[^/]+\.slice)*/(?P<engine>docker|libpod)-{_ID.format('scope')}\.scope(?:/|$)"
    rf"|(?:/system\.slice/docker\.service)?/docker/{_ID.format('docker')}(?:/|$)"
    rf"|/libpod_parent/(?:[0-9a-f]{{64}}/)?libpod-{_ID.format('podman')}(?:/|$)",
    re.ASCII,
)
_NAME: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,254}", re.ASCII)
# As `docker ps` and `podman ps` show it.
_SHORT: Final = 12
_MOST_BYTES: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class ContainerPlace:
    """Where a container is.

    :ivar engine: ``docker`` or ``podman``
    :ivar id: 64 hexadecimal digits
    """

    engine: str
    id: str


def container_of(cgroup: str) -> ContainerPlace | None:
    """The container that a cgroup is in, None where neither Docker nor Podman has made it."""
    match = _PLACE.match(cgroup)
    if match is None:
        return None
    if match["docker"] or match["engine"] == "docker":
        return ContainerPlace("docker", match["docker"] or match["scope"])
    return ContainerPlace("podman", match["podman"] or match["scope"])


class ContainerNames:
    """What root's containers of this host are called, as of the first time that one is asked for."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._found: dict[ContainerPlace, str] = {}
        self._podmans: dict[str, str] | None = None

    def label(self, place: ContainerPlace) -> str:
        """``docker/NAME`` or ``podman/NAME``; its short identifier instead where no file says what it is called."""
        if place not in self._found:
            name = self._dockers_name(place.id) if place.engine == "docker" else self._podmans_name(place.id)
            self._found[place] = name if _NAME.fullmatch(name) else place.id[:_SHORT]
        return f"{place.engine}/{self._found[place]}"

    def _dockers_name(self, container: str) -> str:
        document = _load(self._root / "var/lib/docker/containers" / container / "config.v2.json")
        name = document.get("Name") if isinstance(document, dict) else None
        return name.removeprefix("/") if isinstance(name, str) else ""

    def _podmans_name(self, container: str) -> str:
        if self._podmans is None:
            # A folder for each storage driver that was ever used.
            files = (self._root / "var/lib/containers/storage").glob("*-containers/*containers.json")
            self._podmans = {key: name for path in files for key, name in _names(_load(path))}
        return self._podmans.get(container, "")


def short_label(place: ContainerPlace) -> str:
    """Of a container that has no name which root could know."""
    return f"{place.engine}/{place.id[:_SHORT]}"


def _load(path: Path) -> object:
    try:
        return json.loads(read_regular(path, _MOST_BYTES))
    except (OSError, ValueError):
        # Removed meanwhile, of another form, or kept elsewhere: it has no name then.
        return None


def _names(document: object) -> list[tuple[str, str]]:
    found = []
    for one in document if isinstance(document, list) else []:
        names = one.get("names") if isinstance(one, dict) else None
        if isinstance(names, list) and names and isinstance(names[0], str):
            found.append((str(one.get("id")), names[0]))
    return found
