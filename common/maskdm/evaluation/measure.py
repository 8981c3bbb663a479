"""All numbers of one evaluation, from features: value, bootstrap interval and floor of each."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor

from .cached import RealFeatures
from .distances import frechet_distance, kernel_distance, moments
from .neighbours import Memorisation, memorisation, neighbourhoods
from .record import Measured
from .uncertainty import extrapolated_frechet, frechet_resamples, halves, kernel_resamples, mean_resamples, percentiles

CONFIDENCE = 0.95
ANYTHING, POSITIVE, SHARE = (-math.inf, math.inf), (0.0, math.inf), (0.0, 1.0)  # what a number can be


@dataclass(frozen=True)
class Comparison:
    """Generated images beside real ones; each method gives numbers by name.

    Args:
        generated: features (N, D), N ≥ 2.
        reference: features (M, D), M ≥ 2; floors need M ≥ 4.
        resamples: of the bootstrap; 0: no intervals.
        seed: of the bootstrap, of the halves for the floor, and of subsets.
    """

    generated: Tensor
    reference: RealFeatures
    resamples: int = 1000
    seed: int = 0

    @cached_property
    def halves(self) -> tuple[Tensor, Tensor]:
        """Disjoint halves of the reference, for the floor."""
        return halves(self.reference.features, self.seed)

    def distances(self, frechet: str, kernel: str, *, extrapolate: bool = False) -> dict[str, Measured]:
        """Fréchet and kernel distance under the given names; the former also for infinitely many images if asked."""
        generated, reference, (first, second) = self.generated, self.reference.features, self.halves
        floors = len(first) > 1
        found = {
            frechet: self._measured(
                "lower",
                frechet_distance(moments(generated), self.reference.moments),
                frechet_resamples(generated, reference, self.resamples, self.seed),
                frechet_distance(moments(first), moments(second)) if floors else None,
            ),
            kernel: self._measured(
                "lower",
                kernel_distance(generated, reference),
                kernel_resamples(generated, reference, self.resamples, self.seed),
                kernel_distance(first, second) if floors else None,
                within=ANYTHING,  # unbiased, so it may be negative
            ),
        }
        if extrapolate:
            limit = extrapolated_frechet(generated, reference, self.seed)
            floor = extrapolated_frechet(first, second, self.seed) if floors else None
            name, dash, rest = frechet.partition("-")
            found[f"{name}∞{dash}{rest}"] = self._measured("lower", limit, None, floor)
        return found

    def neighbours(self, k: int) -> dict[str, Measured]:
        """Precision, recall, density and coverage, N > k and M > k. Intervals hold the neighbourhoods as they are."""
        first, second = self.halves
        here = neighbourhoods(self.generated, self.reference.features, k)
        perfect = neighbourhoods(first, second, k) if len(first) > k else None
        found = {}
        for name, values in here._asdict().items():
            whose = "generated" if name in ("precision", "density") else "reference"
            resampled = mean_resamples(values, self.resamples, self.seed, whose)
            floor = float(getattr(perfect, name).mean()) if perfect else None
            found[name] = self._measured(
                "higher", float(values.mean()), resampled, floor, within=POSITIVE if name == "density" else SHARE
            )
        return found

    def memorisation(self, found: Memorisation, training: Tensor) -> dict[str, Measured]:
        """Memorisation and the share of copies, as found for all generated images.

        Args:
            training: features (T, D) of training images, for the floor; the reference is held out.
        """
        first, second = self.halves
        unseen = memorisation(first, training, second) if len(first) else None
        ratios = mean_resamples(found.unseen, self.resamples, self.seed, "generated")
        copies = mean_resamples(found.copies, self.resamples, self.seed, "generated")
        return {
            "memorisation": self._measured("one", found.ratio, ratios, unseen.ratio if unseen else None),
            "copies": self._measured(
                "lower",
                float(found.copies.mean()),
                copies,
                float(unseen.copies.mean()) if unseen else None,
                within=SHARE,
            ),
        }

    def _measured(
        self,
        better: Literal["lower", "higher", "one"],
        value: float,
        resampled: Tensor | None,
        floor: float | None,
        within: tuple[float, float] = POSITIVE,
    ) -> Measured:
        """An interval holds only what the number can be: moving resamples onto the value may carry them past it."""
        interval = percentiles(value, resampled, CONFIDENCE) if resampled is not None and len(resampled) else None
        return Measured(
            value=value,
            better=better,
            low=max(interval.low, within[0]) if interval else None,
            high=min(interval.high, within[1]) if interval else None,
            floor=floor,
            floor_images=len(self.halves[0]) if floor is not None else 0,
            images=len(self.generated),
            reference_images=len(self.reference.features),
        )


def headline(frechet: str, kernel: str, generated: Tensor, reference: Tensor) -> str:
    """The Fréchet distance, where there are more images (N, D) than features; else the kernel distance, unbiased."""
    return frechet if min(len(generated), len(reference)) > generated.shape[1] else kernel


def notes(frechet: str, kernel: str, generated: Tensor, reference: Tensor) -> list[str]:
    """What a reader must know of these sets of features (N, D) and (M, D)."""
    images, features = min(len(generated), len(reference)), generated.shape[1]
    found = []
    if images <= features:
        found.append(
            f"{frechet} of {images:,} images is far above its limit, since there are {features:,} features: go by "
            f"{kernel}, which is unbiased, or compare {frechet} only at these very numbers of images"
        )
    if images < 100:
        found.append(f"{images:,} images say little: look at the intervals")
    return found
