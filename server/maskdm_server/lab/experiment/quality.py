"""How good a model is: distances of its samples to held-out images, in the features of one network."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskdm.diffusion.sampling import sample
from maskdm.diffusion.targets import denoising_loss
from maskdm.evaluation.distances import Moments, frechet_distance, kernel_distance, moments
from maskdm.evaluation.extractors.features import Extractor, open_extractor
from maskdm.networks.layers import patchify
from maskdm.networks.precision import arithmetic, pick_precision
from maskdm.training.checkpoint import model_from

from .budget import ExperimentConfig
from .images import PartedImages

LOSS_IMAGES, LOSS_DRAWS = 256, 4


@dataclass(frozen=True)
class Reference:
    """Held-out images as features."""

    features: Tensor  # (N, D)
    moments: Moments

    @classmethod
    def of(cls, features: Tensor) -> "Reference":
        """With its moments."""
        return cls(features, moments(features))


class Judge:
    """The references of an experiment, and what models are measured with."""

    def __init__(self, images: PartedImages, extractor: Path, config: ExperimentConfig, device: torch.device) -> None:
        self.extractor: Extractor = open_extractor(extractor, device=device)
        self._config, self._device = config, device
        self._pixels = images.pixels(images.test[_evenly(len(images.test), LOSS_IMAGES)])
        self.validation, self.test = (
            Reference.of(self.extractor.features(images.pixels(rows))) for rows in (images.validation, images.test)
        )

    def floor(self) -> dict[str, float]:
        """What `n` real images score: of those held out to choose by as many as samples are drawn, if there are."""
        features = self.validation.features
        chosen = features[_evenly(len(features), self._config.samples)]
        return {
            "fd": frechet_distance(moments(chosen), self.test.moments),
            "kd": kernel_distance(chosen, self.test.features),
            "n": len(chosen),
        }

    def judge(self, weights: Mapping[str, Tensor], seed: int) -> dict[str, Any]:
        """Quality of a model's samples; the same seed starts from the same noise."""
        config = self._config
        model = model_from(dict(weights), config.model, self._device)
        precision = pick_precision(config.precision, self._device)
        drawn = sample(
            model,
            config.diffusion,
            config.samples,
            steps=config.sampling_steps,
            seed=seed,
            batch_size=256,
            precision=precision,
        )
        found = self.extractor.features(drawn)
        about = moments(found)
        with arithmetic(self._device, precision):
            patches = patchify(self._pixels.to(self._device), config.model.patch_size)
            loss = denoising_loss(model, config.diffusion, patches, draws=LOSS_DRAWS, seed=1)
        return {
            "fd": frechet_distance(about, self.test.moments),
            "fd_validation": frechet_distance(about, self.validation.moments),
            "kd": kernel_distance(found, self.test.features),
            "loss": loss,
        }


def _evenly(count: int, most: int) -> NDArray[np.int64]:
    """Places of at most `most` of `count` images from first to last: those of one label often stand together."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(np.int64)
