# SPDX-License-Identifier: GPL-2.0-or-later
"""Red-black trees with the names, and so with the shapes, of the kernel's (lib/rbtree.c since 3.7).

The shape matters: which node is the root decides which searches walk over a stale one (engine.md 4.3).
A node is a member of what it orders: stable nodes and rmap_items inherit from RbNode. The kernel's
pointer to a pointer, through which a search returns the place of a new node, is here the pair of the
parent and whether the place is on its left.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar, cast

RB_RED = 0
RB_BLACK = 1


class RbNode:
    """``struct rb_node``."""

    __slots__ = ("rb_color", "rb_left", "rb_parent", "rb_right")

    rb_parent: RbNode | None
    rb_left: RbNode | None
    rb_right: RbNode | None
    rb_color: int

    def __init__(self) -> None:
        self.rb_parent = None
        self.rb_left = None
        self.rb_right = None
        self.rb_color = RB_RED


_Node = TypeVar("_Node", bound=RbNode)


class RbRoot(Generic[_Node]):
    """``struct rb_root``."""

    __slots__ = ("rb_node",)

    def __init__(self) -> None:
        self.rb_node: _Node | None = None


def rb_link_node(node: RbNode, parent: RbNode | None, left: bool, root: RbRoot[Any]) -> None:
    """Hang a node into the free place that a search found; rb_insert_color has to follow."""
    node.rb_parent = parent
    node.rb_left = None
    node.rb_right = None
    node.rb_color = RB_RED
    if parent is None:
        root.rb_node = node
    elif left:
        parent.rb_left = node
    else:
        parent.rb_right = node


# In the parent of old, or as the root, put new in its place (new may be None).
def _rb_change_child(old: RbNode, new: RbNode | None, parent: RbNode | None, root: RbRoot[Any]) -> None:
    if parent is None:
        root.rb_node = new
    elif parent.rb_left is old:
        parent.rb_left = new
    else:
        parent.rb_right = new


# After a rotation: new takes old's parent and colour, old hangs below new with the colour given.
def _rb_rotate_set_parents(old: RbNode, new: RbNode, root: RbRoot[Any], color: int) -> None:
    parent = old.rb_parent
    new.rb_parent = parent
    new.rb_color = old.rb_color
    old.rb_parent = new
    old.rb_color = color
    _rb_change_child(old, new, parent, root)


def _set_parent_color(node: RbNode, parent: RbNode | None, color: int) -> None:
    node.rb_parent = parent
    node.rb_color = color


def rb_insert_color(node: RbNode, root: RbRoot[Any]) -> None:
    """Rebalance after rb_link_node."""
    parent = node.rb_parent
    while True:
        if parent is None:
            node.rb_color = RB_BLACK
            return
        if parent.rb_color == RB_BLACK:
            return
        gparent = parent.rb_parent
        assert gparent is not None  # a red node is never the root
        is_left = parent is gparent.rb_left
        uncle = gparent.rb_right if is_left else gparent.rb_left
        if uncle is not None and uncle.rb_color == RB_RED:
            # Case 1, a red uncle: colour both black, go on with the grandparent.
            uncle.rb_color = RB_BLACK
            parent.rb_color = RB_BLACK
            node = gparent
            parent = node.rb_parent
            node.rb_color = RB_RED
            continue
        near, far = ("rb_left", "rb_right") if is_left else ("rb_right", "rb_left")
        if node is getattr(parent, far):
            # Case 2, the inner grandchild: rotation at the parent, towards the near side.
            inner = getattr(node, near)
            setattr(parent, far, inner)
            setattr(node, near, parent)
            if inner is not None:
                _set_parent_color(inner, parent, RB_BLACK)
            _set_parent_color(parent, node, RB_RED)
            parent = node
        # Case 3, the outer grandchild: rotation at the grandparent, towards the far side.
        inner = getattr(parent, far)
        setattr(gparent, near, inner)
        setattr(parent, far, gparent)
        if inner is not None:
            _set_parent_color(inner, gparent, RB_BLACK)
        _rb_rotate_set_parents(gparent, parent, root, RB_RED)
        return


def rb_erase(node: RbNode, root: RbRoot[Any]) -> None:
    """Take a node out of its tree. The node's own fields keep what they held."""
    left, right = node.rb_left, node.rb_right
    parent, color = node.rb_parent, node.rb_color
    unbalanced: RbNode | None = None
    if left is None:
        _rb_change_child(node, right, parent, root)
        if right is not None:
            _set_parent_color(right, parent, color)
        elif color == RB_BLACK:
            unbalanced = parent
    elif right is None:
        _set_parent_color(left, parent, color)
        _rb_change_child(node, left, parent, root)
    else:
        # Two children: the successor takes the node's place.
        successor = right
        if successor.rb_left is None:
            hole_parent = successor
            orphan = successor.rb_right
        else:
            while successor.rb_left is not None:
                successor = successor.rb_left
            above = successor.rb_parent
            assert above is not None
            hole_parent = above
            orphan = successor.rb_right
            hole_parent.rb_left = orphan
            successor.rb_right = right
            right.rb_parent = successor
        successor.rb_left = left
        left.rb_parent = successor
        _rb_change_child(node, successor, parent, root)
        if orphan is not None:
            _set_parent_color(orphan, hole_parent, RB_BLACK)
        elif successor.rb_color == RB_BLACK:
            unbalanced = hole_parent
        _set_parent_color(successor, parent, color)
    if unbalanced is not None:
        _rb_erase_color(unbalanced, root)


