import csv
import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

import wn21k_zoo
from wn21k_zoo import LabelSpace, create_model, create_transform, publish
from wn21k_zoo.cli.app import app
from wn21k_zoo.errors import (
    DataError,
    InvalidArgumentError,
    ModelError,
    RecipeError,
    RunError,
)
from wn21k_zoo.models import load_model
from wn21k_zoo.training import presets
from wn21k_zoo.training.data import Loader, Squash, open_folder
from wn21k_zoo.training.distributed import World
from wn21k_zoo.training.engine import train
from wn21k_zoo.training.evaluate import evaluate
from wn21k_zoo.training.export import Trained, export_run, load_run
from wn21k_zoo.training.levels import Levels
from wn21k_zoo.training.metrics import SemanticAccuracy
from wn21k_zoo.training.plots import plot_reliability, plot_runs
from wn21k_zoo.training.prepare import PrepareOptions, prepare
from wn21k_zoo.training.recipe_files import override
from wn21k_zoo.training.state import RunFolder, names_of, read_checkpoint
from wn21k_zoo.tree import SemanticTree

from .runs import WNIDS, make_folder, small_recipe

ALONE = World(0, 1, torch.device("cpu"))


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


def test_the_names_of_synsets_may_be_taken_as_they_are(exported, data):
    found = wn21k_zoo.predict(data / WNIDS[5] / "3.jpg", model=exported, label_space="own")
    assert (found.label_space, found.head) == ("own", "softmax")  # whatever loss it was trained with
    assert found.top_k[0].name in LabelSpace("x", sorted(WNIDS)).unique_names


