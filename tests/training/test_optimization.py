import numpy as np
import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay

from wn21k_zoo import convert
from wn21k_zoo.errors import RecipeError
from wn21k_zoo.training.levels import Levels
from wn21k_zoo.training.losses import MultiLabelLoss, SemanticDistillationLoss, SemanticSoftmaxLoss, SingleLabelLoss
from wn21k_zoo.training.optimization import Criterion, average_of, build_optimizer, build_schedule
from wn21k_zoo.tree import SemanticTree

from .runs import WNIDS, small_recipe

TREE = SemanticTree.from_wnids(WNIDS)


def rates(steps=10, **sections):
    recipe = small_recipe(**sections)
    optimizer = build_optimizer(recipe, timm.create_model("test_convnext", num_classes=3))
    schedule = build_schedule(recipe, optimizer, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("warmup", [0.0, 0.01, 0.3])
def test_the_rate_reaches_what_is_asked_for_and_ends_where_it_should(warmup):
    for name in ("cosine", "constant"):
        found = rates(schedule={"name": name, "warmup": warmup, "start_divisor": 10.0}, optimizer={"lr": 1.0})
        assert max(found) == pytest.approx(1.0)
        assert found[0] == pytest.approx(0.1 if warmup == 0.3 else 1.0)
    fallen = rates(100, schedule={"name": "cosine", "warmup": warmup, "end_divisor": 50.0}, optimizer={"lr": 1.0})
    assert fallen[-1] == pytest.approx(0.02, rel=0.1)
    cycle = rates(schedule={"warmup": warmup, "start_divisor": 10.0}, optimizer={"lr": 1.0})
    assert max(cycle) == pytest.approx(1.0, rel=0.04)
    assert cycle[0] == pytest.approx(0.1)


@pytest.mark.parametrize(("factor", "divisor"), [(0.01, 10.0), (10.0, 1.0)])
@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_the_heads_rate_keeps_its_proportion_to_the_end(schedule, factor, divisor):
    recipe = small_recipe(
        optimizer={"lr": 1.0, "head_lr_factor": factor}, schedule={"name": schedule, "end_divisor": divisor}
    )
    optimizer = build_optimizer(recipe, timm.create_model("test_convnext", num_classes=3))
    schedule = build_schedule(recipe, optimizer, 20)
    for _ in range(19):
        found = {group["lr"] for group in optimizer.param_groups}
        assert max(found) / min(found) == pytest.approx(max(factor, 1 / factor))
        optimizer.step()
        schedule.step()


def test_an_average_has_averaged_batch_statistics():
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    average = average_of(module, 0.5)
    average.update(module, 1)  # the first update is a copy
    before = module[1].running_mean.clone()
    module(torch.rand(2, 3, 4, 4))
    average.update(module, 2)
    expected = (before + 10 * module[1].running_mean) / 11
    torch.testing.assert_close(average.module[1].running_mean, expected)
    assert average.module[1].num_batches_tracked == module[1].num_batches_tracked == 1


def test_an_average_forgets_what_a_short_run_began_with():
    module = torch.nn.Linear(1, 1)
    average = average_of(module, 0.9999)
    for step in range(1, 41):
        torch.nn.init.constant_(module.weight, step)
        average.update(module, step)
    assert 34 < float(average.module.weight.detach()) < 40
    assert average.get_decay(89_000) < 0.9999
    assert average.get_decay(100_000) == 0.9999


@pytest.mark.parametrize("persistent", [True, False])
def test_an_average_keeps_indices(persistent):
    module = torch.nn.Linear(1, 1)
    module.register_buffer("index", torch.arange(1000), persistent=persistent)
    average = average_of(module, 0.9999)
    for step in range(1, 4):
        average.update(module, step)
    assert torch.equal(average.module.index, torch.arange(1000))


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "mobilenetv3_small_050", "ofa_flops_595m_s"])
@pytest.mark.parametrize("name", ["adam", "adamw", "lamb", "sgd"])
def test_lower_layers_have_lower_rates(architecture, name):
    module = convert.build(architecture, num_classes=3)
    theirs = {
        id(parameter): group["lr_scale"]
        for group in param_groups_layer_decay(module, layer_decay=0.5)
        for parameter in group["params"]
    }
    head = {id(parameter) for parameter in module.get_classifier().parameters()}
    recipe = small_recipe(optimizer={"name": name, "lr": 0.1, "layer_decay": 0.5, "head_lr_factor": 3.0})
    groups = build_optimizer(recipe, module).param_groups
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert rates == {key: pytest.approx(0.3 if key in head else 0.1 * scale) for key, scale in theirs.items()}


