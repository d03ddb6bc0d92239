import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wn21k_zoo.errors import InvalidArgumentError, NonFiniteError
from wn21k_zoo.training.evaluation import Evaluation
from wn21k_zoo.training.metrics import Calibration, ClassAccuracy, HierarchicalDistances, LeafAccuracy, SemanticAccuracy
from wn21k_zoo.training.state import score
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
    scores[:, 0] = 9  # not one of the classes to choose from
    scores[0, 4] = scores[1, 8] = scores[2, 1] = 1
    assert metric.update(scores, torch.tensor([4, 1, 0])).tolist() == [4, 8, 1]
    assert metric.compute() == {"top1": 50, "top5": 100, "images": 2}  # 0 is not one of the classes
    assert metric.has(torch.tensor([0, 1, 4, 8, 9, 100])).tolist() == [False, True, True, True, False, False]
    metric.reset()
    assert metric.compute()["images"] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_have_no_semantic_accuracy(bad):
    metric = SemanticAccuracy(TREE)
    logits, targets = torch.zeros(3, len(TREE)), torch.tensor([1, 2, 3])
    metric.update(logits, targets)
    logits[:, 7] = -math.inf  # masked, as is all of level 1
    logits[:, torch.tensor(TREE.levels[1])] = -math.inf
    metric.update(logits, targets)
    metric.compute()
    logits[1, 5] = bad
    metric.update(logits, targets)
    with pytest.raises(NonFiniteError, match="logits of 1 images"):
        metric.compute()
    metric.reset()
    metric.update(torch.zeros(3, len(TREE)), targets)
    metric.compute()


def test_what_no_metric_can_count_is_said(monkeypatch):
    semantic = SemanticAccuracy(TREE)
    monkeypatch.setattr(semantic.levels, "check_range", lambda targets: None)  # as on a GPU, which is not synchronised
    semantic.update(torch.zeros(3, len(TREE)), torch.tensor([1, -1, len(TREE)]))
    distances = HierarchicalDistances(TREE)
    distances.update(torch.tensor([1, 1, len(TREE)]), torch.tensor([1, -1, 1]))
    for metric in (semantic, distances):
        with pytest.raises(InvalidArgumentError, match="of 2 images are not classes, which are 0 to 10449"):
            metric.compute()
    for wrong in (lambda: HierarchicalDistances("fall11"), lambda: Calibration(0), lambda: LeafAccuracy([-1, 2])):
        with pytest.raises(InvalidArgumentError):
            wrong()
    with pytest.raises(InvalidArgumentError, match=r"scores are of 6 classes, .* has the index 100"):
        LeafAccuracy([1, 100]).update(torch.zeros(2, 6), torch.tensor([1, 1]))
    each = ClassAccuracy(3)
    each.update(torch.tensor([0, 2, 1]), torch.tensor([-1, 7, 1]), torch.ones(3, dtype=torch.bool))
    assert each.per_class() == {1: (1, 1)}
    twice = LeafAccuracy(torch.tensor([1, 1, 2]))
    twice.update(torch.zeros(2, 6), torch.tensor([1, -1]))
    assert twice.compute() == {"top1": 100, "top5": 100, "images": 1}


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


def test_calibration():
    metric = Calibration(bins=10)
    confidences = torch.tensor([0.95, 0.95, 0.91, 1.0, 0.15, 0.5])
    right = torch.tensor([True, True, False, True, True, False])
    metric.update(confidences, right, torch.tensor([True] * 5 + [False]))
    figures = metric.compute()
    assert figures["reliability"] == [
        {"images": 1, "confidence": pytest.approx(15), "accuracy": 100},
        {"images": 4, "confidence": pytest.approx(95.25), "accuracy": 75},
    ]
    assert figures["calibration_error"] == pytest.approx((85 + 4 * 20.25) / 5)


