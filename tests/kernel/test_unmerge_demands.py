# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

from array import array
from pathlib import Path

from ksmd_ctl.kernel.inventory import ProcessDemand, charged_pages, freed_pages, limits_above, unmerge_demands
from ksmd_ctl.kernel.process_pages import Walk
from ksmd_ctl.kernel.topology import FrameMap, Span
from tests.kernel.test_ranges import TOPOLOGY
from tests.kernel.trees import meminfo, write_tree

CGROUPS = "sys/fs/cgroup"


def tree(tmp_path: Path) -> Path:
    return write_tree(
        tmp_path,
        {
            "proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 4000 kB\n",
            **{
                f"sys/devices/system/node/node{number}/meminfo": meminfo(number, 9000, free)
                for number, free in ((0, 800), (1, 1000), (2, 2000))
            },
            "proc/7/cgroup": "0::/a/b\n",
            "proc/8/cgroup": "0::/a\n",
            # 4 MiB of each are its reserve.
            f"{CGROUPS}/a/memory.max": str(7096 * 1024),
            f"{CGROUPS}/a/memory.current": str(1000 * 1024),
            f"{CGROUPS}/a/b/memory.max": str(5096 * 1024),
            f"{CGROUPS}/a/b/memory.current": str(900 * 1024),
        },
    )


def test_what_would_go_over_and_by_how_much(tmp_path: Path) -> None:
    root = tree(tmp_path)
    found = unmerge_demands(
        # 1200 KiB at home on node 0; 480 anywhere; one that is gone meanwhile.
        [ProcessDemand(7, 0, 300), ProcessDemand(8, None, 120), ProcessDemand(10, 2, 10)],
        TOPOLOGY,
        limits_above([7, 8, 10], root),
        freed={0: 50, 1: 100},
        charged={},
        floor_bytes=100 * 1024,
        root=root,
    )
    kib = {item.where: (item.growth_bytes // 1024, item.free_bytes // 1024, item.over_bytes // 1024) for item in found}
    assert kib == {
        "/a/b": (1200, 100, 1100),
        "node 0": (1200 + 480 - 200, 700, 780),
        "/a": (1680, 2000, 0),
        "node 1": (480 - 400, 900, 0),
        "node 2": (480 + 40, 1900, 0),
        "host": (1200 + 480 + 40 - 600, 3900, 0),
    }
    assert [item.where for item in found[:2]] == ["/a/b", "node 0"]
    assert all(item.upper_bound for item in found)


def test_what_is_charged_to_a_cgroup_already_is_not_taken_from_it_again(tmp_path: Path) -> None:
    root = tree(tmp_path)
    found = unmerge_demands(
        [ProcessDemand(7, 0, 300, exact=True), ProcessDemand(8, 1, 100, exact=True)],
        TOPOLOGY,
        limits_above([7, 8], root),
        freed={0: 150, 1: 0, 2: 0},
        charged={"/a/b": 140, "/a": 150},
        root=root,
    )
    kib = {item.where: item.growth_bytes // 1024 for item in found}
    assert kib == {"/a/b": 640, "/a": 1000, "node 0": 600, "node 1": 400, "node 2": 0, "host": 1000}
    assert not any(item.upper_bound for item in found)


def test_a_frame_is_charged_where_nobody_outside_maps_it_and_the_kernel_says_so(tmp_path: Path) -> None:
    root = tree(tmp_path)
    inner, outer = ((root / CGROUPS / name).stat().st_ino for name in ("a/b", "a"))

    def words(path: str, **values: int) -> None:
        content = array("Q", [values.get(f"f{frame}", 0) for frame in range(10)])
        (root / path).write_bytes(content.tobytes())

    # Frame 1 only inside of /a/b, 2 across both, 3 also mapped outside of either, 4 charged to somebody who is gone.
    words("proc/kpagecount", f1=2, f2=2, f3=3, f4=2)
    words("proc/kpagecgroup", f1=inner, f2=outer, f3=inner, f4=1)
    walks = {7: walk(1, 1, 2, 3, 4), 8: walk(2, 3, 4)}
    assert charged_pages(walks, limits_above([7, 8], root), root) == {"/a/b": 1, "/a": 2}
    (root / "proc/kpagecgroup").unlink()
    assert charged_pages(walks, limits_above([7, 8], root), root) == {}


def test_frames_that_come_free_are_counted_once_and_only_where_all_was_looked_at() -> None:
    frames = FrameMap([Span(0, 3, 0), Span(3, 10, 1)])
    assert freed_pages([walk(1, 1, 4), walk(1, 2)], frames) == {0: 2, 1: 1}
    assert freed_pages([walk(1), Walk()], frames) is None


def walk(*frames: int) -> Walk:
    return Walk(frames=array("Q", frames), complete=True)
