"""Reports per image and per class; test_export.py and test_metrics.py test the figures themselves."""

import copy
import csv
import multiprocessing
import shutil
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pyarrow.parquet as pq
import pytest
import timm
import torch
from hub_server import serving
from timm.models import save_for_hf

from wn21k_zoo.errors import (
    BadImagesError,
    DataOutputError,
    InvalidArgumentError,
    ModelError,
    NonFiniteError,
    UnresolvedLabelSpaceError,
)
from wn21k_zoo.labels import ClassNames, LabelSpace
from wn21k_zoo.training.evaluate import evaluate
from wn21k_zoo.training.export import export_run
from wn21k_zoo.training.prepare import PrepareOptions, prepare
from wn21k_zoo.training.state import RunFolder, read_checkpoint
from wn21k_zoo.tree import SemanticTree

from . import checks
from .runs import WNIDS, make_folder, small_recipe


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    checks.run(small_recipe(optimizer={"lr": 1e-3}), data, folder)
    return folder


def test_a_row_per_image_says_what_was_predicted(run, data, tmp_path):
    figures = evaluate(run, data, split="all", workers=0, batch_size=7, predictions=tmp_path / "rows.csv")
    rows = list(csv.DictReader((tmp_path / "rows.csv").read_text().splitlines()))
    assert len(rows) == figures["images"] == 60
    assert {row["image"] for row in rows} == {path.relative_to(data).as_posix() for path in data.glob("*/*.jpg")}
    assert all(row["image"].startswith(f"{row['class']}/") for row in rows)
    assert all(0 <= float(row["confidence"]) <= 1 for row in rows)
    for each in figures["per_class"]:
        of_class = [row for row in rows if row["class"] == each["class"]]
        right = [row for row in of_class if row["prediction"] == each["class"]]
        assert (each["images"], each["top1"]) == (len(of_class), pytest.approx(100 * len(right) / len(of_class)))
    shares = [each["top1"] for each in figures["per_class"]]
    assert shares == sorted(shares)
    assert figures["balanced_top1"] == pytest.approx(sum(shares) / len(shares))


def test_rows_of_shards_have_the_names_in_them_and_those_of_a_failure_are_not_there(run, data, tmp_path):
    options = PrepareOptions(min_images=0, val_per_class=3, size=32, shard_size=4)
    prepare(data, tmp_path / "shards", options, workers=1)
    place = tmp_path / "rows.csv"
    evaluate(run, tmp_path / "shards", workers=0, predictions=place)
    rows = list(csv.DictReader(place.read_text().splitlines()))
    manifest = pq.read_table(tmp_path / "shards" / "manifest.parquet", filters=[("split", "=", "validation")])
    assert {(row["image"], row["class"]) for row in rows} == {
        (f"{one['key']}.jpg", one["synset"]) for one in manifest.to_pylist()
    }
    place.unlink()
    with pytest.raises(DataOutputError, match="cannot be written"):
        evaluate(run, data, workers=0, predictions=tmp_path / "no" / "rows.csv")
    with pytest.raises(NonFiniteError):
        evaluate(_broken(run, tmp_path), data, workers=0, predictions=place)
    assert not place.exists()


def test_an_evaluation_that_is_interrupted_leaves_no_processes(run, data):
    def interrupted(done, total):
        raise KeyboardInterrupt

    before = set(multiprocessing.active_children())
    with pytest.raises(KeyboardInterrupt) as end:
        evaluate(run, data, workers=1, progress=interrupted)
    assert set(multiprocessing.active_children()) == before, end


def _broken(run, tmp_path):
    shutil.copytree(run, tmp_path / "broken")
    best = RunFolder(tmp_path / "broken").best
    checkpoint = read_checkpoint(best)
    for part in ("model", "average"):
        for tensor in (checkpoint[part] or {}).values():
            tensor.fill_(torch.nan) if tensor.is_floating_point() else None
    best.unlink()
    torch.save(checkpoint, best)
    return tmp_path / "broken"


