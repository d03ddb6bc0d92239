import copy
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch
from conftest import run_in_terminal
from hub_server import COMMIT, hub_server
from PIL import Image
from timm.models import save_for_hf
from typer.testing import CliRunner

from wn21k_zoo import ClassNames, FallbackModelWarning, Predictor, cache, models, predict, registry, running
from wn21k_zoo.building import create_model
from wn21k_zoo.checkpoints import CHECKPOINTS, DEFAULT_CHECKPOINT, EMBEDDED_CHECKPOINT
from wn21k_zoo.cli.app import app
from wn21k_zoo.errors import (
    DownloadError,
    InvalidArgumentError,
    LabelSpaceError,
    MissingExtraError,
    ModelError,
    UnknownModelError,
    UnknownSynsetError,
    UnresolvedLabelSpaceError,
    WeightsNotFoundError,
)
from wn21k_zoo.training.weights import classes_of

CAT = "sample:cat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, embedded):
    """The embedded model, saved as timm saves models for the Hub."""
    target = tmp_path_factory.mktemp("hub") / "lite0"
    module = copy.deepcopy(embedded.module).to(memory_format=torch.contiguous_format)  # safetensors requires it
    save_for_hf(module, target, safe_serialization=True)
    return target


def copy_of(folder, tmp_path, **changes):
    target = tmp_path / "copy"
    target.mkdir()
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config[key] = value
        config["pretrained_cfg"][key] = value
    (target / "config.json").write_text(json.dumps(config))
    shutil.copy(folder / "model.safetensors", target)
    return target


def test_a_folder_predicts_as_the_model_it_holds(folder, embedded):
    expected, found = embedded(CAT), predict(CAT, model=folder)
    assert found.model == str(folder)
    assert found.label_space == "imagenet1k"
    assert [label.wnid for label in found.path] == [label.wnid for label in expected.path]
    assert found.top_k[0].probability == pytest.approx(expected.top_k[0].probability)
    assert predict(CAT, model=f"local-dir:{folder}").top_k == found.top_k


def test_a_folder_with_names_of_its_own_is_not_guessed(folder, tmp_path):
    changed = copy_of(folder, tmp_path, label_names=[f"my class {i}" for i in range(1000)])
    # They may be other names for the classes of ImageNet-1K, which its weights are for.
    with pytest.raises(UnresolvedLabelSpaceError, match=r"but 'my class 0' is .* Give label_space"):
        models.load_model(changed)
    own = models.load_model(changed, label_space="own")
    assert isinstance(own.label_space, ClassNames)
    assert (own.label_space[7], own.head) == ("my class 7", "softmax")
    config = json.loads((changed / "config.json").read_text())
    former = {**config["pretrained_cfg"], "architecture": config["architecture"], "labels": config["label_names"]}
    del former["label_names"]
    for form in ({**config, "label_names": None}, former):  # inside pretrained_cfg; as old versions of timm wrote it
        (changed / "config.json").write_text(json.dumps(form))
        assert models.load_model(changed, label_space="own").label_space == own.label_space
    assert predict(CAT, model=changed, label_space="own").top_k[0].name.startswith("my class ")
    named = ClassNames([f"class {i}" for i in range(1000)], name="mine")
    assert predict(CAT, model=changed, label_space=named).label_space == "mine"
    with pytest.raises(LabelSpaceError, match=r"1,000 outputs, but own has 2 classes"):
        models.load_model(changed, label_space=ClassNames(["cat", "dog"]))
    with pytest.raises(InvalidArgumentError, match="not a class name"):
        models.load_model(changed, label_space=ClassNames([*range(1000)]))
    loaded = models.load_model(changed, label_space="imagenet1k")
    assert loaded.label_space.name == "imagenet1k"
    with pytest.raises(LabelSpaceError, match=r"1,000 outputs.*11,221"):
        models.load_model(changed, label_space="fall11")


