# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest of another processor: Debian's arm64 kernel and programs on QEMU's virtual machine, always emulated.

All of it is unpacked from packages and never installed: the guest boots from an initramfs and has no disk. What a job
says comes by the serial console, and so does its exit status.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.guest import cache
from tests.guest.apt import Suite
from tests.guest.errors import lost
from tests.guest.kernels import PART
from tests.guest.qemu import fetch_programs
from tests.guest.tools import CHECKOUT, call, require

SUITE, ARCHITECTURE = "trixie", "arm64"
PACKAGES = (
    "busybox-static",
    "coreutils",
    "libnuma1",
    "python3",
    "python3-hypothesis",
    "python3-psutil",
    "python3-pytest",
    "util-linux",
)
#: The first has SVE, BTI and pointer authentication, the other one has none of them.
CPUS = ("max,pauth-impdef=on", "cortex-a72")
INIT = """\
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t tmpfs tmp /tmp
/bin/busybox --install -s /bin
export HOME=/root LANG=C.UTF-8 PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin
ip link set lo up
cd /checkout && sh /job </dev/null
echo "exit status $?"
poweroff -f
"""
# The kernel may say something before the line ends.
_SAID = re.compile(r"exit status (\d+)")


def kernel_and_root() -> tuple[Path, Path]:
    """The kernel's image, and an initramfs with the programs, from the cache or else from the archive."""
    tree = cache.keep("aarch64/system", _build, f"fetching a Debian {SUITE} for {ARCHITECTURE}")
    return tree / "vmlinuz", tree / "root.cpio"


def compiled(source: Path, folder: Path, *options: str) -> Path:
    """A program for this machine, made in a folder beside a copy of its source."""
    root = fetch_programs("aarch64/gcc", SUITE, "gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross")
    shutil.copy(source, folder)
    program = folder / "-".join((source.stem, *options))
    command = ["/usr/bin/aarch64-linux-gnu-gcc", "-O1", "-w", "-pthread", "-o", f"/mnt/{program.name}"]
    call(_chrooted(root, folder, [*command, f"/mnt/{source.name}", *options]), hint="this needs root")
    return program


def run(
    script: str, extra: Path, *, cpu: str = CPUS[0], timeout_seconds: float = 1800, console: Path | None = None
) -> int:
    """Boot a guest and run a shell script in a copy of the checkout; its exit status. What it says is passed on.

    :param extra: a folder whose files the guest finds below /extra
    :param console: all that the console says is written there, too
    """
    kernel, base = kernel_and_root()
    qemu = fetch_programs("aarch64/qemu", SUITE, "qemu-system-arm")
    with tempfile.TemporaryDirectory(prefix="ksmd-ctl-aarch64-") as name:
        folder = Path(name)
        shutil.copy(kernel, folder / "vmlinuz")
        _pack(folder, base, script, extra)
        words = ["/usr/bin/qemu-system-aarch64", "-machine", "virt,mem-merge=off", "-accel", "tcg,thread=multi"]
        words += ["-cpu", cpu, "-smp", "2", "-m", "2048", "-nic", "none", "-display", "none", "-nodefaults"]
        words += ["-serial", "stdio", "-no-reboot", "-kernel", "/mnt/vmlinuz", "-initrd", "/mnt/initramfs"]
        words += ["-append", "console=ttyAMA0 quiet oops=panic panic=-1 rdinit=/init"]
        return _watched(_chrooted(qemu, folder, words), timeout_seconds, console)


def _watched(command: Sequence[str | Path], timeout_seconds: float, console: Path | None) -> int:
    status, last = None, ""
    with subprocess.Popen(
        ["timeout", str(timeout_seconds), *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as guest:
        assert guest.stdout
        try:
            for line in guest.stdout:
                last = line.strip() or last
                if console:
                    with console.open("a") as written:
                        written.write(line)
                if said := _SAID.match(line):
                    status = int(said[1])
                elif status is None:
                    sys.stdout.write(line.replace("\r", ""))
        finally:
            guest.terminate()
    if status is None:
        raise lost(f"the guest is lost: {last}", "see what it said before")
    return status


def _chrooted(root: Path, folder: Path, words: Sequence[str]) -> list[str | Path]:
    script = 'mount --bind "$0" "$1/mnt" && exec chroot "$@"'
    return ["unshare", "--mount", "sh", "-c", script, folder, root, *words]


def _build(tree: Path) -> None:
    require(["cpio"])
    root = tree / "root"
    with tempfile.TemporaryDirectory(prefix=".apt-", dir=tree.parent) as folder:
        archive = Suite(SUITE, Path(folder), ARCHITECTURE)
        archive.update()
        parts = [name for name in archive.depends("linux-image-arm64") if PART.fullmatch(name)]
        archive.unpack([name for name in parts if name.startswith("linux-image-")], tree / "kernel")
    with tempfile.TemporaryDirectory(prefix=".apt-", dir=tree.parent) as folder:
        archive = Suite(SUITE, Path(folder), ARCHITECTURE)
        archive.update()
        unneeded = ("debconf", "perl-base", "dpkg")
        archive.unpack([name for name in archive.depends(*PACKAGES) if name not in unneeded], root)
    image = next(path for path in sorted((tree / "kernel").rglob("vmlinuz*")) if path.is_file())
    shutil.copy(image, tree / "vmlinuz")
    shutil.rmtree(tree / "kernel")
    for name in ("doc", "man", "locale", "info"):
        shutil.rmtree(root / "usr/share" / name, ignore_errors=True)
    for name in ("bin", "sbin", "lib"):
        if not (root / name).exists():
            (root / name).symlink_to(f"usr/{name}")
    for name in ("checkout", "dev", "etc", "extra", "proc", "root", "sys", "tmp", "var/tmp"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "bin/python").symlink_to("python3")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    init = root / "init"
    init.write_text(INIT)
    init.chmod(0o755)
    _cpio(root, tree / "root.cpio")
    shutil.rmtree(root)


def _pack(folder: Path, base: Path, script: str, extra: Path) -> None:
    """The initramfs: the programs, followed by an archive of what is this guest's own."""
    own = folder / "own"
    (own / "checkout").mkdir(parents=True)
    (own / "job").write_text(script)
    shutil.copytree(extra, own / "extra")
    for name in ("ksmd_ctl", "tests", "pyproject.toml"):
        path = CHECKOUT / name
        if path.is_dir():
            shutil.copytree(path, own / "checkout" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, own / "checkout" / name)
    _cpio(own, folder / "own.cpio")
    with open(folder / "initramfs", "wb") as whole:
        for part in (base, folder / "own.cpio"):
            with open(part, "rb") as content:
                shutil.copyfileobj(content, whole)
            whole.write(bytes(-whole.tell() % 4))
    shutil.rmtree(own)
    os.unlink(folder / "own.cpio")


def _cpio(root: Path, target: Path) -> None:
    with open(target, "wb") as written:
        script = "find . -print0 | cpio --null --create --format=newc --quiet --owner=0:0"
        subprocess.run(["sh", "-c", script], cwd=root, stdout=written, check=True)
