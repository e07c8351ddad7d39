# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line of tests/guest/run."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from tests.guest import cache, image, kernels
from tests.guest.boot import Node
from tests.guest.errors import LACKING, Failure
from tests.guest.virtme import run_on_kernel

PROGRAM = "tests/guest/run"
MAX_NODES = 4
BLOCK = 128  # a memory block of x86, which is what the kernel takes offline


class Interrupted(BaseException):
    """A signal asked this program to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def main(arguments: Sequence[str]) -> int:
    """Run tests/guest/run with these arguments and return its exit status."""
    for signum in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _interrupt)
    try:
        return _run(_parse(arguments))
    except BrokenPipeError:
        # Nobody reads on; what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        print(f"{PROGRAM}: {error}\nhint: see that {cache.folder()} can be written and has room", file=sys.stderr)
        return LACKING
    except Failure as failure:
        print(f"{PROGRAM}: {failure.what}\nhint: {failure.hint}", file=sys.stderr)
        return failure.status
    except Interrupted as interrupted:
        return 128 + interrupted.signum


def _interrupt(signum: int, _frame: FrameType | None) -> NoReturn:
    raise Interrupted(signum)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Run a command as root in an emulated NUMA guest and exit with its status;"
        " 128 says that the guest was lost.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--kernel", choices=list(kernels.SUITES), help="this kernel over the root file system")
    what.add_argument("--system", choices=[image.SUITE], help="a whole system under systemd, with its own kernel")
    parser.add_argument("--nodes", type=int, default=2, metavar="N", help="NUMA nodes, 1..4 (default: 2)")
    parser.add_argument(
        "--memory", default="512", metavar="M", help="MiB on each node, or a list: 512,256 (default: 512)"
    )
    parser.add_argument("--cpus", metavar="LIST", help="CPUs on each node (default: 1,1,0,0)")
    parser.add_argument(
        "--removable", default="0", metavar="M", help="MiB more on each node that can be taken offline (default: 0)"
    )
    parser.add_argument(
        "--share", type=Path, action="append", default=[], metavar="DIR", help="the guest may write to DIR"
    )
    parser.add_argument(
        "--append", action="append", default=[], metavar="WORD", help="a word for the kernel command line"
    )
    parser.add_argument(
        "--device", action="append", default=[], metavar="DEVICE", help="a further device, as QEMU's -device has it"
    )
    parser.add_argument(
        "--reboots",
        type=int,
        default=0,
        metavar="N",
        help="the command reboots a system N times, and runs anew each time",
    )
    parser.add_argument(
        "--timeout", type=float, default=300.0, metavar="S", help="seconds, boot included (default: 300)"
    )
    parser.add_argument("--fetch", action="store_true", help="only fill the cache")
    parser.add_argument("command", nargs="*", metavar="COMMAND")
    parsed = parser.parse_args(arguments)
    if not 1 <= parsed.nodes <= MAX_NODES:
        parser.error(f"--nodes {parsed.nodes}: not in 1..{MAX_NODES}")
    if parsed.reboots and not parsed.system:
        parser.error("--reboots is for --system")
    if not parsed.command and not parsed.fetch:
        parser.error("no COMMAND")
    for share in parsed.share:
        if not share.is_dir():
            parser.error(f"--share {share}: no such folder")
    try:
        parsed.layout = layout(parsed.nodes, parsed.memory, parsed.cpus, parsed.removable)
    except ValueError as error:
        parser.error(str(error))
    return parsed


def layout(count: int, memory: str, cpus: str | None, removable: str = "0") -> list[Node]:
    """Return the nodes that these options ask for; raise ValueError where they make no sense."""
    sizes = _each(memory, "--memory", count)
    numbers = _each(cpus, "--cpus", count) if cpus else [1, 1, 0, 0][:count]
    dimms = _each(removable, "--removable", count)
    if any(dimm % BLOCK for dimm in dimms):
        raise ValueError(f"--removable {removable}: not in whole blocks of {BLOCK} MiB")
    if not sizes[0] or not sum(numbers):
        raise ValueError("a guest needs memory on its first node, and a CPU")
    return [Node(*node) for node in zip(sizes, numbers, dimms, strict=True)]


def _each(text: str, option: str, count: int) -> list[int]:
    """Return one number for each node; a single number stands for all."""
    words = text.split(",")
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"{option} {text}: not a list of numbers")
    numbers = [int(word) for word in words]
    if len(numbers) == 1:
        return numbers * count
    if len(numbers) != count:
        raise ValueError(f"{option} {text}: not {count} numbers")
    return numbers


def _run(parsed: argparse.Namespace) -> int:
    shares = [share.resolve() for share in parsed.share]
    rest = (parsed.layout, parsed.command, shares, parsed.append, parsed.device, parsed.timeout)
    if parsed.system:
        system = image.fetch()
        return 0 if parsed.fetch else image.run_in_system(system, *rest, parsed.reboots)
    kernel = kernels.fetch(parsed.kernel)
    return 0 if parsed.fetch else run_on_kernel(kernel, *rest)
