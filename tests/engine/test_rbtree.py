# SPDX-License-Identifier: GPL-2.0-or-later
"""Red-black trees: against a sorted list, and in the shapes that the kernel's take."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.engine.rbtree import (
    RbNode,
    RbRoot,
    rb_erase,
    rb_first,
    rb_insert_color,
    rb_link_node,
    rb_next,
    rb_replace_node,
)
from tests.engine.validate import validate_rbtree


class Number(RbNode):
    """A node with a number."""

    def __init__(self, value: int) -> None:
        super().__init__()
        self.value = value


def insert(root: RbRoot[Any], value: int) -> Number:
    node, parent, left, place = Number(value), None, False, root.rb_node
    while place is not None:
        parent, left = place, value < place.value
        place = place.rb_left if left else place.rb_right
    rb_link_node(node, parent, left, root)
    rb_insert_color(node, root)
    return node


def shape(node: Any) -> Any:
    """A tree as nested tuples: left, value (negative where red), right."""
    if node is None:
        return None
    return shape(node.rb_left), node.value if node.rb_color else -node.value, shape(node.rb_right)


def leaf(value: int) -> tuple[None, int, None]:
    return None, value, None


@given(st.lists(st.tuples(st.integers(0, 60), st.sampled_from(["insert", "erase", "replace"])), max_size=120))
def test_any_history_keeps_a_valid_tree_in_order(history: list[tuple[int, str]]) -> None:
    root: RbRoot[Number] = RbRoot()
    nodes: dict[int, Number] = {}
    for value, action in history:
        if value not in nodes:
            if action == "insert":
                nodes[value] = insert(root, value)
        elif action == "erase":
            rb_erase(nodes.pop(value), root)
        elif action == "replace":
            new = Number(value)
            rb_replace_node(nodes[value], new, root)
            nodes[value] = new
        found = validate_rbtree(root, lambda left, right: left.value < right.value)
        assert found == [nodes[key] for key in sorted(nodes)]


@given(st.sets(st.integers(0, 1000), max_size=100))
def test_walking(values: set[int]) -> None:
    root: RbRoot[Number] = RbRoot()
    for value in values:
        insert(root, value)
    found, node = [], rb_first(root)
    while node is not None:
        found.append(node.value)
        node = rb_next(node)  # type: ignore[assignment]
    assert found == sorted(values)


def test_shapes_of_insertions() -> None:
    root: RbRoot[Number] = RbRoot()
    insert(root, 1)
    assert shape(root.rb_node) == leaf(1)
    insert(root, 2)
    assert shape(root.rb_node) == (None, 1, leaf(-2))
    insert(root, 3)  # outer grandchild: one rotation
    assert shape(root.rb_node) == (leaf(-1), 2, leaf(-3))
    insert(root, 5)  # red uncle: recoloured
    assert shape(root.rb_node) == (leaf(1), 2, (None, 3, leaf(-5)))
    insert(root, 4)  # inner grandchild: two rotations
    assert shape(root.rb_node) == (leaf(1), 2, (leaf(-3), 4, leaf(-5)))


def test_shapes_of_erasures() -> None:
    root: RbRoot[Number] = RbRoot()
    nodes = {value: insert(root, value) for value in range(1, 8)}
    assert shape(root.rb_node) == (leaf(1), 2, (leaf(3), -4, (leaf(-5), 6, leaf(-7))))
    rb_erase(nodes[4], root)  # the successor takes its place
    assert shape(root.rb_node) == (leaf(1), 2, (leaf(3), -5, (None, 6, leaf(-7))))
    rb_erase(nodes[3], root)  # one black node short on the left: a red nephew is rotated over
    assert shape(root.rb_node) == (leaf(1), 2, (leaf(5), -6, leaf(7)))
    rb_erase(nodes[1], root)  # a red sibling
    assert shape(root.rb_node) == ((None, 2, leaf(-5)), 6, leaf(7))
    rb_erase(nodes[7], root)
    assert shape(root.rb_node) == (leaf(2), 5, leaf(6))
    for value in (5, 2, 6):
        rb_erase(nodes[value], root)
    assert root.rb_node is None
