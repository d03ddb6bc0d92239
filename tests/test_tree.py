import copy
import doctest
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from wn21k_zoo import labels, tree
from wn21k_zoo.errors import (
    DuplicateSynsetError,
    EmptyLabelSpaceError,
    InvalidArgumentError,
    LabelSpaceError,
    TreeError,
    UnknownSynsetError,
    UnknownTreeError,
)
from wn21k_zoo.labels import LABEL_SPACES, ClassNames, LabelSpace
from wn21k_zoo.synsets import load_nouns
from wn21k_zoo.tree import SemanticTree
from wn21k_zoo.wordnet import TIMM_FILES

DATA = Path(__file__).parent / "data"
FACTS = json.loads((DATA / "tree_facts.json").read_text())["label_lists"]
ALL_WNIDS = [f"n{offset:08d}" for offset in load_nouns().offsets]
wnid_lists = st.lists(st.sampled_from(ALL_WNIDS), min_size=1, max_size=60, unique=True)


@pytest.mark.parametrize("module", [labels, tree])
def test_examples_in_docstrings_are_true(module):
    failed, tried = doctest.testmod(module)
    assert (failed, tried > 0) == (0, True)


@pytest.mark.parametrize("name", LABEL_SPACES)
def test_depths_are_the_published_ones(name):
    facts = FACTS[TIMM_FILES[name].removesuffix(".txt")]
    tree = SemanticTree.load(name)
    assert len(tree) == facts["num_classes"]
    assert np.bincount(tree.depths).tolist() == facts["classes_per_depth"]
    assert [depth for depth, count in enumerate(facts["classes_per_depth"]) if count > 1] == list(tree.levels)


def test_fall11_is_the_published_tree(fall11):
    assert fall11.digest == FACTS["imagenet21k_miil_synsets"]["class_tree_list_sha256"]
    assert fall11.class_tree_list[10] == [10, 9, 66, 65, 144]
    assert len(fall11.levels) == 11
    assert fall11.name == "fall11"


@pytest.mark.parametrize("name", ["fall11", "winter21"])
def test_levels_and_targets_are_those_of_the_published_code(name):
    case = json.loads((DATA / "published_levels.json").read_text())[name]
    tree = SemanticTree.load(name)
    assert [len(level) for level in tree.levels.values()] == case["level_sizes"]
    place = {int(index): place for level in tree.levels.values() for place, index in enumerate(level)}
    for target, expected in zip(case["targets"], case["semantic_targets"], strict=True):
        chain = tree.class_tree_list[target][::-1]
        assert [place[index] for index in chain] == [value for value in expected if value >= 0]


def test_relations(fall11):
    tabby, siamese, dog = (fall11[wnid] for wnid in ("n02123045", "n02123597", "n02084071"))
    assert fall11.parent(tabby).wnid == "n02121808"
    assert fall11.parent(fall11.roots[0]) is None
    assert [node.wnid for node in fall11.path(tabby)][-1] == tabby.wnid
    assert fall11.lowest_common_ancestor(tabby, siamese).wnid == "n02121808"
    assert fall11.distance(tabby, siamese) == 2
    assert fall11.distance(tabby, tabby) == 0
    assert fall11.lowest_common_ancestor(tabby, dog).wnid == "n01317541"
    assert fall11.lowest_common_ancestor(tabby, "n07920052") is None
    assert fall11.distance(tabby, "n07920052") is None
    assert tabby in fall11.children("n02121808")
    assert tabby in fall11.descendants("n00015388")
    assert fall11.nearest("n04399382").depth == 0
    assert fall11.nearest("n00001740") is None


