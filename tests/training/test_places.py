"""Where a run's images, weights, classes and output are."""

import json
import os
import shutil

import pytest
import torch
from conftest import EMBEDDED

from wn21k_zoo import LabelSpace, Predictor, SemanticTree, create_model, create_transform, predict
from wn21k_zoo.checkpoints import DEFAULT_CHECKPOINT
from wn21k_zoo.convert import read_state_dict
from wn21k_zoo.errors import LabelSpaceError, ModelError, RecipeError, RunError, UnknownModelError, Wn21kError
from wn21k_zoo.training import presets
from wn21k_zoo.training.data import open_dataset
from wn21k_zoo.training.engine import Preempted, train
from wn21k_zoo.training.evaluate import evaluate
from wn21k_zoo.training.export import export_run
from wn21k_zoo.training.folder import open_folder
from wn21k_zoo.training.inspect import describe
from wn21k_zoo.training.prepare import prepare
from wn21k_zoo.training.recipe_files import load_recipe
from wn21k_zoo.training.state import RunFolder
from wn21k_zoo.training.weights import resolved

from .checks import assert_same_weights, final, run, run_told
from .runs import WNIDS, make_folder, small_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = {"epochs": 1}


def test_an_output_may_be_a_link_that_leads_nowhere_yet(data, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "scratch" / "new")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    run(small_recipe(schedule={"max_steps": 1}), data, tmp_path / "link")
    assert final(tmp_path / "scratch" / "new")["step"] == 1
    with pytest.raises(RunError, match=r"circle cannot be created: .*; name another output folder"):
        run(small_recipe(), data, tmp_path / "circle")


@pytest.mark.parametrize("place", [".", "out", "out/deep", f"{WNIDS[0]}/out", "linked/out"])
def test_an_output_is_not_among_the_images(tmp_path, place):
    data = make_folder(tmp_path / "images")
    if place.startswith("linked"):
        (data / "linked").symlink_to(make_folder(tmp_path / "others") / WNIDS[0], target_is_directory=True)
    with pytest.raises(RunError, match="would be among the images of"):
        run(small_recipe(), data, data / place)
    assert not (data / "out").exists()
    (data / "out").mkdir()
    with pytest.raises(RunError, match="would be among the images of"):
        run(small_recipe(), data, data / place)


def test_an_output_may_lie_beside_what_images_are_divided_into(tmp_path):
    data = tmp_path / "images"
    for split in ("train", "val"):
        make_folder(data / split)
    for place in ("train/out", f"val/{WNIDS[0]}/out"):
        with pytest.raises(RunError, match="would be among the images of"):
            run(small_recipe(), data, data / place)
    for place in ("runs/out", ".runs/out"):
        run(small_recipe(schedule=SHORT), data, data / place)
        assert len(open_folder(data, "all")) == 120


@pytest.mark.parametrize("name", ["val", "valid", "test"])
def test_a_run_says_which_folder_it_is_validated_on(tmp_path, capsys, name):
    for split in ("train", name):
        make_folder(tmp_path / "images" / split)
    run(small_recipe(schedule=SHORT), tmp_path / "images", tmp_path / "run")
    assert f"60 for validation (in {name}), 6 classes" in capsys.readouterr().err


def test_a_run_goes_on_without_the_weights_that_it_began_with(data, tmp_path, monkeypatch, stop_at):
    run(small_recipe(schedule=SHORT, run={"seed": 5}), data, tmp_path / "first")
    exported = export_run(tmp_path / "first", tmp_path / "exported")
    monkeypatch.chdir(tmp_path)
    recipe = small_recipe(model={"start": "exported"})
    run(recipe, data, tmp_path / "whole")
    assert RunFolder(tmp_path / "whole").recipe().model.start == str(exported.resolve())
    stop_at(3)
    with pytest.raises(Preempted):
        run_told(recipe, data, tmp_path / "parts")
    stop_at(-1)
    exported.rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    run(RunFolder(tmp_path / "parts").recipe(), data, tmp_path / "parts")
    assert_same_weights(final(tmp_path / "whole"), final(tmp_path / "parts"))
    with pytest.raises(UnknownModelError):  # a new run needs them
        run(RunFolder(tmp_path / "parts").recipe(), data, tmp_path / "new")


