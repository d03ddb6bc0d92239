import csv
import hashlib
import io
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from wn21k_zoo.cli.app import app
from wn21k_zoo.errors import DataError, UnknownSynsetError
from wn21k_zoo.labels import LabelSpace
from wn21k_zoo.training.data import Loader, open_dataset
from wn21k_zoo.training.inspect import contact_sheet, describe, verify_shards
from wn21k_zoo.training.prepare import PrepareOptions, prepare
from wn21k_zoo.training.shards import INFO_FILE, MANIFEST_FILE, index_path, read_index, read_info, write_index

from .archives import WNIDS, jpeg, make_classes, nested_tar, split_files, write_folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "source.tar").write_bytes(nested_tar(make_classes()))
    options = PrepareOptions(min_images=5, val_per_class=2, size=32, shard_size=7)
    prepare(folder / "source.tar", folder / "out", options, workers=1)
    return folder / "out"


@pytest.fixture
def copy(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "copy")


def run(*arguments):
    return CliRunner().invoke(app, ["data", *map(str, arguments)])


def test_a_split_without_images_is_told(tmp_path):
    (tmp_path / "source.tar").write_bytes(nested_tar(make_classes()))
    for number, split in ((0, "validation"), (100, "train")):
        options = ("--min-images", 0, "--val-per-class", number, "--size", 16, "-j", 1)
        done = run("prepare", tmp_path / "source.tar", tmp_path / split, *options)
        assert done.exit_code == 0
        assert f"no images for {split}" in done.stderr
        assert done.stderr.count("no images for") == 1


def test_of_a_source_that_is_split_options_of_splitting_are_no_advice(tmp_path):
    write_folder(tmp_path / "source", {f"train/{WNIDS[0]}/{number}.jpg": jpeg(number) for number in range(3)})
    done = run("prepare", tmp_path / "source", tmp_path / "out", "-j", 1)
    assert "there are no images for validation\n" in done.stderr


def test_info_counts(prepared):
    described = describe(prepared)
    assert described["splits"]["train"] == {
        "images": 24, "classes": 3, "bytes": described["splits"]["train"]["bytes"], "shards": 4,
        "fewest": 4, "median": 10.0, "most": 10, "imbalance": 2.5,
    }  # fmt: skip
    assert described["splits"]["validation"]["images"] == 6
    levels = described["depths"]
    assert [level["classes"] for level in levels] == [302, 1378, 2100, 2605, 2204, 1371, 716, 290, 146, 82, 26, 1]
    assert sum(level["with_images"] for level in levels) == 3
    assert sum(level["images"] for level in levels) == 24
    shown = run("info", prepared, "-f", "json")
    assert json.loads(shown.stdout) == json.loads(json.dumps(described))
    (line,) = run("info", prepared, "-f", "jsonl").stdout.splitlines()
    assert json.loads(line) == json.loads(shown.stdout)
    shown = run("info", prepared, "-f", "table").stdout
    assert "imbalance" in shown
    assert "with images" in shown
    rows = list(csv.DictReader(io.StringIO(run("info", prepared, "-f", "csv").stdout)))
    assert [(row["split"], row["images"]) for row in rows] == [("train", "24"), ("validation", "6")]


