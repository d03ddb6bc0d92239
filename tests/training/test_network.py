import json
import re

import pytest
import timm
import torch
from timm.layers import convert_sync_batchnorm

from wn21k_zoo import ClassNames, LabelSpace, create_model, save_model
from wn21k_zoo.errors import RecipeError, UnknownModelError, UnresolvedLabelSpaceError
from wn21k_zoo.training import presets
from wn21k_zoo.training.export import export_run, load_run
from wn21k_zoo.training.heads import freeze_backbone, reorder_head
from wn21k_zoo.training.learner import Learner
from wn21k_zoo.training.network import Normalized, _moved, build_network, try_size
from wn21k_zoo.training.splits import open_splits
from wn21k_zoo.training.weights import resolved

from .checks import ALONE, run
from .runs import WNIDS, make_folder, small_recipe


@pytest.mark.parametrize("architecture", ["mobilenetv3_small_050", "tresnet_m", "resnet10t"])
def test_batch_statistics_over_ranks_change_nothing_else(architecture):
    torch.manual_seed(0)
    module = timm.create_model(architecture, num_classes=5).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = module(images)
        torch.testing.assert_close(convert_sync_batchnorm(module).eval()(images), before)
    assert any(isinstance(layer, torch.nn.SyncBatchNorm) for layer in module.modules())


def test_images_of_a_size_that_a_network_does_not_take():
    cpu = torch.device("cpu")
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=1)
    with pytest.raises(
        RecipeError, match=r"The network does not take images of 32 pixels: .*set .*model\.arguments\.img_size=32 where"
    ):
        try_size(vit, 32, cpu, "The network", 3)
    assert vit.training
    try_size(vit, 224, cpu, "The network", 3)


def test_weights_of_another_architecture_are_taken_if_none_are_missing(caplog):
    vit, small = "vit_tiny_patch16_224", {"depth": 1, "embed_dim": 12}
    begun = timm.create_model(vit, num_classes=3, **small)
    moved = _moved(begun, "deit", "deit_tiny", vit, 3, {**small, "qkv_bias": False})
    assert moved.blocks[0].attn.qkv.bias is None
    for name, value in moved.state_dict().items():
        assert torch.equal(value, begun.state_dict()[name]), name
    assert "a vit_tiny_patch16_224 takes its weights but for 1 biases, such as blocks.0.attn.qkv.bias" in caplog.text
    with pytest.raises(RecipeError, match=r"model\.start plain is a plain, not a vit_tiny_patch16_224"):
        _moved(moved, "plain", "plain", vit, 3, small)
    with pytest.raises(RecipeError, match=r"model\.start deep is a deep, not a vit_tiny_patch16_224"):
        _moved(timm.create_model(vit, num_classes=3, **small | {"depth": 2}), "deep", "deep", vit, 3, small)


@pytest.mark.parametrize(
    ("architecture", "teacher", "message"),
    [
        ("resnet18", None, r"model\.start mobilenetv3_large_100\.ra_in1k is a mobilenetv3_large_100, not a resnet18"),
        ("mobilenetv3_large_100", "resnet50.mill_in21k", r"Did you mean resnet50\.miil_in21k"),
    ],
)
def test_wrong_names_are_found_before_weights_are_fetched(data, tmp_path, monkeypatch, architecture, teacher, message):
    monkeypatch.setattr("wn21k_zoo.building.create_model", None)
    recipe = small_recipe(architecture, model={"start": "mobilenetv3_large_100.ra_in1k"})
    recipe.loss.teacher, recipe.loss.distillation_weight = teacher, float(teacher is not None)
    with pytest.raises((RecipeError, UnknownModelError), match=message):
        run(recipe, data, tmp_path)


@pytest.mark.slow
def test_a_trial_finds_weights_of_another_architecture(caplog):
    recipe = presets.in21k("resnet50")
    recipe.model.start = "efficientnet_lite0.embedded_in1k"
    with pytest.raises(
        RecipeError, match=rf"model\.start {recipe.model.start} is a tf_efficientnet_lite0, not a resnet50"
    ):
        build_network(recipe.debug(), WNIDS, None)
    recipe.model.start = "vit_small_patch16_224.dino"  # without classes
    for same in (recipe, recipe.debug()):
        with pytest.raises(UnresolvedLabelSpaceError):
            build_network(same, WNIDS, None)
    build_network(presets.in21k("vit_base_patch16_224_miil").debug(), WNIDS, None)
    assert "a vit_base_patch16_224_miil takes its weights but for 12 biases" in caplog.text


