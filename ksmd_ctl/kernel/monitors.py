# SPDX-License-Identifier: GPL-2.0-or-later
"""Finds the QMP sockets of a running QEMU, and connects to one (QEMU's QMP specification, qemu(1): -qmp, -mon).

A command line says what its owner wants, also another machine's socket. So a connection only counts if the process
itself listens at its other end (SO_PEERCRED, unix(7): who called listen(2)). And a path is looked up where the process
sees it, in its own root and working folder.

libvirt opens the socket of a domain itself, hands QEMU the descriptor, and keeps the one connection that a monitor
takes.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from ksmd_ctl.codec import load
from ksmd_ctl.errors import Absent, Denied, HostError, KsmdError, Refused, errno_text
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.kernel.machines import guest_name
from ksmd_ctl.kernel.proc_pid import Held, printable

#: How long a monitor may take to accept a connection, and to send its greeting.
CONNECT_SECONDS: Final = 5.0
_WHAT: Final = "connecting to the QEMU monitor"
# libvirt's src/qemu/qemu_command.c: the name of the monitor's character device.
_LIBVIRT_MONITOR: Final = "charmonitor"


@dataclass(frozen=True, slots=True)
class Monitor:
    """A QMP monitor by a command line.

    :ivar path: of its socket as the process sees it; empty where it has none
    :ivar abstract: the path is a name in the abstract namespace (unix(7))
    :ivar unusable: why nobody can connect there and be sure whose it is, as a phrase; empty where that can be tried
    """

    path: str
    abstract: bool = False
    unusable: str = ""


def _parts(text: str) -> Iterator[tuple[str, str]]:
    """Keys and values of an option (util/qemu-option.c); the first may have no key. A comma in a value is doubled."""
    for number, part in enumerate(text.replace(",,", "\0").split(",")):
        key, equals, value = part.partition("=")
        value = value.replace("\0", ",")
        if equals:
            yield key, value
        elif number == 0:
            yield "", key.replace("\0", ",")
        else:
            # A flag: ``server``, or ``nowait``.
            yield key, "on"


def _options(command: Sequence[str], *names: str) -> Iterator[str]:
    for word, value in pairwise(command):
        if word.removeprefix("-").removeprefix("-") in names and word.startswith("-"):
            yield value


def monitors(command: Sequence[str]) -> tuple[Monitor, ...]:
    """The QMP monitors of a QEMU's command line, in its order; one is there once."""
    devices = {}
    for text in _options(command, "chardev"):
        device = dict(_parts(text))
        devices[device.get("id", "")] = device
    found: list[Monitor] = []
    for text in _options(command, "qmp", "qmp-pretty"):
        kind, colon, rest = text.partition(":")
        if kind == "chardev":
            found.append(_of_device(devices.get(rest)))
        elif kind == "unix" and colon:
            found.append(_of_device({"": "socket", **dict(_parts(f"path={rest}"))}))
        else:
            found.append(Monitor("", unusable=f"it is at {kind}, where nobody can tell whose it is"))
    for text in _options(command, "mon"):
        option = dict(_parts(text))
        if option.get("mode") == "control":
            found.append(_of_device(devices.get(option.get("chardev") or option.get("", ""))))
    return tuple(dict.fromkeys(found))


def _of_device(device: dict[str, str] | None) -> Monitor:
    if device is None or device.get("") != "socket" or not (path := device.get("path")):
        if device is not None and "fd" in device:
            return Monitor("", unusable="another program has opened its socket, and keeps the connection")
        return Monitor("", unusable="it has no socket in the file system")
    if device.get("server") != "on":
        return Monitor(path, unusable="QEMU connects to it itself (no server=on)")
    return Monitor(path, device.get("abstract") == "on")


def libvirt_domain(command: Sequence[str]) -> str:
    """The domain that libvirt runs with a command line; empty where it is not libvirt's."""
    devices = [dict(_parts(text)) for text in _options(command, "chardev")]
    if not any(device.get("id") == _LIBVIRT_MONITOR for device in devices):
        return ""
    return printable(guest_name(command)) or "DOMAIN"


def backend_names(command: Sequence[str]) -> tuple[str, ...]:
    """What a command line calls the machine's memory backends; as libvirt writes it, an object is JSON."""
    found = []
    for text in _options(command, "object"):
        try:
            option = load(text.encode()) if text.startswith("{") else dict(_parts(text))
        except ValueError:
            continue
        if isinstance(option, dict):
            kind, name = option.get("qom-type", option.get("")), option.get("id")
            if str(kind).startswith("memory-backend-") and isinstance(name, str):
                found.append(name)
    return tuple(found)


def connect(process: ProcessId, monitor: Monitor, root: Path = Path("/")) -> socket.socket:
    """A connection to a monitor of a process. It may block in the file system: run it in a child.

    :raises Absent: there is no such socket, or nobody listens there
    :raises Refused: somebody else listens there, or QEMU answers nobody else
    :raises Denied: a privilege is missing
    :raises NoSuchProcess: the process is gone
    """
    if monitor.unusable:
        raise Absent(_WHAT, f"{printable(monitor.path) or 'the monitor'}: {monitor.unusable}", path=monitor.path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with Held(process, root) as held, ExitStack() as opened:
            sock.settimeout(CONNECT_SECONDS)
            sock.connect(f"\0{monitor.path}" if monitor.abstract else _address(process, monitor, root, opened))
            held.verify()
            pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if pid != process.pid:
                why = f"not process {process.pid} listens at {printable(monitor.path)}, but process {pid}"
                raise Refused(_WHAT, why, hint="--method inject does without the monitor")
    except OSError as error:
        sock.close()
        raise _connect_error(monitor, error) from error
    except BaseException:
        sock.close()
        raise
    return sock


def _address(process: ProcessId, monitor: Monitor, root: Path, opened: ExitStack) -> str:
    """The address of a monitor's socket, for as long as `opened` lasts. By a descriptor: an address has 107 bytes."""
    folder = root / "proc" / str(process.pid) / ("root" if monitor.path.startswith("/") else "cwd")
    node = os.open(folder / monitor.path.lstrip("/"), os.O_PATH | os.O_CLOEXEC)
    opened.callback(os.close, node)
    return f"/proc/self/fd/{node}"


def _connect_error(monitor: Monitor, error: OSError) -> KsmdError:
    if isinstance(error, TimeoutError | BlockingIOError):
        why = f"{printable(monitor.path)} does not answer: a monitor takes one connection at a time"
        return Refused(_WHAT, why, hint="end the other connection, or use --method inject")
    kind: type[HostError] = Denied if isinstance(error, PermissionError) else Absent
    why = f"{printable(monitor.path)}: {errno_text(error.errno or 0)}"
    return kind(_WHAT, why, path=monitor.path, errno=error.errno)
