"""What a model says about itself, wherever it goes: beside its weights, in a plan, in a report."""

from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from .config import DiffusionConfig, Frozen, MaskConfig, ModelConfig

SCHEMA_VERSION: Literal[1] = 1
METADATA_KEY = "maskdm"
BINS = 32


class Statistics(Frozen):
    """Intensities of a corpus: what a site compares its own images with. Nothing in it is about a single image."""

    mean: tuple[float, ...]  # of each channel, in [0, 255]
    std: tuple[float, ...]
    histogram: Annotated[tuple[float, ...], Field(min_length=BINS, max_length=BINS)]  # shares of equal bins of [0, 255]
    grey: Annotated[float, Field(ge=0, le=1)]  # share of pictures without colour
    median_size: tuple[int, int]  # width and height of the originals


class CheckpointMetadata(Frozen):
    """What a checkpoint says about itself; sampling and fine-tuning take everything from here."""

    schema_version: Literal[1] = SCHEMA_VERSION
    model: ModelConfig
    diffusion: DiffusionConfig
    mask: MaskConfig
    effective_mask_ratio: Annotated[float, Field(ge=0, lt=1)]
    images_seen: Annotated[int, Field(ge=0)]
    seed: Annotated[int, Field(ge=0)]
    weights: Literal["ema", "raw"] = "ema"
    class_names: tuple[str, ...] = ()  # of a conditional model, in the order of its classes
    corpus: Statistics | None = None  # of its whole corpus, for a site to compare its own images with
    prior_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    rounds: Annotated[int, Field(ge=0)] = 0
    created: datetime = Field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))


def first_problem(error: Exception) -> str:
    """One line out of a validation error: which key, and what is wrong with it."""
    if isinstance(error, ValidationError):
        problem = error.errors()[0]
        return f"{'.'.join(str(part) for part in problem['loc']) or 'value'}: {problem['msg']}"
    return str(error)
