# SPDX-License-Identifier: GPL-2.0-or-later
"""`ksmd-ctl merge` with processes that can't be switched: two lines say why, and they are left as they were."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ksmd_ctl.errors import ExitCode
from tests.kernel.switched import Target, compiled, started
from tests.service.running import ROOT, configure, run_command, service

pytestmark = [
    pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="injection is for these"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

NOBODY = 65534
ACTIONS = [("on",), ("off",), ("off", "--dry-run")]
#: Without a stack or other private memory that may be written.
NO_PRIVATE_MEMORY = """
.globl _start
_start: movl $1, %eax
movl $1, %edi
leaq text(%rip), %rsi
movl $2, %edx
syscall
movl $11, %eax
movq %rsp, %rdi
andq $-4096, %rdi
subq $0x100000, %rdi
movl $0x110000, %esi
syscall
1: movl $34, %eax
syscall
jmp 1b
text: .ascii "1\\n"
.section .note.GNU-stack,"",@progbits
"""
BITS_32 = """
.globl _start
_start: movl $4, %eax
movl $1, %ebx
movl $text, %ecx
movl $2, %edx
int $0x80
1: movl $29, %eax
int $0x80
jmp 1b
text: .ascii "1\\n"
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("merge"))


@pytest.fixture
def target(program: Path) -> Iterator[Target]:
    """A program that checks itself, and in the end is as it was before."""
    with started(program, "spin", "100") as found:
        yield found
        untouched(found)
        assert found.end().startswith("0 errors")


def untouched(target: Target) -> None:
    smaps = Path(f"/proc/{target.process.pid}/smaps").read_text()
    assert not [line for line in smaps.splitlines() if line.startswith("VmFlags:") and " mg" in line]
    assert target.status("TracerPid") == "0"
    assert target.status("State")[0] in "RS"


def expect(config: Path, code: ExitCode, why: str, *words: str) -> str:
    """Have the command fail; what it says."""
    done = run_command("merge", *words, "--config", str(config))
    assert (done.returncode, done.stdout) == (code, ""), done
    first, second = done.stderr.splitlines()
    assert first.startswith("ksmd-ctl: ")
    assert why in first, first
    assert second.startswith("hint: ")
    return second


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return configure(tmp_path, "")


@pytest.mark.parametrize("action", ACTIONS, ids=" ".join)
def test_processes_that_are_none(config: Path, action: tuple[str, ...]) -> None:
    expect(config, ExitCode.USAGE, "there is no process 2147483647", *action, "--pid", "2147483647")
    expect(config, ExitCode.REFUSED, "there is no virtual machine 'no-such-vm'", *action, "--vm", "no-such-vm")
    expect(config, ExitCode.REFUSED, "unit no-such-unit.service has no process", *action, "--unit", "no-such-unit")
    expect(config, ExitCode.USAGE, "is no name of a service", *action, "--unit", "../ssh")
    ended = os.fork()
    if not ended:
        os._exit(0)
    os.waitid(os.P_PID, ended, os.WEXITED | os.WNOWAIT)
    expect(config, ExitCode.CHECK_FAILED, "it has exited", *action, "--pid", str(ended))
    os.waitpid(ended, 0)


@pytest.mark.parametrize("action", ACTIONS, ids=" ".join)
def test_a_kernel_thread(config: Path, action: tuple[str, ...]) -> None:
    if Path("/proc/2/comm").read_text() != "kthreadd\n":
        pytest.skip("no kernel thread is seen here")
    expect(config, ExitCode.REFUSED, "it is a kernel thread", *action, "--pid", "2")


@pytest.mark.parametrize("action", ACTIONS, ids=" ".join)
def test_init_and_itself(config: Path, action: tuple[str, ...]) -> None:
    expect(config, ExitCode.REFUSED, "process 1 is init", *action, "--pid", "1")
    words = [sys.executable, "-m", "ksmd_ctl.cli.main", "merge", *action, "--config", str(config), "--pid"]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" $$', "sh", *words], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == ExitCode.REFUSED, done
    assert "is ksmd-ctl itself" in done.stderr
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize("action", ACTIONS, ids=" ".join)
def test_addresses_of_nobody(config: Path, target: Target, action: tuple[str, ...]) -> None:
    words = (*action, "--pid", str(target.process.pid), "--range")
    expect(config, ExitCode.REFUSED, "nothing there can be merged", *words, "1000-2000")
    expect(
        config, ExitCode.USAGE, "behind the addresses that a process has", *words, "ffffffffff600000-ffffffffff601000"
    )


@pytest.mark.parametrize("action", ACTIONS, ids=" ".join)
def test_a_process_that_is_traced(config: Path, target: Target, action: tuple[str, ...]) -> None:
    code = (
        "from ksmd_ctl.kernel.ptrace import Tracee\nimport sys\nt=Tracee(int(sys.argv[1]))\n"
        "print(1,flush=True)\nsys.stdin.read()"
    )
    with started(sys.executable, "-c", code, str(target.process.pid)) as debugger:
        words = (*action, "--pid", str(target.process.pid))
        expect(config, ExitCode.REFUSED, f"(pid {debugger.process.pid}) traces it", *words)


