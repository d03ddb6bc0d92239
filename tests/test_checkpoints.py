import pytest
import timm
from timm.data import resolve_data_config

from wn21k_zoo.architectures import ARCHITECTURES
from wn21k_zoo.checkpoints import CHECKPOINTS, DEFAULT_CHECKPOINT, EMBEDDED_CHECKPOINT
from wn21k_zoo.labels import LABEL_SPACES

every_record = pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda checkpoint: checkpoint.name)


@every_record
def test_record_is_complete(checkpoint):
    assert checkpoint.label_space in LABEL_SPACES
    assert timm.is_model(checkpoint.architecture) or checkpoint.architecture in ARCHITECTURES
    assert checkpoint.sources
    assert checkpoint.license
    assert checkpoint.origin.startswith("https://")
    assert checkpoint.sha256 is None or len(checkpoint.sha256) == 64
    for metric in checkpoint.metrics:
        assert metric.protocol
        assert metric.measured_by


@every_record
def test_preprocessing(checkpoint):
    if checkpoint.head == "semantic_softmax":  # 21K-P: squash, bilinear, pixels in [0, 1]
        assert checkpoint.resize == "squash"
        assert checkpoint.data_config["crop_mode"] == "squash"
        assert (checkpoint.mean, checkpoint.std, checkpoint.interpolation) == ((0.0,) * 3, (1.0,) * 3, "bilinear")
    else:  # whatever timm says
        name = checkpoint.architecture if checkpoint.name == EMBEDDED_CHECKPOINT else checkpoint.name
        config = timm.models.get_pretrained_cfg(name).to_dict()
        assert checkpoint.data_config == resolve_data_config({}, pretrained_cfg=config)


def test_names():
    names = [checkpoint.name for checkpoint in CHECKPOINTS]
    assert len(set(names)) == len(names)
    assert {DEFAULT_CHECKPOINT, EMBEDDED_CHECKPOINT} <= set(names)