def test_a_configuration_says_what_is_built_not_where_weights_come_from(tmp_path, monkeypatch):
    module = timm.create_model("test_vit", num_classes=3)
    save_for_hf(module, tmp_path / "model", model_config={})
    file = tmp_path / "model" / "config.json"
    config = {**json.loads(file.read_text()), "label_names": ["cat", "dog", "bird"]}
    torch.save({key: torch.full_like(value, 7.0) for key, value in module.state_dict().items()}, tmp_path / "evil.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with hub_server({"evil.pth": (tmp_path / "evil.pth").read_bytes()}) as (endpoint, seen):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        elsewhere = {"file": None, "state_dict": None, "hf_hub_id": None, "url": f"{endpoint}/evil.pth"}
        for arguments in (
            {"pretrained_cfg_overlay": elsewhere, "cache_dir": str(tmp_path / "cache")},
            {"pretrained_cfg": elsewhere, "pretrained": True, "pretrained_strict": False},
            {"checkpoint_path": str(tmp_path / "evil.pth")},
        ):
            for overlay in ({}, {**elsewhere, "source": "hf-hub", "hf_hub_id": "evil/model", "custom_load": True}):
                settings = {**config["pretrained_cfg"], **overlay}
                stated = {**config, "model_args": config["model_args"] | arguments, "pretrained_cfg": settings}
                file.write_text(json.dumps(stated))
                for build in (create_model, lambda folder: models.load_model(folder, label_space="own").module):
                    found = build(tmp_path / "model").state_dict()
                    assert all(torch.equal(value, found[key]) for key, value in module.state_dict().items())
        for architecture in ("hf-hub:evil/model", f"local-dir:{tmp_path / 'model'}"):
            file.write_text(json.dumps({**config, "architecture": architecture}))
            with pytest.raises((ModelError, UnknownModelError), match="There is no architecture"):
                create_model(tmp_path / "model")
    assert not seen
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pth", "model"]


def test_arguments_of_the_architecture_stay(tmp_path):
    """Also one whose name begins as those of weights do."""
    arguments = {"img_size": 64, "embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
    module = timm.create_model(
        "swinv2_tiny_window8_256", num_classes=3, **arguments, pretrained_window_sizes=(8, 8)
    ).eval()
    for parameter in module.parameters():  # blocks begin with zeros
        torch.nn.init.normal_(parameter, std=0.1)
    save_for_hf(module, tmp_path / "model", model_config={})
    again = create_model(tmp_path / "model").eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(module(image), again(image))
        plain = timm.create_model("swinv2_tiny_window8_256", num_classes=3, **arguments).eval()
        plain.load_state_dict(module.state_dict())
        assert not torch.equal(module(image), plain(image))


def test_what_timm_saved_of_a_record_is_the_same_to_all(tmp_path):
    """In predictions, in ``wn21k info``, and as the start of a training."""
    module = create_model("mobilenetv3_large_100.miil_in21k", pretrained=False)
    save_for_hf(module, tmp_path / "model", model_config={})
    loaded = models.load_model(tmp_path / "model")
    assert (loaded.label_space.name, loaded.head) == ("imagenet21k_p_fall11", "semantic_softmax")
    told = json.loads(CliRunner().invoke(app, ["info", str(tmp_path / "model"), "--format", "json"]).stdout)
    assert (told["label_space"], told["head"]) == (loaded.label_space.name, loaded.head)
    assert classes_of(str(tmp_path / "model")) == loaded.label_space.wnids


def test_names_of_classes_that_are_no_synsets(tmp_path):
    module = timm.create_model("test_vit", num_classes=3)

    def folder(**fields):
        save_for_hf(module, tmp_path / "model", model_config={})
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        (tmp_path / "model" / "config.json").write_text(json.dumps({**config, **fields}))
        return tmp_path / "model"

    own = models.load_model(folder(label_names=["cat", "dog", "cat"]))
    assert ([*own.label_space], own.head, own.data_config["input_size"]) == (
        ["cat", "dog", "cat"],
        "softmax",
        (3, 160, 160),
    )
    assert models.load_model(folder(label_names=["cat", "dog", "bird"]), head="sigmoid").head == "sigmoid"
    with pytest.raises(InvalidArgumentError, match="no levels; head cannot be semantic_softmax"):
        models.load_model(tmp_path / "model", head="semantic_softmax")
    by_index = models.load_model(folder(label_names={"1": "b", "0": "a", "2": "c"}))
    assert [*by_index.label_space] == ["a", "b", "c"]
    slips = [["n02123045", "n02084071", other] for other in ("n00000001", "background", "n02123045")]
    for slip in slips:
        with pytest.raises(UnresolvedLabelSpaceError, match=r"Give label_space .* own, for its names as they are"):
            models.load_model(folder(label_names=slip))
        assert [*models.load_model(tmp_path / "model", label_space="own").label_space] == slip
    for wrong in ([0, 1, 2], ["cat", None, "dog"]):
        with pytest.raises(UnresolvedLabelSpaceError, match=r"does not name its classes; give label_space"):
            models.load_model(folder(label_names=wrong))
    assert [*models.load_model(folder(labels={"0": "a", "1": "b", "2": "c"})).label_space] == ["a", "b", "c"]
    with pytest.raises(ModelError, match="nor does it have a name for each index"):
        models.load_model(folder(label_names={"0": "a", "2": "c"}))
    loaded = models.load_model(folder(labels={"task": "pets"}), label_space=ClassNames(["a", "b", "c"]))
    assert [*loaded.label_space] == ["a", "b", "c"]
    with pytest.raises(UnresolvedLabelSpaceError, match="or ClassNames for classes that are not synsets"):
        models.load_model(tmp_path / "model")
    with pytest.raises(UnknownSynsetError, match="ClassNames takes the names"):
        models.load_model(module, label_space=["cat", "dog", "bird"])
    with pytest.raises(UnresolvedLabelSpaceError, match="A module does not state its classes"):
        models.load_model(module, label_space="own")


def test_a_network_may_have_another_classifier_than_it_began_with():
    module = timm.create_model("test_resnet", num_classes=1000)
    module.fc = torch.nn.Linear(module.fc.in_features, 2)
    found = predict(CAT, model=module, label_space=ClassNames(["cat", "dog"]))
    assert {output.name for output in found.top_k} == {"cat", "dog"}
    with pytest.raises(LabelSpaceError, match="ResNet has 2 outputs, but own has 3 classes"):
        models.load_model(module, label_space=ClassNames(["cat", "dog", "bird"]))
    for name in ("resnetv2_18", "deit_tiny_distilled_patch16_224"):  # their classifiers: a convolution; two layers
        module = timm.create_model(name, num_classes=5)
        with pytest.raises(LabelSpaceError, match="has 5 outputs, but own has 2 classes"):
            models.load_model(module, label_space=ClassNames(["cat", "dog"]))

    class Own(torch.nn.Linear):
        def get_classifier(self, which):
            """Has another signature than timm's."""

    assert models.load_model(Own(3, 5), label_space=ClassNames(["cat", "dog"])).head == "softmax"


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        (lambda logits: (logits, logits), "gives tuple for 1 images"),
        (lambda logits: logits.detach().numpy(), "gives ndarray for"),
        (lambda logits: logits.sum(), r"gives outputs of shape \(\) for"),
        (lambda logits: logits[:, :1], r"gives outputs of shape \(1, 1\) for 1 images; own needs a tensor \[1, 2\]"),
    ],
)
def test_what_is_no_number_per_class_is_told(outputs, said):
    class Network(torch.nn.Linear):
        def forward(self, images):
            return outputs(super().forward(images.flatten(1)))

    with pytest.raises(ModelError, match=said):
        predict(
            CAT,
            model=Network(12, 2),
            label_space=ClassNames(["a", "b"]),
            transform=lambda image: torch.zeros(3, 2, 2),
        )