# One side below parent is one black node short: the kernel's ____rb_erase_color. Near is that side. The siblings and
# nephews that are followed exist, because the far side has at least one black node more.
def _rb_erase_color(parent: RbNode, root: RbRoot[Any]) -> None:
    node: RbNode | None = None
    while True:
        near, far = ("rb_left", "rb_right") if parent.rb_right is not node else ("rb_right", "rb_left")
        sibling = getattr(parent, far)
        if sibling.rb_color == RB_RED:
            # Case 1: rotation at the parent, towards the near side.
            inner = getattr(sibling, near)
            setattr(parent, far, inner)
            setattr(sibling, near, parent)
            _set_parent_color(inner, parent, RB_BLACK)
            _rb_rotate_set_parents(parent, sibling, root, RB_RED)
            sibling = inner
        outer = getattr(sibling, far)
        if outer is None or outer.rb_color == RB_BLACK:
            nephew = getattr(sibling, near)
            if nephew is None or nephew.rb_color == RB_BLACK:
                # Case 2: colour the sibling red; the shortage moves up.
                sibling.rb_color = RB_RED
                if parent.rb_color == RB_RED:
                    parent.rb_color = RB_BLACK
                    return
                node = parent
                if node.rb_parent is None:
                    return
                parent = node.rb_parent
                continue
            # Case 3: rotation at the sibling, towards the far side.
            inner = getattr(nephew, far)
            setattr(sibling, near, inner)
            setattr(nephew, far, sibling)
            setattr(parent, far, nephew)
            if inner is not None:
                _set_parent_color(inner, sibling, RB_BLACK)
            outer = sibling
            sibling = nephew
        # Case 4: rotation at the parent, towards the near side.
        inner = getattr(sibling, near)
        setattr(parent, far, inner)
        setattr(sibling, near, parent)
        _set_parent_color(outer, sibling, RB_BLACK)
        if inner is not None:
            inner.rb_parent = parent
        _rb_rotate_set_parents(parent, sibling, root, RB_BLACK)
        return


def rb_replace_node(victim: RbNode, new: RbNode, root: RbRoot[Any]) -> None:
    """Put a new node exactly where another one is: no rebalancing."""
    parent = victim.rb_parent
    new.rb_parent = parent
    new.rb_left = victim.rb_left
    new.rb_right = victim.rb_right
    new.rb_color = victim.rb_color
    if victim.rb_left is not None:
        victim.rb_left.rb_parent = new
    if victim.rb_right is not None:
        victim.rb_right.rb_parent = new
    _rb_change_child(victim, new, parent, root)


def rb_first(root: RbRoot[_Node]) -> _Node | None:
    """The leftmost node, None of an empty tree."""
    node: Any = root.rb_node
    while node is not None and node.rb_left is not None:
        node = node.rb_left
    return cast("_Node | None", node)


def rb_next(node: RbNode) -> RbNode | None:
    """The next node in order, None after the last."""
    if node.rb_right is not None:
        node = node.rb_right
        while node.rb_left is not None:
            node = node.rb_left
        return node
    parent = node.rb_parent
    while parent is not None and node is parent.rb_right:
        node = parent
        parent = node.rb_parent
    return parent
