import io
import json
import os
import random
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from wn21k_zoo.errors import DataError
from wn21k_zoo.labels import LabelSpace
from wn21k_zoo.training.data import Loader, Squash, Stage, is_class_folder, open_dataset
from wn21k_zoo.training.foreign import convert_parquet, index_parquet, index_tar, split_of

from .archives import OUTSIDE, WNIDS, jpeg, make_classes, sparse, tar_bytes
from .hub_folder import serve_repository
from .loading import SIZE, batches


def timm_wds(folder, classes, keyed=True):
    """Like timm's WebDataset repositories: several files per key, a json, numbers from another list of classes."""
    samples = [(name, data) for files in classes.values() for name, data in files.items()]
    random.Random(0).shuffle(samples)  # noqa: S311
    for number in range(3):
        files = {}
        for place, (name, data) in enumerate(samples[number::3]):
            key = name.removesuffix(".JPEG") if keyed else f"{number:03d}{place:05d}"
            files |= {f"{key}.cls": b"7", f"{key}.jpg": data, f"{key}.json": json.dumps({"filename": name}).encode()}
        (folder / f"imagenet22k-train-{number:04d}.tar").write_bytes(tar_bytes(files))


@pytest.mark.parametrize("keyed", [True, False])
def test_webdataset_tars_of_others(tmp_path, keyed):
    folder = tmp_path / "wds"
    folder.mkdir()
    classes = make_classes()
    timm_wds(folder, classes, keyed)
    dataset = open_dataset(folder, label_space="winter21")
    assert len(dataset) == sum(len(files) for wnid, files in classes.items() if wnid != OUTSIDE)
    found = batches(Loader(dataset, batch_size=5, training=False, augmentation=Squash(SIZE)))
    counts = np.unique([one for batch in found for one in batch[1]], return_counts=True)
    space = LabelSpace.load("winter21")
    expected = {space.index[wnid]: len(classes[wnid]) for wnid in WNIDS}
    assert dict(zip(counts[0].tolist(), counts[1].tolist(), strict=True)) == expected
    made = sorted((tmp_path / "cache" / "index").glob("*.npy"))
    assert len(made) == 3
    times = [path.stat().st_mtime_ns for path in made]
    open_dataset(folder, label_space="winter21")
    assert [path.stat().st_mtime_ns for path in made] == times


def hugging_face_parquet(folder, classes):
    """Like timm/imagenet-w21-p on Hugging Face: an image struct, a ClassLabel whose names are synsets, row groups."""
    (folder / "data").mkdir(parents=True)
    names = sorted(classes)
    rows = [(name, data, names.index(wnid)) for wnid, files in classes.items() for name, data in files.items()]
    random.Random(0).shuffle(rows)  # noqa: S311
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    for number in range(2):
        mine = rows[number::2]
        image = [{"bytes": webp(data), "path": name.replace("JPEG", "webp")} for name, data, _ in mine]
        table = pa.table({"image": image, "label": pa.array([label for *_, label in mine], pa.int64())})
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, folder / "data" / f"train-{number:05d}-of-00002.parquet", row_group_size=5)
    return rows


def webp(data):
    file = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").save(file, "WEBP", lossless=True)
    return file.getvalue()


def test_parquet_files_of_others(tmp_path):
    classes = make_classes()
    hugging_face_parquet(tmp_path / "hf", classes)
    assert not is_class_folder(tmp_path / "hf")
    named = Loader(
        open_dataset(tmp_path / "hf", stage=Stage(tmp_path / "stage")),
        batch_size=4, training=False, augmentation=Squash(SIZE), names=True,
    )  # fmt: skip
    assert len({name for batch in named for name in batch.names}) == 30  # rows of the two files have the same numbers
    dataset = open_dataset(tmp_path / "hf", stage=Stage(tmp_path / "stage"))
    assert len(dataset) == 30
    space = LabelSpace.load("fall11")
    originals = {}
    for wnid in WNIDS:
        for data in classes[wnid].values():
            pixels = Squash(SIZE)(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), None)
            originals[pixels.tobytes()] = space.index[wnid]
    for workers in (0, 2):
        one = Loader(dataset, batch_size=4, training=False, augmentation=Squash(SIZE), workers=workers)
        seen = 0
        for batch in one:
            for image, target in zip(batch.images, batch.targets.tolist(), strict=True):
                pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).contiguous().numpy()
                assert originals[pixels.tobytes()] == target
                seen += 1
        assert seen == 30


