"""timm.create_model and ours on every record; a local Hub serves random weights where real ones are missing."""

import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch
from conftest import EMBEDDED
from hub_server import hub_server

import wn21k_zoo
from wn21k_zoo import timm_models  # registers
from wn21k_zoo.checkpoints import CHECKPOINTS
from wn21k_zoo.errors import DownloadError, InvalidArgumentError, ModelError, UnknownModelError, WeightsNotFoundError
from wn21k_zoo.labels import LabelSpace

every_record = pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda checkpoint: checkpoint.name)
IMAGE = torch.zeros(1, 3, 224, 224)


def test_every_record_is_listed():
    assert set(timm.list_models("wn21k_*", pretrained=True)) == {f"wn21k_{one.name}" for one in CHECKPOINTS}
    assert set(timm.list_models("wn21k_*")) == {f"wn21k_{one.name.partition('.')[0]}" for one in CHECKPOINTS}
    assert set(timm_models.__all__) == set(timm.list_models("wn21k_*"))
    assert timm.list_models("ofa_*") == []


@every_record
def test_every_record_builds(checkpoint):
    with torch.device("meta"):  # saves the time to initialise weights
        module = timm.create_model(f"wn21k_{checkpoint.name}")
    assert module.num_classes == len(LabelSpace.load(checkpoint.label_space))
    assert timm.data.resolve_model_data_config(module) == checkpoint.data_config
    assert module.pretrained_cfg["architecture"].removeprefix("wn21k_") == checkpoint.architecture
    assert timm.is_model(module.pretrained_cfg["architecture"])  # what it is called when timm saves it


def test_a_records_own_configuration_leads_to_verified_weights():
    name = f"wn21k_{EMBEDDED}"
    expected = wn21k_zoo.create_model(EMBEDDED).state_dict()
    configs = [
        timm.get_pretrained_cfg(name),
        timm.get_pretrained_cfg(name).to_dict(),
        timm.create_model(name).pretrained_cfg,
    ]
    for config in configs:
        found = timm.create_model(name.partition(".")[0], pretrained=True, pretrained_cfg=config).state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    config = timm.get_pretrained_cfg(name).to_dict()
    for pretrained, changed in ((True, {"crop_pct": 0.5}), (False, {"crop_pct": 0.5, "num_classes": 7})):
        module = timm.create_model(name.partition(".")[0], pretrained=pretrained, pretrained_cfg=config | changed)
        assert module.pretrained_cfg["architecture"] == "tf_efficientnet_lite0"
        assert changed.items() <= {**module.pretrained_cfg, "num_classes": module.num_classes}.items()
    weights = {"state_dict": {key: torch.full_like(value, 7) for key, value in expected.items()}, "source": "hf-hub"}
    module = wn21k_zoo.create_model(EMBEDDED, pretrained_cfg_overlay=weights | {"hf_hub_id": "me/x"})
    assert (module.conv_stem.weight == 7).all()
    module = wn21k_zoo.create_model(EMBEDDED, pretrained=False, pretrained_cfg_overlay={"url": "https://x/y"})
    assert module.num_classes == 1000
    for place in ({"url": "https://x/y"}, {"hf_hub_id": "me/mine"}):
        with pytest.raises(InvalidArgumentError, match="for others give file or state_dict"):
            timm.create_model(name, pretrained=True, pretrained_cfg_overlay=place)


@pytest.mark.slow
def test_timms_own_names_are_left_alone():
    code = """
import json, timm
def state():
    names = timm.list_models(exclude_filters="wn21k_*"), timm.list_pretrained(exclude_filters="wn21k_*")
    return [names, {n: str(timm.models.get_pretrained_cfg(n)) for n in names[1]}, timm.list_modules()]
before = state()
import wn21k_zoo
assert not timm.list_models("wn21k_*")
import wn21k_zoo.timm_models
after = state()
print(before[:2] == after[:2], set(after[2]) - set(before[2]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=1) == ["True", "{'timm_models'}\n"]


@pytest.mark.parametrize("create", [timm.create_model, wn21k_zoo.create_model])
@pytest.mark.parametrize("name", [f"wn21k_{EMBEDDED}", "wn21k_efficientnet_lite0"])
def test_pretrained(name, create, embedded):
    module = create(name, pretrained=True).eval()
    with torch.inference_mode():
        torch.testing.assert_close(module(IMAGE), embedded.module(IMAGE), rtol=1e-4, atol=1e-4)
    assert not {"state_dict", "file"} & set(module.pretrained_cfg)


@pytest.mark.parametrize("create", [timm.create_model, wn21k_zoo.create_model])
def test_options(create, embedded, tmp_path):
    name = f"wn21k_{EMBEDDED}" if create is timm.create_model else EMBEDDED
    backbone = embedded.module.state_dict()
    other_head = create(name, pretrained=True, num_classes=10).eval()
    assert other_head(IMAGE).shape == (1, 10)
    assert torch.equal(other_head.conv_head.weight, backbone["conv_head.weight"])
    assert create(name, pretrained=True, num_classes=0).eval()(IMAGE).shape == (1, 1280)
    grey = create(name, pretrained=True, in_chans=1)
    torch.testing.assert_close(grey.conv_stem.weight, backbone["conv_stem.weight"].sum(1, keepdim=True))
    features = create(name, pretrained=True, features_only=True, out_indices=(1, 3))
    assert [one.shape[1] for one in features(IMAGE)] == features.feature_info.channels()
    assert torch.equal(features.conv_stem.weight, backbone["conv_stem.weight"])
    safetensors.torch.save_file({k: v.contiguous() for k, v in backbone.items()}, tmp_path / "own.safetensors")
    own = timm.create_model(f"wn21k_{EMBEDDED}", checkpoint_path=tmp_path / "own.safetensors")
    assert torch.equal(own.classifier.weight, backbone["classifier.weight"])


@pytest.fixture(scope="module")
def published_hub():
    """A Hub with random weights of the default checkpoint, for a subprocess."""
    torch.manual_seed(0)
    weights = safetensors.torch.save(timm.create_model("mobilenetv3_large_100", num_classes=11_221).state_dict())
    with hub_server({"timm/mobilenetv3_large_100.miil_in21k/resolve/main/model.safetensors": weights}) as (endpoint, _):
        yield endpoint


@pytest.mark.slow
def test_weights_come_through_our_fetch_into_the_named_cache(published_hub, tmp_path):
    code = f"""
