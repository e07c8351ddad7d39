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
from ctypes import c_char_p, c_int, c_long, c_size_t, c_ssize_t, c_uint, c_uint64, c_ulong, c_void_p

MADV_DONTNEED = 4
MADV_MERGEABLE = 12
MADV_UNMERGEABLE = 13
MADV_HUGEPAGE = 14
MADV_NOHUGEPAGE = 15
MADV_DONTDUMP = 16
MADV_DODUMP = 17
MADV_COLD = 20
MADV_PAGEOUT = 21
MADV_POPULATE_READ = 22
MADV_COLLAPSE = 25
MAP_PRIVATE = 0x02
MAP_ANONYMOUS = 0x20
MAP_NORESERVE = 0x4000
MAP_FIXED_NOREPLACE = 0x100000
MREMAP_MAYMOVE = 1
MREMAP_FIXED = 2
FAN_CLOEXEC = 0x1
FAN_NONBLOCK = 0x2
FAN_MARK_ADD = 0x1
FAN_EVENT_ON_CHILD = 0x08000000
AT_FDCWD = -100
PROT_NONE = 0
PROT_READ = 1
PROT_WRITE = 2
CLONE_NEWCGROUP = 0x02000000
PR_SET_PDEATHSIG = 1
PR_SET_MEMORY_MERGE = 67
PR_GET_MEMORY_MERGE = 68

_MAP_FAILED = c_void_p(-1).value


#: No C library has perf_event_open: its number by architecture (unistd.h).
_PERF_EVENT_OPEN = {
    "x86_64": 298,
    "aarch64": 241,
    "riscv64": 241,
    "loongarch64": 241,
    "s390x": 331,
    "ppc64le": 319,
}
_PTRACE = {"x86_64": 101, "aarch64": 117}
_TGKILL = {"x86_64": 234, "aarch64": 131}
# Those of newer calls are the same everywhere.
_FSOPEN, _FSCONFIG, _FSMOUNT, _PROCESS_MADVISE = 430, 431, 432, 440
_CLOEXEC = 1
_FSCONFIG_CMD_CREATE = 6
_PERF_FLAG_FD_CLOEXEC = 8


#: A number, or memory that the kernel reads or writes.
Data = int | bytes | ctypes.Array[ctypes.c_char]


class _iovec(ctypes.Structure):
    _fields_ = (("iov_base", c_void_p), ("iov_len", c_size_t))


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    iovec_p = ctypes.POINTER(_iovec)
    libc.fanotify_init.argtypes = [c_uint, c_uint]
    libc.fanotify_mark.argtypes = [c_int, c_uint, c_uint64, c_int, c_char_p]
    libc.madvise.argtypes = [c_void_p, c_size_t, c_int]
    libc.mmap.argtypes = [c_void_p, c_size_t, c_int, c_int, c_int, c_long]
    libc.mmap.restype = c_void_p
    libc.mprotect.argtypes = [c_void_p, c_size_t, c_int]
    libc.mremap.argtypes = [c_void_p, c_size_t, c_size_t, c_int, c_void_p]
    libc.mremap.restype = c_void_p
    libc.munmap.argtypes = [c_void_p, c_size_t]
    libc.prctl.argtypes = [c_int, c_ulong, c_ulong, c_ulong, c_ulong]
    libc.process_vm_writev.argtypes = [c_int, iovec_p, c_ulong, iovec_p, c_ulong, c_ulong]
    libc.process_vm_writev.restype = c_ssize_t
    libc.setns.argtypes = [c_int, c_int]
    libc.syscall.restype = c_long
    return libc


