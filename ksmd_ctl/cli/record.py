# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl record``: a recording of the host: counters, events, and a sample of pages by their contents."""

from __future__ import annotations

import argparse
import math
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, TextIO

from ksmd_ctl.cli.common import (
    ENDING,
    LEAST_CPU_SHARE,
    Parsers,
    add_command,
    add_config,
    add_source,
    file_name,
    handling,
    seconds,
    share,
    write_json,
)
from ksmd_ctl.cli.terminal import ProgressLine
from ksmd_ctl.errors import Denied, ExitCode, KsmdError, ReadError, Unreadable, Unwritable, UsageError, errno_text
from ksmd_ctl.figures import bytes_text, plural, seconds_text

if TYPE_CHECKING:
    from ksmd_ctl.host.interface import Host
    from ksmd_ctl.host.page_sample import PageSampler, Selection
    from ksmd_ctl.recording.recorder import Heard
    from ksmd_ctl.recording.writer import Writer

_CPU: Final = 0.05
_EVERY_SECONDS: Final = 1.0
# Where nobody says how many, so many pages are sampled at most.
_MOST_PAGES: Final = 1 << 18
_UNITS: Final = {"": 1, "s": 1, "min": 60, "h": 3600, "d": 86400}
_MOST_SECONDS: Final = 366 * 86400.0


def add_parser(parsers: Parsers) -> None:
    parser = add_command(
        parsers,
        "record",
        "record this host into a file: counters, events, and a sample of pages by their contents, not the contents",
        host_help="this machine's kernel, or a simulated host (default: the kernel)",
    )
    add_source(parser)
    parser.add_argument("-o", dest="output", type=file_name, required=True, metavar="FILE", help="the file, a new one")
    parser.add_argument(
        "--for",
        dest="length",
        type=length,
        default=math.inf,
        metavar="T",
        help="how long, as in 90, 10min, 2h or 1d (default: until Ctrl-C)",
    )
    parser.add_argument(
        "--sample",
        type=ratio,
        metavar="1:N",
        help=f"record the pages of one of N contents (default: as many that it is {_MOST_PAGES:,} pages at most)",
    )
    parser.add_argument(
        "--cpu",
        type=share(LEAST_CPU_SHARE),
        default=_CPU,
        metavar="SHARE",
        help=f"the share of one CPU that looking at pages may take (default: {_CPU})",
    )
    parser.add_argument(
        "--every",
        type=seconds(3600),
        default=_EVERY_SECONDS,
        metavar="SECONDS",
        help=f"the time from one sample of the counters to the next (default: {_EVERY_SECONDS:g})",
    )
    parser.add_argument(
        "--key-file",
        type=file_name,
        metavar="FILE",
        help="make digests of contents with the key in FILE and store them, so that recordings can be compared; "
        "it is made if it does not exist. Whoever has it can find out which contents were in memory",
    )
    add_config(parser)
    parser.add_argument("--anonymous", action="store_true", help="number programs, units and processes: no names")


