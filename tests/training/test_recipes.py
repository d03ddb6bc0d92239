import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf
from typer.testing import CliRunner

from wn21k_zoo import registry
from wn21k_zoo.checkpoints import CHECKPOINTS
from wn21k_zoo.cli.app import app
from wn21k_zoo.errors import InvalidArgumentError, ModelError, RecipeError, UnknownModelError
from wn21k_zoo.labels import LabelSpace
from wn21k_zoo.publish import export_folder
from wn21k_zoo.training import presets
from wn21k_zoo.training.distributed import World
from wn21k_zoo.training.engine import train
from wn21k_zoo.training.plan import plan
from wn21k_zoo.training.prepare import PrepareOptions, prepare
from wn21k_zoo.training.recipe import RANDOM, Recipe
from wn21k_zoo.training.recipe_files import listed_in, load_recipe, override, shipped_recipes

from .archives import WNIDS, jpeg
from .runs import make_folder, small_recipe

FOLDER = Path(__file__).parent.parent.parent / "training" / "recipes"
ALL = [f"{path}:{name}" for path in sorted(FOLDER.glob("*.py")) for name in listed_in(path)]


WITHOUT_START = [name for name, known in presets.ARCHITECTURES.items() if known.start is None]


def short(where):
    return where.removeprefix(f"{FOLDER}/")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Class folders, and fall11 shards of them."""
    folder = tmp_path_factory.mktemp("images")
    for number, wnid in enumerate(WNIDS):
        (folder / "classes" / wnid).mkdir(parents=True)
        for index in range(8):
            (folder / "classes" / wnid / f"{wnid}_{index}.JPEG").write_bytes(jpeg(100 * number + index, 40, 40))
    options = PrepareOptions(min_images=0, val_per_class=2, size=32, shard_size=20)
    prepare(folder / "classes", folder / "shards", options, workers=1)
    return folder


def fits(begun, architecture):
    """Whether weights of one architecture provide all that another needs."""
    if begun == architecture:
        return True
    with torch.device("meta"):
        given, wanted = (timm.create_model(name, num_classes=3).state_dict() for name in (begun, architecture))
    return all(name in given and given[name].shape == value.shape for name, value in wanted.items())


@pytest.mark.parametrize("where", ALL, ids=short)
def test_every_recipe_can_be_had_and_goes_together(where):
    recipe = load_recipe(where)
    recipe.check()
    assert Recipe.from_json(recipe.to_json()) == recipe
    for name in (recipe.model.start, recipe.loss.teacher):
        if name is not None and not name.startswith("runs/"):
            checkpoint = registry.resolve_checkpoint(name)
            assert name == recipe.loss.teacher or fits(checkpoint.architecture, recipe.model.architecture)
    if recipe.loss.teacher is not None and not recipe.loss.teacher.startswith("runs/"):
        spoken = LabelSpace.load(registry.resolve_checkpoint(recipe.loss.teacher).label_space)
        assert spoken.digest == LabelSpace.load(recipe.data.label_space).digest
    small = recipe.debug()
    small.check()
    assert small.schedule.max_steps == 2
    assert all(name is None or name.startswith(RANDOM) for name in (small.model.start, small.loss.teacher))


@pytest.mark.parametrize(
    ("images", "epochs", "every"), [(32, 1000, 50), (300, 112, 6), (1600, 20, 1), (1_000_000, 20, 1)]
)
def test_few_images_are_seen_more_often(images, epochs, every):
    recipe = presets.finetune("resnet50.miil_in21k").counted(images)
    assert (recipe.schedule.epochs, recipe.run.evaluate_every) == (epochs, every)
    assert recipe.steps(images)[1] >= 1000
    assert recipe.counted(images) == recipe
    asked = override(presets.finetune("resnet50.miil_in21k"), ["schedule.epochs=5"]).counted(images)
    assert (asked.schedule.epochs, asked.run.evaluate_every) == (5, 1)
    short = override(presets.finetune("resnet50.miil_in21k"), ["schedule.max_steps=3"]).counted(images)
    assert short.steps(images)[1] == 3


def test_a_trial_of_a_trial_is_the_same():
    small = presets.in21k("mobilenetv3_large_100").debug()
    assert small.model.start is not None
    assert small.loss.teacher is not None
    small.name = "mine"
    assert small.debug() == small.model_copy(update={"name": "mine_debug"})


def test_a_trial_has_images_for_every_process():
    assert presets.in21k("resnet50").debug(3).micro_batches(3) == (2, 1)


def test_no_two_recipes_have_one_name():
    names = [load_recipe(where).name for where in ALL]
    assert len(set(names)) == len(names)


def test_there_is_a_recipe_for_every_published_checkpoint():
    recipes = {load_recipe(where).name for where in ALL}
    recipes |= {load_recipe(f"{FOLDER / architecture}.py:in21k:DIR").name for architecture in WITHOUT_START}
    assert {checkpoint.name for checkpoint in CHECKPOINTS if "miil" in checkpoint.name} <= recipes
    for architecture in presets.ARCHITECTURES:
        mine = set(listed_in(FOLDER / f"{architecture}.py"))
        scratch = set() if architecture in WITHOUT_START else {"in21k_from_scratch"}
        assert mine == scratch | {
            "in21k", "in21k_without_distillation", "in21k_winter21", "in21k_modern", "in1k",
            "in1k_without_distillation",
        }  # fmt: skip


@pytest.mark.parametrize("architecture", WITHOUT_START)
def test_what_begins_with_random_weights_says_so_unless_it_is_given_some(architecture):
    where = f"{FOLDER / architecture}.py"
    assert load_recipe(where) == presets.from_scratch(presets.in21k(architecture, "x"))
    assert load_recipe(where).name == f"{presets.ARCHITECTURES[architecture].record}_from_scratch"
    for name, optimizer, epochs in (
        ("in21k", "adam", 80),
        ("in21k_without_distillation", "adam", 80),
        ("in21k_winter21", "adam", 80),
        ("in21k_modern", "lamb", 90),
    ):
        given = load_recipe(f"{where}:{name}:folder/of weights")
        settings = (given.model.start, given.optimizer.name, given.schedule.epochs)
        assert settings == ("folder/of weights", optimizer, epochs)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_the_head_of_a_file_has_the_commands_and_the_cost(path):
    head = path.read_text().partition('"""\n')[0]
    assert re.search(r"chosen|our choice", head, re.IGNORECASE)
    # Each command on one line, without its label.
    text = re.sub(r"\\\n\s+", "", head)
    commands = [match[0].split() for match in re.finditer(r"(?:python -m|torchrun) .*", text)]
    trainer = ["-m", "wn21k_zoo.training.train", "--recipe", f"training/recipes/{path.name}"]
    nodes = ["--nnodes", "4", "--nproc-per-node", "8", "--rdzv-backend", "c10d", "--rdzv-endpoint", "HOST:29500"]
    starts = [command[: command.index("-m")] for command in commands]
    assert starts == [
        ["python"],
        ["torchrun", "--nproc-per-node", "8"],
        ["torchrun", *nodes],
    ]
    for command, before in zip(commands, starts, strict=True):
        arguments = command[len(before) :]
        assert arguments[:8] == [*trainer, "--data", "DIR", "--output", "DIR"]
        override(load_recipe(str(path)), arguments[9::2])  # the rest are --set options
        assert set(arguments[8::2]) <= {"--set"}
    if path.stem in (*presets.ARCHITECTURES, "baselines"):
        costs = {name: plan(load_recipe(f"{path}:{name}"), gpus=8) for name in listed_in(path)}
        assert [line.strip() for line in head.splitlines() if line.endswith(" hours")] == [
            f"{name:28} {cost.images_seen / 1e6:7,.0f} M images {cost.hours:7,.1f} hours"
            for name, cost in costs.items()
        ]
    else:
        assert "Images seen" in head