def test_a_contact_sheet_shows_the_images_of_a_class(prepared, tmp_path):
    sheet = contact_sheet(prepared, WNIDS[0], count=8, columns=4)
    assert sheet.size == (4 * 116 + 4, 2 * 130 + 24)
    assert np.asarray(sheet)[30:130, 10:110].std() > 5  # a picture, not blank
    assert contact_sheet(prepared, WNIDS[2], count=8, columns=4).size == (4 * 116 + 4, 130 + 24)  # it has only four
    assert contact_sheet(prepared, None, "validation").size == (8 * 116 + 4, 130 + 24)
    with pytest.raises(UnknownSynsetError, match="Did you mean n02123045"):
        contact_sheet(prepared, "n02123046")
    with pytest.raises(UnknownSynsetError, match="has no image of n02121808"):
        contact_sheet(prepared, "n02121808")
    with pytest.raises(DataError, match="no split 'test'"):
        contact_sheet(prepared, None, "test")
    done = run("show", prepared, "--synset", WNIDS[0], "-o", tmp_path / "sheet.png")
    assert done.stdout.strip() == str(tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.format == "PNG"
    assert "cannot be written" in run("show", prepared, "-o", tmp_path / "no" / "sheet.png").stderr


def test_what_macos_lays_beside_files_is_no_damage(copy):
    for path in [*copy.rglob("*")]:
        if path.is_file():
            path.with_name(f"._{path.name}").write_bytes(b"x")
    assert verify_shards(copy) == []


def test_verify_finds_nothing_where_nothing_is_wrong(prepared):
    steps = []
    assert verify_shards(prepared, lambda *step: steps.append(step)) == []
    assert steps[-1][0] == steps[-1][1]
    for kind, expected in (("table", ""), ("json", "[]\n"), ("jsonl", ""), ("csv", "file,key,problem\n")):
        done = run("verify", prepared, "-f", kind)
        assert (done.exit_code, done.stdout) == (0, expected)


def test_verify_names_a_damaged_image_that_had_a_twin(tmp_path):
    images = {f"{WNIDS[0]}_{number}.JPEG": jpeg(min(number, 2)) for number in range(4)}  # the last two are equal
    (tmp_path / "source.tar").write_bytes(nested_tar({WNIDS[0]: images}))
    options = PrepareOptions(min_images=0, val_per_class=0, size=512)
    prepare(tmp_path / "source.tar", tmp_path / "out", options, workers=1)
    (shard,) = read_info(tmp_path / "out").splits["train"]
    index = read_index(index_path(tmp_path / "out" / shard.name))
    hashes = manifest_hashes(tmp_path / "out")
    twins = [key for key, digest in hashes.items() if list(hashes.values()).count(digest) == 2]
    with (tmp_path / "out" / shard.name).open("r+b") as file:
        for entry in index:
            file.seek(int(entry["offset"]))
            if hashlib.sha256(file.read(int(entry["size"]))).hexdigest() == hashes[twins[0]]:
                file.seek(int(entry["offset"]) + 50)
                file.write(b"damage")
                break
    _, *damages = verify_shards(tmp_path / "out")
    assert {damage.key: damage.problem for damage in damages} == dict.fromkeys(
        twins, "the image is damaged, or another of 2 identical ones"
    )


def manifest_hashes(folder):
    rows = pq.read_table(folder / "manifest.parquet", columns=["key", "sha256"]).to_pylist()
    return {row["key"]: row["sha256"] for row in rows}


def test_verify_names_the_damaged_image(copy):
    shard = read_info(copy).splits["train"][1]
    entry = read_index(index_path(copy / shard.name))[3]
    with (copy / shard.name).open("r+b") as file:
        file.seek(int(entry["offset"]) + 50)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    first, second = verify_shards(copy)
    assert first.problem.startswith("has sha256 ")
    assert second.problem == "the image is damaged"
    assert second.key.startswith("n0")
    done = run("verify", copy, "-f", "csv")
    assert done.exit_code == 1
    assert f"{shard.name},{second.key},the image is damaged" in done.stdout


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: (folder / "train-00000.tar").unlink(), "cannot be read"),
        (lambda folder: index_path(folder / "train-00000.tar").unlink(), "cannot be read"),
        (lambda folder: index_path(folder / "train-00000.tar").write_bytes(b"no array"), "cannot be read"),
        (lambda folder: (folder / MANIFEST_FILE).write_bytes(b"no table"), "cannot be read"),
        (lambda folder: (folder / "train-00000.tar").write_bytes(b""), "has sha256"),
        (lambda folder: shutil.copy(folder / "train-00000.tar", folder / "train-00099.tar"), "is in no split"),
    ],
)
def test_verify_tells_what_is_missing(copy, damage, problem):
    damage(copy)
    assert any(problem in one.problem for one in verify_shards(copy))
    assert "wn21k data verify" not in str(verify_shards(copy))


def test_verify_hashes_shards_whose_index_is_missing(copy):
    index_path(copy / "train-00000.tar").unlink()
    (copy / "train-00000.tar").write_bytes(b"")
    assert [one.file for one in verify_shards(copy)] == ["train-00000.tar", "__index__/train-00000.npy"]