def test_layers_must_be_known():
    class Plain(torch.nn.Linear):
        def get_classifier(self):
            return self

    with pytest.raises(RecipeError, match="The layers of Plain are not known"):
        build_optimizer(small_recipe(optimizer={"layer_decay": 0.5}), Plain(1, 1))


def test_lamb_clips_no_more_than_is_asked_for():
    recipe = small_recipe(optimizer={"name": "lamb"})
    optimizer = build_optimizer(recipe, timm.create_model("test_convnext", num_classes=3))
    assert optimizer.defaults["max_grad_norm"] is None


def test_biases_and_what_has_one_dimension_do_not_decay():
    module = timm.create_model("test_efficientnet", num_classes=3)
    optimizer = build_optimizer(small_recipe(optimizer={"weight_decay": 0.3, "head_lr_factor": 2.0}), module)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    seen = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.add(name)
            decays = name.endswith("weight") and "bn" not in name
            assert group["weight_decay"] == (0.3 if decays else 0.0), name
            assert group["lr"] == pytest.approx(6e-4 if name.startswith("classifier.") else 3e-4), name
    assert seen == set(names.values())


@pytest.mark.parametrize(("name", "exempts"), [("adam", False), ("sgd", False), ("adamw", True), ("lamb", True)])
def test_what_a_network_exempts_does_not_decay_with_later_optimizers(name, exempts):
    module = timm.create_model("test_vit", num_classes=3)
    optimizer = build_optimizer(small_recipe(optimizer={"name": name, "weight_decay": 0.3}), module)
    decays = {id(each): group["weight_decay"] for group in optimizer.param_groups for each in group["params"]}
    assert decays[id(module.pos_embed)] == decays[id(module.cls_token)] == (0.0 if exempts else 0.3)
    assert decays[id(module.head.weight)] == 0.3


def test_exemptions_may_be_patterns():
    module = timm.create_model("xcit_nano_12_p16_224", num_classes=3, depth=1)
    optimizer = build_optimizer(small_recipe(optimizer={"name": "adamw", "weight_decay": 0.3}), module)
    decays = {id(each): group["weight_decay"] for group in optimizer.param_groups for each in group["params"]}
    assert decays[id(module.pos_embed.token_projection.weight)] == 0.0
    assert decays[id(module.head.weight)] == 0.3


def test_the_heads_of_a_distilled_transformer_have_their_rate():
    module = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3, depth=1)
    groups = build_optimizer(small_recipe(optimizer={"head_lr_factor": 10.0}), module).param_groups
    fast = sum(len(group["params"]) for group in groups if group["lr"] == pytest.approx(3e-3))
    assert fast == 4
    without = timm.create_model("test_convnext", num_classes=0)
    with pytest.raises(RecipeError, match=r"no classifier for optimizer\.head_lr_factor"):
        build_optimizer(small_recipe(optimizer={"head_lr_factor": 10.0}), without)


