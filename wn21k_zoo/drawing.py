"""Draw a semantic tree, or the part below one node: for a terminal, for Graphviz or as nested JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from wn21k_zoo.errors import InvalidArgumentError
from wn21k_zoo.messages import printable

if TYPE_CHECKING:
    from rich.tree import Tree

    from wn21k_zoo.tree import Node, SemanticTree

__all__ = ["to_dict", "to_dot", "to_rich"]


def to_rich(tree: SemanticTree, node: Node | int | str | None = None, max_depth: int | None = None) -> Tree:
    """A tree for ``rich.print``.

    Args:
        tree: The tree.
        node: Top of the drawing; by default everything is drawn.
        max_depth: Levels to draw below the top, by default all.

    Raises:
        UnknownSynsetError: The tree has no such node.
        InvalidArgumentError: ``max_depth`` is negative.
    """
    from rich.markup import escape
    from rich.tree import Tree

    def title(node: Node) -> str:
        count = len(tree.descendants(node))
        below = f" [dim]· {count:,} below[/]" if count else ""
        return f"{escape(printable(node.name))} [dim]{escape(printable(node.wnid))}[/]{below}"

    def grow(branch: Tree, node: Node, left: float) -> None:
        for child in tree.children(node) if left else ():
            grow(branch.add(title(child), highlight=False), child, left - 1)

    tops, left = _tops(tree, node, max_depth)
    whole = f"[bold]{escape(printable(tree.name))}[/] [dim]· {len(tree):,} classes, {len(tree.roots):,} roots[/]"
    top = Tree(whole if node is None else title(tops[0]), highlight=False)
    for each in tops:
        grow(top.add(title(each), highlight=False) if node is None else top, each, left)
    return top


def to_dot(tree: SemanticTree, node: Node | int | str | None = None, max_depth: int | None = None) -> str:
    """A graph in Graphviz's DOT language; arguments and errors as :func:`to_rich`."""
    lines = [f"digraph {json.dumps(tree.name)} {{", "  rankdir=LR; node [shape=box, fontname=sans];"]
    tops, left = _tops(tree, node, max_depth)
    waiting = [(top, "", left) for top in reversed(tops)]
    while waiting:
        item, above, left = waiting.pop()
        waiting.extend((child, item.wnid, left - 1) for child in reversed(tree.children(item) if left else ()))
        text = item.name.split(", ")[0].replace("\\", "\\\\").replace('"', '\\"')
        lines.append(f'  {item.wnid} [label="{text}\\n{item.wnid}"];')
        if above:
            lines.append(f"  {above} -> {item.wnid};")
    return "\n".join([*lines, "}", ""])


def to_dict(
    tree: SemanticTree, node: Node | int | str | None = None, max_depth: int | None = None
) -> list[dict[str, Any]]:
    """Roots (or the one node) as dicts of its fields and ``children``; arguments as :func:`to_rich`."""

    def branch(node: Node, left: float) -> dict[str, Any]:
        return {**vars(node), "children": [branch(child, left - 1) for child in (tree.children(node) if left else ())]}

    tops, left = _tops(tree, node, max_depth)
    return [branch(top, left) for top in tops]


def _tops(tree: SemanticTree, node: Node | int | str | None, max_depth: int | None) -> tuple[Sequence[Node], float]:
    """Return the top nodes and how many levels to draw below them."""
    if max_depth is not None and max_depth < 0:
        raise InvalidArgumentError(f"max_depth is {max_depth}; it must not be negative.")
    left = math.inf if max_depth is None else max_depth
    if node is not None:
        return [tree[node]], left
    return (tree.roots, left - 1) if left else ([], 0)