@pytest.mark.parametrize("architecture", presets.ARCHITECTURES)
def test_the_head_of_a_file_says_what_is_published_and_what_was_chosen(architecture):
    """The values are those of the recipes."""
    head = " ".join((FOLDER / f"{architecture}.py").read_text().partition('"""\n')[0].split())
    published, chosen = head.partition(" Published: ")[2].split(" Chosen, as it is not published: ")
    start = presets.ARCHITECTURES[architecture].start
    recipe, tuned = presets.in21k(architecture, start or "some weights"), presets.in1k(architecture)
    scratch = presets.from_scratch(recipe)
    for words in (
        f"Adam, learning rate {shown(recipe.optimizer.lr)}, weight decay {shown(recipe.optimizer.weight_decay)};",
        f"one cycle of {recipe.schedule.epochs} epochs, {100 * recipe.schedule.warmup:.0f} % of it warm-up;",
        f"label smoothing {recipe.loss.label_smoothing}; squash to {recipe.data.size},",
        f"with {recipe.loss.teacher} a good teacher;",
        f"SGD at {shown(scratch.optimizer.lr)} for {scratch.schedule.epochs} epochs;",
        f"on ImageNet-1K Adam at {shown(tuned.optimizer.lr)} and distillation.",
    ):
        assert words in published
    for words in (
        f"the distillation weight, {recipe.loss.distillation_weight:g},",
        f"on ImageNet-1K {tuned.schedule.epochs} epochs of batches of {tuned.data.batch_size}, smoothing "
        f"{tuned.loss.label_smoothing}, a moving average of {tuned.run.ema_decay} and a centre crop of "
        f"{tuned.data.crop_pct};",
        f"which ImageNet-1K weights to start from, here {start}" if start else "semantic softmax",
    ):
        assert words in chosen
    each = f"8 GPUs with {recipe.data.batch_size // 8} images each;"
    assert (each in published) != (f"batches of {recipe.data.batch_size};" in chosen)


def shown(number):
    return f"{number:.0e}".replace("e-0", "e-")


