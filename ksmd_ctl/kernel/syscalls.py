# SPDX-License-Identifier: GPL-2.0-or-later
"""C library calls that Python does not offer. Sources: the man page of each call.

Beside `ksmd_ctl.kernel.libnuma` the only file that uses ctypes.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap as mmap_module
import os

MADV_DONTNEED = 4
MADV_MERGEABLE = 12
MADV_UNMERGEABLE = 13
MADV_NOHUGEPAGE = 15
MADV_DONTDUMP = 16
MADV_DODUMP = 17
MAP_PRIVATE = 0x02
MAP_ANONYMOUS = 0x20
MAP_NORESERVE = 0x4000
MAP_FIXED_NOREPLACE = 0x100000
PROT_NONE = 0
PROT_READ = 1
PROT_WRITE = 2
PR_SET_PDEATHSIG = 1
PR_SET_MEMORY_MERGE = 67

_MAP_FAILED = ctypes.c_void_p(-1).value


#: No C library has perf_event_open: its number by architecture (unistd.h).
_PERF_EVENT_OPEN = {
    "x86_64": 298,
    "aarch64": 241,
    "riscv64": 241,
    "loongarch64": 241,
    "s390x": 331,
    "ppc64le": 319,
}
# Those of newer calls are the same everywhere.
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_CLOEXEC = 1
_FSCONFIG_CMD_CREATE = 6
_PERF_FLAG_FD_CLOEXEC = 8


class _iovec(ctypes.Structure):
    _fields_ = (("iov_base", ctypes.c_void_p), ("iov_len", ctypes.c_size_t))


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.madvise.restype = ctypes.c_int
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    ]
    libc.mmap.restype = ctypes.c_void_p
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.mprotect.restype = ctypes.c_int
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.munmap.restype = ctypes.c_int
    libc.prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]
    libc.prctl.restype = ctypes.c_int
    libc.process_vm_writev.argtypes = [
        ctypes.c_int,
        ctypes.POINTER(_iovec),
        ctypes.c_ulong,
        ctypes.POINTER(_iovec),
        ctypes.c_ulong,
        ctypes.c_ulong,
    ]
    libc.process_vm_writev.restype = ctypes.c_ssize_t
    return libc


def _oserror(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")


def mmap(address: int, length: int, protection: int, flags: int) -> int:
    """mmap(2) of anonymous memory; its address.

    :raises OSError: EEXIST with MAP_FIXED_NOREPLACE where something is mapped, ENOMEM, ...
    """
    found = _libc().mmap(address, length, protection, flags | MAP_ANONYMOUS, -1, 0)
    if found is None or found == _MAP_FAILED:
        raise _oserror("mmap")
    return int(found)


def munmap(address: int, length: int) -> None:
    """munmap(2)."""
    if _libc().munmap(address, length) < 0:
        raise _oserror("munmap")


def madvise(address: int, length: int, advice: int) -> None:
    """madvise(2)."""
    if _libc().madvise(address, length, advice) < 0:
        raise _oserror("madvise")


def mprotect(address: int, length: int, protection: int) -> None:
    """mprotect(2)."""
    if _libc().mprotect(address, length, protection) < 0:
        raise _oserror("mprotect")


def prctl(option: int, value: int = 0) -> int:
    """prctl(2) with one argument, the others 0."""
    found = int(_libc().prctl(option, value, 0, 0, 0))
    if found < 0:
        raise _oserror("prctl")
    return found


def process_vm_writev(pid: int, local: int, remote: int, length: int) -> int:
    """process_vm_writev(2) with one local and one remote range of the same length; the bytes written.

    :raises OSError: EFAULT where the local buffer can't be read, EPERM, ESRCH, ...
    """
    here = _iovec(local, length)
    there = _iovec(remote, length)
    written = int(_libc().process_vm_writev(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0))
    if written < 0:
        raise _oserror("process_vm_writev")
    return written


def store(address: int, content: bytes) -> None:
    """Write to the caller's own memory. Nothing checks the address: a wrong one ends the process."""
    ctypes.memmove(address, content, len(content))


def load(address: int, length: int) -> bytes:
    """Read the caller's own memory, as unchecked as `store`."""
    return ctypes.string_at(address, length)


def view(address: int, length: int) -> ctypes.Array[ctypes.c_char]:
    """The caller's own memory as a buffer that can be written to; unchecked as `store`."""
    return (ctypes.c_char * length).from_address(address)


def address_of(memory: mmap_module.mmap) -> int:
    """Where a mapping of the standard library lies."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _syscall(call: str, number: int, *arguments: int | bytes | None) -> int:
    words = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    result: int = _libc().syscall(ctypes.c_long(number), *words)
    if result < 0:
        raise _oserror(call)
    return result


def perf_event_open(attributes: bytes, pid: int, cpu: int) -> int:
    """perf_event_open(2) for one event outside of any group: a descriptor.

    :param attributes: a struct perf_event_attr
    :raises OSError: the kernel refused, or nobody knows the number of the call on this architecture (ENOSYS)
    """
    number = _PERF_EVENT_OPEN.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), "perf_event_open")
    return _syscall("perf_event_open", number, attributes, pid, cpu, -1, _PERF_FLAG_FD_CLOEXEC)


def mount_unattached(filesystem: str) -> int:
    """A file system mounted nowhere: a descriptor of its root; it goes with the descriptor (fsopen(2), since 5.2).

    :raises OSError: the kernel refused
    """
    context = _syscall("fsopen", _FSOPEN, filesystem.encode(), _CLOEXEC)
    try:
        _syscall("fsconfig", _FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return _syscall("fsmount", _FSMOUNT, context, _CLOEXEC, 0)
    finally:
        os.close(context)
