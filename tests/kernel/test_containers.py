# SPDX-License-Identifier: GPL-2.0-or-later
"""Containers outside of pods by their cgroups and by root's files; the layouts are in container_layouts.toml."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from ksmd_ctl.kernel.containers import ContainerNames, ContainerPlace, container_of
from ksmd_ctl.kernel.machines import Membership, Origin, membership
from tests.kernel.trees import write_tree

LAYOUTS = tomllib.loads((Path(__file__).parent / "container_layouts.toml").read_text())["layout"]
ID, OTHER = "0a" * 32, "0b" * 32
#: As Podman 4.3 writes it.
PODMANS = [{"id": ID, "names": ["web"], "image": "", "layer": OTHER, "metadata": "{}", "flags": {"Volatile": True}}]


def of(cgroup: str, root: Path, command: list[str] | None = None) -> Membership:
    return membership(Origin(cgroup, command or ["cat"], "cat", 0, True, command is not None), {}, ContainerNames(root))


def named(root: Path, container: str, name: str) -> Path:
    """A tree in which both have a container of this identifier."""
    podmans = json.dumps([{"id": container, "names": [name]}])
    return write_tree(
        root,
        {
            f"var/lib/docker/containers/{container}/config.v2.json": json.dumps({"ID": container, "Name": f"/{name}"}),
            "var/lib/containers/storage/overlay-containers/containers.json": podmans,
        },
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=[layout["about"] for layout in LAYOUTS])
def test_recorded_layouts_give_the_container(layout: dict[str, Any], tmp_path: Path) -> None:
    text, engine, container = layout["cgroup"].strip() + "\n", layout["engine"], layout["id"]
    prefix = f"user-{layout['user']}/" if "user" in layout else ""
    # Who is nobody but a user says nothing of this host's containers, whatever that one's identifier.
    name = container[:12] if prefix else "web"
    assert of(text, named(tmp_path, container, "web")).group == f"{prefix}{engine}/{name}"
    assert of(text, tmp_path / "nowhere").group == f"{prefix}{engine}/{container[:12]}"


@pytest.mark.parametrize(
    "cgroup",
    [
        f"/system.slice/httpd.service/docker/{ID}",
        f"/system.slice/httpd.service/system.slice/docker-{ID}.scope",
        f"/lxc/205/docker/{ID}",
        f"/lxc/205/libpod_parent/libpod-{ID}",
        f"/user.slice/user-1000.slice/session-3.scope/libpod-{ID}.scope",
        f"/machine.slice/libpod-conmon-{ID}.scope",
        "/libpod_parent/conmon",
        "/docker/0a0a",
        f"/docker-{ID}",
        "/",
    ],
)
def test_cgroups_that_no_engine_made_are_no_containers(cgroup: str) -> None:
    assert container_of(cgroup) is None


def test_the_unit_stays_what_systemd_calls_it(tmp_path: Path) -> None:
    found = of(f"0::/system.slice/docker-{ID}.scope\n", tmp_path)
    assert (found.group, found.unit) == ("docker/0a0a0a0a0a0a", f"docker-{ID}.scope")


def test_a_virtual_machine_stands_behind_what_it_is_certain_to_be_in(tmp_path: Path) -> None:
    command = ["qemu-system-x86_64", "-name", "web"]
    assert of(f"0::/system.slice/docker-{ID}.scope\n", named(tmp_path, ID, "x"), command).group == "docker-*.scope/web"


def test_files_of_podman_are_of_any_storage_driver_and_of_those_with_rm(tmp_path: Path) -> None:
    storage = "var/lib/containers/storage"
    other = json.dumps([{"id": OTHER, "names": ["db", "old"]}, {"id": "0c" * 32}, 7])
    files = {f"{storage}/vfs-containers/volatile-containers.json": json.dumps(PODMANS)}
    names = ContainerNames(write_tree(tmp_path, {**files, f"{storage}/overlay-containers/containers.json": other}))
    assert names.label(ContainerPlace("podman", ID)) == "podman/web"
    assert names.label(ContainerPlace("podman", OTHER)) == "podman/db"
    assert names.label(ContainerPlace("podman", "0c" * 32)) == "podman/0c0c0c0c0c0c"


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"Name": 7}', '{"Name": "/../x"}', '{"Name": "/a b"}', '{"Name": ""}', "\udcff"]
)
def test_files_that_make_no_sense_name_nothing(text: str, tmp_path: Path) -> None:
    path = tmp_path / f"var/lib/docker/containers/{ID}/config.v2.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert ContainerNames(tmp_path).label(ContainerPlace("docker", ID)) == "docker/0a0a0a0a0a0a"
