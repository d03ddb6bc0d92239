"""What a learner does in between: the engine tests compare only whole runs."""

import math
from types import SimpleNamespace

import pytest
import timm
import torch

from wn21k_zoo.errors import BadImagesError, RecipeError
from wn21k_zoo.training import engine
from wn21k_zoo.training.agreement import Agreement
from wn21k_zoo.training.checkpoint_writer import copied
from wn21k_zoo.training.data import Batch
from wn21k_zoo.training.distributed import World
from wn21k_zoo.training.learner import Learner
from wn21k_zoo.training.signals import Signals
from wn21k_zoo.training.splits import open_splits

from .checks import ALONE
from .runs import WNIDS, make_folder, small_recipe

ONE = Batch(torch.rand(1, 3, 32, 32), torch.arange(1), torch.arange(1))
NOTHING = Batch(torch.empty(0, 3, 1, 1), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))


def learner_of(images, architecture="test_efficientnet", **sections):
    recipe = small_recipe(architecture, **sections)
    return Learner(recipe, open_splits(recipe, images), ALONE, 12)


def some_batch():
    return Batch(torch.rand(4, 3, 32, 32), torch.arange(4), torch.arange(4))


def test_a_batch_without_images_changes_nothing(data):
    learner = learner_of(data)
    learner.begin()
    before = {name: buffer.clone() for name, buffer in learner.module.named_buffers()}
    loss = learner.loss(NOTHING)
    learner.backward(loss)
    assert float(loss.detach()) == 0
    assert all(not parameter.grad.any() for parameter in learner.module.parameters())
    assert all(torch.equal(before[name], buffer) for name, buffer in learner.module.named_buffers())
    assert float(learner.loss(some_batch()).detach()) > 0  # back in training mode
    assert any(not torch.equal(before[name], buffer) for name, buffer in learner.module.named_buffers())


@pytest.mark.parametrize("names", [WNIDS, "abcdef"])
def test_logits_are_adjusted_by_the_training_images(tmp_path, names):
    images = make_folder(tmp_path / "images", names=names)
    for number in range(2, 10):
        (images / names[0] / f"{number}.jpg").unlink()
    assert learner_of(images, loss={"kind": "single_label"}).criterion.adjustment is None
    learner = learner_of(images, loss={"kind": "single_label", "logit_adjustment": 1.0})
    adjustment = learner.criterion.adjustment
    if learner.levels is not None:
        adjustment = adjustment[learner.levels.positions]
    of_class = dict(zip(sorted(names), adjustment.tolist(), strict=True))
    assert of_class.pop(names[0]) < min(of_class.values()) - 1


def test_a_batch_without_images_cannot_be_where_ranks_share_statistics(data):
    learner = learner_of(data)
    learner._world, learner._recipe.model.sync_batchnorm = World(0, 2, torch.device("cpu")), True
    with pytest.raises(BadImagesError, match=r"sync_batchnorm needs at least one"):
        learner.loss(NOTHING)


@pytest.mark.parametrize(
    ("sizes", "field"),
    [({"batch_per_device": 1}, "batch_per_device"), ({"batch_size": 1, "batch_per_device": 4}, "batch_size")],
)
def test_one_image_alone_cannot_train_batch_normalisation(data, sizes, field):
    with pytest.raises(RecipeError, match=rf"One image alone .* raise data\.{field}\."):
        learner_of(data, data=sizes)
    learner = learner_of(data, data={**sizes, "size": 64})  # where every layer has several positions
    expected = dict(timm.create_model("test_efficientnet").named_buffers())
    assert learner._buffers
    assert all(torch.equal(each, expected[name]) for name, each in learner._buffers.items())  # they are as they were


def test_one_image_that_is_left_of_more_is_left_out_where_it_must(data):
    learner = learner_of(data)
    learner.begin()
    before = copied(dict(learner.module.named_buffers()))
    loss = learner.loss(ONE)
    learner.backward(loss)
    assert float(loss.detach()) == 0
    assert all(torch.equal(buffer, before[name]) for name, buffer in learner.module.named_buffers())
    learner = learner_of(data, "test_convnext")
    learner.begin()
    assert float(learner.loss(ONE).detach()) > 0


def test_after_an_evaluation_all_parts_are_trained_again(data):
    learner = learner_of(data)
    learner.network = torch.nn.Sequential(learner.module)  # a wrapper, as for several ranks
    for _ in range(2):
        learner.begin()
        assert all(part.training for part in learner.module.modules())
        assert not any(part.training for part in learner.subject().modules())