def test_it_speaks_the_published_order_again(run, exported):
    trained = load_run(run)
    assert trained.class_names == tuple(sorted(WNIDS))
    model = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    pixels = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), trained.module(pixels))
    config = json.loads((exported / "config.json").read_text())
    assert config["num_classes"] == len(WNIDS)
    if os.name != "nt":
        assert (exported / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_what_was_measured_in_training_is_measured_again(run, exported, data):
    best = load_run(run).figures
    for subject in (run, exported):
        again = evaluate(subject, data, split="validation", workers=0, batch_size=4)
        for name in ("semantic_top1", "top1", "top5", "mean_lca_error", "hierarchical_recall", "levels"):
            assert again[name] == best[name], name
        assert again["images"] == 6


def test_a_model_is_not_judged_by_the_images_that_it_has_seen(run, exported, data, tmp_path):
    grown = shutil.copytree(data, tmp_path / "grown")
    shutil.copy(next((grown / WNIDS[0]).iterdir()), grown / WNIDS[0] / "new.jpg")
    others = shutil.copytree(data, tmp_path / "others")
    for path in others.glob("*/*.jpg"):
        path.rename(path.with_stem(f"other{path.stem}"))
    for model in (run, exported):
        assert evaluate(model, data, workers=0)["split"] == "validation"
        assert evaluate(model, grown, workers=0)["split"] == "validation"
        assert (found := evaluate(model, others, workers=0))["split"] == "all"
        assert found["images"] == 60


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


def test_its_card_says_what_one_softmax_is_worth(exported):
    (line,) = (line for line in (exported / "README.md").read_text().splitlines() if line.startswith("pipeline("))
    assert line.endswith("# with one softmax over all outputs, which this head is not made for")


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


def test_a_teacher_is_an_exported_run_with_the_same_classes_or_others(exported, data, tmp_path, capsys):
    recipe = small_recipe(loss={"teacher": str(exported), "distillation_weight": 1.0}, schedule={"max_steps": 2})
    train(recipe, data, tmp_path / "run", ALONE, workers=0)
    assert "the teacher" not in capsys.readouterr().err
    other = make_folder(tmp_path / "images", names=WNIDS[:5], images=12)
    train(recipe, other, tmp_path / "other", ALONE, workers=0)
    assert re.search("is a semantic_softmax over .*; it knows 5 of the 5 classes", capsys.readouterr().err)


def test_another_teacher_in_the_same_place_is_noticed(run, exported, data, tmp_path):
    teacher = shutil.copytree(exported, tmp_path / "teacher")
    recipe = small_recipe(loss={"teacher": str(teacher), "distillation_weight": 1.0}, schedule={"max_steps": 2})
    for _ in range(2):
        train(recipe, data, tmp_path / "run", ALONE, workers=0)
    export_run(run, teacher, dtype="float16", force=True)
    with pytest.raises(RunError, match=r"teacher is not the same as when the run .* began; restore the former one"):
        train(recipe, data, tmp_path / "run", ALONE, workers=0)


def test_a_card_says_nothing_of_this_machine(exported, data, tmp_path):
    start = shutil.copytree(exported, tmp_path / "start")
    run = tmp_path / "my <b>run\n#1"
    train(small_recipe(model={"start": str(start)}, schedule={"max_steps": 1}), data, run, ALONE, workers=0)
    trained = load_run(run)
    trained.recipe.name = "resnet50.miil_in21k"  # the name of published weights, so the folder's name is used
    assert trained.checkpoint().name == "test_convnext.my-b-run-1"
    card = (export_run(run, tmp_path / "model") / "README.md").read_text()
    assert '"start": "start"' in card
    assert str(tmp_path) not in card


def test_the_folder_of_a_run_is_no_model_yet(run, data, tmp_path):
    for sections in ({"loss": {"teacher": str(run), "distillation_weight": 1.0}}, {"model": {"start": str(run)}}):
        with pytest.raises(RecipeError, match="is the folder of a run; `wn21k train export"):
            train(small_recipe(**sections), data, tmp_path / "run", ALONE, workers=0)


def test_classes_of_ones_own_by_a_network_of_ours(tmp_path):
    data = make_folder(tmp_path / "images", names=("cats", "dogs"))
    recipe = small_recipe("ofa_flops_595m_s", loss={"kind": "single_label"}, schedule={"max_steps": 1})
    train(recipe, data, tmp_path / "run", ALONE, workers=0)
    assert CliRunner().invoke(app, ["train", "export", str(tmp_path / "run"), str(tmp_path / "model")]).exit_code == 0
    card = (tmp_path / "model" / "README.md").read_text()
    found = {}
    for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        code = re.sub(r"^(\w+\.(\w+)\()", r"\2 = \1", code, flags=re.MULTILINE).replace(
            "FOLDER", str(tmp_path / "model")
        )
        exec(code.replace("photo.jpg", "sample:cat"), found)  # noqa: S102
    assert found["create_model"].num_classes == 2
    assert {output.name for output in found["predict"].top_k} == {"cats", "dogs"}
    assert create_model(tmp_path / "model", num_classes=3).num_classes == 3


def test_classes_of_ones_own(tmp_path):
    data = make_folder(tmp_path / "images", names=("cats", "dogs"), images=20)
    recipe = small_recipe(loss={"kind": "single_label"}, data={"crop_pct": 0.875})
    train(recipe, data, tmp_path / "run", ALONE, workers=0)
    folder = export_run(tmp_path / "run", tmp_path / "model")
    assert json.loads((folder / "config.json").read_text())["label_names"] == ["cats", "dogs"]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert model.num_classes == 2
    shown = json.loads(CliRunner().invoke(app, ["info", str(folder)]).stdout)
    assert (shown["architecture"], shown["first_classes"], shown["crop_pct"]) == ("test_convnext", "cats; dogs", 0.875)
    assert (shown["label_space"], shown["head"]) == ("own", "softmax")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "label_names": ["cats", "n00000001"]}))  # no synset
    found = wn21k_zoo.predict(torch.rand(3, 32, 32), model=folder)
    assert {each.name for each in found.top_k} == {"cats", "n00000001"}
    assert json.loads(CliRunner().invoke(app, ["info", str(folder)]).stdout)["label_space"] == "own"
    figures = evaluate(tmp_path / "run", data, workers=0)
    assert (figures["images"], figures["label_space"]) == (4, "own")
    assert "semantic_top1" not in figures
    other = make_folder(tmp_path / "other", names=("cats", "mice"))
    with pytest.raises(DataError, match="has a folder mice, which is not a class of small"):
        evaluate(tmp_path / "run", other, workers=0)
    (tmp_path / "empty").mkdir()
    for place, message in ((tmp_path / "nothing", "does not exist"), (tmp_path / "empty", "give a folder of class")):
        with pytest.raises(DataError, match=message):
            evaluate(tmp_path / "run", place, workers=0)


@pytest.mark.slow
def test_some_of_the_classes_of_ones_own_can_be_evaluated(tmp_path):
    data = make_folder(tmp_path / "images", names=("ants", "cats", "dogs"), images=20)
    recipe = small_recipe(loss={"kind": "single_label"}, optimizer={"lr": 3e-3}, schedule={"epochs": 6})
    train(recipe, data, tmp_path / "run", ALONE, workers=0)
    every = evaluate(tmp_path / "run", data, split="all", workers=0)
    assert (every["images"], every["top1"]) == (60, 100)
    assert evaluate(export_run(tmp_path / "run", tmp_path / "model"), data, workers=0)["split"] == "validation"
    shutil.rmtree(data / "cats")
    some = evaluate(tmp_path / "run", data, split="all", workers=0)
    assert (some["images"], some["classes"], some["classes_with_images"], some["top1"]) == (40, 3, 2, 100)


