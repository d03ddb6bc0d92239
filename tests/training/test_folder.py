import os
import shutil
import sys
import unicodedata
from pathlib import Path

import pytest

from wn21k_zoo.cli.predict import _expand
from wn21k_zoo.errors import BadImagesError, DataError, InvalidArgumentError, MissingExtraError
from wn21k_zoo.images import IMAGE_SUFFIXES
from wn21k_zoo.labels import ClassNames, LabelSpace
from wn21k_zoo.training.crops import CenterCrop
from wn21k_zoo.training.data import Loader, is_class_folder, open_dataset, open_folder, open_folders
from wn21k_zoo.training.folder import is_among, is_divided
from wn21k_zoo.tree import SemanticTree

from .archives import OUTSIDE, jpeg
from .runs import WNIDS, make_folder


def names(folder):
    return [folder.name(sample) for sample in range(len(folder))]


def test_one_image_in_ten_is_for_validation_and_none_is_in_both(tmp_path):
    make_folder(tmp_path, images=20)
    train, validation = open_folder(tmp_path), open_folder(tmp_path, "validation")
    assert (len(train), len(validation)) == (6 * 18, 6 * 2)
    assert not set(names(train)) & set(names(validation))
    assert len(open_folder(tmp_path, "all")) == 120
    assert train.class_names == tuple(sorted(WNIDS))
    assert train.label_space.wnids == train.class_names


@pytest.mark.parametrize(("images", "chosen"), [(1, 0), (2, 1), (9, 1), (19, 1), (20, 2)])
def test_of_few_images_one_is_for_validation(tmp_path, images, chosen):
    make_folder(tmp_path, images=30, names=("a",))
    make_folder(tmp_path, images=images, names=("b",))
    assert [(each.targets == 1).sum() for each in open_folders(tmp_path)] == [images - chosen, chosen]


def test_which_images_are_for_validation_and_their_order_are_what_they_have_always_been(tmp_path):
    make_folder(tmp_path, images=12, names=("a", "b"))
    assert names(open_folder(tmp_path, "validation")) == ["b/1.jpg", "a/7.jpg"]
    assert names(open_folder(tmp_path))[:4] == ["a/2.jpg", "a/6.jpg", "a/1.jpg", "b/0.jpg"]


def test_a_group_has_its_own_images(tmp_path):
    for number in range(1203):
        path = tmp_path / "train" / ("a" if number % 3 else "b") / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(number))
    make_folder(tmp_path / "val", images=1, names=("a",))
    folder = open_folder(tmp_path)
    assert folder.lengths == (1000, 203)
    for group, first in ((0, 0), (1, 1000)):
        files, index = folder.open(group)
        assert index["target"].tolist() == folder.targets[first : first + 1000].tolist()
        for place in (0, len(index) - 1):
            name = folder.name(first + place)
            assert files.key(int(index["offset"][place])) == name
            assert files.read(int(index["offset"][place]), 0).decode() == name.rpartition("/")[2].removesuffix(".jpg")


def test_divided_as_the_user_divided_it(tmp_path):
    make_folder(tmp_path / "train", images=3, names=("a", "b"))
    make_folder(tmp_path / "val", images=2, names=("a", "b"))
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "a" / "deeper").mkdir()
    (tmp_path / "train" / "a" / "deeper" / "x.JPG").write_bytes(jpeg(1))
    assert (len(open_folder(tmp_path)), len(open_folder(tmp_path, "validation"))) == (7, 4)
    assert open_folder(tmp_path).label_space is None
    make_folder(tmp_path / "val", images=1, names=("c",))
    with pytest.raises(DataError, match="has the class c, which"):
        open_folder(tmp_path, "validation")


