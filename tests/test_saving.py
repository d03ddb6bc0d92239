"""A network that was trained in a loop of the user's own becomes a folder that loads everywhere."""

import json

import pytest
import timm
import torch
from conftest import EMBEDDED
from PIL import Image
from timm.models import save_for_hf
from torch import nn
from typer.testing import CliRunner

import wn21k_zoo
from wn21k_zoo import ClassNames, SemanticTree, save_model
from wn21k_zoo.cli.app import app
from wn21k_zoo.errors import InvalidArgumentError, LabelSpaceError, ModelError, UnknownModelError

WNIDS = ("n02121808", "n02084071", "n02123045")  # cat, dog, and a tabby below the cat


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return timm.create_model("test_convnext", num_classes=3).eval()


@pytest.fixture(scope="module")
def image():
    return Image.radial_gradient("L").convert("RGB").resize((50, 40))


def test_classes_of_ones_own(tmp_path, network, image):
    folder = save_model(
        network, tmp_path / "plants", label_space=ClassNames(["healthy", "rust", "scab"]), image_size=64
    )
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    predictor = wn21k_zoo.Predictor(folder, device="cpu")
    assert (predictor.head, predictor.label_space.names) == ("softmax", ("healthy", "rust", "scab"))
    pixels = predictor.transform(image)
    assert pixels.shape == (3, 64, 64)
    with torch.inference_mode():
        expected = network(pixels[None]).softmax(1)[0]
    found = {output.name: output.probability for output in predictor(image).top_k}
    assert [found[name] for name in predictor.label_space.names] == pytest.approx(expected.tolist(), abs=1e-6)
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(again(pixels[None]), network(pixels[None]))
    assert wn21k_zoo.create_model(folder, num_classes=7).num_classes == 7
    card = (folder / "README.md").read_text()
    assert "# plants" in card
    assert "test_convnext for 3 classes. Licence: not stated yet." in card
    planned = CliRunner().invoke(app, ["publish", str(folder), "--repo", "ORG/plants", "--dry-run"])
    assert planned.exit_code == 0, planned.output


@pytest.mark.parametrize("head", ["semantic_softmax", "softmax", "sigmoid"])
def test_synsets_keep_their_head(tmp_path, network, image, head):
    folder = save_model(network, tmp_path / "pets", label_space=WNIDS, head=head)
    predictor = wn21k_zoo.Predictor(folder, device="cpu", tree=SemanticTree.from_wnids(WNIDS))
    assert (predictor.head, predictor.label_space.wnids) == (head, WNIDS)
    direct = wn21k_zoo.Predictor(network, label_space=WNIDS, head=head, tree=predictor.tree, device="cpu")
    assert predictor(image).levels == direct(image).levels
    assert json.loads((folder / "wn21k_labels.json").read_text())["head"] == head


def test_what_timm_saves_again_is_still_of_the_same_classes(tmp_path, network):
    save_model(network, tmp_path / "pets", label_space=WNIDS, head="semantic_softmax")
    again = timm.create_model(f"local-dir:{tmp_path / 'pets'}", pretrained=True)
    save_for_hf(again, tmp_path / "pets again", model_config={})
    with pytest.raises(InvalidArgumentError, match=r"give head \(--head\)"):
        wn21k_zoo.Predictor(tmp_path / "pets again", device="cpu")
    predictor = wn21k_zoo.Predictor(tmp_path / "pets again", device="cpu", head="semantic_softmax")
    assert predictor.label_space.wnids == WNIDS
    assert "label_descriptions" not in CliRunner().invoke(app, ["info", str(tmp_path / "pets again")]).stdout
    described = json.loads((tmp_path / "pets again" / "config.json").read_text())
    described["pretrained_cfg"]["label_descriptions"]["dog, domestic dog, Canis familiaris"] = (
        "what somebody else calls a dog"
    )
    (tmp_path / "pets again" / "config.json").write_text(json.dumps(described))
    assert isinstance(wn21k_zoo.Predictor(tmp_path / "pets again", device="cpu").label_space, ClassNames)


