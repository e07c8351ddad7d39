# SPDX-License-Identifier: GPL-2.0-or-later
"""C library calls that Python does not offer. Sources: the man page of each call.

Beside `ksmd_ctl.kernel.libnuma` the only file that uses ctypes.
"""

from __future__ import annotations

import ctypes
import functools
import mmap as mmap_module
import os

__all__ = [
    "MADV_DODUMP",
    "MADV_DONTDUMP",
    "MADV_DONTNEED",
    "MADV_MERGEABLE",
    "MADV_NOHUGEPAGE",
    "MADV_UNMERGEABLE",
    "MAP_ANONYMOUS",
    "MAP_FIXED_NOREPLACE",
    "MAP_NORESERVE",
    "MAP_PRIVATE",
    "PAGE_SIZE",
    "PROT_NONE",
    "PROT_READ",
    "PROT_WRITE",
    "PR_SET_MEMORY_MERGE",
    "PR_SET_PDEATHSIG",
    "address_of",
    "load",
    "madvise",
    "mmap",
    "mprotect",
    "munmap",
    "prctl",
    "process_vm_writev",
    "store",
    "view",
]

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

PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")

_MAP_FAILED = ctypes.c_void_p(-1).value


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