def test_a_folder_keeps_its_own_preprocessing(folder, tmp_path, monkeypatch):
    changed = copy_of(folder, tmp_path, crop_pct=1.0, input_size=[3, 256, 256])
    assert models.load_model(changed).data_config["input_size"] == (3, 256, 256)
    monkeypatch.chdir(tmp_path)
    assert models.load_model("copy").data_config["crop_pct"] == 1.0  # named without a slash


def test_a_module_of_a_record_is_read_as_its_record(fall11):
    module = timm.create_model("mobilenetv3_large_100.miil_in21k", pretrained=False).eval()
    loaded = models.load_model(module, label_space="fall11")
    assert loaded.head == "semantic_softmax"
    assert loaded.data_config["crop_mode"] == "squash"
    with pytest.raises(InvalidArgumentError, match="give head"):
        models.load_model(module, label_space=fall11.wnids[::-1])
    assert models.load_model(module, label_space=fall11.wnids[::-1], head="softmax").head == "softmax"
    half = Predictor(module.to(torch.bfloat16), label_space="fall11", device="cpu")
    assert half(CAT).head == "semantic_softmax"


def test_how_outputs_are_read_is_not_guessed(tmp_path, fall11):
    module = timm.create_model("mobilenetv3_small_050", num_classes=len(fall11.wnids))
    save_for_hf(module, tmp_path / "mine", model_config={"label_names": list(fall11.wnids)})
    for model, options in ((module, {"label_space": "fall11"}), (tmp_path / "mine", {})):
        with pytest.raises(InvalidArgumentError, match=r"give head \(--head\)"):
            models.load_model(model, **options)
        assert models.load_model(model, **options, head="semantic_softmax").head == "semantic_softmax"


