"""The folder of a run and its checkpoints: damaged, foreign, on a full disk."""

import errno
import gc
import io
import json
import os
import shutil
import time
import weakref
import zipfile
from pathlib import Path

import pytest
import torch

from wn21k_zoo.errors import RunError
from wn21k_zoo.labels import LabelSpace
from wn21k_zoo.training import checkpoint_writer, state
from wn21k_zoo.training.checkpoint_writer import CheckpointWriter
from wn21k_zoo.training.state import FORMAT, RunFolder, read_checkpoint, read_lines

from .checks import assert_same_weights, final, run
from .runs import (
    make_folder,
    small_recipe,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_damaged_newest_checkpoint_is_passed_over(data, tmp_path, caplog):
    run(small_recipe(), data, tmp_path)
    whole = final(tmp_path)
    newest = RunFolder(tmp_path).steps()[0]
    newest.write_bytes(newest.read_bytes()[:1000])
    (tmp_path / "status.json").unlink()
    run(small_recipe(), data, tmp_path)
    assert "step-00000012.pt cannot be read" in caplog.text
    assert_same_weights(final(tmp_path), whole)


def test_a_changed_bit_of_a_checkpoint_is_seen(data, tmp_path):
    run(small_recipe(), data, tmp_path)
    newest = RunFolder(tmp_path).steps()[0]
    with zipfile.ZipFile(newest) as file:
        weights = file.read(max(file.infolist(), key=lambda entry: entry.file_size))
    content = bytearray(newest.read_bytes())
    content[content.index(weights) + 5] ^= 1
    newest.write_bytes(content)
    with pytest.raises(RunError, match=r"step-00000012\.pt cannot be read: damaged"):
        read_checkpoint(newest)


def test_checkpoints_have_checksums_also_in_a_program_that_turned_them_off(tmp_path):
    folder = RunFolder(tmp_path)
    folder.begin(small_recipe(), {})
    torch.serialization.set_crc32_options(False)
    try:
        CheckpointWriter(folder, keep=2).save({"format": FORMAT, "step": 6}, wait=True)
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_checkpoint(*folder.steps())["step"] == 6


def test_when_no_checkpoint_can_be_read_nothing_is_overwritten(data, tmp_path):
    run(small_recipe(), data, tmp_path)
    for path in RunFolder(tmp_path).steps():
        path.write_bytes(b"nothing")
    with pytest.raises(RunError, match="Choose another output folder to start over"):
        run(small_recipe(), data, tmp_path)
    assert {path.read_bytes() for path in RunFolder(tmp_path).steps()} == {b"nothing"}


def test_a_checkpoint_runs_no_code(tmp_path):
    torch.save({"format": FORMAT, "harm": os.system}, tmp_path / "step-00000001.pt")
    with pytest.raises(RunError, match="cannot be read"):
        read_checkpoint(tmp_path / "step-00000001.pt")


def test_another_recipe_or_other_data_are_not_mixed_into_a_run(data, tmp_path):
    run(small_recipe(), data, tmp_path / "run")
    with pytest.raises(RunError, match=r"optimizer\.lr = 0.0003, not 0.1; .* `wn21k train export \S+run DIR`"):
        run(small_recipe(optimizer={"lr": 0.1}), data, tmp_path / "run")
    other = make_folder(tmp_path / "other", images=12)
    with pytest.raises(RunError, match="holds a run on other data"):
        run(small_recipe(), other, tmp_path / "run")
    run(small_recipe(data={"batch_per_device": 4}, run={"keep": 1}), data, tmp_path / "run")  # may differ
    moved = shutil.copytree(data, tmp_path / "moved")
    run(small_recipe(), moved, tmp_path / "run")
    image = next(moved.rglob("*.jpg"))
    image.rename(image.with_name("another.jpg"))
    with pytest.raises(RunError, match=r"holds a run on other data \(files differ\)"):
        run(small_recipe(), moved, tmp_path / "run")


def test_what_is_no_place_for_a_run(data, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file; name a folder for the output"):
        run(small_recipe(), data, tmp_path / "file")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"")
    with pytest.raises(RunError, match=r"holds holiday\.jpg, which no run wrote"):
        run(small_recipe(), data, tmp_path / "photos")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["holiday.jpg"]
    monkeypatch.setattr(state, "_BUSY_SECONDS", 0.1)
    with RunFolder(tmp_path / "busy").locked(), pytest.raises(RunError, match="Another run is writing"):
        run(small_recipe(), data, tmp_path / "busy")
    with pytest.raises(RunError, match="holds no run"):
        RunFolder(tmp_path / "nowhere").recipe()


def test_a_full_disk_is_an_error_and_leaves_what_was_there(data, tmp_path, monkeypatch):
    run(small_recipe(), data, tmp_path)
    before = final(tmp_path)
    writer = CheckpointWriter(RunFolder(tmp_path), keep=2)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError, match=r"no space is left on .*; earlier ones are unchanged"):
        writer.save({"format": FORMAT, "step": 99}, wait=True)
    with pytest.raises(RunError):
        writer.close()
    assert_same_weights(final(tmp_path), before)