def test_search(fall11):
    assert fall11.search("n02123045")[0].wnid == "n02123045"
    assert fall11.search("10")[0].index == 10
    assert fall11.search(10)[0].index == 10
    assert fall11.search("99999") == ()
    assert fall11.search("9" * 5000) == ()
    assert fall11.search("no such thing at all") == ()
    for query, wnid in (
        ("Shih Tzu", "n02086240"),
        ("shih-tzu", "n02086240"),
        ("shih_tzu", "n02086240"),
        ("St.  Bernard", "n02109525"),
        ("café", "n02935658"),
        ("lady\u2019s slipper", "n12056217"),
        ("cat", "n02121620"),
        ("Cats", "n02121620"),
        ("boxes", "n02883344"),
        ("berries", "n07742704"),
        ("women", "n10787470"),
        ("tomatoes", "n07734017"),
        ("glasses", "n04272054"),
    ):
        assert fall11.search(query)[0].wnid == wnid, query
    assert fall11.search("1.0") == fall11.search("-10") == ()
    for query in (" ", "-", "."):
        with pytest.raises(InvalidArgumentError, match="Nothing to search for"):
            fall11.search(query)
    found = fall11.search("Tabby Cat")
    assert found[0].wnid == "n02123045"
    ranks = [node.name.split(", ")[0] for node in fall11.search("dog", limit=None)]
    assert ranks[0].startswith("dog")
    assert len(fall11.search("dog", limit=3)) == 3
    for query, limit in (("  ", 20), ("dog", -1), ("dog", 2.5)):
        with pytest.raises(InvalidArgumentError):
            fall11.search(query, limit)


def test_unknown_nodes(fall11):
    with pytest.raises(UnknownSynsetError, match="nearest ancestor"):
        fall11["n04399382"]
    with pytest.raises(UnknownSynsetError, match=r"Did you mean n0212"):
        fall11["tabby"]
    for key in (-1, 11_221, True, 1.5, " ", "-", "."):
        with pytest.raises(UnknownSynsetError):
            fall11[key]
    with pytest.raises(UnknownTreeError, match="Did you mean fall11"):
        SemanticTree.load("fal11")


def test_what_is_a_node(fall11):
    cat = fall11["n02121620"]
    assert cat in fall11
    assert cat.index in fall11
    for number in (np.int64(cat.index), np.array(cat.index), torch.tensor(cat.index)):
        assert number in fall11
        assert fall11[number] == cat
    assert fall11.distances(torch.tensor([3, 4])).shape == (2, 2)
    assert all(node in fall11 for node in fall11)
    assert not any(other in fall11 for other in ("cat", "", len(fall11), -1, True, None, [], 1.0, "n02121621"))
    assert not any(other in fall11 for other in (torch.tensor(1.0), torch.tensor([1, 2]), np.float32(1), np.True_))
    assert not any(other in fall11 for other in (torch.tensor(True), torch.tensor(1, device="meta"), np.array([1, 2])))
    with pytest.raises(UnknownSynsetError, match="'' is not a wnid"):
        fall11.index("")


@pytest.mark.parametrize(
    "parents",
    [[-1], [-1, 0, 0], [[-1, 0]], [5, -1], [-2, -1], [1, 0], ["a", "b"], [None, 0], [[1], [2, 3]], [2**40, -1], None,
     [-1, 0.9], [2**70, 0]],
)  # fmt: skip
def test_parents_that_are_not_those_of_the_classes(parents):
    with pytest.raises(TreeError, match=r"parents|cycle"):
        SemanticTree(LabelSpace("two", ("n02121808", "n02084071")), parents)


@pytest.mark.parametrize("parents", [[-1, 0], np.array([-1, 0], object), torch.tensor([-1, 0]), (np.int8(-1), 0)])
def test_parents_of_any_kind(parents):
    tree = SemanticTree(LabelSpace("two", ("n02121808", "n02084071")), parents)
    assert (tree.parents.dtype, tree.depths.tolist()) == (np.int32, [0, 1])


def test_what_is_no_tree(fall11):
    assert SemanticTree.find(fall11) is fall11
    for wrong in (None, ["n02121808"], 3):
        for find in (SemanticTree.load, SemanticTree.find, fall11.difference):
            with pytest.raises(InvalidArgumentError, match="is not"):
                find(wrong)
    with pytest.raises(InvalidArgumentError, match=r"SemanticTree\.find"):
        fall11.difference("winter21")


