# SPDX-License-Identifier: GPL-2.0-or-later
"""Boots a guest under QEMU, with KVM where it works, and runs one job in it.

One socket joins the host to the agent in the guest. The guest's console goes
nowhere near it, so output arrives as the command wrote it.
"""

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tests.guest import agent, cache, kvm
from tests.guest.errors import Failure, lost

# Enough for what Debian and wheels are compiled for. Each feature more is a
# module more that is loaded at boot; without rdrand, the first getrandom waits.
CPU = "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+rdrand,-svm"
KVM = ("-accel", "kvm", "-cpu", "host")
EMULATION = (
    # One thread: with one for each CPU, QEMU 7.2 runs old instructions while a kernel changes its own code on another
    # CPU, and now and then a guest panics ("Oops: int3").
    *("-accel", "tcg,thread=single"),
    *("-cpu", CPU),
)
NO_DEVICES = "sata=off,smbus=off,i8042=off"
# Drivers of emulated devices that nothing here uses; loading them takes seconds.
UNUSED_MODULES = ("button", "evdev", "i6300esb", "iTCO_wdt", "lpc_ich", "pcspkr", "powernow_k8", "qemu_fw_cfg")
KERNEL_WORDS = (
    # A guest that oopses is lost at once, and QEMU ends with it.
    "oops=panic",
    "panic=-1",
    # Removable memory in the zone that it can be taken from again.
    "memhp_default_state=online_movable",
    f"modprobe.blacklist={','.join(UNUSED_MODULES)}",
)
# All that a command finds in its environment; a guest adds nothing of its own.
ENVIRONMENT = {
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "USER": "root",
}
CONSOLE_LINES = 2000
GRACE = 5.0


@dataclass(frozen=True, slots=True)
class Node:
    """One NUMA node of a guest: its memory in MiB, how many CPUs it has, and what memory can be taken offline."""

    memory: int
    cpus: int
    removable: int = 0


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of the host that the guest sees at the same path.

    A share is written through to the host; any other folder may be written
    too, but what is written is gone with the guest.
    """

    path: Path
    share: bool
    exported: bool = True


@dataclass(frozen=True, slots=True)
class Job:
    """What to run in the guest, and where.

    After each of so many reboots, which the command asks for itself, it is run anew.
    """

    command: Sequence[str]
    cwd: Path
    environment: Mapping[str, str]
    folders: Sequence[Folder]
    reboots: int = 0

    def as_json(self) -> bytes:
        """Return the job as the line that the agent reads."""
        tags = [(_tag(i) if f.exported else None, f) for i, f in enumerate(self.folders)]
        job = {
            "command": list(self.command),
            "cwd": str(self.cwd),
            "environment": dict(self.environment),
            "scratch": [(tag, str(f.path)) for tag, f in tags if not f.share],
            "shares": [(tag, str(f.path)) for tag, f in tags if f.share],
        }
        return json.dumps(job).encode() + b"\n"


def machine(nodes: Sequence[Node], job: Job, devices: Sequence[str] = ()) -> list[str]:
    """Return QEMU's arguments for these nodes, for the folders of a job, and for further devices."""
    fixed = sum(node.memory for node in nodes)
    removable = sum(node.removable for node in nodes)
    words = [
        *(KVM if kvm.works() else EMULATION),
        # Else the host's KSM would merge the guest's memory.
        *("-machine", f"mem-merge=off,{NO_DEVICES}"),
        *("-m", f"{fixed}M,slots={len(nodes)},maxmem={fixed + removable}M" if removable else f"{fixed}M"),
        *("-smp", str(sum(node.cpus for node in nodes))),
        *(() if job.reboots else ("-no-reboot",)),
    ]
    first = 0
    for number, node in enumerate(nodes):
        numa = f"node,nodeid={number}"
        if node.memory:
            words += ["-object", f"memory-backend-ram,id=node{number},size={node.memory}M"]
            numa += f",memdev=node{number}"
        if node.cpus:
            numa += f",cpus={first}-{first + node.cpus - 1}"
            first += node.cpus
        words += ["-numa", numa]
        if node.removable:  # as a DIMM: no firmware or early allocation is ever in it
            words += ["-object", f"memory-backend-ram,id=dimm{number},size={node.removable}M"]
            words += ["-device", f"pc-dimm,memdev=dimm{number},node={number}"]
    for number, folder in enumerate(job.folders):
        if folder.exported:
            access = "" if folder.share else ",readonly=on"
            path = str(folder.path).replace(",", ",,")
            words += [
                "-virtfs",
                f"local,path={path},mount_tag={_tag(number)},security_model=none,multidevs=remap{access}",
            ]
    # An IOMMU has to be there before the devices behind it.
    return [*(word for device in devices for word in ("-device", device)), *words]