def test_several_labels_of_ones_own(tmp_path, network, image):
    folder = save_model(network, tmp_path / "tags", label_space=ClassNames(["cat", "dog", "indoor"]), head="sigmoid")
    predictor = wn21k_zoo.Predictor(folder, device="cpu")
    assert predictor.head == "sigmoid"
    logits = network(predictor.transform(image)[None])
    assert predictor(image).top_k[0].probability == pytest.approx(logits.sigmoid().max().item())
    assert json.loads((folder / "config.json").read_text())["problem_type"] == "multi_label_classification"


def test_names_that_look_like_synsets_stay_names(tmp_path, network):
    folder = save_model(network, tmp_path / "x", label_space=ClassNames(WNIDS))
    assert isinstance(wn21k_zoo.Predictor(folder, device="cpu").label_space, ClassNames)


def test_a_compiled_or_finetuned_network_and_half_precision(tmp_path, network):
    compiled = torch.compile(wn21k_zoo.create_model(EMBEDDED, num_classes=3))  # nothing is compiled before it runs
    folder = save_model(compiled, tmp_path / "x", label_space=ClassNames(["a", "b", "c"]), dtype="float16")
    config = json.loads((folder / "config.json").read_text())
    assert config["num_classes"] == 3
    assert "license" not in config["pretrained_cfg"]  # that of the weights that it began with
    assert (folder / "model.safetensors").stat().st_size < 2 * 4e6
    with pytest.raises(InvalidArgumentError, match="is not empty"):
        save_model(network, folder, label_space=ClassNames(["a", "b", "c"]))
    save_model(network, folder, label_space=ClassNames(["a", "b", "c"]), force=True)
    assert json.loads((folder / "config.json").read_text())["architecture"] == "test_convnext"


def test_arguments_that_change_the_weights(tmp_path):
    network = timm.create_model("test_vit", num_classes=3, img_size=64)
    classes = ClassNames(["a", "b", "c"])
    with pytest.raises(ModelError, match=r"pos_embed is \[1, \d+, 64\], not \[1, 17, 64\]; give .* as model_args"):
        save_model(network, tmp_path / "x", label_space=classes)
    with pytest.raises(ModelError, match="cannot be built with these model_args"):
        save_model(network, tmp_path / "x", label_space=classes, model_args={"no_such": 1})
    fixed = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    with pytest.raises(ModelError, match=r"takes no images of 64 x 64 .*; set image_size"):
        save_model(fixed, tmp_path / "x", label_space=classes, image_size=64)
    assert not (tmp_path / "x").exists()
    folder = save_model(network, tmp_path / "x", label_space=classes, model_args={"img_size": 64})
    assert wn21k_zoo.Predictor(folder, device="cpu").transform(Image.new("RGB", (70, 70))).shape == (3, 64, 64)
    assert wn21k_zoo.Predictor(folder, device="cpu")(Image.new("RGB", (70, 70))).top_k
    for wrong in ({"num_classes": 3}, {"checkpoint_path": "/x"}, {"model_name": "x"}, {"act_layer": nn.ReLU}, 5):
        with pytest.raises(InvalidArgumentError, match=r"model_args (cannot|is a int)"):
            save_model(network, tmp_path / "y", label_space=classes, model_args=wrong)


@pytest.mark.parametrize(
    ("name", "arguments"), [("test_resnet", {"global_pool": "max"}), ("test_vit", {"act_layer": "relu"})]
)
def test_arguments_that_change_the_outputs_alone(tmp_path, name, arguments):
    torch.manual_seed(0)
    network, classes = timm.create_model(name, num_classes=3, **arguments), ClassNames(["a", "b", "c"])
    with pytest.raises(ModelError, match="which gives other outputs"):
        save_model(network, tmp_path / "x", label_space=classes)
    before = torch.random.get_rng_state()
    save_model(network, tmp_path / "x", label_space=classes, model_args=arguments)
    assert network.training
    assert torch.equal(torch.random.get_rng_state(), before)  # a training loop goes on as if nothing had been


