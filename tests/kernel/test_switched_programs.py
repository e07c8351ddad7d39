# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs of many kinds, on and off: VmFlags and frames tell, contents stay, and nothing merges again.

Each has 16 MiB of 64 contents, and so has a process beside it that stays mergeable: ksmd goes on, with a partner for
each page that was taken out.
"""

from __future__ import annotations

import hashlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from ksmd_ctl.errors import Refused
from ksmd_ctl.host.memory import ProcessId, Range
from ksmd_ctl.host.switching import Switch
from ksmd_ctl.kernel.detection import open_reader
from ksmd_ctl.kernel.proc_pid import start_time_ticks
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.ranges import holds_pages, mappings
from ksmd_ctl.kernel.switching import LATER
from ksmd_ctl.scenario.regions import spawn
from ksmd_ctl.switch.methods import switch_merging
from tests.guest.qemu import fetch
from tests.kernel.switched import SECONDS, Target, compiled, in_child, started
from tests.kernel.test_detection import scan
from tests.kernel.test_injection import DONE

PAGES, CONTENTS = 4096, 64
#: More than these can't be merged, and a few may be in use just then.
MERGED_PAGES = 4000
GUEST = Path(__file__).with_name("switched_guest.c")


@dataclass
class Program:
    """A program that runs.

    :ivar goes_on: fails where it does not, or not as it was
    :ivar end: has it end; fails where it found anything wrong
    :ivar how: what the results for on and off say of the method
    """

    process: ProcessId
    goes_on: Callable[[], object] = lambda: None
    end: Callable[[], object] = lambda: None
    how: tuple[str, str] = ("", "")


Kind = Callable[[Path], AbstractContextManager[Program]]


def _right(target: Target) -> None:
    said = target.end()
    assert said.startswith("0 errors"), said


@contextmanager
def _wait(folder: Path) -> Iterator[Program]:
    with started(compiled(folder), "wait") as target:
        yield Program(target.process, end=lambda: _right(target))


@contextmanager
def _dynamic(folder: Path) -> Iterator[Program]:
    with started(compiled(folder), "spin", "500") as target:
        yield Program(target.process, end=lambda: _right(target))


@contextmanager
def _static(folder: Path) -> Iterator[Program]:
    with started(compiled(folder, "-static"), "spin", "500") as target:
        yield Program(target.process, end=lambda: _right(target))


@contextmanager
def _threads(folder: Path) -> Iterator[Program]:
    # ksmd gets on beside it.
    with started(compiled(folder), "threads", before=("nice", "-n", "19")) as target:

        def goes_on() -> None:
            assert target.status("Threads") == "64"

        # It says that it is there before they all are.
        until = time.monotonic() + SECONDS
        while target.status("Threads") != "64" and time.monotonic() < until:
            time.sleep(0.1)
        yield Program(target.process, goes_on, lambda: _right(target))


@contextmanager
def _filter(folder: Path) -> Iterator[Program]:
    with started(compiled(folder), "filter") as target:

        def goes_on() -> None:
            assert target.ask("a") == "a"
            assert target.status("Seccomp") == "2"

        def end() -> None:
            # At the end of its input it checks its memory.
            target.program.communicate(timeout=SECONDS)
            assert target.program.returncode == 0

        goes_on()
        yield Program(target.process, goes_on, end)


@contextmanager
def _stopped(folder: Path) -> Iterator[Program]:
    with started(compiled(folder), "spin") as target:
        os.kill(target.process.pid, signal.SIGSTOP)
        os.waitpid(target.process.pid, os.WUNTRACED)

        def goes_on() -> None:
            assert target.status("State").startswith("T")
            assert os.waitpid(target.process.pid, os.WUNTRACED | os.WNOHANG) == (0, 0)

        def end() -> None:
            os.kill(target.process.pid, signal.SIGCONT)
            _right(target)

        yield Program(target.process, goes_on, end)


@contextmanager
def _namespaces(folder: Path) -> Iterator[Program]:
    before = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child")
    if subprocess.run([*before, "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs user and pid namespaces")
    with started(compiled(folder), "spin", before=before) as target:
        yield Program(target.process, end=lambda: _right(target))


@contextmanager
def _python(_: Path) -> Iterator[Program]:
    code = (
        "import mmap,os,sys\nheld=mmap.mmap(-1,16<<20,flags=mmap.MAP_PRIVATE|mmap.MAP_ANONYMOUS)\n"
        "pages=[bytes([number])*4096 for number in range(64)]\nheld[:]=b''.join(pages*64)\n"
        "print(os.getpid(),flush=True)\nfor line in sys.stdin:\n"
        " print(int(all(held[n*4096:n*4096+4096]==pages[n%64] for n in range(4096))),flush=True)"
    )
    with started(sys.executable, "-c", code) as target:

        def goes_on() -> None:
            assert target.ask("?\n") == "1\n"

        yield Program(target.process, goes_on)


def _qemu(*words: str | Path, folder: Path, monitor: bool) -> Iterator[Program]:
    """A virtual machine that checks its memory.

    :param words: that run QEMU, or that come before
    :param folder: of its socket and of the guest's program, as they see it
    """
    options = ["-machine", f"pc,accel=tcg,mem-merge={'off' if monitor else 'on'}", "-m", "64"]
    options += ["-display", "none", "-nodefaults", "-debugcon", "stdio", "-kernel", f"{folder}/guest"]
    options += ["-qmp", f"unix:{folder}/qmp,server=on,wait=off"] if monitor else []
    with subprocess.Popen([*words, *options], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as machine:
        assert machine.stdout
        output = machine.stdout.fileno()

        def goes_on() -> None:
            """It says what it has said until now, and then twice that its memory is right."""
            os.set_blocking(output, False)
            said, enough = b"", 0
            until = time.monotonic() + SECONDS
            while not enough or len(said) < enough:
                assert time.monotonic() < until, said
                if select.select([output], [], [], 0.1 if enough else 0)[0]:
                    more = os.read(output, 1 << 16)
                    assert more, f"it ended: {machine.wait(SECONDS)}"
                    said += more
                elif not enough:
                    enough = len(said) + 2
            assert set(said) == set(b".")

        try:
            goes_on()
            how = ("qom-set merge=true", "; qom-set merge=false") if monitor else ("", "")
            yield Program(ProcessId(machine.pid, start_time_ticks(machine.pid)), goes_on, how=how)
        finally:
            machine.kill()


def _guest(folder: Path) -> Path:
    flags = ("-m32", "-ffreestanding", "-fno-pic", "-no-pie", "-nostdlib", "-static", "-fno-stack-protector")
    made = compiled(folder, *flags, "-Wl,-N", "-Wl,-Ttext=0x100000", "-Wl,--build-id=none", source=GUEST)
    return made.rename(folder / "guest")


def _of_this_system(monitor: bool) -> Kind:
    @contextmanager
    def run(folder: Path) -> Iterator[Program]:
        if (qemu := shutil.which("qemu-system-x86_64")) is None:
            pytest.skip("needs qemu-system-x86")
        _guest(folder)
        yield from _qemu(qemu, folder=folder, monitor=monitor)

    return run


@contextmanager
def _as_9_1(folder: Path) -> Iterator[Program]:
    """QEMU 9.1's condition in backends/hostmem.c is inverted: it never makes this call for memory that is there."""
    source = folder / "unadvised.c"
    source.write_text(
        "long syscall(long, ...);\nint madvise(void *address, unsigned long length, int advice)\n"
        "{ return advice == 12 || advice == 13 ? 0 : syscall(28, address, length, advice); }\n"
    )
    unadvised = compiled(folder, "-shared", "-fPIC", source=source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(unadvised))
        with _of_this_system(monitor=True)(folder) as program:
            patch.delenv("LD_PRELOAD")
            program.how = ("; the monitor did not do it: QEMU ", "; qom-set merge=false")
            yield program