def test_the_preprocessing_of_a_folder(folder, tmp_path, embedded):
    image = Image.new("RGB", (300, 200), "teal")
    assert torch.equal(models.create_transform(folder)(image), embedded.transform(image))
    other = copy_of(folder, tmp_path, crop_pct=1.0, input_size=[3, 256, 256])
    assert models.create_transform(str(other))(image).shape == (3, 256, 256)
    assert models.create_transform(other, image_size=64, training=True)(image).shape == (3, 64, 64)
    with pytest.raises(InvalidArgumentError, match="image_size is 0"):
        models.create_transform(other, image_size=0)
    assert "RandomResizedCrop" in str(models.create_transform(other, training=True))
    with pytest.raises(ModelError, match=r"no config\.json"):
        models.create_transform(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mean", "x"), ("mean", [None]), ("std", [1e999] * 3), ("std", 10**30), ("crop_pct", "x"), ("crop_pct", [1]),
        ("crop_pct", float("nan")), ("interpolation", True), ("interpolation", [None]), ("input_size", None),
        ("input_size", []), ("input_size", "aaa"), ("input_size", [3, 0, 0]), ("input_size", [3, 32.5, 32]),
        ("tag", "\ud800"),
    ],
)  # fmt: skip
def test_preprocessing_that_nobody_can_mean_is_a_model_error(folder, tmp_path, field, value):
    other = copy_of(folder, tmp_path, **{field: value})
    with pytest.raises(ModelError, match=r"^No images can be prepared|config\.json"):
        models.create_transform(other)
    with pytest.raises(ModelError, match=r"^No images can be prepared|config\.json"):
        predict(CAT, model=other)


def test_a_folder_with_wnids_as_names(folder, tmp_path, embedded):
    wnids = [*embedded.label_space.wnids[:-1], "n02121808"]
    other = copy_of(folder, tmp_path, label_names=wnids)
    with pytest.raises(InvalidArgumentError, match="give head"):  # cat is an ancestor of some others
        models.load_model(other)
    assert models.load_model(other, head="softmax").label_space.wnids == tuple(wnids)


@pytest.mark.parametrize("name", ["resnet50_miil_21k.pth", "resnet50.safetensors"])
def test_a_weight_file_is_told_how_it_becomes_a_model(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    for given in (name, f"./{name}", tmp_path / name):
        with pytest.raises(UnknownModelError, match=rf"is a file; .* `wn21k export \S*{re.escape(name)} DIR` makes"):
            models.load_model(given)


def test_bad_folders(folder, tmp_path):
    with pytest.raises(UnknownModelError, match="no folder"):
        models.load_model(tmp_path / "none")
    with pytest.raises(UnknownModelError, match=r"config\.json is a file; name the folder that holds .* weights\.$"):
        models.load_model(folder / "config.json")
    with pytest.raises(ModelError, match=r"no config\.json"):
        models.load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        models.load_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="architecture"):
        models.load_model(tmp_path)
    for damage in ({"pretrained_cfg": None}, {"pretrained_cfg": []}, {"label_names": 5}, {"model_args": "resnet18"}):
        (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", **damage}))
        with pytest.raises(ModelError, match="is not a"):
            models.load_model(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(WeightsNotFoundError):
        models.load_model(tmp_path)
    for unknown in ({"pretrained_cfg": {"nonsense": 1}}, {"pretrained_cfg": {}, "model_args": {"nonsense": 1}}):
        (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "label_names": ["a"], **unknown}))
        (tmp_path / "model.safetensors").touch()
        with pytest.raises(ModelError, match=r"config\.json does not fit resnet18: .*nonsense"):
            models.load_model(tmp_path, label_space="own")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match="are damaged or incomplete"):
        models.load_model(tmp_path)
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="cannot be built"):
        models.load_model(tmp_path)


