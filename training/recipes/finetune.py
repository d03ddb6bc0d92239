r"""Fine-tune a record on a folder of class folders of your own.

    DIR/CLASS/photo.jpg ...                              one image in ten goes to validation, or
    DIR/train/CLASS/photo.jpg ..., DIR/val/CLASS/...     your own split

    1 GPU or CPU   python -m wn21k_zoo.training.train --recipe training/recipes/finetune.py --data DIR --output DIR
    8 GPUs         torchrun --nproc-per-node 8 -m wn21k_zoo.training.train \
                       --recipe training/recipes/finetune.py --data DIR --output DIR \
                       --set data.batch_size=256 --set optimizer.lr=3e-4
    4 nodes        torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
                       -m wn21k_zoo.training.train --recipe training/recipes/finetune.py --data DIR --output DIR \
                       --set data.batch_size=1024 --set optimizer.lr=6e-4

On a GPU add --set run.precision=bf16, or fp16 if it lacks bf16: the default, fp32, works well on every device but costs
more time and memory there.

A step has 32 images on any number of GPUs unless --set says otherwise. The commands for 8 and 32 GPUs raise this, as it
would leave too few images to each GPU, and scale the learning rate with the square root of the batch.

The first recipe starts from MobileNetV3-L, or from the record, timm model or folder named after it:

    --recipe training/recipes/finetune.py:finetune:tresnet_v2_l.miil_in21k
    --recipe training/recipes/finetune.py:finetune:convnext_tiny.in12k
    --recipe training/recipes/finetune.py:finetune:./my_resnet50

The result is a model in its own right, whether its classes are synsets or have names of your own:

    wn21k train export RUN ./mine
    wn21k predict photo.jpg --model ./mine

To keep changes, write a file of your own:

    from wn21k_zoo.training import presets

    def mine():
        recipe = presets.finetune("convnext_tiny.in12k")
        recipe.data.augmentation = "modern"
        return recipe

Images seen: 20 epochs or, if these are fewer (below 1,600 training images, in batches of 32), as many epochs as 1,000
steps take (an explicit --set schedule.epochs=5 overrides both). Hours: images seen / images per second / 3600. The log
of a run shows the images per second of all its GPUs together; `wn21k train plan FILE --gpus 1 --images N
--images-per-second X` computes the hours in advance.

Learning rates, augmentation and epochs are our choice. benchmarks/finetune.py compares them with a linear probe on few
images: if your classes are close to those the weights were trained on, --set model.freeze_backbone=true may be better.
The authors published an example on CIFAR-100 and single values of their fine-tuning (wn21k_zoo/training/presets.py):
batch 128, 50 epochs, Adam at 2e-4 or SGD, a moving average of 0.995.
"""

from wn21k_zoo.training import presets
from wn21k_zoo.training.recipe import Recipe


def finetune(record: str = "mobilenetv3_large_100.miil_in21k") -> Recipe:
    """MobileNetV3-L, pretrained on ImageNet-21K-P, or the given record, timm model or folder."""
    return presets.finetune(record)


def vit_base() -> Recipe:
    """ViT-B/16, pretrained on ImageNet-21K-P."""
    recipe = presets.finetune("vit_base_patch16_224_miil.in21k")
    recipe.optimizer.lr = 3e-5
    return recipe


def embedded() -> Recipe:
    """EfficientNet-Lite0 with the ImageNet-1K weights of the extra ``embedded``; needs no model hub."""
    return presets.finetune("efficientnet_lite0.embedded_in1k")