@pytest.mark.parametrize("action", ACTIONS, ids=" ".join)
def test_another_users_process(target: Target, action: tuple[str, ...]) -> None:
    # Folders of pytest's are root's own.
    with tempfile.TemporaryDirectory() as folder:
        config = configure(Path(folder), "")
        Path(folder).chmod(0o777)
        words = ["merge", *action, "--pid", str(target.process.pid), "--config", str(config)]
        done = subprocess.run(
            [sys.executable, "-m", "ksmd_ctl.cli.main", *words],
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
            env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
        )
    if "ksmd-ctl: " not in done.stderr:
        pytest.skip("nobody may not read the package")
    assert (done.returncode, done.stdout) == (ExitCode.DENIED, ""), done
    assert len(done.stderr.splitlines()) == 2
    assert "hint: run as root" in done.stderr


# -- what only some kernels and machines have --------------------------------------------------------------------


def seen_otherwise(folder: Path, pid: int, scope: str = "", program: bytes = b"") -> Path:
    """This host's files, but for Yama's scope or the program of one process."""

    def links(to: Path, here: Path, *others: str) -> Path:
        here.mkdir(exist_ok=True)
        for name in set(os.listdir(to)) - set(others):
            (here / name).symlink_to(to / name)
        return here

    root = links(Path("/"), folder / "root", "proc")
    proc = links(Path("/proc"), root / "proc", "sys", str(pid), str(os.getpid()))
    (proc / str(os.getpid())).symlink_to("/proc/self")
    links(Path(f"/proc/{pid}"), proc / str(pid), *(["exe"] if program else []))
    if program:
        (proc / str(pid) / "exe").write_bytes(program)
    kernel = links(Path("/proc/sys/kernel"), links(Path("/proc/sys"), proc / "sys", "kernel") / "kernel", "yama")
    (kernel / "yama").mkdir()
    (kernel / "yama/ptrace_scope").write_text(f"{scope or '1'}\n")
    return root


@pytest.mark.parametrize("action", ACTIONS, ids=" ".join)
def test_yama_permits_it_to_nobody(config: Path, target: Target, tmp_path: Path, action: tuple[str, ...]) -> None:
    root = seen_otherwise(tmp_path, target.process.pid, scope="3")
    words = (*action, "--pid", str(target.process.pid), "--root", str(root))
    hint = expect(config, ExitCode.DENIED, "kernel.yama.ptrace_scope is 3", *words)
    assert "before the next boot" in hint


@pytest.mark.parametrize("action", ACTIONS, ids=" ".join)
def test_a_program_of_another_machine(config: Path, target: Target, tmp_path: Path, action: tuple[str, ...]) -> None:
    header = b"\x7fELF\x02\x01\x01" + bytes(9) + (2).to_bytes(2, "little") + (183).to_bytes(2, "little")
    root = seen_otherwise(tmp_path, target.process.pid, program=header)
    words = (*action, "--pid", str(target.process.pid), "--root", str(root))
    expect(config, ExitCode.REFUSED, "its program is another machine's (ELF machine 183)", *words)


@pytest.mark.parametrize(
    ("text", "options", "why"),
    [
        (NO_PRIVATE_MEMORY, (), "nothing of it can be merged: it has no private memory"),
        (BITS_32, ("-m32",), "its program is 32-bit"),
    ],
    ids=["no private memory", "32-bit"],
)
def test_small_programs(config: Path, tmp_path: Path, text: str, options: tuple[str, ...], why: str) -> None:
    source = tmp_path / "small.S"
    source.write_text(text)
    with started(
        compiled(tmp_path, "-nostdlib", "-static", "-Wl,-z,noseparate-code", *options, source=source)
    ) as small:
        for action in ACTIONS:
            expect(config, ExitCode.REFUSED, why, *action, "--pid", str(small.process.pid))
        untouched(small)


# -- the service -------------------------------------------------------------------------------------------------


def test_the_service_and_its_broker(tmp_path: Path) -> None:
    with service(tmp_path, "policy = 'observe'\n[switch]\nallow = true\n") as running:
        config = tmp_path / "ksmd-ctl.toml"
        own = running.process.pid
        children: Callable[[], str] = Path(f"/proc/{own}/task/{own}/children").read_text
        pids = [own, *map(int, children().split())]
        assert len(pids) > 1
        for pid in pids:
            for action in ("on", "off"):
                expect(config, ExitCode.REFUSED, "is ksmd-ctl itself", action, "--pid", str(pid))
        assert running.process.poll() is None
        assert list(map(int, children().split())) == pids[1:]
