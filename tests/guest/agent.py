# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs one job inside a guest; the host speaks to it over a virtio-serial port.

The guest speaks in frames: one byte of kind, four bytes of length, then the
content. The kinds: R says that a boot has come as far as this file, and the
host sends the job, one line of JSON; O and E are output and error output as
they come, X is the exit status and comes last.

This file runs under whatever Python the guest has and imports nothing of the
project.
"""

import json
import os
import selectors
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

PORT = "ksmd-ctl.guest"
HEADER = struct.Struct(">cI")
CHUNK = 16384


def main() -> None:
    """Read the job from the port, do it, and send what came of it."""
    port = os.open(_device(), os.O_RDWR)
    _send(port, b"R", b"")
    job = json.loads(_line(port))
    try:
        for tag, path in job["shares"]:
            _share(tag, path)
        for tag, path in job["scratch"]:
            _scratch(tag, path)
    except OSError as error:
        _send(port, b"E", f"mounting the host's folders failed: {error}\n".encode())
        _finish(port, 125)
    _finish(port, _run(port, job))


def _device() -> str:
    # By sysfs, so that no udev rule has to have made a link first.
    for name in Path("/sys/class/virtio-ports").glob("*/name"):
        if name.read_text().strip() == PORT:
            return f"/dev/{name.parent.name}"
    sys.exit(f"no virtio-serial port is named {PORT}")


def _line(port: int) -> bytes:
    text = b""
    while not text.endswith(b"\n"):
        text += os.read(port, CHUNK)
    return text


def _share(tag: str, path: str) -> None:
    os.makedirs(path, exist_ok=True)
    _mount("9p", tag, path, "trans=virtio,version=9p2000.L,msize=262144")


def _scratch(tag: "str | None", path: str) -> None:
    """Make `path` the host's folder of that tag, its changes kept in memory only."""
    work = Path("/run/ksmd-ctl-guest") / path.strip("/").replace("/", "-")
    lower = path
    if tag is not None:
        lower = str(work / "lower")
        _share(tag, lower)
    for part in ("upper", "work"):
        os.makedirs(work / part)
    os.makedirs(path, exist_ok=True)
    _mount("overlay", "scratch", path, f"lowerdir={lower},upperdir={work}/upper,workdir={work}/work")


def _mount(kind: str, device: str, path: str, options: str) -> None:
    command = ["mount", "-t", kind, "-o", options, device, path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(done.stderr.strip())


def _run(port: int, job: "dict[str, Any]") -> int:
    try:
        child = subprocess.Popen(
            job["command"],
            cwd=job["cwd"],
            env=job["environment"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        # As a shell has it: 127 is not found, 126 is found and not to be run.
        _send(port, b"E", f"{job['command'][0]}: {error.strerror}\n".encode())
        return 127 if isinstance(error, FileNotFoundError) else 126
    assert child.stdout
    assert child.stderr
    pipes = {child.stdout.fileno(): b"O", child.stderr.fileno(): b"E"}
    ended = os.pidfd_open(child.pid)
    with selectors.PollSelector() as selector:
        for pipe in pipes:
            os.set_blocking(pipe, False)
            selector.register(pipe, selectors.EVENT_READ)
        selector.register(ended, selectors.EVENT_READ)
        # The host says nothing more, so a port that can be read is a host that is gone.
        selector.register(port, selectors.EVENT_READ)
        while True:
            ready = {key.fd for key, _ in selector.select()}
            if port in ready:
                _power_off()
            for pipe in ready & pipes.keys():
                if not _forward(port, pipe, pipes[pipe]):
                    selector.unregister(pipe)
            if ended in ready:
                break
    # What outlives the command may hold its pipes open: take what is there, no more.
    for pipe, kind in pipes.items():
        while _forward(port, pipe, kind):
            pass
    status = child.wait()
    return 128 - status if status < 0 else status


def _forward(port: int, pipe: int, kind: bytes) -> bool:
    try:
        data = os.read(pipe, CHUNK)
    except BlockingIOError:
        return False
    if data:
        _send(port, kind, data)
    return bool(data)


def _send(port: int, kind: bytes, content: bytes) -> None:
    data = memoryview(HEADER.pack(kind, len(content)) + content)
    while data:
        data = data[os.write(port, data) :]


def _finish(port: int, status: int) -> None:
    os.sync()  # what the job wrote to a shared folder is the host's from here on
    _send(port, b"X", str(status).encode())
    signal.pause()  # the host ends the guest


def _power_off() -> None:
    Path("/proc/sysrq-trigger").write_text("o")
    signal.pause()


if __name__ == "__main__":
    main()
