from collections import Counter

import pytest
import timm
import torch

import wn21k_zoo.timm_models  # noqa: F401 - registers our names
from wn21k_zoo import registry
from wn21k_zoo.checkpoints import CHECKPOINTS
from wn21k_zoo.errors import InvalidArgumentError, UnknownModelError, UnresolvedLabelSpaceError
from wn21k_zoo.labels import LabelSpace

# In timm 1.0.31: all with these numbers of classes, except the two with 1,000 classes and no in1k tag.
RESOLVED = {
    "1.0.31": {
        "imagenet1k": 1_319,
        "imagenet21k_p_fall11": 5,
        "imagenet12k": 48,
        "imagenet22k": 31,
        "imagenet22k_ms": 5,
        "imagenet21k_goog": 30,
    }
}
REFUSED_WITH_KNOWN_COUNT = {"resmlp_12_224.fb_dino", "resmlp_24_224.fb_dino"}


def test_every_pretrained_configuration_of_timm_resolves_or_is_refused():
    resolved, refused, messages = Counter(), set(), {}
    for name in timm.list_models(pretrained=True, exclude_filters="wn21k_*"):  # another test may have imported ours
        config = timm.models.get_pretrained_cfg(name)
        try:
            space = LabelSpace.load(registry.resolve_checkpoint(name).label_space)
        except UnresolvedLabelSpaceError as error:
            messages[name] = str(error)
            if config.num_classes in {1_000, 11_221, 11_821, 21_841, 21_842, 21_843}:
                refused.add(name)
            continue
        assert len(space) == config.num_classes
        resolved[space.name] += 1
    assert all(name in message for name, message in messages.items())
    assert refused == REFUSED_WITH_KNOWN_COUNT
    if timm.__version__ not in RESOLVED:
        pytest.skip(f"the counts are pinned for timm {', '.join(RESOLVED)}, not {timm.__version__}")
    assert resolved == RESOLVED[timm.__version__]


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda checkpoint: checkpoint.name)
def test_every_record_is_found(checkpoint):
    assert registry.get_checkpoint(checkpoint.name) is checkpoint
    assert registry.resolve_checkpoint(checkpoint.name) is checkpoint
    assert checkpoint.name in registry.list_checkpoints()
    assert registry.resolve_checkpoint(f"wn21k_{checkpoint.name}") is checkpoint
    assert registry.find_record(checkpoint.architecture, checkpoint.name.partition(".")[2]) is checkpoint


@pytest.mark.parametrize("stem", sorted({checkpoint.name.partition(".")[0] for checkpoint in CHECKPOINTS}))
def test_a_name_of_ours_without_a_tag_is_the_model_that_timm_makes_of_it(stem):
    checkpoint = registry.resolve_checkpoint(f"wn21k_{stem}")
    with torch.device("meta"):
        stated = timm.create_model(f"wn21k_{stem}").pretrained_cfg
    assert checkpoint is registry.records_of(stem)[0]
    assert (stated["tag"], stated["num_classes"]) == (
        checkpoint.name.partition(".")[2],
        len(LabelSpace.load(checkpoint.label_space)),
    )


def test_our_prefix_is_of_our_records_alone():
    with pytest.raises(UnknownModelError, match=r"Did you mean .*resnet50\.miil_in21k"):
        registry.resolve_checkpoint("wn21k_resnet50.mil_in21k")
    with pytest.raises(UnknownModelError, match="convnext_tiny"):
        registry.resolve_checkpoint("wn21k_convnext_tiny.in12k")


def test_patterns():
    assert registry.list_checkpoints("*embedded*") == ("efficientnet_lite0.embedded_in1k",)
    assert registry.list_checkpoints("zzz*") == ()
    with pytest.raises(InvalidArgumentError, match="give one text"):
        registry.list_checkpoints(["*mobile*"])
    for wrong in (None, 3, ["resnet50"]):
        for find in (registry.get_checkpoint, registry.resolve_checkpoint):
            with pytest.raises(UnknownModelError):
                find(wrong)


def test_bare_architecture_is_its_default_tag():
    assert registry.resolve_checkpoint("vit_base_patch16_224_miil").head == "semantic_softmax"
    assert registry.resolve_checkpoint("mobilenetv3_large_100").name == "mobilenetv3_large_100.ra_in1k"


def test_a_timm_record_has_timms_preprocessing():
    checkpoint = registry.resolve_checkpoint("convnext_tiny.in12k")
    module = timm.create_model("convnext_tiny.in12k")
    assert checkpoint.data_config == timm.data.resolve_model_data_config(module)
    assert checkpoint.label_space == "imagenet12k"
    assert checkpoint.sources[0].repo_id == "timm/convnext_tiny.in12k"


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("mobilenetv3_large_100.mil_in21k", "mobilenetv3_large_100.miil_in21k"),
        ("efficientnet_lite0.embeded_in1k", "efficientnet_lite0.embedded_in1k"),
        ("convnext_tinyy", "convnext_tiny"),
        ("convnext_tiny.in12", "convnext_tiny.in12k"),
    ],
)
def test_typos(name, suggestion):
    with pytest.raises(UnknownModelError, match=f"Did you mean .*{suggestion}"):
        registry.resolve_checkpoint(name)


def test_get_checkpoint_knows_records_only():
    with pytest.raises(UnknownModelError, match="embedded_in1k"):
        registry.get_checkpoint("efficientnet_lite0.embeded_in1k")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_base_patch16_224.dino", "no classifier"),
        ("vit_base_patch16_224.bamboo", "115,217"),
        ("resmlp_12_224.fb_dino", "does not say in1k"),
    ],
)
def test_refusals_name_the_reason(name, reason):
    with pytest.raises(UnresolvedLabelSpaceError, match=reason):
        registry.resolve_checkpoint(name)