def test_a_table_without_synsets_is_refused(tmp_path):
    pq.write_table(pa.table({"image": [b""], "label": [3]}), tmp_path / "train-0.parquet")
    with pytest.raises(DataError, match="no column that names synsets"):
        open_dataset(tmp_path)
    (tmp_path / "validation-0.tar").write_bytes(tar_bytes({"0001.jpg": jpeg(0), "0001.cls": b"3"}))
    with pytest.raises(DataError, match="neither the key '0001' nor its json names a synset"):
        open_dataset(tmp_path, "validation")
    (tmp_path / "test-0.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(DataError, match="not a readable WebDataset tar"):
        open_dataset(tmp_path, "test")


HUB = """
import sys
from wn21k_zoo.errors import Wn21kError
from wn21k_zoo.training.data import Loader, Squash, open_dataset
try:
    dataset = open_dataset("hf://datasets/" + sys.argv[1], label_space="winter21")
except Wn21kError as error:
    sys.exit(str(error))
loader = Loader(dataset, batch_size=5, training=False, augmentation=Squash(32))
print(len(dataset), sorted(target for batch in loader for target in batch.targets.tolist()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "wds"])
def test_gated_repositories_on_the_hub(tmp_path, kind):
    classes = make_classes()
    repo = "timm/imagenet-w21-p" if kind == "parquet" else "timm/imagenet-22k-wds"
    (tmp_path / "hub").mkdir()
    (hugging_face_parquet if kind == "parquet" else timm_wds)(tmp_path / "hub", classes)
    space = LabelSpace.load("winter21")
    expected = sorted(space.index[wnid] for wnid in WNIDS for _ in classes[wnid])
    with serve_repository(tmp_path / "hub", repo, "hf_right") as endpoint:
        for token, right in (("hf_wrong", False), ("hf_right", True)):
            environment = {
                **os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": token, "HF_HOME": str(tmp_path / "hf"),
                "WN21K_DATA_CACHE": str(tmp_path / "cache"),
            }  # fmt: skip
            command = [sys.executable, "-c", HUB, repo]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            assert (done.returncode == 0) == right, done.stderr
            if right:
                assert done.stdout.strip() == f"{len(expected)} {expected}"
            else:
                assert "cannot be read" in done.stderr
                assert "Traceback" not in done.stderr


CLASSES = {"n02123045": 4, "n02084071": 0}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"n02123045_1.JPG": b"a"}, [(b"a", 4)]),
        ({"n02123045_1.png": b"a", "n02084071_1.webp": b"b"}, [(b"a", 4), (b"b", 0)]),
        ({"n02123045/1.jpg": b"a", "n02084071/1.jpg": b"b"}, [(b"a", 4), (b"b", 0)]),  # one stem in two folders
        ({"n02123045/1.jpg": b"a", "n02123045/1.cls": b"7"}, [(b"a", 4)]),
        ({"n02123045_1.jpg": b"a", "n02123045_1.seg.png": b"mask"}, [(b"a", 4)]),  # a key ends at its first dot
        ({"n02123045_1.jpg": b"a", "n02084071_2.json": b"{}"}, [(b"a", 4)]),  # a sample without an image
        ({"n02123045_1.json": b'{"class_name": "n02084071"}', "n02123045_1.jpg": b"a"}, [(b"a", 4)]),  # the key counts
        ({"01.jpg": b"a", "01.json": b'{"class_name": "n02084071"}'}, [(b"a", 0)]),
        ({"part/01.jpg": b"a", "part/01.json": b'{"synset": "n02084071"}'}, [(b"a", 0)]),
        ({"n07920052_1.jpg": b"a", "n02084071_1.jpg": b"b"}, [(b"b", 0)]),  # a class that is not asked for
    ],
)
def test_samples_of_a_tar_by_key_and_kind(files, expected):
    whole = tar_bytes(files)
    index = index_tar(io.BytesIO(whole), "x.tar", CLASSES).tolist()
    assert [(whole[offset : offset + size], target) for offset, size, target in index] == expected


def test_links_in_a_tar_are_no_images():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        real = tarfile.TarInfo("n02123045_1.jpg")
        real.size = 1
        archive.addfile(real, io.BytesIO(b"a"))
        for kind, name in ((tarfile.LNKTYPE, "n02084071_1.jpg"), (tarfile.SYMTYPE, "n02084071_2.jpg")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, real.name
            archive.addfile(link)
    file.seek(0)
    assert [target for _, _, target in index_tar(file, "x.tar", CLASSES).tolist()] == [4]


@pytest.mark.parametrize("rest", [b"", b"\0" * 10240])
def test_what_stands_behind_the_end_of_a_tar(rest):
    whole = tar_bytes({"n02123045_1.jpg": b"a"})
    assert [target for _, _, target in index_tar(io.BytesIO(whole + rest), "x.tar", CLASSES).tolist()] == [4]
    cut = whole.rstrip(b"\0")
    cut += b"\0" * (-len(cut) % 512)  # without the end-of-archive marker
    with pytest.raises(DataError, match=r"x\.tar is not a readable WebDataset tar: .*no header"):
        index_tar(io.BytesIO(cut + b"rubbish" * 100 + rest), "x.tar", CLASSES)
    with pytest.raises(DataError, match="several archives in one"):
        index_tar(io.BytesIO(whole + rest + whole), "x.tar", CLASSES)


def test_what_macos_lays_beside_tars_is_no_shard(tmp_path):
    (tmp_path / "imagenet-train-0000.tar").write_bytes(tar_bytes({f"{WNIDS[0]}_1.jpg": jpeg(0, 40, 40)}))
    (tmp_path / "._imagenet-train-0000.tar").write_bytes(b"x")
    assert len(open_dataset(tmp_path, label_space="fall11")) == 1


def test_nine_digits_are_no_synset():
    with pytest.raises(DataError, match="neither the key"):
        index_tar(io.BytesIO(tar_bytes({"n021230451.jpg": b"a"})), "x.tar", CLASSES)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("imagenet22k-train-0000.tar", "train"), ("data/validation-00000-of-00013.parquet", "validation"),
        ("train/imagenet-val-0001.tar", "validation"), ("valid_0.tar", "validation"), ("TEST-0.tar", "test"),
        ("trains-0.tar", None),
    ],
)  # fmt: skip
def test_the_split_that_a_name_says(name, split):
    assert split_of(name) == split


def parquet(table, names=None, **options):
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file


@pytest.mark.parametrize(
    "metadata", ["no json", "[1]", '{"info": 3}', '{"info": {"features": {"label": {"names": 3}}}}']
)
def test_metadata_that_is_no_data_sets(metadata):
    table = pa.table({"label": [1, 2]}).replace_schema_metadata({"huggingface": metadata})
    with pytest.raises(DataError, match=r"x\.parquet"):
        index_parquet(parquet(table), "x.parquet", CLASSES)


def test_rows_of_a_table_by_a_column_of_text(tmp_path):
    # A name in words besides the synset, a class 0, a class that is not asked for, and one missing image.
    table = pa.table(
        {
            "label": ["tabby", "dog", "espresso", "dog"],
            "synset": ["n02123045", "x/n02084071_9.JPEG", "n07920052", "n02084071"],
            "image": [b"a", None, b"c", b"d"],
        }
    )
    rows = index_parquet(parquet(table), "x.parquet", CLASSES)
    assert rows[["offset", "target"]].tolist() == [(0, 4), (1, 0), (3, 0)]
    index = convert_parquet(parquet(table), rows, tmp_path / "x.tar").tolist()
    whole = (tmp_path / "x.tar").read_bytes()
    assert [(whole[offset : offset + size], target) for offset, size, target in index] == [
        (b"a", 4), (b"", 0), (b"d", 0),
    ]  # fmt: skip


def test_numbers_whose_names_are_not_all_synsets_say_no_class():
    table = pa.table({"label": [0, 1], "image": [b"a", b"b"]})
    assert index_parquet(parquet(table, ["n02123045", "n02084071"]), "x", CLASSES)["target"].tolist() == [4, 0]
    with pytest.raises(DataError, match="no column that names synsets"):
        index_parquet(parquet(table, ["n02123045", "dog"]), "x", CLASSES)


def test_rows_without_a_label_have_no_class():
    table = pa.table({"label": pa.array([0, -1, None, 1, 2], pa.int64()), "image": [b"a"] * 5})
    rows = index_parquet(parquet(table, ["n02123045", "n02084071"]), "x", CLASSES)
    assert rows[["offset", "target"]].tolist() == [(0, 4), (3, 0)]


def test_images_are_those_with_bytes_and_may_be_missing(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    box = [{"x": number} for number in range(3)]
    images = pa.array([{"bytes": b"a", "path": "a"}, {"bytes": None, "path": "b"}, None], kind)
    table = pa.table({"box": box, "picture": images, "synset": ["n02123045"] * 3})
    rows = index_parquet(parquet(table), "x.parquet", CLASSES)
    index = convert_parquet(parquet(table), rows, tmp_path / "x.tar")
    assert index["size"].tolist() == [1, 0, 0]


def test_paths_in_place_of_images_are_refused():
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array([{"bytes": None, "path": "a"}] * 3, kind), "synset": ["n02123045"] * 3})
    with pytest.raises(DataError, match=r"x\.parquet holds paths of images and not the images"):
        index_parquet(parquet(table), "x.parquet", CLASSES)
    assert len(index_parquet(parquet(table, write_statistics=False), "x", CLASSES)) == 3  # cannot be told


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())])
def test_columns_of_text_of_any_kind(kind):
    try:
        synsets = pa.array(["n02123045", "n07920052", "n02084071"]).cast(kind)
        file = parquet(pa.table({"synset": synsets, "image": [b"a"] * 3}))
    except pa.ArrowNotImplementedError:
        pytest.skip(f"pyarrow {pa.__version__} cannot make {kind}")
    rows = index_parquet(file, "x", CLASSES)
    assert rows[["offset", "target"]].tolist() == [(0, 4), (2, 0)]


def test_a_damaged_index_is_made_anew(tmp_path):
    folder = tmp_path / "wds"
    folder.mkdir()
    timm_wds(folder, make_classes(), keyed=True)
    whole = len(open_dataset(folder, label_space="winter21"))
    first, second, third = sorted((tmp_path / "cache" / "index").glob("*.npy"))
    first.write_bytes(b"")
    second.write_bytes(second.read_bytes()[:-5])
    before = third.stat().st_mtime_ns
    assert len(open_dataset(folder, label_space="winter21")) == whole
    assert third.stat().st_mtime_ns == before


def test_details_of_an_image_have_a_bound(tmp_path):
    (tmp_path / "train-0000.tar").write_bytes(tar_bytes({"abc.jpg": b"x", "abc.json": bytes(1 << 25)}))
    with pytest.raises(DataError, match=r"abc\.json is too large for the details of an image"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("name", ["n02121808_1.jpg", "abc.json"])
def test_images_and_details_with_holes_are_refused(tmp_path, name):
    (tmp_path / "train-0000.tar").write_bytes(sparse(name, 1 << 32))
    with pytest.raises(DataError, match=f"{name} was packed with holes"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("name", ["n02121808_1.json", "n00000000_1.jpg", "n02121808_1.txt"])
def test_holes_in_what_is_not_read_are_no_matter(tmp_path, name):
    image = tar_bytes({"n02121808_1.jpg": b"x"})[:1024]
    (tmp_path / "train-0000.tar").write_bytes(image + sparse(name, 1 << 32))
    assert len(open_dataset(tmp_path)) == 1
