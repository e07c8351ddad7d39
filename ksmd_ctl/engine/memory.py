# SPDX-License-Identifier: GPL-2.0-or-later
"""Page frames of a host with several memory nodes, and their contents.

A content is held once, however many frames have it: two pages are equal where their contents are the same ``bytes``
object, and unequal contents order as memcmp orders them.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ksmd_ctl.engine.mm import AnonVma
    from ksmd_ctl.engine.state import StableNode

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT

#: Pages of a huge page, which lies at a multiple of its size (x86-64).
HUGE_PAGES: Final = 512
HUGE_SIZE: Final = HUGE_PAGES << PAGE_SHIFT

#: The node of a frame is the upper part of its number.
PFN_NID_SHIFT: Final = 24
_INDEX_MASK: Final = (1 << PFN_NID_SHIFT) - 1

#: The content of a page of zeroes.
ZERO_CONTENT: Final = bytes(PAGE_SIZE)


def page_content(label: str, size: int = PAGE_SIZE) -> bytes:
    """A page with a label's content: its UTF-8 bytes and one NUL, repeated and cut; so pages compare as labels do.

    The label "0" is a page of zeroes.
    """
    if label == "0":
        return bytes(size)
    unit = label.encode() + b"\0"
    return (unit * (size // len(unit) + 1))[:size]


class Page:
    """``struct page`` of an anonymous page, which is its own folio or part of a huge page (engine.md 1.1, 14.10).

    Migration gives the page another frame number; the object stays, so page tables need no change.

    :ivar pfn: its frame
    :ivar content: its bytes
    :ivar mapcount: how many page table entries map it; it is freed with the last
    :ivar stable_node: None of a plain page. A KSM page's stable_node, or NULL_STABLE_NODE where it has
        none: between the upgrade and stable_tree_insert, and after it was replaced.
    :ivar swap: the entry that it was read back from, None where it never was swapped out
    :ivar folio: the huge page that it is part of, None where it is none
    """

    __slots__ = ("content", "folio", "mapcount", "pfn", "stable_node", "swap")

    def __init__(self, pfn: int, content: bytes) -> None:
        self.pfn = pfn
        self.content = content
        self.mapcount = 1
        self.stable_node: StableNode | None = None
        self.swap: SwapEntry | None = None
        self.folio: Folio | None = None

    def __repr__(self) -> str:
        return f"<Page {self.pfn:#x} mapped {self.mapcount}>"


@dataclass(slots=True, eq=False)
class Folio:
    """``struct folio`` of a huge page.

    :ivar pages: its pages, in order
    :ivar anon_vma: the VMAs that may map it, at `offset` as `Vma.moved` counts it
    """

    pages: list[Page]
    anon_vma: AnonVma
    offset: int


class ZeroPte(Enum):
    """A page table entry that maps the zero page."""

    #: after a read, or placed by KSM on a kernel that does not mark it
    ZERO = "zero"
    #: placed by KSM and marked so (engine.md 5.6)
    KSM = "ksm"


@dataclass(slots=True, eq=False)
class SwapEntry:
    """A swapped page: its content, how many entries point to it, and its page once it is back.

    :ivar place: where it was first read back: the root of the anon_vma, and the offset of the page in it
    """

    content: bytes
    count: int
    page: Page | None = None
    place: tuple[object, int] | None = None


Pte = Page | ZeroPte | SwapEntry | None


class MemoryNode:
    """A node with memory and its frames."""

    __slots__ = ("capacity", "free", "mem_map", "nid", "online", "used")

    def __init__(self, nid: int, capacity: int) -> None:
        self.nid = nid
        self.capacity = capacity
        self.used = 0
        self.online = True
        self.mem_map: list[Page | None] = []
        self.free: list[int] = []

    def take(self) -> int | None:
        """A free frame, None where the node is full or offline."""
        if self.used >= self.capacity or not self.online:
            return None
        self.used += 1
        if self.free:
            return self.free.pop()
        self.mem_map.append(None)
        return self.nid << PFN_NID_SHIFT | len(self.mem_map) - 1

    def put(self, pfn: int) -> None:
        """Give a frame back."""
        self.mem_map[pfn & _INDEX_MASK] = None
        self.free.append(pfn)
        self.used -= 1

    def pages(self) -> Iterator[Page]:
        """All pages on this node."""
        return (page for page in self.mem_map if page is not None)


class Memory:
    """All nodes' frames, and the table of contents.

    :param content_bytes: the length of contents, but for that of a page of zeroes; less than a page where they only
        stand for contents
    :ivar pinned: pages with references that no page table explains (a device, vmsplice): they can't
        be merged or migrated
    :ivar locked: pages that somebody else holds the lock of
    :ivar swap_ins: how often a page was read back from swap
    :ivar splits: how many huge pages were split
    :ivar freed_by_splits: pages of zeroes that splits gave back
    """

    def __init__(self, capacities: list[int], content_bytes: int = PAGE_SIZE) -> None:
        self._content_bytes = content_bytes
        self.nodes = [MemoryNode(nid, capacity) for nid, capacity in enumerate(capacities)]
        self.pinned: set[Page] = set()
        self.locked: set[Page] = set()
        self.swap_ins = 0
        self.splits = 0
        self.freed_by_splits = 0
        # A content that more than one page has also has its number of further pages here.
        self._contents: dict[bytes, bytes] = {ZERO_CONTENT: ZERO_CONTENT}
        self._shared: dict[bytes, int] = {}

    @property
    def nr_node_ids(self) -> int:
        """How many node numbers there are."""
        return len(self.nodes)

    def hold(self, content: bytes) -> bytes:
        """The one object for a content, which gets one user more."""
        if len(content) != self._content_bytes and content is not ZERO_CONTENT:
            raise ValueError(f"a page has {self._content_bytes} bytes, not {len(content)}")
        held = self._contents.get(content)
        if held is None:
            self._contents[content] = content
            return content
        self._shared[held] = self._shared.get(held, 0) + 1
        return held

    def drop(self, content: bytes) -> None:
        """One user of a content less; the last one's leaves the table."""
        further = self._shared.get(content, 0)
        if further > 1:
            self._shared[content] = further - 1
        elif further:
            del self._shared[content]
        else:
            del self._contents[content]

    def contents(self) -> dict[bytes, int]:
        """Each content with its number of users."""
        return {each: 1 + self._shared.get(each, 0) for each in self._contents}

    def pfn_to_page(self, pfn: int) -> Page | None:
        """The page in a frame, None where the frame is free."""
        return self.nodes[pfn >> PFN_NID_SHIFT].mem_map[pfn & _INDEX_MASK]

    def alloc_page(self, content: bytes, nid: int) -> Page:
        """A new page with one mapping, on the node wanted or, where that is full, on another.

        :raises OSError: ENOMEM, no node has a free frame
        """
        for step in range(len(self.nodes)):
            node = self.nodes[(nid + step) % len(self.nodes)]
            pfn = node.take()
            if pfn is not None:
                page = node.mem_map[pfn & _INDEX_MASK] = Page(pfn, self.hold(content))
                return page
        raise OSError(errno.ENOMEM, "no node has a free frame")

    def alloc_folio(self, contents: Sequence[bytes], nid: int, anon_vma: AnonVma, offset: int) -> Folio | None:
        """A huge page with one mapping, on the node wanted or, where that is full, on another; None without room."""
        for step in range(len(self.nodes)):
            node = self.nodes[(nid + step) % len(self.nodes)]
            if node.online and node.capacity - node.used >= len(contents):
                folio = Folio([self.alloc_page(content, node.nid) for content in contents], anon_vma, offset)
                for page in folio.pages:
                    page.folio = folio
                return folio
        return None

    def set_content(self, page: Page, content: bytes) -> None:
        """Write to a page that only one mapping has."""
        held = self.hold(content)
        self.drop(page.content)
        page.content = held

    def unmap(self, page: Page) -> None:
        """One mapping less; the last one frees the page (engine.md 1.1)."""
        page.mapcount -= 1
        if page.mapcount == 0:
            self.nodes[page.pfn >> PFN_NID_SHIFT].put(page.pfn)
            self.drop(page.content)
            page.stable_node = None
            self.pinned.discard(page)
            self.locked.discard(page)

    def move_frame(self, page: Page, nid: int) -> bool:
        """Put a page into a frame of another node; False where that one has none free."""
        new = self.nodes[nid].take()
        if new is None:
            return False
        self.nodes[nid].mem_map[new & _INDEX_MASK] = page
        self.nodes[page.pfn >> PFN_NID_SHIFT].put(page.pfn)
        page.pfn = new
        return True