def test_a_teacher_may_move_but_not_change(data, tmp_path, stop_at):
    for seed in (5, 6):
        run(small_recipe(schedule=SHORT, run={"seed": seed}), data, tmp_path / f"{seed}")
        export_run(tmp_path / f"{seed}", tmp_path / f"model{seed}")
    recipe = small_recipe(loss={"teacher": str(tmp_path / "model5"), "distillation_weight": 1.0})
    run(recipe, data, tmp_path / "whole")
    stop_at(3)
    with pytest.raises(Preempted):
        run_told(recipe, data, tmp_path / "parts")
    stop_at(-1)
    shutil.move(tmp_path / "model5", tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "changed")
    config = json.loads((tmp_path / "changed" / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.5, 0.5, 0.5]
    (tmp_path / "changed" / "config.json").write_text(json.dumps(config))
    for other in ("model6", "changed"):  # other weights; the same with another normalisation
        recipe.loss.teacher = str(tmp_path / other)
        with pytest.raises(RunError, match="is not the same as when"):
            run(recipe, data, tmp_path / "parts")
        assert RunFolder(tmp_path / "parts").recipe().loss.teacher == str((tmp_path / "model5").resolve())
    recipe.loss.teacher = str(tmp_path / "moved")
    run(recipe, data, tmp_path / "parts")
    assert_same_weights(final(tmp_path / "whole"), final(tmp_path / "parts"))
    assert RunFolder(tmp_path / "parts").recipe().loss.teacher == str((tmp_path / "moved").resolve())


def test_a_start_says_of_what_size_its_network_is(data, tmp_path, stop_at):
    run(small_recipe("test_vit", model={"arguments": {"img_size": 32}}, schedule=SHORT), data, tmp_path / "first")
    exported = export_run(tmp_path / "first", tmp_path / "exported")
    config = json.loads((exported / "config.json").read_text())
    config["pretrained_cfg"] |= {"fixed_input_size": True, "input_size": [3, 32, 32]}  # as timm writes it
    del config["model_args"]
    (exported / "config.json").write_text(json.dumps(config))
    recipe = small_recipe("test_vit", model={"start": str(exported)}, schedule=SHORT)
    stop_at(3)
    with pytest.raises(Preempted):
        run_told(recipe, data, tmp_path / "run")
    stop_at(-1)
    exported.rename(tmp_path / "gone")  # resuming does not need it again
    other = recipe.model_copy(deep=True)
    other.model.arguments = {"drop_rate": 0.1}
    with pytest.raises(RunError, match=r"model\.arguments"):
        run(other, data, tmp_path / "run")
    run(recipe, data, tmp_path / "run")
    predict(torch.rand(3, 32, 32), model=export_run(tmp_path / "run", tmp_path / "model"))


def test_a_random_teacher_is_the_same_after_a_resume(data, tmp_path, stop_at):
    run(small_recipe(schedule=SHORT), make_folder(tmp_path / "others", names=WNIDS[:4]), tmp_path / "first")
    exported = export_run(tmp_path / "first", tmp_path / "exported")  # its classifier is replaced
    recipe = small_recipe(model={"start": str(exported)}, schedule=SHORT)
    recipe.loss.teacher, recipe.loss.distillation_weight = "random:resnet10t", 1.0
    stop_at(3)
    with pytest.raises(Preempted):
        run_told(recipe, data, tmp_path / "run")
    stop_at(-1)
    run(recipe, data, tmp_path / "run")


@pytest.mark.parametrize("name", ["resnet50.miil_in21k", "hf-hub:a/b", "random:resnet50.miil_in21k", None])
def test_names_that_are_no_places_stay(name):
    recipe = small_recipe(model={"start": name}, loss={"teacher": name}, data={"label_space": "fall11"})
    assert resolved(recipe, otherwise={}) == recipe  # although that repository is out of reach


def test_one_name_for_a_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("model", "below"):
        (tmp_path / folder).mkdir()
    whole = str((tmp_path / "model").resolve())
    for name in ("model", "./model", "below/../model", "local-dir:model", whole, f"{whole}{os.sep}"):
        assert resolved(small_recipe(model={"start": name}), otherwise={}).model.start == whole


def test_classes_of_ones_own_with_their_ancestors(data, tmp_path, monkeypatch):
    tree = SemanticTree.from_wnids(WNIDS[3:]).with_ancestors()
    (tmp_path / "mine.txt").write_text("# mine\n" + "".join(f"{wnid} # a class\n" for wnid in tree.wnids))
    monkeypatch.chdir(tmp_path)
    recipe = small_recipe(data={"label_space": "mine.txt"})
    figures = run(recipe, data, tmp_path / "run")
    assert figures["classes_with_images"] == 5  # three and two of their ancestors; one is left out
    assert set(figures["levels"]) == {12, 13}  # above, each level has one class
    monkeypatch.chdir("/")
    (tmp_path / "mine.txt").rename(tmp_path / "moved.txt")
    again = RunFolder(tmp_path / "run").recipe()
    assert again.data.label_space == tree.wnids
    again.check()  # its file may be gone
    assert run(again, data, tmp_path / "run") == figures
    exported = export_run(tmp_path / "run", tmp_path / "model")
    assert f'"label_space": "{len(tree)} wnids, those of wn21k_labels.json"' in (exported / "README.md").read_text()
    prediction = predict(torch.rand(3, 32, 32), model=exported, tree=tree)
    assert [level.depth for level in prediction.levels] == [12, 13]
    kept = ("top1", "semantic_top1", "images", "left_out")
    assert {name: evaluate(exported, data, workers=0, split="validation")[name] for name in kept} == {
        name: evaluate(tmp_path / "run", data, workers=0)[name] for name in kept
    }
    assert evaluate(exported, data, workers=0, label_space=str(tmp_path / "moved.txt"))["images"] == 5
    again.data.label_space = str(tmp_path / "moved.txt")
    assert run(again, data, tmp_path / "run") == figures
    (tmp_path / "mine.txt").write_text("".join(f"{wnid}\n" for wnid in reversed(tree.wnids)))
    again.data.label_space = str(tmp_path / "mine.txt")
    with pytest.raises(RunError, match="holds a run on other data"):
        run(again, data, tmp_path / "run")
    (tmp_path / "mine.txt").write_bytes(b"\xff\xff\x00\x81")
    with pytest.raises(RecipeError, match=r"data\.label_space: .*cannot be read as a list of wnids"):
        run(again, data, tmp_path / "other")
    with pytest.raises(LabelSpaceError):
        predict(torch.rand(3, 32, 32), model=exported, label_space=tmp_path / "mine.txt")
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    assert LabelSpace.find("~/moved.txt").wnids == tree.wnids
    (tmp_path / "fall11").write_text("n02121620")  # a file with the name of a label space
    assert resolved(small_recipe(data={"label_space": f"{tmp_path}/fall11"})).data.label_space == ("n02121620",)


def test_without_levels_a_softmax_per_level_is_refused(tmp_path):
    data = make_folder(tmp_path / "images", names=("n02123045", "n02099601", "n01443537"), images=12)
    with pytest.raises(RecipeError, match="No class is an ancestor of another, so semantic_softmax is one softmax"):
        run(small_recipe(), data, tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.json").exists()
    run(small_recipe(loss={"kind": "single_label"}, schedule=SHORT), data, tmp_path / "run")


def test_a_class_may_be_called_train(tmp_path):
    make_folder(tmp_path, names=("bus", "train"))
    assert open_folder(tmp_path).class_names == ("bus", "train")
    assert len(open_folder(tmp_path, "all")) == 20


def test_a_start_that_is_damaged_is_told_and_keeps_its_head_otherwise(data, tmp_path):
    run(small_recipe(schedule=SHORT), data, tmp_path / "first")
    exported = export_run(tmp_path / "first", tmp_path / "exported")
    whole = (exported / "config.json").read_text()
    for damaged in (whole[:-20], whole.replace('"head": "', '"head": "no ')):
        (exported / "config.json").write_text(damaged)
        with pytest.raises(ModelError, match=r"config\.json"):
            run(small_recipe(model={"start": str(exported)}), data, tmp_path / "run")
    (exported / "config.json").write_text(whole)
    assert not RunFolder(tmp_path / "run").steps()
    run(small_recipe(model={"start": str(exported)}, schedule=SHORT), data, tmp_path / "run")


def test_arguments_that_were_left_out_are_told_without_the_start_too(data, tmp_path, stop_at):
    run(small_recipe(schedule=SHORT), data, tmp_path / "first")
    exported = export_run(tmp_path / "first", tmp_path / "exported")
    recipe = small_recipe(model={"start": str(exported), "arguments": {"drop_rate": 0.5}})
    stop_at(3)
    with pytest.raises(Preempted):
        run_told(recipe, data, tmp_path / "run")
    stop_at(-1)
    exported.rename(tmp_path / "gone")
    recipe.model.arguments = {}
    with pytest.raises(RunError, match=r"model\.arguments = .*drop_rate"):
        run(recipe, data, tmp_path / "run")
    again = RunFolder(tmp_path / "run").recipe()
    run(again, data, tmp_path / "run")


TAKE_A_NAME = {
    "create_model": create_model,
    "create_transform": create_transform,
    "predict": lambda name: predict("photo.jpg", model=name),
    "Predictor": Predictor,
    "an image": lambda name: predict(name, model=EMBEDDED),
    "a cache": lambda name: create_model(DEFAULT_CHECKPOINT, cache_dir=name),
    "LabelSpace.find": LabelSpace.find,
    "LabelSpace.from_file": LabelSpace.from_file,
    "SemanticTree.find": SemanticTree.find,
    "SemanticTree.from_file": SemanticTree.from_file,
    "read_state_dict": read_state_dict,
    "load_recipe": load_recipe,
    "finetune": presets.finetune,
    "open_dataset": open_dataset,
    "open_folder": open_folder,
    "data of evaluate": lambda name: evaluate(EMBEDDED, name),
    "model of evaluate": lambda name: evaluate(name, "."),
    "predictions of evaluate": lambda name: evaluate(EMBEDDED, ".", predictions=name),
    "describe": describe,
    "source of prepare": lambda name: prepare(name, "out"),
    "output of prepare": lambda name: prepare(".", name),
    "run of export_run": lambda name: export_run(name, "out"),
    "output of export_run": lambda name: export_run("run", name),
    "start": lambda name: resolved(small_recipe(model={"start": name})),
    "teacher": lambda name: resolved(small_recipe(loss={"teacher": name})),
    "data of train": lambda name: train(small_recipe(), name, "out"),
    "output of train": lambda name: train(small_recipe(), ".", name),
}


@pytest.mark.parametrize(
    "name", ["a" * 300, "a/" * 3000, "/" + "a" * 300, "\0", "a/\0", "~\0", "\ud800", "~nosuchuser/a"]
)
@pytest.mark.parametrize("function", TAKE_A_NAME)
def test_a_name_that_no_file_can_have(function, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Wn21kError) as error:
        TAKE_A_NAME[function](name)
    assert "\n" not in str(error.value)
    assert not [*tmp_path.iterdir()]
