# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's state as a picture: Graphviz source, and SVG where its ``dot`` is there.

Needs the optional dependency ``picture`` (PyPI's graphviz). Misplaced nodes are orange and say where their
page is, exiled ones red and dashed, stale ones grey; a chain is a box with its dups below it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Final

__all__ = ["dot_source", "svg"]

_PROPER: Final = {"style": "filled", "fillcolor": "white"}
_MISPLACED: Final = {"style": "filled", "fillcolor": "orange"}
_EXILED: Final = {"style": "filled,dashed", "fillcolor": "salmon"}
_STALE: Final = {"style": "filled", "fillcolor": "lightgrey"}


def dot_source(state: Mapping[str, Any]) -> str:
    """A state document as a graph in Graphviz's language.

    :param state: what `ksmd_ctl.engine.inspect.state` returned
    :raises ImportError: the library is not there
    """
    return str(_graph(state).source)


def svg(state: Mapping[str, Any]) -> str:
    """A state document as SVG.

    :raises ImportError: the library is not there
    :raises graphviz.ExecutableNotFound: Graphviz's dot is not there
    """
    return str(_graph(state).pipe(format="svg", encoding="utf-8"))


# A graphviz.Digraph; that library has no types.
def _graph(state: Mapping[str, Any]) -> Any:
    counters = state["counters"]
    named = ("full_scans", "pages_shared", "pages_sharing", "pages_unshared", "pages_volatile")
    title = ", ".join(f"{name} {counters[name]}" for name in named)
    graph = import_module("graphviz").Digraph(
        "ksm", graph_attr={"label": f"profile {state['profile']}: {title}", "labelloc": "t"}
    )
    graph.attr("node", shape="record", fontname="monospace", fontsize="10")
    for tree in state["stable_trees"]:
        with graph.subgraph(name=f"cluster_stable_{tree['nid']}") as cluster:
            cluster.attr(label=f"stable tree {tree['nid']}")
            _stable_tree(cluster, tree["nodes"])
    if state["migrate_nodes"]:
        with graph.subgraph(name="cluster_migrate_nodes") as cluster:
            cluster.attr(label="migrate_nodes", style="dashed", color="red")
            for node in state["migrate_nodes"]:
                _stable_node(cluster, node)
    for tree in state["unstable_trees"]:
        if tree["items"]:
            with graph.subgraph(name=f"cluster_unstable_{tree['nid']}") as cluster:
                cluster.attr(label=f"unstable tree {tree['nid']}", color="grey")
                _unstable_tree(cluster, tree["items"])
    return graph


def _stable_tree(graph: Any, nodes: list[dict[str, Any]]) -> None:
    for node in nodes:
        if node["kind"] == "chain":
            graph.node(f"s{node['id']}", f"chain {node['id']}|{len(node['dups'])} dups", **_rim(node), **_PROPER)
            for dup in node["dups"]:
                _stable_node(graph, dup)
                graph.edge(f"s{node['id']}", f"s{dup['id']}", style="dotted", arrowhead="none")
        else:
            _stable_node(graph, node)
        if node["parent"] is not None:
            graph.edge(f"s{node['parent']}", f"s{node['id']}")


def _stable_node(graph: Any, node: dict[str, Any]) -> None:
    if node["place"] == "migrate_nodes":
        look = _EXILED
    elif node["stale"]:
        look = _STALE
    elif node["misplaced"]:
        look = _MISPLACED
    else:
        look = _PROPER
    lines = [f"{node['kind']} {node['id']}", node["digest"] or "stale", f"nid {node['nid']}"]
    if node["misplaced"]:
        lines.append(f"page on node {node['node_of_kpfn']}")
    lines.append(f"mapped {node['mappings']}, listed {len(node['items'])}")
    graph.node(f"s{node['id']}", "{" + "|".join(lines) + "}", **_rim(node), **look)


def _unstable_tree(graph: Any, items: list[dict[str, Any]]) -> None:
    for item in items:
        look = _PROPER if item["this_scan"] else _STALE
        label = f"{item['process']}|{item['address']:#x}|{item['digest'] or 'gone'}"
        graph.node(_name(item), "{" + label + "}", **_rim(item), **look)
        if item["parent"] is not None:
            graph.edge(_name(item["parent"]), _name(item))


def _name(item: Mapping[str, Any]) -> str:
    return f"u{item['process']}_{item['address']:x}".replace("-", "_")


# The colour of a node in a red-black tree is that of its rim.
def _rim(node: Mapping[str, Any]) -> dict[str, str]:
    return {} if node["black"] is None else {"color": "black" if node["black"] else "red"}