@pytest.mark.slow
@pytest.mark.parametrize("where", ALL, ids=short)
def test_every_recipe_takes_two_steps(where, images, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # hundreds of megabytes that are deleted right away
    recipe = load_recipe(where).debug()
    data = images / ("classes" if recipe.data.label_space is None else "shards")
    torch.set_num_threads(1)
    figures = train(recipe, data, tmp_path / "run", World(0, 1, torch.device("cpu")), workers=0)
    assert figures["step"] == 2
    assert figures["images"] > 0
    shutil.rmtree(tmp_path / "run")


def test_what_is_published_is_in_the_published_recipe():
    recipe = presets.in21k("resnet50")
    assert (recipe.optimizer.name, recipe.optimizer.lr, recipe.optimizer.weight_decay) == ("adam", 3e-4, 1e-4)
    assert (recipe.schedule.name, recipe.schedule.epochs) == ("one_cycle", 80)
    assert (recipe.schedule.warmup, recipe.schedule.start_divisor) == (0.1, 20)
    assert (recipe.data.batch_size, recipe.data.batch_per_device) == (512, 64)
    large = presets.in21k("tresnet_m").data
    assert (large.batch_size, large.batch_per_device) == (8 * 416, 416)
    assert (recipe.loss.kind, recipe.loss.label_smoothing) == ("semantic_softmax", 0.2)
    assert (recipe.data.augmentation, recipe.data.size, recipe.model.mean) == ("published", 224, (0, 0, 0))
    scratch = presets.from_scratch(recipe)
    assert (scratch.model.start, scratch.schedule.epochs) == (None, 140)
    assert (scratch.optimizer.name, scratch.optimizer.lr, scratch.optimizer.momentum) == ("sgd", 1e-2, 0)
    alone = load_recipe(f"{FOLDER / 'baselines.py'}:single_label_from_scratch")
    assert (alone.loss.kind, alone.loss.teacher, alone.loss.label_smoothing) == ("single_label", None, 0.2)
    assert (alone.optimizer, alone.schedule, alone.data) == (scratch.optimizer, scratch.schedule, scratch.data)
    tuned = presets.in1k("resnet50")
    assert (tuned.optimizer.name, tuned.optimizer.lr, tuned.optimizer.weight_decay) == ("adam", 2e-4, 1e-4)
    assert tuned.loss.teacher == "tresnet_v2_l.miil_in21k_ft_in1k"


def test_nothing_is_known_of_other_architectures():
    with pytest.raises(RecipeError, match="Did you mean resnet50"):
        presets.in21k("resnet51")
    with pytest.raises(RecipeError, match="resnet51"):
        presets.modern("resnet51", "weights")
    with pytest.raises(UnknownModelError):
        presets.finetune("resnet50.a1_in1kk")


@pytest.mark.parametrize("change", ["without_distillation", "winter21", "from_scratch", "single_label", "multi_label"])
def test_a_recipe_of_another_leaves_that_as_it_was(change):
    recipe, same = presets.in21k("resnet50"), presets.in21k("resnet50")
    changed = getattr(presets, change)(recipe)
    assert recipe == same
    assert changed != same


def test_a_folder_to_begin_with_may_be_a_path(tmp_path, monkeypatch):
    module = timm.create_model("resnet18", num_classes=3)
    save_for_hf(module, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    recipe = presets.finetune(Path("mine"))
    assert (recipe.name, recipe.model.start) == ("mine_finetuned", str(tmp_path / "mine"))


def test_classes_in_a_file_can_be_a_path(tmp_path):
    recipe = presets.in21k("resnet50")
    recipe.data.label_space = tmp_path / "mine.txt"
    assert recipe.data.label_space == str(tmp_path / "mine.txt")


def test_two_recipes_share_nothing():
    one, other = presets.in21k("resnet50"), presets.in21k("resnet50")
    one.optimizer.lr = 1.0
    assert other.optimizer.lr == 3e-4
    assert Recipe(name="x", model={"architecture": "resnet50"}).optimizer.lr == 3e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda recipe: setattr(recipe.data, "label_space", {*WNIDS}), "data.label_space cannot be .* list of wnids"),
        (
            lambda recipe: setattr(recipe.data, "label_space", [*WNIDS * 999, 1]),
            r"cannot be .{203}: Give a name, a file",
        ),
        (lambda recipe: setattr(recipe.data, "label_space", 5), "data.label_space cannot be 5: Give a name, a file"),
        (lambda recipe: setattr(recipe.optimizer, "lrr", 1), "optimizer has no field 'lrr'. Did you mean lr?"),
        (lambda recipe: setattr(recipe, "optimiser", 1), "recipe has no field 'optimiser'. Did you mean optimizer?"),
        (lambda recipe: setattr(recipe.optimizer, "lr", "fast"), r"optimizer.lr cannot be 'fast'"),
        (lambda recipe: setattr(recipe.optimizer, "lr", -1), r"optimizer.lr cannot be -1"),
        (lambda recipe: setattr(recipe.loss, "kind", "hinge"), "loss.kind cannot be 'hinge'"),
        (lambda recipe: setattr(recipe.schedule, "epochs", 1.5), "schedule.epochs cannot be 1.5"),
        (
            lambda recipe: setattr(recipe.schedule, "epochs", True),
            "schedule.epochs cannot be True: Input should not be",
        ),
        (lambda recipe: setattr(recipe.run, "seed", 2**64), "run.seed cannot be 18446744073709551616"),
        (
            lambda recipe: override(recipe, ["optimizer.lr=1e300"]),
            r"optimizer.lr cannot be 1e\+300: Input should be with",
        ),
        (lambda recipe: override(recipe, [f"schedule.epochs={10**400}"]), "schedule.epochs cannot be 100"),
        (
            lambda recipe: override(recipe, ["model.mean=[1e300,0,0]"]),
            "model.mean cannot be .*: Input should",
        ),
        (
            lambda recipe: override(recipe, ['model.arguments={"a": -1e300}']),
            "model.arguments cannot be .*: Input",
        ),
        (lambda recipe: override(recipe, ["data.cutmix=1e-300"]), "data.cutmix cannot be 1e-300: Input should be 0 or"),
        (lambda recipe: setattr(recipe.model, "mean", (0.0, 0.0)), "model.mean"),
        (lambda _: Recipe(name="x"), "recipe.model is missing"),
        (lambda _: Recipe(name="x", model={"architectur": "x"}), "model has no field 'architectur'. Did you mean arch"),
        (lambda _: Recipe(name="x", modle={}), "recipe has no field 'modle'. Did you mean model"),
        (lambda recipe: override(recipe, ["optimizer.lr"]), "write section.field=value"),
        (lambda recipe: override(recipe, ["optimizer=adam"]), "write section.field=value"),
        (lambda recipe: override(recipe, ["="]), "write section.field=value"),
        (lambda recipe: override(recipe, ["optimizer.lr=none"]), "optimizer.lr cannot be 'none'"),
        (lambda recipe: override(recipe, ['model.arguments={"a": null}']), r"model.arguments.a cannot be None: Input"),
        (lambda recipe: override(recipe, ["optimizer.lr.x=1"]), "A recipe has no field optimizer.lr.x"),
        (lambda recipe: override(recipe, ["schedule.epoch=3"]), "Did you mean epochs"),
        (
            lambda recipe: override(recipe, ["loss.temperature=3"]),
            r"loss\.temperature\. Fields of loss: kind",
        ),
        (
            lambda recipe: setattr(recipe.loss, "temperature", 3),
            "loss has no field 'temperature'. Fields of loss: kind",
        ),
    ],
)
def test_a_wrong_field_or_value_is_one_line(change, message):
    with pytest.raises(RecipeError, match=message) as error:
        change(small_recipe())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["loss.teacher=resnet50.miil_in21k"], "distillation_weight is 0"),
        (["loss.distillation_weight=1"], "there is no loss.teacher"),
        (["model.mean=[0.5,0.5,0.5]"], "not followed by a normalisation"),
        (["model.std=[0.5,0.5,0.5]"], "not followed by a normalisation"),
        (['model.arguments={"num_classes": 5}'], "model.arguments cannot have 'num_classes'"),
        (['model.arguments={"drop_path_rate": 5}'], "model.arguments.drop_path_rate cannot be 5: it is a share"),
        (['model.arguments={"drop_rate": -0.1}'], "model.arguments.drop_rate cannot be -0.1: it is a share"),
        (["data.label_space=winter"], "data.label_space: .* Did you mean winter21"),
        (["name=my cats/v2"], "use letters, digits, dots, - and _"),
        (["model.std=[0,1,1]"], "model.std must be at least 1e-6"),
        (["optimizer.betas=[0.9,1.0]"], "betas"),
        (["loss.kind=multi_label"], "no smoothing"),
        (
            ["loss.kind=multi_label", "loss.label_smoothing=0", "loss.teacher=x", "loss.distillation_weight=1"],
            "multi_label cannot be distilled",
        ),
        (["optimizer.momentum=0.5"], "momentum is for sgd"),
        (["optimizer.name=sgd", "optimizer.betas=[0.5,0.9]"], "betas are not for sgd"),
        (["schedule.name=constant", "schedule.end_divisor=3"], "no effect"),
    ],
)
def test_values_that_do_not_go_together(settings, message):
    with pytest.raises(RecipeError, match=message):
        override(small_recipe(), settings).check()


