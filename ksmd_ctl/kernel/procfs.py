# SPDX-License-Identifier: GPL-2.0-or-later
"""What a tick reads outside of /sys/kernel/mm/ksm: vmstat, splits of huge pages, memory of host and nodes, pressure.

Only the lines that are wanted are looked for; no text is split. Sources: proc(5), mm/vmstat.c (``vmstat_text``),
mm/huge_memory.c (``split_show``), kernel/sched/psi.c (``psi_show``), drivers/base/node.c (``node_read_meminfo``).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from ksmd_ctl.errors import Absent, ReadError, Unparsable
from ksmd_ctl.host.fields import FIELDS, Source
from ksmd_ctl.host.sample import NodeMemory, Reading
from ksmd_ctl.kernel.proc_pid import pids
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE, PseudoFile, error_for, parse_list, read_file, without_frames

_KIB = 1024

#: What a file with one number holds at most.
_NUMBER_BYTES = 32

#: kthreadd: the parent of every kernel thread.
_KTHREADD = 2


def labelled_number(data: bytes, label: bytes) -> int | None:
    """The number after a label that begins a line; None where no line begins so.

    :raises ValueError: the label is there, and no number follows
    """
    text = _after(data, label)
    if text is None:
        return None
    digits = text.strip().removesuffix(b" kB").rstrip()
    if not digits.isdigit() or len(digits) > 20:
        raise ValueError(f"{text[:40].decode('ascii', 'backslashreplace')!r} is not a number")
    return int(digits)


def _after(data: bytes, label: bytes) -> bytes | None:
    """The rest of the line that begins with a label."""
    if data.startswith(label):
        at = len(label)
    elif (found := data.find(b"\n" + label)) >= 0:
        at = found + 1 + len(label)
    else:
        return None
    end = data.find(b"\n", at)
    return data[at : end if end >= 0 else len(data)]


def find_ksmd(proc: Path) -> int:
    """The pid of the kernel thread ksmd.

    :raises Absent: as `find_kernel_thread` does
    """
    return find_kernel_thread(proc, "ksmd")


def find_kernel_thread(proc: Path, name: str) -> int:
    """The pid of a kernel thread.

    :raises Absent: there is none, or this pid namespace doesn't show it
    """
    what = f"looking for the kernel thread {name}"
    try:
        running = pids(proc)
    except OSError as error:
        raise Absent(what, f"{proc} can't be listed", path=str(proc), errno=error.errno) from error
    for pid in running:
        try:
            data = read_file(proc / str(pid) / "stat")
            # Anybody may call itself so; only kernel threads have kthreadd as parent and no command line.
            kernel_thread = data.rpartition(b")")[2].split()[1:2] == [b"%d" % _KTHREADD]
            if b" (%s) " % name.encode() in data and kernel_thread and not read_file(proc / str(pid) / "cmdline"):
                return pid
        except ReadError:
            continue
    hint = f"inside a container, {name} is not to be seen" if running else ""
    raise Absent(what, "no kernel thread has that name", hint=hint, path=str(proc))


class SplitFiles:
    """hugepages-*kB/stats/split (since 6.11): how many huge pages of each size were split, by whomever."""

    def __init__(self, root: Path = Path("/")) -> None:
        folder = root / "sys/kernel/mm/transparent_hugepage"
        self._largest_bytes = PseudoFile(folder / "hpage_pmd_size", _NUMBER_BYTES)
        self._sizes = [
            (int(match[1]) * _KIB, PseudoFile(path, _NUMBER_BYTES))
            for path in sorted(folder.glob("hugepages-*kB/stats/split"))
            if (match := re.fullmatch(r"hugepages-(\d+)kB", path.parts[-3], re.ASCII))
        ]

    def close(self) -> None:
        """Give the descriptors back."""
        for _, file in self._sizes:
            file.close()
        self._largest_bytes.close()

    def pages(self, largest: int) -> int:
        """Pages of all that were split since boot.

        :param largest: how many of the largest size, which every kernel counts (thp_split_page)
        :raises ReadError: a file can't be read, or holds no number
        """
        of_largest = largest * _number(self._largest_bytes) if largest else 0
        return max(of_largest, sum(size * _number(file) for size, file in self._sizes)) // PAGE_SIZE


def _number(file: PseudoFile) -> int:
    text = file.read().strip()
    if not text.isdigit():
        raise Unparsable(f"reading {file.path}", f"{text[:40]!r} is not a number", path=file.path)
    return int(text)


def split_pages(root: Path = Path("/")) -> int | None:
    """Pages of all huge pages that were split since boot, by whomever; None where that isn't counted."""
    files = SplitFiles(root)
    try:
        largest = labelled_number(read_file(root / "proc/vmstat"), b"thp_split_page ")
        return None if largest is None else files.pages(largest)
    except (ReadError, ValueError):
        return None
    finally:
        files.close()