def test_how_outputs_are_read_is_what_is_asked_for(run, data, tmp_path):
    module = timm.create_model("test_convnext", num_classes=len(WNIDS))
    own = make_folder(tmp_path / "own", names="abcdef")
    for names, images in ((list(WNIDS), data), ([each.name for each in sorted(own.iterdir())], own)):
        place = tmp_path / f"of_{names[0]}"
        save_for_hf(module, place, model_config={"label_names": names})
        for head in ("softmax", "sigmoid"):
            assert evaluate(place, images, split="all", head=head, workers=0)["head"] == head
    with pytest.raises(InvalidArgumentError, match="give head"):
        evaluate(tmp_path / f"of_{WNIDS[0]}", data, workers=0)
    with pytest.raises(InvalidArgumentError, match="have no levels; head cannot be semantic_softmax"):
        evaluate(place, own, head="semantic_softmax", workers=0)
    with pytest.raises(InvalidArgumentError, match="is a run, which states"):
        evaluate(run, data, head="softmax", workers=0)


def test_among_all_classes_those_without_images_compete(tmp_path):
    module = timm.create_model("test_convnext", num_classes=4)
    torch.nn.init.zeros_(module.head.fc.weight)
    module.head.fc.bias.data = torch.tensor([1.0, 0.0, 0.0, 2.0])  # whatever the image
    images = make_folder(tmp_path / "images", names="ab")
    figures = evaluate(module, images, label_space=ClassNames(["a", "b", "c", "d"]), workers=0)
    assert (figures["top1"], figures["top1_among_all"], figures["classes"]) == (50, 0, 4)


def test_with_all_ancestors_mistakes_among_different_classes_are_as_large(tmp_path):
    tabby, beagle, cat, dog = "n02123045", "n02088364", "n02121808", "n02084071"
    images, errors = make_folder(tmp_path / "images", names=(tabby, beagle)), {}
    for wnids in ((tabby, beagle), (tabby, beagle, cat, dog)):
        module = timm.create_model("test_convnext", num_classes=len(wnids))
        torch.nn.init.zeros_(module.head.fc.weight)
        module.head.fc.bias.data = torch.tensor([1.0, *[0.0] * (len(wnids) - 1)])  # all are tabbies
        for full in (False, True):
            figures = evaluate(
                module, images, label_space=LabelSpace("own", wnids), head="softmax", workers=0, with_ancestors=full
            )
            tree = SemanticTree.from_wnids(wnids, name="own")
            tree = tree if not full and len(wnids) == 4 else tree.with_ancestors()
            shared = tree.lowest_common_ancestor(tabby, beagle)
            error = tree[beagle].depth - (shared.depth if shared is not None else -1)
            assert figures["mean_lca_error"] == error / 2
            assert figures["hierarchy"] == tree.name
            errors[len(wnids), full] = error
    assert errors[2, True] == errors[4, True] == errors[2, False] > errors[4, False]
    with pytest.raises(InvalidArgumentError, match="classes of its own, which have no ancestors"):
        evaluate(module, images, label_space=ClassNames(list("abcd")), workers=0, with_ancestors=True)


