"""The published checkpoints without their values: keys and shapes of each file, and weights made by a rule.

Besides the keys, ``data/published_architectures.json`` has the logits of the original networks with these weights.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

REFERENCE = json.loads((Path(__file__).parent / "data" / "published_architectures.json").read_text())["architectures"]
SEED = 1
# name in the reference: architecture
ARCHITECTURE_OF = {
    "ofa_flops_595m_s": "ofa_flops_595m_s",
    "tresnet_m": "tresnet_m",
    "tresnet_l": "tresnet_v2_l",
    "resnet50": "resnet50",
    "mobilenetv3_large_100": "mobilenetv3_large_100",
    "vit_base_patch16_224": "vit_base_patch16_224_miil",
    "mixer_b16_224": "mixer_b16_224",
}


def state_dict(name, counters=True):
    """The entries of a published file; without ``counters``, like files that lack num_batches_tracked."""
    keys = REFERENCE[name]["keys"]
    return {key: _value(key, tuple(shape)) for key, shape in keys.items() if counters or len(shape)}


def images():
    """Two images [2, 3, 224, 224] in [0, 1]."""
    return torch.from_numpy(
        np.random.Generator(np.random.PCG64(1000 + SEED)).random((2, 3, 224, 224), np.float64)
    ).float()


def _value(key, shape):
    if not shape:
        return torch.zeros((), dtype=torch.int64)
    rng = np.random.Generator(np.random.PCG64(int(hashlib.sha256(f"{SEED}:{key}".encode()).hexdigest()[:12], 16)))
    if key.endswith("running_var"):
        value = 0.5 + rng.random(shape)
    elif len(shape) > 1:
        value = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    elif key.endswith("weight"):
        value = 0.5 + rng.random(shape)
    else:
        value = 0.1 * rng.standard_normal(shape)
    return torch.from_numpy(value.astype(np.float32))