def run(build: Callable[[list[str]], list[str]], job: Job, timeout: float) -> int:
    """Boot a guest, run the job, pass its output on, and return its exit status.

    `build` makes the command that boots, from the arguments that give QEMU the
    agent's port. Raise a Failure where the guest ends without a status.
    """
    here, there = socket.socketpair()
    with here:
        with there:
            port = [
                *("-chardev", f"socket,id=agent,fd={there.fileno()}"),
                *("-device", "virtio-serial-pci,id=agentbus"),
                *("-device", f"virtserialport,bus=agentbus.0,chardev=agent,name={agent.PORT}"),
            ]
            guest = subprocess.Popen(
                build(port),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[there.fileno()],
                start_new_session=True,  # so that the guest can be ended as a whole
            )
        try:
            return _talk(guest, here, job, time.monotonic() + timeout)
        finally:
            _end(guest)


def _talk(guest: "subprocess.Popen[bytes]", here: socket.socket, job: Job, deadline: float) -> int:
    assert guest.stdout is not None
    console = Console()
    frames = Frames()
    boots = 0
    with selectors.DefaultSelector() as selector:
        selector.register(here, selectors.EVENT_READ)
        selector.register(guest.stdout, selectors.EVENT_READ)
        # Both end with QEMU; what the console says last may come after the port has closed.
        while selector.get_map():
            for key, _ in selector.select(deadline - time.monotonic()):
                data = _read(key.fd)
                if not data:
                    selector.unregister(key.fileobj)
                elif key.fileobj is guest.stdout:
                    console.add(data)
                else:
                    for kind, content in frames.add(data):
                        if kind == b"X":
                            return int(content)
                        if kind == b"R":
                            boots += 1
                            if boots > 1 + job.reboots:
                                raise console.lost("it has booted again")
                            here.sendall(job.as_json())
                            continue
                        _pass_on(sys.stdout.buffer if kind == b"O" else sys.stderr.buffer, content)
            if time.monotonic() >= deadline:
                raise console.lost("no exit status in time; --timeout gives it more")
    raise console.lost(console.last_words())


class Frames:
    """Takes the agent's frames out of a stream of bytes."""

    def __init__(self) -> None:
        self._rest = b""

    def add(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Take more of the stream and yield each frame, kind and content, now whole."""
        self._rest += data
        size = agent.HEADER.size
        while len(self._rest) >= size:
            kind, length = agent.HEADER.unpack_from(self._rest)
            if len(self._rest) < size + length:
                return
            yield kind, self._rest[size : size + length]
            self._rest = self._rest[size + length :]


class Console:
    """The last lines of a guest's console, kept to explain a loss."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque([""], maxlen=CONSOLE_LINES)

    def add(self, data: bytes) -> None:
        """Take more of what the console said."""
        first, *rest = data.decode(errors="replace").replace("\r", "").split("\n")
        self._lines[-1] += first
        self._lines.extend(rest)

    def last_words(self) -> str:
        """Return the line that says best why the guest ended."""
        lines = [line.strip() for line in self._lines if line.strip()]
        panics = [line for line in lines if "Kernel panic" in line]
        return (panics or lines or ["it ended without a word"])[-1]

    def lost(self, why: str) -> Failure:
        """Return the failure of a lost guest, its console written where a person can read it."""
        path = cache.folder() / "lost-console.log"
        path.write_text("\n".join(self._lines) + "\n")
        return lost(f"the guest is lost: {why}", f"read the end of its console in {path}")


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, agent.CHUNK)
    except ConnectionResetError:  # QEMU has ended and had not read all of the job
        return b""


def _tag(number: int) -> str:
    return f"folder{number}"


def _pass_on(stream: BinaryIO, content: bytes) -> None:
    stream.write(content)
    stream.flush()


def _end(guest: "subprocess.Popen[bytes]") -> None:
    """End the guest and whatever booted it; its process group is its own."""
    assert guest.stdout is not None
    with guest.stdout as console:
        for signum in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(guest.pid, signum)
            except ProcessLookupError:
                break
            if _closed(console.fileno(), time.monotonic() + GRACE):
                break
    guest.wait()


def _closed(console: int, deadline: float) -> bool:
    """Return whether the last process that writes to the console is gone by then.

    Whether a process group is empty would be known later: only when process 1
    has reaped what virtme-run left to it.
    """
    with selectors.DefaultSelector() as selector:
        selector.register(console, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if selector.select(left) and not os.read(console, agent.CHUNK):
                return True
    return False