def _of_debian(suite: str, monitor: bool) -> Kind:
    """In a root and a mount namespace of its own, as in a container."""

    @contextmanager
    def run(folder: Path) -> Iterator[Program]:
        root = fetch(suite)
        _guest(folder)
        script = 'mount --bind "$0" "$1/mnt" && exec chroot "$@"'
        before = ("unshare", "--mount", "sh", "-c", script, folder, root)
        yield from _qemu(*before, "/usr/bin/qemu-system-x86_64", folder=Path("/mnt"), monitor=monitor)

    return run


KINDS: dict[str, Kind] = {
    "wait": _wait,
    "dynamic": _dynamic,
    "static": _static,
    "threads": _threads,
    "filter": _filter,
    "stopped": _stopped,
    "namespaces": _namespaces,
    "python": _python,
    "qemu-monitor": _of_this_system(monitor=True),
    "qemu-injected": _of_this_system(monitor=False),
    "qemu-9.1": _as_9_1,
}
DEBIAN_13: dict[str, Kind] = {
    "monitor": _of_debian("trixie", monitor=True),
    "injected": _of_debian("trixie", monitor=False),
}


def merged(process: ProcessId, at: int = 0) -> dict[int, bytes]:
    """The merged pages of the largest memory, or of that at an address, by frames: hashes of them, by address."""
    found = [item for item in mappings(process.pid) if holds_pages(item) and (not at or item.start <= at < item.end)]
    largest = max(found, key=lambda item: item.anonymous_pages)
    with open_reader() as reader, open(f"/proc/{process.pid}/mem", "rb", 0) as memory:
        pages = {}
        for window in reader.windows(process.pid, [largest]):
            for number in window.merged():
                address = window.start + number * PAGE_SIZE
                pages[address] = held(memory.fileno(), address)
    return pages