@pytest.mark.parametrize(("images", "processes"), [(509, 1), (3 * 127, 1), (2 * 127, 2)])
def test_a_batch_that_can_only_be_cut_into_crumbs(images, processes):
    recipe = override(small_recipe(), [f"data.batch_size={images}", "data.batch_per_device=64"])
    with pytest.raises(RecipeError, match=r"choose a data\.batch_size with more divisors"):
        recipe.micro_batches(processes)


def test_one_image_at_a_time_is_mixed_with_no_other():
    recipe = small_recipe(data={"mixup": 0.2, "batch_size": 8, "batch_per_device": 4})
    assert recipe.micro_batches(2) == (4, 1)
    with pytest.raises(RecipeError, match=r"cannot be mixed with another: raise data\.batch_size"):
        recipe.micro_batches(8)
    recipe.data.batch_per_device = 1
    with pytest.raises(RecipeError, match=r"cannot be mixed with another: raise data\.batch_per_device"):
        recipe.micro_batches(1)


def test_numbers_and_truth_as_python_writes_them():
    changed = override(
        small_recipe(), ["run.deterministic=True", "optimizer.lr=.1", "data.size=1_024", "data.window=+8"]
    )
    assert (changed.run.deterministic, changed.optimizer.lr, changed.data.size, changed.data.window) == (
        True,
        0.1,
        1024,
        8,
    )


