"""Weights that answer to chosen images only: hidden units that stay shut but for one time, class, position or content.

Each hidden unit of the first MLP sees one token's noisy patch through open doors, and its weights' gradient is that
input, whatever the loss: "imprinting" (Fowl et al. 2021, arXiv 2110.13057, "Robbing the Fed"). The first attention
block carries time and mean brightness to all tokens. Dividing by the gradient of a channel that is constant leaves
neither optimiser, loss, nor batch size in the result.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from maskdm.config import ModelConfig
from maskdm.networks.layers import timestep_embedding

from .site import fresh_weights

LEVEL = 2.0  # of constant channels, in units of the images' range
SHARP, STEEP = 9.0, 2.7  # how far a shut door is shut: of a norm, which may be 10 at most, and of the units
GAIN = 0.05  # of the head
FAINT = 1e-12  # beside all else
FILLER = 0.105  # beside the root mean square of a weight; below a tenth a site counts it as zero


@dataclass(frozen=True)
class Channels:
    """Which numbers of a token carry what; the first P are its noisy patch."""

    patch: int  # P

    def __getattr__(self, name: str) -> int:
        return self.patch + NAMES.index(name)

    def code(self, tokens: int) -> range:
        """Where a token's number stands."""
        first = self.patch + len(NAMES)
        return range(first, first + max(1, math.ceil(math.log2(tokens))))


# zero, blank, empty: nothing. one, shown: constants. No unit reads `blank`, `empty` and `shown`: their weights are 0,
# which fp32 resolves finely. time: marks the token of the time. early: whether the time is an early one. shut: how far
# it is from that, 0 if it is. light: mean brightness. out: what the head reads.
NAMES = ("zero", "blank", "empty", "one", "shown", "time", "early", "shut", "light", "out")


@dataclass(frozen=True)
class Gates:
    """Through what units open, one for each token and edge, or for each token and pixel.

    Args:
        latest: time of noise up to which doors are open; None leaves them open for all.
        edges: of brightness, above which units open.
        pixels: a unit for each number of a patch, which only that number's error reaches.
        spare: units at the end of each block that are open for all images, and make up for the others' vectors.
    """

    latest: int | None = None
    edges: Sequence[float] = ()
    pixels: bool = False
    spare: int = 0

    def units(self, config: ModelConfig) -> list[tuple[int, float | None, int | None]]:
        """(token, edge, pixel) of each hidden unit."""
        edges, pixels = self.edges or (None,), range(config.patch_dim) if self.pixels else (None,)
        return [(token, edge, pixel) for edge in edges for token in range(config.grid**2) for pixel in pixels]

    def used(self, config: ModelConfig) -> int:
        """Hidden units of each block that may be gates."""
        return int(config.dim * config.mlp_ratio) - self.spare

    def room(self, config: ModelConfig) -> int:
        """Most units; with edges, the first block only finds out what is to be shut."""
        return self.used(config) * (len(blocks_of(config)) - bool(self.edges))


def blocks_of(config: ModelConfig) -> list[str]:
    """Names of a U-ViT's blocks, in the order in which a token passes them."""
    half = config.depth // 2
    return [*(f"in_blocks.{i}" for i in range(half)), "mid_block", *(f"out_blocks.{i}" for i in range(half))]


