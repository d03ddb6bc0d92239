"""Run a recipe to its last checkpoint, with the same bits however it was interrupted.

A step's result depends only on the recipe, the data, the step number and the number of ranks: the order of images and
their augmentation come from the loader, dropout's random numbers from a seed made of step and rank.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import torch

from wn21k_zoo.errors import InvalidArgumentError, NonFiniteError, RecipeError, RunError, Wn21kError, first_line
from wn21k_zoo.files import local_path
from wn21k_zoo.messages import say
from wn21k_zoo.training.agreement import Agreement, Answer
from wn21k_zoo.training.algorithms import choose_algorithms, torch_as_it_was
from wn21k_zoo.training.announce import announcements
from wn21k_zoo.training.checkpoint_writer import CheckpointWriter, copied
from wn21k_zoo.training.data import Batch, Loader
from wn21k_zoo.training.distributed import World, join
from wn21k_zoo.training.evaluation import Evaluation, classes_with_images
from wn21k_zoo.training.failures import explained, is_of_a_worker
from wn21k_zoo.training.folder import is_among
from wn21k_zoo.training.learner import Learner
from wn21k_zoo.training.progress import Reporter, Window
from wn21k_zoo.training.recipe import Recipe
from wn21k_zoo.training.rescue import Rescue
from wn21k_zoo.training.signals import LIMIT_SECONDS, Signals
from wn21k_zoo.training.splits import Splits, open_loaders, open_splits
from wn21k_zoo.training.state import FORMAT, RunFolder, read_checkpoint, score
from wn21k_zoo.training.weights import resolved

__all__ = ["Preempted", "train"]


class Preempted(Exception):  # noqa: N818
    """The run was told to stop and has written a checkpoint; ``code`` is the process's exit code."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code


def train(
    recipe: Recipe,
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    world: World | None = None,
    *,
    device: str | torch.device = "auto",
    workers: int | None = None,
    signals: Signals | None = None,
) -> dict[str, Any]:
    """Run a recipe, or resume the run in the same folder.

    Ctrl-C, also in a notebook, finishes the current step, writes a checkpoint and is then raised; a second one ends the
    run at once, or once what it waits for on a GPU is done. Torch's random state on the CPU and on the run's GPU, its
    determinism setting and its matrix multiplication precision are restored afterwards; CUBLAS_WORKSPACE_CONFIG stays
    set, since it is read only once.

    Args:
        recipe: What to run.
        data: See :func:`wn21k_zoo.training.splits.open_splits`.
        output: Folder of the run, visible to all ranks.
        world: The processes that run it together; default: those that torchrun started, or this one alone. In a process
            group that a program created itself, an error on one rank ends the others when the group's timeout is over.
        device: auto, cpu, cuda, cuda:N or mps, if no world is given.
        workers: Image-loading processes per rank; default: this machine's cores divided by its ranks, at most 16.
        signals: For signals that arrive in its context, write a checkpoint and raise :class:`Preempted`.

    Returns:
        The figures of the last evaluation.

    Raises:
        RecipeError, DataError, RunError, ModelError, InvalidArgumentError: Something is invalid; nothing has started.
        UnknownNameError, UnresolvedLabelSpaceError: There is no such start, teacher or label space, or its classes are
            not known.
        RunError, DataError, BadImagesError: During the run: memory is not enough, a process that loads images is gone,
            or too many images are damaged; progress so far is kept.
        TrainingError: Processes were not started the same way, or the connection between them failed.
        NonFiniteError: The loss was not finite; raised on every rank. The last checkpoint is unchanged.
        Preempted: As above.
        KeyboardInterrupt: Ctrl-C.
    """
    if not isinstance(recipe, Recipe):
        raise RecipeError(
            f"The recipe is {recipe!r}; use one of wn21k_zoo.training.presets, or load_recipe(name) of "
            "wn21k_zoo.training.recipe_files."
        )
    if world is None:
        with join(device, recipe.run.deterministic) as joined:
            return train(recipe, data, output, joined, workers=workers, signals=signals)
    if device != "auto":
        raise InvalidArgumentError("The world determines the device of a run; leave out device.")
    recipe.check()
    folder = RunFolder(local_path(output, RunError))
    asked, before = recipe.model.arguments, folder.start_arguments()
    recipe = resolved(recipe, before)
    if is_among(folder.path, data):
        raise RunError(f"{folder.path} would be among the images of {data}; choose an output folder elsewhere.")
    splits = open_splits(recipe, data)
    # Except where weights lie: the leading rank's are used, and teachers are compared by what they say.
    world.agree("recipes", recipe.model_dump(mode="json", exclude={"model": {"start"}, "loss": {"teacher"}}))
    world.agree("data", splits.describe())
    recipe = recipe.counted(len(splits.train))
    of_start = {name: value for name, value in recipe.model.arguments.items() if name not in asked}
    about = {**splits.describe(), "start_arguments": of_start if before is None else before}
    world.lead(lambda: folder.check(recipe, about))
    with contextlib.ExitStack() as stack:
        world.lead(lambda: stack.enter_context(folder.locked()))
        rescue, told = Rescue(folder, world), signals or Signals()
        # Other threads cannot handle Ctrl-C, and if the program has its own handler, only that one does.
        if signals is not None or (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):
            stack.enter_context(told.patient(rescue))
        if world.device.type == "cuda":  # whose generator is seeded, and for which memory is pinned
            stack.enter_context(torch.cuda.device(world.device))
        stack.enter_context(torch_as_it_was(world.device))
        try:
            begun = _Run(recipe, splits, folder, world, told, rescue, workers)
            if signals is None:  # otherwise the process ends in a moment, within its limit of seconds
                for loader in begun.loaders:
                    stack.callback(loader.close)
            world.lead(lambda: folder.begin(recipe, about))
            return begun.go()
        except Preempted:
            if signals is not None or not told.told:
                raise
            if world.leads:
                say("stopped with a checkpoint; start it again to resume")
            raise KeyboardInterrupt from None


