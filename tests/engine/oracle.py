# SPDX-License-Identifier: GPL-2.0-or-later
"""What must have been merged at rest, by plain grouping: nothing here knows how KSM gets there."""

from __future__ import annotations

from collections import defaultdict

from ksmd_ctl.engine.machine import Machine
from ksmd_ctl.engine.memory import Page
from ksmd_ctl.engine.state import NULL_STABLE_NODE, Head, folio_test_ksm, page_to_nid


def groups(machine: Machine) -> dict[tuple[int, bytes], set[Page]]:
    """The frames of all mergeable memory by tree (a node, or 0 for all) and content."""
    found: dict[tuple[int, bytes], set[Page]] = defaultdict(set)
    for process in machine.processes.values():
        for vma in process.mm.vmas:
            if vma.mergeable and process.mm.slot is not None:
                for pte in vma.ptes:
                    if isinstance(pte, Page):
                        tree = 0 if machine.ksm.merge_across_nodes else page_to_nid(pte)
                        found[tree, pte.content].add(pte)
    return found


def is_full(machine: Machine, page: Page) -> bool:
    """Whether a KSM page takes no further mapping: the limit, or none of its mappings is listed."""
    node = page.stable_node
    assert node is not None
    limit = machine.ksm.max_page_sharing if machine.ksm.profile.chains else 1 << 62
    return not 0 < node.rmap_hlist_len < limit


def unexplained(machine: Machine) -> list[str]:
    """What equal content in one tree is still apart, and no rule says why."""
    profile = machine.ksm.profile
    wrong = []
    for (tree, content), frames in groups(machine).items():
        # A page was upgraded, and broken again because its partner could not be merged; other mappings,
        # by fork, keep it, and it never gets a node. It can't be merged itself, and in the unstable tree
        # it is the partner that others find: so they stay apart too.
        if any(page.stable_node is NULL_STABLE_NODE for page in frames):
            continue
        merged = [page for page in frames if folio_test_ksm(page)]
        plain = [page for page in frames if not folio_test_ksm(page)]
        what = f"tree {tree} content {content[:4]!r}: {frames}"
        if len(plain) > 1:
            wrong.append(f"{what}: several plain pages")
        if plain and any(
            not is_full(machine, page) and page.stable_node.head in (Head.TREE, Head.DUP)  # type: ignore[union-attr]
            for page in merged
        ):
            wrong.append(f"{what}: a plain page beside a KSM page with room")
        placed = [page for page in merged if page.stable_node.head is Head.TREE]  # type: ignore[union-attr]
        chained = [page for page in merged if page.stable_node.head is Head.DUP]  # type: ignore[union-attr]
        if len(placed) > 1 or (placed and chained):
            wrong.append(f"{what}: several KSM pages, not in one chain")
        exiled = [page for page in merged if page.stable_node.head is Head.MIGRATE_NODES]  # type: ignore[union-attr]
        if exiled and not placed and not chained:
            wrong.append(f"{what}: exiled, and its place is free")
        if exiled and profile.remerge:
            wrong.append(f"{what}: exiled beside a twin that it should have been merged onto")
        if exiled and profile.chains and any(page.mapcount > 1 for page in exiled):
            wrong.append(f"{what}: exiled with several mappings, though there are chains")
    return wrong