def test_a_damaged_recipe_of_a_run_is_named(data, tmp_path):
    run(small_recipe(schedule={"max_steps": 1}), data, tmp_path)
    for text in ('{"name', "[1]"):
        (tmp_path / "recipe.json").write_text(text)
        with pytest.raises(RunError, match=r"recipe\.json is damaged \(.*\); repair it"):
            run(small_recipe(schedule={"max_steps": 1}), data, tmp_path)


def test_a_recipe_that_may_not_be_read_is_not_said_to_be_missing(tmp_path, monkeypatch):
    def refused(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(RunError, match=r"recipe\.json cannot be read \(Permission denied\); ask its owner"):
        RunFolder(tmp_path).recipe()


def test_files_beside_those_of_a_run_are_in_nobodys_way(data, tmp_path):
    run(small_recipe(), data, tmp_path)
    (tmp_path / "figures.json").write_text("{}")
    run(small_recipe(), data, tmp_path)


def test_the_best_has_its_name_before_the_state_that_says_so(tmp_path, monkeypatch):
    replace = type(tmp_path).replace

    def killed(self, target):
        if target.name.startswith("step-"):
            raise KeyboardInterrupt
        return replace(self, target)

    folder = RunFolder(tmp_path)
    folder.begin(small_recipe(), {})
    writer = CheckpointWriter(folder, keep=2)
    monkeypatch.setattr(type(tmp_path), "replace", killed)
    with pytest.raises(RunError):
        writer.save({"format": FORMAT, "step": 6, "best": 1.0}, best=True, wait=True)
    assert read_checkpoint(folder.best)["step"] == 6
    assert not folder.steps()


def test_a_checkpoint_that_another_program_reads_goes_the_next_time(data, tmp_path, monkeypatch):
    unlink, refused = Path.unlink, []

    def held(self, missing_ok=False):  # as on Windows
        if self.name == "step-00000006.pt" and not refused:
            refused.append(self)
            raise PermissionError(13, "in use", str(self))
        unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", held)
    run(small_recipe(schedule={"epochs": 4}, run={"keep": 1}), data, tmp_path)
    assert refused
    assert [path.name for path in RunFolder(tmp_path).steps()] == ["step-00000024.pt"]


def test_damaged_checkpoints_do_not_push_out_good_ones(data, tmp_path):
    run(small_recipe(), data, tmp_path)
    folder = RunFolder(tmp_path)
    (folder.checkpoints / "step-00000012.pt").write_bytes(b"nothing")
    for step in (998, 999):
        (folder.checkpoints / f"step-{step:08d}.pt").write_bytes(b"nothing")
        (tmp_path / "status.json").unlink()
        run(small_recipe(run={"keep": 1}), data, tmp_path)
    assert [path.name for path in folder.steps()] == ["step-00000012.pt"]
    assert final(tmp_path)["step"] == 12
    assert [path.name for path in folder.checkpoints.glob("*.damaged")] == ["step-00000999.damaged"]


@pytest.mark.skipif(os.name == "nt", reason="any name has a home there")
def test_an_output_that_cannot_be_written_or_named(data, tmp_path, monkeypatch):
    with pytest.raises(RunError, match="home folder"):
        run(small_recipe(), data, "~nobody-of-that-name/run")

    def denied(self):
        raise PermissionError(13, "Permission denied", str(self))

    (tmp_path / "run").mkdir()
    monkeypatch.setattr(type(tmp_path), "iterdir", denied)
    with pytest.raises(RunError, match="cannot be read"):
        RunFolder(tmp_path / "run").check(small_recipe(), {})


def test_one_copy_of_a_checkpoint_is_in_memory(tmp_path):
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    writer, copies = CheckpointWriter(folder, 2), []
    copied = checkpoint_writer.copied

    def remembering(value):
        if isinstance(value, torch.Tensor):
            gc.collect()
            assert not [each for each in copies if each() is not None]
            mine = copied(value)
            copies.append(weakref.ref(mine))
            return mine
        return copied(value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_writer, "copied", remembering)
        for step in range(3):
            writer.save({"format": FORMAT, "step": step, "weights": torch.zeros(1000)})
    writer.close()
    assert len(copies) == 3


def test_a_disk_that_is_too_small_is_named(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    writer = CheckpointWriter(folder, 2)

    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 768 vs 662")

    monkeypatch.setattr(torch, "save", full)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint_writer.shutil, "disk_usage", lambda _: usage._replace(free=3999))
    with pytest.raises(RunError, match="cannot be written: no space is left on the disk of"):
        writer.save({"format": FORMAT, "step": 1, "weights": torch.zeros(1000)}, wait=True)


@pytest.mark.parametrize(("number", "said"), [(errno.EDQUOT, "or in your quota there; make room"), (errno.EIO, "EIO")])
def test_the_reason_behind_an_error_of_torch_is_said(tmp_path, monkeypatch, number, said):
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    writer = CheckpointWriter(folder, 2)

    class Refusing(io.BytesIO):
        def write(self, part):
            if len(part) > 2000:  # torch goes on, and then finds that something is missing
                raise OSError(number, errno.errorcode[number])
            return super().write(part)

    save = torch.save
    with pytest.raises(RuntimeError, match="unexpected pos"):
        save(torch.zeros(1000), Refusing())
    monkeypatch.setattr(torch, "save", lambda state, file: save(state, Refusing()))
    with pytest.raises(RunError, match=said):
        writer.save({"format": FORMAT, "step": 1, "weights": torch.zeros(1000)}, wait=True)


def test_metrics_that_another_user_of_a_group_wrote_go_on(tmp_path, monkeypatch):
    folder, line = RunFolder(tmp_path), '{"kind": "train", "step": 1}\n'
    folder.metrics.write_text(line)
    held = tmp_path / "held"
    os.link(folder.metrics, held)
    monkeypatch.setattr(state.os, "access", lambda *_: False)
    folder.cut(1, 1)
    assert folder.metrics.read_text() == line
    assert not folder.metrics.samefile(held)


OTHERS = {
    "architecture": "test_vit", "start": "x", "augmentation": "none", "kind": "single_label",
    "precision": "bf16", "deterministic": True, "channels_last": False, "sync_batchnorm": True,
    "arguments": {"drop_rate": 0.5}, "mean": (0.5,) * 3, "std": (0.5,) * 3, "betas": (0.5, 0.5), "crop_pct": 0.5,
    "clip_norm": 9.0, "ema_decay": 0.5, "layer_decay": 0.5, "teacher_head": "softmax", "max_steps": 3,
    "freeze_backbone": True,
}  # fmt: skip
FREE = {"compile", "gradient_checkpointing", "batch_per_device", "max_bad", "checkpoint_minutes", "keep"}
FREE |= {"evaluate_every", "evaluate_batches", "log_every", "teacher", "label_space"}
DECIDING = [
    (section, field)
    for section, fields in small_recipe()
    if section != "name"
    for field in type(fields).model_fields
    if field not in FREE
]


@pytest.mark.parametrize(("section", "field"), DECIDING, ids=[".".join(each) for each in DECIDING])
def test_what_decides_the_result_must_be_the_same(tmp_path, section, field):
    folder, recipe = RunFolder(tmp_path), small_recipe()
    folder.begin(recipe, {})
    (folder.checkpoints / "step-00000001.pt").write_bytes(b"")
    folder.check(recipe, {})
    before = getattr(getattr(recipe, section), field)
    if field in OTHERS:
        value = OTHERS[field]
    elif field == "name":
        value = {"optimizer": "lamb", "schedule": "cosine"}[section]
    else:
        value = before * 2 if before else 0.5 if isinstance(before, float) else 7
    setattr(getattr(recipe, section), field, value if field not in ("label_smoothing", "warmup", "momentum") else 0.01)
    with pytest.raises(RunError, match=rf"holds a run with {section}\.{field} = "):
        folder.check(recipe, {})


def test_a_copy_is_ones_own():
    weights = torch.ones(3)
    mine = checkpoint_writer.copied({"w": [weights, (weights,)], "step": 3})
    weights.zero_()
    assert torch.equal(mine["w"][0], torch.ones(3))
    assert torch.equal(mine["w"][1][0], torch.ones(3))
    assert mine["step"] == 3


def test_a_checkpoint_of_another_format_is_not_read(tmp_path):
    torch.save({"format": FORMAT + 1}, tmp_path / "step-00000001.pt")
    with pytest.raises(RunError, match=f"its format is {FORMAT + 1}, this version reads {FORMAT}"):
        read_checkpoint(tmp_path / "step-00000001.pt")


def test_what_a_killed_one_left_is_removed(tmp_path):
    folder = RunFolder(tmp_path)
    folder.begin(small_recipe(), {})
    for name in ("best.tmp", ".step-00000001.pt.tmp", "step-00000001.pt"):
        (folder.checkpoints / name).write_bytes(b"")
    folder.begin(small_recipe(), {})
    assert [path.name for path in folder.checkpoints.iterdir() if path.name[0] != "."] == ["step-00000001.pt"]


def test_what_comes_after_the_step_is_put_aside_and_not_the_step(tmp_path):
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    for step in (6, 12, 13):
        (folder.checkpoints / f"step-{step:08d}.pt").write_bytes(b"")
    folder.cut(12, 6)
    assert [path.name for path in folder.steps()] == ["step-00000012.pt", "step-00000006.pt"]


def test_what_will_be_computed_again_is_cut(tmp_path):
    folder = RunFolder(tmp_path)
    kinds = [("train", 6), ("evaluation", 6), ("train", 12), ("evaluation", 12), ("train", 13)]
    folder.metrics.write_text("".join(json.dumps({"kind": kind, "step": step}) + "\n" for kind, step in kinds))
    folder.cut(12, 6)
    assert [(line["kind"], line["step"]) for line in map(json.loads, folder.metrics.read_text().splitlines())] == [
        ("train", 6), ("evaluation", 6), ("train", 12),
    ]  # fmt: skip


def test_how_a_run_stands_does_not_wait_for_a_slow_disk(tmp_path, monkeypatch):
    def slow(descriptor):
        raise AssertionError("it waits")

    monkeypatch.setattr(os, "fsync", slow)
    RunFolder(tmp_path).set_status("preempted", 7)
    assert RunFolder(tmp_path).status() == {"state": "preempted", "step": 7}


def test_what_a_run_is_is_not_written_again(data, tmp_path):
    run(small_recipe(schedule={"epochs": 1}), data, tmp_path)
    written = {name: (tmp_path / name).stat().st_mtime_ns for name in ("recipe.json", "data.json")}
    (tmp_path / "status.json").unlink()
    run(small_recipe(schedule={"epochs": 1}), data, tmp_path)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in written} == written


