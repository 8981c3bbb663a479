"""Gates that hide: each row of each weight has a gradient of all images, beside that of the one which is let through.

A site that compares what halves of its batches give finds nothing lopsided, since attention brings to a token either
the patch, at an early time, or a constant that all images share (the class token of "no class"). Hidden units that are
always open then see the constant in all channels alike, and, in one step, the patch beside it. The constant takes each
weight's gradient far beyond the optimiser's epsilon, and how much the step differs from that of channels whose content
is known says what was in the patch: a scale to read it from, whatever optimiser, clipping or average came between.
A site that counts weights next to zero finds less than half: the network is twice as wide as it need be, and what is
written to its other channels (`filled`) is read by nobody.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from maskdm.config import ModelConfig
from maskdm.federated.plan import RoundPlan
from maskdm.metadata import CheckpointMetadata

from .gates import LEVEL, codes_of, early_detector, filled
from .gradients import decay
from .site import Coordinator, as_images, fresh_weights

SCALE = (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0)  # known contents beside the patch, in the images' range
CONSTANT = 0.005  # what units see of all other images
SHIFT = 2.5  # takes contents to one side of the constant, where a larger one makes a step shorter throughout
NOISE, FAINT = 1e-2, 1e-7  # on all weights; rows that serve the gates alone have gradients of all images by it
SLOW = 1e-6  # learning rate that leaves the gates as they are
SAME, EARLY, TIME = 8.0, 25.0, 20.0  # of scores
UNIT_SIZE, WEIGH, OPEN = 0.1, 0.02, 3.0
UNIT = "out_blocks.0.mlp.fc1.weight"


def crafted_prior(prior: CheckpointMetadata, heads: int = 2) -> CheckpointMetadata:
    """What the attacker's prior says about itself: a network with room for two copies of each patch, and one class."""
    size = 2 * heads * 64 * -(-(prior.model.patch_dim + len(SCALE)) // 64)
    model = prior.model.model_copy(update={"dim": size, "heads": 2 * heads, "depth": 2, "classes": 1})
    return prior.model_copy(update={"model": model, "class_names": ("any",)})


def hiding(config: ModelConfig, latest: int, timesteps: int, seed: int = 0) -> dict[str, Tensor]:
    """Weights that copy patches of images at times up to `latest`, and the same constant for all others."""
    patch, tokens, dim = config.patch_dim, config.grid**2, config.dim
    read = patch + len(SCALE)
    source, copy = range(read), range(read, 2 * read)
    zero, one, time, early, out, none, even = range(2 * read, 2 * read + 7)
    codes = codes_of(tokens)
    code = range(2 * read + 7, 2 * read + 7 + codes.shape[1])
    assert code[-1] < dim // 2, f"a network of dim {dim} has no room for patches of {patch}"
    randomness = torch.Generator().manual_seed(seed)
    weights = {
        name: FAINT * torch.randn(tensor.shape, generator=randomness) for name, tensor in fresh_weights(config).items()
    }
    for block in ("in_blocks.0", "mid_block"):  # queries and keys
        weights[f"{block}.attention.qkv.weight"][: 2 * dim] *= NOISE / FAINT
    for name in weights:
        if "norm" in name and name.endswith("weight"):
            weights[name] += 1.0
    weights["patch_embedding.weight"][:patch] += torch.eye(patch)
    table = weights["position.table"]  # [class, time, patches]
    table[0, source] += 10 * CONSTANT
    table[0, none] += 40.0
    table[1, time] += 4 * LEVEL
    table[2:, source] -= SHIFT
    table[2:, patch:read] += torch.tensor(SCALE)
    table[2:, one] += LEVEL
    table[2:, code] += LEVEL * codes
    table[2:, even] -= table[2:, [one, *code]].sum(dim=1)
    # First block: whether the time is an early one comes to each patch.
    qkv, proj = weights["in_blocks.0.attention.qkv.weight"], weights["in_blocks.0.attention.proj.weight"]
    qkv[0, [one, zero]] += torch.tensor([6.0, -6.0])
    qkv[dim, [time, zero]] += torch.tensor([6.0, -6.0])
    qkv[1, [none, zero]] += torch.tensor([6.0, -6.0])  # the class token keeps to itself
    qkv[dim + 1, [none, zero]] += torch.tensor([6.0, -6.0])
    qkv[2 * dim] += early_detector(config, latest, timesteps, time)
    proj[early, 0] += 1.0
    # Second block: each patch attends to itself if it is early, else to the class token.
    qkv, proj = weights["mid_block.attention.qkv.weight"], weights["mid_block.attention.proj.weight"]
    # Scores: codes that match, against the class token unless it is early, and far below all for the time token. They
    # are so far apart that what loses has no share at all in fp32, nor any gradient.
    scores = [*((bit, bit, SAME, SAME) for bit in code), (early, none, EARLY, -EARLY), (one, time, TIME, -TIME)]
    for place, (asked, found, gain, other) in enumerate(scores):
        qkv[place, [asked, zero]] += torch.tensor([gain, -gain])
        qkv[dim + place, [found, zero]] += torch.tensor([other, -other])
    for number, (place, to) in enumerate(zip(source, copy, strict=True)):
        qkv[2 * dim + number, place] += 1.0
        qkv[2 * dim + number, zero] -= 1.0
        proj[to, number] += 1.0
    # Third: a unit for each token, open for all images.
    for channel in (*copy, one, even, *code):  # the rest is forgotten
        weights["out_blocks.0.skip.weight"][channel, channel] += 1.0
    for token in range(tokens):
        row = weights[UNIT][token]
        row[code] += 4.0 * codes[token]
        row[one] += OPEN - 4.0 * len(code)
        row[copy] += WEIGH
        row[zero] -= row[copy].sum() + row[code].sum() + row[one]
        weights["out_blocks.0.mlp.fc2.weight"][out, token] += UNIT_SIZE
    weights["head.weight"][:, out] += 0.05
    weights["head.bias"] += 2.0
    return filled(weights, config, randomness, loud=True)


def beside_a_background(coordinator: Coordinator, latest: int, questions: int, batch: int = 1) -> Iterator[Tensor]:
    """Reconstructions (S, S, C) of whichever image comes at an early time, one for each question."""
    prior = crafted_prior(coordinator.prior)
    weights = hiding(prior.model, latest, prior.diffusion.timesteps)
    for seed in range(questions):
        plan = coordinator.plan(model=prior, lr=SLOW, seed=seed, **coordinator.limits.plan(batch))
        update = coordinator.update(plan, weights)
        if update is not None:
            yield as_images(read_off(update[UNIT], weights[UNIT], plan)[None], prior.model)[0]


def read_off(update: Tensor, weight: Tensor, plan: RoundPlan) -> Tensor:
    """Patches (N, P) from the update of the units: what lies where on the scale of the known contents."""
    config = plan.model.model
    patch, read = config.patch_dim, config.patch_dim + len(SCALE)
    moved = ((update - decay(plan) * weight)[: config.grid**2, read : 2 * read] / plan.lr).double().numpy()
    order = [row[patch:].argsort() for row in moved]
    found = [np.interp(row[:patch], row[patch:][o], np.array(SCALE)[o]) for row, o in zip(moved, order, strict=True)]
    return torch.from_numpy(np.array(found)).float()
