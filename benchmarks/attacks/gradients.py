"""From an update back to gradients, and from gradients to the image that they were taken on.

AdamW divides each gradient by its own size, so that one step tells little but signs, unless the gradient is below
its epsilon: there a step is the gradient times lr / ε. Whoever chooses the weights gets there.
"""

from collections.abc import Iterator, Mapping
from itertools import count, islice

import torch
from torch import Tensor

from maskdm.config import TrainingConfig
from maskdm.diffusion.forward_process import forward_process
from maskdm.federated.plan import RoundPlan
from maskdm.seeding import generator
from maskdm.training.loop import ema_decay

from .site import Coordinator, as_images

EPSILON = 1e-8  # of AdamW
BETA = 0.9  # of its first moment, at a site
QUIET = 1e-7  # of a head, beside an honest one


def quiet(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Honest weights whose head is next to nothing, and so are the gradients of all that comes before it."""
    return {name: tensor * (QUIET if name == "head.weight" else 1) for name, tensor in weights.items()}


def summed_gradient(update: Tensor, weight: Tensor, plan: RoundPlan) -> Tensor:
    """Weighted mean of the steps' gradients as it goes up; exact for one step, linear for small gradients."""
    moves = (update - weight * decay(plan)) / (-plan.lr * sum(responses(plan)))  # of g / (|g| + ε)
    return EPSILON * moves / (1 - moves.abs()).clamp(min=1e-3) if steps_of(plan) == 1 else EPSILON * moves


def decay(plan: RoundPlan) -> float:
    """What goes up of a weight of 1 that has no gradient: what weight decay takes, averaged over the last steps."""
    config, value, average = TrainingConfig(), 1.0, 1.0
    for step in range(1, steps_of(plan) + 1):
        value *= 1 - plan.lr * config.weight_decay
        average += (1 - ema_decay(config, step)) * (value - average)
    return average - 1


def responses(plan: RoundPlan) -> list[float]:
    """What a gradient of ε in one step alone moves what goes up, in units of −lr, for each step; ε ≫ gradient."""
    config, found = TrainingConfig(), []
    for hit in range(1, steps_of(plan) + 1):
        moment, moved, average = 0.0, 0.0, 0.0
        for step in range(1, steps_of(plan) + 1):
            moment = BETA * moment + (1 - BETA) * (step == hit)
            moved += moment / (1 - BETA**step)
            average += (1 - ema_decay(config, step)) * (moved - average)
        found.append(average)
    return found


def steps_of(plan: RoundPlan) -> int:
    """Steps of a training plan."""
    return -(-plan.local_images // plan.batch_size)


def draws(plan: RoundPlan, seed: int, shape: tuple[int, ...], seen: int = 0) -> tuple[Tensor, Tensor]:
    """Times (B,) and noise (B, …) of a step, by the seed of the site's work."""
    randomness = generator("step", seed, seen, 0)
    if plan.model.class_names:
        torch.rand(plan.batch_size, generator=randomness)  # which images see no class
    process = forward_process(plan.model.diffusion)
    times = process.times(torch.rand(plan.batch_size, generator=randomness))
    return times, torch.randn((plan.batch_size, *shape), generator=randomness)


def clean(noisy: Tensor, plan: RoundPlan, time: Tensor, noise: Tensor) -> Tensor:
    """x_0 from x_t (N, P), with noise that is known, or zero."""
    alpha, sigma = (part.float() for part in forward_process(plan.model.diffusion).level(time[None]))
    return (noisy - sigma * noise) / alpha


def early_ones(plan: RoundPlan, seed: int, latest: int) -> list[tuple[int, int, Tensor]]:
    """(images seen before its step, number in its batch, time) of each image that comes at `latest` or before."""
    found = []
    for seen in range(0, plan.local_images, plan.batch_size):
        times, _ = draws(plan, seed, (), seen)
        found += [(seen, int(number), times[number]) for number in (times <= latest).nonzero()[:, 0]]
    return found


def noisy_patches(update: dict[str, Tensor], weights: dict[str, Tensor], plan: RoundPlan) -> Tensor:
    """x_t (N, P) of the one image behind an update, from the gradients of position table and patch embedding.

    The table's gradient is each token's own, δ_n (D,); that of the embedding is Σ_n δ_n x_nᵀ, (D, P): linear equations.
    """
    table, embedding = "position.table", "patch_embedding.weight"
    tokens = plan.model.model.grid**2
    own = summed_gradient(update[table], weights[table], plan)[-tokens:].double()  # (N, D)
    joint = summed_gradient(update[embedding], weights[embedding], plan).double()  # (D, P)
    solution: Tensor = torch.linalg.lstsq(own.T, joint, driver="gelsd", rcond=1e-6).solution
    return solution.float()


def plans(
    coordinator: Coordinator, plan: RoundPlan, weights: Mapping[str, Tensor], latest: int, questions: int
) -> Iterator[RoundPlan]:
    """Like `plan`: those that bring exactly one early image, or any where nobody knows which do."""
    found = (plan.model_copy(update={"seed": seed}) for seed in count(plan.seed))
    if coordinator.knows_draws:
        found = (one for one in found if len(early_ones(one, coordinator.local_seed(one, weights), latest)) == 1)
    return islice(found, questions)


def cleaned(
    coordinator: Coordinator, noisy: Tensor, plan: RoundPlan, weights: Mapping[str, Tensor], latest: int
) -> Iterator[Tensor]:
    """Images (S, S, C): without the noise, where the site's draws are known, and as it is, which is all where not."""
    if coordinator.knows_draws:
        seed = coordinator.local_seed(plan, weights)
        for seen, number, time in early_ones(plan, seed, latest):
            _, noise = draws(plan, seed, tuple(noisy.shape), seen)
            yield as_images(clean(noisy, plan, time, noise[number])[None], plan.model.model)[0]
    yield as_images(noisy[None], plan.model.model)[0]


def single_image(coordinator: Coordinator, weights: dict[str, Tensor], questions: int = 1) -> Iterator[Tensor]:
    """Reconstructions (S, S, C) of the image that a step was made of, by weights that were made `quiet`."""
    usual, latest = coordinator.plan(), coordinator.prior.diffusion.timesteps // 50
    for plan in plans(coordinator, usual, weights, latest, questions):
        update = coordinator.update(plan, weights)
        if update:
            yield from cleaned(coordinator, noisy_patches(update, weights, plan), plan, weights, latest)