def held(memory: int, address: int) -> bytes:
    return hashlib.sha256(os.pread(memory, PAGE_SIZE, address)).digest()


def mergeable(process: ProcessId) -> list[Range]:
    return [item for item in mappings(process.pid) if item.mergeable]


def check_switched(program: Program, *, on: bool) -> None:
    """Switch it by the first method that works."""

    def run() -> None:
        found = switch_merging(Switch(program.process, on), None)
        assert found.after is on, found
        # What the monitor sets is all that the machine has.
        by_monitor = program.how[0].startswith("qom-set")
        assert found.left == ((LATER,) if on and DONE and not by_monitor else ()), found
        assert program.how[not on] in found.how, found

    assert in_child(run) == 0
    assert bool(mergeable(program.process)) is on
    program.goes_on()


def check_on_and_off(program: Program, ksm: Path) -> None:
    with spawn("test-beside") as beside:
        start = beside.map(CONTENTS * 2)
        beside.advise(start, CONTENTS * 2, mergeable=True)
        beside.store(start, [bytes([number % CONTENTS]) * PAGE_SIZE for number in range(CONTENTS * 2)])
        check_switched(program, on=True)
        scan(ksm, 4)
        before = merged(program.process)
        assert len(before) >= MERGED_PAGES
        check_switched(program, on=False)
        assert merged(program.process) == {}
        scan(ksm, 20)
        assert merged(program.process) == {}
        assert not mergeable(program.process)
        assert len(merged(beside.id, start)) == CONTENTS * 2
        with open(f"/proc/{program.process.pid}/mem", "rb", 0) as memory:
            assert {address: held(memory.fileno(), address) for address in before} == before
        program.goes_on()
        program.end()


@pytest.mark.ksm
@pytest.mark.parametrize("kind", KINDS)
def test_on_and_off(kind: str, ksm_host: Path, tmp_path: Path) -> None:
    with KINDS[kind](tmp_path) as program:
        check_on_and_off(program, ksm_host)


@pytest.mark.ksm
@pytest.mark.guest
@pytest.mark.parametrize("kind", DEBIAN_13)
def test_qemu_of_debian_13(kind: str, ksm_host: Path, tmp_path: Path) -> None:
    with DEBIAN_13[kind](tmp_path) as program:
        check_on_and_off(program, ksm_host)


@pytest.mark.ksm
def test_one_that_is_debugged_is_left_as_it_is(ksm_host: Path, tmp_path: Path) -> None:
    """Refused, and nothing is un-merged for that."""
    with _dynamic(tmp_path) as program:
        check_switched(program, on=True)
        scan(ksm_host, 4)
        before = merged(program.process)
        assert len(before) >= MERGED_PAGES
        code = (
            "from ksmd_ctl.kernel.ptrace import Tracee\nimport sys\nt=Tracee(int(sys.argv[1]))\n"
            "print(1,flush=True)\nsys.stdin.read()"
        )
        with started(sys.executable, "-c", code, str(program.process.pid)):
            for on in (False, True):
                with pytest.raises(Refused, match="traces it"):
                    switch_merging(Switch(program.process, on), None)
            assert merged(program.process) == before
        check_switched(program, on=False)
        program.end()