def test_a_tree_can_be_copied_whatever_was_asked_of_it(fall11):
    _ = (repr(fall11), fall11.class_tree_list, fall11.digest, fall11.children(0), fall11.roots)
    for copied in (pickle.loads(pickle.dumps(fall11)), copy.deepcopy(fall11)):  # noqa: S301
        assert (copied.name, copied.label_space, copied.digest) == (fall11.name, fall11.label_space, fall11.digest)
        assert not copied.parents.flags.writeable
        assert not copied.difference(fall11)
        assert copied == fall11
        assert hash(copied) == hash(fall11)


def test_what_a_tree_gives_cannot_change_it(fall11):
    before, tree = fall11.digest, SemanticTree.from_label_space(fall11.label_space)
    tree.class_tree_list[0].append(99_999)
    assert tree.digest == before
    assert 99_999 not in tree.chain(0)
    assert tree.chain(tree[0]) == tree.chain(tree.wnids[0]) == tree.chain(0)
    with pytest.raises(UnknownSynsetError):
        tree.chain(-1)
    for array in (fall11.parents, fall11.depths, *fall11.levels.values(), fall11.child_indices(fall11.roots[0].index)):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@settings(max_examples=60, deadline=None)
@given(wnid_lists)
def test_any_list_gives_a_forest(wnids):
    tree = SemanticTree.from_wnids(wnids)
    assert list(tree.wnids) == wnids
    for index, chain in enumerate(tree.class_tree_list):
        assert chain[0] == index
        assert len(set(chain)) == len(chain) == tree.depths[index] + 1
        assert chain[1:] == [node.index for node in tree.ancestors(index)]
        for child in tree.children(index):
            assert tree.parent(child).index == index
    assert sum(len(level) for level in tree.levels.values()) == len(tree) - sum(
        count == 1 for count in np.bincount(tree.depths)
    )
    below = {node.index for root in tree.roots for node in (root, *tree.descendants(root))}
    assert below == set(range(len(tree)))


@settings(max_examples=40, deadline=None)
@given(wnid_lists)
def test_with_ancestors_any_list_is_a_part_of_one_tree(wnids):
    tree = SemanticTree.from_wnids(wnids)
    whole = tree.with_ancestors()
    assert whole.wnids[: len(tree)] == tree.wnids
    assert not {*load_nouns().parents[whole.label_space.positions][[root.index for root in whole.roots]]} - {-1}
    for index, chain in enumerate(tree.class_tree_list):
        assert [each for each in whole.class_tree_list[index] if each < len(tree)] == chain
    assert {node.index for index in range(len(tree)) for node in whole.path(index)} == set(range(len(whole)))
    assert whole.with_ancestors() is whole


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_order_of_the_list_changes_indices_only(data):
    wnids = data.draw(wnid_lists)
    shuffled = data.draw(st.permutations(wnids))
    one, two = SemanticTree.from_wnids(wnids), SemanticTree.from_wnids(shuffled)
    difference = one.difference(two)
    assert not difference.only_left
    assert not difference.parents
    assert bool(difference) == (wnids != shuffled)


@settings(max_examples=40, deadline=None)
@given(wnid_lists, st.data())
def test_distance_is_a_metric(wnids, data):
    tree = SemanticTree.from_wnids(wnids)
    one, two = (data.draw(st.integers(0, len(tree) - 1)) for _ in range(2))
    assert tree.distance(one, two) == tree.distance(two, one)
    assert (tree.distance(one, two) == 0) == (one == two)