def test_each_class_counts_the_same_in_balanced_accuracy():
    metric = ClassAccuracy(4)
    metric.update(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 0, 0]), torch.tensor([True] * 4))
    metric.update(torch.tensor([2, 3, 2]), torch.tensor([2, 2, 9]), torch.tensor([True, True, False]))
    metric.update(torch.tensor([1]), torch.tensor([1]), torch.tensor([False]))
    assert metric.per_class() == {0: (4, 3), 2: (2, 1)}
    assert metric.compute() == {"balanced_top1": pytest.approx((75 + 50) / 2)}


# Animal, cat, tabby, dog, plant: cat and animal have descendants here.
NESTED = SemanticTree.from_wnids(["n00015388", "n02121808", "n02123045", "n02084071", "n00017222"])


@pytest.mark.parametrize("order", ["published", "level"])
@pytest.mark.parametrize("head", ["semantic_softmax", "softmax", "sigmoid"])
def test_perfect_predictions_are_perfect_whatever_the_head(head, order):
    targets = torch.arange(len(NESTED))
    logits = torch.full((len(NESTED), len(NESTED)), -20.0)
    for target in targets.tolist():
        above = NESTED.class_tree_list[target] if head != "softmax" else [target]
        logits[target, above] = 20.0
    evaluation = Evaluation(NESTED, head, range(len(NESTED)), order)
    columns = evaluation._levels.columns if order == "level" else slice(None)
    evaluation.update(logits[:, columns], targets)
    figures = evaluation.compute()
    assert (figures["semantic_top1"], figures["top1"], figures["images"]) == (100, 100, 5)
    assert (figures["leaf_images"], figures["leaves"], figures["classes_with_images"]) == (3, 3, 5)
    assert figures["mean_lca_error"] == figures["mean_lca_error_of_mistakes"] == 0
    assert figures["hierarchical_precision"] == figures["hierarchical_recall"] == 100  # over leaves, like top1
    assert figures["calibration_error"] < 0.1
    assert figures["balanced_top1"] == 100
    if head != "sigmoid":
        assert figures["raw_top1"] >= 40


@pytest.mark.parametrize("order", ["published", "level"])
@pytest.mark.parametrize("target", [0, 1, 2])
def test_of_classes_below_one_that_is_less_certain_the_likeliest_is_chosen(target, order):
    # feline and canine; wolf, fox and hyena below the second
    tree = SemanticTree.from_wnids(["n02114100", "n02118333", "n02117135", "n02083346", "n02120997"])
    logits = torch.zeros(1, 5)
    logits[0, target], logits[0, 4] = 3.0, 9.0  # canine is less likely in its level than each of the three in theirs
    evaluation = Evaluation(tree, "semantic_softmax", range(3), order)
    columns = evaluation._levels.columns if order == "level" else slice(None)
    evaluation.update(logits[:, columns], torch.tensor([target]))
    assert evaluation.compute()["top1"] == 100


@pytest.mark.parametrize("tree", [NESTED, None])
@pytest.mark.parametrize("by", [0, 100])
def test_sigmoids_that_round_to_1_are_ranked_by_their_logits(tree, by):
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(200, 5, generator=generator)
    targets = torch.randint(0, 5, (200,), generator=generator)
    first, shifted = (Evaluation(tree, "sigmoid", range(5), num_classes=5) for _ in range(2))
    first.update(logits, targets)
    shifted.update(logits + by, targets)
    figures = shifted.compute()
    for name in ("top1", "top5", "semantic_top1", "raw_top1", "mean_lca_error", "balanced_top1"):
        assert figures.get(name) == first.compute().get(name)
    if tree is None:
        assert figures["top1"] == figures["raw_top1"]


def test_what_a_mac_computes_is_counted_on_the_cpu():
    evaluation = Evaluation(NESTED, "softmax", range(5), "level", device="mps")
    assert {each.device.type for each in evaluation.buffers()} == {"cpu"}
    evaluation.update(torch.eye(5)[:, evaluation._levels.columns], torch.arange(5))
    assert evaluation.compute()["raw_top1"] == 100


