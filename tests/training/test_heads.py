import pytest
import timm
import torch
from torch import nn

from wn21k_zoo.errors import RecipeError
from wn21k_zoo.training.heads import calm_head, check_head, freeze_backbone, reorder_head, train_head


def test_of_a_frozen_network_the_classifier_alone_is_as_in_training():
    module = timm.create_model("levit_128s", num_classes=3)
    freeze_backbone(module)
    train_head(module)
    training = {name for name, each in module.named_modules() if each.training}
    assert training >= {"head.bn", "head_dist.bn"}
    assert all(name.startswith("head") for name in training)


def test_a_classifier_that_does_not_fit_is_not_put_into_another_order():
    module = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5, depth=1)
    with pytest.raises(RecipeError, match="is not a linear layer with 4 outputs"):
        reorder_head(module, torch.arange(4))
    module.head_dist = nn.Linear(192, 4)
    with pytest.raises(RecipeError, match="is not a linear layer with 5 outputs"):
        check_head(module, 5)


def test_a_new_classifier_may_have_no_bias():
    module = timm.create_model("test_convnext", num_classes=3)
    module.head.fc = nn.Linear(module.head.fc.in_features, 3, bias=False)
    nn.init.ones_(module.head.fc.weight)
    calm_head(module)
    assert module.head.fc.weight.abs().max() < 0.1
