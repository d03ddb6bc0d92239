import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from training.runs import WNIDS, make_folder, small_recipe
from typer.testing import CliRunner

from wn21k_zoo.cli.app import app
from wn21k_zoo.training.distributed import World
from wn21k_zoo.training.engine import train

RECIPES = Path(__file__).parent.parent.parent / "training" / "recipes"


def wn21k(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(small_recipe(), data, folder, World(0, 1, torch.device("cpu")), workers=0)
    return folder


def test_plan():
    shown = json.loads(
        wn21k("train", "plan", f"{RECIPES}/resnet50.py", "--gpus", 4, "--images-per-second", 2500).stdout
    )
    assert (shown["recipe"], shown["gpus"], shown["accumulation"]) == ("resnet50.miil_in21k", 4, 2)
    assert shown["hours"] == pytest.approx(26.2)
    halved = json.loads(wn21k("train", "plan", f"{RECIPES}/resnet50.py", "--set", "schedule.epochs=40").stdout)
    assert halved["epochs"] == 40
    assert "images_seen" in wn21k("train", "plan", f"{RECIPES}/resnet50.py:in1k", "-f", "table").stdout


def test_plan_of_a_fine_tuning_from_a_folder(tmp_path):
    settings = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
    config = {"architecture": "test_resnet", "num_classes": 2, "pretrained_cfg": settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shown = json.loads(wn21k("train", "plan", f"finetune:{tmp_path}", "--images", 1000).stdout)
    assert shown["steps_per_epoch"] == 1000 // 32
    done = wn21k("train", "plot", "s3://bucket/run")
    assert (done.exit_code, "holds no run" in done.stderr) == (1, True)


def test_plan_of_data_that_is_there(data, run):
    recipe = json.loads((run / "recipe.json").read_text())
    planned = json.loads(wn21k("train", "plan", run, "--data", data, "--gpus", 1).stdout)
    assert planned["steps"] == json.loads((run / "status.json").read_text())["total"]
    assert planned["images_seen"] == planned["steps"] * recipe["data"]["batch_size"]
    assert json.loads(wn21k("train", "plan", run, "--gpus", 1).stdout) == planned  # the run records its images
    more = json.loads(wn21k("train", "plan", run / "recipe.json", "--images", 1000, "--gpus", 1).stdout)
    assert (more["classes"], more["steps_per_epoch"]) == (planned["classes"], 1000 // recipe["data"]["batch_size"])
    other = wn21k("train", "plan", run, "--set", "data.label_space=imagenet1k", "--gpus", 1)
    assert json.loads(other.stdout)["classes"] == 1000  # the images of other classes
    assert wn21k("train", "plan", run, "--data", data / "nothing").exit_code == 1


def test_a_plan_of_a_run_that_has_begun_needs_no_start(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["model"]["start"] = str(tmp_path / "gone")
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(recipe))
    planned = wn21k("train", "plan", tmp_path / "run", "--gpus", 1)
    assert (planned.exit_code, planned.stderr) == (0, "")
    assert planned.stdout == wn21k("train", "plan", run, "--gpus", 1).stdout
    other = wn21k("train", "plan", tmp_path / "run", "--gpus", 1, "--set", f"model.start={tmp_path}/other")
    assert "will not start yet, because of model.start" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", f"{RECIPES}/resnet51.py"), "Did you mean resnet50.py"),
        (("plan", f"{RECIPES}/resnet50.py:in2k"), "Did you mean"),
        (("plan", f"{RECIPES}/resnet50.py", "--set", "optimizer.lrr=1"), "Did you mean lr?"),
        (("plan", f"{RECIPES}/finetune.py"), "give --data or --images"),
        (("list", "nowhere"), "nowhere is not a recipe file"),
        (("list", __file__.replace(".py", ".txt")), "is not a recipe file"),
        (("plot", "nowhere"), "holds no run"),
        (("export", "nowhere", "out"), "holds no run"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    done = wn21k("train", *arguments)
    assert done.exit_code == (1 if arguments[0] in ("plot", "compare", "export") else 2)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_list_and_show():
    listed = [json.loads(line) for line in wn21k("train", "list", RECIPES).stdout.splitlines()]
    assert f"{RECIPES / 'resnet50.py'}:in21k" in {row["recipe"] for row in listed}
    assert all(row["about"] for row in listed)
    ours = [json.loads(line)["recipe"] for line in wn21k("train", "list").stdout.splitlines()]
    assert ours == [row["recipe"].removeprefix(f"{RECIPES}{os.sep}").replace(".py", "") for row in listed]
    shown = json.loads(wn21k("train", "show", f"{RECIPES}/resnet50.py", "--set", "optimizer.lr=0.1").stdout)
    assert shown["optimizer"]["lr"] == 0.1


def test_plot_export_evaluate(run, data, tmp_path):
    assert wn21k("train", "plot", run, "-o", tmp_path / "plot.png").stdout.strip() == str(tmp_path / "plot.png")
    assert wn21k("train", "export", run, tmp_path / "model", "--name", "mine.test").exit_code == 0
    done = wn21k(
        "evaluate", tmp_path / "model", data, "-j", 0, "-o", tmp_path / "figures.json", "--plot", tmp_path / "r.png"
    )
    assert done.exit_code == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {each["class"] for each in figures.pop("per_class")} <= {*WNIDS}
    assert json.loads(done.stdout) == figures
    assert (tmp_path / "r.png").stat().st_size > 1000
    table = wn21k("evaluate", run, data, "-j", 0, "-f", "table").stdout
    assert "semantic top1" in table
    assert "level 0" in table


def test_evaluation_says_among_which_classes_it_is(run, data, tmp_path):
    for wnid in WNIDS[2:4]:
        shutil.copytree(data / wnid, tmp_path / wnid)
    said = "2 of 6 classes have images: top1, top5 and raw_top1 are among these"
    assert said in wn21k("evaluate", run, tmp_path, "-j", 0).stderr
    assert "have images" not in wn21k("evaluate", run, data, "-j", 0).stderr


def test_evaluate_as_csv(run, data):
    lines = wn21k("evaluate", run, data, "-j", 0, "-f", "csv", "--image-size", 48).stdout.splitlines()
    assert lines[0] == "figure,value"
    figures = dict(line.split(",", 1) for line in lines[1:])
    assert 0 <= float(figures["semantic_top1"]) <= 100
    assert figures["classes"].isdigit()
    assert figures["input_size"] == "3 x 48 x 48"


def test_a_plot_lies_in_its_run(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    assert wn21k("train", "plot", "~/run").stdout == f"{tmp_path / 'run' / 'plot.png'}\n"
    assert (tmp_path / "run" / "plot.png").is_file()


def test_compare_leaves_out_what_was_not_evaluated(run, tmp_path):
    done = wn21k("train", "compare", run, tmp_path)
    assert done.exit_code == 0
    assert "holds no run that was evaluated yet" in done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert wn21k("train", "compare", tmp_path).exit_code == 1
    assert wn21k("train", "compare", run, tmp_path / "nowhere").exit_code == 3


def test_a_run_of_somebody_else_does_not_hide_the_others(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "theirs")
    access, is_file = os.access, Path.is_file

    def asked(path):
        if path.parent == tmp_path / "theirs":
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(os, "access", lambda path, how: Path(path) != tmp_path / "theirs" and access(path, how))
    monkeypatch.setattr(Path, "is_file", asked)
    monkeypatch.setattr(Path, "exists", lambda path: asked(path / "metrics.jsonl"))  # in a folder that is theirs
    done = wn21k("train", "compare", tmp_path / "theirs", run)
    assert (done.exit_code, len(done.stdout.splitlines())) == (3, 1)
    assert f"{tmp_path / 'theirs' / 'metrics.jsonl'}: Permission denied" in done.stderr


def test_a_broken_run_or_line_does_not_hide_the_others(run, tmp_path):
    shutil.copytree(run, tmp_path / "broken")
    (tmp_path / "broken" / "recipe.json").write_text("{")
    shutil.copytree(run, tmp_path / "list")
    (tmp_path / "list" / "data.json").write_text("[1]")
    shutil.copytree(run, tmp_path / "odd")
    evaluation = '{"kind": "evaluation", "step": 3, "top1": 5, "top5": null}'
    (tmp_path / "odd" / "metrics.jsonl").write_text(f'{{}}\n[]\n{evaluation}\n{{"kind')
    done = wn21k("train", "compare", tmp_path / "broken", tmp_path / "list", run, tmp_path / "odd")
    assert (done.exit_code, done.stderr.count("is damaged")) == (3, 2)
    good, odd = [json.loads(line) for line in done.stdout.splitlines()]
    assert (good["run"], odd["run"], odd["top1"], odd["epoch"]) == (run.name, "odd", 5, None)
    assert good["classes"] == json.loads((run / "data.json").read_text())["label_space"]
    assert wn21k("train", "plot", tmp_path / "odd").exit_code == 0


def test_a_broken_recipe_file_does_not_hide_the_others(tmp_path):
    shutil.copy(RECIPES / "resnet50.py", tmp_path)
    (tmp_path / "b.py").write_text("def broken(:\n")
    done = wn21k("train", "list", tmp_path)
    assert (done.exit_code, len(done.stdout.splitlines())) == (
        3,
        len(wn21k("train", "list", RECIPES / "resnet50.py").stdout.splitlines()),
    )
    assert f"{tmp_path / 'b.py'}: SyntaxError" in done.stderr


def test_patterns_that_a_shell_leaves_to_the_program(run):
    pattern = run.parent / f"*{run.name[-2:]}"
    (row,) = [json.loads(line) for line in wn21k("train", "compare", pattern).stdout.splitlines()]
    assert row["run"] == run.name


def test_compare(run):
    (row,) = [json.loads(line) for line in wn21k("train", "compare", run).stdout.splitlines()]
    assert (row["run"], row["loss"], row["epoch"]) == ("run", "semantic_softmax", 2)
    best = torch.load(run / "checkpoints" / "best.pt", weights_only=True)
    assert row["best_epoch"] == best["figures"]["epoch"]
    of_folder = wn21k("train", "compare", run.parent)
    assert json.loads(of_folder.stdout.splitlines()[0])["best_epoch"] == row["best_epoch"]
    assert 0 <= row["top1"] <= row["top5"] <= 100


def test_compared_runs_stand_side_by_side_and_fit_a_terminal():
    results = RECIPES.parent / "results" / "stand_in"
    runs = sorted(folder for folder in results.iterdir() if (folder / "metrics.jsonl").is_file())
    assert len(runs) > 6  # more than fit side by side
    shown = wn21k("train", "compare", *runs, "-f", "table").stdout
    assert max(map(len, shown.splitlines())) <= 120
    assert all(run.name in shown for run in runs)  # not folded
    rows = [json.loads(line) for line in wn21k("train", "compare", *runs).stdout.splitlines()]
    lines = [line.split() for line in shown.splitlines()]
    for part in (rows[:6], rows[6:]):
        assert ["top1", *(str(row["top1"]) for row in part)] in lines


def test_a_damaged_image_is_a_message_like_others(run, data, tmp_path):
    copy = tmp_path / "images"
    shutil.copytree(data, copy)
    damaged = min(each for each in copy.rglob("*") if each.is_file())
    damaged.write_bytes(b"no image")
    done = wn21k("evaluate", run, copy, "-j", 0, "--split", "all")
    assert done.exit_code == 0
    (line,) = [line for line in done.stderr.splitlines() if "sample left out" in line]
    assert line.startswith("wn21k: sample left out: ")
    assert damaged.name in line


def test_evaluation_of_what_is_not_there(run, data, tmp_path):
    for arguments, message in (
        ((tmp_path / "nothing", data), "There is no folder"),
        ((run, tmp_path / "nothing"), "nothing"),
        ((run, data, "-o", tmp_path / "no" / "x.json", "-j", 0), "cannot be written"),
        ((run, data, "-o", tmp_path, "-j", 0), "is a folder; name a file"),
        ((run, data, "--plot", tmp_path, "-j", 0), "name a file that ends in .png"),
        ((run, data, "--plot", tmp_path / "x.jpg", "-j", 0), "name a file that ends in .png"),
        ((run, data, "--split", "tests"), "has the splits"),
        ((run, data, "--split", "test"), "has no folders train and test"),
    ):
        done = wn21k("evaluate", *arguments)
        assert done.exit_code != 0
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_compared_figures_have_two_digits_and_may_be_0(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    line = {"kind": "evaluation", "step": 3, "epoch": 1, "images": 7, "top1": 12.3456, "top5": 0.0}
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (row,) = [json.loads(each) for each in wn21k("train", "compare", tmp_path / "run").stdout.splitlines()]
    assert (row["top1"], row["top5"], row["semantic_top1"]) == (12.35, 0, None)
