"""What losses alone say: each is a linear question to images.

A network that answers with an image of the attacker's choice, and only where the door is open, has the loss
|C − x|² + the same for all other images; the difference of two such losses is linear in x.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from maskdm.config import ModelConfig
from maskdm.networks.layers import patchify
from maskdm.training.checkpoint import model_from

from .gates import GAIN, Gates, blocks_of, imprinting
from .site import Coordinator, as_images

BRIGHT = 8.0  # of what a network answers where it is asked for single pixels


def answering(config: ModelConfig, gates: Gates, timesteps: int, pattern: Tensor) -> dict[str, Tensor]:
    """Weights that answer about `pattern` (N, P) where the doors are open."""
    weights = imprinting(config, gates, timesteps, 0.0)
    hidden, network, opened = int(config.dim * config.mlp_ratio), model_from(weights, config), []
    for name in blocks_of(config):
        unit = network.get_submodule(f"{name}.mlp.fc1")
        unit.register_forward_hook(lambda _, inputs, output: opened.append(output[0].detach()))
    network(torch.zeros(1, config.grid**2, config.patch_dim), None, torch.zeros(1))
    for number, (token, _, pixel) in enumerate(gates.units(config)):
        block, place = number // hidden, number % hidden
        second = weights[f"{blocks_of(config)[block]}.mlp.fc2.weight"]
        second[pixel, place] = pattern[token, pixel] / opened[block][1 + token, place]
    weights["norm.weight"].fill_(1.0)
    weights["head.weight"].mul_(1 / GAIN)
    weights["head.bias"].zero_()
    return weights


def held_out_image(
    coordinator: Coordinator, patterns: Sequence[Tensor], latest: int, amplitude: float = BRIGHT
) -> Iterator[Tensor]:
    """Reconstructions (S, S, C) of one image that is held out, as sums of patterns (N, P), by a loss for each.

    The times of a held-out loss are one in each stratum, so that the earliest belong to one image alone.
    """
    config, timesteps = coordinator.prior.model, coordinator.prior.diffusion.timesteps
    gates = Gates(latest, pixels=True)
    asked = [torch.zeros_like(patterns[0]), *patterns, -patterns[0]]  # the last tells how many draws there are
    sent = [answering(config, gates, timesteps, amplitude * pattern) for pattern in asked]
    losses = [coordinator.loss(weights) for weights in sent]
    for time in range(latest + 1):
        yield as_images(_solved([answer(weights, config, time) for weights in sent], losses, patterns)[None], config)[0]


def answer(weights: dict[str, Tensor], config: ModelConfig, time: int) -> Tensor:
    """What a network that does not look at its image answers at a time, (N, P)."""
    inputs = torch.zeros(1, config.grid**2, config.patch_dim), None, torch.full((1,), float(time))
    with torch.no_grad():
        found: Tensor = model_from(weights, config)(*inputs)[0]
    return found


def _solved(answers: list[Tensor], losses: list[float], patterns: Sequence[Tensor]) -> Tensor:
    """x = Σ c_i pattern_i from |C|² − |C_0|² = 2 (C − C_0)·x + λ (loss − loss_0), with λ and c unknown."""
    flat = torch.stack(answers).flatten(1).double()  # (Q, N·P)
    basis = torch.stack(list(patterns)).flatten(1).double()  # (K, N·P)
    differences = flat[1:] - flat[0]
    loss = torch.tensor(losses, dtype=torch.float64)
    system = torch.cat([2 * differences @ basis.T, (loss[1:] - loss[0])[:, None]], dim=1)
    known = flat[1:].square().sum(1) - flat[0].square().sum()
    scale = system.abs().amax(dim=0).clamp(min=1e-300)
    solution: Tensor = (
        torch.linalg.lstsq((system / scale).nan_to_num(), known[:, None], driver="gelsd").solution[:, 0] / scale
    )
    return (solution[:-1] @ basis).float().view(patterns[0].shape)


def single_pixels(config: ModelConfig) -> list[Tensor]:
    """A pattern for each number of an image, (N, P) each."""
    count = config.grid**2 * config.patch_dim
    return list(torch.eye(count).view(count, config.grid**2, config.patch_dim))


def coarse(config: ModelConfig, number: int) -> list[Tensor]:
    """The `number` smoothest grey cosine patterns, (N, P) each, for few questions."""
    size, channels, patch = config.image_size, config.channels, config.patch_size
    places = (torch.arange(size) + 0.5) * math.pi / size
    order = sorted(((i, j) for i in range(size) for j in range(size)), key=lambda ij: (ij[0] ** 2 + ij[1] ** 2, ij))
    waves = [(i * places).cos()[:, None] * (j * places).cos() for i, j in order[:number]]
    return [patchify(wave.expand(1, channels, size, size), patch)[0] for wave in waves]
