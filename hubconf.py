"""torch.hub entry points: ``torch.hub.load(CHECKOUT, 'resnet50_miil_in21k', source='local')``.

One per checkpoint, named after it with dots replaced by underscores; ``predictor``; ``semantic_tree``.
"""

dependencies = [
    "filelock",
    "huggingface_hub",
    "numpy",
    "PIL",
    "platformdirs",
    "requests",
    "rich",
    "safetensors",
    "timm",
]


def predictor(name=None, **kwargs):
    """Labels at every level of the WordNet hierarchy: ``predictor()('photo.jpg').label``.

    Args:
        name: Checkpoint name; by default that of :func:`wn21k_zoo.predict`. Not called ``model`` as it is there, which
            is an argument of ``torch.hub.load`` itself.
        **kwargs: As for ``wn21k_zoo.Predictor``: top_k, threshold, device, batch_size, ...
    """
    return _package().Predictor(name, **kwargs)


def semantic_tree(name="fall11"):
    """The tree over a label space: ``semantic_tree('fall11').class_tree_list``.

    Args:
        name: fall11, winter21, imagenet1k, imagenet12k, imagenet21k_goog, imagenet22k or imagenet22k_ms.
    """
    return _package().SemanticTree.load(name)


def _package():
    # Later imports go through the package's own folder: torch.hub removes the checkout from sys.path after the load.
    import wn21k_zoo

    return wn21k_zoo


def _entry_point(name):
    def create(pretrained=True, **kwargs):
        return _package().create_model(name, pretrained=pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name.replace(".", "_")
    create.__doc__ = f"""{name}, built by ``wn21k_zoo.create_model``; in training mode.

    Args:
        pretrained: Load the published weights, verified.
        **kwargs: num_classes, features_only, in_chans, cache_dir, ...
    """
    return create


# Written out because torch.hub runs this file before it checks that the dependencies are installed.
_CHECKPOINTS = (
    "efficientnet_lite0.embedded_in1k",
    "mobilenetv3_large_100.miil_in21k",
    "ofa_flops_595m_s.miil_in21k",
    "resnet50.miil_in21k",
    "mixer_b16_224.miil_in21k",
    "tresnet_m.miil_in21k",
    "tresnet_v2_l.miil_in21k",
    "vit_base_patch16_224_miil.in21k",
    "mobilenetv3_large_100.miil_in21k_ft_in1k",
    "mixer_b16_224.miil_in21k_ft_in1k",
    "tresnet_m.miil_in21k_ft_in1k",
    "tresnet_v2_l.miil_in21k_ft_in1k",
    "vit_base_patch16_224_miil.in21k_ft_in1k",
)
globals().update({name.replace(".", "_"): _entry_point(name) for name in _CHECKPOINTS})
