# SPDX-License-Identifier: GPL-2.0-or-later
"""A process's mappings, from /proc/PID/smaps and /proc/PID/numa_maps.

Sources: proc(5), fs/proc/task_mmu.c (``show_smap``, ``show_map_vma``, ``show_numa_map``) and
mm/mempolicy.c:mpol_to_str. Reading smaps walks the page tables: a few tens of nanoseconds a page.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ksmd_ctl.errors import Absent, Denied, NoSuchProcess, Unparsable, Unreadable
from ksmd_ctl.host.memory import Range
from ksmd_ctl.kernel.pseudofile import read_error
from ksmd_ctl.kernel.reading import read_whole
from ksmd_ctl.kernel.topology import parse_list

__all__ = [
    "NumaRange",
    "SmapsRange",
    "join",
    "mappings",
    "numa_ranges",
    "parse_numa_maps",
    "parse_smaps",
    "parsed",
    "read_process_bytes",
    "read_process_file",
    "read_ranges",
]

# About 700 and 100 bytes a mapping, for as many as vm.max_map_count allows by default (65,530).
_MOST_BYTES: Final = {"smaps": 64 << 20, "numa_maps": 16 << 20, "cmdline": 64 << 10}
_MOST_OF_OTHERS: Final = 256 << 10


def read_process_file(pid: int, name: str, root: Path = Path("/")) -> str:
    """A file of /proc/PID as text; what is not UTF-8 is replaced.

    :raises NoSuchProcess, Denied, Absent: as `read_process_bytes`
    """
    return read_process_bytes(pid, name, root).decode(errors="replace")


def read_process_bytes(pid: int, name: str, root: Path = Path("/")) -> bytes:
    """A file of /proc/PID.

    Of a long command line only the beginning: it may be of any length, and in memory that was never touched.

    :raises Unreadable: it is longer than such a file of any reasonable process, or could not be read in time
        (`ksmd_ctl.kernel.reading.TIMED_OUT`)
    :raises NoSuchProcess: the process is gone
    :raises Denied: it is not ours to look at
    :raises Absent: the process is there, and this kernel has no such file
    """
    path = root / "proc" / str(pid) / name
    most = _MOST_BYTES.get(name, _MOST_OF_OTHERS)
    try:
        data = read_whole(path, most)
        if len(data) <= most or name == "cmdline":
            return data[:most]
        raise Unreadable(f"reading {path}", f"it is longer than {most >> 10} KiB", path=str(path), errno=errno.EFBIG)
    except (FileNotFoundError, ProcessLookupError) as error:
        # ENOENT may mean the process or the file: proc(5) has no word for "this kernel has no such file".
        if not path.parent.is_dir() or isinstance(error, ProcessLookupError):
            raise NoSuchProcess(f"process {pid}", "it is gone", path=str(path), errno=error.errno) from error
        raise Absent(str(path), "this kernel does not have it", path=str(path), errno=error.errno) from error
    except PermissionError as error:
        raise Denied(
            f"process {pid}",
            f"{path} can't be read",
            hint="needs CAP_SYS_PTRACE, and CAP_DAC_READ_SEARCH for another user's process",
            path=str(path),
            errno=error.errno,
        ) from error
    except OSError as error:
        raise read_error(str(path), error) from error


# -- smaps ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SmapsRange:
    """One mapping in smaps, as far as anybody here wants to know.

    :ivar name: the file, ``[heap]``, ``[anon:...]``, or empty
    :ivar figures: those lines in kB that somebody here wants to know, in bytes, under the kernel's names
    """

    start: int
    end: int
    permissions: str
    name: str
    figures: Mapping[str, int] = field(default_factory=dict)
    flags: frozenset[str] = frozenset()


_HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ([rwxsp-]{4}) [0-9a-f]+ [0-9a-f]+:[0-9a-f]+ \d+(?: +(.*))?", re.ASCII)
_FIGURES: Final = frozenset({"Rss", "Anonymous", "AnonHugePages", "KSM", "Swap"})


def parse_smaps(text: str) -> tuple[SmapsRange, ...]:
    """The mappings in the text of smaps.

    A file's name is printed with line feeds escaped, so no name can look like a line of its own.

    :raises ValueError: a line is of no known form
    """
    found: list[SmapsRange] = []
    figures: dict[str, int] = {}
    # Most mappings of a process have the same flags as some others.
    known: dict[str, frozenset[str]] = {}
    for line in text.split("\n"):
        name, _, value = line.partition(":")
        if value.endswith(" kB") and name.isidentifier():
            if name in _FIGURES:
                figures[name] = int(value[:-3]) * 1024
        elif match := _HEAD.fullmatch(line):
            figures = {}
            found.append(SmapsRange(int(match[1], 16), int(match[2], 16), match[3], match[4] or "", figures))
        elif line.startswith("VmFlags:") and found:
            last = found[-1]
            if line not in known:
                known[line] = frozenset(line[8:].split())
            found[-1] = SmapsRange(last.start, last.end, last.permissions, last.name, figures, known[line])
        elif line and not (found and ":" in line):
            # THPeligible, ProtectionKey and what later kernels bring have other forms and don't matter here.
            raise ValueError(f"{line[:60]!r} is not a line of smaps")
    return tuple(found)


def mappings(pid: int, root: Path = Path("/")) -> tuple[SmapsRange, ...]:
    """A process's mappings.

    :raises NoSuchProcess, Denied, ReadError: as `read_process_file`
    """
    return parsed(pid, read_process_file(pid, "smaps", root), root)


def parsed(pid: int, text: str, root: Path = Path("/")) -> tuple[SmapsRange, ...]:
    """The mappings in the text of a process's smaps.

    :raises Unparsable: a line is of no known form
    """
    try:
        return parse_smaps(text)
    except ValueError as error:
        path = str(root / "proc" / str(pid) / "smaps")
        raise Unparsable(path, str(error), path=path) from error


# -- numa_maps -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NumaRange:
    """A line of numa_maps.

    :ivar policy: the mapping's, else that of the thread whose numa_maps it is (fs/proc/task_mmu.c:show_numa_map)
    :ivar nodes: pages by node, counted once a mapping; those of a file that it maps among them
    :ivar anonymous_pages: how many are anonymous
    """

    start: int
    policy: str
    policy_nodes: frozenset[int]
    nodes: Mapping[int, int]
    anonymous_pages: int = 0


_NODE = re.compile(r"N(\d+)=(\d+)", re.ASCII)
_ANONYMOUS = re.compile(r"anon=(\d+)", re.ASCII)
# mm/mempolicy.c:policy_modes; the name, then "=" and flags, then ":" and nodes.
_POLICY = re.compile(
    r"(default|prefer(?: \(many\))?|bind|(?:weighted )?interleave|local|[a-z]+)(?:=[a-z|]+)?(?::([\d,-]+))?", re.ASCII
)


def parse_numa_maps(text: str) -> dict[int, NumaRange]:
    """The lines of numa_maps by their first address.

    :raises ValueError: a line is of no known form
    """
    found = {}
    for line in filter(None, text.split("\n")):
        address, blank, rest = line.partition(" ")
        # A file's name comes after the policy, so it can't be taken for one.
        policy = _POLICY.match(rest)
        if not (blank and policy and re.fullmatch(r"[0-9a-f]+", address, re.ASCII)):
            raise ValueError(f"{line[:60]!r} is not a line of numa_maps")
        figures = rest[policy.end() :].split(" ")
        counts = {int(match[1]): int(match[2]) for word in figures if (match := _NODE.fullmatch(word))}
        anonymous = sum(int(match[1]) for word in figures if (match := _ANONYMOUS.fullmatch(word)))
        start = int(address, 16)
        found[start] = NumaRange(start, policy[1], parse_list(policy[2] or ""), counts, anonymous)
    return found


def numa_ranges(pid: int, root: Path = Path("/")) -> dict[int, NumaRange]:
    """A process's lines of numa_maps by their first address; empty on a kernel without NUMA.

    :raises NoSuchProcess, Denied, ReadError: as `read_process_file`
    """
    try:
        text = read_process_file(pid, "numa_maps", root)
    except Absent:
        return {}
    try:
        return parse_numa_maps(text)
    except ValueError as error:
        path = str(root / "proc" / str(pid) / "numa_maps")
        raise Unparsable(path, str(error), path=path) from error


def read_ranges(pid: int, root: Path = Path("/"), page_size: int = 4096) -> tuple[Range, ...]:
    """A process's mappings with their policies.

    The two files are read one after the other: a mapping made in between has the default policy here.

    :raises NoSuchProcess, Denied, ReadError: as `read_process_file`
    """
    policies = numa_ranges(pid, root)
    return join(mappings(pid, root), policies, page_size)


def join(found: Iterable[SmapsRange], policies: Mapping[int, NumaRange], page_size: int = 4096) -> tuple[Range, ...]:
    """Mappings from smaps with their policies from numa_maps."""
    ranges = []
    for mapping in found:
        policy = policies.get(mapping.start)
        ksm = mapping.figures.get("KSM")
        resident = mapping.figures.get("Rss", 0)
        ranges.append(
            Range(
                start=mapping.start,
                end=mapping.end,
                flags=mapping.flags,
                policy=policy.policy if policy else "default",
                policy_nodes=policy.policy_nodes if policy else frozenset(),
                resident_pages=resident // page_size,
                anonymous_pages=mapping.figures.get("Anonymous", resident) // page_size,
                ksm_pages=None if ksm is None else ksm // page_size,
            )
        )
    return tuple(ranges)