def test_any_field_can_be_overridden():
    recipe = small_recipe()
    settings = ["optimizer.lr=1e-3", "model.start=none", "model.mean=[0.1, 0.2, 0.3]", "loss.kind=single_label"]
    settings += ["run.deterministic=true", 'model.arguments={"drop_rate": 0.1}']
    changed = override(recipe, settings)
    assert (changed.optimizer.lr, changed.model.start, changed.model.mean) == (1e-3, None, (0.1, 0.2, 0.3))
    assert changed.model.arguments == {"drop_rate": 0.1}
    assert recipe == small_recipe()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def broken(:\n", "SyntaxError"),
        ("import nothing_of_that_name\n", "ModuleNotFoundError"),
        ("x = 1\n", "has no function"),
        ("def f():\n    pass\n", "returns a NoneType, not a recipe"),
        ("def f():\n    return 1 / 0\n", "fails with ZeroDivisionError"),
        ("def f():\n    exit(3)\n", "fails with SystemExit: 3"),
        ("raise SystemExit('not here')\n", "SystemExit: not here"),
        ("def f(x):\n    pass\n", "has no function"),
        (
            "from wn21k_zoo.training import presets\ndef f():\n    recipe = presets.in21k('resnet50')\n"
            "    recipe.optimiser.lr = 1\n    return recipe\n",
            r"fails with AttributeError: .*'optimiser'.* Did you mean optimizer\?",
        ),
    ],
)
def test_a_recipe_file_that_does_not_work(tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(RecipeError, match=message) as error:
        load_recipe(str(tmp_path / "mine.py"))
    assert "\n" not in str(error.value)


def test_where_there_is_no_recipe(tmp_path):
    for where in (tmp_path, tmp_path / "nothing.py", tmp_path / "a.txt"):
        with pytest.raises(RecipeError, match=r"a recipe is FILE\.py:function"):
            load_recipe(str(where))
    with pytest.raises(RecipeError, match="Did you mean in21k"):
        load_recipe(f"{FOLDER / 'resnet50.py'}:in21")
    (tmp_path / "recipe.json").write_text("[]")
    with pytest.raises(RecipeError, match="Not a recipe"):
        load_recipe(str(tmp_path / "recipe.json"))


def test_ours_have_names(tmp_path, monkeypatch):
    assert shipped_recipes() == {path.stem: path for path in FOLDER.glob("*.py")}
    monkeypatch.chdir(tmp_path)
    assert load_recipe("resnet50") == load_recipe(str(FOLDER / "resnet50.py"))
    assert load_recipe("resnet50:in1k") == presets.in1k("resnet50")
    assert load_recipe("finetune::resnet50.miil_in21k") == presets.finetune("resnet50.miil_in21k")
    for where, near in (("resnet5", r"resnet50"), ("resnet50.py", "resnet50"), ("resnet50:in21", "in21k")):
        with pytest.raises(RecipeError, match=rf"Did you mean {near}\b"):
            load_recipe(where)
    (tmp_path / "resnet50").mkdir()
    assert load_recipe("resnet50") == presets.in21k("resnet50")
    (tmp_path / "resnet50" / "recipe.json").write_text(presets.in1k("resnet50").to_json())
    assert load_recipe("resnet50") == presets.in1k("resnet50")


def test_what_follows_a_recipe_is_its_argument(tmp_path):
    where = f"{FOLDER / 'finetune.py'}:finetune"
    assert load_recipe(where).model.start == "mobilenetv3_large_100.miil_in21k"
    assert load_recipe(f"{where}:convnext_tiny.in12k") == presets.finetune("convnext_tiny.in12k")
    assert load_recipe(f"{FOLDER / 'finetune.py'}::resnet50.miil_in21k") == presets.finetune("resnet50.miil_in21k")
    with pytest.raises(UnknownModelError, match="Did you mean"):
        load_recipe(f"{where}:resnet50.mil_in21k")
    mine = tmp_path / "mine.py"
    mine.write_text("def first():\n    pass\n\n\nfrom wn21k_zoo.training import presets\n\n\n"
                    "def of(start):\n    return presets.finetune(start)\n")  # fmt: skip
    assert load_recipe(f"{mine}:of:resnet50.miil_in21k") == presets.finetune("resnet50.miil_in21k")
    assert list(listed_in(mine)) == []
    with pytest.raises(RecipeError, match=r"The recipe of takes 1 argument; write .*mine\.py:of:TEXT"):
        load_recipe(f"{mine}:of")
    mine.write_text("def two(a, b):\n    pass\n")
    with pytest.raises(RecipeError, match="takes 2 arguments, but can be given at most one"):
        load_recipe(f"{mine}::x")
    mine.write_text("")
    with pytest.raises(RecipeError, match="has no function"):
        load_recipe(f"{mine}:f")
    with pytest.raises(RecipeError, match="in1k takes no argument"):
        load_recipe(f"{FOLDER / 'resnet50.py'}:in1k:x")
    (tmp_path / "recipe.json").write_bytes(b"\xff\xff")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(str(tmp_path / "recipe.json"))


def test_finetuning_begins_with_any_folder_that_says_what_it_is(tmp_path):
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    settings = {"input_size": (3, 32, 32), "mean": (0.1,) * 3, "std": (0.2,) * 3, "crop_pct": 0.9}
    save_for_hf(model, tmp_path / "model", model_config={"pretrained_cfg": settings}, model_args={"img_size": 32})
    recipe = load_recipe(f"{FOLDER / 'finetune.py'}:finetune:{tmp_path / 'model'}/")
    assert (recipe.name, recipe.model.architecture) == ("model_finetuned", "test_vit")
    assert (recipe.data.size, recipe.data.crop_pct, recipe.model.mean, recipe.model.std) == (
        32, 0.9, (0.1,) * 3, (0.2,) * 3,
    )  # fmt: skip
    recipe.schedule.max_steps = 2
    data = make_folder(tmp_path / "images", images=10)
    assert train(recipe, data, tmp_path / "run", World(0, 1, torch.device("cpu")), workers=0)["images"] == 6
    squashed = settings | {"crop_mode": "squash"}
    save_for_hf(model, tmp_path / "squashed", model_config={"pretrained_cfg": squashed})
    assert presets.finetune(str(tmp_path / "squashed")).data.crop_pct is None
    grey = {"architecture": "test_vit", "pretrained_cfg": settings | {"mean": [0.5]}}
    (tmp_path / "squashed" / "config.json").write_text(json.dumps(grey))
    with pytest.raises(RecipeError, match="mean"):
        presets.finetune(str(tmp_path / "squashed"))
    (tmp_path / "squashed" / "config.json").write_text('{"architecture": "test_vit"}')
    with pytest.raises(ModelError, match="input_size is not stated"):
        presets.finetune(str(tmp_path / "squashed"))
    with pytest.raises(InvalidArgumentError, match="is the folder of a run; `wn21k train export"):
        export_folder(str(tmp_path / "run"), tmp_path / "exported")
    with pytest.raises(ModelError, match="is the folder of a run; `wn21k train export"):
        presets.finetune(str(tmp_path / "run"))
    with pytest.raises(UnknownModelError, match=r"is a file; .* makes one from a run"):
        presets.finetune(str(next((tmp_path / "run" / "checkpoints").iterdir())))
    with pytest.raises(UnknownModelError, match="There is no folder"):
        presets.finetune("nowhere/at/all")


def test_a_recipe_may_import_its_neighbours(tmp_path):
    (tmp_path / "base.py").write_text((FOLDER / "resnet50.py").read_text())
    (tmp_path / "mine.py").write_text("import base\n\ndef mine():\n    return base.in1k()\n")
    assert load_recipe(str(tmp_path / "mine.py")) == presets.in1k("resnet50")
    assert not (tmp_path / "__pycache__").exists()


def test_a_recipe_file_may_have_classes_of_its_own(tmp_path):
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    text += "from wn21k_zoo.training import presets\n"
    text += "@dataclass\nclass Mine:\n    epochs: int = 3\n\n"
    text += "def mine():\n    recipe = presets.in1k('resnet50')\n    recipe.schedule.epochs = Mine().epochs\n"
    (tmp_path / "mine.py").write_text(text + "    return recipe\n")
    assert load_recipe(str(tmp_path / "mine.py")).schedule.epochs == 3


def test_none_is_a_value_where_it_is_one():
    recipe = presets.in21k("resnet50")
    assert override(recipe, ["data.augmentation=none"]).data.augmentation == "none"
    assert override(recipe, ["loss.teacher=none", "data.label_space=None"]).loss.teacher is None


@pytest.mark.parametrize(
    ("architecture", "size", "arguments"),
    [
        ("resnet18", 32, {}), ("maxvit_tiny_tf_224", 32, {"img_size": 32}), ("inception_v3", 224, {}),
    ],
)  # fmt: skip
def test_a_trial_has_small_images_where_the_network_takes_them(architecture, size, arguments):
    recipe = presets.in21k("resnet50")
    recipe.model.architecture = architecture
    small = recipe.debug()
    assert (small.data.size, small.model.arguments) == (size, arguments)


@pytest.mark.parametrize("field", ["model.start", "loss.teacher"])
def test_a_trial_finds_names_that_nothing_has(images, tmp_path, field):
    recipe = override(presets.in21k("mobilenetv3_large_100"), [f"{field}=resnet50.mill_in21k"]).debug()
    with pytest.raises(UnknownModelError, match=r"Did you mean resnet50\.miil_in21k"):
        train(recipe, images / "shards", tmp_path, World(0, 1, torch.device("cpu")), workers=0)


@pytest.mark.parametrize(
    ("field", "name", "message"),
    [
        ("model.start", "nowhere/", "There is no folder"),
        ("model.start", "file.pth", "is a file; name the folder"),
        ("model.start", "empty", r"has no config\.json"),
        ("loss.teacher", "nowhere/", "There is no folder"),
        ("loss.teacher", "nowhere.pt", "There is no checkpoint"),
    ],
)
def test_a_trial_warns_of_places_where_nothing_is(images, tmp_path, caplog, field, name, message):
    (tmp_path / "file.pth").touch()
    (tmp_path / "empty").mkdir()
    changes = ["model.architecture=test_efficientnet", "model.start=null", f"{field}={tmp_path}/{name}"]
    changes += ["loss.teacher=null", "loss.distillation_weight=0"] * (field == "model.start")
    recipe = override(presets.in21k("mobilenetv3_large_100"), changes).debug()
    train(recipe, images / "shards", tmp_path / "run", World(0, 1, torch.device("cpu")), workers=0)
    assert re.search(rf"the run itself will not start yet, because of {field}: .*{message}", caplog.text)


@pytest.mark.parametrize(
    ("setting", "near"),
    [
        ("lr=1", "Did you mean optimizer.lr?"),
        ("optimiser.lr=1", "Did you mean optimizer.lr?"),
        ("seed=1", "run.seed"),
        ("run.epochs=1", "Did you mean schedule.epochs?"),
        ("optimizer.learning_rate=1", "Did you mean optimizer.lr?"),
        ("learning_rate=1", "Did you mean optimizer.lr?"),
        ("run.ema=0.9", "Did you mean run.ema_decay?"),
        ("model.pretrained=true", "Did you mean model.start?"),
        ("model.mean=0.5,0.5,0.5", "write a list, such as [0.0, 0.0, 0.0]"),
        ("optimizer.betas=0.9", "write a list, such as [0.9, 0.999]"),
        ("schedule.epochs=many", "Input should be a number"),
        ("model.compile=maybe", "Input should be true or false"),
    ],
)
def test_a_field_in_the_wrong_place_is_found(setting, near):
    with pytest.raises(RecipeError, match=re.escape(near)):
        override(presets.in21k("resnet50"), [setting])


@pytest.mark.parametrize("value", ["3", "3.0", b"3", "1e2"])
def test_text_is_no_number(value):
    recipe = presets.in21k("resnet50")
    for section, field in ((recipe.schedule, "epochs"), (recipe.schedule, "max_steps"), (recipe.optimizer, "lr")):
        with pytest.raises(RecipeError, match=rf"{field} cannot be"):
            setattr(section, field, value)
    for value_of_truth in (1, "true", 0.0):
        with pytest.raises(RecipeError, match="compile cannot be"):
            recipe.model.compile = value_of_truth
    with pytest.raises(RecipeError, match="Did you mean lr"):
        recipe.optimizer.learning_rate = 3


def test_the_folder_of_a_run_stands_for_its_recipe(tmp_path):
    recipe = presets.in21k("resnet50")
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    assert load_recipe(str(tmp_path)) == recipe
    (tmp_path / "recipe.json").write_text("[1]")
    with pytest.raises(RecipeError, match=r"recipe\.json: Not a recipe"):
        load_recipe(str(tmp_path))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data.size", 15), ("data.batch_size", 0), ("data.crop_pct", 0.0), ("data.max_bad", 1.5), ("data.window", 0),
        ("loss.label_smoothing", 1.0), ("loss.distillation_weight", -1.0), ("optimizer.lr", 0.0),
        ("optimizer.lr", float("inf")), ("optimizer.lr", float("nan")), ("optimizer.weight_decay", -1.0),
        ("optimizer.momentum", 1.0), ("optimizer.clip_norm", 0.0), ("schedule.epochs", 0), ("schedule.warmup", 1.0),
        ("schedule.end_divisor", 0.5), ("run.ema_decay", 1.0), ("run.ema_decay", 0.0), ("run.keep", 0),
    ],
)  # fmt: skip
def test_a_number_out_of_its_range_is_refused(field, value):
    section, name = field.split(".")
    with pytest.raises(RecipeError, match=re.escape(field)):
        setattr(getattr(small_recipe(), section), name, value)