def test_a_class_may_have_no_image_for_validation(tmp_path):
    make_folder(tmp_path / "x", images=10, names=("a", "b"))
    make_folder(tmp_path / "x", images=1, names=("c",))
    assert len(open_folder(tmp_path / "x")) == 19
    validation = open_folder(tmp_path / "x", "validation")
    assert (len(validation), validation.class_names) == (2, ("a", "b", "c"))
    make_folder(tmp_path / "y", images=1, names=("a", "b"))
    with pytest.raises(DataError, match="one image of each class, so none can be held out"):
        open_folder(tmp_path / "y", "validation")
    (tmp_path / "y" / "empty").mkdir()
    with pytest.raises(DataError, match="the class a has no images"):
        open_folder(tmp_path / "y", "validation")
    make_folder(tmp_path / "z" / "train", images=1, names=("a", "b"))
    (tmp_path / "z" / "val" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="validation: the class a has no images"):
        open_folder(tmp_path / "z", "validation")


def test_a_class_may_have_no_folder_for_validation(tmp_path):
    make_folder(tmp_path / "train", names=("a", "b", "c"))
    make_folder(tmp_path / "val", names=("a", "c"))
    training, validation, whole = open_folders(tmp_path, ("train", "validation", "all"))
    assert training.class_names == validation.class_names == ("a", "b", "c")
    assert (len(training), len(validation), len(whole)) == (30, 20, 50)
    assert set(validation.targets.tolist()) == {0, 2}


def test_a_test_set_beside_the_two_is_a_split_of_its_own(tmp_path):
    for split, images in (("train", 3), ("val", 2), ("test", 5)):
        make_folder(tmp_path / "x" / split, images=images, names=("a", "b"))
    (tmp_path / "x" / "test" / "c").mkdir()
    with pytest.raises(DataError, match=r"test has the class c, which .*train lacks"):
        open_folder(tmp_path / "x", "test")
    (tmp_path / "x" / "test" / "c").rmdir()
    opened = open_folders(tmp_path / "x", ("train", "validation", "test", "all"))
    assert [len(each) for each in opened] == [6, 4, 10, 10]
    assert names(opened[2])[0].startswith("test/")
    assert not {*names(opened[2])} & {*names(opened[3])}
    make_folder(tmp_path / "y" / "train", names=("a", "b"))
    make_folder(tmp_path / "y" / "test", images=1, names=("a", "b"))  # then it is what a run is validated on
    assert names(open_folder(tmp_path / "y", "test")) == names(open_folder(tmp_path / "y", "validation"))
    make_folder(tmp_path / "z", names=("a", "test"))  # a class
    for place in (tmp_path / "z", tmp_path / "x" / "val"):
        with pytest.raises(DataError, match="has no folders train and test;"):
            open_folder(place, "test")
    make_folder(tmp_path / "w" / "train", names=("a", "b"))
    make_folder(tmp_path / "w" / "val", names=("a", "b"))
    with pytest.raises(DataError, match="no folder test beside train;"):
        open_folder(tmp_path / "w", "test")


def test_one_name_in_two_forms_of_unicode_is_one_class(tmp_path):
    one, two = (unicodedata.normalize(form, "käse") for form in ("NFC", "NFD"))
    assert one != two
    parts = [[open_folders(make_folder(tmp_path / form, names=(name, "b")))] for form, name in (("1", one), ("2", two))]
    for composed, decomposed in zip(*(datasets for (datasets,) in parts), strict=True):
        assert composed.class_names == decomposed.class_names == ("b", one)
        names = [[each.name(index) for index in range(len(each))] for each in (composed, decomposed)]
        assert names[0] == [unicodedata.normalize("NFC", name) for name in names[1]]
        assert all((tmp_path / "2" / name).is_file() for name in names[1])
    make_folder(tmp_path / "3" / "train", names=(one, "b"))
    make_folder(tmp_path / "3" / "val", names=(two, "b"))
    assert [len(each) for each in open_folders(tmp_path / "3")] == [20, 20]
    trained, again = (open_folder(tmp_path / each, "train") for each in "12")
    assert trained.digest == again.digest  # so a run can resume
    assert again.mapped((two, "b"), "class").targets.tolist() == again.mapped((one, "b"), "class").targets.tolist()
    make_folder(tmp_path / "1", names=(two,))
    with pytest.raises(DataError, match="whose names look alike"):
        open_folder(tmp_path / "1", "train")


