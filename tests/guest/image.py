# SPDX-License-Identifier: GPL-2.0-or-later
"""A whole Debian system that boots under systemd, as an image in the cache.

Its tree is made by mmdebstrap. Each guest writes to a layer of its own over
the image, which goes with the guest.
"""

import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.guest import apt, cache
from tests.guest.boot import ENVIRONMENT, KERNEL_WORDS, Folder, Job, Node, machine, run
from tests.guest.errors import lacking
from tests.guest.tools import CHECKOUT, HERE, call, require, words

SUITE = "trixie"
PACKAGES = HERE / "image-packages.txt"
AGENT = HERE / "agent.py"
SIZE = "4G"  # sparse, so only what is used takes room

# Only what a guest boots from: a small initramfs is read and unpacked sooner.
INITRAMFS_MODULES = ("virtio_pci", "virtio_blk", "ext4")
EXCLUDED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/i18n/*")
# Timers, terminals and services that no test needs at boot.
MASKED = ("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer",
          "fstrim.timer", "getty@tty1.service", "serial-getty@ttyS0.service", "e2scrub_reap.service",
          "systemd-tpm2-setup-early.service", "prometheus.service")  # fmt: skip

TARGET = """\
[Unit]
Description=A system that has come up, and then the agent
Requires=multi-user.target
Wants=ksmd-ctl-guest.service
After=multi-user.target
AllowIsolate=yes
"""
SERVICE = """\
[Unit]
Description=Runs the job that the host sends
After=multi-user.target

[Service]
# Here and not on demand: by the time a folder is mounted, its device has to be known.
ExecStartPre=modprobe -a 9pnet_virtio overlay
ExecStart=/usr/bin/python3 /usr/local/lib/ksmd-ctl-guest/agent.py
StandardOutput=journal+console
"""


@dataclass(frozen=True, slots=True)
class System:
    """A system ready to boot: its disk, and the kernel and initramfs from it."""

    disk: Path
    kernel: Path
    initramfs: Path


def fetch() -> System:
    """Return the system, built anew where it is missing or its recipe has changed."""
    recipe = hashlib.sha256()
    for path in (Path(__file__), PACKAGES, AGENT):
        recipe.update(path.read_bytes())
    name = f"systems/{SUITE}-{recipe.hexdigest()[:12]}"
    tree = cache.keep(name, _build, f"building a Debian {SUITE} system")
    for older in tree.parent.glob(f"{SUITE}-*"):
        if older != tree:
            shutil.rmtree(older, ignore_errors=True)
    return System(tree / "disk", tree / "vmlinuz", tree / "initrd.img")


def run_in_system(
    system: System,
    nodes: Sequence[Node],
    command: Sequence[str],
    shares: Sequence[Path],
    append: Sequence[str],
    devices: Sequence[str],
    timeout: float,
    reboots: int = 0,
) -> int:
    """Run a command as root once the system is up, and again after each reboot; return its exit status."""
    require(["qemu-system-x86_64"])
    job = Job(
        command,
        cwd=CHECKOUT,
        environment=ENVIRONMENT,
        folders=[Folder(CHECKOUT, share=False), *(Folder(path, share=True) for path in shares)],
        reboots=reboots,
    )
    line = ["root=/dev/vda", "rw", "console=ttyS0", "quiet", *KERNEL_WORDS,
            "systemd.unit=ksmd-ctl-guest.target", *append]  # fmt: skip

    def build(port: list[str]) -> list[str]:
        return [
            *("qemu-system-x86_64", "-machine", "q35", "-nic", "none"),
            *("-display", "none", "-serial", "stdio", "-nodefaults"),
            *("-kernel", str(system.kernel), "-initrd", str(system.initramfs)),
            *("-append", " ".join(line)),
            *("-drive", f"file={system.disk},format=raw,if=virtio,snapshot=on,cache=unsafe"),
            *machine(nodes, job, devices),
            *port,
        ]

    return run(build, job, timeout)


def _build(folder: Path) -> None:
    require(["mmdebstrap", "mke2fs"])
    if os.geteuid() != 0:
        raise lacking(
            "building a system image needs root",
            f"as root: KSMD_CTL_GUEST_CACHE={cache.folder()} tests/guest/run --system {SUITE} --fetch",
        )
    with tempfile.TemporaryDirectory(prefix=".tree-", dir=folder, ignore_cleanup_errors=True) as name:
        tree = Path(name)
        _bootstrap(tree)
        _install_agent(tree)
        _settle(tree)
        for file in ("vmlinuz", "initrd.img"):
            found = next((tree / "boot").glob(f"{file}-*"))
            shutil.copy(found, folder / file)
        # Without a journal: a guest's writes are thrown away, not recovered.
        options = ("-q", "-t", "ext4", "-O", "^has_journal", "-d", tree)
        call(["mke2fs", *options, folder / "disk", SIZE], hint="see that the cache's disk has room")


def _bootstrap(tree: Path) -> None:
    modules = " ".join(INITRAMFS_MODULES)
    # Before the kernel is installed, or its initramfs would be made without it.
    setup = (
        'mkdir -p "$1/etc/initramfs-tools/conf.d" && '
        'echo MODULES=list > "$1/etc/initramfs-tools/conf.d/guest" && '
        f'printf "%s\\n" {modules} > "$1/etc/initramfs-tools/modules"'
    )
    options = [
        # With mounts of its own, so that a build cut short leaves none behind.
        "--mode=unshare",
        "--variant=minbase",
        f"--include={','.join(words(PACKAGES))}",
        "--aptopt=APT::Install-Recommends false",
        *(f"--dpkgopt=path-exclude={path}" for path in EXCLUDED),
        f"--setup-hook={setup}",
    ]
    call(["mmdebstrap", *options, SUITE, tree, apt.source(SUITE)], hint=apt.HINT)


def _install_agent(tree: Path) -> None:
    library = tree / "usr/local/lib/ksmd-ctl-guest"
    library.mkdir(parents=True)
    shutil.copy(AGENT, library)
    units = tree / "etc/systemd/system"
    (units / "ksmd-ctl-guest.target").write_text(TARGET)
    (units / "ksmd-ctl-guest.service").write_text(SERVICE)
    for unit in MASKED:
        (units / unit).symlink_to("/dev/null")


def _settle(tree: Path) -> None:
    """Leave nothing for a first boot to do: every boot of this image is one."""
    (tree / "etc/hostname").write_text("guest\n")
    (tree / "etc/machine-id").write_text(uuid.uuid4().hex + "\n")
    for folder in ("etc", "var"):
        (tree / folder / ".updated").touch()