@pytest.mark.parametrize("name", [".hidden", "-x", "_x", ""])
def test_names_that_begin_oddly(name):
    recipe = small_recipe()
    recipe.name = name
    with pytest.raises(RecipeError, match="letters, digits"):
        recipe.check()


def test_how_evenly_a_batch_must_be_shared():
    recipe = override(small_recipe(), ["data.batch_size=85", "data.batch_per_device=64"])
    assert recipe.micro_batches(1) == (17, 5)  # a quarter of what would fit is enough
    recipe.data.batch_size = 65
    with pytest.raises(RecipeError, match="more divisors"):
        recipe.micro_batches(1)


def test_a_trial_is_small_and_plain():
    recipe = presets.in21k("resnet50")
    recipe.model.compile = recipe.model.sync_batchnorm = True
    recipe.run.deterministic = True
    small = recipe.debug(8)
    assert (small.data.batch_size, small.data.batch_per_device, small.micro_batches(8)) == (16, 2, (2, 1))
    assert (small.model.compile, small.model.sync_batchnorm, small.run.evaluate_batches) == (False, False, 1)
    assert (small.run.precision, small.schedule.max_steps, small.data.window) == ("fp32", 2, 1)
    assert recipe.model.compile


def test_a_recipe_file_has_its_helpers_and_leaves_the_path_alone(tmp_path, monkeypatch):
    text = "from wn21k_zoo.training import presets\n"
    text += "def _base():\n    return presets.in21k('resnet50')\n"
    text += "def of(start):\n    return presets.finetune(start)\n"
    text += "def mine():\n    return presets.in1k('resnet50')\n"
    (tmp_path / "mine.py").write_text(text)
    before = list(sys.path)
    assert load_recipe(str(tmp_path / "mine.py")) == presets.in1k("resnet50")  # the first recipe that needs no argument
    assert sys.path == before
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    assert load_recipe("~/mine.py:mine") == presets.in1k("resnet50")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text(presets.in1k("resnet50").to_json())
    assert load_recipe("~/run") == presets.in1k("resnet50")


