"""Grids of samples that a run leaves for people to look at."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import DiffusionConfig, ModelConfig, Precision
from ..diffusion.sampling import sample
from ..networks.precision import pick_device, pick_precision
from ..run.pictures import grid_picture, save_png
from .checkpoint import Checkpoint, model_from


class Abandoned(Exception):
    """Nobody waits for the picture any more."""


def save_samples(
    picture: Path,
    weights: dict[str, Tensor],
    shape: ModelConfig,
    diffusion: DiffusionConfig,
    *,
    seed: int,
    count: int = 16,
    device: str = "auto",
    precision: Precision = "auto",
    wanted: Callable[[], bool] = lambda: True,
) -> None:
    """Draw a grid of `count` images and write it as PNG.

    The same seed gives the same noise, so that two models can be compared picture by picture.

    Args:
        wanted: asked before each evaluation of the network.

    Raises:
        Abandoned: `wanted` said no; nothing was written.
    """

    def check(*_: Any) -> None:
        if not wanted():
            raise Abandoned

    picked = pick_device(device)
    model = model_from(weights, shape, picked)
    model.register_forward_pre_hook(check)
    drawn = sample(model, diffusion, count, seed=seed, precision=pick_precision(precision, picked))
    save_png(picture, grid_picture(drawn.numpy()))


def draw_samples(load: Callable[[], Checkpoint], picture: Path, seed: int, count: int) -> None:
    """`save_samples` of a checkpoint, which is loaded unless the picture is there already or `count` is 0."""
    if picture.exists() or not count:
        return
    weights, metadata = load()
    save_samples(picture, weights, metadata.model, metadata.diffusion, seed=seed, count=count)
