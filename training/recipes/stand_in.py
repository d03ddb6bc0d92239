r"""Semantic softmax against its baseline on a stand-in for ImageNet-21K: 199 synsets, 64 pixels, minutes on a CPU.

    1 GPU or CPU   python -m wn21k_zoo.training.train \
                       --recipe training/recipes/stand_in.py --data DIR --output DIR
    8 GPUs         torchrun --nproc-per-node 8 -m wn21k_zoo.training.train \
                       --recipe training/recipes/stand_in.py --data DIR --output DIR
    4 nodes        torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
                       -m wn21k_zoo.training.train --recipe training/recipes/stand_in.py --data DIR --output DIR

Three arms share the network, images, steps and seeds: single_label, semantic (the first recipe) and distilled, which
reads its teacher from runs/teacher-model, where `wn21k train export` puts the model trained by the recipe `teacher`.
The data is 200 classes of Tiny ImageNet, one tar of 150 images per class; 199 of them are classes of ImageNet-21K-P.
The head has all 11,221 classes of fall11, 199 of which have images. training/results/stand_in/run.sh runs everything;
the results are beside it.

Images seen: 155,136 per arm, 51,712 for the teacher. Hours: images seen / images per second / 3600, with the speed from
the log there: 0.1 to 0.3 on one core of a busy CPU; more than one GPU is not worth it. None of these settings is
published; all are chosen.
"""

from wn21k_zoo.training.recipe import Recipe


def semantic() -> Recipe:
    """Semantic softmax."""
    recipe = Recipe(name="regnetx_002.stand_in", model={"architecture": "regnetx_002"})
    recipe.data.size, recipe.data.batch_size, recipe.data.batch_per_device = 64, 128, 128
    recipe.data.augmentation, recipe.data.window = "finetune", 2
    recipe.optimizer.lr = 2e-3
    recipe.schedule.epochs = 6
    recipe.run.precision = "fp32"
    return recipe


def single_label() -> Recipe:
    """One softmax over all classes."""
    recipe = semantic()
    recipe.name, recipe.loss.kind = "regnetx_002.stand_in_single_label", "single_label"
    return recipe


def distilled() -> Recipe:
    """Semantic softmax with distillation from the teacher."""
    recipe = semantic()
    recipe.name = "regnetx_002.stand_in_distilled"
    recipe.loss.teacher, recipe.loss.distillation_weight = "runs/teacher-model", 10.0
    return recipe


def teacher() -> Recipe:
    """Semantic softmax on EfficientNet-Lite0, starting from the ImageNet-1K weights of the extra ``embedded``.

    Those have seen these classes; the arms above start from random weights.
    """
    recipe = semantic()
    recipe.name = "tf_efficientnet_lite0.stand_in_teacher"
    recipe.model.architecture, recipe.model.start = "tf_efficientnet_lite0", "efficientnet_lite0.embedded_in1k"
    recipe.model.mean = recipe.model.std = (0.5, 0.5, 0.5)
    recipe.optimizer.lr = 5e-4
    recipe.schedule.epochs = 2
    return recipe
