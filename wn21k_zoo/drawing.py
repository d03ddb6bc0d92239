"""Drawings of a semantic tree, or of the part below one node: for a terminal, for Graphviz, as nested JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from wn21k_zoo.errors import InvalidArgumentError

if TYPE_CHECKING:
    from rich.tree import Tree

    from wn21k_zoo.tree import Node, SemanticTree

__all__ = ["to_dict", "to_dot", "to_rich"]


def to_rich(tree: SemanticTree, node: Node | int | str | None = None, max_depth: int | None = None) -> Tree:
    """A tree for ``rich.print``: see :meth:`wn21k_zoo.tree.SemanticTree.to_rich`."""
    from rich.markup import escape
    from rich.tree import Tree

    def title(node: Node) -> str:
        count = len(tree.descendants(node))
        below = f" [dim]· {count:,} below[/]" if count else ""
        return f"{escape(node.name)} [dim]{node.wnid}[/]{below}"

    def grow(branch: Tree, node: Node, left: int | None) -> None:
        if left == 0:
            return
        for child in tree.children(node):
            grow(branch.add(title(child), highlight=False), child, None if left is None else left - 1)

    _check_depth(max_depth)
    if node is not None:
        top = Tree(title(tree[node]), highlight=False)
        grow(top, tree[node], max_depth)
        return top
    top = Tree(
        f"[bold]{escape(tree.name)}[/] [dim]· {len(tree):,} classes, {len(tree.roots):,} roots[/]", highlight=False
    )
    if max_depth != 0:
        for root in tree.roots:
            grow(top.add(title(root), highlight=False), root, None if max_depth is None else max_depth - 1)
    return top


def to_dot(tree: SemanticTree, node: Node | int | str | None = None, max_depth: int | None = None) -> str:
    """A graph in Graphviz's DOT language: see :meth:`wn21k_zoo.tree.SemanticTree.to_dot`."""
    lines = [f"digraph {json.dumps(tree.name)} {{", "  rankdir=LR; node [shape=box, fontname=sans];"]
    drawn = set()
    for item in _walk(tree, node, max_depth):
        text = item.name.split(", ")[0].replace("\\", "\\\\").replace('"', '\\"')
        lines.append(f'  {item.wnid} [label="{text}\\n{item.wnid}"];')
        drawn.add(item.wnid)
        parent = tree.parent(item)
        if parent is not None and parent.wnid in drawn:
            lines.append(f"  {parent.wnid} -> {item.wnid};")
    return "\n".join([*lines, "}", ""])


def to_dict(
    tree: SemanticTree, node: Node | int | str | None = None, max_depth: int | None = None
) -> list[dict[str, Any]]:
    """Nested dicts: see :meth:`wn21k_zoo.tree.SemanticTree.to_dict`."""

    def branch(node: Node, left: int | None) -> dict[str, Any]:
        below = [] if left == 0 else tree.children(node)
        return {
            "index": node.index,
            "wnid": node.wnid,
            "name": node.name,
            "definition": node.definition,
            "depth": node.depth,
            "children": [branch(child, None if left is None else left - 1) for child in below],
        }

    _check_depth(max_depth)
    if node is not None:
        return [branch(tree[node], max_depth)]
    return [branch(root, None if max_depth is None else max(max_depth - 1, 0)) for root in tree.roots]


def _walk(tree: SemanticTree, node: Node | int | str | None, max_depth: int | None) -> Iterator[Node]:
    _check_depth(max_depth)
    tops = [tree[node]] if node is not None else list(tree.roots)
    limit = None if max_depth is None else max_depth + tops[0].depth - (node is None)
    waiting = tops[::-1]
    while waiting:
        item = waiting.pop()
        yield item
        if limit is None or item.depth < limit:
            waiting.extend(tree.children(item)[::-1])


def _check_depth(max_depth: int | None) -> None:
    if max_depth is not None and max_depth < 0:
        raise InvalidArgumentError(f"max_depth is {max_depth}; it must not be negative.")