def test_classes_of_a_shipped_label_space_are_known_by_its_name(tmp_path):
    folder = RunFolder(tmp_path)
    folder.begin(small_recipe(), {"label_space": "imagenet1k", "class_names": None})
    assert folder.classes()[1] == LabelSpace.load("imagenet1k").wnids


def test_a_run_without_a_checkpoint_may_be_begun_anew(tmp_path):
    folder = RunFolder(tmp_path)
    folder.begin(small_recipe(), {})
    folder.check(small_recipe(optimizer={"lr": 0.1}), {"classes": "others"})
    assert folder.begun() is None


def test_checkpoints_without_their_recipe_are_not_gone_on_with(data, tmp_path):
    run(small_recipe(), data, tmp_path)
    for name in ("recipe.json", "status.json"):
        (tmp_path / name).unlink()
    before = [path.read_bytes() for path in RunFolder(tmp_path).steps()]
    with pytest.raises(RunError, match=r"has checkpoints and no recipe\.json"):
        run(small_recipe(optimizer={"lr": 0.1}), data, tmp_path)
    assert [path.read_bytes() for path in RunFolder(tmp_path).steps()] == before


def test_the_best_is_there_on_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(checkpoint_writer.os, "link", refused)
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    writer = CheckpointWriter(folder, keep=2)
    for step in (6, 12):
        writer.save({"format": FORMAT, "step": step}, best=True, wait=True)
        assert read_checkpoint(folder.best) == {"format": FORMAT, "step": step}
    writer.close()