import json, timm, wn21k_zoo, wn21k_zoo.timm_models
name = "mobilenetv3_large_100.miil_in21k"
first = timm.create_model("wn21k_" + name, pretrained=True, cache_dir={str(tmp_path / "named")!r})
second = wn21k_zoo.create_model(name, cache_dir={str(tmp_path / "named")!r}, num_classes=5)
same = bool((first.conv_stem.weight == second.conv_stem.weight).all())
third = wn21k_zoo.Predictor(name, cache_dir={str(tmp_path / "named")!r}, device="cpu")
seen = wn21k_zoo.predict("sample:cat", model=name, cache_dir={str(tmp_path / "named")!r}, device="cpu")
print(json.dumps([first.num_classes, second.num_classes, same, third("sample:cat") == seen]))
"""
    environment = {**os.environ, "HF_ENDPOINT": published_hub, "WN21K_CACHE": str(tmp_path / "other")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [11_221, 5, True, True]
    assert (tmp_path / "named/hub/timm--mobilenetv3_large_100.miil_in21k/model.safetensors").is_file()
    assert not (tmp_path / "other").exists()


def test_bad_arguments():
    with pytest.raises(UnknownModelError, match="Did you mean"):
        timm.create_model("wn21k_resnet50.miil_in22k", pretrained=True)
    with pytest.raises(InvalidArgumentError, match="no_such_argument"):
        wn21k_zoo.create_model(EMBEDDED, pretrained=False, no_such_argument=1)
    with pytest.raises(UnknownModelError, match="no folder"):
        wn21k_zoo.create_model("no/such/folder")


@every_record
def test_create_model_of_every_record(checkpoint):
    with torch.device("meta"), torch.inference_mode():
        module = wn21k_zoo.create_model(checkpoint.name, pretrained=False, num_classes=4, drop_rate=0.1).eval()
        assert module(torch.empty(1, 3, 224, 224)).shape == (1, 4)


def test_ofa_is_a_timm_model():
    module = wn21k_zoo.create_model("ofa_flops_595m_s.miil_in21k", pretrained=False, num_classes=6)
    assert module.forward_features(IMAGE).shape == (1, 1152, 7, 7)
    module.reset_classifier(3)
    assert module(torch.randn(2, 3, 96, 96)).shape == (2, 3)
    module.set_grad_checkpointing()
    module(torch.randn(2, 3, 96, 96)).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    features = wn21k_zoo.create_model("ofa_flops_595m_s.miil_in21k", pretrained=False, features_only=True)
    shapes = [tuple(one.shape[1:]) for one in features(torch.randn(2, 3, 64, 64))]
    assert [shape[0] for shape in shapes] == features.feature_info.channels()
    assert [64 // shape[1] for shape in shapes] == features.feature_info.reduction() == [2, 4, 8, 16, 32]
    whole, parts = module.forward_intermediates(torch.randn(2, 3, 64, 64))
    assert whole.shape[1] == 1152
    assert len(parts) == 5


@pytest.mark.slow
def test_a_name_that_only_timm_has_goes_the_same_way(tmp_path):
    torch.manual_seed(0)
    weights = safetensors.torch.save(timm.create_model("mobilenetv3_small_050").state_dict())
    code = """