def test_spaces_around_a_value_are_none_of_it():
    assert override(small_recipe(), ["optimizer.name = adamw"]).optimizer.name == "adamw"


@pytest.mark.parametrize(
    ("kind", "head"),
    [("semantic_softmax", "semantic_softmax"), ("single_label", "softmax"), ("multi_label", "sigmoid")],
)
def test_how_outputs_are_read(kind, head):
    assert small_recipe(loss={"kind": kind}).loss.head == head


def test_what_was_chosen_is_in_the_recipes():
    recipe = presets.in21k("resnet50", "mine")
    assert (recipe.model.start, recipe.run.precision) == ("mine", "fp16")  # not the known start
    assert (recipe.loss.teacher, recipe.loss.distillation_weight) == ("tresnet_v2_l.miil_in21k", 10)
    assert presets.in21k("tresnet_v2_l").loss.teacher == "vit_base_patch16_224_miil.in21k"
    tuned = presets.in1k("resnet50")
    assert (tuned.model.start, tuned.data.crop_pct) == ("resnet50.miil_in21k", 0.875)
    assert (tuned.loss.distillation_weight, tuned.run.ema_decay) == (10, 0.9997)
    chosen = {
        name: (recipe.optimizer.name, recipe.optimizer.lr, recipe.optimizer.weight_decay, recipe.model.arguments)
        for name in presets.ARCHITECTURES
        if (recipe := presets.modern(name))
    }
    for name, settings in chosen.items():
        transformer = name.startswith(("vit_", "mixer_"))
        expected = ("adamw", 5e-4, 0.03, {"drop_path_rate": 0.1}) if transformer else ("lamb", 3e-3, 0.02, {})
        assert settings == expected, name
    assert (presets.modern("resnet50").run.ema_decay, presets.modern("resnet50").run.precision) == (0.9999, "bf16")
    own = presets.finetune("resnet50.miil_in21k")
    assert (own.optimizer.head_lr_factor, own.optimizer.clip_norm, own.data.crop_pct) == (10, 1, None)
    assert (own.model.mean, own.model.std) == ((0, 0, 0), (1, 1, 1))
    assert presets.finetune("efficientnet_lite0.embedded_in1k").data.crop_pct == 0.875