@settings(max_examples=40, deadline=None)
@given(wnid_lists)
def test_tables_agree_with_chains(wnids):
    tree = SemanticTree.from_wnids(wnids)
    for index, row in enumerate(tree.ancestor_table.tolist()):
        chain = tree.chain(index)[::-1]
        assert row == chain + [-1] * (len(row) - len(chain))
    pairs = [[tree.distance(one, two) for two in range(len(tree))] for one in range(len(tree))]
    assert tree.distances().tolist() == [[-1 if each is None else each for each in row] for row in pairs]


def test_distances_of_chosen_nodes(fall11):
    tabby, siamese = fall11["n02123045"], fall11["n02123597"]
    assert fall11.distances([tabby, "n07920052", siamese.index]).tolist() == [[0, -1, 2], [-1, 0, -1], [2, -1, 0]]
    assert fall11.distances([]).shape == (0, 0)
    with pytest.raises(UnknownSynsetError):
        fall11.distances(["n99999999"])
    for wrong in ({"n02123045", "n02084071"}, "n02123045", 5):
        with pytest.raises(InvalidArgumentError, match="nodes is a"):
            fall11.distances(wrong)


def test_a_tree_over_nodes_of_another(fall11):
    cats = fall11.descendants("n02121808")
    assert SemanticTree.from_wnids(cats).wnids == tuple(node.wnid for node in cats)
    with pytest.raises(InvalidArgumentError, match="wnids is a set; give a list"):
        SemanticTree.from_wnids(set(cats))


def test_one_level_and_one_class():
    one = SemanticTree.from_wnids(["n02121808", "n02084071"])
    assert list(one.levels) == [0]
    assert list(SemanticTree.load("imagenet1k").levels) == [0]
    single = SemanticTree.from_wnids(["n02121808"])
    assert not single.levels
    assert single.class_tree_list == [[0]]


def test_bad_lists():
    with pytest.raises(EmptyLabelSpaceError):
        SemanticTree.from_wnids([])
    with pytest.raises(DuplicateSynsetError):
        SemanticTree.from_wnids(["n02121808", "n02121808"])
    with pytest.raises(UnknownSynsetError):
        SemanticTree.from_wnids(["n00000001"])
    with pytest.raises(InvalidArgumentError):
        SemanticTree.from_wnids("n02121808")
    with pytest.raises(InvalidArgumentError):
        SemanticTree.from_wnids(None)


def test_text_files(tmp_path):
    file = tmp_path / "pets.txt"
    file.write_text("\ufeff# pets\nn02121808 cat\r\n\nn02123045 # tabby\n", encoding="utf-8")
    tree = SemanticTree.from_file(file)
    assert tree.class_tree_list == [[0], [1, 0]]
    assert tree.name == "pets"
    (tmp_path / "binary.txt").write_bytes(b"\xff\xff\x00\x81")
    for bad in (tmp_path / "none.txt", tmp_path, tmp_path / "binary.txt"):
        with pytest.raises(LabelSpaceError, match="cannot be read as a list of wnids"):
            SemanticTree.from_file(bad)


def published_form(tree):
    return {
        "class_list": list(tree.wnids),
        "class_tree_list": tree.class_tree_list,
        "class_description": dict(zip(tree.wnids, tree.label_space.names, strict=True)),
        "child_2_parent": {
            node: tree.wnids[parent] for node, parent in zip(tree.wnids, tree.parents, strict=True) if parent >= 0
        },
    }


def test_published_files(tmp_path, fall11):
    file = tmp_path / "imagenet21k_miil_tree.pth"
    torch.save(published_form(fall11), file)
    assert not SemanticTree.from_file(file).difference(fall11)

    changed = published_form(fall11)
    changed["class_tree_list"] = [list(chain) for chain in changed["class_tree_list"]]
    leaf = next(i for i, n in enumerate(fall11) if n.wnid == "n02123045")
    changed["class_tree_list"][leaf] = [leaf]
    torch.save(changed, file)
    difference = SemanticTree.from_published(file).difference(fall11)
    assert dict(difference.parents) == {"n02123045": (None, "n02121808")}