@pytest.mark.parametrize("name", [pytest.param("adam", marks=pytest.mark.slow), "adamw", "sgd"])
def test_a_gpu_goes_on_where_a_cpu_was(data, name, monkeypatch):
    """Optimizers are fused there, which takes another path through the fp16 scaler."""
    sections = {"architecture": "test_convnext", "optimizer": {"name": name, "clip_norm": 1.0}}
    sections["run"] = {"precision": "fp32" if name == "sgd" else "fp16", "ema_decay": 0.9}
    plain = learner_of(data, **sections)

    def steps(learner, first=1.0):
        torch.manual_seed(1)
        for factor in (first, 1.0):
            learner.begin()
            learner.backward(learner.loss(some_batch()) * factor)
            learner.update()
        return copied(learner.state_dict())

    overflow = 1.0 if name == "sgd" else math.inf
    begun = steps(plain, overflow)
    kind = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD"}[name]
    made = getattr(torch.optim, kind)
    monkeypatch.setattr(torch.optim, kind, lambda *groups, fused, **options: made(*groups, fused=True, **options))
    fused = learner_of(data, **sections)
    fused.module.load_state_dict(learner_of(data, **sections).module.state_dict())
    for key, value in steps(fused, overflow)["model"].items():
        torch.testing.assert_close(value, begun["model"][key], rtol=0, atol=1e-6, msg=key)
    fused.load_state_dict(begun)
    assert all(group["fused"] for group in fused.optimizer.param_groups)
    one, other = steps(plain), steps(fused)
    assert any((one["model"][key] - value).abs().max() > 1e-5 for key, value in begun["model"].items())
    for key, value in one["model"].items():
        torch.testing.assert_close(other["model"][key], value, rtol=0, atol=1e-6, msg=key)
    plain.load_state_dict(other)  # and back
    assert not any(group["fused"] for group in plain.optimizer.param_groups)
    steps(plain)


@pytest.mark.parametrize("decay", [None, 0.9])
def test_what_is_evaluated_is_the_average_in_evaluation(data, decay):
    learner = learner_of(data, run={"ema_decay": decay})
    learner.begin()
    subject = learner.subject()
    assert not subject.training
    assert not any(module.training for module in subject.modules())
    assert (subject is learner.module) == (decay is None)
    learner.begin()
    assert learner.network.training


@pytest.mark.parametrize("changes", [{"head_lr_factor": 10.0}, {"head_lr_factor": 0.1}, {"layer_decay": 0.5}, {}])
@pytest.mark.parametrize("freeze", [True, False])
def test_the_rate_is_that_before_factors(data, changes, freeze):
    schedule, model = {"name": "constant", "warmup": 0.0}, {"freeze_backbone": freeze}
    learner = learner_of(data, optimizer={"lr": 0.25, **changes}, schedule=schedule, model=model)
    assert learner.rate == pytest.approx(0.25)


@pytest.mark.parametrize(("loss", "broken"), [(1.0, False), (math.nan, True), (math.inf, True), (-math.inf, True)])
@pytest.mark.parametrize("save", [False, True])
def test_what_ranks_agree_on(loss, broken, save):
    agreement = Agreement(ALONE, Signals())
    agreement.ask(torch.tensor(loss), save)
    assert agreement.answer() == (False, save, broken)


def test_nothing_is_rescued_of_a_step_half_done():
    # Only these attributes of the run are used.
    engine._Run._rescued(SimpleNamespace(writer=object(), learner=SimpleNamespace(whole=False)))
    engine._Run._rescued(SimpleNamespace(writer=None, learner=SimpleNamespace(whole=True)))


def test_moments_lie_as_the_weights_do_wherever_they_were_made(data):
    made = learner_of(data, model={"channels_last": False})
    made.begin()
    made.backward(made.loss(some_batch()))
    made.update()
    going_on = learner_of(data)
    going_on.load_state_dict(copied(made.state_dict()))
    theirs = {id(weight): state for weight, state in made.optimizer.state.items()}
    pairs = zip(made.module.parameters(), going_on.module.parameters(), strict=True)
    laid_out_anew = 0
    for before, weight in pairs:
        for name, value in going_on.optimizer.state[weight].items():
            assert value.dtype == theirs[id(before)][name].dtype
            assert torch.equal(value, theirs[id(before)][name])
            if value.dim():
                assert value.stride() == weight.stride()
                laid_out_anew += value.stride() != before.stride()
    assert laid_out_anew > 10


def test_batch_statistics_over_ranks_need_gpus(data):
    recipe = small_recipe("test_efficientnet", model={"sync_batchnorm": True})
    with pytest.raises(RecipeError, match=r"model\.sync_batchnorm needs GPUs"):
        Learner(recipe, open_splits(recipe, data), World(0, 2, torch.device("cpu")), 12)
