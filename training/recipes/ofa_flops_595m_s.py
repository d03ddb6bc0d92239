r"""OFA-595M (s): ImageNet-21K-P (published: 75.0 % semantic top-1), ImageNet-1K (81.0 % top-1).

The first recipe; the others by :NAME after the file:

    1 GPU    python -m wn21k_zoo.training.train \
                 --recipe training/recipes/ofa_flops_595m_s.py --data DIR --output DIR
    8 GPUs   torchrun --nproc-per-node 8 -m wn21k_zoo.training.train \
                 --recipe training/recipes/ofa_flops_595m_s.py --data DIR --output DIR
    4 nodes  torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
                 -m wn21k_zoo.training.train \
                 --recipe training/recipes/ofa_flops_595m_s.py --data DIR --output DIR
             or one of training/launch/

The batch of a step stays the same on any number of GPUs; on many, batch normalisation sees few images of it, and
model.sync_batchnorm=true is for that. What each recipe takes on 8 V100 (estimated, not measured: images
over the published 500 images per second and GPU, with a teacher at its published inference speed in
turn; `wn21k train plan` computes it for others):

    in21k                          1,652 M images   154.0 hours
    in21k_without_distillation     1,652 M images   114.7 hours
    in21k_winter21                 1,548 M images   107.5 hours
    in21k_modern                   1,652 M images   114.7 hours
    in1k                              51 M images     4.8 hours
    in1k_without_distillation         51 M images     3.6 hours

in1k takes the usual folders, DIR/train/n01440764/... and DIR/val/n01440764/...; the others what `wn21k data prepare`
makes. The published speeds are the highest there are, in half precision; a V100 has no bf16, which in21k_modern takes.
That one crops, and shards made with --resize short-edge --size 256 leave it more to see.

No ImageNet-1K weights of this architecture are known to us that have not seen ImageNet-21K. With some of your own, a
folder, say, ofa_flops_595m_s.py:in21k:DIR has the published settings. Without, what begins with in21k begins with
random weights, and but for in21k_modern has the settings that are published for that.
wn21k_zoo/training/presets.py says what is published and what had to be chosen, above all the weight of the distillation
and most of the fine-tuning. None of these recipes has been run to its end by this project.
"""

from wn21k_zoo.training import presets
from wn21k_zoo.training.recipe import Recipe


def in21k(start: str | None = None) -> Recipe:
    """Semantic softmax with distillation, from the ImageNet-1K weights that are named, else from random ones."""
    return presets.in21k("ofa_flops_595m_s", start)


def in21k_without_distillation() -> Recipe:
    """Semantic softmax alone."""
    return presets.without_distillation(in21k())


def in21k_winter21() -> Recipe:
    """On the release of winter 2021."""
    return presets.winter21(in21k())


def in21k_modern() -> Recipe:
    """With what has become common since; not tried."""
    return presets.modern("ofa_flops_595m_s")


def in1k() -> Recipe:
    """The published 21K-P checkpoint, fine-tuned on ImageNet-1K with distillation."""
    return presets.in1k("ofa_flops_595m_s")


def in1k_without_distillation() -> Recipe:
    """The same without a teacher."""
    return presets.without_distillation(in1k())
