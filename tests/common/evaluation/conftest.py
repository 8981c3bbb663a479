"""Real images in memory, and a feature network that counts how often it is asked."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from maskdm.data.corpus import Corpus, in_memory
from maskdm.evaluation.extractors.features import Extractor


class Counting:
    """Means of the channels and their spread as features; `images` is how many it was shown."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.images += len(images)
        flat = images.float().flatten(2)  # (B, C, S·S)
        return torch.cat([flat.mean(dim=2), flat.std(dim=2)], dim=1)


@pytest.fixture
def counting() -> Counting:
    return Counting()


@pytest.fixture
def extractor(counting: Counting) -> Extractor:
    return Extractor("counting", "0" * 64, "none", counting)


@pytest.fixture
def make_corpus() -> Callable[[int], Corpus]:
    """Makes a corpus of noise, every third image for tests, every third for validation, of two labels in turn."""

    def make(count: int, seed: int = 0) -> Corpus:
        pixels = np.random.default_rng(seed).integers(0, 256, (count, 1, 8, 8), dtype=np.uint8)
        corpus = in_memory(pixels, [("cat", "dog")[number % 2] for number in range(count)])
        corpus.index["split"] = np.arange(count) % 3
        return corpus

    return make
