"""Server optimisers: the aggregated difference Δ of a round as one step, its negative taken for a gradient.

Reddi et al. 2021 (arXiv 2003.00295, algorithm 2) and, for FedAvgM, Hsu et al. 2019 (arXiv 1909.06335).
"""

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from maskdm.config import Frozen

ServerOptimizer = Literal["fedavg", "fedavgm", "fedadam", "fedyogi"]

# fp32, shaped like their weights: "first.<name>" and "second.<name>". Empty at the start, and always for FedAvg.
Moments = dict[str, Tensor]

Decay = Annotated[float, Field(ge=0, lt=1)]


class ServerStep(Frozen):
    """How Δ moves the weights."""

    optimizer: ServerOptimizer = "fedavg"
    lr: Annotated[float, Field(gt=0)] = 1.0
    betas: tuple[Decay, Decay] = (0.9, 0.99)  # the first also of FedAvgM
    epsilon: Annotated[float, Field(gt=0)] = 1e-3  # τ of FedAdam and FedYogi


def step(weights: dict[str, Tensor], delta: Iterable[tuple[str, Tensor]], moments: Moments, config: ServerStep) -> None:
    """Move the weights, one after another as their differences come; `weights` and `moments` change in place.

    With η the rate, w ← w + η·Δ (FedAvg), w + η·m with m ← β₁·m + Δ (FedAvgM), or w + η·m / (√v + τ) with
    m ← β₁·m + (1−β₁)·Δ and v ← β₂·v + (1−β₂)·Δ² (FedAdam) or v − (1−β₂)·Δ²·sign(v − Δ²) (FedYogi). As in the paper
    there is no bias correction: v starts at τ².

    Args:
        weights: fp32. Those that `delta` does not name stay as they are, and so do their moments.
        delta: name and difference, of the weight's shape and finite. If it raises, the step is half done: take
            weights and moments from before it.
        moments: what earlier steps left; gains entries for weights that move for the first time.
    """
    with torch.no_grad():
        for name, difference in delta:
            _move(name, weights[name], difference.to(weights[name]), moments, config)


def _move(name: str, weight: Tensor, difference: Tensor, moments: Moments, config: ServerStep) -> None:
    assert difference.shape == weight.shape
    decay, second_decay = config.betas
    match config.optimizer:
        case "fedavg":
            weight.add_(difference, alpha=config.lr)
        case "fedavgm":
            first = _moment(f"first.{name}", weight, moments, 0.0)
            first.mul_(decay).add_(difference)
            weight.add_(first, alpha=config.lr)
        case "fedadam" | "fedyogi":
            first = _moment(f"first.{name}", weight, moments, 0.0)
            first.mul_(decay).add_(difference, alpha=1 - decay)
            second = _moment(f"second.{name}", weight, moments, config.epsilon**2)
            if config.optimizer == "fedadam":
                second.mul_(second_decay).addcmul_(difference, difference, value=1 - second_decay)
            else:
                square = difference.square()
                second.addcmul_(square, torch.sign(second - square), value=second_decay - 1)
            weight.addcdiv_(first, second.sqrt().add_(config.epsilon), value=config.lr)


def _moment(key: str, weight: Tensor, moments: Moments, start: float) -> Tensor:
    if key not in moments:
        moments[key] = torch.full_like(weight, start)
    return moments[key]
