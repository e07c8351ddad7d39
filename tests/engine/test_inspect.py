# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's state as a document."""

from __future__ import annotations

import json
from typing import Any

from ksmd_ctl.engine.inspect import digest, state
from tests.engine.lab import Lab
from tests.engine.scenario_runner import content


def seen(lab: Lab) -> dict[str, Any]:
    """The state, as a reader of the document gets it."""
    document: dict[str, Any] = json.loads(json.dumps(state(lab.machine)))
    return document


def a_collision() -> tuple[Lab, list[dict[str, Any]]]:
    """Before, at and after a collision, on the seed's profile: the documents."""
    lab = Lab("seed")
    moved = lab.region("p", ["x", "x"], 0)
    lab.region("o", ["x", "x", "k"], 1)
    lab.scan(3)
    documents = [seen(lab)]
    moved.move(1)
    documents.append(seen(lab))
    lab.batch(1)
    documents.append(seen(lab))
    lab.batch(1)
    lab.scan(2)
    documents.append(seen(lab))
    return lab, documents


def test_a_reader_sees_the_seeds_case_happen() -> None:
    _lab, (merged, moved, exiled, drained) = a_collision()
    (node,) = merged["stable_trees"][0]["nodes"]
    assert (node["kind"], node["place"], node["nid"], node["node_of_kpfn"]) == ("node", "tree", 0, 0)
    assert (node["misplaced"], node["stale"], node["mappings"]) == (False, False, 2)
    assert node["digest"] == digest(content("x"))
    assert {item["process"] for item in node["items"]} == {"p"}
    (node,) = moved["stable_trees"][0]["nodes"]
    assert (node["nid"], node["node_of_kpfn"], node["misplaced"]) == (0, 1, True)
    assert exiled["stable_trees"][0]["nodes"] == []
    (node,) = exiled["migrate_nodes"]
    assert (node["place"], len(node["items"]), node["mappings"]) == ("migrate_nodes", 1, 1)
    assert drained["migrate_nodes"] == []
    (node,) = drained["stable_trees"][1]["nodes"]
    assert node["mappings"] == len(node["items"]) == 4
    assert drained["counters"]["pages_sharing"] == 3


def test_chains_cursor_knobs_and_unstable_items() -> None:
    lab = Lab("6.12", max_page_sharing=2)
    lab.region("p", ["x"] * 4 + ["b", "a", "c"], 0)
    lab.scan(4)
    document = seen(lab)
    (chain,) = document["stable_trees"][0]["nodes"]
    assert chain["kind"] == "chain"
    assert [dup["kind"] for dup in chain["dups"]] == ["dup", "dup"]
    assert [item["digest"] for item in document["unstable_trees"][0]["items"]] == [
        digest(content(label)) for label in "abc"
    ]
    assert document["cursor"] is None
    assert document["knobs"]["max_page_sharing"] == "2"
    assert document["format"] == 1
    lab.batch(5)
    document = seen(lab)
    assert document["cursor"]["process"] == "p"
    current = [item for item in document["unstable_trees"][0]["items"] if item["this_scan"]]
    assert [item["parent"] for item in current] == [None]


def test_looking_changes_nothing() -> None:
    lab = Lab("6.12")
    pages = lab.region("p", ["m", "m"], 0)
    lab.scan(3)
    pages.discard()
    before = seen(lab)
    (node,) = before["stable_trees"][0]["nodes"]
    assert (node["stale"], node["digest"], node["mappings"]) == (True, None, 0)
    assert seen(lab) == before