def test_mistakes_among_classes_without_levels_are_as_far_as_wordnet_says():
    flat = SemanticTree.from_wnids(["n02123045", "n02084071", "n00017222"])  # tabby, dog, plant
    evaluation = Evaluation(flat, "softmax", range(3), "level")
    logits = torch.eye(3)[[0, 1, 1, 2]]  # the third is a tabby mistaken for a dog
    evaluation.update(logits[:, evaluation._levels.columns], torch.tensor([0, 1, 0, 2]))
    figures = evaluation.compute()
    assert figures["top1"] == figures["raw_top1"] == 75
    assert "semantic_top1" not in figures
    whole = flat.with_ancestors()
    assert evaluation.hierarchy == whole.name == "custom_with_ancestors"
    domestic_animal = whole.lowest_common_ancestor(0, 1)
    assert domestic_animal.wnid == "n01317541"
    error = whole[0].depth - domestic_animal.depth
    assert (figures["mean_lca_error"], figures["mean_lca_error_of_mistakes"]) == (error / 4, error)
    lengths = [whole[index].depth + 1 for index in (0, 1, 0, 2)]
    common = sum(lengths) - error
    assert figures["hierarchical_recall"] == pytest.approx(100 * common / sum(lengths))
    assert 0 < figures["hierarchical_precision"] < 100


def test_classes_that_are_no_synsets_have_no_distances():
    evaluation = Evaluation(None, "softmax", range(3))
    evaluation.update(torch.eye(3), torch.arange(3))
    assert evaluation.hierarchy is None
    assert not {"semantic_top1", "mean_lca_error"} & set(evaluation.compute())


def test_outputs_that_are_not_finite_give_no_figures():
    evaluation = Evaluation(NESTED, "softmax", range(5))
    logits = torch.zeros(3, 5)
    logits[1, 2] = torch.nan
    evaluation.update(logits, torch.tensor([0, 1, 2]))
    with pytest.raises(NonFiniteError, match="The logits of 1 of 3 images are NaN or infinite: the network"):
        evaluation.compute()


FLAT = SemanticTree.from_wnids(["n02123045", "n02084071", "n00017222"])


@pytest.mark.parametrize("tree", [NESTED, FLAT])
def test_logits_and_targets_that_do_not_fit_are_refused(tree):
    evaluation = Evaluation(tree, "softmax", range(3))
    logits, targets = torch.zeros(4, len(tree)), torch.tensor([0, 1, 2, 1])
    for wrong in (
        (torch.zeros(4, 9), targets),
        (logits, targets[:3]),
        (logits[0], targets),
        (logits.numpy(), targets),
        (logits.long(), targets),
    ):
        with pytest.raises(InvalidArgumentError):
            evaluation.update(*wrong)
    with pytest.raises(InvalidArgumentError, match="int64"):
        evaluation.update(logits * math.nan, targets.int())
    evaluation.update(logits, targets)
    if tree is NESTED:
        with pytest.raises(InvalidArgumentError, match="A target is 99"):
            evaluation.update(logits, torch.tensor([0, 1, 2, 99]))
    assert evaluation.compute()["images"] == 4
    evaluation.reset()
    evaluation.update(logits[:3], targets[:3])
    evaluation.update(torch.zeros(0), targets[:0])
    assert evaluation.compute()["images"] == 3
    with pytest.raises(InvalidArgumentError):
        evaluation.update(logits, targets[:0])
    with pytest.raises(InvalidArgumentError, match="semantic_softmax, softmax, sigmoid"):
        Evaluation(tree, "semantic-softmax", range(3))


class OnMps(torch.Tensor):
    """A tensor that says it is on MPS."""

    @property
    def device(self):
        return torch.device("mps")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_a_batch_that_is_refused_is_counted_nowhere_on_mps_either():
    evaluation = Evaluation(NESTED, "softmax", range(3), device="mps")
    with pytest.raises(InvalidArgumentError, match="A target is 99"):
        evaluation.update(torch.zeros(2, 5).as_subclass(OnMps), torch.tensor([0, 99]).as_subclass(OnMps))
    assert not any(each.counts.any() for each in evaluation.modules() if hasattr(each, "counts"))


