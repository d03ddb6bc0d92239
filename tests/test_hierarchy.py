import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wn21k_zoo.errors import TreeError
from wn21k_zoo.hierarchy import Decoder, Hierarchy
from wn21k_zoo.labels import LabelSpace
from wn21k_zoo.tree import SemanticTree

FALL11 = SemanticTree.load("fall11")
HEADS = ("semantic_softmax", "softmax", "sigmoid")
# Lists in which ancestors are likely: classes of fall11 with some of their ancestors.
classes = st.lists(st.integers(0, len(FALL11) - 1), min_size=1, max_size=25, unique=True).map(
    lambda chosen: sorted({index for start in chosen for index in FALL11.class_tree_list[start]})
)
seeds = st.integers(0, 2**32 - 1)


def space_of(indices, name="drawn"):
    return LabelSpace(name, tuple(FALL11.wnids[index] for index in indices))


def logits_for(space, seed, batch=3):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((batch, len(space))).astype(np.float32) * 4)


def by_wnid(decoder, values):
    tree = decoder.hierarchy.tree
    return {tree.wnids[index]: values[:, place] for place, index in enumerate(decoder.hierarchy.order)}


@settings(max_examples=50, deadline=None)
@given(classes, seeds)
def test_semantic_softmax_follows_its_definition(indices, seed):
    space = space_of(indices)
    tree = SemanticTree.from_label_space(space)
    logits = logits_for(space, seed)
    scores = Decoder(tree, space, "semantic_softmax")(logits)
    decoder = Decoder(tree, space, "semantic_softmax")
    probability, confidence = by_wnid(decoder, scores.probability), by_wnid(decoder, scores.confidence)
    for depth in range(tree.depths.max() + 1):
        level = np.flatnonzero(tree.depths == depth)
        expected = logits[:, level].softmax(-1)
        for place, index in enumerate(level):
            torch.testing.assert_close(probability[tree.wnids[index]], expected[:, place])
        torch.testing.assert_close(sum(probability[tree.wnids[index]] for index in level), torch.ones(3))
    for node in tree:
        lowest = torch.stack([probability[above.wnid] for above in tree.path(node)]).amin(0)
        torch.testing.assert_close(confidence[node.wnid], lowest)
    assert not scores.unmapped.any()


@settings(max_examples=50, deadline=None)
@given(classes, classes, seeds, st.sampled_from(["softmax", "sigmoid"]))
def test_aggregation_follows_its_definition(indices, tree_indices, seed, head):
    space, tree = space_of(indices), SemanticTree.from_label_space(space_of(tree_indices))
    decoder = Decoder(tree, space, head)
    logits = logits_for(space, seed)
    scores = decoder(logits)
    found = by_wnid(decoder, scores.probability)
    outputs = logits.softmax(-1) if head == "softmax" else logits.sigmoid()
    nearest = [tree.nearest(wnid) for wnid in space.wnids]
    for node in tree:
        below = {node.wnid, *(child.wnid for child in tree.descendants(node))}
        mine = [i for i, near in enumerate(nearest) if near is not None and near.wnid in below]
        expected = (
            outputs[:, mine].sum(-1) if head == "softmax" else outputs[:, mine].amax(-1) if mine else torch.zeros(3)
        )
        torch.testing.assert_close(found[node.wnid], expected.clamp(max=1), atol=1e-6, rtol=1e-5)
    lost = [i for i, near in enumerate(nearest) if near is None]
    expected = outputs[:, lost].sum(-1) if head == "softmax" else outputs[:, lost].amax(-1) if lost else torch.zeros(3)
    torch.testing.assert_close(scores.unmapped, expected)


@settings(max_examples=50, deadline=None)
@given(classes, seeds, st.sampled_from(HEADS))
def test_a_parent_is_never_less_sure_than_its_child(indices, seed, head):
    space = space_of(indices)
    tree = SemanticTree.from_label_space(space) if head == "semantic_softmax" else FALL11
    decoder = Decoder(tree, space, head)
    scores = decoder(logits_for(space, seed))
    parents = torch.from_numpy(decoder.hierarchy.parents)
    child = parents >= 0
    assert (scores.confidence[:, parents[child]] >= scores.confidence[:, child]).all()
    assert (scores.probability >= 0).all()
    assert (scores.probability <= 1).all()
    if head == "softmax":
        for depth in decoder.hierarchy.depth_slices:
            assert (scores.probability[:, depth].sum(-1) <= 1 + 1e-5).all()
        roots = scores.probability[:, decoder.hierarchy.depth_slices[0]].sum(-1)
        torch.testing.assert_close(roots + scores.unmapped, torch.ones(3))


@settings(max_examples=40, deadline=None)
@given(classes, seeds, st.sampled_from(HEADS), st.randoms(use_true_random=False))
def test_permuting_the_classes_permutes_nothing_in_the_answer(indices, seed, head, random):
    space = space_of(indices)
    order = list(range(len(space)))
    random.shuffle(order)
    shuffled = LabelSpace("drawn", tuple(space.wnids[i] for i in order))
    logits = logits_for(space, seed)
    tree_order = list(space.wnids)
    random.shuffle(tree_order)
    one, two = SemanticTree.from_label_space(space), SemanticTree.from_wnids(tree_order)
    first, second = Decoder(one, space, head), Decoder(two, shuffled, head)
    a, b = first(logits), second(logits[:, order])
    assert torch.equal(a.probability, b.probability)
    assert torch.equal(a.confidence, b.confidence)
    assert torch.equal(a.outputs, b.outputs)
    for row in range(3):
        paths = [
            [
                d.hierarchy.tree.wnids[d.hierarchy.order[p]]
                for p in d.hierarchy.best_path(s.rank[row].numpy(), s.probability[row].numpy())
            ]
            for d, s in ((first, a), (second, b))
        ]
        assert paths[0] == paths[1]