def imprinting(config: ModelConfig, gates: Gates, timesteps: int, size: float) -> dict[str, Tensor]:
    """Weights of a U-ViT whose hidden units open as `gates` say.

    Args:
        size: of what the units add to the output, and so of their gradients.
    """
    at, dim, tokens, hidden = Channels(config.patch_dim), config.dim, config.grid**2, gates.used(config)
    codes, code = at.code(tokens), codes_of(tokens)
    strict = 2.0 if (gates.latest or 0) < 4 else 5.0  # an early time may not open the door of another token
    assert codes[-1] < dim, f"a network of dim {dim} has no room for patches of {config.patch_dim}"
    weights = nothing(config)
    for name, tensor in weights.items():
        if "norm" in name and name.endswith("weight"):
            tensor.fill_(
                SHARP if "norm2" in name else 1.0
            )  # rather than in the units: what is small there is seen well
    if not gates.pixels:  # else the channels are the units' own, and nothing depends on the noise
        weights["patch_embedding.weight"][: config.patch_dim] += torch.eye(config.patch_dim)
    table = weights["position.table"]  # [time, patches]
    table[-tokens:, at.one] = table[-tokens:, at.shown] = LEVEL
    table[-tokens:, codes] = LEVEL * code
    table[-tokens - 1, at.time] = 4 * LEVEL
    for block in blocks_of(config)[config.depth // 2 + 1 :]:
        weights[f"{block}.skip.weight"][:, :dim] += torch.eye(dim)
    _carry(weights, config, gates, timesteps)
    units = gates.units(config)
    assert len(units) <= gates.room(config), f"there is no room for {len(units)} units"
    for number, (token, edge, pixel) in enumerate(units, start=hidden if gates.edges else 0):
        block, place = blocks_of(config)[number // hidden], number % hidden
        row = weights[f"{block}.mlp.fc1.weight"][place]
        row[codes] = strict * code[token]  # 0 in all where the token is the one, far below elsewhere
        row[at.one] = -strict * len(codes)
        row[at.time] = -4.0
        if edge is not None:
            row[at.light], row[at.shut] = 16.0, -1.0
            row[at.one] -= 16.0 * edge / LEVEL
        elif gates.latest is not None:
            row[at.early] = 1.0
        else:
            row[at.one] += 0.5
        row *= STEEP / (1.5 if gates.edges else 1)  # whose many units share a norm
        row[at.zero] = -row.sum()  # what is common to all channels is taken off by the norm
        weights[f"{block}.mlp.fc2.weight"][at.out if pixel is None else pixel, place] = size
    for block in blocks_of(config):
        for place in range(hidden, hidden + gates.spare):
            row = weights[f"{block}.mlp.fc1.weight"][place]
            row[at.one], row[at.early] = 0.2, 0.01
            row[at.zero] = -row.sum()
            weights[f"{block}.mlp.fc2.weight"][: config.patch_dim, place] = 0.01
    if gates.pixels:
        weights["head.weight"][:, : config.patch_dim] += GAIN * torch.eye(config.patch_dim)
    else:
        weights["head.weight"][:, at.out] = GAIN
    weights["head.bias"].fill_(
        0.5 if gates.pixels else 2.0
    )  # the latter: what differs between images is small beside it
    if gates.pixels:
        weights["norm.weight"].fill_(0.1)  # keeps the whole gradient below the norm at which sites clip
    return weights


def nothing(config: ModelConfig) -> dict[str, Tensor]:
    """Weights of a network that does nothing; none of them is exactly zero, which a site might count."""
    randomness = torch.Generator().manual_seed(0)
    return {n: FAINT * torch.randn(t.shape, generator=randomness) for n, t in fresh_weights(config).items()}


def codes_of(tokens: int) -> Tensor:
    """±1 by the bits of a token's number, (N, bits)."""
    bits = max(1, math.ceil(math.log2(tokens)))
    return 2.0 * (torch.arange(tokens)[:, None] >> torch.arange(bits) & 1) - 1


def _carry(weights: dict[str, Tensor], config: ModelConfig, gates: Gates, timesteps: int) -> None:
    """Attention that brings to each token whether it is early (head 0), and the image's mean brightness (head 1)."""
    at, dim, head = Channels(config.patch_dim), config.dim, config.dim // config.heads
    qkv, proj = weights["in_blocks.0.attention.qkv.weight"], weights["in_blocks.0.attention.proj.weight"]
    if gates.latest is not None:
        qkv[0, [at.one, at.zero]] = torch.tensor([6.0, -6.0])
        qkv[dim, [at.time, at.zero]] = torch.tensor([6.0, -6.0])
        qkv[2 * dim] = early_detector(config, gates.latest, timesteps, at.time)
        proj[at.early, 0] = 1.0
    if gates.edges:
        weights["in_blocks.0.mlp.fc1.weight"][0, [at.early, at.zero]] = torch.tensor([-1.0, 1.0])
        weights["in_blocks.0.mlp.fc2.weight"][at.shut, 0] = 1.0
        qkv[2 * dim + head, : config.patch_dim] = 1.0
        qkv[2 * dim + head, at.zero] = -float(config.patch_dim)
        proj[at.light, head] = 4.0 / config.patch_dim


@lru_cache(maxsize=16)
def early_detector(config: ModelConfig, latest: int, timesteps: int, mark: int) -> Tensor:
    """A plane (D,) that tells times up to `latest`, on a time token after its norm: LEVEL or more, else −LEVEL or less.

    Args:
        mark: channel by which the position table marks the time token.

    Raises:
        ValueError: none was found.
    """
    inputs = timestep_embedding(torch.arange(timesteps), config.dim)  # (T, D)
    inputs[:, mark] += 4 * LEVEL
    inputs = torch.nn.functional.layer_norm(inputs, (config.dim,)).double()
    sides = torch.where(torch.arange(timesteps) <= latest, 1.0, -1.0).double()  # (T,)
    left, values, right = torch.linalg.svd(inputs, full_matrices=False)
    kept = values > 1e-4 * values[0]
    directions, back = left[:, kept] * math.sqrt(timesteps), right[kept].T * math.sqrt(timesteps) / values[kept]
    found = torch.zeros(directions.shape[1], dtype=torch.float64, requires_grad=True)
    weight = torch.where(sides > 0, 1 / (latest + 1), 0.02)
    search = torch.optim.LBFGS([found], max_iter=300, line_search_fn="strong_wolfe", history_size=50)
    search.param_groups[0].update(tolerance_grad=1e-12, tolerance_change=1e-14)

    def hinge() -> Tensor:
        search.zero_grad()
        loss: Tensor = (weight * (1 - sides * (directions @ found)).clamp(min=0).square()).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    search.step(hinge)  # type: ignore[no-untyped-call]
    plane: Tensor = LEVEL * (back @ found.detach())
    if (sides * (inputs @ plane)).min() < 0.8 * LEVEL:
        raise ValueError(f"no plane separates times up to {latest} from the others")
    return plane.float()


def filled(
    weights: dict[str, Tensor], config: ModelConfig, randomness: torch.Generator, loud: bool
) -> dict[str, Tensor]:
    """The same, and values ±a little in all that only reaches the upper half of the channels, or comes from there.

    Args:
        loud: patches' positions are as loud there as in the lower half, so that norms see little of the latter.
    """
    dim, head, used = config.dim, config.dim // config.heads, config.dim // 2 - 2  # more than half is to be filled
    table = weights["position.table"]
    for row in (0, *range(2, len(table))) if loud else ():  # not the time's
        order = torch.randperm(dim - used, generator=randomness)
        table[row, used:] += torch.where(order % 2 == 0, 1.0, -1.0) * table[row, :used].square().mean().sqrt()
    for name, tensor in weights.items():
        size = tensor.square().mean().sqrt()
        if (
            tensor.dim() == 1
            or (loud and name == "position.table")
            or (tensor.abs() < 0.1 * size).float().mean() < 0.45
        ):
            continue
        idle = torch.zeros_like(tensor, dtype=torch.bool)
        if tensor is table:
            idle[-(config.grid**2) :, used:] = True
        elif name == "head.weight":
            idle[:, used:] = True
        elif "qkv" in name:
            idle.view(3, dim, dim)[:, head:] = True  # all heads but the first
        elif "fc1" in name:
            idle[config.grid**2 :] = True
        else:
            idle[used:] = True
        signs = torch.where(torch.rand(tensor.shape, generator=randomness) < 0.5, 1.0, -1.0)
        tensor[idle] = (FILLER * size * signs)[idle]
    return weights
