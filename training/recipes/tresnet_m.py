r"""TResNet-M: ImageNet-21K-P (published: 76.4 % semantic top-1), ImageNet-1K (83.1 % top-1).

The commands run the first recipe; append :NAME to the file for another one:

    1 GPU    python -m wn21k_zoo.training.train \
                 --recipe training/recipes/tresnet_m.py --data DIR --output DIR
    8 GPUs   torchrun --nproc-per-node 8 -m wn21k_zoo.training.train \
                 --recipe training/recipes/tresnet_m.py --data DIR --output DIR
    4 nodes  torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
                 -m wn21k_zoo.training.train \
                 --recipe training/recipes/tresnet_m.py --data DIR --output DIR
             or one of training/launch/

The batch per step is the same on any number of GPUs. On many GPUs, batch normalisation sees few of its images at a
time; model.sync_batchnorm=true is for that. Cost of each recipe on 8 V100s (estimated, not measured: images over the
published 670 images per second per GPU, plus any teacher's forward pass at its published inference speed;
`wn21k train plan` computes it for other settings):

    in21k                            944 M images    71.3 hours
    in21k_without_distillation       944 M images    48.9 hours
    in21k_winter21                   885 M images    45.8 hours
    in21k_from_scratch             1,652 M images   124.9 hours
    in21k_modern                   1,062 M images    55.0 hours
    in1k                              51 M images     3.9 hours
    in1k_without_distillation         51 M images     2.7 hours

The in1k recipes read the usual folders, DIR/train/n01440764/... and DIR/val/n01440764/...; the others read the output
of `wn21k data prepare`. The published speeds are the highest reported, in half precision. in21k_modern uses bf16, which
a V100 lacks, and it crops: shards made with --resize short-edge --size 256 leave it more to crop from.

Published: ImageNet-1K weights to start from; Adam, learning rate 3e-4, weight decay 1e-4; one cycle of 80 epochs, 10 %
of it warm-up; 8 GPUs with 416 images each; label smoothing 0.2; squash to 224, cutout, RandAugment, no normalisation;
distillation, with tresnet_v2_l.miil_in21k a good teacher; from scratch, for one softmax, SGD at 1e-2 for 140 epochs; on
ImageNet-1K Adam at 2e-4 and distillation.

Chosen, as it is not published: the distillation weight, 10, and its form in fine-tuning; which ImageNet-1K weights to
start from, here tresnet_m.miil_in1k; on ImageNet-1K 40 epochs of batches of 512, smoothing 0.1, a moving average of
0.9997 and a centre crop of 0.875; semantic softmax and distillation from scratch; all of in21k_modern.
wn21k_zoo/training/presets.py has sources and reasons. This project has run none of these recipes to completion.
"""

from wn21k_zoo.training import presets
from wn21k_zoo.training.recipe import Recipe


def in21k() -> Recipe:
    """Semantic softmax with distillation, from ImageNet-1K weights."""
    return presets.in21k("tresnet_m")


def in21k_without_distillation() -> Recipe:
    """Semantic softmax alone."""
    return presets.without_distillation(in21k())


def in21k_winter21() -> Recipe:
    """On the winter 2021 release, without distillation."""
    return presets.winter21(in21k())


def in21k_from_scratch() -> Recipe:
    """From random weights."""
    return presets.from_scratch(in21k())


def in21k_modern() -> Recipe:
    """With techniques that have become common since, without distillation; not tried."""
    return presets.modern("tresnet_m")


def in1k() -> Recipe:
    """The published 21K-P checkpoint, fine-tuned on ImageNet-1K with distillation."""
    return presets.in1k("tresnet_m")


def in1k_without_distillation() -> Recipe:
    """The same without a teacher."""
    return presets.without_distillation(in1k())
