# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether a process can be made to make system calls, as far as that can be told without attaching to it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from ksmd_ctl.errors import Denied, Refused
from ksmd_ctl.kernel.architecture import architecture
from ksmd_ctl.kernel.proc_pid import process_file_error
from ksmd_ctl.kernel.ptrace import need_ptrace
from ksmd_ctl.kernel.reading import read_part
from ksmd_ctl.kernel.threads import choose

_INIT: Final = 1
_ANOTHER: Final = "choose another process"
_YAMA: Final = "proc/sys/kernel/yama/ptrace_scope"
_NOBODY: Final = "3"
# Of an ELF file's header (elf(5)): its class, its machine, and their values here.
_CLASS_AT, _MACHINE_AT, _HEADER_BYTES = 4, 18, 20
_CLASS_64: Final = 2

#: What is left where a process can't be made to make a call.
AT_START: Final = "have it made mergeable, or not, when it is started"


def need_traceable(pid: int, what: str, root: Path = Path("/")) -> None:
    """
    :param what: what it is for, for errors
    :raises Absent: it can't be done on this machine
    :raises Denied: this process may trace nobody
    :raises NoSuchProcess, ReadError: it has exited, or can't be looked at
    :raises Refused: it is init or this program, runs a program of another machine, is traced, or does not stop
    """
    architecture()
    if pid == _INIT:
        raise Refused(what, f"process {pid} is init, with which the host ends", hint=_ANOTHER)
    # Who asks for it is the parent.
    if pid in (os.getpid(), os.getppid()):
        raise Refused(what, f"process {pid} is ksmd-ctl itself", hint=_ANOTHER)
    need_ptrace(what)
    _need_scope(what, root)
    _need_program(pid, what, root)
    choose(pid, what, root)


def _need_scope(what: str, root: Path) -> None:
    path = root / _YAMA
    try:
        scope = path.read_text().strip()
    except OSError:
        # A kernel without Yama.
        return
    if scope == _NOBODY:
        why = "kernel.yama.ptrace_scope is 3: nobody may trace a process, not even root"
        hint = "it can't be lowered before the next boot: look for it in /etc/sysctl.d"
        raise Denied(what, why, hint=hint, path=str(path), value=scope)


def _need_program(pid: int, what: str, root: Path) -> None:
    path = root / "proc" / str(pid) / "exe"
    try:
        header = read_part(path, 0, _HEADER_BYTES)
    except FileNotFoundError:
        # A kernel thread, or it is gone.
        return
    except OSError as error:
        raise process_file_error(pid, path, error) from error
    machine = int.from_bytes(header[_MACHINE_AT:], "little")
    if header[:4] != b"\x7fELF" or (header[_CLASS_AT], machine) == (_CLASS_64, architecture().elf_machine):
        return
    of = "32-bit" if header[_CLASS_AT] != _CLASS_64 else f"another machine's (ELF machine {machine})"
    raise Refused(what, f"its program is {of}", hint=AT_START)