def test_a_network_of_ones_own_is_evaluated_and_left_as_it_was(run, data, tmp_path):
    exported = export_run(run, tmp_path / "model")
    module = timm.create_model(f"local-dir:{exported}", pretrained=True).train()
    module.stages[0].eval()  # frozen, say
    modes = [part.training for part in module.modules()]
    layouts = [weight.stride() for weight in module.parameters()]
    found = evaluate(module, data, label_space=sorted(WNIDS), head="semantic_softmax", workers=0)
    assert found["model"] == type(module).__name__
    same = evaluate(exported, data, workers=0, split="all")
    assert (found["source"], same["source"], same["data"]) == (None, str(exported), str(data))
    differing = dict.fromkeys(("model", "source", "label_space", "images_per_second"))
    assert {**found, **differing} == {**same, **differing}
    assert [part.training for part in module.modules()] == modes
    assert [weight.stride() for weight in module.parameters()] == layouts
    with pytest.raises(UnresolvedLabelSpaceError, match="give label_space"):
        evaluate(module, data, workers=0)
    with pytest.raises(InvalidArgumentError, match="The preprocessing of Linear is not known"):
        evaluate(torch.nn.Linear(3, 6), data, label_space=sorted(WNIDS), head="softmax", workers=0)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        half = evaluate(copy.deepcopy(module).to(dtype), data, label_space=sorted(WNIDS), head="softmax", workers=0)
        assert half["images"] == 60
    with pytest.raises(
        ModelError, match=r"ResNet gives outputs of shape \(60, \d+\) .* custom needs a tensor \[60, 6\]"
    ):
        evaluate(
            timm.create_model("test_resnet", num_classes=0), data, label_space=sorted(WNIDS), head="softmax", workers=0
        )
    with pytest.raises(
        InvalidArgumentError, match="has several classes 'a', and images of a class are found by its name"
    ):
        evaluate(module, data, label_space=ClassNames(list("aabcde")), workers=0)
    with pytest.raises(InvalidArgumentError, match="no last checkpoint"):
        evaluate(module, data, which="last", label_space=sorted(WNIDS))


def test_results_hold_no_password(run, data, tmp_path):
    prepare(data, tmp_path / "shards", PrepareOptions(min_images=0, val_per_class=3, size=32), workers=1)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path / "shards"))
    with serving(server) as endpoint:
        figures = evaluate(run, f"{endpoint.replace('//', '//bob:secret@')}/", workers=0)
    assert figures["data"] == f"{endpoint}/"
    assert "secret" not in str(figures)


def test_each_of_several_processes_evaluates_all_of_it_and_waits_for_none(run, data, monkeypatch):
    alone = evaluate(run, data, workers=0)

    def waits(*_, **__):
        raise AssertionError("it waits for others")

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.distributed_c10d._get_group_size", lambda group: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "all_reduce", waits)
    assert {**evaluate(run, data, workers=0), "images_per_second": 0} == {**alone, "images_per_second": 0}


def test_what_fails_beside_the_rows_is_not_blamed_on_them(run, data, tmp_path):
    def gone(done, total):
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        evaluate(run, data, workers=0, predictions=tmp_path / "rows.csv", progress=gone)
    assert not list(tmp_path.iterdir())


def test_what_was_trained_on_and_what_is_read_otherwise_is_told(run, data, tmp_path, caplog):
    exported = export_run(run, tmp_path / "model")
    for model in (run, exported):
        assert evaluate(model, data, workers=0)["split"] == "validation"
        assert not caplog.text
        evaluate(model, data, workers=0, split="train")
        assert "was trained on most of these images" in caplog.text
        caplog.clear()
    evaluate(exported, data, workers=0, head="semantic_softmax")
    assert not caplog.text
    evaluate(exported, data, workers=0, head="softmax")
    assert "states a semantic_softmax over custom; its outputs are read as softmax all the same" in caplog.text
    caplog.clear()
    (tmp_path / "reversed.txt").write_text("\n".join(sorted(WNIDS, reverse=True)))
    evaluate(exported, data, workers=0, label_space=str(tmp_path / "reversed.txt"), head="semantic_softmax")
    assert "its outputs are read as semantic_softmax over custom all the same" in caplog.text


def test_no_image_is_left_out_for_its_name(tmp_path, caplog):
    """Names are numbers, as often."""
    whole = make_folder(tmp_path / "whole", images=30)
    for path in sorted(whole.glob("*/*.jpg")):
        number = int(path.stem)
        part, name = ("train", number) if number < 20 else ("val", number - 20) if number < 25 else ("new", number - 25)
        place = tmp_path / "divided" / part if part != "new" else tmp_path / "new"
        (place / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place / path.parent.name / f"{name}.jpg")
    checks.run(small_recipe(schedule={"epochs": 1}), tmp_path / "divided", tmp_path / "run")
    found = {}
    for name in ("divided", "new", "divided/train"):
        figures = evaluate(tmp_path / "run", tmp_path / name, workers=0)
        found[name] = figures["split"], figures["images"], "was trained on most" in caplog.text
        caplog.clear()
    assert found == {
        "divided": ("validation", 30, False),
        "new": ("all", 30, False),
        "divided/train": ("all", 120, True),
    }