def test_what_macos_adds_to_archives_is_no_class(tmp_path):
    make_folder(tmp_path, names=("a", "b"))
    (tmp_path / "__MACOSX" / "a").mkdir(parents=True)
    (tmp_path / "__MACOSX" / "a" / "._0.jpg").write_bytes(b"x")
    assert is_class_folder(tmp_path)
    assert open_folder(tmp_path, "train").class_names == ("a", "b")


def test_a_class_called_train_with_another_capital_divides_nothing(tmp_path):
    make_folder(tmp_path, names=("Train", "bus"))
    assert not is_divided(tmp_path)
    assert not is_divided(tmp_path / "nowhere")
    assert open_folder(tmp_path, "train").class_names == ("Train", "bus")
    (tmp_path / "Val").mkdir()
    with pytest.raises(DataError, match="call them train and val, in lower case"):
        open_folder(tmp_path, "train")


def test_hidden_files_are_no_images(tmp_path):
    make_folder(tmp_path, images=2, names=("a", "b"))
    (tmp_path / "a" / "._0.jpg").write_bytes(b"of macOS")
    (tmp_path / "a" / ".cache").mkdir()
    (tmp_path / "a" / ".cache" / "x.jpg").write_bytes(jpeg(1))
    assert len(open_folder(tmp_path, "all")) == 4


def test_images_are_those_that_a_prediction_takes_from_a_folder(tmp_path):
    for each in ("a", "b"):
        (tmp_path / each).mkdir()
        (tmp_path / each / "notes.txt").touch()
        (tmp_path / each / "._0.jpg").touch()  # as macOS creates
        for number, suffix in enumerate(IMAGE_SUFFIXES):
            (tmp_path / each / f"{number}{suffix.upper()}").touch()
    folder = open_folder(tmp_path, "all")
    assert len(folder) == 2 * len(IMAGE_SUFFIXES)
    assert {str(tmp_path / name) for name in names(folder)} == {*_expand([str(tmp_path)])}


def test_shards_in_folders_are_no_classes(tmp_path):
    make_folder(tmp_path / "photos", images=2, names=("a", "b"))
    assert is_class_folder(tmp_path / "photos")
    for split in ("train", "validation"):
        (tmp_path / "shards" / split).mkdir(parents=True)
        (tmp_path / "shards" / split / "0.tar").touch()
    assert not is_class_folder(tmp_path / "shards")
    (tmp_path / "photos" / "a" / "backup.tar").touch()  # beside images
    assert is_class_folder(tmp_path / "photos")


@pytest.mark.parametrize("prepared", ["_info.json", ".work/options.json"])
def test_shards_that_were_prepared_within_a_folder_are_none_of_its_classes(tmp_path, prepared):
    make_folder(tmp_path, images=2, names=("b", "c"))
    for path in (tmp_path / "a/train-00000.tar", tmp_path / "a/__index__/train-00000.npy", tmp_path / "a" / prepared):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert is_class_folder(tmp_path)
    assert open_folder(tmp_path, "all").class_names == ("b", "c")
    for split in ("train", "val"):
        make_folder(tmp_path / split, images=2, names=("b", "c"))
    assert open_folder(tmp_path, "validation").class_names == ("b", "c")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="who may read anything")
def test_a_folder_that_cannot_be_read_says_nothing(tmp_path):
    make_folder(tmp_path, images=2, names=("a", "b"))
    (tmp_path / "lost+found").mkdir(mode=0)
    assert is_class_folder(tmp_path)


