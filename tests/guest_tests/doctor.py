# SPDX-License-Identifier: GPL-2.0-or-later
"""What the doctor says where there are several nodes, and on a kernel whose kpageflags can't be trusted. In a guest:

tests/guest/run --kernel 6.12 --nodes 2 -- python -m pytest tests/guest_tests/doctor.py
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ksmd_ctl.host.operation import Move
from ksmd_ctl.kernel import libnuma, migrate
from ksmd_ctl.kernel.detection import probe
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.topology import memory_blocks, read_topology
from ksmd_ctl.scenario.regions import spawn
from tests.kernel.test_detection import filled
from tests.service.programs import Ksm, equal, program, visit
from tests.service.running import run_command, until

pytestmark = pytest.mark.ksm

NODES = [node.number for node in read_topology(numa=libnuma.available()).with_memory()]

if len(NODES) < 2:
    pytest.skip(f"needs two nodes with memory, and there is {len(NODES)}", allow_module_level=True)

FIRST, SECOND = NODES[:2]
#: What is said of this kernel whatever else there is.
KERNEL = ["kpageflags"] if probe().bit_lies else []


@pytest.fixture
def ksm(ksm_host: Path) -> Ksm:
    return Ksm(ksm_host)


def test_migrated_twins_and_pages_far_from_home(ksm: Ksm, tmp_path: Path) -> None:
    ksm.set(merge_across_nodes=0)
    with spawn("test-doctor", FIRST) as one:
        contents = [filled(1 + number // 4) for number in range(400)]
        here, there = one.map(400, FIRST), one.map(400, SECOND)
        for start in (here, there):
            one.advise(start, 400, mergeable=True)
            one.store(start, contents)
        ksm.merging(sleep_millisecs=2000)
        ksm.scanned(4)
        assert (ksm["pages_shared"], ksm["pages_sharing"]) == (200, 600)
        found = visit(tmp_path)
        assert (found.codes, found.code) == (KERNEL, 0)
        ksm.set(run=0)
        request = Move(one.id, to=SECOND, ranges=((here, here + 400 * PAGE_SIZE),))
        assert migrate.move(request).moved == 100
        ksm.merging(sleep_millisecs=2000)
        ksm.scanned(4)
        found = visit(tmp_path)
        assert found.codes == ["twins", "remote-pages", *KERNEL]
        # By the counters alone the limit may account for three.
        assert found.figure("twins", "superfluous copies, at least") == 97
        assert found.figure("remote-pages", "away from home") == 400


def test_merged_across_nodes(ksm: Ksm, tmp_path: Path) -> None:
    with spawn("test-doctor", FIRST) as one, spawn("test-doctor", FIRST) as other:
        for process, node in ((one, FIRST), (other, SECOND)):
            start = process.map(400, node)
            process.advise(start, 400, mergeable=True)
            process.store(start, [filled(1 + number) for number in range(400)])
        ksm.merging(sleep_millisecs=2000)
        ksm.scanned(4)
        found = visit(tmp_path)
        assert found.codes == ["remote-pages", *KERNEL]
        assert found.figure("remote-pages", "away from home") == 400
        assert found["remote-pages"]["command"] == "ksmd-ctl set merge_across_nodes=0 --dry-run"


def test_zero_pages_that_the_kernel_does_not_count(ksm: Ksm, tmp_path: Path) -> None:
    if (ksm.folder / "ksm_zero_pages").exists():
        pytest.skip("this kernel counts them")
    with program("area = mergeable([0] * 2000)"):
        ksm.merging(use_zero_pages=1, sleep_millisecs=1000)
        ksm.scanned(4)
        assert ksm["pages_sharing"] == 0
        found = visit(tmp_path)
        assert "zero-pages" in found.codes, found
        assert found.figure("zero-pages", "zero pages that are mapped") >= 2000 * PAGE_SIZE
        status = run_command("status")
        status.check_returncode()
        assert "without pages of zeroes, which this kernel does not count" in " ".join(status.stdout.split())


# -- memory goes offline -----------------------------------------------------------------------------------


#: A page on one node that a pipe holds: memory that it is in can't go offline, and the kernel tries on and on.
HOLDS = """
mask = ctypes.c_ulong(1 << {node})
# set_mempolicy, MPOL_BIND
assert libc.syscall(238, 2, ctypes.byref(mask), 64) == 0
area = memory(16)
for at in range(16):
    area[at * PAGE] = 1
class Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
reading, writing = os.pipe()
vector = Iovec(address(area), 16 * PAGE)
assert libc.vmsplice(writing, ctypes.byref(vector), 1, 0) == 16 * PAGE
with open("/proc/self/pagemap", "rb") as file:
    file.seek(address(area) // PAGE * 8)
    frame = int.from_bytes(file.read(8), "little") & (1 << 55) - 1
open({said!r}, "w").write(str(frame))
"""


@contextmanager
def going_offline(ksm: Ksm, frame: int) -> Iterator[None]:
    """The memory block of a frame is to be taken offline, for as long as this lasts."""
    (block,) = (found for found in memory_blocks() if found.first <= frame < found.last)
    state = f"/sys/devices/system/memory/memory{block.number}/state"
    with subprocess.Popen(["sh", "-c", f"echo offline > {state}"], stderr=subprocess.DEVNULL) as process:
        try:
            until("ksmd to be parked", lambda: True if ksm["run"] & 4 else None)
            yield
        finally:
            # A signal has the kernel give up.
            process.kill()
    until("ksmd to go on", lambda: True if not ksm["run"] & 4 else None)


def test_memory_that_can_not_go_offline(ksm: Ksm, tmp_path: Path) -> None:
    said = tmp_path / "frame"
    with program(HOLDS.format(node=SECOND, said=str(said))), program(equal(400)), program(equal(400)):
        ksm.merging(sleep_millisecs=2000)
        ksm.scanned(4)
        with going_offline(ksm, int(said.read_text())):
            found = visit(tmp_path)
        assert found.codes[0] == "memory-offline", found
        assert found["memory-offline"]["severity"] == "blocks merging"
        ksm.scanned(2)
        assert "memory-offline" not in visit(tmp_path).codes


# -- a device that is passed through -----------------------------------------------------------------------


#: A process that has given a device to itself, and half of its memory to the device.
PASSES = """
import fcntl
area = mergeable(range(100_000, 100_800))
container = os.open("/dev/vfio/vfio", os.O_RDWR)
group = os.open("/dev/vfio/{group}", os.O_RDWR)
# VFIO_GROUP_SET_CONTAINER, VFIO_SET_IOMMU with VFIO_TYPE1v2_IOMMU, VFIO_IOMMU_MAP_DMA to read and to write
fcntl.ioctl(group, 0x3B68, container.to_bytes(4, "little"))
fcntl.ioctl(container, 0x3B66, 3)
place = [address(area), 0, 800 * PAGE]
fcntl.ioctl(container, 0x3B71, b"".join([(32).to_bytes(4, "little"), (3).to_bytes(4, "little"),
    *(one.to_bytes(8, "little") for one in place)]))
ready()
command()
# VFIO_IOMMU_UNMAP_DMA, and let go of it all
fcntl.ioctl(container, 0x3B72, b"".join([(24).to_bytes(4, "little"), (0).to_bytes(4, "little"),
    *(one.to_bytes(8, "little") for one in place[1:])]))
os.close(group), os.close(container)
"""

#: QEMU's device for teaching: no driver wants it.
EDU = "0x1234", "0x11e8"


def passed_through() -> int:
    """Give the device to vfio-pci; its group."""
    # Interrupts of the emulated device are not kept apart, and it is given to nobody who could misuse that.
    subprocess.run(["modprobe", "vfio_iommu_type1", "allow_unsafe_interrupts=1"], check=True)
    subprocess.run(["modprobe", "vfio-pci"], check=True)
    for device in Path("/sys/bus/pci/devices").iterdir():
        if ((device / "vendor").read_text().strip(), (device / "device").read_text().strip()) == EDU:
            if not (device / "iommu_group").exists():
                break
            (device / "driver_override").write_text("vfio-pci")
            Path("/sys/bus/pci/drivers_probe").write_text(device.name)
            return int((device / "iommu_group").resolve().name)
    pytest.skip("needs an IOMMU and the device edu (--device intel-iommu --device edu --append intel_iommu=on)")


def test_memory_that_is_pinned_for_a_device(ksm: Ksm, tmp_path: Path) -> None:
    group = passed_through()
    with program(PASSES.format(group=group)) as process, program(equal(800, 100_000)):
        ksm.merging(sleep_millisecs=1000)
        ksm.scanned(4)
        found = visit(tmp_path, seconds=5)
        assert {"pinned", "held-pages"} <= set(found.codes), found
        assert f"VFIO: /dev/vfio/{group}" in str(found["pinned"]["evidence"])
        assert found.figure("held-pages", "identical pages that are not merged") == 800
        assert ksm["pages_sharing"] == 0
        process.say("let go")
        ksm.scanned(4)
        assert ksm["pages_sharing"] == 800
        assert not {"pinned", "held-pages"} & set(visit(tmp_path).codes)