def length(text: str) -> float:
    """The type of an option that takes a length of time with a unit."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)(s|min|h|d|)", text, re.ASCII)
    found = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not 0 < found <= _MOST_SECONDS:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no length of time as in 90, 10min, 2h or 1d")
    return found


def ratio(text: str) -> int:
    """The type of an option that takes 1:N."""
    from ksmd_ctl.host.page_sample import MOST_ONE_IN

    match = re.fullmatch(r"1:(\d{1,6})", text, re.ASCII)
    if match is None or not 1 <= int(match[1]) <= MOST_ONE_IN:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not 1:N with N from 1 to {MOST_ONE_IN}")
    return int(match[1])


def run(args: argparse.Namespace, out: TextIO) -> int:
    from ksmd_ctl.cli.host import need_ksm, open_host
    from ksmd_ctl.recording.recorder import Recorder
    from ksmd_ctl.recording.writer import Writer

    stopped: list[int] = []
    if args.key_file is not None and args.key_file.resolve() == args.output.resolve():
        hint = "name two files: the key must not be with the recording"
        raise UsageError(f"recording to {args.output}", "-o and --key-file are one file", hint=hint)
    key = None if args.key_file is None else read_key(args.key_file)
    with (
        open_host(args.host, args.root, merged=True) as host,
        handling(ENDING, lambda number, _: stopped.append(number)),
    ):
        _need_root(host)
        need_ksm(host.sample())
        selection, sampler = _sampler(args, host, key)
        zeroes = selection.number(bytes(host.identity.page_size_bytes))
        with (
            Writer(args.output, zeroes, keyed=key is not None, anonymous=args.anonymous) as writer,
            _listener(args, host) as listen,
        ):
            recorder = Recorder(host, sampler, writer, cpu=args.cpu, boot_offset=_boot_offset(host), listen=listen)
            writer.topology(host.topology())
            mode = _domains(args, writer)
            writer.facts({**_facts(host, args), "domains": mode, "one_in": selection.one_in, "keyed": key is not None})
            with ProgressLine(sys.stderr) as line:

                def tell() -> None:
                    size = bytes_text(args.output.stat().st_size)
                    line.say(f"{seconds_text(recorder.seconds)}, {plural(recorder.looks, 'look')} at pages, {size}")

                recorder.run(lambda: bool(stopped), args.length, args.every, tell)
            took, looks = recorder.seconds, recorder.looks
            writer.facts({"seconds": took})
    if not looks:
        sys.stderr.write("no look at pages came to its end: record for longer, or with a greater --cpu\n")
    if args.json:
        document = {"file": str(args.output), "seconds": took, "looks": looks, "one_in": selection.one_in}
        write_json({"format": 1, **document}, out)
    else:
        from ksmd_ctl.render.recording import sampled_text

        size, sampled = bytes_text(args.output.stat().st_size), sampled_text(selection.one_in)
        out.write(f"{args.output}: {seconds_text(took)}, {plural(looks, 'look')} at {sampled}, {size}\n")
    return ExitCode.DONE


def read_key(path: Path) -> bytes:
    """The key in a file, which is made if it does not exist.

    :raises UsageError: it has not the form of a key, or others may read it
    :raises Unreadable: it can't be read
    :raises Unwritable: it can't be made
    """
    from ksmd_ctl.host.page_sample import KEY_BYTES

    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return _stored_key(path)
    except OSError as error:
        raise Unwritable.of(f"making the key {path}", path, error) from error
    key = os.urandom(KEY_BYTES)
    try:
        with open(descriptor, "w") as file:
            file.write(f"{key.hex()}\n")
    except OSError as error:
        path.unlink(missing_ok=True)
        raise Unwritable.of(f"making the key {path}", path, error) from error
    return key


def _stored_key(path: Path) -> bytes:
    from ksmd_ctl.host.page_sample import KEY_BYTES
    from ksmd_ctl.regularfile import read_regular

    what = f"reading the key in {path}"
    try:
        mode = path.stat().st_mode
        # A device may be masked as an empty file.
        if not stat.S_ISREG(mode):
            raise ValueError("is not a regular file")
        key = bytes.fromhex(read_regular(path, 1000, follow=True).decode("ascii"))
        if len(key) != KEY_BYTES:
            raise ValueError(f"is not a key of {KEY_BYTES} bytes")
    except ValueError as error:
        hint = "a key is 32 hexadecimal digits; name a file that does not exist, and one is made"
        raise UsageError(
            what, f"it {error}" if str(error).startswith("is") else "it is not a key", hint=hint
        ) from error
    except OSError as error:
        hint = "name a file that you may read, or one that does not exist, and a key is made"
        raise Unreadable(what, errno_text(error.errno or 0), hint=hint, path=str(path), errno=error.errno) from error
    # Only of what is a key: nobody should be told to change the mode of another file.
    if mode & 0o077:
        raise UsageError(what, "others may read it, or write it", hint=f"chmod 600 {path}")
    return key


def _sampler(args: argparse.Namespace, host: Host, key: bytes | None) -> tuple[Selection, PageSampler]:
    """What looks at pages, and which it samples."""
    from ksmd_ctl.host.page_sample import MOST_ONE_IN, Selection

    def sampler(selection: Selection) -> PageSampler:
        if host.identity.simulated:
            from ksmd_ctl.engine.host import EngineHost
            from ksmd_ctl.engine.page_sample import EnginePages

            assert isinstance(host, EngineHost)
            return EnginePages(host.machine, selection, host.clock)
        from ksmd_ctl.kernel.page_sample import KernelPages

        return KernelPages(selection, Path(args.root))

    pages = sampler(Selection()).pages()
    one_in = args.sample or 1
    while args.sample is None and pages > one_in * _MOST_PAGES and one_in < MOST_ONE_IN:
        one_in *= 2
    selection = Selection(one_in, key)
    return selection, sampler(selection)


def _need_root(host: Host) -> None:
    """
    :raises Denied: this user may not read the pages of others
    """
    if os.geteuid() != 0 and not host.identity.simulated:
        hint = "run as root; without it ksmd-ctl status, nodes and processes show what counters tell"
        raise Denied("recording this host", "only root may read the pages of all processes", hint=hint)


def _boot_offset(host: Host) -> float:
    """What is to be added to the host's clock for the time since boot."""
    if host.identity.simulated:
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - host.clock()