def test_heif_photographs_want_their_extra(tmp_path, monkeypatch):
    make_folder(tmp_path, images=2, names=("a", "b"))
    (tmp_path / "a" / "x.HEIC").touch()
    assert len(open_folder(tmp_path, "all")) == 5
    monkeypatch.setattr("wn21k_zoo.training.folder.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"Reading the HEIF photographs in .*/a needs an extra: .*heif"):
        open_folder(tmp_path, "all")


def test_a_sketch_tells_how_much_two_folders_have_in_common(tmp_path):
    def common(one, other):
        return len({*one.sketch.split()} & {*other.sketch.split()}) / len(one.sketch.split())

    make_folder(tmp_path, images=150, names=("a", "b"))
    before = open_folder(tmp_path, "all")
    for path in sorted((tmp_path / "a").iterdir())[:20]:
        path.unlink()
    (tmp_path / "b" / "new.jpg").write_bytes(jpeg(1))
    assert 0.8 < common(before, open_folder(tmp_path, "all")) < 1
    sketch = before.sketch
    for path in (*(tmp_path / "a").iterdir(), *(tmp_path / "b").iterdir()):
        place = tmp_path / ("val" if path.stem.endswith("0") else "train") / path.parent.name
        place.mkdir(parents=True, exist_ok=True)
        path.rename(place / path.name)
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "b")
    assert open_folder(tmp_path).share_in(sketch) > 0.9
    assert open_folder(tmp_path / "val", "all").share_in(open_folder(tmp_path, "validation").sketch) == 1
    assert open_folder(tmp_path, "validation").share_in(open_folder(tmp_path).sketch) == 0
    assert open_folder(tmp_path).share_in("") == 0
    make_folder(tmp_path / "others", images=150, names=("c", "d"))
    assert common(before, open_folder(tmp_path / "others", "all")) == 0


def test_a_picture_beside_shards_makes_no_class_of_them(tmp_path):
    make_folder(tmp_path, images=2, names=("cat", "dog"))
    for name in ("manifest.parquet", "__index__/train-00000.npy"):
        (tmp_path / "shards" / "__index__").mkdir(parents=True)
        for file in ("_info.json", "train-00000.tar", "sheet.png", name):
            (tmp_path / "shards" / file).touch()
        assert is_class_folder(tmp_path)
        assert open_folder(tmp_path, "all").class_names == ("cat", "dog")
        shutil.rmtree(tmp_path / "shards")


def test_a_class_with_a_file_of_such_a_name_is_a_class(tmp_path):
    make_folder(tmp_path, images=3, names=("cat", "cow", "dog"))
    (tmp_path / "cow" / "_info.json").write_text('{"a": 1}')
    (tmp_path / "cow" / "originals.tar").touch()
    assert open_folder(tmp_path, "all").class_names == ("cat", "cow", "dog")
    assert is_class_folder(tmp_path)


def test_images_that_are_numbered_alike_are_not_the_same(tmp_path):
    for number, part in enumerate(("train", "val", "test")):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(12):
                (tmp_path / part / name / f"{index:04}.jpg").write_bytes(jpeg(20 * number + index))
    train, validation, test = (open_folder(tmp_path, split) for split in ("train", "validation", "test"))
    assert [train.share_in(each.sketch) for each in (train, validation, test)] == [1, 0, 0]
    assert open_folder(tmp_path / "val", "all").share_in(validation.sketch) == 1
    assert open_folder(tmp_path / "val", "all").share_in(train.sketch) == 0


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_links_to_images_and_classes_are_followed_and_dead_ones_are_not(tmp_path):
    store = make_folder(tmp_path / "store", images=3, names=("a", "b"))
    root = make_folder(tmp_path / "set", images=1, names=("a",))
    (root / "b").symlink_to(store / "b")
    (root / "a" / "linked.jpg").symlink_to(store / "a" / "0.jpg")
    (root / "a" / "dead.jpg").symlink_to(store / "a" / "gone.jpg")
    (root / "a" / "up").symlink_to(root)  # would never end
    (root / "a" / "round.jpg").symlink_to(root / "a" / "round.jpg")
    assert set(names(open_folder(root, "all"))) == {"a/0.jpg", "a/linked.jpg", "b/0.jpg", "b/1.jpg", "b/2.jpg"}


