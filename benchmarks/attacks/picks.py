"""Attacks that take single images out of the update of a whole plan, through gates by time or by brightness."""

from collections.abc import Iterator

import torch
from torch import Tensor

from maskdm.config import ModelConfig, Trainable
from maskdm.diffusion.targets import to_model_range
from maskdm.federated.plan import RoundPlan
from maskdm.networks.layers import patchify
from maskdm.training.checkpoint import model_from

from .gates import LEVEL, Channels, Gates, blocks_of, filled, imprinting
from .gradients import cleaned, plans, responses, steps_of, summed_gradient
from .site import Coordinator, Images, as_images

SLOW = 1e-7  # learning rate that leaves the gates as they are for many steps; weights of next to 0 resolve it


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
    coordinator: Coordinator,
    batch: int,
    latest: int,
    train: Trainable = "all",
    questions: int = 1,
    wide: bool = False,
) -> Iterator[Tensor]:
    """Reconstructions (S, S, C) of whichever image comes at an early time, among all of a plan.

    Args:
        wide: in a network that is twice as wide, whose other half keeps a site from counting weights next to zero.
    """
    prior = coordinator.prior
    if wide:
        twice = {"dim": 2 * prior.model.dim, "heads": 2 * prior.model.heads}
        prior = prior.model_copy(update={"model": prior.model.model_copy(update=twice)})
    config, process = prior.model, prior.diffusion
    gates = Gates(latest, pixels=train == "norm-bias")
    usual = coordinator.plan(
        model=prior, lr=SLOW, train=train, adapter_rank=8 * config.dim, **coordinator.limits.plan(batch)
    )
    weights = imprinting(config, gates, process.timesteps, size=small(usual))
    if wide:
        weights = filled(weights, config, torch.Generator().manual_seed(0), loud=False)
    units = len(gates.units(config))
    for plan in plans(coordinator, usual, weights, latest, questions):
        update = coordinator.update(plan, weights)
        if update is None:
            continue
        if gates.pixels:
            gradient = unit_gradient(update, weights, plan, "bias")[:units].view(-1, config.patch_dim)
            yield from (as_images(guess[None], config)[0] for guess in targets(gradient, weights, plan, latest))
            continue
        gradient = unit_gradient(update, weights, plan, "weight")[:units]
        yield from cleaned(coordinator, seen_patches(gradient, config), plan, weights, latest)


def behind_vectors(coordinator: Coordinator, latest: int, questions: int) -> Iterator[Tensor]:
    """As `one_of_many` of biases and norms, with units beside the gates that are open for all images: a site that looks
    at a whole vector of gradients sees theirs, and what the gates let through is next to nothing beside them.
    """
    config = coordinator.prior.model.model_copy(update={"mlp_ratio": coordinator.prior.model.mlp_ratio + 0.25})
    gates = Gates(latest, pixels=True, spare=4)
    metadata = coordinator.prior.model_copy(update={"model": config})
    usual = coordinator.plan(model=metadata, lr=SLOW, train="norm-bias", **coordinator.limits.plan())
    weights = imprinting(config, gates, metadata.diffusion.timesteps, size=small(usual))
    names = [f"{block}.mlp.fc1.bias" for block in blocks_of(config)]
    for plan in plans(coordinator, usual, weights, latest, questions):
        update = coordinator.update(plan, weights)
        if update is None:
            continue
        parts = [summed_gradient(update[name], weights[name], plan)[: gates.used(config)] for name in names]
        gradient = torch.cat(parts)[: len(gates.units(config))].view(-1, config.patch_dim)
        yield from (as_images(guess[None], config)[0] for guess in targets(gradient, weights, plan, latest))


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
