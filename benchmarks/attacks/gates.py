"""Weights that answer to chosen images only: hidden units that stay shut but for one time, class, position or content.

Each hidden unit of the first MLP sees one token's noisy patch through open doors, and its weights' gradient is that
input, whatever the loss: "imprinting" (Fowl et al. 2021, arXiv 2110.13057, "Robbing the Fed"). The first attention
block carries time and mean brightness to all tokens. Dividing by the gradient of a channel that is constant leaves
neither optimiser, loss, nor batch size in the result.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from maskdm.checkpoint import model_from
from maskdm.config import ModelConfig
from maskdm.diffusion import to_model_range
from maskdm.layers import patchify, timestep_embedding
from maskdm.protocol import RoundPlan
from maskdm.trainable import Trainable

from .gradients import cleaned, decay, plans, responses, steps_of, summed_gradient
from .site import Coordinator, Images, as_images, fresh_weights

UNIT = "in_blocks.0.mlp.fc1.weight"
LEVEL = 2.0  # of constant channels, in units of the images' range
SHARP, STEEP = 9.0, 2.7  # how far a shut door is shut: of a norm, which may be 10 at most, and of the units
GAIN = 0.05  # of the head
SLOW = 1e-7  # learning rate that leaves the gates as they are for many steps; weights of 0 resolve it


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
    """

    latest: int | None = None
    edges: Sequence[float] = ()
    pixels: bool = False

    def units(self, config: ModelConfig) -> list[tuple[int, float | None, int | None]]:
        """(token, edge, pixel) of each hidden unit."""
        edges, pixels = self.edges or (None,), range(config.patch_dim) if self.pixels else (None,)
        return [(token, edge, pixel) for edge in edges for token in range(config.grid**2) for pixel in pixels]

    def room(self, config: ModelConfig) -> int:
        """Most units; with edges, the first block only finds out what is to be shut."""
        return int(config.dim * config.mlp_ratio) * (len(blocks_of(config)) - bool(self.edges))


def blocks_of(config: ModelConfig) -> list[str]:
    """Names of a U-ViT's blocks, in the order in which a token passes them."""
    half = config.depth // 2
    return [*(f"in_blocks.{i}" for i in range(half)), "mid_block", *(f"out_blocks.{i}" for i in range(half))]