def test_a_module_is_used_and_left_as_it_was(embedded):
    module = copy.deepcopy(embedded.module)
    module.train()
    module.bn1.eval()  # frozen, as in fine-tuning
    with pytest.raises(UnresolvedLabelSpaceError, match="label_space"):
        models.load_model(module)
    with pytest.raises(LabelSpaceError):
        models.load_model(module, label_space="imagenet12k")
    found = predict(CAT, model=module, label_space="imagenet1k", transform=embedded.transform)
    assert found.top_k == embedded(CAT).top_k
    assert module.training
    assert module.blocks.training
    assert not module.bn1.training


def test_a_plain_module_needs_a_transform():
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
    space = ["n02121808", "n02084071"]
    with pytest.raises(InvalidArgumentError, match="transform"):
        predict(CAT, model=module, label_space=space)
    found = predict(CAT, model=module, label_space=space, head="sigmoid", transform=lambda image: torch.ones(3, 2, 2))
    assert found.head == "sigmoid"
    with pytest.raises(ModelError, match="outputs of shape"):
        predict(CAT, model=module, label_space="imagenet1k", transform=lambda image: torch.ones(3, 2, 2))
    with pytest.raises(ModelError, match="cannot be run"):
        predict(CAT, model=module, label_space=space, transform=lambda image: torch.ones(3, 5, 5))
    with pytest.raises(ModelError, match="NaN"):
        predict(CAT, model=module, label_space=space, transform=lambda image: torch.full((3, 2, 2), torch.nan))
    with pytest.raises(InvalidArgumentError, match="torch module"):
        models.load_model(3)


def test_bad_names():
    with pytest.raises(UnknownModelError, match="Did you mean"):
        models.load_model("efficientnet_lite0.embeded_in1k")
    for name in ("hf-hub:name", "hf-hub:a b/c", "hf-hub:a/b/c", "hf-hub:/b", "hf-hub:"):
        with pytest.raises(UnknownModelError, match="hf-hub:ORG/NAME"):
            models.load_model(name)
    with pytest.raises(UnknownModelError, match="no folder"):
        models.load_model("no/such/folder")
    with pytest.raises(DownloadError):
        models.load_model("hf-hub:org/name")
    with pytest.raises(InvalidArgumentError, match="head"):
        models.load_model(EMBEDDED_CHECKPOINT, head="argmax")
    with pytest.raises(InvalidArgumentError, match="states its own"):
        models.load_model(EMBEDDED_CHECKPOINT, label_space="imagenet1k")


def test_a_gpu_that_is_too_old_for_this_torch_is_none(monkeypatch):
    built = ["sm_75", "sm_80", "sm_90a", "compute_120"]
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    for capability, is_too_old in (((7, 0), True), ((7, 5), False), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, known=capability: known)
        if is_too_old:
            assert running.select_device().type == "cpu"
            with pytest.raises(InvalidArgumentError, match=r"Tesla V100 is older than .*; install a torch"):
                running.select_device("cuda")
        else:
            assert running.select_device().type == running.select_device("cuda").type == "cuda"
    built[:] = ["gfx90a"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert running.select_device().type == "cuda"


def test_devices():
    assert running.select_device("cpu").type == "cpu"
    for name in ("gpu", "cuda:99", "meta:x"):
        with pytest.raises(InvalidArgumentError, match="cannot be used here"):
            running.select_device(name)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda checkpoint: checkpoint.name)
def test_transforms(checkpoint):
    image = Image.linear_gradient("L").resize((640, 320)).convert("RGB")
    tensor = models.create_transform(checkpoint.name)(image)
    assert tuple(tensor.shape) == checkpoint.input_size
    assert tensor.dtype == torch.float32
    if checkpoint.resize == "squash":  # the whole picture, nothing cropped
        assert 0 <= tensor.min() < 0.01
        assert 0.99 < tensor.max() <= 1
    assert models.create_transform(checkpoint.name, image_size=96)(image).shape == (3, 96, 96)
    training = models.create_transform(checkpoint.name, training=True)
    assert tuple(training(image).shape) == checkpoint.input_size


