"""``wn21k tree``: show a semantic tree, compare one with ours, rebuild the data."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from wn21k_zoo.cli.output import TREES, FormatOption, at_home, console, print_json, print_table, to_write
from wn21k_zoo.errors import InvalidArgumentError, TreeError, UnknownSynsetError, Wn21kError
from wn21k_zoo.matching import folded, forms_of
from wn21k_zoo.messages import say
from wn21k_zoo.synsets import WNID_PATTERN
from wn21k_zoo.tree import Node, SemanticTree

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Show the semantic tree, compare one with ours, rebuild its data.")

TreeOption = Annotated[str, typer.Option("--tree", help=TREES)]
COLUMNS = ("index", "wnid", "name", "depth", "definition")


@app.command()
def show(
    node: Annotated[str | None, typer.Argument(help="Draw what is below this wnid or index. Default: all.")] = None,
    tree: TreeOption = "fall11",
    depth: Annotated[
        int | None,
        typer.Option("--depth", "-d", min=0, help="Levels to draw. Default: 2, or all below a node and in lists."),
    ] = None,
    format: Annotated[  # noqa: A002
        Literal["tree", "dot", "json", "jsonl", "csv"] | None,
        typer.Option(
            "--format",
            "-f",
            help="Default: tree on a terminal, json (nested) in a pipe. jsonl and csv list the classes by index.",
        ),
    ] = None,
) -> None:
    """Draw the tree, or the part below a node; or list its classes, in the order of a model's outputs."""
    semantic_tree = SemanticTree.find(tree)
    chosen = format or ("tree" if sys.stdout.isatty() else "json")
    top = _node(semantic_tree, node) if node is not None else None
    limit = 2 if depth is None and node is None else depth
    if chosen == "dot":
        sys.stdout.write(semantic_tree.to_dot(top, limit))
    elif chosen == "json":
        print_json(semantic_tree.to_dict(top, limit))
    elif chosen == "jsonl" or chosen == "csv":
        nodes = [*semantic_tree] if top is None else [top, *semantic_tree.descendants(top)]
        deepest = math.inf if depth is None else depth + (-1 if top is None else top.depth)
        rows = [asdict(each) for each in sorted(nodes, key=lambda each: each.index) if each.depth <= deepest]
        print_table(rows, COLUMNS, chosen)
    else:
        console().print(semantic_tree.to_rich(top, limit))


@app.command()
def search(
    query: Annotated[str, typer.Argument(help="Part of a name, a wnid or an index.")],
    tree: TreeOption = "fall11",
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many to show.")] = 20,
    format: FormatOption = None,  # noqa: A002
) -> None:
    """Find classes by name, wnid or index."""
    semantic_tree = SemanticTree.find(tree)
    found = semantic_tree.search(query, limit=None)
    if not found and WNID_PATTERN.fullmatch(wnid := query.strip().casefold()):
        semantic_tree.index(wnid)  # whose error says more
    if not found:
        say(f"Nothing in {semantic_tree.name} matches {query!r}.")
        raise typer.Exit(1)
    print_table([asdict(node) for node in found[:limit]], COLUMNS, format)
    if len(found) > limit:
        say(f"{limit} of {len(found):,} classes; more with --limit")


@app.command()
def path(
    node: Annotated[str, typer.Argument(help="A wnid, an index or a full name.")],
    other: Annotated[str | None, typer.Argument(help="A second one: the path between the two.")] = None,
    tree: TreeOption = "fall11",
    format: FormatOption = None,  # noqa: A002
) -> None:
    """Show the path from the root to a class, or between two classes."""
    semantic_tree = SemanticTree.find(tree)
    first = _node(semantic_tree, node)
    if other is None:
        print_table([asdict(step) for step in semantic_tree.path(first)], COLUMNS, format)
        return
    second = _node(semantic_tree, other)
    common = semantic_tree.lowest_common_ancestor(first, second)
    if common is None:
        say(f"{first} and {second} have no common ancestor in {semantic_tree.name}.")
        raise typer.Exit(1)
    up = [step for step in (first, *semantic_tree.ancestors(first)) if step.depth > common.depth]
    down = [step for step in semantic_tree.path(second) if step.depth > common.depth]
    print_table([asdict(step) for step in (*up, common, *down)], COLUMNS, format)
    say(f"distance {semantic_tree.distance(first, second)}, lowest common ancestor {common}")


@app.command()
def compare(
    other: Annotated[
        str,
        typer.Argument(metavar="TREE", help="The authors' tree.pth, a text file of wnids, or a name as for --tree."),
    ],
    tree: TreeOption = "fall11",
) -> None:
    """Compare a tree, such as one in a file, with ours; exit code 1 if they differ."""
    difference = SemanticTree.find(other).difference(SemanticTree.find(tree))
    if not difference:
        say(f"{other} is the tree {tree}: the same classes, order and parents.")
        return
    print_json(
        {
            f"only in {other}": difference.only_left,
            f"only in {tree}": difference.only_right,
            "other parents": dict(difference.parents),
            "same order": difference.same_order,
        }
    )
    raise typer.Exit(1)


@app.command()
def build(
    wordnet: Annotated[
        Path | None,
        typer.Option(
            "--wordnet",
            callback=at_home,
            help="Folder of WordNet 3.0's database files, such as /usr/share/wordnet. Default: NLTK's.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", callback=to_write, help="Folder for the files. Default: wn21k_data, unless --check."
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compare with the shipped files; exit code 1 on a difference.")
    ] = False,
) -> None:
    """Rebuild the data of label spaces and trees from WordNet 3.0: always the same bytes."""
    from wn21k_zoo.files import make_folder, write_whole
    from wn21k_zoo.wordnet import compile_data, packaged_data

    if output is None and not check:
        output = Path("wn21k_data")
    if output is not None and output.exists() and not output.is_dir():
        raise InvalidArgumentError(f"{output} is a file; --output needs a folder.")
    files = compile_data(wordnet)
    if output is not None:
        for name, content in files.items():
            make_folder((output / name).parent, TreeError, "name another place with --output.")
            write_whole(output / name, content, TreeError)
        say(f"{len(files)} files written to {output}")
    if check:
        different = [name for name, content in files.items() if packaged_data(name) != content]
        for name in different:
            say(f"{name} differs from the shipped file")
        if different:
            raise typer.Exit(1)
        say(f"{len(files)} files, all identical to the shipped ones")


def _node(tree: SemanticTree, text: str) -> Node:
    if text.isdecimal():
        return tree[int(text[:20])]  # Python does not parse integers of thousands of digits
    try:
        return tree[text]
    except Wn21kError:
        exact = [node for node in tree.search(text, limit=None) if forms_of(text)[0] in folded(node.name).split(", ")]
        if len(exact) > 1:
            known = "; ".join(f"{node.wnid} is {node.definition}" for node in exact)
            raise UnknownSynsetError(f"{text!r} names {len(exact)} classes; give the wnid of one: {known}.") from None
        if not exact:
            raise
        return exact[0]
