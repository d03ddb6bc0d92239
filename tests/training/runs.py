"""Small runs for the tests of the engine: six synsets in three levels, networks of a few thousand parameters."""

import os
from pathlib import Path

from wn21k_zoo.training.recipe import Recipe

from .archives import jpeg

# mammal, person, plant; cat, dog; tabby
WNIDS = ("n01861778", "n00007846", "n00017222", "n02121808", "n02084071", "n02123045")
BATCH = 8


def make_folder(folder, images=10, names=WNIDS):
    """A folder of class folders; each class has a colour of its own, so that there is something to learn."""
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for index in range(images):
            (folder / name / f"{index}.jpg").write_bytes(jpeg(1000 * number + index, 40, 36))
    return folder


def small_recipe(architecture="test_convnext", **sections):
    """Batches of 8 of 54 images, so 6 steps an epoch."""
    recipe = Recipe(name="small", model={"architecture": architecture})
    recipe.data.label_space, recipe.data.size, recipe.data.window = None, 32, 1
    recipe.data.batch_size = recipe.data.batch_per_device = BATCH
    recipe.schedule.epochs = 2
    recipe.run.precision, recipe.run.log_every = "fp32", 1
    for name, fields in sections.items():
        for field, value in fields.items():
            setattr(getattr(recipe, name), field, value)
    return recipe


def run_until_killed(recipe_json, data, output):
    """A run in a process of its own, in one thread; what a test kills."""
    import torch

    from wn21k_zoo.training.distributed import World
    from wn21k_zoo.training.engine import train

    os.environ["TERM"] = "dumb"
    torch.set_num_threads(1)
    train(Recipe.from_json(recipe_json), data, Path(output), World(0, 1, torch.device("cpu")), workers=0)