def _checked(call: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result


def mmap(address: int, length: int, protection: int, flags: int) -> int:
    """mmap(2) of anonymous memory; its address.

    :raises OSError: EEXIST with MAP_FIXED_NOREPLACE where something is mapped, ENOMEM, ...
    """
    return _mapped("mmap", _libc().mmap(address, length, protection, flags | MAP_ANONYMOUS, -1, 0))


def _mapped(call: str, found: int | None) -> int:
    return _checked(call, -1 if found is None or found == _MAP_FAILED else int(found))


def mremap(address: int, length: int, to: int) -> int:
    """mremap(2): move memory to another address, whatever is mapped there; the new address.

    :raises OSError: EFAULT where nothing is mapped, before 6.17 also where several mappings are, ENOMEM, ...
    """
    return _mapped("mremap", _libc().mremap(address, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, to))


def munmap(address: int, length: int) -> None:
    """munmap(2)."""
    _checked("munmap", _libc().munmap(address, length))


def madvise(address: int, length: int, advice: int) -> None:
    """madvise(2)."""
    _checked("madvise", _libc().madvise(address, length, advice))


def mprotect(address: int, length: int, protection: int) -> None:
    """mprotect(2)."""
    _checked("mprotect", _libc().mprotect(address, length, protection))


def prctl(option: int, value: int = 0) -> int:
    """prctl(2) with one argument, the others 0."""
    return _checked("prctl", _libc().prctl(option, value, 0, 0, 0))


def setns(descriptor: int, kind: int) -> None:
    """setns(2); in the standard library since Python 3.12."""
    _checked("setns", _libc().setns(descriptor, kind))


def knows_memory_merge() -> bool:
    """Whether prctl(PR_SET_MEMORY_MERGE) can be called: a kernel since 6.4, with CONFIG_KSM."""
    try:
        prctl(PR_GET_MEMORY_MERGE)
    except OSError:
        return False
    return True


def process_vm_writev(pid: int, local: int, remote: int, length: int) -> int:
    """process_vm_writev(2) with one local and one remote range of the same length; the bytes written.

    :raises OSError: EFAULT where the local buffer can't be read, EPERM, ESRCH, ...
    """
    here = _iovec(local, length)
    there = _iovec(remote, length)
    return _checked(
        "process_vm_writev", _libc().process_vm_writev(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
    )


def process_madvise(pidfd: int, address: int, length: int, advice: int) -> int:
    """process_madvise(2) (since 5.10) of one range of the process that a pidfd holds; the bytes advised.

    :raises OSError: EINVAL where this kernel does not give other processes that advice, EPERM without CAP_SYS_NICE, ...
    """
    there = _iovec(address, length)
    return _checked(
        "process_madvise",
        _libc().syscall(
            c_long(_PROCESS_MADVISE), c_long(pidfd), ctypes.byref(there), c_long(1), c_long(advice), c_long(0)
        ),
    )


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
    words = [c_long(one) if isinstance(one, int) else one for one in arguments]
    return _checked(call, _libc().syscall(c_long(number), *words))


def perf_event_open(attributes: bytes, pid: int, cpu: int) -> int:
    """perf_event_open(2) for one event outside of any group: a descriptor.

    :param attributes: a struct perf_event_attr
    :raises OSError: the kernel refused, or nobody knows the number of the call on this architecture (ENOSYS)
    """
    number = _PERF_EVENT_OPEN.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), "perf_event_open")
    return _syscall("perf_event_open", number, attributes, pid, cpu, -1, _PERF_FLAG_FD_CLOEXEC)


def ptrace(request: int, tid: int, address: int = 0, data: Data = 0) -> int:
    """ptrace(2), the system call itself: a request that gives a value writes it to `data`.

    :param data: a number, or memory that the kernel reads or writes
    :raises OSError: ESRCH where the thread is gone or not stopped, EPERM, EIO where the kernel lacks the request, ...
    """
    number = _PTRACE.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), "ptrace")
    where = data if isinstance(data, int | bytes) else ctypes.addressof(data)
    return _syscall("ptrace", number, request, tid, address, where)


def ptrace_regset(request: int, tid: int, kind: int, registers: ctypes.Array[ctypes.c_char]) -> int:
    """PTRACE_GETREGSET and PTRACE_SETREGSET: registers of one kind; how many bytes the kernel has of them.

    :raises OSError: as `ptrace`
    """
    described = _iovec(ctypes.addressof(registers), len(registers))
    number = _PTRACE.get(os.uname().machine, -1)
    _syscall("ptrace", number, request, tid, kind, ctypes.addressof(described))
    return int(described.iov_len)


def tgkill(pid: int, tid: int, number: int) -> None:
    """tgkill(2): a signal for one thread.

    :raises OSError: ESRCH where it is gone, EPERM
    """
    _syscall("tgkill", _TGKILL.get(os.uname().machine, -1), pid, tid, number)


def buffer(length: int) -> ctypes.Array[ctypes.c_char]:
    """Memory that a call may write to."""
    return ctypes.create_string_buffer(length)


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


def fanotify_init(flags: int, event_flags: int) -> int:
    """fanotify_init(2): a descriptor from which events are read.

    :param event_flags: how the descriptors in events are opened, as for open(2)
    :raises OSError: EPERM without CAP_SYS_ADMIN, ENOSYS, ...
    """
    return _checked("fanotify_init", _libc().fanotify_init(flags, event_flags))


def fanotify_mark(descriptor: int, flags: int, mask: int, path: bytes) -> None:
    """fanotify_mark(2): have events of a file or folder.

    :raises OSError: ENOENT, EPERM, ...
    """
    _checked("fanotify_mark", _libc().fanotify_mark(descriptor, flags, mask, AT_FDCWD, path))