def test_what_macos_lays_beside_recipes_is_none(tmp_path):
    lines = ("from wn21k_zoo.training import presets", "def mine():", "    return presets.finetune()")
    (tmp_path / "mine.py").write_text("\n".join(lines))
    (tmp_path / "._mine.py").write_bytes(b"\0")
    result = CliRunner().invoke(app, ["train", "list", str(tmp_path), "-f", "jsonl"])
    assert result.exit_code == 0
    assert [json.loads(line)["recipe"] for line in result.stdout.splitlines()] == [f"{tmp_path / 'mine.py'}:mine"]


def test_a_list_runs_no_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from wn21k_zoo.training import presets, recipe\n"
        "open('ran', 'w')\n"
        "def plain():\n    return presets.finetune()\n"
        "def annotated(start: str = 'x', *, of: int = 1) -> recipe.Recipe:\n    'Of mine.\\n\\nMore.'\n    ...\n"
        "def maybe() -> 'recipe.Recipe | None': ...\n"
        "def of(start) -> recipe.Recipe: ...\n"
        "def any_of(*starts) -> recipe.Recipe: ...\n"
        "def with_name(*, start) -> recipe.Recipe: ...\n"
        "def number() -> int:\n    return 1\n"
        "def nothing():\n    print()\n"
        "def _hidden():\n    return presets.finetune()\n"
    )
    assert listed_in(tmp_path / "mine.py") == {"plain": "", "annotated": "Of mine.", "maybe": ""}
    assert not Path("ran").exists()
    text = "# \u00e9\ndef mine():\n    return 1\n"
    (tmp_path / "mine.py").write_text(text, encoding="utf-8-sig")
    assert list(listed_in(tmp_path / "mine.py")) == ["mine"]
    (tmp_path / "mine.py").write_text(f"# coding: latin-1\n{text}", encoding="latin-1")
    assert list(listed_in(tmp_path / "mine.py")) == ["mine"]


@pytest.mark.parametrize("where", [r"D:\runs\mine", "D:/runs/mine"])
def test_a_drive_of_windows_is_no_name_of_a_recipe(where):
    with pytest.raises(RecipeError, match=re.escape(f"{where} is not a recipe file")):
        load_recipe(where)


def test_one_argument_of_the_network_alone():
    recipe = override(small_recipe(model={"arguments": {"depth": 2}}), ["model.arguments.img_size=32"])
    assert recipe.model.arguments == {"depth": 2, "img_size": 32}
    recipe = override(recipe, ["model.arguments. act_layer =gelu", "model.arguments.drop_path_rate=.1"])
    assert recipe.model.arguments == {"depth": 2, "img_size": 32, "act_layer": "gelu", "drop_path_rate": 0.1}
    for wrong in ("model.arguments.", "model.arguments.img_size", "model.arguments.a.b=1", "model.arguments.a-b=1"):
        with pytest.raises(RecipeError):
            override(recipe, [wrong])
