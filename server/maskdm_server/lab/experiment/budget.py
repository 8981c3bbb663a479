"""What each arm may spend: the same number of FLOPs in training, pre-training counted, unless it is a short one."""

from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field, model_validator

from maskdm.config import DiffusionConfig, Frozen, MaskConfig, ModelConfig, Precision
from maskdm.networks.flops import training_flops
from maskdm.networks.masking import visible_count

from .arms import UNMASKED, Arm

# Where a curve is measured, as shares of the local budget; arms without a prior go on past it.
POINTS = (1 / 8, 1 / 4, 1 / 2, 1.0)
Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, le=1)]


class ExperimentConfig(Frozen):
    """An experiment, but for its images and arms."""

    model: ModelConfig
    diffusion: DiffusionConfig
    mask: MaskConfig  # of the masked prior
    prior_images: Positive = 200_000  # that the masked prior sees
    local_images: Positive = 50_000  # that are seen after it, counting repetitions, at all sites together
    batch_size: Annotated[int, Field(ge=2)] = 64
    prior_lr: Rate = 1e-3
    rates: Annotated[tuple[Rate, ...], Field(min_length=1)] = (5e-4, 1e-3, 2e-3)  # tried for what comes after a prior
    warmup_images: Annotated[int, Field(ge=0)] = 1000
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.1
    clients: Annotated[int, Field(ge=2, le=1000)] = 4
    rounds: Positive = 20  # in which the local images are seen
    site_batch_size: Positive | None = None  # images a step at a site; None: `batch_size` shared out
    keep_moments: bool = True  # at the sites, from round to round: a round has too few steps to gather them anew
    server_ema: Annotated[float, Field(ge=0, lt=1)] = 0.6  # over rounds, as the pooled arms average over steps
    alpha: Annotated[float, Field(gt=0)] = 0.1  # of the skewed sites
    samples: Annotated[int, Field(ge=16)] = 1000
    sampling_steps: Annotated[int, Field(ge=1, le=10_000)] = 20
    precision: Precision = "auto"
    seeds: Annotated[int, Field(ge=1, le=100)] = 3

    @model_validator(mode="after")
    def _shares_out(self) -> Self:
        if self.site_batch_size is None and self.batch_size % self.clients:
            raise ValueError(f"--batch-size {self.batch_size} cannot be shared out to --clients {self.clients}")
        if self.round_images() < self.site_batch():
            raise ValueError(f"--rounds {self.rounds}: less than one step of a site in each: lower it")
        return self

    def site_batch(self) -> int:
        """Images a step at a site; where nothing else is wanted, a step of all of them is one of the pooled arms."""
        return self.site_batch_size or self.batch_size // self.clients

    def round_images(self) -> int:
        """Images that a site sees in a round, in whole steps."""
        steps = self.local_images // (self.clients * self.rounds * self.site_batch())
        return steps * self.site_batch()


@dataclass(frozen=True)
class Spending:
    """What one arm spends."""

    prior: tuple[int, ...]  # images of each part of its prior
    prior_batches: tuple[int, ...]
    prior_flops: int
    local: int  # images after it
    flops_per_image: int  # of those
    points: tuple[int, ...]  # of `local`, at which it is measured

    def flops(self, local: int) -> int:
        """Spent after so many local images."""
        return self.prior_flops + local * self.flops_per_image


def spending(config: ExperimentConfig, arm: Arm) -> Spending:
    """The arm's share of the budget: that of the masked prior and what follows it.

    A step of pre-training sees about as many tokens as one on whole images: masking makes the batch larger.
    """
    model, batch = config.model, config.batch_size
    whole = training_flops(model, UNMASKED)
    budget = config.prior_images * training_flops(model, config.mask)
    steps = config.local_images // batch
    points = [max(1, round(steps * share)) * batch for share in POINTS]
    if arm.prior is None:
        more = 0 if arm.short else budget // whole // batch  # steps
        points += [points[-1] + more // 2 * batch, points[-1] + more * batch]
        return Spending((), (), 0, points[-1], whole, tuple(dict.fromkeys(points)))
    images, batches, spent = [], [], 0
    for mask in arm.prior:
        cost = training_flops(model, mask)
        wide = max(1, round(model.grid**2 / visible_count(mask, model.grid))) * batch
        seen = max(1, budget // len(arm.prior) // cost // wide) * wide
        images.append(seen)
        batches.append(wide)
        spent += seen * cost
    return Spending(tuple(images), tuple(batches), spent, points[-1], whole, tuple(dict.fromkeys(points)))


def rounds_of(config: ExperimentConfig, spent: Spending) -> tuple[int, tuple[int, ...]]:
    """Rounds of a federated arm, and those after which it is measured."""
    a_round = config.round_images() * config.clients
    marks = tuple(dict.fromkeys(max(1, round(point / a_round)) for point in spent.points))
    return marks[-1], marks