def test_a_sigmoid_without_a_hierarchy_is_as_sure_as_it_says():
    flat = SemanticTree.from_wnids(["n02123045", "n02084071", "n00017222"])
    evaluation = Evaluation(flat, "sigmoid", range(3))
    evaluation.update(torch.tensor([[0.0, -9.0, -9.0]]), torch.tensor([0]))
    assert evaluation.compute()["reliability"][0]["confidence"] == pytest.approx(50)


def test_the_highest_logit_may_be_of_no_leaf():
    logits = torch.zeros(1, len(NESTED))
    cat, tabby = NESTED.index("n02121808"), NESTED.index("n02123045")
    logits[0, cat], logits[0, tabby] = 5.0, 4.0
    evaluation = Evaluation(NESTED, "softmax", range(len(NESTED)))
    evaluation.update(logits, torch.tensor([tabby]))
    figures = evaluation.compute()
    assert (figures["top1"], figures["raw_top1"]) == (100, 0)


@pytest.mark.parametrize("head", ["softmax", "sigmoid", "semantic_softmax"])
def test_figures_are_the_same_in_either_order(head):
    generator = torch.Generator().manual_seed(1)
    logits, targets = torch.randn(400, len(NESTED), generator=generator), torch.arange(400) % len(NESTED)
    figures = []
    for order in ("published", "level"):
        evaluation = Evaluation(NESTED, head, range(len(NESTED)), order)
        evaluation.update(logits[:, evaluation._levels.columns] if order == "level" else logits, targets)
        figures.append(evaluation.compute())
    assert figures[0] == figures[1]
    assert 0 < figures[0]["raw_semantic_top1"] < 100


def test_semantic_accuracy_is_over_pairs_and_not_the_mean_of_levels():
    animal, cat, plant = (NESTED.index(wnid) for wnid in ("n00015388", "n02121808", "n00017222"))
    logits = torch.zeros(4, len(NESTED))
    logits[:, [animal, cat]] = 1  # predicted for all four
    metric = SemanticAccuracy(NESTED)
    metric.update(logits, torch.tensor([cat, plant, plant, plant]))
    assert metric.compute() == {"semantic_top1": 40, "levels": {0: 25, 1: 100}}


def test_top5_is_of_five():
    metric = LeafAccuracy(range(8))
    metric.update(torch.arange(8.0).flip(0).expand(8, 8), torch.arange(8))  # class k has rank k
    assert metric.compute() == {"top1": 12.5, "top5": 62.5, "images": 8}


def test_the_default_bins_are_fifteen():
    metric = Calibration()
    confidences = torch.arange(15) / 15 + 0.01
    metric.update(confidences, torch.ones(15, dtype=torch.bool), torch.ones(15, dtype=torch.bool))
    assert [row["images"] for row in metric.compute()["reliability"]] == [1] * 15


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_outputs_of_any_kind_that_are_not_finite_give_no_figures(bad):
    evaluation = Evaluation(NESTED, "sigmoid", range(5))  # for a sigmoid, infinity would be a confidence of 1
    logits = torch.zeros(3, 5)
    logits[1, 2] = bad
    evaluation.update(logits, torch.tensor([0, 1, 2]))
    with pytest.raises(NonFiniteError, match="The logits of 1 of 3 images"):
        evaluation.compute()


@pytest.mark.parametrize(
    ("imaged", "leaves"),
    [
        (("n00015388", "n02123045"), 1),  # animal and tabby: an ancestor, but not a parent
        (("n02121808", "n02084071"), 2),  # cat and dog: the cat's child tabby has no images
    ],
)
def test_leaves_are_those_with_no_imaged_class_below(imaged, leaves):
    evaluation = Evaluation(NESTED, "softmax", [NESTED.index(wnid) for wnid in imaged])
    evaluation.update(torch.zeros(1, 5), torch.tensor([0]))
    figures = evaluation.compute()
    assert (figures["leaves"], figures["classes_with_images"]) == (leaves, 2)