@pytest.mark.parametrize("column", ["synset", "split", "shard", "key", "sha256"])
def test_verify_names_a_manifest_that_is_damaged_anywhere(copy, column):
    with pq.ParquetFile(copy / MANIFEST_FILE) as file:
        group = file.metadata.row_group(0)
        chunk = next(
            group.column(number) for number in range(group.num_columns) if group.column(number).path_in_schema == column
        )
        start, size = chunk.dictionary_page_offset or chunk.data_page_offset, chunk.total_compressed_size
    with (copy / MANIFEST_FILE).open("r+b") as file:
        file.seek(start)
        file.write(b"\xff" * size)
    with (copy / "train-00000.tar").open("r+b") as file:
        file.write(b"damage")
    manifest, shard = verify_shards(copy)
    assert (manifest.file, manifest.problem.partition(":")[0]) == (MANIFEST_FILE, "cannot be read")
    assert (shard.file, shard.problem.partition(" ")[0]) == ("train-00000.tar", "has")


def test_verify_sees_labels_that_are_out_of_range_or_wrong(copy):
    path = index_path(copy / "train-00000.tar")
    index = read_index(path).copy()
    original = index["target"][0]
    index["target"][0] = len(LabelSpace.load("fall11"))
    write_index(path, index)
    assert any("1 class indices are outside" in one.problem for one in verify_shards(copy))
    index["target"][0] = original + 1
    write_index(path, index)
    (damage,) = verify_shards(copy)
    assert damage.problem == "does not fit train-00000.tar: place, size or class of 1 of 7 images"


def _swapped(index, field):
    other = next(number for number, each in enumerate(index) if each["target"] != index[0]["target"])
    index[field][[0, other]] = index[field][[other, 0]]


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda index: _swapped(index, "target"), 2),
        (lambda index: _swapped(index, "offset"), 2),
        (lambda index: index["size"].__ifloordiv__(2), 7),
        (lambda index: index.__setitem__(0, index[1]), 1),
        (lambda index: index["offset"].__iadd__(512), 7),
        (lambda index: index["offset"].__setitem__(slice(None), 0), 7),
    ],
)
def test_verify_sees_an_index_that_names_other_images_or_classes(copy, change, wrong):
    path = index_path(copy / "train-00001.tar")
    index = read_index(path).copy()
    change(index)
    write_index(path, index)
    (damage,) = verify_shards(copy)
    assert damage.file == "__index__/train-00001.npy"
    assert damage.problem == f"does not fit train-00001.tar: place, size or class of {wrong} of 7 images"


def test_verify_sees_a_manifest_with_another_class(copy):
    table = pq.read_table(copy / MANIFEST_FILE)
    rows = table.to_pylist()
    used = next(row for row in rows if row["shard"] == "train-00000.tar")
    used["synset"] = next(wnid for wnid in WNIDS if wnid != used["synset"])
    pq.write_table(table.from_pylist(rows, table.schema), copy / MANIFEST_FILE)
    (damage,) = verify_shards(copy)
    assert (damage.file, damage.problem) == ("train-00000.tar", "its classes are not those that the manifest lists")


@pytest.mark.parametrize("offset", [2**20, 2**45, 2**64 - 1])
def test_an_index_that_points_beyond_its_shard(copy, offset):
    path = index_path(copy / "train-00000.tar")
    index = read_index(path).copy()
    index["offset"][1] = offset
    write_index(path, index)
    (damage,) = verify_shards(copy)
    assert damage.file == "__index__/train-00000.npy"
    assert damage.problem == "places 1 images beyond the end of train-00000.tar"
    done = run("show", copy, "-o", copy / "sheet.png")
    assert done.exit_code == 0 or "run `wn21k data verify`" in done.stderr
    loader = Loader(open_dataset(copy, "train"), batch_size=4, training=False, max_bad=0.5)
    assert sum(len(batch) for batch in loader) == len(loader.dataset) - 1
    assert loader.bad_samples == 1


@pytest.mark.parametrize("command", ["info", "verify", "show"])
@pytest.mark.slow
def test_what_is_no_prepared_folder_is_one_line(tmp_path, command):
    for place, message in (
        (tmp_path, "has no _info.json"),
        (tmp_path / "no", "is not a folder"),
        (__file__, "is a file"),
    ):
        done = run(command, place)
        assert done.exit_code == 1
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    (tmp_path / "_info.json").write_text('{"splits": {}}')
    assert "is not as" in run(command, tmp_path).stderr
    (tmp_path / "_info.json").unlink()
    (tmp_path / "_info.json").mkdir()
    assert "_info.json cannot be read (" in run(command, tmp_path).stderr