class HostFiles:
    """/proc/vmstat, splits of huge pages, /proc/meminfo, /proc/pressure/memory and cpu."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._proc = root / "proc"
        self._vmstat = PseudoFile(self._proc / "vmstat")
        self._splits = SplitFiles(root)
        self._meminfo = PseudoFile(self._proc / "meminfo")
        self._pressure = PseudoFile(self._proc / "pressure/memory")
        self._cpu_pressure = PseudoFile(self._proc / "pressure/cpu")
        self._vmstat_labels = [
            (field.name, field.name.encode() + b" ") for field in FIELDS if field.source is Source.VMSTAT
        ]

    def close(self) -> None:
        """Give the descriptors back."""
        for file in (self._vmstat, self._meminfo, self._pressure, self._cpu_pressure):
            file.close()
        self._splits.close()

    def sample(self, into: dict[str, Reading]) -> NodeMemory | None:
        """Read all; a field that can't be had gets its error. Gives the host's memory, if known."""
        _fill(into, self._vmstat, self._vmstat.read_all, self._vmstat_labels)
        into["split_folio_pages"] = self._split_pages(into["thp_split_page"])
        found: dict[str, Reading] = {}
        _fill(found, self._meminfo, self._meminfo.read, _MEMINFO_LABELS, _kib_bytes)
        free = found.pop("free")
        into.update(found)
        _fill(into, self._pressure, self._pressure.read, _PRESSURE_LABELS, _stalled_seconds)
        _fill(into, self._cpu_pressure, self._cpu_pressure.read, _CPU_PRESSURE_LABELS, _stalled_seconds)
        total = found["mem_total_bytes"]
        return NodeMemory(total, free) if isinstance(total, int) and isinstance(free, int) else None

    def _split_pages(self, largest: Reading) -> Reading:
        if isinstance(largest, ReadError):
            return error_for("split_folio_pages", largest)
        try:
            return self._splits.pages(int(largest))
        except ReadError as error:
            return without_frames(error)


class NodeFiles:
    """/sys/devices/system/node/nodeN/meminfo of the nodes that are online."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._directory = root / "sys/devices/system/node"
        self._online = PseudoFile(self._directory / "online")
        self._list = b""
        self._nodes: list[tuple[int, PseudoFile, bytes, bytes]] = []

    def close(self) -> None:
        """Give the descriptors back."""
        self._online.close()
        self._list = b""
        self._open([])

    def sample(self) -> dict[int, NodeMemory] | None:
        """Memory by node, without those whose file can't be read; None where the kernel has no NUMA.

        :raises Unparsable, Unreadable: which nodes are online can't be had
        """
        try:
            data = self._online.read()
        except Absent:
            return None
        if data != self._list:
            try:
                self._open(sorted(parse_list(data.decode("ascii", "replace"))))
            except ValueError as error:
                raise Unparsable("reading the nodes that are online", str(error), path=self._online.path) from error
            self._list = data
        nodes = {}
        for number, file, total_label, free_label in self._nodes:
            try:
                data = file.read()
                total, free = labelled_number(data, total_label), labelled_number(data, free_label)
            except (ReadError, ValueError):
                # Its memory is not known: it is left out, which nobody takes for zero. A node that is being
                # removed shows like this for a moment.
                continue
            if total is not None and free is not None:
                nodes[number] = NodeMemory(total * _KIB, free * _KIB)
        return nodes

    def _open(self, numbers: list[int]) -> None:
        for _, file, _, _ in self._nodes:
            file.close()
        self._nodes = [
            (
                number,
                PseudoFile(self._directory / f"node{number}/meminfo"),
                b"Node %d MemTotal:" % number,
                b"Node %d MemFree:" % number,
            )
            for number in numbers
        ]


_MEMINFO_LABELS = [
    ("mem_total_bytes", b"MemTotal:"),
    ("mem_available_bytes", b"MemAvailable:"),
    ("free", b"MemFree:"),
]
_CPU_PRESSURE_LABELS = [("cpu_pressure_some_seconds", b"some ")]
_PRESSURE_LABELS = [("pressure_some_seconds", b"some "), ("pressure_full_seconds", b"full ")]


def _kib_bytes(data: bytes, label: bytes) -> int | None:
    kib = labelled_number(data, label)
    return None if kib is None else kib * _KIB


def _stalled_seconds(data: bytes, label: bytes) -> float | None:
    line = _after(data, label)
    if line is None:
        return None
    _, found, microseconds = line.rpartition(b"total=")
    if not found or not microseconds.isdigit() or len(microseconds) > 20:
        raise ValueError(f"{line[:80].decode('ascii', 'backslashreplace')!r} has no total")
    return int(microseconds) / 1_000_000


def _fill(
    into: dict[str, Reading],
    file: PseudoFile,
    read: Callable[[], bytes],
    labels: list[tuple[str, bytes]],
    parse: Callable[[bytes, bytes], int | float | None] = labelled_number,
) -> None:
    """Read a file and put what follows each label into `into`, or the error that says why there is nothing."""
    try:
        data = read()
    except ReadError as error:
        for name, _ in labels:
            into[name] = error_for(name, error)
        return
    for name, label in labels:
        try:
            value = parse(data, label)
        except ValueError as error:
            into[name] = Unparsable(f"reading {name}", str(error), path=file.path)
            continue
        if value is None:
            into[name] = Absent(f"reading {name}", "this kernel does not have it", path=file.path)
        else:
            into[name] = value