def test_default_without_a_network(monkeypatch):
    models._default_is_reachable.cache_clear()
    with pytest.warns(FallbackModelWarning, match="WN21K_MODEL"):
        assert models.choose_default() == EMBEDDED_CHECKPOINT
    monkeypatch.setenv("WN21K_MODEL", "convnext_tiny.in12k")
    assert models.choose_default() == "convnext_tiny.in12k"
    with pytest.raises(DownloadError):  # an explicitly named model is never replaced
        predict(CAT)


def test_the_default_is_looked_for_in_the_named_cache(tmp_path, monkeypatch):
    record = registry.get_checkpoint(DEFAULT_CHECKPOINT)
    place = tmp_path / "hub" / record.sources[0].repo_id.replace("/", "--") / "model.safetensors"
    place.parent.mkdir(parents=True)
    place.touch()
    monkeypatch.setattr(models, "_default_is_reachable", lambda: False)
    with pytest.warns(FallbackModelWarning):  # unverifiable, so no load would accept it
        assert models.choose_default(tmp_path) == EMBEDDED_CHECKPOINT
    receipt = cache.Receipt(
        source=record.sources[0].key,
        filename="model.safetensors",
        revision=None,
        num_bytes=0,
        sha256=hashlib.sha256(b"").hexdigest(),
        checked_against="the Hub",
    )
    cache.write_receipt(place, receipt)
    assert models.choose_default(tmp_path) == DEFAULT_CHECKPOINT


def test_default_without_the_extra(monkeypatch):
    monkeypatch.setattr(models, "find_local", lambda *_: None)
    with pytest.raises(MissingExtraError, match=r"network.*wn21k-zoo\[embedded\]"):
        models.choose_default()


RUN = [sys.executable, "-m", "wn21k_zoo", "predict", CAT, "--format", "jsonl"]


@pytest.mark.slow
def test_default_is_downloaded_with_a_progress_bar_and_then_cached(tmp_path):
    checkpoint = registry.get_checkpoint(DEFAULT_CHECKPOINT)
    torch.manual_seed(0)
    weights = safetensors.torch.save(timm.create_model(checkpoint.architecture, num_classes=11_221).state_dict())
    environment = {**os.environ, "HF_HOME": str(tmp_path), "WN21K_CACHE": str(tmp_path / "cache")}
    path = f"timm/{DEFAULT_CHECKPOINT}/resolve/main/model.safetensors"
    with hub_server({path: weights}) as (endpoint, seen):
        done, terminal = run_in_terminal(RUN, {**environment, "HF_ENDPOINT": endpoint})
    assert done.returncode == 0, terminal
    assert "100%" in terminal
    assert f"GET /{path.replace('main', COMMIT)}" in seen
    result = json.loads(done.stdout)
    assert (result["model"], result["tree"]) == (DEFAULT_CHECKPOINT, "fall11")
    assert (result["label_space"], result["head"]) == ("imagenet21k_p_fall11", "semantic_softmax")
    assert len(result["levels"]) == 11

    offline = subprocess.run(RUN, capture_output=True, text=True, env=environment, check=False)
    assert offline.returncode == 0, offline.stderr
    assert json.loads(offline.stdout) == result
    assert offline.stderr == ""


@pytest.mark.slow
def test_a_refusal_of_the_hub_in_predict(tmp_path):
    """Other answers: test_transfer.py."""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "WN21K_MODEL": "convnext_tiny.in12k"}
    with hub_server({}, status=403) as (endpoint, _):
        done = subprocess.run(
            RUN, capture_output=True, text=True, env={**environment, "HF_ENDPOINT": endpoint}, check=False
        )
    assert done.returncode == 1
    assert "accept its terms" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_photographs_agree_with_timm(embedded, photographs):
    """Same top-1 as timm's own evaluation transform and model on every image."""
    module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    module.load_state_dict(embedded.module.state_dict())
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(module), is_training=False)
    predictions = Predictor(EMBEDDED_CHECKPOINT, device="cpu")(photographs)
    with torch.inference_mode():
        for path, prediction in zip(photographs, predictions, strict=True):
            with Image.open(path) as image:
                expected = module.eval()(transform(image.convert("RGB"))[None]).softmax(-1)[0]
            assert prediction.top_k[0].index == int(expected.argmax())
            assert prediction.top_k[0].probability == pytest.approx(float(expected.max()), rel=1e-4)