class Hostile:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_bad_published_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = published_form(SemanticTree.from_wnids(["n02121808", "n02123045"]))
    for name, content in {
        "chain": {**good, "class_tree_list": [[0], [1, 5]]},
        "contradiction": {**good, "class_tree_list": [[0], [1, 0, 0]]},
        "cycle": {**good, "class_tree_list": [[0, 1], [1, 0]]},
        "short": {**good, "class_tree_list": [[0]]},
        "keys": {"class_list": []},
        "list": [1, 2],
        "none": {"class_list": None, "class_tree_list": []},
        "number": {**good, "class_tree_list": 5},
        "words": {**good, "class_tree_list": [["a"], [1]]},
        "mixed": {**good, "class_tree_list": [[0], [1, "a"]]},
        "hostile": {**good, "class_list": Hostile()},
    }.items():
        torch.save(content, f"{name}.pth")
        with pytest.raises(TreeError, match=name):
            SemanticTree.from_file(f"{name}.pth")
    Path("plain.pth").write_bytes(pickle.dumps(Hostile()))
    Path("noise.pth").write_bytes(b"no tree")
    for name in ("plain.pth", "noise.pth", "missing.pth"):
        with pytest.raises(TreeError, match=name):
            SemanticTree.from_file(name)
    assert not Path("executed").exists()


def test_what_is_not_in_a_tree_is_told_with_what_is_above_it():
    pets = SemanticTree.from_wnids(["n02121808", "n02123045", "n02084071"])
    with pytest.raises(UnknownSynsetError, match=r"n02123597 is not a class .*nearest ancestor there is .*n02121808"):
        pets.index("n02123597")  # a Siamese is a domestic cat but not a tabby
    with pytest.raises(UnknownSynsetError, match=r"n03001627 is not a class .*; nor is any of its ancestors"):
        pets.index("n03001627")  # a chair


def test_load_imports_no_torch():
    code = "import sys, wn21k_zoo as w; w.SemanticTree.load('fall11')['n02121808']; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_label_space_of_a_tree_is_kept():
    space = LabelSpace("mine", ("n02123045", "n02121808"))
    tree = SemanticTree.from_label_space(space)
    assert tree.label_space is space
    assert tree.name == "mine"
    assert tree.parents.tolist() == [1, -1]


def test_trees_are_equal_that_say_the_same():
    wnids = ["n02121808", "n02123045"]
    tree = SemanticTree.from_wnids(wnids)
    assert tree == SemanticTree.from_wnids(wnids)
    assert tree not in (SemanticTree.from_wnids(wnids, name="other"), SemanticTree.from_wnids(wnids[::-1]), "tree")
    assert tree != SemanticTree(tree.label_space, np.array([-1, -1]))
    assert yaml.unsafe_load(yaml.dump(tree)) == tree


def test_a_tree_is_over_synsets():
    with pytest.raises(InvalidArgumentError, match=r"synsets, not over ClassNames\('own', 2 classes\)"):
        SemanticTree(ClassNames(["inn", "hotel"]), np.array([-1, -1], np.int32))


@pytest.mark.parametrize("chains", [[[0] * 100_000] * 100_000, [[0], [1] * 65]])
def test_tree_files_with_endless_lists_are_refused_at_once(tmp_path, chains):
    torch.save({"class_list": ["n02121808", "n02084071"], "class_tree_list": chains}, tmp_path / "x.pth")
    with pytest.raises(TreeError, match="class_tree_list"):
        SemanticTree.from_published(tmp_path / "x.pth")


def test_tree_files_whose_classes_are_endless_are_refused_at_once(tmp_path):
    wnid = ("n02121808",)
    for _ in range(40):
        wnid = (wnid, wnid)
    torch.save({"class_list": [wnid], "class_tree_list": [[0]]}, tmp_path / "x.pth")
    with pytest.raises(TreeError, match="class_list does not hold WordNet ids"):
        SemanticTree.from_published(tmp_path / "x.pth")