CUBLAS = (
    "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` or "
    "`at::Context::setDeterministicAlgorithms(true)`, but this operation is not deterministic because it uses CuBLAS "
    "and you have CUDA >= 10.2. To enable deterministic behavior in this case, you must set an environment variable "
    "before running your PyTorch application: CUBLAS_WORKSPACE_CONFIG=:4096:8 or CUBLAS_WORKSPACE_CONFIG=:16:8."
)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device"), "no kernel"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"), "NOT_INITIALIZED"),
        (
            RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
            "memory of cpu is",
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "memory of cpu is",
        ),
        (
            RuntimeError("reflection_pad2d does not have a deterministic implementation, but"),
            "^reflection_pad2d, which",
        ),
        (RuntimeError(CUBLAS), "^This process used the GPU before CUBLAS_WORKSPACE_CONFIG was set"),
    ],
)
def test_a_gpu_that_fails_is_not_blamed_on_the_size(data, monkeypatch, error, message):
    def failing(self, images):
        raise error

    class Failing(torch.nn.Module):
        forward = failing

    recipe = small_recipe()
    splits = open_splits(recipe, data)
    with pytest.raises(type(error), match=re.escape(str(error))):
        try_size(Failing(), 32, torch.device("cpu"), "The network", 3)
    monkeypatch.setattr(Normalized, "forward", failing)
    with pytest.raises(Exception, match=message):
        Learner(recipe, splits, ALONE, 10, False)


def test_a_new_head_begins_with_small_logits_and_a_kept_one_as_it_was():
    recipe = presets.finetune("efficientnet_lite0.embedded_in1k")
    space = LabelSpace.load("imagenet1k")
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        new = build_network(recipe, ("a", "b", "c"), None).eval()(images)
        kept = build_network(recipe, space.wnids, None).eval()(images)
        expected = create_model("efficientnet_lite0.embedded_in1k").eval()(images)
    assert new.std() < 0.5
    torch.testing.assert_close(kept, expected)


@pytest.mark.parametrize("architecture", ["test_convnext", "dla46_c", "deit_tiny_distilled_patch16_224"])
def test_a_head_goes_into_another_order_and_back(architecture):
    module = timm.create_model(architecture, num_classes=5).eval()
    size = module.default_cfg["input_size"][1]
    images, index = torch.rand(2, 3, size, size), torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        before = module(images)
        reorder_head(module, index)
        torch.testing.assert_close(module(images), before[:, index])
        reorder_head(module, index.argsort())
        assert torch.equal(module(images), before)


def test_a_head_that_cannot_have_another_order_is_refused_before_anything_starts(tmp_path):
    folder = make_folder(tmp_path / "data")
    with pytest.raises(RecipeError, match="The classifier of LevitDistilled is not a linear layer with 6 outputs"):
        run(small_recipe("levit_128s", data={"size": 224}), folder, tmp_path / "run")
    assert not [path for path in (tmp_path / "run").iterdir() if path.name != ".lock"]


def test_a_start_of_the_same_classes_of_ones_own_keeps_its_head(tmp_path):
    names = ("cats", "dogs", "owls", "bats", "emus", "newts")
    folder = make_folder(tmp_path / "data", names=names)
    recipe = small_recipe(loss={"kind": "single_label"}, schedule={"max_steps": 2})
    run(recipe, folder, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "model")
    recipe.model.start = str(tmp_path / "model")
    trained = load_run(tmp_path / "run").module.state_dict()
    started = build_network(recipe, sorted(names), None).state_dict()
    assert all(torch.equal(started[key], value) for key, value in trained.items())
    other = build_network(recipe, (*sorted(names)[1:], "yaks"), None).state_dict()
    assert [key for key, value in trained.items() if not torch.equal(other[key], value)] == [
        "head.fc.weight", "head.fc.bias",
    ]  # fmt: skip
    turned = build_network(recipe, sorted(names, reverse=True), None).state_dict()
    assert torch.equal(turned["head.fc.weight"], trained["head.fc.weight"].flip(0))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["pretrained_cfg"]["label_names"] = config.pop("label_names")  # timm reads them from there, too
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert torch.equal(
        build_network(recipe, sorted(names), None).state_dict()["head.fc.weight"], trained["head.fc.weight"]
    )


