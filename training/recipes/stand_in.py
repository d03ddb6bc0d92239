r"""Semantic softmax beside its baseline on a stand-in for ImageNet-21K: 199 synsets, 64 pixels, minutes on a CPU.

    wn21k data prepare tiny_imagenet_whole.tar.gz shards --min-images 100 --val-per-class 20 --size 64
    TRAIN="python -m wn21k_zoo.training.train --data shards --recipe training/recipes/stand_in.py"
    $TRAIN:teacher --output runs/teacher
    wn21k train export runs/teacher runs/teacher-model
    $TRAIN:distilled --output runs/distilled-0 --set run.seed=0

Three arms with the same network, images, steps and seeds: single_label, semantic, distilled. The data is 200 classes of
Tiny ImageNet as one tar per class, 150 images each; 199 of them are classes of ImageNet-21K-P. The head speaks all
11,221 classes of fall11, of which 199 have images. training/results/stand_in/ has what came of it.

Images seen: 155,136 per arm. Hours: see the logs there. 8 GPUs, several nodes: not worth starting, but torchrun takes
it as any other (training/recipes/resnet50.py). Nothing of this is published; all of it is chosen.
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
    """Semantic softmax and the teacher's predictions."""
    recipe = semantic()
    recipe.name = "regnetx_002.stand_in_distilled"
    recipe.loss.teacher, recipe.loss.distillation_weight = "runs/teacher-model", 10.0
    return recipe


def teacher() -> Recipe:
    """Semantic softmax on EfficientNet-Lite0, which begins with the ImageNet-1K weights of the extra ``embedded``.

    Those have seen these classes; the arms above begin with random weights.
    """
    recipe = semantic()
    recipe.name = "tf_efficientnet_lite0.stand_in_teacher"
    recipe.model.architecture, recipe.model.start = "tf_efficientnet_lite0", "efficientnet_lite0.embedded_in1k"
    recipe.model.mean = recipe.model.std = (0.5, 0.5, 0.5)
    recipe.optimizer.lr = 5e-4
    recipe.schedule.epochs = 2
    return recipe