@settings(max_examples=40, deadline=None)
@given(classes, seeds)
def test_the_path_follows_the_tree_to_the_best_child(indices, seed):
    space = space_of(indices)
    tree = SemanticTree.from_label_space(space)
    decoder = Decoder(tree, space, "semantic_softmax")
    scores = decoder(logits_for(space, seed, batch=1))
    p, confidence = scores.probability[0].numpy(), scores.confidence[0].numpy()
    hierarchy = decoder.hierarchy
    path = hierarchy.best_path(scores.rank[0].numpy(), p)
    nodes = [tree[int(hierarchy.order[place])] for place in path]
    place_of = {node.index: place for place, node in enumerate(tree[int(i)] for i in hierarchy.order)}
    assert confidence[path[0]] == max(confidence[place_of[root.index]] for root in tree.roots)
    for above, below in itertools.pairwise(nodes):
        assert tree.parent(below) == above
        assert p[place_of[below.index]] == max(p[place_of[child.index]] for child in tree.children(above))
    assert not tree.children(nodes[-1])


@settings(max_examples=50, deadline=None)
@given(classes, seeds)
def test_what_leaves_have_of_any_scores_is_one(indices, seed):
    tree = SemanticTree.from_label_space(space_of(indices))
    hierarchy = Hierarchy(tree)
    scores = torch.from_numpy(np.random.default_rng(seed).random((3, len(tree)), np.float32))
    mass = hierarchy.leaf_mass(scores)
    leaves = torch.tensor([not tree.children(int(index)) for index in hierarchy.order])
    torch.testing.assert_close(mass.sum(1), torch.ones(3))
    assert (mass[:, ~leaves] == 0).all()
    mass = dict(zip((tree.wnids[index] for index in hierarchy.order), mass[0].tolist(), strict=True))
    score = dict(zip((tree.wnids[index] for index in hierarchy.order), scores[0].tolist(), strict=True))
    for wnid in (tree.wnids[index] for index in hierarchy.order[leaves.numpy()]):
        expected, node = 1.0, tree[wnid]
        while node is not None:
            above = tree.parent(node)
            siblings = tree.children(above) if above is not None else tree.roots
            expected *= score[node.wnid] / sum(score[each.wnid] for each in siblings)
            node = above
        assert mass[wnid] == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_ties_and_zeros():
    tree = SemanticTree.from_wnids(["n02123597", "n02123045", "n02121808", "n02084071"])
    hierarchy = Hierarchy(tree)
    same = np.full(4, 0.5, np.float32)
    chosen = [tree.wnids[hierarchy.order[place]] for place in hierarchy.best_path(same, same)]
    assert chosen == ["n02084071"]  # the lower wnid of two roots
    zero = np.zeros(4, np.float32)
    assert hierarchy.best_path(zero, zero) == []
    only_root = np.array([0, 1, 0, 0], np.float32)
    assert len(hierarchy.best_path(only_root, only_root)) == 1


def test_a_class_that_the_tree_lacks_counts_for_its_nearest_ancestor():
    space = LabelSpace("two", ("n02123045", "n00001740"))  # tabby; entity, above everything
    tree = SemanticTree.from_wnids(["n02121808", "n02084071"])  # cat, dog
    decoder = Decoder(tree, space, "softmax")
    scores = decoder(torch.tensor([[np.log(3.0), 0.0]], dtype=torch.float32))
    found = by_wnid(decoder, scores.probability)
    assert found["n02121808"].item() == pytest.approx(0.75)
    assert found["n02084071"].item() == 0
    assert scores.unmapped.item() == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("name", "lost"),
    [("imagenet21k_goog", 387), ("imagenet22k", 387), ("imagenet22k_ms", 387), ("imagenet12k", 9), ("imagenet1k", 0)],
)
def test_how_many_classes_have_no_place_in_fall11(name, lost):
    space = LabelSpace.load(name)
    scores = Decoder(FALL11, space, "softmax")(torch.zeros(1, len(space)))
    assert round(scores.unmapped.item() * len(space)) == lost


def test_a_semantic_softmax_needs_its_own_tree():
    with pytest.raises(TreeError, match="same classes"):
        Decoder(SemanticTree.load("winter21"), FALL11.label_space, "semantic_softmax")


def test_low_precision_is_reduced_in_float32():
    scores = Decoder(FALL11, FALL11.label_space, "semantic_softmax")(torch.zeros(1, len(FALL11), dtype=torch.bfloat16))
    assert scores.probability.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_a_decoder_exports_with_any_batch(head):
    tree = SemanticTree.from_wnids(["n02121808", "n02123045", "n02084071", "n02087122"])
    decoder = Decoder(tree, tree.label_space, head)

    class Confidence(torch.nn.Module):
        def forward(self, logits):
            return decoder(logits).confidence

    exported = torch.export.export(Confidence(), (torch.zeros(2, 4),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    logits = logits_for(tree.label_space, 0, batch=5)
    assert torch.equal(exported.module()(logits), decoder(logits).confidence)