def test_a_start_whose_classifier_has_no_order_gets_a_new_one(tmp_path):
    network = timm.create_model("levit_128s", num_classes=3)
    save_model(network, tmp_path / "start", label_space=ClassNames(["c", "b", "a"]))
    recipe = small_recipe("levit_128s", model={"start": str(tmp_path / "start")}, loss={"kind": "single_label"})
    started = build_network(recipe, ["a", "b", "c"], None).state_dict()
    assert torch.equal(started["stem.conv1.linear.weight"], network.state_dict()["stem.conv1.linear.weight"])
    assert not torch.equal(started["head.linear.weight"], network.state_dict()["head.linear.weight"])


@pytest.mark.parametrize(("mean", "std"), [((0.1, 0.2, 0.3), (1.0, 1.0, 1.0)), ((0.0, 0.0, 0.0), (0.5, 0.2, 0.3))])
def test_pixels_are_normalised(mean, std):
    images = torch.rand(2, 3, 4, 4)
    expected = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(Normalized(torch.nn.Identity(), mean, std)(images), expected)
    assert Normalized(torch.nn.Identity(), (0.0,) * 3, (1.0,) * 3)(images) is images


def test_arguments_of_the_start_are_taken_unless_the_recipe_has_others(tmp_path):
    config = {
        "architecture": "test_vit",
        "num_classes": 3,
        "model_args": {"img_size": 32, "depth": 1, "num_classes": 3},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    recipe = small_recipe("test_vit", model={"start": str(tmp_path), "arguments": {"depth": 2}})
    assert resolved(recipe).model.arguments == {"img_size": 32, "depth": 2}


def test_dropout_of_a_run_is_not_that_of_who_starts_from_it(tmp_path):
    arguments = {"img_size": 32, "drop_rate": 0.5, "drop_path_rate": 0.25}
    begun = small_recipe("test_vit", model={"arguments": arguments}, schedule={"max_steps": 1})
    run(begun, make_folder(tmp_path / "images", images=12), tmp_path / "begun")
    start = export_run(tmp_path / "begun", tmp_path / "model")
    assert json.loads((start / "config.json").read_text())["model_args"] == {"img_size": 32}
    of_others = json.loads((start / "config.json").read_text()) | {"model_args": arguments}
    (start / "config.json").write_text(json.dumps(of_others))
    recipe = small_recipe("test_vit", model={"start": str(start), "arguments": {"drop_rate": 0.1}})
    assert resolved(recipe).model.arguments == {"img_size": 32, "drop_rate": 0.1}


@pytest.mark.parametrize("precise", [{}, {"batch_per_device": 4}])
def test_a_frozen_backbone_stays_as_it_began_and_the_classifier_does_not(tmp_path, precise):
    data = make_folder(tmp_path / "images", images=12)
    begun = small_recipe("test_efficientnet", schedule={"max_steps": 1})
    run(begun, data, tmp_path / "begun")
    start = str(export_run(tmp_path / "begun", tmp_path / "model"))
    recipe = small_recipe(
        "test_efficientnet",
        model={"start": start, "freeze_backbone": True, "arguments": {"drop_path_rate": 0.5}},
        data={"augmentation": "none", **precise},
        optimizer={"lr": 1e-1},
        schedule={"epochs": 4},
    )
    run(recipe, data, tmp_path / "run")
    before, after = (load_run(tmp_path / each, "last").module.state_dict() for each in ("begun", "run"))
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_what_cannot_be_frozen_is_refused():
    with pytest.raises(RecipeError, match="would keep random weights"):
        small_recipe(model={"freeze_backbone": True}).check()
    with pytest.raises(RecipeError, match="no classifier to train alone"):
        freeze_backbone(timm.create_model("test_convnext", num_classes=0))


def test_a_recipe_is_left_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    recipe = small_recipe(model={"start": "model"}, loss={"teacher": "model"})
    before = recipe.model_copy(deep=True)
    assert resolved(recipe, otherwise={}) != before
    assert recipe == before
