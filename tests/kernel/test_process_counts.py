# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

from pathlib import Path

import pytest

from ksmd_ctl.errors import NoSuchProcess
from ksmd_ctl.kernel.process_counts import KsmCounts, parse_ksm_stat, read_counts
from tests.kernel.trees import write_tree


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("ksm_rmap_items 5\n", KsmCounts(rmap_items=5)),
        (
            "ksm_rmap_items 5\nksm_zero_pages -1\nksm_merging_pages 3\nksm_process_profit -320\n",
            KsmCounts(5, -1, 3, -320),
        ),
        (
            "ksm_rmap_items 5\nksm_merging_pages 3\nksm_merge_any: no\nksm_mergeable: yes\nnew thing\n",
            KsmCounts(rmap_items=5, merging_pages=3, merge_any=False, mergeable=True),
        ),
        ("", KsmCounts()),
    ],
)
def test_counts_of_every_kernel(text: str, counts: KsmCounts) -> None:
    assert parse_ksm_stat(text) == counts


def test_counts_come_from_the_file_that_there_is(tmp_path: Path) -> None:
    root = write_tree(
        tmp_path,
        {
            "proc/1/ksm_stat": "ksm_rmap_items 9\n",
            "proc/1/ksm_merging_pages": "4\n",
            "proc/2/ksm_merging_pages": "7\n",
            "proc/3/comm": "x\n",
        },
    )
    assert read_counts(1, root) == KsmCounts(rmap_items=9, merging_pages=4)
    assert read_counts(2, root) == KsmCounts(merging_pages=7)
    assert read_counts(3, root) == KsmCounts()
    with pytest.raises(NoSuchProcess):
        read_counts(4, root)
