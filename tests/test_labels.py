import pytest

from wn21k_zoo.errors import (
    DuplicateSynsetError,
    EmptyLabelSpaceError,
    InvalidArgumentError,
    UnknownLabelSpaceError,
    UnknownSynsetError,
)
from wn21k_zoo.labels import LABEL_SPACE_ALIASES, LABEL_SPACES, ClassNames, LabelSpace
from wn21k_zoo.wordnet import TIMM_FILES

SIZES = {
    "imagenet1k": 1_000,
    "imagenet12k": 11_821,
    "imagenet21k_goog": 21_843,
    "imagenet22k": 21_841,
    "imagenet22k_ms": 21_842,
    "imagenet21k_p_fall11": 11_221,
    "imagenet21k_p_winter21": 10_450,
}


@pytest.mark.parametrize("name", LABEL_SPACES)
def test_space_is_complete(name):
    space = LabelSpace.load(name)
    assert len(space) == SIZES[name] == len(space.names) == len(space.definitions) == len(set(space.wnids))
    assert f"{len(space):,} classes" in LABEL_SPACES[name]
    assert all(space.names)
    assert all(space.definitions)
    assert len(space.digest) == 64


@pytest.mark.parametrize("name", LABEL_SPACES)
def test_space_is_the_one_that_timm_ships(name):
    from importlib import resources

    lines = (resources.files("timm.data") / "_info" / TIMM_FILES[name]).read_text().split()
    assert list(LabelSpace.load(name)) == lines


def test_names_are_those_of_timm():
    from timm.data import ImageNetInfo

    space = LabelSpace.load("imagenet21k_goog")
    assert list(space.names) == ImageNetInfo("imagenet-21k-goog").label_descriptions()


def test_facts():
    fall11, winter21, one = (LabelSpace.load(name) for name in ("fall11", "winter21", "imagenet1k"))
    assert set(winter21) < set(fall11)
    assert len(set(one) & set(fall11)) == 991
    assert len(set(fall11.names)) == 10_967
    assert one.names[281] == "tabby, tabby cat"
    assert one.index["n02123045"] == 281
    assert "n02123045" in one
    assert "n00001740" not in one


def test_a_space_is_a_sequence_of_wnids():
    space = LabelSpace.load("imagenet1k")
    assert space[281] == space.wnids[281] == "n02123045"
    assert [*space] == [space[index] for index in range(len(space))]


def test_aliases_and_digests_tell_spaces_apart():
    assert LabelSpace.load("fall11") is LabelSpace.load(LABEL_SPACE_ALIASES["fall11"])
    assert len({LabelSpace.load(name).digest for name in LABEL_SPACES}) == len(LABEL_SPACES)


def test_bad_spaces():
    with pytest.raises(UnknownLabelSpaceError, match="Did you mean imagenet1k"):
        LabelSpace.load("imagnet1k")
    with pytest.raises(EmptyLabelSpaceError):
        LabelSpace("x", ())
    with pytest.raises(DuplicateSynsetError, match="n02121808"):
        LabelSpace("x", ("n02121808", "n02084071", "n02121808"))
    for wnid in ("n00000000", "02121808", "v00001740", "cat", "n021218080", "", None, 7):
        with pytest.raises(UnknownSynsetError):
            LabelSpace("x", ("n02121808", wnid))
    for wrong in ("n02121808", 5, {"n02121808", "n02084071"}, {"n02121808": 0, "n02084071": 1}):
        with pytest.raises(InvalidArgumentError, match=f"wnids is a {type(wrong).__name__}; give a list"):
            LabelSpace("x", wrong)
    assert LabelSpace("x", {"n02121808": 0, "n02084071": 1}.keys()).wnids == ("n02121808", "n02084071")


def test_names_of_classes_that_are_no_synsets():
    classes = ClassNames(["käse", "a, b", "käse"])
    assert (classes.names, classes.name, len(classes)) == (("käse", "a, b", "käse"), "own", 3)
    assert repr(ClassNames(["x"], name="pets")) == "ClassNames('pets', 1 classes)"
    assert ClassNames(["x"]) == ClassNames(("x",))
    assert ([*classes], classes[1], "a, b" in classes) == (["käse", "a, b", "käse"], "a, b", True)
    for wrong in ("cat", 5, ["cat", 5], ["cat", None], {"cat", "dog"}, {"cat": 1, "dog": 0}):
        with pytest.raises(InvalidArgumentError, match="name"):
            ClassNames(wrong)
    with pytest.raises(InvalidArgumentError, match=r"\[id2label\[i\] for i in"):
        ClassNames({0: "cat", 1: "dog"})
    with pytest.raises(InvalidArgumentError, match=r"sorted\(class_to_idx, key"):
        ClassNames({"cat": 0, "dog": 1})
    with pytest.raises(InvalidArgumentError, match="give a list of class names, and then"):
        ClassNames("pets", ["cat", "dog"])
    with pytest.raises(InvalidArgumentError, match="give strings"):
        ClassNames(["cat"], None)
    with pytest.raises(EmptyLabelSpaceError):
        ClassNames([])