def test_other_channels_than_three_need_a_transform(tmp_path):
    network = timm.create_model("test_resnet", num_classes=3, in_chans=1)
    folder = save_model(network, tmp_path / "x", label_space=ClassNames(["a", "b", "c"]), model_args={"in_chans": 1})
    with pytest.raises(
        InvalidArgumentError, match=r"takes images of 1 channels; give transform, .* tensor \[1, H, W\]"
    ):
        wn21k_zoo.Predictor(folder)
    found = wn21k_zoo.Predictor(folder, transform=lambda image: torch.zeros(1, 64, 64))("sample:cat")
    assert found.top_k[0].name in "abc"


def test_weights_too_large_for_half_precision_are_named(tmp_path):
    network, classes = timm.create_model("test_resnet", num_classes=3), ClassNames(["a", "b", "c"])
    network.fc.bias.data[0] = 70_000
    with pytest.raises(InvalidArgumentError, match=r"fc\.bias has values too large for float16"):
        save_model(network, tmp_path / "x", label_space=classes, dtype="float16")
    assert not (tmp_path / "x").exists()
    save_model(network, tmp_path / "x", label_space=classes, dtype="bfloat16")


def test_layers_that_were_replaced(tmp_path):
    network, classes = timm.create_model("test_resnet", num_classes=3), ClassNames(["a", "b", "c"])
    network.fc = nn.Sequential(nn.Dropout(), nn.Linear(network.num_features, 3))
    with pytest.raises(ModelError, match=r"fc.1.weight is missing, not .*layers that were replaced cannot be saved"):
        save_model(network, tmp_path / "x", label_space=classes)


class Quantized(torch.Tensor):
    """Like torchao's: of the shape and dtype of the weights that it replaces, but cannot be copied to plain ones."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        if function is torch.Tensor.copy_:
            raise AttributeError("'Parameter' object has no attribute 'tensor_data_names'")
        return super().__torch_function__(function, types, arguments, options or {})

    def __deepcopy__(self, memo):
        return self


def test_quantized_weights(tmp_path):
    network, classes = timm.create_model("test_resnet", num_classes=3), ClassNames(["a", "b", "c"])
    network.fc.weight = nn.Parameter(network.fc.weight.detach().as_subclass(Quantized))
    with pytest.raises(ModelError, match=r"are no plain tensors \(Quantized\); save it before it is quantized"):
        save_model(network, tmp_path / "x", label_space=classes)


def test_a_network_that_cannot_be_copied(tmp_path):
    class Sharded(type(timm.create_model("test_resnet"))):  # as fully_shard's are
        def __deepcopy__(self, memo):
            raise AssertionError("FSDP does not support deepcopy. Please use state dict for serialization.")

    network = timm.create_model("test_resnet", num_classes=3)
    network.__class__ = Sharded
    with pytest.raises(ModelError, match=r"cannot be copied \(AssertionError: FSDP .* that is not sharded"):
        save_model(network, tmp_path / "x", label_space=ClassNames(["a", "b", "c"]))


def test_what_cannot_be_saved(tmp_path, network):
    classes = ClassNames(["a", "b", "c"])
    features = timm.create_model("test_resnet", features_only=True)
    for other in (nn.Linear(3, 3), nn.DataParallel(network), features):
        with pytest.raises(InvalidArgumentError, match="does not say which timm network it is"):
            save_model(other, tmp_path / "x", label_space=classes)
    with pytest.raises(InvalidArgumentError, match="model is a str; pass a torch module"):
        save_model("resnet50", tmp_path / "x", label_space=classes)
    with pytest.raises(LabelSpaceError, match="has 3 outputs"):
        save_model(network, tmp_path / "x", label_space="imagenet1k")
    with pytest.raises(InvalidArgumentError, match="give head"):
        save_model(network, tmp_path / "x", label_space=WNIDS)
    with pytest.raises(InvalidArgumentError, match="image_size is 0"):
        save_model(network, tmp_path / "x", label_space=classes, image_size=0)
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgumentError, match="is a file"):
        save_model(network, tmp_path / "file", label_space=classes)
    with pytest.raises(UnknownModelError):
        wn21k_zoo.Predictor(tmp_path / "x")
    assert not (tmp_path / "x").exists()
