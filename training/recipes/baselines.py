r"""The paper's baselines for semantic softmax: TResNet-M with one softmax over all classes, or with many labels.

    1 GPU    python -m wn21k_zoo.training.train --recipe training/recipes/baselines.py --data DIR --output DIR
    8 GPUs   torchrun --nproc-per-node 8 -m wn21k_zoo.training.train \
                 --recipe training/recipes/baselines.py --data DIR --output DIR
    4 nodes  torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
                 -m wn21k_zoo.training.train --recipe training/recipes/baselines.py --data DIR --output DIR

Cost on 8 V100s (estimated, not measured: images over the published 670 images per second per GPU, and those of the
teacher):

    single_label                     944 M images    48.9 hours
    single_label_distilled           944 M images    71.3 hours
    single_label_from_scratch      1,652 M images    85.6 hours
    multi_label                      944 M images    48.9 hours

Published: the comparison of both with semantic softmax, each with and without distillation; the losses; the rest of
the training, as in tresnet_m.py; from random weights, only the code of single_label_from_scratch. Chosen: the exponents
and clip of the asymmetric loss, taken from its own paper (arXiv 2009.14119), and the distillation weight. How the
multi-label baseline was distilled is not published, and no recipe here does it. This project has run none of these
recipes to completion.
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