def test_what_is_no_data_set(tmp_path):
    assert not is_class_folder(tmp_path)
    assert not is_class_folder(tmp_path / "nothing")
    (tmp_path / "one").mkdir()
    with pytest.raises(DataError, match="has 1 folders; a folder per class is needed"):
        open_folder(tmp_path)
    (tmp_path / "two").mkdir()
    with pytest.raises(DataError, match="the class one has no images"):
        open_folder(tmp_path)
    with pytest.raises(DataError, match="has the splits train, validation, test, all, not 'vall'"):
        open_folder(tmp_path, "vall")
    with pytest.raises(DataError, match="not None"):
        open_folder(tmp_path, None)
    with pytest.raises(DataError, match="Did you mean validation"):
        open_folder(tmp_path, "val")
    with pytest.raises(DataError, match="use open_folder for class folders"):
        open_dataset(tmp_path)
    with pytest.raises(DataError, match="does not exist; name a folder of class folders"):
        open_folder(tmp_path / "nothing")
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / f"{WNIDS[0]}.tar").touch()
    with pytest.raises(DataError, match="`wn21k data prepare` makes shards from class archives"):
        open_dataset(tmp_path / "archives")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "photo.tar").touch()
    with pytest.raises(DataError) as error:
        open_dataset(tmp_path / "others")
    assert "class archives" not in str(error.value)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is a file; name a folder of class folders"):
        open_folder(tmp_path / "file")
    (tmp_path / "other" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="none for validation"):
        open_folder(tmp_path / "other", "validation")


def test_a_folder_of_training_images_alone(tmp_path):
    make_folder(tmp_path / "train", images=2)
    assert len(open_folder(tmp_path)) == len(open_folder(tmp_path, "all")) == 2 * len(WNIDS)
    assert open_folder(tmp_path).class_names == tuple(sorted(WNIDS))
    with pytest.raises(DataError, match="none for validation"):
        open_folders(tmp_path)


def test_targets_of_a_label_space_by_the_names_of_the_folders(tmp_path):
    space = LabelSpace.load("fall11")
    folder = open_folder(make_folder(tmp_path / "x", names=WNIDS[3:])).mapped_to(space)
    assert {space.wnids[target] for target in folder.targets} == set(WNIDS[3:])
    assert open_folder(tmp_path / "x", label_space="fall11").targets.tolist() == folder.targets.tolist()
    space = folder.label_space
    for same in (space, list(space.wnids), SemanticTree.from_label_space(space), SemanticTree.load("fall11")):
        assert open_folder(tmp_path / "x", label_space=same).targets.tolist() == folder.targets.tolist()
    turned = open_folder(tmp_path / "x", label_space=ClassNames(tuple(reversed(space.wnids))))
    assert (turned.targets + folder.targets == len(space) - 1).all()
    with pytest.raises(InvalidArgumentError, match="label_space has a name twice"):
        open_folder(tmp_path / "x", label_space=ClassNames(("a", "b", "a")))
    with pytest.raises(InvalidArgumentError, match="label_space is a int; give a list"):
        open_folder(tmp_path / "x", label_space=7)
    more = make_folder(tmp_path / "x", images=4, names=(OUTSIDE,))
    assert len(open_folder(more, "all").mapped_to(space)) == len(open_folder(more, "all")) - 4
    assert open_folder(more, "all").mapped_to(space).left_out == 4
    with pytest.raises(DataError, match="no folder is named after a class of imagenet1k"):
        open_folder(make_folder(tmp_path / "z", names=WNIDS[:2])).mapped_to(LabelSpace.load("imagenet1k"))
    with pytest.raises(DataError, match="has a folder cats, which is not a class of"):
        open_folder(make_folder(tmp_path / "y", names=("cats", "dogs"))).mapped_to(space)


