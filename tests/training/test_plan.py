import pytest
import timm
import torch
from timm.models import save_for_hf

from wn21k_zoo.errors import RecipeError, UnknownModelError
from wn21k_zoo.training import presets
from wn21k_zoo.training.engine import train
from wn21k_zoo.training.plan import plan
from wn21k_zoo.training.recipe_files import override
from wn21k_zoo.training.state import RunFolder

from .runs import make_folder, small_recipe


def test_a_plan_counts_the_teacher_wherever_it_is(tmp_path, caplog):
    recipe = presets.in21k("resnet50")
    with_record = plan(recipe, images_per_second=100)
    save_for_hf(timm.create_model("tresnet_v2_l", num_classes=3), tmp_path / "teacher")
    recipe.loss.teacher = str(tmp_path / "teacher")
    assert plan(recipe, images_per_second=100).memory_gb == with_record.memory_gb
    of_run = RunFolder(tmp_path / "run")
    of_run.begin(small_recipe("tresnet_v2_l"), {})
    assert not caplog.text
    recipe.loss.teacher = str(of_run.checkpoints / "step-00000006.pt")
    assert plan(recipe, images_per_second=100).memory_gb == with_record.memory_gb
    assert "will not start yet, because of loss.teacher: There is no checkpoint" in caplog.text
    recipe.loss.teacher = "nowhere/teacher"
    without = plan(recipe, images_per_second=100)
    assert without.memory_gb < with_record.memory_gb
    assert "without the teacher" in without.assumed
    recipe.loss.teacher = "vit_small_patch14_dinov2.lvd142m"
    with pytest.raises(RecipeError, match="not known to be synsets, so they say nothing"):
        plan(recipe, images_per_second=100)
    recipe.loss.teacher = "tresnet_v2_m"
    with pytest.raises(UnknownModelError, match="Did you mean"):
        plan(recipe, images_per_second=100)


def test_a_plan_is_of_the_network_that_the_start_says(tmp_path, caplog):
    arguments = {"img_size": 32, "depth": 1}
    save_for_hf(
        timm.create_model("test_vit", num_classes=3, **arguments),
        tmp_path / "start",
        model_config={},
        model_args=arguments,
    )
    recipe = small_recipe("test_vit", model={"start": str(tmp_path / "start")})
    small = plan(recipe, images_per_second=100, images=100)
    recipe.model.start = None
    recipe.model.arguments = {"img_size": 32}
    assert small.memory_gb < plan(recipe, images_per_second=100, images=100).memory_gb
    recipe.model.start = str(tmp_path / "start")
    (tmp_path / "start" / "config.json").write_text("{")
    plan(recipe, images_per_second=100, images=100)
    assert "will not start yet, because of model.start" in caplog.text
    recipe.model.start = "resnet50.miil_in21kk"
    with pytest.raises(UnknownModelError, match=r"Did you mean .*miil_in21k"):
        plan(recipe, images_per_second=100, images=100)


@pytest.mark.parametrize("speed", [0.0, -1.0, float("inf"), float("nan")])
def test_a_speed_that_is_none(speed):
    with pytest.raises(RecipeError, match="is not a speed"):
        plan(presets.in21k("resnet50"), images_per_second=speed)


def test_a_plan_of_fewer_steps_than_epochs_have():
    recipe = small_recipe(schedule={"epochs": 2, "max_steps": 7})
    figures = plan(recipe, images=80, images_per_second=10)
    assert (figures.steps_per_epoch, figures.steps, figures.epochs, figures.images_seen) == (10, 7, 0.7, 56)
    recipe.schedule.max_steps = 21
    assert plan(recipe, images=80).steps == 20