@pytest.mark.parametrize("kind", ["semantic_softmax", "single_label", "multi_label"])
def test_the_loss_is_that_of_the_recipe(kind):
    recipe = small_recipe(loss={"kind": kind, "label_smoothing": 0.37 if kind != "multi_label" else 0.0})
    logits, targets, theirs = torch.randn(4, 6), torch.tensor([0, 5, 3, 1]), torch.randn(4, 6)
    made = {"semantic_softmax": SemanticSoftmaxLoss, "single_label": SingleLabelLoss, "multi_label": MultiLabelLoss}
    smoothing = {} if kind == "multi_label" else {"label_smoothing": 0.37}
    alone = made[kind](TREE, order="level", **smoothing)(logits, targets)
    torch.testing.assert_close(Criterion(recipe, TREE)(logits, targets), alone)
    if kind == "multi_label":
        return
    recipe.loss.distillation_weight = 3.0
    distilled = SemanticDistillationLoss(TREE, "level", kind == "semantic_softmax")(logits, theirs)
    torch.testing.assert_close(Criterion(recipe, TREE)(logits, targets, theirs), alone + 3 / 4 * distilled)
    if kind == "single_label":
        plain = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.37)
        torch.testing.assert_close(Criterion(recipe, None)(logits, targets), plain)


@pytest.mark.parametrize("tree", [TREE, None])
@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_adjusted_logits_are_those_plus_the_logarithm_of_shares(tree, factor):
    recipe = small_recipe(loss={"kind": "single_label", "logit_adjustment": factor})
    images, targets = np.array([8, 1, 0, 4, 2, 1]), torch.tensor([0, 5, 3, 1])  # the third class has none
    logits = torch.randn(4, 6)  # in the label space's order
    columns = Levels(TREE, "level").columns if tree is not None else slice(None)
    shares = torch.tensor([8, 1, 1, 4, 2, 1]) / 16
    expected = torch.nn.functional.cross_entropy(logits + factor * shares.log(), targets, label_smoothing=0.2)
    torch.testing.assert_close(Criterion(recipe, tree, images)(logits[:, columns], targets), expected)


@pytest.mark.parametrize("kind", ["semantic_softmax", "single_label", "multi_label"])
@pytest.mark.parametrize("tree", [TREE, None])
def test_the_loss_of_mixed_images_is_of_both_targets_and_one_distillation(kind, tree):
    recipe = small_recipe(loss={"kind": kind, "label_smoothing": 0.0})
    logits, theirs, targets = torch.randn(4, 6), torch.randn(4, 6), torch.tensor([0, 1, 2, 5])
    loss = Criterion(recipe, tree)
    mixed = loss(logits, targets, share=0.3)
    torch.testing.assert_close(mixed, 0.3 * loss(logits, targets) + 0.7 * loss(logits, targets.flip(0)))
    if tree is None or kind == "multi_label":
        return
    recipe.loss.distillation_weight = 3.0
    taught = Criterion(recipe, tree)
    distilled = taught(logits, targets, theirs) - loss(logits, targets)
    assert distilled > 0.01
    torch.testing.assert_close(taught(logits, targets, theirs, 0.3), mixed + distilled)


@pytest.mark.parametrize("name", ["adam", "adamw", "lamb", "sgd"])
def test_optimizers_have_what_the_recipe_says(name):
    fields = {"momentum": 0.7} if name == "sgd" else {"betas": (0.7, 0.9)}
    recipe = small_recipe(optimizer={"name": name, **fields})
    optimizer = build_optimizer(recipe, timm.create_model("test_convnext", num_classes=3))
    for group in optimizer.param_groups:
        assert {field: group[field] for field in fields} == fields
        assert group.get("nesterov", False) == (name == "sgd")
    decoupled = {"adam": False, "adamw": True, "lamb": None, "sgd": None}[name]
    assert optimizer.param_groups[0].get("decoupled_weight_decay") == decoupled


def test_one_cycle_rises_and_falls_as_asked_for_and_leaves_betas_alone():
    found = rates(100, schedule={"warmup": 0.2, "start_divisor": 5.0, "end_divisor": 40.0}, optimizer={"lr": 1.0})
    assert found.index(max(found)) == 19  # of 100, the twentieth
    assert (found[0], found[-1]) == pytest.approx((0.2, 0.2 / 40), rel=1e-6)
    optimizer = build_optimizer(small_recipe(), timm.create_model("test_convnext", num_classes=3))
    schedule = build_schedule(small_recipe(), optimizer, 20)
    for _ in range(3):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
