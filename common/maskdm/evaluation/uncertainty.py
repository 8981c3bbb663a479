"""How sure a number is: bootstrap intervals, disjoint halves for the floor, and the limit of infinitely many images."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..seeding import generator
from .distances import Moments, frechet_distance, moments, polynomial_kernel

PART = 1024  # rows of a kernel matrix at a time
POINTS = 15  # of the extrapolation, as in its paper
SMALLEST = 0.3  # share of the images at the first of them
NEGLIGIBLE = 1e-7  # of the largest standard deviation: rounding, not variance


class Interval(NamedTuple):
    """Where a number lies; the ends may be equal."""

    low: float
    high: float


def percentiles(value: float, resampled: Tensor, confidence: float = 0.95) -> Interval:
    """The percentile interval of a bootstrap (Efron 1979), moved so that its resamples centre on the value.

    Moved, since a resample has fewer different images, and where a number is biased by their want (Fréchet distances,
    by more than their own spread) resamples are biased once more: the interval is that of the number at its N.

    Args:
        resampled: (B,).
    """
    centred = resampled.double() - resampled.double().mean() + value
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = torch.quantile(centred.cpu(), tails).tolist()
    return Interval(min(low, value), max(high, value))


def counts(images: int, resamples: int, seed: int, name: str) -> Tensor:
    """How often each image is in each resample, (B, N) fp64; each row sums to N."""
    randomness = generator("bootstrap", seed, name)
    found = torch.zeros(resamples, images, dtype=torch.float64)
    for row in found:
        row.copy_(torch.bincount(torch.randint(images, (images,), generator=randomness), minlength=images))
    return found


def mean_resamples(values: Tensor, resamples: int, seed: int, name: str) -> Tensor:
    """Means of resamples of values (N,), (B,)."""
    return counts(len(values), resamples, seed, name) @ values.double().cpu() / len(values)


def kernel_resamples(first: Tensor, second: Tensor, resamples: int, seed: int) -> Tensor:
    """Kernel distances of resamples of features (N, D) and (M, D), (B,) fp64; fewer where one repeats a single image.

    Images are drawn by their weight in sums over the kernel matrix, of which each part is made once for all resamples.
    A pair of an image and its own repetition does not count, as in the distance itself, which stays unbiased so.
    """
    left = counts(len(first), resamples, seed, "generated").to(first.device)
    right = counts(len(second), resamples, seed, "reference").to(first.device)
    total = -2 * _weighted(first, second, left, right) / (len(first) * len(second))
    for features, weights in ((first, left), (second, right)):
        pairs = len(features) ** 2 - weights.square().sum(dim=1)  # of two different images
        total += _weighted(features, features, weights, weights, diagonal=False) / pairs
    return total[total.isfinite()]


def _weighted(first: Tensor, second: Tensor, left: Tensor, right: Tensor, *, diagonal: bool = True) -> Tensor:
    """Σᵢⱼ leftᵢ rightⱼ k(firstᵢ, secondⱼ) for each resample, (B,)."""
    total = left.new_zeros(len(left))
    for start in range(0, len(first), PART):
        kernel = polynomial_kernel(first[start : start + PART], second)  # (n, M)
        if not diagonal:
            kernel.diagonal(start).zero_()
        total += (left[:, start : start + PART] * (right @ kernel.T)).sum(dim=1)
    return total


def frechet_influence(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """What each image of features (N, D) and (M, D) adds to their Fréchet distance, to first order: (N,) and (M,).

    With moments μ, Σ of the one set, μ', Σ' of the other and x centred: 2 (μ − μ')·x + xᵀ(I − T)x less its mean, where
    T = Σ^−½ (Σ^½ Σ' Σ^½)^½ Σ^−½ carries the one Gaussian to the other (the distance's derivative by Σ is I − T: Malagò,
    Montrucchio, Pistone 2018, arXiv 1801.09269). Means of resamples of these stand for the distances of resamples (the
    infinitesimal jackknife, Efron 1982): one decomposition instead of a thousand, and nearer to the spread over fresh
    images than the plain bootstrap where there are few images or both sets are alike, as tried on Gaussians.
    """
    one, other = moments(first), moments(second)
    root, inverse = _root_and_inverse(one)
    root_other, inverse_other = _root_and_inverse(other)
    left, overlap, right = torch.linalg.svd(root @ root_other)
    shift = one.mean - other.mean

    def influence(features: Tensor, own: Moments, inverse: Tensor, basis: Tensor, shift: Tensor) -> Tensor:
        centred = features.double() - own.mean  # (N, D)
        carried = ((centred @ (inverse @ basis)).square() * overlap).sum(dim=1)  # xᵀTx
        values: Tensor = 2 * centred @ shift + centred.square().sum(dim=1) - carried
        return values - values.mean()

    return influence(first, one, inverse, left, shift), influence(second, other, inverse_other, right.T, -shift)


def frechet_resamples(first: Tensor, second: Tensor, resamples: int, seed: int) -> Tensor:
    """Fréchet distances of resamples of features (N, D) and (M, D) to first order, less the distance itself, (B,)."""
    mine, others = frechet_influence(first, second)
    return mean_resamples(mine, resamples, seed, "generated") + mean_resamples(others, resamples, seed, "reference")


def halves(features: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two disjoint halves of features (M, D), M ≥ 2, drawn at random; an odd one is left out.

    Numbers between them are the floor: what images from the very distribution of the reference would get, at N = M/2.
    """
    order = torch.randperm(len(features), generator=generator("halves", seed))
    half = len(features) // 2
    return features[order[:half]], features[order[half : 2 * half]]


def extrapolated_frechet(generated: Tensor, reference: Tensor, seed: int = 0) -> float:
    """The Fréchet distance that infinitely many images would have (Chong & Forsyth 2020, arXiv 1911.07023, section 4):
    a line through the distances of smaller and smaller subsets over 1/N, at 1/N = 0. May be negative where both are
    alike.

    There the reference is large and stays whole; here both sets shrink alike, so that the bias of a small reference
    goes too. The bias is of the form 1/N where N is well above the number of features, and only there.
    """
    shares = torch.linspace(SMALLEST, 1, POINTS, dtype=torch.float64)
    orders = [
        torch.randperm(len(features), generator=generator("extrapolation", seed, name))
        for features, name in ((generated, "generated"), (reference, "reference"))
    ]
    distances = []
    for share in shares.tolist():
        subsets = (
            moments(features[order[: max(2, round(share * len(features)))]])
            for features, order in zip((generated, reference), orders, strict=True)
        )
        distances.append(frechet_distance(*subsets))
    line = torch.stack([torch.ones_like(shares), 1 / shares], dim=1)  # (POINTS, 2)
    return float(torch.linalg.lstsq(line, torch.tensor(distances, dtype=torch.float64)[:, None]).solution[0])


def _root_and_inverse(own: Moments) -> tuple[Tensor, Tensor]:
    """Symmetric root of a covariance, and the pseudo-inverse of that."""
    values, vectors = torch.linalg.eigh(own.covariance)
    deviations = values.clamp(min=0).sqrt()
    kept = deviations > NEGLIGIBLE * deviations.max()
    inverses = torch.where(kept, 1 / deviations, 0.0)
    return (vectors * deviations) @ vectors.T, (vectors * inverses) @ vectors.T