import wn21k_zoo
print(wn21k_zoo.create_model("mobilenetv3_small_050.lamb_in1k", num_classes=2).num_classes)
"""
    with hub_server({"timm/mobilenetv3_small_050.lamb_in1k/resolve/main/model.safetensors": weights}) as (
        endpoint,
        seen,
    ):
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "WN21K_CACHE": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
        )
    assert done.stdout == "2\n", done.stderr
    assert sum(request.startswith("GET") for request in seen) == 1


OFA = "ofa_flops_595m_s.miil_in21k"


@pytest.mark.parametrize("name", [OFA, "mobilenetv3_large_100.miil_in21k"])
def test_a_file_of_ones_own_in_place_of_the_published_weights(name, tmp_path):
    """Fetches nothing, which would fail here; ours also accepts arguments that timm's function does not pass on."""
    with pytest.raises(DownloadError):
        wn21k_zoo.create_model(name)
    first = wn21k_zoo.create_model(name, pretrained=False, num_classes=3)
    torch.save(first.state_dict(), tmp_path / "own.pth")
    for create, theirs in ((wn21k_zoo.create_model, name), (timm.create_model, f"wn21k_{name}")):
        module = create(
            theirs,
            num_classes=3,
            checkpoint_path=tmp_path / "own.pth",
            scriptable=True,
            exportable=True,
            no_jit=True,
            pretrained_cfg_overlay={"mean": (0.25, 0.5, 0.75)},
        )
        assert torch.equal(module.classifier.weight, first.classifier.weight)
        assert timm.data.resolve_model_data_config(module)["mean"] == (0.25, 0.5, 0.75)
        assert not timm.layers.is_scriptable()
    with pytest.raises(ModelError, match="weights do not fit"):
        wn21k_zoo.create_model(name, num_classes=4, checkpoint_path=tmp_path / "own.pth")
    with pytest.raises(WeightsNotFoundError, match=r"none\.pth"):
        wn21k_zoo.create_model(name, checkpoint_path=tmp_path / "none.pth")


def test_an_overlay_that_names_weights_is_followed(tmp_path):
    first = wn21k_zoo.create_model(OFA, pretrained=False)
    safetensors.torch.save_file(first.state_dict(), tmp_path / "own.safetensors")
    overlay = {"file": str(tmp_path / "own.safetensors")}
    module = wn21k_zoo.create_model(OFA, pretrained_cfg_overlay=overlay, num_classes=2)
    assert torch.equal(module.conv_stem.weight, first.conv_stem.weight)


@pytest.fixture
def configuration(tmp_path):
    """A folder with a configuration and no weights."""
    place = tmp_path / "configuration"
    place.mkdir()
    settings = {"num_classes": 5, "first_conv": "conv_stem", "classifier": "classifier"}
    config = {"architecture": "mobilenetv3_small_050", "num_classes": 5, "pretrained_cfg": settings}
    (place / "config.json").write_text(json.dumps(config))
    return place


def test_a_folder_without_weights(configuration, tmp_path):
    with pytest.raises(WeightsNotFoundError):
        wn21k_zoo.create_model(configuration)
    first = wn21k_zoo.create_model(configuration, pretrained=False)
    assert first.num_classes == 5
    torch.save(first.state_dict(), tmp_path / "own.pth")
    safetensors.torch.save_file(first.state_dict(), tmp_path / "own.safetensors")
    for arguments in (
        {"checkpoint_path": tmp_path / "own.pth"},
        {"pretrained_cfg_overlay": {"file": str(tmp_path / "own.safetensors")}},
    ):
        module = wn21k_zoo.create_model(configuration, **arguments)
        assert torch.equal(module.classifier.weight, first.classifier.weight)
    for name in (configuration, EMBEDDED):
        for file in (str(tmp_path / "none.pth"), tmp_path, 5):
            with pytest.raises(WeightsNotFoundError, match=f"pretrained_cfg_overlay: there is no file {file}"):
                wn21k_zoo.create_model(name, pretrained_cfg_overlay={"file": file})


@pytest.mark.slow
def test_a_repository_is_asked_for_no_weights_that_nobody_wants(configuration, tmp_path):
    code = """
import wn21k_zoo
print(wn21k_zoo.create_model("hf-hub:org/name", pretrained=False).num_classes)
"""
    files = {"org/name/resolve/main/config.json": (configuration / "config.json").read_bytes()}
    with hub_server(files) as (endpoint, seen):
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "WN21K_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
        )
    assert done.stdout == "5\n", done.stderr
    assert not [request for request in seen if "config.json" not in request]


@pytest.mark.parametrize(
    "arguments",
    [
        {"pretrained_cfg": {"mean": (0.5, 0.5, 0.5)}},
        {"pretrained_cfg": "miil_in21k"},
        {"pretrained_cfg_overlay": "miil_in21k"},
        {"overlay": {}},
    ],
)
def test_a_configuration_is_changed_in_one_way(arguments, configuration):
    for name in (OFA, configuration):
        with pytest.raises(InvalidArgumentError, match="pretrained_cfg_overlay=dict"):
            wn21k_zoo.create_model(name, pretrained=False, **arguments)
        assert wn21k_zoo.create_model(name, pretrained=False, pretrained_cfg=None)


@pytest.mark.parametrize("argument", ["architecture", "config", "checkpoint", "model_name", "folder", "weights"])
def test_the_names_of_our_own_parameters_are_no_arguments(argument, configuration):
    for name in (OFA, EMBEDDED, configuration):
        with pytest.raises(InvalidArgumentError, match=argument):
            wn21k_zoo.create_model(name, pretrained=False, **{argument: "x"})
