# SPDX-License-Identifier: GPL-2.0-or-later
"""Boots a Debian kernel over the machine's own file system, by virtme-ng."""

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.guest.boot import ENVIRONMENT, KERNEL_WORDS, Folder, Job, Node, machine, run
from tests.guest.errors import lacking
from tests.guest.kernels import Kernel
from tests.guest.tools import CHECKOUT, HERE, require

# The guest may write here; it writes to its own memory.
OVERLAID = ("/etc", "/home", "/lib", "/opt", "/root", "/srv", "/tmp", "/usr", "/var")


def run_on_kernel(
    kernel: Kernel,
    nodes: Sequence[Node],
    command: Sequence[str],
    shares: Sequence[Path],
    append: Sequence[str],
    devices: Sequence[str],
    timeout: float,
) -> int:
    """Run a command as root on this kernel; return its exit status."""
    virtme = _virtme_run()
    require(["qemu-system-x86_64", "busybox", "modprobe", "file", "udevadm"])
    job = Job(
        command,
        cwd=CHECKOUT,
        environment=_environment(),
        # The checkout is there already; only its changes have to go elsewhere.
        folders=[Folder(CHECKOUT, share=False, exported=False), *(Folder(p, share=True) for p in shares)],
    )
    script = shlex.join([sys.executable, str(HERE / "agent.py")])

    def build(port: list[str]) -> list[str]:
        return [
            *(virtme, "--kimg", str(kernel.image), "--mods", "auto"),
            *("--disable-kvm", "--disable-microvm", "--force-9p", "--show-boot-console"),
            *(word for path in OVERLAID if Path(path).is_dir() for word in ("--overlay-rwdir", path)),
            *(word for option in (*KERNEL_WORDS, *append) for word in ("--kopt", option)),
            *("--script-sh", f"exec {script}"),
            *("--qemu-opts", *machine(nodes, job, devices), *port),
        ]

    return run(build, job, timeout)


def _virtme_run() -> str:
    own = CHECKOUT / ".venv" / "bin" / "virtme-run"
    found = str(own) if own.exists() else shutil.which("virtme-run")
    if found is None:
        raise lacking(
            "virtme-ng is neither in the checkout's .venv nor on PATH",
            "run make setup, or pip install virtme-ng",
        )
    return found


def _environment() -> dict[str, str]:
    """Return the project's environment, as a shell in the checkout would have it."""
    venv = CHECKOUT / ".venv"
    if not venv.is_dir():
        return ENVIRONMENT
    return ENVIRONMENT | {"PATH": f"{venv}/bin:{ENVIRONMENT['PATH']}", "VIRTUAL_ENV": str(venv)}