def test_images_are_as_large_as_is_asked_for(run, data, tmp_path):
    shutil.copytree(run, tmp_path / "larger")
    recipe = RunFolder(run).recipe()
    recipe.data.size = 48
    (tmp_path / "larger" / "recipe.json").write_text(recipe.to_json())
    told = []
    for model, size in ((run, None), (run, 48), (tmp_path / "larger", None)):
        figures = evaluate(model, data, split="all", workers=0, image_size=size)
        told.append({name: value for name, value in figures.items() if name not in ("images_per_second", "source")})
    assert told[0]["input_size"] == [3, 32, 32]
    assert told[1]["input_size"] == [3, 48, 48]
    assert told[0]["calibration_error"] != told[1]["calibration_error"]
    assert told[1] == told[2]


def test_position_embeddings_are_resampled_to_the_size_of_the_images(data, tmp_path):
    small = {"num_classes": len(WNIDS), "depth": 1, "embed_dim": 12}
    vit = timm.create_model("vit_tiny_patch16_224", **small)
    config = {"label_names": list(WNIDS), "model_args": small}
    save_for_hf(vit, tmp_path / "vit", model_config=config, safe_serialization=True)
    how = {"split": "all", "workers": 0, "image_size": 64, "head": "softmax"}
    figures = evaluate(tmp_path / "vit", data, **how)
    assert figures["input_size"] == [3, 64, 64]
    with pytest.raises(InvalidArgumentError, match=r"does not take images of 64 pixels: .*image_size"):
        evaluate(vit, data, label_space=ClassNames(WNIDS), **how)  # the caller's network is unchanged


def test_any_network_and_size_may_be_tried(run, data):
    with pytest.raises(InvalidArgumentError, match=r"small does not take images of 8 pixels: .*image_size"):
        evaluate(run, data, workers=0, image_size=8)
    how = {"split": "all", "workers": 0, "head": "softmax", "label_space": ClassNames(WNIDS)}
    half = timm.create_model("test_resnet", num_classes=len(WNIDS)).bfloat16()
    half.fc.float()
    assert evaluate(half, data, **how, image_size=32)["input_size"] == [3, 32, 32]
    half.global_pool.register_forward_hook(lambda *_: [][1])
    with pytest.raises(InvalidArgumentError, match=r"does not take images of 32 pixels: IndexError"):
        evaluate(half, data, **how, image_size=32)


def test_numbers_out_of_range(run, data):
    for wrong in ({"max_bad": -1}, {"max_bad": 1.5}, {"batch_size": 0}, {"batch_size": 2.5}, {"workers": -1}):
        with pytest.raises(InvalidArgumentError, match=next(iter(wrong))):
            evaluate(run, data, **wrong)


def test_the_checkpoint_that_is_asked_for_is_evaluated(run, data, tmp_path):
    broken = _broken(run, tmp_path)
    assert evaluate(broken, data, workers=0, which="last")["images"] == 6
    with pytest.raises(NonFiniteError):
        evaluate(broken, data, workers=0)


def test_an_evaluation_is_in_the_precision_that_is_asked_for(run, data):
    errors = {
        precision: evaluate(run, data, workers=0, precision=precision)["calibration_error"]
        for precision in ("fp32", "fp16", "bf16")
    }
    off = {precision: abs(error - errors["fp32"]) for precision, error in errors.items()}
    assert 0 < off["fp16"] < off["bf16"] < 1


def test_so_many_damaged_images_are_endured_in_an_evaluation_as_are_allowed(run, tmp_path):
    images = make_folder(tmp_path / "images")
    for name in WNIDS[:2]:
        for path in (images / name).iterdir():
            path.write_bytes(b"damaged")
    figures = evaluate(run, images, split="all", workers=0, max_bad=0.5)
    assert (figures["images"], figures["bad_samples"]) == (40, 20)
    with pytest.raises(BadImagesError):
        evaluate(run, images, split="all", workers=0)