@pytest.mark.parametrize("order", ["published", "level"])
@pytest.mark.parametrize("head", ["softmax", "sigmoid", "semantic_softmax"])
def test_among_all_classes_one_without_images_may_win(head, order):
    _, cat, tabby, dog, plant = range(len(NESTED))
    logits = torch.full((4, len(NESTED)), -9.0)
    for row, likeliest in enumerate((cat, tabby, dog, plant)):
        logits[row, likeliest] = 9.0
    logits[1, cat], logits[3, dog] = 5.0, 5.0
    evaluation = Evaluation(NESTED, head, [cat, dog], order)
    columns = evaluation._levels.columns if order == "level" else slice(None)
    evaluation.update(logits[:, columns], torch.tensor([cat, cat, dog, dog]))
    figures = evaluation.compute()
    assert figures["raw_top1"] == 100
    assert figures.get("top1_among_all") == (50 if head != "semantic_softmax" else None)


def test_among_all_classes_of_ones_own():
    for known, expected in ((4, 200 / 3), (None, 100)):  # the fourth class is known, or not
        evaluation = Evaluation(None, "softmax", range(3), num_classes=known)
        evaluation.update(torch.eye(4)[[0, 1, 3]] + torch.tensor([0, 0, 0.5, 0]), torch.tensor([0, 1, 2]))
        figures = evaluation.compute()
        assert (figures["top1"], figures["top1_among_all"]) == (100, pytest.approx(expected))


def test_semantic_top1_is_by_the_softmax_within_a_level():
    # feline and canine; cat below the first, wolf below the second
    tree = SemanticTree.from_wnids(["n02120997", "n02083346", "n02121620", "n02114100"])
    evaluation = Evaluation(tree, "semantic_softmax", range(4))
    evaluation.update(torch.tensor([[9.0, 0.0, 0.0, 3.0]]), torch.tensor([3]))  # a feline, and a wolf
    figures = evaluation.compute()
    assert figures["levels"] == {0: 0, 1: 100}
    assert figures["semantic_top1"] == figures["raw_semantic_top1"] == 50


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_raw_semantic_of_a_plain_head_is_by_the_highest_logit(head):
    animal, tabby, plant = (NESTED.index(wnid) for wnid in ("n00015388", "n02123045", "n00017222"))
    logits = torch.full((1, len(NESTED)), -9.0)
    logits[0, [tabby, plant]] = torch.tensor([5.0, 1.0])  # more of a tabby than a plant, whose own logit is higher
    evaluation = Evaluation(NESTED, head, range(len(NESTED)))
    evaluation.update(logits, torch.tensor([animal]))
    figures = evaluation.compute()
    assert (figures["semantic_top1"], figures["raw_semantic_top1"]) == (100, 0)


def test_two_classes_of_which_one_is_above_the_other_have_no_levels():
    tree = SemanticTree.from_wnids(["n02121808", "n02123045"])
    evaluation = Evaluation(tree, "softmax", range(2))
    evaluation.update(torch.eye(2), torch.arange(2))
    assert "semantic_top1" not in evaluation.compute()
    assert evaluation.compute()["mean_lca_error"] == 0


def test_logits_in_half_precision_are_read_in_float32():
    evaluation = Evaluation(None, "softmax", range(3))
    logits = torch.tensor([[1.5, 0.25, 0.0]], dtype=torch.bfloat16)
    evaluation.update(logits, torch.tensor([0]))
    (row,) = evaluation.compute()["reliability"]
    assert row["confidence"] == pytest.approx(100 * float(logits.float().softmax(1)[0, 0]), abs=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_told(value):
    metric = LeafAccuracy([0, 2])
    metric.update(torch.tensor([[0.1, value, 0.2], [0.1, 0.3, -math.inf]]), torch.tensor([2, 0]))  # not a choice
    assert metric.compute() == {"top1": 100, "top5": 100, "images": 2}
    metric.update(torch.tensor([[0.1, 0.2, value]]), torch.tensor([0]))
    with pytest.raises(NonFiniteError, match="The logits of 1 images"):
        metric.compute()


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.5, 7.0])
def test_confidences_that_are_none_are_told(value):
    metric, counted = Calibration(), torch.tensor([True, False])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        metric.update(torch.tensor([0.9999999, value]).to(dtype), torch.tensor([True, True]), counted)
    (row,) = metric.compute()["reliability"]
    assert (row["images"], row["accuracy"], round(row["confidence"], 3)) == (3, 100, 100)
    metric.update(torch.tensor([value, 0.5]), torch.tensor([True, True]), counted)
    with pytest.raises(InvalidArgumentError, match="confidences of 1 images are not in"):
        metric.compute()


