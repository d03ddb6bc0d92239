import concurrent.futures.process
import errno
import math
import multiprocessing.queues
import multiprocessing.util
import os
import sys
import types

import pytest
import torch

from wn21k_zoo.errors import (
    BadImagesError,
    DataError,
    InvalidArgumentError,
    NonFiniteError,
    RecipeError,
    RunError,
    TrainingError,
)
from wn21k_zoo.training import engine
from wn21k_zoo.training.data import Loader
from wn21k_zoo.training.distributed import World
from wn21k_zoo.training.evaluate import evaluate
from wn21k_zoo.training.failures import is_of_a_worker, worker_gone
from wn21k_zoo.training.folder import open_folder
from wn21k_zoo.training.learner import Learner
from wn21k_zoo.training.network import Normalized
from wn21k_zoo.training.optimization import Criterion
from wn21k_zoo.training.state import RunFolder
from wn21k_zoo.training.tasks import run_tasks

from .checks import FAST, assert_close_weights, assert_same_weights, final, lines, run
from .runs import (
    BATCH,
    make_folder,
    small_recipe,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_last_checkpoint(
    data, tmp_path, monkeypatch, at_loss, bad, device
):
    world = World(0, 1, torch.device(device))
    at_loss(lambda logits, number: logits * bad if number == 9 else logits)
    with pytest.raises(NonFiniteError, match="The loss of step 9 is not finite"):
        run(small_recipe(), data, tmp_path, world)
    assert RunFolder(tmp_path).status()["state"] == "failed"
    assert final(tmp_path)["step"] == 6
    monkeypatch.undo()
    run(small_recipe(), data, tmp_path, world)
    assert final(tmp_path)["step"] == 12


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"batch_size": 64}}, "fewer than data.batch_size 64"),
        ({"data": {"label_space": "imagenet1k"}}, r"after a class of imagenet1k\. .* set data\.label_space to null"),
        ({"loss": {"teacher": "resnet50.miil_in21k"}}, "distillation_weight is 0"),
        ({"model": {"arguments": {"no_such": 1}}}, "test_convnext cannot be built: .*no_such"),
        (
            {"model": {"architecture": "resnet18", "arguments": {"output_stride": 7}}},
            "resnet18 cannot be built: Assert",
        ),
        ({"model": {"start": "resnet50.a1_in1kk"}}, "Did you mean"),
        (
            {"model": {"architecture": "test_convnxt"}},
            "no architecture 'test_convnxt'. Did you mean test_conv",
        ),
        ({"data": {"label_space": "fall12"}}, "Did you mean fall11"),
        ({"model": {"architecture": "vit_tiny_patch16_224"}}, "The network does not take images of 32 pixels"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_is_written(data, tmp_path, sections, message):
    with pytest.raises(Exception, match=message) as error:
        run(small_recipe(**sections), data, tmp_path / "run")
    assert type(error.value).__module__ == "wn21k_zoo.errors"
    assert not (tmp_path / "run" / "recipe.json").exists()
    run(small_recipe(schedule={"max_steps": 1}), data, tmp_path / "run")  # nothing is left that blocks a correct run


def test_what_is_no_recipe_or_device_is_said(data, tmp_path):
    with pytest.raises(RecipeError, match="use one of wn21k_zoo"):
        engine.train("finetune", data, tmp_path)
    with pytest.raises(InvalidArgumentError, match="use auto, cpu, cuda"):
        engine.train(small_recipe(), data, tmp_path, device="gpu")
    with pytest.raises(InvalidArgumentError, match="The world determines"):
        run(small_recipe(), data, tmp_path, device="cpu")
    engine.train(small_recipe(schedule={"max_steps": 1}), data, tmp_path, device="cpu", workers=0)
    assert final(tmp_path)["step"] == 1


def test_an_operation_that_is_not_deterministic_is_one_line(data, tmp_path, at_loss):
    def putting(logits, _):
        torch.zeros(1).put_(torch.zeros(1, dtype=torch.int64), torch.ones(1))
        return logits

    at_loss(putting)
    with pytest.raises(RecipeError, match=r"put_.* has no deterministic .*; set run.deterministic to false"):
        run(small_recipe(run={"deterministic": True}), data, tmp_path)
    assert RunFolder(tmp_path).status()["state"] == "failed"
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_evaluation_that_fails_costs_no_training(data, tmp_path, monkeypatch):
    def damaged(self):
        raise BadImagesError("All of them.")

    monkeypatch.setattr(engine._Run, "_evaluate", damaged)
    with pytest.raises(BadImagesError):
        run(small_recipe(), data, tmp_path)
    assert (final(tmp_path)["step"], final(tmp_path)["evaluated"]) == (6, 0)
    monkeypatch.undo()
    run(small_recipe(), data, tmp_path)
    assert [line["step"] for line in lines(tmp_path, "evaluation")] == [6, 12]
    run(small_recipe(), data, tmp_path / "whole")
    assert_same_weights(final(tmp_path / "whole"), final(tmp_path))


def test_data_that_is_not_there(tmp_path):
    with pytest.raises(DataError):
        run(small_recipe(), tmp_path / "nowhere", tmp_path / "run")


FULL = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)."),
]