class _Run:
    def __init__(
        self,
        recipe: Recipe,
        splits: Splits,
        folder: RunFolder,
        world: World,
        signals: Signals,
        rescue: Rescue,
        workers: int | None = None,
    ) -> None:
        self.recipe, self.splits, self.folder, self.world = recipe, splits, folder, world
        self.agreement, self.signals, self.rescue = Agreement(world, signals), signals, rescue
        self.device = world.device
        choose_algorithms(recipe.run.deterministic)
        self.micro, self.group = recipe.micro_batches(world.size)
        self.steps_per_epoch, self.total = recipe.steps(len(splits.train))
        begun = world.any(world.leads and bool(folder.steps()))
        self.learner = Learner(recipe, splits, world, self.total, begun)
        world.agree("teachers", self.learner.teacher_digest)
        self.loaders = open_loaders(recipe, splits, world, workers)
        self.step, self.evaluated, self.best = 0, 0, float("-inf")
        self.window = Window(self.device)
        self.saved: tuple[int, int] | None = None
        self.layout = [world.size, self.micro]
        self.figures: dict[str, Any] = {}
        self.writer: CheckpointWriter | None = None
        self.classes = classes_with_images(splits.validation)
        self.best_of = self.loaders[1].num_samples
        self._resume()
        self.reporter = Reporter(None, self.total, self.step)

    def _begin(self) -> None:
        """Write, on the leading rank, that the run goes on from this step."""
        self.folder.cut(self.step, self.evaluated)
        self.folder.set_status("running", self.step, total=self.total)
        self.reporter = Reporter(self.folder, self.total, self.step)
        self.writer = CheckpointWriter(self.folder, self.recipe.run.keep)

    def go(self) -> dict[str, Any]:
        leads = self.world.leads
        finished = self.step >= self.total and self.folder.status().get("state") == "finished"
        if self.world.broadcast(finished):
            if leads:
                say(f"finished before, at step {self.step:,}; nothing to do")
            return self.figures
        self.world.lead(self._begin)  # until then, no rank may read the status of an earlier start
        self.rescue.save, self.rescue.begun = self._rescued, True
        for message in announcements(
            self.recipe, self.splits, self.world, self.learner, self.step, self.total, len(self.classes), self.layout
        ):
            self.reporter.say(message)
        is_over = False
        try:
            if self.agreement.stops():  # told to while the run was being built
                self._stop()
            self._epochs()
            is_over = True
        except Exception as end:
            if self.signals.told and not isinstance(end, (Preempted, Wn21kError)):  # e.g. another rank is gone
                self.rescue(time.monotonic() + LIMIT_SECONDS / 2)
                raise Preempted(self.signals.code) from end
            problem = explained(end, self.recipe, self.world, self.micro)
            if not isinstance(end, Preempted):
                self._failed(end, problem)
            if problem is not end:
                raise problem from end
            raise
        except KeyboardInterrupt:  # a second Ctrl-C, which waits only for a checkpoint that is being written
            if self.writer is not None:
                with contextlib.suppress(RunError):
                    self.writer.wait()
                if self.folder.status().get("state") != "failed":  # by another rank
                    self.folder.set_status("preempted", self.folder.newest_step(), total=self.total)
            raise
        finally:
            self.reporter.close()
            with self.rescue.changing:
                self.rescue.save = None
            if self.writer is not None:
                with contextlib.suppress(*(() if is_over else (RunError,))):  # otherwise an error is raised already
                    self.writer.close()
        if leads:
            self.folder.set_status("finished", self.step, total=self.total)
            is_trial = self.recipe.name.endswith("_debug")
            export = "" if is_trial else f"; wn21k train export {self.folder.path} DIR makes a model of it"
            say(f"finished{export}")
        return self.figures

    def _failed(self, end: Exception, problem: Exception) -> None:
        """Record the failure, and keep the progress before the step that failed."""

        def mark() -> None:
            # If several ranks fail, the first gives the reason; the others may just have lost the connection to it.
            if self.folder.status().get("state") != "failed":
                self.folder.set_status("failed", self.step, total=self.total, reason=first_line(problem))

        def keep() -> None:
            if self.step and self.writer is not None and not isinstance(end, (NonFiniteError, RunError)):
                self.rescue.keep(time.monotonic() + LIMIT_SECONDS)

        for action in (mark, keep):
            for _ in range(3):
                try:
                    action()
                except RunError as error:  # a different problem from the one that ended the run
                    say(str(error))
                except RuntimeError as error:
                    if is_of_a_worker(error):  # torch raises it in the middle of anything, once per process
                        continue
                    raise
                break

    def _epochs(self) -> None:
        self._saved_at = time.monotonic()
        while True:
            epoch, within = divmod(self.step, self.steps_per_epoch)
            if self.step and (not within or self.step >= self.total) and self.evaluated != self.step:
                self._finish_epoch(epoch if not within else epoch + 1)
            if self.step >= self.total:
                return
            seen = within * self.recipe.data.batch_size
            self.loaders[0].load_state_dict({"epoch": epoch, "samples_seen": seen})
            self._steps(iter(self.loaders[0]), min(self.steps_per_epoch - within, self.total - self.step))

    def _finish_epoch(self, epoch: int) -> None:
        self.window.share(self.world)
        is_last = self.step >= self.total
        every = self.recipe.run.evaluate_every
        evaluates = is_last or (every is not None and epoch % every == 0)
        is_saved = self.saved is not None and self.saved[0] == self.step
        if evaluates:
            self._check()
        if evaluates and not is_saved and self.total > 2:  # a trial has nothing to lose
            self._save()  # an evaluation that fails, e.g. over damaged images, loses no training
        figures = self._evaluate() if evaluates else {}
        is_best = False
        with self.rescue.changing:
            if evaluates:
                self.figures = {"step": self.step, "epoch": round(self.step / self.steps_per_epoch, 4), **figures}
                self.reporter.evaluation(self.figures)
                is_best, self.best = score(figures) > self.best, max(score(figures), self.best)
            self.evaluated = self.step
            if evaluates:
                self._save(best=is_best, wait=is_last)

    def _steps(self, batches: Iterator[Batch], count: int) -> None:
        self.window.begin()
        for _ in range(count):
            rate = self.learner.rate
            answer = self._step(batches)
            self.reporter.step(self.step)
            if self.step % min(self.recipe.run.log_every, self.steps_per_epoch) == 0 or self.step == self.total:
                self._log(rate)
            self._react(answer)
        self.window.pause()

    def _step(self, batches: Iterator[Batch]) -> Answer:
        with self.rescue.changing:
            self.learner.begin()
        total = torch.zeros((), device=self.device)
        for number in range(self.group):
            begin = time.perf_counter()
            batch = next(batches)
            self.window.waited += time.perf_counter() - begin
            # For dropout and the like; after the loader, which draws from this generator when it starts.
            _set_seed(self.device, _seed(self.recipe.run.seed, self.step, number, self.world.rank))
            last = number == self.group - 1
            with self.learner.gathering(last):
                # A damaged image counts as a loss of 0, however the step's images are divided.
                loss = self.learner.loss(batch) * (len(batch) / self.micro) / self.group
                total += loss.detach()
                if last:
                    overdue = time.monotonic() - self._saved_at > 60 * self.recipe.run.checkpoint_minutes
                    self.agreement.ask(total, overdue and self.world.leads)
                self.learner.backward(loss)
        answer = self.agreement.answer()
        if answer.broken:
            why = self.learner.why_not_finite()
            raise NonFiniteError(f"The loss of step {self.step + 1:,} is not finite: {why}")
        with self.rescue.changing:
            self.learner.whole = False
            self.window.add(total, self.recipe.data.batch_size)
            self.learner.update()
            self.step += 1
            self.learner.whole = True
        return answer

    def _react(self, answer: Answer) -> None:
        if answer.stop:
            self._stop()
        if answer.save:
            self._check()
            self.window.share(self.world)
            self._save()

    def _stop(self) -> NoReturn:
        self._check()
        self.window.share(self.world)
        self._save(wait=True)
        if self.world.leads:  # before any process exits: launch files look for the mark as soon as one does
            self.folder.set_status("preempted", self.step, total=self.total)
        self.world.barrier()  # torchrun ends the others as soon as one exits
        raise Preempted(self.signals.code)

    def _check(self) -> None:
        """Check that a checkpoint, which the leading rank writes, would hold nothing but finite numbers.

        Raises:
            NonFiniteError: It would not; on every rank.
        """
        if self.world.any(self.world.leads and not self.learner.is_finite(self.learner.state_dict())):
            raise _not_finite(self.step)

    def _save(self, best: bool = False, wait: bool = False) -> None:
        self._saved_at = time.monotonic()
        if self.writer is not None:
            if self.folder.status().get("state") == "running":  # and no other rank has failed
                self.folder.set_status("running", self.step, total=self.total)
            with self.rescue.changing:
                self.writer.save(self._state(), best=best, wait=wait)
        self.saved = self.step, self.evaluated

    def _rescued(self) -> None:
        """Write the state before the current step, from a different thread than the one that runs it."""
        if self.writer is None or not self.learner.whole:
            return
        if self.saved != (self.step, self.evaluated):
            self.writer.wait()
            with self.learner.beside():
                state = copied(self._state())
            if not self.learner.is_finite(state):
                raise _not_finite(self.step)
            self.writer.write(state)
        self.writer.wait()

    def _state(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "step": self.step,
            "layout": [self.world.size, self.micro],
            "evaluated": self.evaluated,
            "best": [self.best, self.best_of],
            "window": self.window.state_dict(),
            "figures": self.figures,
            "teacher": self.learner.teacher_digest,
            **self.learner.state_dict(),
        }

    def _resume(self) -> None:
        """Load the newest checkpoint, the same on all ranks."""
        found: dict[str, Any] | None = None

        def newest() -> None:
            nonlocal found
            try:
                found = self.folder.newest()
            except RunError as error:
                raise RunError(f"{error} Choose another output folder to start over.") from None

        self.world.lead(newest)
        step = self.world.broadcast(found["step"] if found is not None else -1)
        if step < 0:
            return
        state = found or read_checkpoint(self.folder.checkpoints / f"step-{step:08d}.pt")
        if state.get("teacher", self.learner.teacher_digest) != self.learner.teacher_digest:
            raise RunError(
                f"loss.teacher {self.recipe.loss.teacher} is not the same as when the run in {self.folder.path} "
                "began; restore the former one, or choose another output folder."
            )
        self.learner.load_state_dict(state)
        self.step, self.evaluated = state["step"], state["evaluated"]
        self.layout, self.figures = state["layout"], state["figures"]
        self.window.load_state_dict(state["window"])
        self.saved = self.step, self.evaluated
        best, best_of = state["best"]
        if best_of == self.best_of:  # a score on fewer or more images is not comparable
            self.best = best
        if self.best > float("-inf") and self.step < self.total:
            there = True

            def look() -> None:
                nonlocal there
                there = self.folder.has_best()

            self.world.lead(look)
            if self.world.any(not there):
                self.best = float("-inf")

    @torch.no_grad()
    def _evaluate(self) -> dict[str, Any]:
        module = self.learner.subject()
        evaluation = Evaluation(
            self.splits.tree,
            self.recipe.loss.head,
            self.classes,
            "level" if self.splits.tree is not None else "published",
            device=self.device,
            num_classes=len(self.splits.class_names),
            over_ranks=self.world.size > 1,  # a program's process group may have more ranks than this run
        )
        begin = time.perf_counter()
        for batch in self._while_wanted(self.loaders[1]):
            if not len(batch):  # all its images are damaged
                continue
            with self.learner.autocast():
                logits = module(self.learner.laid_out(batch.images))
            evaluation.update(logits, batch.targets)
        if self.agreement.stops():
            self._stop()
        figures = evaluation.compute()
        figures["images_per_second"] = figures["images"] / (time.perf_counter() - begin)
        return figures

    def _while_wanted(self, loader: Loader) -> Iterator[Batch]:
        """Yield batches for the evaluation, or until all ranks know that one was told to stop.

        They ask each other only while all have a batch: only some ranks may have a last one.
        """
        common = loader.num_samples // (loader.batch_size * self.world.size)
        every = 1 if self.device.type == "cpu" else 8
        for number, batch in enumerate(loader):
            if number < common and number % every == 0 and self.agreement.stops():
                return
            yield batch

    def _log(self, rate: float) -> None:
        if self.writer is not None:
            self.writer.check()
        self.learner.check_scale()
        loss, speed, wait = self.window.read()
        loss, speed, wait, bad = self.world.mean(loss, speed, wait, self.loaders[0].bad_samples)
        self.reporter.train(
            {
                "step": self.step,
                "epoch": round(self.step / self.steps_per_epoch, 4),
                "loss": loss,
                "lr": rate,
                "images_per_second": round(speed, 1),
                "data_wait": round(wait, 4),
                "bad_samples": round(bad * self.world.size),  # of all ranks, since the last start
            }
        )


def _not_finite(step: int) -> NonFiniteError:
    return NonFiniteError(
        f"The weights after step {step:,}, or statistics or averages, are not finite, although its loss was; the last "
        "checkpoint is unchanged. A lower learning rate or optimizer.clip_norm may help."
    )


def _seed(*numbers: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "little")


def _set_seed(device: torch.device, seed: int) -> None:
    """Seed the generators of the CPU and of a device, if a GPU of torch's current one.

    ``torch.manual_seed`` is slow over other kinds of devices.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