def test_a_plan_counts_what_a_run_does():
    recipe = presets.in21k("resnet50")
    for gpus, accumulation in ((1, 8), (8, 1), (16, 1)):
        figures = plan(recipe, gpus=gpus, images_per_second=1000)
        assert figures.steps == 80 * (11_797_632 // 512)
        assert figures.accumulation == accumulation
        assert figures.batch_per_gpu * accumulation * gpus == 512
        assert figures.hours == pytest.approx(figures.steps * 512 / 1000 / gpus / 3600, abs=0.1)
    assert figures.parameters == sum(parameter.numel() for parameter in _resnet().parameters())
    with pytest.raises(RecipeError, match="cannot be divided among 3"):
        plan(recipe, gpus=3)
    with pytest.raises(RecipeError, match="give --data or --images"):
        plan(small_recipe())
    for few in (0, 10):
        with pytest.raises(RecipeError, match=r"fewer than data\.batch_size"):
            plan(recipe, images=few)
    assert plan(small_recipe(), images=1000).hours is None
    assert plan(small_recipe(), images=800, gpus=1, images_per_second=10).hours == 0.044  # 1,600 images
    small = override(small_recipe("test_vit"), ["model.arguments.img_size=32"])
    assert plan(small, images=1000).steps > 0
    with pytest.raises(RecipeError, match=r"does not take images of 32 pixels: .*arguments\.img_size=32"):
        plan(small_recipe("vit_tiny_patch16_224"), images=1000)
    with pytest.raises(RecipeError, match="test_vit cannot be built"):
        plan(override(small, ['model.arguments={"no_such": 1}']), images=1000)


def test_a_plan_says_when_batch_statistics_come_from_few_images():
    recipe = presets.in21k("resnet50")
    assert "over 8 images per process" in plan(recipe, gpus=64).remarks
    assert "with 288 images at a time (here 8)" in plan(recipe, gpus=64).assumed
    for change, gpus in (("", 8), ("model.sync_batchnorm=true", 64), ("model.freeze_backbone=true", 64)):
        assert plan(override(recipe, change.split()), gpus=gpus).remarks == ""
    assert plan(presets.in21k("vit_base_patch16_224_miil"), gpus=64).remarks == ""
    few = override(recipe, ["data.batch_per_device=8"])  # set by the user
    assert plan(few, gpus=1).remarks == plan(few, gpus=2).remarks == ""


def test_a_plan_of_a_classifier_alone_needs_less():
    recipe = presets.finetune("vit_base_patch16_224_miil.in21k")
    whole = plan(recipe, images=1000, gpus=1)
    recipe.model.freeze_backbone = True
    alone = plan(recipe, images=1000, gpus=1)
    assert alone.parameters == whole.parameters
    assert alone.memory_gb < 0.1 * whole.memory_gb
    recipe = presets.without_distillation(presets.in21k("resnet50"))
    recipe.model.freeze_backbone = True
    assert plan(recipe).hours is None


def test_a_published_speed_is_of_the_published_network():
    recipe = presets.without_distillation(presets.in21k("resnet50"))
    for argument in ("drop_path_rate=0.1", "global_pool=avg"):
        assert plan(override(recipe, [f"model.arguments.{argument}"])).hours == plan(recipe).hours
    of_start = presets.without_distillation(presets.in21k("vit_base_patch16_224_miil"))
    assert plan(override(of_start, ["model.arguments.img_size=224"])).hours == plan(of_start).hours == 96.4
    other = plan(override(recipe, ['model.arguments={"layers": [1, 1, 1, 1]}']))
    assert other.hours is None
    assert "without model.arguments.layers; give images per second" in other.assumed


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_memory_of_a_plan_is_near_what_torch_counts(checkpointing):
    recipe = small_recipe("resnet18")
    recipe.data.size, recipe.data.batch_size, recipe.data.batch_per_device = 128, 32, 32
    recipe.optimizer.name, recipe.model.gradient_checkpointing = "adam", checkpointing
    network = timm.create_model("resnet18")
    network.set_grad_checkpointing(checkpointing)
    optimizer = torch.optim.Adam(network.parameters())
    tracker = pytest.importorskip("torch.distributed._tools.mem_tracker").MemTracker()
    tracker.track_external(network, optimizer)
    with tracker:
        for _ in range(2):
            network(torch.rand(32, 3, 128, 128)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            tracker.reset_mod_stats()
    peak = sum(parts["Total"] for parts in tracker.get_tracker_snapshot("peak").values())
    assert plan(recipe, gpus=1, images=1000).memory_gb == pytest.approx(peak / 1e9, rel=0.25)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_the_disk_of_a_plan_is_that_of_checkpoints(tmp_path, name):
    recipe = small_recipe("mobilenetv3_small_050", optimizer={"name": name, "lr": 1e-3})
    recipe.schedule.max_steps, recipe.run.ema_decay = 1, 0.99 if name == "adam" else None
    train(recipe, make_folder(tmp_path / "images"), tmp_path / "run", workers=0)
    (checkpoint,) = RunFolder(tmp_path / "run").checkpoints.glob("step-*.pt")
    found = plan(recipe, gpus=1, images=54, classes=6).disk_gb
    assert found == pytest.approx((recipe.run.keep + 2) * checkpoint.stat().st_size / 1e9, rel=0.1)


def _resnet():
    return timm.create_model("resnet50", num_classes=11_221)


@pytest.mark.parametrize(
    "change", [{"data": {"size": 448}}, {"run": {"precision": "fp32"}}, {"model": {"gradient_checkpointing": True}}]
)
def test_a_speed_is_not_taken_for_that_of_another_training(change):
    recipe = presets.in21k("resnet50")
    assert plan(recipe).hours == 68.0
    for section, fields in change.items():
        for name, value in fields.items():
            setattr(getattr(recipe, section), name, value)
    figures = plan(recipe)
    assert figures.hours is None
    assert "224 pixels in half precision" in figures.assumed


def test_a_plan_has_the_steps_that_are_asked_for_at_most():
    recipe = small_recipe(schedule={"epochs": 2})
    for most, steps in ((None, 250), (10, 10), (10**6, 250)):
        recipe.schedule.max_steps = most
        figures = plan(recipe, images=1000, gpus=1)
        assert (figures.steps, figures.images_seen) == (steps, 8 * steps)


def test_the_memory_of_a_plan_has_its_parts():
    def memory(gpus=8, **changes):
        recipe = presets.without_distillation(presets.in21k("vit_base_patch16_224_miil"))
        for section, fields in changes.items():
            for name, value in fields.items():
                setattr(getattr(recipe, section), name, value)
        return plan(recipe, gpus=gpus, images_per_second=1).memory_gb

    plain = memory()
    parameters = plan(presets.in21k("vit_base_patch16_224_miil"), images_per_second=1).parameters / 1e9  # about 0.094
    assert memory(gpus=1) == plain  # the batch of a step is accumulated
    assert memory(gpus=2) - plain == pytest.approx(4 * parameters, abs=0.11)  # and its gradients reduced over ranks
    assert memory(run={"precision": "bf16"}) == plain
    assert memory(run={"ema_decay": 0.9}) - plain == pytest.approx(4 * parameters, abs=0.11)
    assert plain - memory(optimizer={"name": "sgd"}) == pytest.approx(4 * parameters, abs=0.11)
    kept = 2 * (plain - memory(gpus=1, data={"batch_per_device": 32}))  # for 64 images
    single = memory(run={"precision": "fp32"})
    assert single - plain == pytest.approx(kept - 2 * parameters, rel=0.1)
    taught = memory(loss={"teacher": "vit_base_patch16_224_miil.in21k", "distillation_weight": 1.0})
    assert taught - plain == pytest.approx(6 * parameters, abs=0.11)  # in fp32 and in fp16


def test_a_speed_is_not_taken_for_that_of_smaller_images():
    recipe = presets.in21k("resnet50")
    recipe.data.size = 160
    assert plan(recipe).hours is None