@pytest.mark.parametrize("error", FULL, ids=["cuda", "mps"])
def test_too_little_memory_is_one_line_that_says_what_to_change(data, tmp_path, monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(Criterion, "forward", full)
    with pytest.raises(RunError, match=r"not enough for 8 images at a time: set data\.batch_per_device below 8"):
        run(small_recipe(), data, tmp_path)
    assert "not enough" in RunFolder(tmp_path).status()["reason"]


def test_gradients_that_overflow_at_every_step_end_a_run_in_fp16(data, tmp_path, monkeypatch):
    backward = Learner.backward
    monkeypatch.setattr(Learner, "backward", lambda self, loss: backward(self, loss * 1e30))
    recipe = small_recipe(run={"precision": "fp16"}, schedule={"epochs": 7})
    with pytest.raises(NonFiniteError, match=r"not finite in fp16.*; set run\.precision to bf16 or fp32"):
        run(recipe, data, tmp_path)


@pytest.mark.parametrize("error", FULL, ids=["cuda", "mps"])
def test_too_little_memory_for_the_network_itself(data, tmp_path, monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(Normalized, "forward", full)
    with pytest.raises(RunError, match="memory of cpu is not enough for the network itself"):
        run(small_recipe(), data, tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.json").exists()


@pytest.mark.parametrize("what", ["weights", "statistics", "averages"])
def test_what_is_not_finite_is_not_saved(data, tmp_path, monkeypatch, what):
    recipe, calls = small_recipe("test_efficientnet", run={"ema_decay": 0.9}), []
    update = Learner.update

    def breaking(self):
        update(self)
        calls.append(1)
        if len(calls) == 12:
            broken = {
                "weights": next(self.module.parameters()),
                "statistics": self._buffers[next(name for name in self._buffers if name.endswith("running_var"))],
                "averages": next(self._average.module.parameters()),
            }
            broken[what].data.fill_(math.inf)

    monkeypatch.setattr(Learner, "update", breaking)
    with pytest.raises(NonFiniteError, match="The weights after step 12, or statistics or averages, are not finite"):
        run(recipe, data, tmp_path)
    assert final(tmp_path)["step"] == 6


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_bounds_that_are_infinite_by_design_may_stay(data, tmp_path, ema_decay):
    recipe = small_recipe(
        "gemma4_vit_167m",
        model={"arguments": {"img_size": 96, "depth": 1, "embed_dim": 32, "num_heads": 2}},
        data={"size": 96},
        schedule={"max_steps": 3},
        run={"ema_decay": ema_decay},
    )
    run(recipe, data, tmp_path)
    state = final(tmp_path)
    bounds = [each for each in state["model"].values() if each.is_floating_point() and each.isinf().any()]
    assert bounds
    for each in (state["average"] or {}).values():
        assert not each.is_floating_point() or not each.isnan().any()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")  # noqa: PTH110
def test_metrics_that_a_full_disk_does_not_take_end_no_run(data, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    run(small_recipe(schedule={"max_steps": 3}), data, tmp_path / "run")
    assert final(tmp_path / "run")["step"] == 3
    assert capsys.readouterr().err.count("metrics.jsonl cannot be written (No space left on device); make room") == 1


def test_curves_that_a_full_disk_does_not_take_end_no_run(data, tmp_path, monkeypatch, capsys):
    class Board:
        def add_scalar(self, *_):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr("wn21k_zoo.training.progress._tensorboard", lambda *_: Board())
    run(small_recipe(schedule={"max_steps": 3}), data, tmp_path)
    assert final(tmp_path)["step"] == 3
    assert capsys.readouterr().err.count("TensorBoard's file cannot be written (Disk quota exceeded)") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="other systems share memory by names")
def test_a_folder_for_temporary_files_that_sockets_cannot_be_in_is_told(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "photos")
    long = tmp_path / ("y" * 90)
    long.mkdir()
    monkeypatch.setattr(multiprocessing.util, "get_temp_dir", lambda: str(long / "pymp-12345678"))
    with pytest.raises(DataError, match=r"too long for sockets \(.*yyy\): set TMPDIR to a shorter one"):
        next(iter(Loader(open_folder(folder, "all"), batch_size=2, workers=1)))


def test_a_process_that_loads_images_and_is_gone_is_one_line(data, tmp_path, monkeypatch):
    def gone(*_, **__):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \n more")

    monkeypatch.setattr(Criterion, "forward", gone)
    with pytest.raises(DataError, match=r"A process that loads images is gone: .*use fewer workers"):
        run(small_recipe(), data, tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_memory_that_cannot_be_shared_is_said(tmp_path, workers):
    folder = make_folder(tmp_path / "photos")
    with pytest.raises(DataError, match=r"is full.*--shm-size.*--workers"):
        [*Loader(open_folder(folder), batch_size=4, workers=workers, augmentation=full)]


def full(image, random):
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out "
         "of shared memory. Please try to raise your shared memory limit.", "--shm-size"),
        ("DataLoader worker (pid 7) is killed by signal: Killed.", "out of memory"),
        ("No valid triton configs. OutOfResources: out of resource: shared memory, Required: 200000", None),
        ("unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)", None),
        ("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback: of the caller", None),
    ],
)  # fmt: skip
def test_what_torch_says_of_memory_and_processes(text, what):
    assert is_of_a_worker(RuntimeError(text)) == (what is not None)
    assert what is None or what in str(worker_gone(RuntimeError(text)))


def test_what_fails_in_a_process_that_loads_images_is_no_process_that_is_gone(tmp_path):
    folder = make_folder(tmp_path / "photos")
    loader = Loader(open_folder(folder), batch_size=4, workers=1, augmentation=broken)
    with pytest.raises(RuntimeError, match=r"(?s)Caught RuntimeError in DataLoader worker.*of the caller"):
        next(iter(loader))
    assert loader._batches._iterator is None  # its process has ended


def broken(image, random):
    raise RuntimeError("of the caller")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # from torch's half-constructed iterator
def test_processes_that_cannot_be_started_are_told(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    folder = make_folder(tmp_path / "photos")
    loader = Loader(open_folder(folder), batch_size=4, workers=1)
    monkeypatch.setattr(multiprocessing.queues, "Queue", refused)  # whatever the context
    with pytest.raises(DataError, match=r"cannot be started here: .*Read-only.*--workers 0"):
        next(iter(loader))
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", refused)
    with pytest.raises(DataError, match=r"cannot be started here: .*Read-only.*--workers 1"):
        [*run_tasks(abs, [(1,)], workers=2)]


@pytest.mark.parametrize(
    "problem",
    [
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
        *(pytest.param(each, marks=pytest.mark.slow) for each in (OSError("loading"), ValueError())),
    ],
)
def test_what_was_run_before_something_failed_is_kept(data, tmp_path, monkeypatch, problem):
    recipe = small_recipe(run={"ema_decay": 0.9})
    run(recipe, data, tmp_path / "whole")
    with monkeypatch.context() as patched:
        forward, steps = Criterion.forward, []

        def failing(*arguments):
            steps.append(1)
            if len(steps) == 5:
                raise problem
            return forward(*arguments)

        patched.setattr(Criterion, "forward", failing)
        with pytest.raises(DataError if isinstance(problem, RuntimeError) else type(problem)):
            run(recipe, data, tmp_path / "parts")
    folder = RunFolder(tmp_path / "parts")
    assert folder.newest_step() == 4
    assert (folder.status()["state"], folder.status()["step"]) == ("failed", 4)
    run(recipe, data, tmp_path / "parts")
    assert_same_weights(final(tmp_path / "whole"), final(tmp_path / "parts"))


def test_what_torch_says_amid_the_end_does_not_hide_the_reason(data, tmp_path, monkeypatch):
    said, set_status = [], RunFolder.set_status

    def interrupted(self, state, step, **more):  # by the handler of SIGCHLD
        if state == "failed" and not said:
            said.append(1)
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
        set_status(self, state, step, **more)

    def gone(*_):
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(RunFolder, "set_status", interrupted)
    monkeypatch.setattr("torch.utils.data.dataloader._SingleProcessDataLoaderIter._next_data", gone)
    with pytest.raises(DataError, match="A process that loads images is gone"):
        run(small_recipe(), data, tmp_path)
    assert "A process that loads images is gone" in RunFolder(tmp_path).status()["reason"]
    assert not RunFolder(tmp_path).steps()  # no step was run


def test_others_that_are_gone_are_said_in_one_line(data, tmp_path, monkeypatch):
    def gone(*_):
        raise RuntimeError("[/x/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:1: Connection reset by peer")

    monkeypatch.setattr(Criterion, "forward", gone)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *_, **__: None)
    monkeypatch.setattr("wn21k_zoo.training.learner.DistributedDataParallel", lambda module, **_: module)
    with pytest.raises(
        TrainingError, match=r"The connection to the other processes failed: .*reset by peer\. If one of them is gone"
    ):
        run(small_recipe(), data, tmp_path, World(0, 2, torch.device("cpu")))


def test_a_folder_that_is_called_like_a_library_is_not_its_error(data, tmp_path, monkeypatch):
    def damaged(*_):
        raise BadImagesError("12 images are damaged, out of memory/gloo/a.jpg and igloo/gloo/b.jpg, say")

    monkeypatch.setattr(Criterion, "forward", damaged)
    with pytest.raises(BadImagesError, match="igloo"):
        run(small_recipe(), data, tmp_path)


def test_a_full_disk_behind_a_failure_does_not_hide_it(data, tmp_path, at_loss, monkeypatch, capsys):
    def failing(logits, number):
        if number == 5:
            monkeypatch.setattr("wn21k_zoo.training.checkpoint_writer.CheckpointWriter._write", full)
            raise ValueError("the reason")
        return logits

    def full(*_, **__):
        raise RunError("The checkpoint cannot be written: no space")

    at_loss(failing)
    with pytest.raises(ValueError, match="the reason"):
        run(small_recipe(), data, tmp_path)
    assert "no space" in capsys.readouterr().err


def test_a_step_that_is_not_wholly_counted_is_not_kept(data, tmp_path, monkeypatch):
    update, steps = Learner.update, []

    def interrupted(self):
        update(self)
        steps.append(1)
        if len(steps) == 4:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr(Learner, "update", interrupted)
    with pytest.raises(DataError):
        run(small_recipe(), data, tmp_path)
    assert not RunFolder(tmp_path).steps()


@pytest.mark.parametrize("loader", ["evaluation", "run"])
def test_a_last_batch_without_an_image_that_can_be_read(tmp_path, loader):
    data = make_folder(tmp_path / "images", images=20)  # two of each class for validation
    validation = open_folder(data, "validation")
    (data / validation.name(len(validation) - 1)).write_bytes(b"nothing")
    recipe = small_recipe(data={"batch_size": 11, "batch_per_device": 11}, schedule={"max_steps": 1})
    figures = run(recipe, data, tmp_path / "run")
    if loader == "evaluation":
        figures = evaluate(tmp_path / "run", data, workers=0, batch_size=11)
    assert figures["images"] == 11


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("architecture", ["test_efficientnet", "test_vit"])
def test_a_batch_without_an_image(tmp_path, architecture, checkpointing):
    data = make_folder(tmp_path / "images")
    (data / open_folder(data, "train").name(7)).write_bytes(b"nothing")
    recipe = small_recipe(architecture, data={"batch_per_device": 1, "batch_size": 4, "size": 64})
    recipe.model.gradient_checkpointing = checkpointing
    recipe.model.arguments = {"drop_path_rate": 0.1, **({"img_size": 64} if architecture == "test_vit" else {})}
    recipe.schedule.epochs = 1
    run(recipe, data, tmp_path / "run")
    assert all(math.isfinite(line["loss"]) for line in lines(tmp_path / "run"))
    assert lines(tmp_path / "run")[-1]["bad_samples"] == 1


@pytest.mark.parametrize("images", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_damaged_image_counts_the_same_however_a_step_is_divided(tmp_path, images):
    data = make_folder(tmp_path / "images")
    (data / open_folder(data, "train").name(7)).write_bytes(b"nothing")
    for micro in (BATCH, images):
        recipe = small_recipe(optimizer=FAST, data={"batch_per_device": micro, "batch_size": BATCH})
        run(recipe, data, tmp_path / str(micro))
    assert_close_weights(final(tmp_path / str(BATCH)), final(tmp_path / str(images)))
    assert lines(tmp_path / str(images))[-1]["bad_samples"] == 2  # once in each epoch


def test_a_damaged_image_ends_no_run_with_two_images_at_a_time(tmp_path):
    data = make_folder(tmp_path / "images", images=4)
    (data / open_folder(data, "train").name(7)).write_bytes(b"nothing")
    run(small_recipe("test_efficientnet", data={"batch_size": 2}, schedule={"epochs": 1}), data, tmp_path / "run")
    assert lines(tmp_path / "run")[-1]["bad_samples"] == 1


def test_a_tensorboard_that_does_not_work_ends_no_run(data, tmp_path, monkeypatch, caplog):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise TypeError("Descriptors cannot be created directly")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Broken("torch.utils.tensorboard"))
    run(small_recipe(schedule={"epochs": 1}), data, tmp_path)
    assert "TensorBoard does not work here" in caplog.text
    assert len(lines(tmp_path)) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features_only": True}, "model.arguments cannot have 'features_only'"),
        ({"pretrained": True}, "model.arguments cannot have 'pretrained'"),
        ({"global_pool": ""}, r"The network returns \[1, 6, 1, 1\] for an image, not \[1, 6\]"),
    ],
)
def test_a_network_that_gives_no_logits(data, tmp_path, arguments, message):
    with pytest.raises(RecipeError, match=message):
        run(small_recipe(model={"arguments": arguments}), data, tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.json").exists()
