r"""The paper's baselines beside semantic softmax: TResNet-M with one softmax over all classes, and with many labels.

    1 GPU    python -m wn21k_zoo.training.train --recipe training/recipes/baselines.py --data DIR --output DIR
    8 GPUs   torchrun --nproc-per-node 8 -m wn21k_zoo.training.train \
                 --recipe training/recipes/baselines.py --data DIR --output DIR
    4 nodes  torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
                 -m wn21k_zoo.training.train --recipe training/recipes/baselines.py --data DIR --output DIR

On 8 V100 (estimated, not measured: images over the published 670 images per second and GPU):

    single_label                     944 M images    48.9 hours
    single_label_distilled           944 M images    71.3 hours
    single_label_from_scratch      1,652 M images    85.6 hours
    multi_label                      944 M images    48.9 hours

Published: that both were compared with semantic softmax, each with and without distillation, the losses, and the rest
of the training as in tresnet_m.py; of random weights, the code of single_label_from_scratch alone. Chosen: the
exponents and the clip of the asymmetric loss, which are those of its own paper (arXiv 2009.14119), and the weight of
the distillation. How many labels at once were distilled is not published, and no recipe here does it. Not run to its
end by this project.
"""

from wn21k_zoo.training import presets
from wn21k_zoo.training.recipe import Recipe


def single_label() -> Recipe:
    """One softmax over all classes, cross-entropy with label smoothing."""
    return presets.single_label(presets.in21k("tresnet_m"))


def single_label_distilled() -> Recipe:
    """The same with a teacher."""
    recipe, taught = single_label(), presets.in21k("tresnet_m").loss
    recipe.name = f"{recipe.name}_distilled"
    recipe.loss.teacher, recipe.loss.distillation_weight = taught.teacher, taught.distillation_weight
    return recipe


def single_label_from_scratch() -> Recipe:
    """One softmax from random weights, as the authors' train_single_label_from_scratch.py has it."""
    return presets.from_scratch(single_label())


def multi_label() -> Recipe:
    """A sigmoid per class and ancestor, asymmetric loss."""
    return presets.multi_label(presets.in21k("tresnet_m"))
