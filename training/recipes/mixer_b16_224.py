r"""Mixer-B/16: ImageNet-21K-P (published: 76.3 % semantic top-1), ImageNet-1K (82.3 % top-1).

The first recipe; the others by :NAME after the file:

    1 GPU    python -m wn21k_zoo.training.train \
                 --recipe training/recipes/mixer_b16_224.py --data DIR --output DIR
    8 GPUs   torchrun --nproc-per-node 8 -m wn21k_zoo.training.train \
                 --recipe training/recipes/mixer_b16_224.py --data DIR --output DIR
    4 nodes  torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
                 -m wn21k_zoo.training.train \
                 --recipe training/recipes/mixer_b16_224.py --data DIR --output DIR
             or one of training/launch/

The batch of a step stays the same on any number of GPUs. What each one takes on 8 V100 (estimated, not measured: images
over the published 420 images per second and GPU, with a teacher at its published inference speed in
turn; `wn21k train plan` computes it for others):

    in21k                            944 M images   100.5 hours
    in21k_without_distillation       944 M images    78.0 hours
    in21k_winter21                   885 M images    73.1 hours
    in21k_from_scratch             1,652 M images   175.8 hours
    in21k_modern                   1,062 M images    87.8 hours
    in1k                              51 M images     5.5 hours
    in1k_without_distillation         51 M images     4.2 hours

in1k takes the usual folders, DIR/train/n01440764/... and DIR/val/n01440764/...; the others what `wn21k data prepare`
makes. The published speeds are the highest there are, in half precision; a V100 has no bf16, which in21k_modern takes.
That one crops, and shards made with --resize short-edge --size 256 leave it more to see.

ImageNet-1K weights to begin with: mixer_b16_224.goog_in21k_ft_in1k, which in spite of its name
has not seen ImageNet-21K (https://github.com/huggingface/pytorch-image-models/pull/651); which ones the authors took is
not published.
wn21k_zoo/training/presets.py says what is published and what had to be chosen, above all the weight of the distillation
and most of the fine-tuning. None of these recipes has been run to its end by this project.
"""

from wn21k_zoo.training import presets
from wn21k_zoo.training.recipe import Recipe


def in21k() -> Recipe:
    """Semantic softmax with distillation, from ImageNet-1K weights."""
    return presets.in21k("mixer_b16_224")


def in21k_without_distillation() -> Recipe:
    """Semantic softmax alone."""
    return presets.without_distillation(in21k())


def in21k_winter21() -> Recipe:
    """On the release of winter 2021."""
    return presets.winter21(in21k())


def in21k_from_scratch() -> Recipe:
    """From random weights."""
    return presets.from_scratch(in21k())


def in21k_modern() -> Recipe:
    """With what has become common since; not tried."""
    return presets.modern("mixer_b16_224")


def in1k() -> Recipe:
    """The published 21K-P checkpoint, fine-tuned on ImageNet-1K with distillation."""
    return presets.in1k("mixer_b16_224")


def in1k_without_distillation() -> Recipe:
    """The same without a teacher."""
    return presets.without_distillation(in1k())
