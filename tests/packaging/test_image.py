# SPDX-License-Identifier: GPL-2.0-or-later
"""The image: small, the same twice, and run as two containers on this host's KSM. Two minutes, most of it building."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.packaging.building import ROOT, build, need
from tests.packaging.pods import Pod, Podman, wait_for

BUILD = ROOT / "packaging/image/build"
#: What a node pulls and keeps.
MOST_BYTES = 120_000_000
PAGES = 4000
CONFIGURATION = """\
policy = "fixed"

[knobs]
run = 1
pages_to_scan = 2000

[domains.gold]
cgroups = ["/tenants/gold/*"]

[domains.silver]
cgroups = ["/tenants/silver/*"]
"""
#: Each content twice in a tenant, and once more twice in the other.
TENANT = f"""\
import mmap, time
memory = mmap.mmap(-1, {PAGES} * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(12)
for page in range({PAGES}):
    memory[page * 4096 : page * 4096 + 8] = (page % {PAGES // 2}).to_bytes(8, "little")
time.sleep(600)
"""


@dataclass(frozen=True)
class Image:
    archive: Path
    digest: str

    @property
    def layers(self) -> list[str]:
        with tarfile.open(self.archive) as archive:
            manifest = json.load(archive.extractfile(f"blobs/sha256/{self.digest.partition(':')[2]}"))  # type: ignore[arg-type]
        return [layer["digest"].partition(":")[2] for layer in manifest["layers"]]

    def files(self) -> dict[str, tarfile.TarInfo]:
        (layer,) = self.layers
        with (
            tarfile.open(self.archive) as archive,
            tarfile.open(fileobj=archive.extractfile(f"blobs/sha256/{layer}")) as tree,
        ):
            return {item.name: item for item in tree}


def build_image(folder: Path, package: Path) -> Image:
    if os.geteuid() != 0:
        pytest.skip("building an image takes root")
    need("buildah", "mmdebstrap")
    done = subprocess.run([BUILD, "--deb", package, folder], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    archive, digest = done.stdout.split()
    return Image(Path(archive), digest)


@pytest.fixture(scope="module")
def image(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Image:
    return build_image(tmp_path_factory.mktemp("image"), package)


@pytest.fixture(scope="module")
def loaded(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    need("podman", "runc")
    podman = Podman(tmp_path_factory.mktemp("podman"))
    podman.load(image.archive)
    yield podman
    # Its files are many, and pytest keeps those of three sessions.
    shutil.rmtree(podman.folder, ignore_errors=True)


@pytest.fixture
def pod(loaded: Podman, ksm_host: Path, tmp_path: Path) -> Iterator[Pod]:
    pod = Pod(loaded, tmp_path)
    pod.configure(CONFIGURATION)
    try:
        yield pod
    finally:
        loaded.close()


def number(name: str) -> int:
    return int(Path("/sys/kernel/mm/ksm", name).read_text())


def test_what_makes_no_sense_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    for words in ([], ["--sweet", "1", str(tmp_path)]):
        done = subprocess.run([BUILD, *words], capture_output=True, text=True, timeout=10, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("image: ")
        assert "\nhint: packaging/image/build" in done.stderr


def test_its_configuration_is_good(capsys: pytest.CaptureFixture[str]) -> None:
    from ksmd_ctl.cli.main import main

    assert main(["daemon", "--check-config", "--config", str(ROOT / "packaging/image/ksmd-ctl.toml")]) == 0


@pytest.mark.image
def test_it_is_small_of_one_layer_and_has_no_compiler(image: Image) -> None:
    files = image.files()
    assert sum(item.size for item in files.values()) < MOST_BYTES
    assert image.archive.stat().st_size < MOST_BYTES
    programs = {Path(name).name for name in files if re.fullmatch(r"usr/s?bin/[^/]+", name)}
    assert {"ksmd-ctl", "python3"} <= programs
    assert not programs & {"gcc", "cc", "as", "ld", "make", "apt-get", "gdb", "pip3"}
    assert not [name for name in files if re.match(r"(var/(log|cache)|tmp)/.|usr/share/(doc|man)/.", name)]
    assert (files["var/lib/ksmd-ctl"].uid, files["var/lib/ksmd-ctl"].gid) == (19753, 19753)


@pytest.mark.image
def test_the_same_sources_and_packages_give_the_same_digest(image: Image, package: Path, tmp_path: Path) -> None:
    second = build(tmp_path / "deb")
    assert second.read_bytes() == package.read_bytes()
    again = build_image(tmp_path / "image", second)
    assert again.digest == image.digest
    lists = [next(one.archive.parent.glob("*.packages")).read_text() for one in (image, again)]
    assert lists[0] == lists[1]
    assert re.search(r"^ksmd-ctl \S+ all$", lists[0], re.MULTILINE)


def start_tenants(pod: Pod) -> None:
    (pod.folder / "tenant.py").write_text(TENANT)
    for name in ("gold", "silver"):
        options = f"--user 1000:1000 --cgroup-parent /tenants/{name} -v {pod.folder}/tenant.py:/tenant.py:ro"
        pod.start_tenant(name, options, "python3 /tenant.py")


def doctor(pod: Pod, container: str) -> dict[str, str]:
    """What the doctor finds in a container, and how bad that is."""
    words = "ksmd-ctl doctor --json --no-contents --interval 0.5"
    said = pod.command(words, check=False, container=container)
    found, _ = json.JSONDecoder().raw_decode(said[said.index("{") :])
    return {one["code"]: one["severity"] for one in found["findings"]}


@pytest.mark.image
@pytest.mark.ksm
def test_two_containers_are_merged_seen_and_the_knobs_put_back(pod: Pod) -> None:
    before = number("run"), number("pages_to_scan")
    start_tenants(pod)
    # The service first: it waits for the broker.
    pod.start_service()
    wait_for("it waits", lambda: "waiting for the broker" in pod.said("service"))
    pod.start_broker()
    wait_for("all is merged", lambda: number("pages_sharing") >= 2 * PAGES - PAGES // 2)
    assert (number("run"), number("pages_to_scan")) == (1, 2000)
    assert "held       run 1, pages_to_scan 2000" in pod.status()
    for container in ("service", "broker"):
        found = doctor(pod, container)
        assert found["no-systemd"] == "note"
        assert not {"processes-hidden", "knobs-read-only", "limits-hidden"} & set(found)
    shared = json.loads(pod.command("ksmd-ctl sharing --by domain --json"))
    assert {"gold", "silver"} <= {group["group"] for group in shared["groups"]}
    url = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:19753/metrics').read().decode())"
    metrics = pod.command(f'python3 -c "{url}"')
    assert re.search(rf"^ksm_pages_sharing {number('pages_sharing')}(\.0)?$", metrics, re.MULTILINE)

    # Killed, the broker comes back and finds its socket taken by nobody.
    kill(pod, "broker")
    pod.podman("start broker")
    assert "gold" in pod.command("ksmd-ctl sharing --by domain")
    # Killed, the service leaves the knobs; the next one knows what they were before the first.
    kill(pod, "service")
    assert number("pages_to_scan") == 2000
    pod.podman("start service")
    wait_for("it serves", lambda: "held" in pod.command("ksmd-ctl status", check=False))

    # Both are told to end at once, and it doesn't matter which is first.
    pod.stop()
    wait_for("both have ended", lambda: not pod.running("broker") and not pod.running("service"))
    assert (number("run"), number("pages_to_scan")) == before
    assert "restored what was found before the start" in pod.said("service")


@pytest.mark.image
@pytest.mark.ksm
def test_a_container_puts_back_what_a_killed_service_left(pod: Pod) -> None:
    before = number("run"), number("pages_to_scan")
    pod.start_broker()
    pod.start_service()
    wait_for("it holds them", lambda: number("pages_to_scan") == 2000)
    kill(pod, "service")
    assert number("pages_to_scan") == 2000
    assert "restored what was found at first in this boot" in pod.restore()
    assert (number("run"), number("pages_to_scan")) == before


def kill(pod: Pod, name: str) -> None:
    os.kill(int(pod.podman(f"inspect -f '{{{{.State.Pid}}}}' {name}")), signal.SIGKILL)
    wait_for(f"{name} has ended", lambda: not pod.running(name))


@pytest.mark.image
@pytest.mark.ksm
def test_knobs_on_a_read_only_sysfs_are_said_with_what_to_mount(pod: Pod) -> None:
    pod.knobs = "ro"
    pod.start_broker()
    pod.start_service()
    wait_for("it has ended", lambda: not pod.running("service"))
    assert "/sys/kernel/mm/ksm is mounted read-only" in pod.said("broker")
    said = pod.said("service")
    assert "EROFS" in said
    assert "hint: " in said
    assert "/sys/kernel/mm/ksm mounted writable at the same path" in said
    assert number("run") == 0
    assert doctor(pod, "broker")["knobs-read-only"] == "blocks merging"


@pytest.mark.image
@pytest.mark.ksm
def test_a_container_with_nothing_of_the_host_is_told_what_it_lacks(pod: Pod) -> None:
    pod.start_tenant("bare", "", "python3 -c 'import time; time.sleep(600)'")
    found = doctor(pod, "bare")
    assert {"processes-hidden", "knobs-read-only", "limits-hidden", "no-systemd"} <= set(found)
