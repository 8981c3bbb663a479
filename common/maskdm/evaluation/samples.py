"""Generated images in blocks, so that however many are wanted, few are in memory: drawn from a model, or read."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Self, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..config import DiffusionConfig
from ..data.sources.source import ArraySource, open_source
from ..diffusion.sampling import Options, sample
from ..errors import DataError
from ..metadata import CheckpointMetadata
from ..networks.model import Network
from ..run.runfolder import sha256_of
from ..seeding import derive_seed, generator
from .record import SamplingFacts

BLOCK = 256


def drawn(model: Network, config: DiffusionConfig, count: int, **options: Unpack[Options]) -> Iterator[Tensor]:
    """Draw images as `diffusion.sampling.sample` does, uint8 (B, C, H, W) at a time, with a seed for each block."""
    seed, classes, progress = options.get("seed", 0), options.get("classes"), options.get("progress")
    for start in range(0, count, BLOCK):

        def in_all(done: int, before: int = start) -> None:
            if progress:
                progress(before + done)

        options["progress"] = in_all
        options["seed"] = derive_seed("evaluation", seed, start)
        options["classes"] = None if classes is None else classes[start : start + BLOCK]
        yield sample(model, config, min(BLOCK, count - start), **options)


def proportional_classes(classes: Tensor, count: int, seed: int) -> Tensor:
    """As many of each class as real images have them, in random order: (M,) int64 → (count,) int64.

    Evenly spaced in the sorted classes, so that each has its share to the nearest image.
    """
    ordered = classes.sort().values
    places = ((torch.arange(count) + 0.5) * len(classes) / count).long()
    shuffled: Tensor = ordered[places][torch.randperm(count, generator=generator("evaluation classes", seed))]
    return shuffled


@dataclass(frozen=True)
class DrawnSamples:
    """Images that a model draws."""

    path: Path
    metadata: CheckpointMetadata
    network: Network
    count: int
    options: Options

    @property
    def channels(self) -> int:
        return self.metadata.model.channels

    @property
    def image_size(self) -> int:
        return self.metadata.model.image_size

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.metadata.class_names

    def in_proportions_of(self, classes: Tensor, seed: int) -> Self:
        """The same with as many images of each class as real ones have, (M,) int64, M ≥ 1."""
        return replace(self, options={**self.options, "classes": proportional_classes(classes, self.count, seed)})

    def blocks(self, progress: Callable[[int], None]) -> Iterator[Tensor]:
        """uint8 (B, C, S, S) at a time; `progress` is told how many there are."""
        options: Options = {**self.options, "progress": progress}
        return drawn(self.network, self.metadata.diffusion, self.count, **options)

    def facts(self, seed: int) -> SamplingFacts:
        """For the record."""
        given, classes = self.options, self.options.get("classes")
        counts = {} if classes is None else {n: int((classes == i).sum()) for i, n in enumerate(self.class_names)}
        return SamplingFacts(
            count=self.count,
            sampler=given.get("sampler"),
            steps=given.get("steps"),
            eta=given.get("eta"),
            guidance=given.get("guidance"),
            classes=counts,
            precision=given.get("precision"),
            seed=seed,
        )


class StoredSamples:
    """Images made elsewhere: square uint8 (N, H, W[, C]) or (N, C, H, W) in an `.npz` or `.npy`."""

    class_names: tuple[str, ...] = ()  # nobody knows them

    def __init__(self, path: Path, option: str = "--samples") -> None:
        """Look at the file; its images are read later.

        Raises:
            DataError: it cannot be read, or holds something else.
        """
        source = open_source(path, option)
        if not isinstance(source, ArraySource):
            raise DataError(f"{option} {path}: give an .npz or .npy of uint8 images, such as sample --npz writes")
        self._source, self.path = source, path
        first = _planes(next(iter(source.entries())).content)
        self.count = source.count()
        if self.count < 2:
            raise DataError(f"{option} {path} holds one image: give at least 2")
        self.channels, self.image_size, width = first.shape
        if width != self.image_size:
            raise DataError(f"{option} {path}: images of {width}x{self.image_size} pixels; give square ones")

    def blocks(self, progress: Callable[[int], None]) -> Iterator[Tensor]:
        """uint8 (B, C, S, S) at a time; `progress` is told how many were used."""
        entries, done = self._source.entries(), 0
        while block := [_planes(entry.content) for entry in islice(entries, BLOCK)]:
            yield torch.from_numpy(np.stack(block))
            done += len(block)
            progress(done)

    def facts(self, seed: int) -> SamplingFacts:
        """For the record."""
        return SamplingFacts(count=self.count, seed=seed, file=str(self.path), sha256=sha256_of(self.path))


def _planes(content: object) -> NDArray[np.uint8]:
    """(H, W) or (H, W, C) → (C, H, W)."""
    assert isinstance(content, np.ndarray)
    return np.moveaxis(content[..., None] if content.ndim == 2 else content, 2, 0)