def test_a_damaged_file_is_left_out_and_named(tmp_path, caplog):
    make_folder(tmp_path, images=10)
    (tmp_path / WNIDS[0] / "0.jpg").write_bytes(b"no image")
    folder = open_folder(tmp_path, "all")
    loader = Loader(folder, batch_size=7, training=False, augmentation=CenterCrop(32))
    batches = list(loader)
    assert sum(len(batch) for batch in batches) == 59
    assert loader.bad_samples == 1
    assert f"{WNIDS[0]}/0.jpg" in caplog.text
    for batch in batches:
        for sample, target in zip(batch.samples.tolist(), batch.targets.tolist(), strict=True):
            assert folder.targets[sample] == target


def test_one_damaged_file_of_a_few_is_endured_in_every_epoch(tmp_path, caplog):
    make_folder(tmp_path, images=10)
    (tmp_path / WNIDS[0] / "3.jpg").write_bytes(b"no image")
    loader = Loader(open_folder(tmp_path, "all"), batch_size=60, augmentation=CenterCrop(8))
    for epoch in range(25):
        assert [len(batch) for batch in loader] == [59], epoch
    assert loader.bad_samples == 25
    assert len(caplog.records) == 1  # reported only once


def test_of_many_damaged_files_some_are_named(tmp_path, caplog):
    make_folder(tmp_path, images=10)
    for path in tmp_path.rglob("*.jpg"):
        if path.stem in "01234":
            path.write_bytes(b"no image")
    loader = Loader(open_folder(tmp_path, "all"), batch_size=60, augmentation=CenterCrop(8), max_bad=1)
    for _ in range(2):
        assert [len(batch) for batch in loader] == [30]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 21
    assert messages[-1] == "further damaged samples are not named"


def test_more_damaged_files_than_allowed_end_the_epoch(tmp_path):
    make_folder(tmp_path, images=10)
    for name in WNIDS[:2]:
        for path in (tmp_path / name).iterdir():
            path.write_bytes(b"no image")
    loader = Loader(open_folder(tmp_path, "all"), batch_size=4, training=False, augmentation=CenterCrop(8))
    with pytest.raises(BadImagesError, match=r"1\d of the first \d+ samples of an epoch of 60 are damaged"):
        list(loader)
    loader = Loader(
        open_folder(tmp_path, "all"), batch_size=4, training=False, augmentation=CenterCrop(8), max_bad=0.02
    )
    assert sum(len(batch) for batch in loader) == 40


def test_a_class_called_train_beside_val_is_explained(tmp_path):
    make_folder(tmp_path, names=("train", "val"), images=2)
    with pytest.raises(DataError, match="a class cannot be called train beside one called val or test"):
        open_folder(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="names are texts there")
def test_a_name_that_is_no_text_is_told(tmp_path):
    make_folder(tmp_path, names=("cats", "dogs"), images=2)
    (tmp_path / "cats").rename(os.fsdecode(os.fsencode(tmp_path) + b"/c\xe4ts"))
    with pytest.raises(DataError, match=r"a folder 'c\\udce4ts', whose name is not valid UTF-8; rename it"):
        open_folder(tmp_path)


def test_a_run_is_not_among_the_images_by_whatever_name(tmp_path, monkeypatch):
    make_folder(tmp_path / "photos", names=("cats", "dogs"), images=2)
    assert is_among(tmp_path / "photos" / "run", tmp_path / "photos")
    assert not is_among(tmp_path / "photos" / ".run", tmp_path / "photos")
    assert not is_among(tmp_path / "run", tmp_path / "photos")
    exists, samefile = Path.exists, Path.samefile
    small = lambda path: Path(str(path).replace("PHOTOS", "photos"))  # noqa: E731 - a disk for which these are the same
    monkeypatch.setattr(Path, "exists", lambda self, **options: exists(small(self), **options))
    monkeypatch.setattr(Path, "samefile", lambda self, other: samefile(small(self), small(other)))
    assert is_among(tmp_path / "PHOTOS" / "run", tmp_path / "photos")


def test_the_root_of_a_disk_has_no_classes_of_the_systems(tmp_path):
    make_folder(tmp_path, names=("cats", "dogs", "$RECYCLE.BIN", "System Volume Information"), images=2)
    assert open_folder(tmp_path).class_names == ("cats", "dogs")