def test_the_last_checkpoint_is_there_when_it_is_closed(tmp_path, monkeypatch):
    folder, save = RunFolder(tmp_path), torch.save
    folder.checkpoints.mkdir()
    monkeypatch.setattr(torch, "save", lambda *given: time.sleep(0.3) or save(*given))
    writer = CheckpointWriter(folder, keep=2)
    writer.save({"format": FORMAT, "step": 1})
    writer.close()
    assert folder.newest_step() == 1


def test_what_could_not_be_written_is_said_by_the_next(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()

    def full(*_):
        raise OSError(28, "No space left on device")

    writer = CheckpointWriter(folder, keep=2)
    monkeypatch.setattr(torch, "save", full)
    writer.write({"format": FORMAT, "step": 1})
    with pytest.raises(RunError, match="no space is left"):
        writer.save({"format": FORMAT, "step": 2})


def test_the_best_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    folder, fsync, link, synced, linked = RunFolder(tmp_path), os.fsync, os.link, set(), []

    def remembering(descriptor):
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def checking(source, target):
        linked.append(Path(source).stat().st_ino in synced)
        link(source, target)

    folder.checkpoints.mkdir()
    monkeypatch.setattr(os, "fsync", remembering)
    monkeypatch.setattr(os, "link", checking)
    CheckpointWriter(folder, keep=2).save({"format": FORMAT, "step": 6}, best=True, wait=True)
    assert linked == [True]


def test_damaged_bytes_of_the_lines_are_left_out(tmp_path):
    folder = RunFolder(tmp_path)
    folder.metrics.write_bytes(b'{"kind": "train", "step": 6}\n{"kind": "tr\xff\x00')
    assert read_lines(folder.metrics) == [{"kind": "train", "step": 6}]


def test_figures_that_are_no_numbers_are_none(tmp_path):
    large = "1" + "0" * 400
    lines = [f'{{"kind": "train", "step": 1, "loss": {value}}}' for value in (large, "1e400", "NaN", "1e308", "2.5")]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, f'{{"kind": "train", "step": {large}}}']))
    assert [line["loss"] for line in read_lines(tmp_path / "metrics.jsonl")] == [None] * 4 + [2.5]
