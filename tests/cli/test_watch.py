# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl watch`` on a terminal: what it shows, its keys and signals, and the terminal as it was afterwards."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from ksmd_ctl.cli.main import main
from ksmd_ctl.errors import ExitCode
from ksmd_ctl.host.operation import readable
from tests.cli.test_schemas import problems
from tests.service.running import configure, until

PATIENCE_SECONDS = 60
ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "ksmd_ctl.cli.main")
_SEQUENCE = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A terminal with a command in it, and what that has written since the last look."""

    def __init__(self, pid: int, descriptor: int) -> None:
        self.pid = pid
        self.descriptor = descriptor
        self.settings = termios.tcgetattr(descriptor)
        self.raw = b""
        self.code: int | None = None

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def press(self, keys: bytes) -> None:
        self.raw = b""
        os.write(self.descriptor, keys)

    def signal(self, number: int) -> None:
        self.raw = b""
        os.kill(self.pid, number)

    def shows(self, text: str) -> None:
        """Wait until it has written a text."""
        begun = time.monotonic()
        while text not in self.text():
            assert time.monotonic() < begun + PATIENCE_SECONDS, f"{text!r} is not shown: {self.text()[-3000:]}"
            self.read()

    def text(self) -> str:
        return _SEQUENCE.sub(b"", self.raw).decode(errors="replace")

    def read(self, seconds: float = 0.1) -> bool:
        """Read what is there; False once nobody can write any more."""
        with suppress(OSError):
            if not readable(self.descriptor, seconds):
                return True
            if data := os.read(self.descriptor, 1 << 16):
                self.raw += data
                return True
        return False

    def ended(self) -> int:
        """Wait for the end; the exit code."""
        begun = time.monotonic()
        while self.read():
            assert time.monotonic() < begun + PATIENCE_SECONDS, "it does not end"
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code

    def is_given_back(self) -> bool:
        return self.raw.endswith(b"\x1b[?25h\x1b[?1049l")


@contextmanager
def terminal(*words: str, columns: int = 80, rows: int = 24, **environ: str) -> Iterator[Terminal]:
    """``ksmd-ctl watch`` in a terminal."""
    pid, descriptor = pty.fork()
    if not pid:
        kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        os.chdir(ROOT)
        os.execve(COMMAND[0], [*COMMAND, "watch", *words], {**kept, "TERM": "xterm-256color", **environ})
    shown = Terminal(pid, descriptor)
    shown.resize(columns, rows)
    try:
        yield shown
    finally:
        if shown.code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(descriptor)


@pytest.fixture
def alone(tmp_path: Path) -> tuple[str, ...]:
    """The simulated host, no service."""
    return ("--host", "engine", "--socket", str(tmp_path / "none"), "--interval", "0.2")


def test_a_terminal_of_the_usual_size_and_its_keys(alone: tuple[str, ...]) -> None:
    with terminal(*alone) as shown:
        shown.shows("units by saving")
        assert shown.raw.startswith(b"\x1b[?1049h")
        for text in ("SIMULATED (profile 7.2)", "saved ", "KSM pages", "web-1", "read from the engine directly"):
            shown.shows(text)
        shown.press(b"c")
        shown.shows("units by cost")
        shown.press(b"\x1bOH")
        shown.press(b"H")
        shown.shows("units by sharing")
        shown.resize(120, 40)
        shown.signal(signal.SIGWINCH)
        until("more rows", lambda: (shown.read() and b"\x1b[40;1H" in shown.raw) or None)
        shown.press(b"q")
        assert shown.ended() == ExitCode.DONE
        assert shown.is_given_back()
        assert termios.tcgetattr(shown.descriptor) == shown.settings


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_that_end_it_give_the_terminal_back(alone: tuple[str, ...], number: int) -> None:
    with terminal(*alone) as shown:
        shown.shows("units by")
        if number == signal.SIGINT:
            shown.press(b"\x03")
        else:
            shown.signal(number)
        assert shown.ended() == ExitCode.INTERRUPTED
        assert shown.is_given_back()
        assert termios.tcgetattr(shown.descriptor) == shown.settings


def test_ctrl_z_gives_the_terminal_back_until_it_goes_on(alone: tuple[str, ...]) -> None:
    with terminal(*alone) as shown:
        shown.shows("units by")
        shown.press(b"\x1a")
        _, status = os.waitpid(shown.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        while shown.read():
            if shown.is_given_back():
                break
        assert termios.tcgetattr(shown.descriptor) == shown.settings
        shown.signal(signal.SIGCONT)
        shown.shows("units by")
        assert b"\x1b[?1049h" in shown.raw
        shown.press(b"q")
        assert shown.ended() == ExitCode.DONE


def test_no_colours_where_nobody_wants_any(alone: tuple[str, ...]) -> None:
    with terminal(*alone, NO_COLOR="1") as shown:
        shown.shows("units by")
        shown.press(b"q")
        shown.ended()
        assert re.search(rb"\x1b\[[0-9;]*\b3[0-9]\b", shown.raw) is None


def test_another_character_set_is_no_error(alone: tuple[str, ...]) -> None:
    with terminal(*alone, PYTHONIOENCODING="ascii") as shown:
        shown.shows("units by")
        shown.press(b"q")
        assert shown.ended() == ExitCode.DONE
        assert shown.raw.isascii()


def test_a_service_that_is_killed_and_comes_back(tmp_path: Path) -> None:
    config = configure(tmp_path, 'policy = "adaptive"', metrics_listen="")
    command = [*COMMAND, "daemon", "--config", str(config), "--host", "engine"]

    def started() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        until("the control socket", lambda: (tmp_path / "socket").exists() or None)
        return process

    service = started()
    try:
        with terminal("--socket", str(tmp_path / "socket"), rows=40) as shown:
            shown.shows("policy adaptive")
            shown.shows("quick: ")
            service.kill()
            service.wait()
            shown.shows("the service does not answer")
            shown.shows("these are the last ones")
            (tmp_path / "socket").unlink(missing_ok=True)
            service = started()
            shown.shows("the service answers")
            shown.shows("ended without a stop")
            shown.shows("the service started: ")
            shown.press(b"q")
            assert shown.ended() == ExitCode.DONE
    finally:
        service.terminate()
        service.wait()


def test_without_a_terminal_there_is_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch"]) == ExitCode.USAGE
    assert capsys.readouterr().err == (
        "ksmd-ctl: showing a live view: the output is not a terminal\n"
        "hint: ksmd-ctl status shows it once; ksmd-ctl watch --json prints each report as a line\n"
    )


def test_a_terminal_without_a_cursor(alone: tuple[str, ...]) -> None:
    with terminal(*alone, TERM="dumb") as shown:
        assert shown.ended() == ExitCode.USAGE
        assert "this terminal can't show one (TERM=dumb)" in shown.text()


def test_without_rich_there_is_a_hint(alone: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "rich.py").write_text("raise ImportError")
    with terminal(*alone, PYTHONPATH=str(tmp_path)) as shown:
        assert shown.ended() == ExitCode.LACKING
        first, second, *_ = shown.text().splitlines()
        assert first == "ksmd-ctl: showing a live view: the Python package rich is not installed"
        assert second.startswith("hint: apt-get install python3-rich, or pip install 'ksmd-ctl[watch]'; ")


def test_each_report_is_a_line_of_json(alone: tuple[str, ...]) -> None:
    with subprocess.Popen(
        [*COMMAND, "watch", "--json", *alone], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for _ in range(3):
            assert problems("status", json.loads(process.stdout.readline())) == []
        # Who reads no more has seen enough.
        process.stdout.close()
        assert process.wait(PATIENCE_SECONDS) == ExitCode.DONE


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (">/dev/full", "writing the output: ENOSPC (No space left on device)"),
        (">&-", "writing the output: stdout is closed"),
    ],
)
def test_lines_that_can_not_be_written(alone: tuple[str, ...], output: str, said: str) -> None:
    shell = f"exec {shlex.join([*COMMAND, 'watch', '--json', *alone])} {output}"
    done = subprocess.run(["sh", "-c", shell], cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.splitlines()[0]) == (ExitCode.UNWRITABLE, f"ksmd-ctl: {said}")