def test_prepare_on_the_command_line(tmp_path, prepared):
    source = prepared.parent / "source.tar"
    options = ["--min-images", "5", "--val-per-class", "2", "--size", "32", "--shard-size", "7", "--workers", "1"]
    done = run("prepare", source, tmp_path / "out", *options)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == (prepared / "SUMMARY.md").read_text()
    files = [path.relative_to(prepared) for path in prepared.rglob("*") if path.is_file()]
    assert all((tmp_path / "out" / path).read_bytes() == (prepared / path).read_bytes() for path in files)
    dry = run("prepare", source, tmp_path / "dry", *options, "--dry-run", "-f", "json")
    assert {row["decision"]: row["train"] for row in json.loads(dry.stdout)} == {
        "kept": 24,
        "outside the label space": 0,
    }
    assert "are free at" in dry.stderr
    assert not (tmp_path / "dry").exists()
    wrong = run("prepare", source, tmp_path / "out", "--label-space", "fal11")
    assert (wrong.exit_code, "Did you mean fall11" in wrong.stderr) == (1, True)
    assert run("prepare", source, tmp_path / "out", "--quality", "101").exit_code == 2


def test_a_manifest_whose_type_is_damaged_does_not_hang(copy):
    content = bytearray((copy / MANIFEST_FILE).read_bytes())
    kind = content.rindex(b"\x15\x0c\x19", 0, content.rindex(b"\x05shard\x15\x0c")) + 1
    content[kind] = 0x0E  # the physical type of the column shard
    (copy / MANIFEST_FILE).write_bytes(content)
    assert {damage.file for damage in verify_shards(copy)} <= {MANIFEST_FILE}  # Arrow may still read it


def test_a_dry_run_counts_a_class_of_two_splits_once(tmp_path):
    classes = {wnid: files for wnid, files in make_classes().items() if wnid in WNIDS}
    write_folder(tmp_path, split_files(classes, validation=2))
    dry = run("prepare", tmp_path / "imagenet21k_resized", tmp_path / "out", "-j", 1, "--dry-run", "-f", "json")
    (row,) = json.loads(dry.stdout)
    assert (row["decision"], row["classes"], row["train"], row["validation"]) == ("kept", 3, 24, 6)
    assert "validation images alone" not in dry.stderr
    shutil.rmtree(tmp_path / "imagenet21k_resized" / "imagenet21k_train" / WNIDS[0])
    dry = run("prepare", tmp_path / "imagenet21k_resized", tmp_path / "out", "-j", 1, "--dry-run", "-f", "json")
    assert "1 classes would have validation images alone" in dry.stderr


@pytest.mark.parametrize("whole", [0.5, 0.99, "version", "lists"])
def test_a_damaged_description_of_ours_is_not_read_as_of_others(copy, whole):
    text = (copy / INFO_FILE).read_text()
    damaged = {"version": text.replace("version 1", "version 9"), "lists": text.replace('"filenames"', '"names"')}
    (copy / INFO_FILE).write_text(damaged[whole] if isinstance(whole, str) else text[: int(whole * len(text))])
    with pytest.raises(DataError, match=r"_info\.json of .* is damaged .*fetch it again"):
        open_dataset(copy)
    (copy / INFO_FILE).write_text('{"splits": {"train": {}}}')  # timm's
    assert open_dataset(copy).label_space.name == "imagenet21k_p_fall11"


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("num_samples", 25, "num_samples of train is 25, its shards have 24"),
        ("num_samples", "24", "num_samples of train is '24'"),
        ("name", "validation", "its split 'train' has the name 'validation'"),
        ("shard_lengths", [10**30, 7, 7, 3], "no size or length"),
        ("num_bytes", [-1, 1, 1, 1], "no size or length"),
        ("filenames", ["a.tar"], "argument"),
    ],
)
def test_a_description_that_contradicts_itself(copy, field, value, problem):
    whole = json.loads((copy / INFO_FILE).read_text())
    whole["splits"]["train"][field] = value
    (copy / INFO_FILE).write_text(json.dumps(whole))
    for command in ("info", "verify", "show"):
        done = run(command, copy)
        assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
        assert problem in done.stderr