def _facts(host: Host, args: argparse.Namespace) -> Mapping[str, object]:
    from ksmd_ctl import __version__

    return {
        "program": __version__,
        "kind": host.identity.kind,
        "release": host.identity.release,
        "profile": _profile(host, args),
        "page_size_bytes": host.identity.page_size_bytes,
        "begun": time.time(),
        "anonymous": args.anonymous,
        "numa": host.topology().numa,
        "service": None if host.identity.simulated else _service(args),
    }


def _domains(args: argparse.Namespace, writer: Writer) -> str | None:
    """Record the trust domains of the configuration; their mode, None where it has none.

    :raises ConfigError: a configuration was named, and it is wrong
    """
    from ksmd_ctl.config.loader import load
    from ksmd_ctl.domains.members import domain_of

    if (config := load(args.config).domains) is None:
        return None
    writer.domains({one.name: one.nodes for one in config.domains}, partial(domain_of, config))
    return config.mode


def _profile(host: Host, args: argparse.Namespace) -> str:
    """The engine's profile that behaves as this host does."""
    if host.identity.simulated:
        return host.identity.release
    from ksmd_ctl.engine.profile import profile_for
    from ksmd_ctl.kernel.proc_pid import read_process_file

    files = [name for name, reading in host.sample().readings.items() if not isinstance(reading, ReadError)]
    try:
        lines = read_process_file(os.getpid(), "ksm_stat", Path(args.root)).splitlines()
    except KsmdError:
        lines = []
    return profile_for(files, ksm_stat=[line.partition(" ")[0].rstrip(":") for line in lines]).name


def _listener(args: argparse.Namespace, host: Host) -> AbstractContextManager[Callable[[float], Heard]]:
    """What waits for what others tell. They name programs and units."""
    from ksmd_ctl.recording.recorder import nobody

    if host.identity.simulated or args.anonymous:
        return nullcontext(nobody)
    from ksmd_ctl.cli.client import socket_path
    from ksmd_ctl.cli.record_events import Listener

    return Listener(socket_path(args.socket), lambda: bool(_report(args)), Path(args.root))


def _report(args: argparse.Namespace) -> Mapping[str, object]:
    """What a service says that works on this machine; empty where none runs, or it doesn't answer."""
    from ksmd_ctl.cli.source import ask
    from ksmd_ctl.host.sample import HostKind
    from ksmd_ctl.reports.document import part, text

    try:
        report: Mapping[str, object] = ask(args).result
    except KsmdError:
        return {}
    return report if text(part(report, "host"), "kind") == HostKind.KERNEL else {}


def _service(args: argparse.Namespace) -> Mapping[str, object] | None:
    """What a service says of itself; None without one."""
    from ksmd_ctl.reports.document import part, text

    if not (report := _report(args)):
        return None
    wanted = {name: part(report, "knobs", name).get("wanted") for name in part(report, "knobs")}
    version = text(part(report, "daemon"), "version")
    return {"version": version, "policy": text(report, "policy"), "wanted": wanted}
