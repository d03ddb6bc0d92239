import json
import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import wn21k_zoo
from wn21k_zoo import publish
from wn21k_zoo.errors import DataError, InvalidArgumentError, RecipeError, RunError
from wn21k_zoo.training.data import Loader, Squash, open_folder
from wn21k_zoo.training.distributed import World
from wn21k_zoo.training.engine import train
from wn21k_zoo.training.evaluate import evaluate
from wn21k_zoo.training.export import export_run, load_run
from wn21k_zoo.training.metrics import SemanticAccuracy
from wn21k_zoo.training.plots import plot_reliability, plot_runs
from wn21k_zoo.training.recipe import override
from wn21k_zoo.tree import SemanticTree

from .runs import WNIDS, make_folder, small_recipe

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run with a moving average, on classes that are synsets."""
    recipe = small_recipe(optimizer={"lr": 3e-3}, run={"ema_decay": 0.5}, schedule={"epochs": 4})
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(recipe, data, folder, ALONE, workers=0)
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    return export_run(run, tmp_path_factory.mktemp("exported") / "model")


def test_an_exported_run_predicts_at_once(exported, data):
    prediction = wn21k_zoo.predict(data / WNIDS[5] / "3.jpg", model=exported)
    assert {output.wnid for output in prediction.top_k} <= set(WNIDS)
    assert prediction.levels[0].labels[0].wnid in WNIDS


def test_it_speaks_the_published_order_again(run, exported, data):
    trained = load_run(run)
    assert trained.class_names == tuple(sorted(WNIDS))
    model = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    pixels = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), trained.module(pixels))
    config = json.loads((exported / "config.json").read_text())
    assert config["num_classes"] == len(WNIDS)
    assert (exported / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_what_was_measured_in_training_is_measured_again(run, exported, data):
    best = load_run(run).figures
    for subject in (run, exported):
        again = evaluate(subject, data, workers=0, batch_size=4)
        for name in ("semantic_top1", "top1", "top5", "mean_lca_error", "hierarchical_recall", "levels"):
            assert again[name] == best[name], name
        assert again["images"] == 6


def test_the_draft_is_a_record(exported):
    scope = {}
    exec((exported / "record.py").read_text(), scope)  # noqa: S102
    record = scope["checkpoint"]
    assert (record.name, record.architecture, record.head) == ("small", "test_convnext", "semantic_softmax")
    assert record.input_size == (3, 32, 32)
    assert {metric.name for metric in record.metrics} == {"semantic top-1", "top-1"}


def test_it_can_be_published(exported):
    assert {path.name for path in publish.plan_upload(exported)} == {
        "README.md", "config.json", "model.safetensors", "wn21k_labels.json",
    }  # fmt: skip


def test_export_leaves_what_is_not_its_own(run, exported, tmp_path):
    with pytest.raises(InvalidArgumentError, match="is not empty"):
        export_run(run, exported)
    assert export_run(run, exported, force=True) == exported
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(InvalidArgumentError, match=r"holds notes\.txt"):
        export_run(run, tmp_path / "mine", force=True)
    with pytest.raises(RunError, match="holds no run"):
        export_run(tmp_path, tmp_path / "out")
    with pytest.raises(InvalidArgumentError, match="best or last"):
        export_run(run, tmp_path / "out", which="first")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("same", [True, False])
def test_a_run_begins_with_an_exported_one_and_keeps_its_head_where_the_classes_are_the_same(
    exported, data, tmp_path, same
):
    recipe = small_recipe(model={"start": str(exported)}, optimizer={"lr": 1e-12}, schedule={"max_steps": 1})
    if not same:
        data = make_folder(tmp_path / "images", names=WNIDS[:5], images=12)
    train(recipe, data, tmp_path / "run", ALONE, workers=0)
    before, after = timm.create_model(f"local-dir:{exported}", pretrained=True), load_run(tmp_path / "run").module
    torch.testing.assert_close(after.stem[0].weight, before.stem[0].weight)
    assert torch.allclose(after.head.fc.weight, before.head.fc.weight[: len(after.head.fc.weight)], atol=1e-6) == same


def test_a_teacher_is_an_exported_run_with_the_same_classes(exported, data, tmp_path):
    recipe = small_recipe(loss={"teacher": str(exported), "distillation_weight": 1.0}, schedule={"max_steps": 2})
    train(recipe, data, tmp_path / "run", ALONE, workers=0)
    other = make_folder(tmp_path / "images", names=WNIDS[:5], images=12)
    with pytest.raises(RecipeError, match="speaks other classes than"):
        train(recipe, other, tmp_path / "other", ALONE, workers=0)


def test_the_folder_of_a_run_is_no_model_yet(run, data, tmp_path):
    for sections in ({"loss": {"teacher": str(run), "distillation_weight": 1.0}}, {"model": {"start": str(run)}}):
        with pytest.raises(RecipeError, match="is the folder of a run; `wn21k train export"):
            train(small_recipe(**sections), data, tmp_path / "run", ALONE, workers=0)


def test_classes_of_ones_own(tmp_path):
    data = make_folder(tmp_path / "images", names=("cats", "dogs"), images=20)
    recipe = small_recipe(loss={"kind": "single_label"}, data={"crop_pct": 0.875})
    train(recipe, data, tmp_path / "run", ALONE, workers=0)
    folder = export_run(tmp_path / "run", tmp_path / "model")
    assert json.loads((folder / "config.json").read_text())["label_names"] == ["cats", "dogs"]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert model.num_classes == 2
    figures = evaluate(tmp_path / "run", data, workers=0)
    assert figures["images"] == 4
    assert "semantic_top1" not in figures
    other = make_folder(tmp_path / "other", names=("cats", "mice"))
    with pytest.raises(DataError, match="other class folders"):
        evaluate(tmp_path / "run", other, workers=0)


def test_a_published_architecture_is_evaluated_as_it_wants(exported, data, tmp_path):
    with pytest.raises(DataError, match="which is no class of"):
        evaluate(exported, make_folder(tmp_path, names=("n00000001", "n00000002")), workers=0)
    everything = evaluate(exported, data, split="all", workers=0)
    assert everything["images"] == 60
    with pytest.raises(DataError, match="has the splits"):
        evaluate(exported, data, split="valid", workers=0)
    for arguments in ({"batch_size": 0}, {"workers": -1}, {"precision": "int8"}):
        with pytest.raises(InvalidArgumentError):
            evaluate(exported, data, **arguments)


def test_a_network_for_one_size_of_images(data, tmp_path):
    recipe = override(small_recipe("test_vit"), ['model.arguments={"img_size": 32}'])
    train(recipe, data, tmp_path / "run", ALONE, workers=0)
    folder = export_run(tmp_path / "run", tmp_path / "model", dtype="bfloat16")
    assert wn21k_zoo.predict(np.zeros((40, 40, 3), np.uint8), model=folder).top_k


def test_arguments_of_the_network_go_with_it(data, tmp_path):
    recipe = override(small_recipe("test_resnet"), ['model.arguments={"act_layer": "silu"}', "schedule.max_steps=1"])
    train(recipe, data, tmp_path / "run", ALONE, workers=0)
    folder = export_run(tmp_path / "run", tmp_path / "model")
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = load_run(tmp_path / "run").module(images)
        torch.testing.assert_close(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images), expected)
    recipe = small_recipe("test_resnet", model={"start": str(folder)}, schedule={"max_steps": 1})
    train(recipe, data, tmp_path / "again", ALONE, workers=0)
    assert load_run(tmp_path / "again").recipe.model.arguments == {"act_layer": "silu"}


def test_a_teacher_has_a_head_of_the_same_kind(exported, data, tmp_path):
    single = {"kind": "single_label", "teacher": str(exported), "distillation_weight": 1.0}
    with pytest.raises(RecipeError, match=r"is a semantic_softmax, but loss\.kind single_label trains a softmax"):
        train(small_recipe(loss=single), data, tmp_path / "run", ALONE, workers=0)
    train(small_recipe(loss={"kind": "single_label"}), data, tmp_path / "teacher", ALONE, workers=0)
    single["teacher"] = str(export_run(tmp_path / "teacher", tmp_path / "model"))
    train(small_recipe(loss=single, schedule={"max_steps": 2}), data, tmp_path / "run", ALONE, workers=0)


def test_plots_are_pictures(run, data, tmp_path):
    assert plot_runs([run, run], tmp_path / "runs.png") == tmp_path / "runs.png"
    figures = evaluate(run, data, workers=0)
    assert sum(row["images"] for row in figures["reliability"]) == figures["images"]
    assert math.isfinite(figures["calibration_error"])
    plot_reliability(figures, tmp_path / "reliability.png")
    for name in ("runs.png", "reliability.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 400
    with pytest.raises(RunError, match="holds no run"):
        plot_runs([tmp_path], tmp_path / "x.png")
    with pytest.raises(Exception, match="cannot be written"):
        plot_reliability(figures, tmp_path / "no" / "x.png")


def test_raw_semantic_top1_is_the_published_protocol_whatever_the_head(run, data, tmp_path):
    figures = evaluate(run, data, workers=0)
    assert figures["raw_semantic_top1"] == figures["semantic_top1"]  # a softmax within a level keeps its order
    recipe = small_recipe(loss={"kind": "single_label"}, schedule={"max_steps": 2})
    train(recipe, data, tmp_path / "run", ALONE, workers=0)
    figures = evaluate(tmp_path / "run", data, workers=0)
    trained = load_run(tmp_path / "run")
    metric = SemanticAccuracy(SemanticTree.from_label_space(trained.space))
    for batch in Loader(
        open_folder(data, "validation"), batch_size=6, training=False, augmentation=Squash(32), workers=0
    ):
        with torch.no_grad():
            metric.update(trained.module(batch.images), batch.targets)
    assert figures["raw_semantic_top1"] == metric.compute()["semantic_top1"]
