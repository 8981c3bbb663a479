"""Grids of samples that a run leaves for people to look at."""

from pathlib import Path

from torch import Tensor

from maskdm.checkpoint import load_checkpoint, model_from
from maskdm.config import DiffusionConfig, ModelConfig, Precision
from maskdm.pictures import grid_picture, save_png
from maskdm.precision import pick_device, pick_precision
from maskdm.sampling import sample


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
) -> None:
    """Draw a grid of `count` images and write it as PNG.

    The same seed gives the same noise, so that two models can be compared picture by picture.
    """
    picked = pick_device(device)
    model = model_from(weights, shape, picked)
    drawn = sample(model, diffusion, count, seed=seed, precision=pick_precision(precision, picked))
    save_png(picture, grid_picture(drawn.numpy()))


def draw_samples(checkpoint: Path, picture: Path, seed: int, count: int) -> None:
    """`save_samples` of a checkpoint, unless the picture is there already or `count` is 0."""
    if picture.exists() or not count:
        return
    weights, metadata = load_checkpoint(checkpoint)
    save_samples(picture, weights, metadata.model, metadata.diffusion, seed=seed, count=count)
