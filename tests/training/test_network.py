import pytest
import timm
import torch

from wn21k_zoo import LabelSpace, create_model
from wn21k_zoo.errors import RecipeError
from wn21k_zoo.training import presets
from wn21k_zoo.training.network import (
    average_of,
    build_network,
    build_optimizer,
    build_schedule,
    synchronised,
    try_size,
)

from .runs import small_recipe


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


@pytest.mark.parametrize("architecture", ["mobilenetv3_small_050", "tresnet_m", "resnet10t"])
def test_batch_statistics_over_ranks_change_nothing_else(architecture):
    torch.manual_seed(0)
    module = timm.create_model(architecture, num_classes=5).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = module(images)
        torch.testing.assert_close(synchronised(module).eval()(images), before)
    assert any(isinstance(layer, torch.nn.SyncBatchNorm) for layer in module.modules())


def test_an_average_has_averaged_batch_statistics():
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    average = average_of(module, 0.5)
    average.update_parameters(module)  # the first is a copy
    before = module[1].running_mean.clone()
    module(torch.rand(2, 3, 4, 4))
    average.update_parameters(module)
    expected = (before + module[1].running_mean) / 2
    torch.testing.assert_close(average.module[1].running_mean, expected)
    assert average.module[1].num_batches_tracked.dtype is torch.int64


def test_images_of_a_size_that_a_network_does_not_take():
    cpu = torch.device("cpu")
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=1)
    with pytest.raises(RecipeError, match=r'The network does not take images of 32 pixels: .*"img_size": 32'):
        try_size(vit, 32, cpu, "The network")
    assert vit.training
    try_size(vit, 224, cpu, "The network")


def test_lamb_clips_no_more_than_is_asked_for():
    recipe = small_recipe(optimizer={"name": "lamb"})
    optimizer = build_optimizer(recipe, timm.create_model("test_convnext", num_classes=3))
    assert optimizer.defaults["max_grad_norm"] is None


def test_a_new_head_begins_with_small_logits_and_a_kept_one_as_it_was():
    recipe = presets.finetune("efficientnet_lite0.embedded_in1k")
    space = LabelSpace.load("imagenet1k")
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        new = build_network(recipe, 3, None, None).eval()(images)
        kept = build_network(recipe, len(space), space, None).eval()(images)
        expected = create_model("efficientnet_lite0.embedded_in1k").eval()(images)
    assert new.std() < 0.5
    torch.testing.assert_close(kept, expected)


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