def imprinting(config: ModelConfig, gates: Gates, timesteps: int, size: float) -> dict[str, Tensor]:
    """Weights of a U-ViT whose hidden units open as `gates` say.

    Args:
        size: of what the units add to the output, and so of their gradients.
    """
    at, dim, tokens, hidden = Channels(config.patch_dim), config.dim, config.grid**2, int(config.dim * config.mlp_ratio)
    codes, code = at.code(tokens), _codes(tokens)
    strict = 2.0 if (gates.latest or 0) < 4 else 5.0  # an early time may not open the door of another token
    assert codes[-1] < dim, f"a network of dim {dim} has no room for patches of {config.patch_dim}"
    weights = {name: torch.zeros_like(tensor) for name, tensor in fresh_weights(config).items()}
    for name, tensor in weights.items():
        if "norm" in name and name.endswith("weight"):
            tensor.fill_(
                SHARP if "norm2" in name else 1.0
            )  # rather than in the units: what is small there is seen well
    if not gates.pixels:  # else the channels are the units' own, and nothing depends on the noise
        weights["patch_embedding.weight"][: config.patch_dim] = torch.eye(config.patch_dim)
    table = weights["position.table"]  # [time, patches]
    table[-tokens:, at.one] = table[-tokens:, at.shown] = LEVEL
    table[-tokens:, codes] = LEVEL * code
    table[-tokens - 1, at.time] = 4 * LEVEL
    for block in blocks_of(config)[config.depth // 2 + 1 :]:
        weights[f"{block}.skip.weight"][:, :dim] = torch.eye(dim)
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
    if gates.pixels:
        weights["head.weight"][:, : config.patch_dim] = GAIN * torch.eye(config.patch_dim)
    else:
        weights["head.weight"][:, at.out] = GAIN
    weights["head.bias"].fill_(
        0.5 if gates.pixels else 2.0
    )  # the latter: what differs between images is small beside it
    if gates.pixels:
        weights["norm.weight"].fill_(0.1)  # keeps the whole gradient below the norm at which sites clip
    return weights


def _codes(tokens: int) -> Tensor:
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
        qkv[2 * dim] = early_detector(config, gates.latest, timesteps)
        proj[at.early, 0] = 1.0
    if gates.edges:
        weights["in_blocks.0.mlp.fc1.weight"][0, [at.early, at.zero]] = torch.tensor([-1.0, 1.0])
        weights["in_blocks.0.mlp.fc2.weight"][at.shut, 0] = 1.0
        qkv[2 * dim + head, : config.patch_dim] = 1.0
        qkv[2 * dim + head, at.zero] = -float(config.patch_dim)
        proj[at.light, head] = 4.0 / config.patch_dim


@lru_cache(maxsize=16)
def early_detector(config: ModelConfig, latest: int, timesteps: int) -> Tensor:
    """A plane (D,) that tells times up to `latest`, on a time token after its norm: LEVEL or more, else −LEVEL or less.

    Raises:
        ValueError: none was found.
    """
    inputs = timestep_embedding(torch.arange(timesteps), config.dim)  # (T, D)
    inputs[:, Channels(config.patch_dim).time] += 4 * LEVEL  # as the position table marks it
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


def unit_gradient(update: dict[str, Tensor], weights: dict[str, Tensor], plan: RoundPlan, kind: str) -> Tensor:
    """Of the hidden units' weights (units, D) or biases (units,), whatever part of the network was trained."""
    found = []
    for block in blocks_of(plan.model.model):
        name = f"{block}.mlp.fc1.{kind}"
        if plan.train == "adapters":
            up, down = update[f"{name}.up"], update[f"{name}.down"]  # the latter as the site drew it
            gradient = summed_gradient(up, torch.zeros_like(up), plan).double()
            found.append((gradient @ torch.linalg.pinv(down.double()).T).float())
        else:
            found.append(summed_gradient(update[name], weights[name], plan))
    return torch.cat(found)


def seen_patches(gradient: Tensor, config: ModelConfig) -> Tensor:
    """Noisy patches (units, P), in the images' range, from the gradient of the hidden units' weights."""
    at = Channels(config.patch_dim)
    seen = gradient - gradient[:, at.blank, None]
    return LEVEL * seen[:, : config.patch_dim] / seen[:, at.shown, None]


def one_of_many(
    coordinator: Coordinator, batch: int, latest: int, train: Trainable = "all", questions: int = 1
) -> Iterator[Tensor]:
    """Reconstructions (S, S, C) of whichever image comes at an early time, among all of a plan."""
    prior = coordinator.prior
    config, process = prior.model, prior.diffusion
    gates = Gates(latest, pixels=train == "norm-bias")
    plan = coordinator.plan(lr=SLOW, train=train, adapter_rank=8 * config.dim, **coordinator.limits.plan(batch))
    weights = imprinting(config, gates, process.timesteps, size=small(plan))
    units = len(gates.units(config))
    for plan in plans(coordinator, plan, weights, latest, questions):
        update = coordinator.update(plan, weights)
        if update is None:
            continue
        if gates.pixels:
            gradient = unit_gradient(update, weights, plan, "bias")[:units].view(-1, config.patch_dim)
            yield from (as_images(guess[None], config)[0] for guess in targets(gradient, weights, plan, latest))
            continue
        gradient = unit_gradient(update, weights, plan, "weight")[:units]
        yield from cleaned(coordinator, seen_patches(gradient, config), plan, weights, latest)


def targets(gradient: Tensor, weights: dict[str, Tensor], plan: RoundPlan, latest: int) -> Iterator[Tensor]:
    """x_0 (N, P) from the gradients of the biases (N, P), which are linear in it: the attacker takes them on black and
    on single bright pixels, with weights of its own. One guess for each time and step at which the image may have come.
    """
    config = plan.model.model
    probes = torch.cat([torch.zeros(1, config.patch_dim), torch.eye(config.patch_dim)])  # of token 0
    network = model_from(weights, config)
    bias = dict(network.named_parameters())[f"{blocks_of(config)[0]}.mlp.fc1.bias"]
    sums = [sum(responses(plan)) / response for response in responses(plan)]
    for time in range(0, latest + 1, max(1, latest // 4)):
        rows = []
        for probe in probes:
            output = network(torch.zeros(1, config.grid**2, config.patch_dim), None, torch.full((1,), float(time)))
            loss = (output[:, 0] - probe).square().sum() / output.numel()
            rows.append(torch.autograd.grad(loss, bias)[0][: config.patch_dim].double())
        black, slopes = rows[0], torch.stack(rows[1:]) - rows[0]  # (P,), (P, P)
        for factor in sorted(set(sums)):
            own = gradient.double() * plan.batch_size * factor
            yield torch.linalg.solve(slopes.T, (own - black).T).T.float()


def small(plan: RoundPlan) -> float:
    """What brings units' gradients below the optimiser's epsilon; far below, where steps add up."""
    return plan.batch_size * (2e-9 if steps_of(plan) == 1 else 4e-11)


def by_brightness(
    coordinator: Coordinator, batch: int, latest: int, public: Images, train: Trainable = "all"
) -> Iterator[Tensor]:
    """Reconstructions of the images of a batch, each alone between two edges of brightness, where these suffice."""
    prior = coordinator.prior
    config, process = prior.model, prior.diffusion
    room = Gates(edges=[0.0]).room(config) // config.grid**2
    light = torch.from_numpy(public).float().div(127.5).sub(1).flatten(1).mean(1)
    centre, spread = float(light.mean()), float(light.std())
    quantiles = torch.linspace(0.5 / room, 1 - 0.5 / room, room)
    edges = (centre + 1.2 * spread * torch.special.ndtri(quantiles)).tolist()
    # What attention brings is the mean of what the norm made of each token: the attacker sees on public images how it
    # follows from brightness.
    plan = coordinator.plan(lr=SLOW, train=train, adapter_rank=8 * config.dim, **coordinator.limits.plan(batch))
    gates = Gates(latest, edges=carried_light(config, public, edges, latest, process.timesteps))
    weights = imprinting(config, gates, process.timesteps, size=small(plan))
    update = coordinator.update(plan, weights)
    if update is None:
        return
    gradient = unit_gradient(update, weights, plan, "weight")[-gates.room(config) :][: len(gates.units(config))]
    above = gradient.view(len(edges), config.grid**2, -1)  # (edges, N, D)
    between = torch.cat([above[:-1] - above[1:], above[-1:]])
    for part in between:
        patches = seen_patches(part, config)
        if patches.isfinite().all():
            yield as_images(patches[None], config)[0]


def carried_light(config: ModelConfig, public: Images, edges: list[float], latest: int, timesteps: int) -> list[float]:
    """What the channel `light` holds for images as bright as `edges`: a straight line through public images."""
    weights = imprinting(config, Gates(latest, edges=[0.0]), timesteps, 0.0)
    network, at, held = model_from(weights, config), Channels(config.patch_dim), []
    network.get_submodule("in_blocks.0.norm2").register_forward_hook(lambda _, inputs, output: held.append(inputs[0]))
    images = torch.from_numpy(public).permute(0, 3, 1, 2)
    patches = to_model_range(patchify(images, config.patch_size))
    with torch.no_grad():
        network(patches, None, torch.zeros(len(public)))
    carried, light = held[0][:, -1, at.light].double(), patches.double().mean(dim=(1, 2))
    slope = ((carried - carried.mean()) * (light - light.mean())).sum() / (light - light.mean()).square().sum()
    return [float(carried.mean() + slope * (edge - light.mean())) for edge in edges]
