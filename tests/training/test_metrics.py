import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wn21k_zoo.errors import InvalidArgumentError
from wn21k_zoo.training.metrics import HierarchicalDistances, LeafAccuracy, SemanticAccuracy
from wn21k_zoo.tree import SemanticTree

TREE = SemanticTree.load("winter21")
PAIRS = st.lists(st.tuples(st.integers(0, len(TREE) - 1), st.integers(0, len(TREE) - 1)), min_size=1, max_size=20)


def distances(*pairs):
    metric = HierarchicalDistances(TREE)
    predictions, targets = torch.tensor(pairs).T
    metric.update(predictions, targets)
    return metric.compute()


@settings(deadline=None)
@given(pairs=PAIRS)
def test_distances_are_those_of_the_tree(pairs):
    errors = common = predicted_ancestors = true_ancestors = 0
    for predicted, target in pairs:
        ours, truth = set(TREE.class_tree_list[predicted]), set(TREE.class_tree_list[target])
        common += len(ours & truth)
        predicted_ancestors += len(ours)
        true_ancestors += len(truth)
        lowest = TREE.lowest_common_ancestor(predicted, target)
        errors += TREE[target].depth - (lowest.depth if lowest else -1)
    mistakes = sum(predicted != target for predicted, target in pairs)
    assert distances(*pairs) == pytest.approx(
        {
            "mean_lca_error": errors / len(pairs),
            "mean_lca_error_of_mistakes": errors / max(1, mistakes),
            "hierarchical_precision": 100 * common / predicted_ancestors,
            "hierarchical_recall": 100 * common / true_ancestors,
        }
    )


def test_a_cat_for_a_tabby_is_nearer_than_a_dog():
    tabby, cat, dog = (TREE.index(wnid) for wnid in ("n02123045", "n02121808", "n02084071"))
    assert distances((tabby, tabby))["mean_lca_error"] == 0
    assert distances((cat, tabby))["mean_lca_error"] == 1
    assert distances((cat, tabby))["hierarchical_precision"] == 100
    assert distances((tabby, cat))["hierarchical_recall"] == 100
    assert distances((dog, tabby))["mean_lca_error"] > 1


def test_leaf_accuracy_chooses_among_the_given_classes_only():
    metric = LeafAccuracy([4, 1, 8])
    scores = torch.zeros(3, 10)
    scores[:, 0] = 9  # no class to choose
    scores[0, 4] = scores[1, 8] = scores[2, 1] = 1
    assert metric.update(scores, torch.tensor([4, 1, 0])).tolist() == [4, 8, 1]
    assert metric.compute() == {"top1": 100 / 3, "top5": 200 / 3, "images": 3}
    metric.reset()
    assert metric.compute() == {"top1": 0, "top5": 0, "images": 0}


def test_leaf_accuracy_needs_classes():
    with pytest.raises(InvalidArgumentError, match="at least one class"):
        LeafAccuracy([])


def test_semantic_accuracy_per_level():
    metric = SemanticAccuracy(TREE)
    tabby = TREE.index("n02123045")
    logits = torch.zeros(1, len(TREE))
    path = TREE.path(tabby)
    logits[0, [node.index for node in path]] = 1
    metric.update(logits, torch.tensor([tabby]))
    assert metric.compute() == {"semantic_top1": 100, "levels": {node.depth: 100 for node in path}}
    logits[0, tabby] = -1
    metric.update(logits, torch.tensor([tabby]))
    assert metric.compute()["levels"][len(path) - 1] == 50