def test_counts_go_where_a_metric_goes_and_nowhere_else():
    metric, targets = SemanticAccuracy(TREE), torch.arange(3)
    metric.update(torch.eye(len(TREE))[:3], targets)
    before = metric.compute()
    assert metric.half().compute() == metric.double().compute() == before
    assert not metric.state_dict()
    assert "counts" not in dict(metric.named_buffers())  # which DDP would overwrite
    assert metric.to("meta").counts.device.type == "meta"
    shared = ClassAccuracy(3)
    other = copy.copy(shared)  # like a process that was given the memory
    shared.update(targets, targets)
    assert (shared.per_class(), other.per_class()) == ({0: (1, 1), 1: (1, 1), 2: (1, 1)}, {})
    shared.reset()
    assert shared.per_class() == {}


@pytest.mark.parametrize(
    "metric",
    [SemanticAccuracy(TREE), LeafAccuracy([0]), ClassAccuracy(3), HierarchicalDistances(TREE), Calibration()],
    ids=lambda metric: type(metric).__name__,
)
def test_figures_of_nothing_are_not_figures(metric):
    figures = metric.compute()
    numbers = {name: value for name, value in figures.items() if isinstance(value, float)}
    assert numbers
    assert all(map(math.isnan, numbers.values()))


@pytest.mark.parametrize("made", [lambda: HierarchicalDistances(TREE), lambda: ClassAccuracy(3)])
def test_what_are_no_class_indices_is_a_typed_error(made):
    targets = torch.tensor([0, 1])
    for wrong in ([0, 1], torch.zeros(2), torch.zeros(2, 3, dtype=torch.int64), targets[:1]):
        with pytest.raises(InvalidArgumentError, match=r"[Pp]redictions"):
            made().update(wrong, targets)
    with pytest.raises(InvalidArgumentError, match=r"by argmax\(1\)"):
        made().update(torch.zeros(2, 3), targets)
    with pytest.raises(InvalidArgumentError, match=r"use predictions.long\(\)"):
        made().update(targets.int(), targets)
    with pytest.raises(InvalidArgumentError, match="counted_b of shape"):
        made().update(targets, targets, torch.ones(3, dtype=torch.bool))
    with pytest.raises(InvalidArgumentError, match="scores must be a tensor"):
        LeafAccuracy([0]).update(targets, targets)
    with pytest.raises(InvalidArgumentError, match="targets must be a tensor"):
        LeafAccuracy([0]).update(torch.zeros(2, 3), [0, 1])


def test_an_evaluation_of_nothing_can_be_written_as_json():
    figures = Evaluation(TREE, "softmax", [0, 1]).compute()
    assert json.loads(json.dumps(figures, allow_nan=False))["top1"] is None
    assert score(figures) == -math.inf


def test_predictions_of_a_semantic_softmax_are_those_of_its_evaluation():
    targets = torch.tensor([TREE.index("n02123045")] * 2)
    logits = torch.full((2, len(TREE)), -5.0)
    logits[:, TREE.chain("n02123045")] = 10.0  # right on all levels
    predictions, _ = Evaluation(TREE, "semantic_softmax", range(len(TREE))).update(logits, targets)
    assert predictions.tolist() == targets.tolist()


def test_all_count_where_nothing_else_is_said():
    all_three = torch.ones(3, dtype=torch.bool)
    for kind, predictions, truth in (
        (lambda: ClassAccuracy(3), torch.tensor([2, 1, 0]), torch.arange(3)),
        (Calibration, torch.tensor([0.1, 0.5, 0.9]), all_three),
        (Calibration, torch.tensor([0.1, 0.5, 0.9]), all_three.float()),
    ):
        short, long = kind(), kind()
        short.update(predictions, truth)
        long.update(predictions, truth, all_three)
        assert short.compute() == long.compute()
