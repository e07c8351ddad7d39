# SPDX-License-Identifier: GPL-2.0-or-later
"""A process whose mmap_lock is held for ever, as anybody can make one who may mount FUSE in a user namespace.

A server that never answers READ; a thread that reads a mapping of its file through /proc/self/mem, so the kernel waits
for the page with the mmap_lock taken for reading; another that calls mmap, which waits for the lock and lets no reader
by. From then on everything of /proc/PID that takes the lock waits: cmdline, smaps, numa_maps, pagemap.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.service.running import until

__all__ = ["stuck_process"]

_SERVER = r"""
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(1, 9)  # PR_SET_PDEATHSIG: nothing stays stuck when the test is killed
libc.unshare(0x20000)  # CLONE_NEWNS
libc.mount(b"none", b"/", None, 0x44000, None)  # MS_REC | MS_PRIVATE
device = os.open("/dev/fuse", os.O_RDWR)
options = b"fd=%d,rootmode=100444,user_id=0,group_id=0,allow_other" % device
if libc.mount(b"stuck", sys.argv[1].encode(), b"fuse", 0, options):
    sys.exit(f"mount: {os.strerror(ctypes.get_errno())}")
attributes = struct.pack("<6Q10I", 1, 4096, 8, 0, 0, 0, 0, 0, 0, 0o100444, 1, 0, 0, 0, 4096, 0)
asked, tell = os.pipe()
os.set_inheritable(asked, True)
if os.fork() == 0:
    # The process itself, in the same mount namespace.
    os.close(device)
    os.execv(sys.executable, [sys.executable, "-c", sys.argv[2], sys.argv[1], str(asked), *sys.argv[3:]])
os.close(1)
while True:
    message = os.read(device, 1 << 17)
    _, opcode, unique = struct.unpack_from("<IIQ", message)
    if opcode == 26:  # INIT
        answer = struct.pack("<4I2HII2HI28x", 7, 31, 0, 0, 16, 12, 4096, 1, 1, 0, 0)
    elif opcode == 3:  # GETATTR
        answer = struct.pack("<QII", 3600, 0, 0) + attributes
    elif opcode == 14:  # OPEN
        answer = struct.pack("<QII", 1, 0, 0)
    elif opcode == 15:  # READ: never
        os.write(tell, b"x")
        continue
    else:
        os.write(device, struct.pack("<IiQ", 16, -38, unique))
        continue
    os.write(device, struct.pack("<IiQ", 16 + len(answer), 0, unique) + answer)
"""

_PROCESS = r"""
import ctypes, mmap, os, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(15, sys.argv[3].encode())  # PR_SET_NAME
area = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
if int(sys.argv[5]):
    libc.madvise(ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(area))), ctypes.c_size_t(1 << 20), 12)
area[0] = 1
file = os.open(sys.argv[1], os.O_RDONLY)
os.fstat(file)  # makes its size known
os.setresuid(*(int(sys.argv[4]),) * 3)
libc.prctl(4, 1)  # PR_SET_DUMPABLE
libc.prctl(1, 9)  # PR_SET_PDEATHSIG
libc.mmap.restype = ctypes.c_void_p
address = libc.mmap(None, ctypes.c_size_t(4096), 1, 2, file, ctypes.c_long(0))
memory = os.open("/proc/self/mem", os.O_RDONLY)
threading.Thread(target=lambda: os.pread(memory, 1, address), daemon=True).start()
os.read(int(sys.argv[2]), 1)
print(os.getpid(), flush=True)
libc.mmap(None, ctypes.c_size_t(4096), 1, 0x22, -1, ctypes.c_long(0))
"""


@contextmanager
def stuck_process(folder: Path, name: str, uid: int = 0, *, mergeable: bool = False) -> Iterator[int]:
    """The pid of one with this name, of this user.

    :param mergeable: ksmd looks at it, and waits for it as everybody else; only with the fixture `ksm_host`
    """
    file = folder / "never"
    file.touch()
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        pytest.skip("no FUSE here (/dev/fuse, root)")
    words = [sys.executable, "-c", _SERVER, str(file), _PROCESS, name, str(uid), str(int(mergeable))]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            if not line:
                pytest.skip("FUSE can't be mounted here")
            pid = int(line)
            until("it to wait for its own lock", lambda: _state(pid) == "D" or None)
            yield pid
        finally:
            # With its server the connection ends, so the read fails, and the process gets its signal.
            server.kill()


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