def test_a_published_architecture_is_evaluated_as_it_wants(exported, data, tmp_path):
    with pytest.raises(DataError, match="no folder is named after a class of"):
        evaluate(exported, make_folder(tmp_path / "x", names=("n00000001", "n00000002")), workers=0)
    with pytest.raises(DataError, match="has a folder cats, which is not a class of"):
        evaluate(exported, make_folder(tmp_path / "y", names=("cats", "dogs")), workers=0)
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


def test_either_kind_of_head_teaches_one_softmax(exported, data, tmp_path, capsys):
    single = {"kind": "single_label", "teacher": str(exported), "distillation_weight": 1.0}
    train(small_recipe(loss=single, schedule={"max_steps": 2}), data, tmp_path / "other", ALONE, workers=0)
    assert "is a semantic_softmax over custom; it knows 4 of the 6 classes" in capsys.readouterr().err  # the leaves
    train(small_recipe(loss={"kind": "single_label"}), data, tmp_path / "teacher", ALONE, workers=0)
    single["teacher"] = str(export_run(tmp_path / "teacher", tmp_path / "model"))
    train(small_recipe(loss=single, schedule={"max_steps": 2}), data, tmp_path / "run", ALONE, workers=0)


def test_a_checkpoint_teaches_as_its_export_does(run, exported, data, tmp_path):
    for name, teacher in (("export", exported), ("file", run / "checkpoints" / "best.pt")):
        recipe = small_recipe(loss={"teacher": str(teacher), "distillation_weight": 1.0}, schedule={"max_steps": 3})
        train(recipe, data, tmp_path / name, ALONE, workers=0)
    ours, theirs = (load_run(tmp_path / name).module.state_dict() for name in ("file", "export"))
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    for wrong, message in (
        (run / "checkpoints" / "none.pt", "There is no checkpoint"),
        (tmp_path / "x.pt", "holds no run"),
    ):
        recipe.loss.teacher = str(wrong)
        (tmp_path / "x.pt").write_text("")
        with pytest.raises(RunError, match=message):
            train(recipe, data, tmp_path / "other", ALONE, workers=0)


def test_an_exported_run_has_no_name_of_published_weights_and_its_own_preprocessing(data, tmp_path):
    recipe = presets.in21k("mobilenetv3_large_100").debug()
    recipe.name = "mobilenetv3_large_100.miil_in21k"
    recipe.data.label_space, recipe.loss.teacher, recipe.loss.distillation_weight = None, None, 0.0
    train(recipe, data, tmp_path / "mine", ALONE, workers=0)
    folder = export_run(tmp_path / "mine", tmp_path / "model")
    loaded = load_model(folder)
    assert load_run(tmp_path / "mine").checkpoint().name == "mobilenetv3_large_100.mine"
    assert loaded.data_config["input_size"] == [3, 32, 32]
    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    assert not {"license", "origin_url", "paper_ids"} & set(config)
    with pytest.raises(InvalidArgumentError, match="is the name of published weights"):
        export_run(tmp_path / "mine", tmp_path / "other", name="mobilenetv3_large_100.miil_in21k")
    for name in ("", "../mine", "a b", "-x"):
        with pytest.raises(InvalidArgumentError, match="is not a name for a record"):
            export_run(tmp_path / "mine", tmp_path / "other", name=name)
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_record_is_evaluated_by_synset_and_with_its_own_preprocessing(tmp_path):
    # Loose images and shards of the same classes: goldfish, tabby and one that is not in ImageNet-1K.
    images = make_folder(tmp_path / "images", names=("n01443537", "n02123045"), images=8)
    name = "efficientnet_lite0.embedded_in1k"
    loose = evaluate(name, images, workers=0)
    assert (loose["split"], loose["images"], loose["classes"], loose["classes_with_images"]) == ("all", 16, 1000, 2)
    assert "semantic_top1" not in loose
    make_folder(tmp_path / "images2", names=("n01443537", "n02123045", "n00017222"), images=8)
    options = PrepareOptions(min_images=0, val_per_class=8, size=64, shard_size=20)
    prepare(tmp_path / "images2", tmp_path / "shards", options, workers=1)
    shards = evaluate(name, tmp_path / "shards", workers=0)
    assert (shards["split"], shards["images"], shards["leaf_images"]) == ("validation", 16, 16)
    # The same, done by hand.
    transform, module = create_transform(name), create_model(name).eval()
    space, right = LabelSpace.load("imagenet1k"), 0
    for wnid in ("n01443537", "n02123045"):
        for path in (images / wnid).iterdir():
            with torch.no_grad(), Image.open(path) as image:
                logits = module(transform(image.convert("RGB"))[None])[0]
            imaged = [space.index["n01443537"], space.index["n02123045"]]
            right += imaged[int(logits[imaged].argmax())] == space.index[wnid]
    assert loose["raw_top1"] == pytest.approx(100 * right / 16)


