# SPDX-License-Identifier: GPL-2.0-or-later
"""The service without privilege, and its broker, in a guest without systemd."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from tests.service.running import LIMIT_SECONDS, PROGRAM, Service, configure, free_port, until

NOBODY = 65534
# The broker, but with what its children need loaded already: emulated, that takes each of them longer than its work.
BROKER = """
import sys
from ksmd_ctl.kernel import inventory, migrate, unshare
from ksmd_ctl.privileged import unmerging
from ksmd_ctl.privileged.broker import main
sys.exit(main(sys.argv[1:]))
"""


@contextmanager
def unprivileged_service(configuration: str, log: IO[str] | None = None) -> Iterator[Service]:
    """As the package runs it: the service as a user without any privilege, and the broker as root.

    :param log: where the service logs to
    """
    with ExitStack() as stack:
        # Where the interpreter or the checkout is, perhaps only root can go.
        for path in (*Path(sys.executable).resolve().parents, *Path(PROGRAM).parents):
            mode = stat.S_IMODE(path.stat().st_mode)
            if not mode & 0o001:
                stack.callback(path.chmod, mode)
                path.chmod(mode | 0o555)
        yield stack.enter_context(_running(configuration, log))


@contextmanager
def _running(configuration: str, log: IO[str] | None) -> Iterator[Service]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        broker_socket = folder / "broker"
        config = configure(folder, configuration, broker_socket=str(broker_socket))
        os.chown(folder, NOBODY, NOBODY)
        port = free_port()
        broker = [sys.executable, "-I", "-c", BROKER, "--user", str(NOBODY)]
        nobody = ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups", "--bounding-set", "-all"]
        daemon = [PROGRAM, "daemon", "--config", str(config), "--metrics-listen", f"127.0.0.1:{port}"]
        with subprocess.Popen([*broker, "--socket", str(broker_socket), "--idle-seconds", "3600"]) as privileged:
            try:
                until("the broker", lambda: broker_socket.exists() or None, LIMIT_SECONDS)
                with subprocess.Popen([*nobody, *daemon], stderr=log, text=True) as process:
                    running = Service(process, folder, port)
                    try:
                        until("the service", running.answers, LIMIT_SECONDS)
                        yield running
                        assert running.end() == 0
                    finally:
                        if process.poll() is None:
                            process.kill()
            finally:
                privileged.kill()
