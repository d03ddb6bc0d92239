r"""OFA-595M (s): ImageNet-21K-P (published: 75.0 % semantic top-1), ImageNet-1K (81.0 % top-1).

The commands run the first recipe; append :NAME to the file for another one:

    1 GPU    python -m wn21k_zoo.training.train \
                 --recipe training/recipes/ofa_flops_595m_s.py --data DIR --output DIR
    8 GPUs   torchrun --nproc-per-node 8 -m wn21k_zoo.training.train \
                 --recipe training/recipes/ofa_flops_595m_s.py --data DIR --output DIR
    4 nodes  torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
                 -m wn21k_zoo.training.train \
                 --recipe training/recipes/ofa_flops_595m_s.py --data DIR --output DIR
             or one of training/launch/

The batch per step is the same on any number of GPUs. On many GPUs, batch normalisation sees few of its images at a
time; model.sync_batchnorm=true is for that. Cost of each recipe on 8 V100s (estimated, not measured: images over the
published 500 images per second per GPU, plus any teacher's forward pass at its published inference speed;
`wn21k train plan` computes it for other settings):

    in21k                          1,652 M images   154.0 hours
    in21k_without_distillation     1,652 M images   114.7 hours
    in21k_winter21                 1,548 M images   107.5 hours
    in21k_modern                   1,652 M images   114.7 hours
    in1k                              51 M images     4.8 hours
    in1k_without_distillation         51 M images     3.6 hours

The in1k recipes read the usual folders, DIR/train/n01440764/... and DIR/val/n01440764/...; the others read the output
of `wn21k data prepare`. The published speeds are the highest reported, in half precision. in21k_modern uses bf16, which
a V100 lacks, and it crops: shards made with --resize short-edge --size 256 leave it more to crop from.

We know of no ImageNet-1K weights of this architecture that have not seen ImageNet-21K. If you have some, for example in
a folder, ofa_flops_595m_s.py:in21k:DIR trains them with the published settings, and so do the other in21k recipes.
Without them these start from random weights and, except for in21k_modern, use the settings published for training from
scratch.

Published: ImageNet-1K weights to start from; Adam, learning rate 3e-4, weight decay 1e-4; one cycle of 80 epochs, 10 %
of it warm-up; label smoothing 0.2; squash to 224, cutout, RandAugment, no normalisation; distillation, with
tresnet_v2_l.miil_in21k a good teacher; from scratch, for one softmax, SGD at 1e-2 for 140 epochs; on ImageNet-1K Adam
at 2e-4 and distillation.

Chosen, as it is not published: batches of 512; the distillation weight, 10, and its form in fine-tuning; on ImageNet-1K
40 epochs of batches of 512, smoothing 0.1, a moving average of 0.9997 and a centre crop of 0.875; semantic softmax and
distillation from scratch; all of in21k_modern. wn21k_zoo/training/presets.py has sources and reasons. This project has
run none of these recipes to completion.
"""

from wn21k_zoo.training import presets
from wn21k_zoo.training.recipe import Recipe


def in21k(start: str | None = None) -> Recipe:
    """Semantic softmax with distillation, from the given ImageNet-1K weights, else from random ones."""
    return presets.in21k("ofa_flops_595m_s", start)


def in21k_without_distillation(start: str | None = None) -> Recipe:
    """Semantic softmax alone."""
    return presets.without_distillation(in21k(start))


def in21k_winter21(start: str | None = None) -> Recipe:
    """On the winter 2021 release, without distillation."""
    return presets.winter21(in21k(start))


def in21k_modern(start: str | None = None) -> Recipe:
    """With techniques that have become common since, without distillation; not tried."""
    return presets.modern("ofa_flops_595m_s", start)


def in1k() -> Recipe:
    """The published 21K-P checkpoint, fine-tuned on ImageNet-1K with distillation."""
    return presets.in1k("ofa_flops_595m_s")


def in1k_without_distillation() -> Recipe:
    """The same without a teacher."""
    return presets.without_distillation(in1k())