def test_what_is_loaded_is_the_average_of_the_checkpoint_that_is_asked_for(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    for path, value in ((folder.best, 1.0), (folder.steps()[0], 2.0)):
        checkpoint = read_checkpoint(path)
        path.unlink()  # both names may be links to one file
        for tensor in checkpoint["average"].values():
            tensor.fill_(value)
        torch.save(checkpoint, path)
    for which, value in (("best", 1.0), ("last", 2.0)):
        weights = load_run(tmp_path / "run", which).module.state_dict()
        assert all((tensor == value).all() for tensor in weights.values())


def test_the_last_checkpoint_of_a_run_is_evaluated_when_asked_for(run, exported, data):
    assert evaluate(run, data, workers=0, which="last")["images"] == 6
    with pytest.raises(InvalidArgumentError, match="is not a run and has no last checkpoint"):
        evaluate(exported, data, workers=0, which="last")
    with pytest.raises(InvalidArgumentError, match="leave out label_space"):
        evaluate(run, data, workers=0, label_space="fall11")


def test_all_images_of_a_divided_folder(run, data, tmp_path):
    for split in ("train", "val"):
        shutil.copytree(data, tmp_path / "divided" / split)
    assert evaluate(run, tmp_path / "divided", workers=0, split="all")["images"] == 120
    assert evaluate(run, tmp_path / "divided", workers=0)["images"] == 60


def test_classes_of_ones_own_are_evaluated_and_predicted(tmp_path):
    images = make_folder(tmp_path / "images", names=("gold fish", "käse", "b,c"))
    recipe = small_recipe(loss={"kind": "single_label"})
    train(recipe, images, tmp_path / "run", ALONE, workers=0)
    folder = export_run(tmp_path / "run", tmp_path / "model")
    ours, theirs = (
        evaluate(each, images, split="validation", workers=0, batch_size=3, predictions=tmp_path / f"{each.name}.csv")
        for each in (tmp_path / "run", folder)
    )
    assert ours["images"] == 3
    assert all(ours[name] == pytest.approx(theirs[name], abs=0.5) for name in ("images", "top1", "calibration_error"))
    rows = list(csv.DictReader((tmp_path / "model.csv").read_text(encoding="utf-8").splitlines()))
    predictor = wn21k_zoo.Predictor(folder)
    for row, found in zip(rows, predictor([images / row["image"] for row in rows]), strict=True):
        assert found.label_space == found.tree == "own"
        assert {output.name for output in found.top_k} == {"gold fish", "käse", "b,c"}
        assert (found.top_k[0].name, found.top_k[0].wnid) == (row["prediction"], "")
        assert found.top_k[0].probability == pytest.approx(float(row["confidence"]), abs=0.01)  # PIL's resize, not ours
    result = CliRunner().invoke(app, ["predict", str(images / rows[0]["image"]), "-m", str(folder), "-f", "table"])
    assert result.exit_code == 0
    assert f"outputs {predictor(images / rows[0]['image']).top_k[0].name} 0." in result.stdout
    assert "label space own\n" in result.stdout
    assert CliRunner().invoke(app, ["predict", "sample:cat", "-m", str(folder), "--level", "0"]).exit_code == 0
    result = CliRunner().invoke(app, ["predict", "sample:cat", "-m", str(folder), "--level", "1"])
    assert result.exit_code == 2
    assert f"{folder} has no level 1; its levels are 0." in result.stderr.replace("\n", "")
    with pytest.raises(ModelError, match="is the folder of a run; `wn21k train export"):
        wn21k_zoo.predict(images / "käse" / "1.jpg", model=tmp_path / "run")


def test_images_of_other_classes_are_counted(run, tmp_path):
    more = make_folder(tmp_path / "more", names=(*WNIDS, "n00007846")[1:])
    prepare(more, tmp_path / "shards", PrepareOptions(min_images=0, val_per_class=2, size=32), workers=1)
    figures = evaluate(run, tmp_path / "shards", workers=0)
    assert (figures["images"], figures["left_out"]) == (10, 2)


def test_runs_of_the_same_name_are_told_apart():
    assert names_of([Path("a/one"), Path("b/two")]) == ["one", "two"]
    assert names_of([Path("a/run"), Path("b/run")]) == [str(Path("a/run")), str(Path("b/run"))]
    assert names_of([Path("a/run"), Path("a/run")]) == ["run", "run"]


@pytest.mark.slow
def test_plots_are_pictures(run, data, tmp_path):
    shutil.copytree(run, tmp_path / "other" / "run")
    assert plot_runs([run, tmp_path / "other" / "run"], tmp_path / "runs.png") == tmp_path / "runs.png"
    figures = evaluate(run, data, workers=0)
    assert sum(row["images"] for row in figures["reliability"]) == figures["leaf_images"] > 0
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
    assert figures["raw_semantic_top1"] == figures["semantic_top1"]  # a softmax within a level preserves the order
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


def test_the_head_of_a_run_is_in_the_order_of_its_classes(run):
    trained, state = load_run(run, "last"), RunFolder(run).newest()
    prefix = "module.module."
    weights = {key.removeprefix(prefix): value for key, value in state["average"].items() if key.startswith(prefix)}
    network = timm.create_model("test_convnext", num_classes=len(WNIDS)).eval()
    network.load_state_dict(weights, strict=False)
    columns = Levels(SemanticTree.from_label_space(trained.space), "level").columns  # maps places to classes
    assert columns.tolist() != list(range(len(WNIDS)))
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(trained.module(pixels)[:, columns], network(pixels))
    assert not trained.module.training


@pytest.mark.parametrize("crop_pct", [pytest.param(None, marks=pytest.mark.slow), 0.875])
def test_confidences_are_those_of_the_training_for_a_run_and_its_export(data, tmp_path, crop_pct):
    recipe = small_recipe(
        model={"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.25, 0.3)},
        data={"augmentation": "finetune", "crop_pct": crop_pct},
        optimizer={"lr": 3e-3},
        run={"ema_decay": 0.5},
    )
    train(recipe, data, tmp_path / "run", ALONE, workers=0)
    folder = export_run(tmp_path / "run", tmp_path / "model")
    expected = load_run(tmp_path / "run").figures
    for subject in (tmp_path / "run", folder):
        found = evaluate(subject, data, split="validation", workers=0)
        for ours, theirs in zip(found["reliability"], expected["reliability"], strict=True):
            assert ours == pytest.approx(theirs, abs=0.01)


def test_the_draft_says_what_was_measured_and_how_images_are_prepared(run):
    trained = load_run(run)
    trained.figures = {
        "semantic_top1": 1.0, "raw_semantic_top1": 23.456, "top1": 34.567, "top5": 90.0, "images": 1200,
        "leaf_images": 800,
    }  # fmt: skip
    trained.recipe.model.mean, trained.recipe.model.std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    trained.recipe.data.augmentation = "finetune"
    for crop_pct, resize in ((None, ("squash", 1.0)), (0.9, ("crop", 0.9))):
        trained.recipe.data.crop_pct = crop_pct
        record = trained.checkpoint()
        assert (record.resize, record.crop_pct) == resize
        assert (record.mean, record.std, record.interpolation) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")
    of_all, of_leaves = "1,200 validation images", "800 validation images"
    measured = [
        ("semantic top-1", 23.46, of_all, "logit (as published)"), ("semantic top-1", 1.0, of_all, "by confidence"),
        ("top-1", 34.57, of_leaves, "by confidence"),
    ]  # fmt: skip
    trained.recipe.loss.kind = "single_label"
    for head, expected in (("softmax", measured), ("semantic_softmax", [measured[0], measured[2]])):
        assert trained.recipe.loss.head == head
        for metric, (*facts, protocol) in zip(trained.checkpoint().metrics, expected, strict=True):
            assert [metric.name, metric.value, metric.dataset] == facts
            assert metric.protocol.endswith(protocol)
        trained.recipe.loss.kind = "semantic_softmax"


def test_figures_of_another_step_are_not_those_of_a_checkpoint(run):
    folder = RunFolder(run)
    state = folder.newest()
    assert Trained(folder, state).figures["step"] == state["step"]
    assert Trained(folder, state | {"figures": state["figures"] | {"step": 1}}).figures == {}


def test_only_a_folder_is_known_again_by_its_classes(shards, tmp_path):
    recipe = small_recipe(loss={"kind": "single_label"}, schedule={"max_steps": 1}, data={"label_space": "fall11"})
    train(recipe, shards, tmp_path / "run", ALONE, workers=0)
    config = json.loads((export_run(tmp_path / "run", tmp_path / "model") / "config.json").read_text())
    assert "trained_on" not in config
