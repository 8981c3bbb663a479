"""What nearest neighbours among features tell: fidelity, diversity, and whether training images were memorised.

All distances are Euclidean, in fp64, computed in parts of bounded size.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from maskdm.seeding import generator

PART = 2**24  # distances at a time: 128 MB
# Below this share of the distance to the next image a sample counts as a copy: Yoon et al. 2023 ("Diffusion
# Probabilistic Models Generalize when They Fail to Memorize"), Gu et al. 2023 (arXiv 2310.02664).
COPY = 1 / 3


class Neighbourhoods(NamedTuple):
    """Who lies within whose neighbourhood; the mean of each is a metric."""

    precision: Tensor  # (N,) of generated images: 1 within the neighbourhood of some reference image, else 0
    recall: Tensor  # (M,) of reference images: 1 within the neighbourhood of some generated image
    density: Tensor  # (N,) number of neighbourhoods of reference images around a generated one, over k
    coverage: Tensor  # (M,) 1 where some generated image lies within a reference image's neighbourhood


def neighbourhoods(generated: Tensor, reference: Tensor, k: int = 5) -> Neighbourhoods:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, section 2), density and coverage
    (Naeem et al. 2020, arXiv 2002.09797, section 3). All fp64.

    The neighbourhood of an image is the ball that reaches its k-th nearest neighbour among the others of its own set.

    Args:
        generated: (N, D), N > k.
        reference: (M, D), M > k.
    """
    assert 0 < k < min(len(generated), len(reference))
    generated, reference = generated.double(), reference.double()
    reach, reach_generated = _reach(reference, k), _reach(generated, k)  # (M,), (N,)
    within = torch.zeros(len(generated), dtype=torch.float64)
    recalled, covered = torch.zeros(2, len(reference), dtype=torch.bool)
    for start, distances in _squared_distances(generated, reference):  # (n, M)
        rows = slice(start, start + len(distances))
        inside = distances <= reach
        within[rows] = inside.sum(dim=1).double().cpu()
        covered |= inside.any(dim=0).cpu()
        recalled |= (distances <= reach_generated[rows, None]).any(dim=0).cpu()
    return Neighbourhoods((within > 0).double(), recalled.double(), within / k, covered.double())


class Nearest(NamedTuple):
    """The nearest image of a set, for each of some others."""

    distance: Tensor  # (N,) fp64
    row: Tensor  # (N,) int64


def nearest(features: Tensor, others: Tensor) -> Nearest:
    """The nearest of `others` (M, D) for each of `features` (N, D)."""
    features, others = features.double(), others.double()
    rows = torch.cat([distances.argmin(dim=1) for _, distances in _squared_distances(features, others)])
    # Exactly: squares of distances, as they are found, lose the last eight digits of those between near copies.
    parts = zip(torch.split(features, 4096), torch.split(rows, 4096), strict=True)
    return Nearest(torch.cat([(part - others[own]).norm(dim=1) for part, own in parts]), rows)


class Memorisation(NamedTuple):
    """How much nearer samples are to training images than to held-out ones."""

    balanced: Tensor  # (N,) distance to the nearest of m training images over that to the nearest of m held-out ones
    whole: Tensor  # (N,) distance to the nearest of all training images over that to the nearest of all held-out ones
    row: Tensor  # (N,) int64, the nearest of all training images

    @property
    def ratio(self) -> float:
        """Median of the balanced ratios: 1 where samples are no more like the training images than like held-out ones,
        less where they are; 0 where most are copies."""
        return float(self.balanced.median())

    @property
    def copies(self) -> Tensor:
        """(N,) 1 where the nearest training image is less than a third as far as the nearest held-out one, else 0."""
        return (self.whole < COPY).double()


def memorisation(generated: Tensor, training: Tensor, held_out: Tensor, *, seed: int = 0) -> Memorisation:
    """Distances of samples to the nearest training image, over those to the nearest held-out image.

    As Meehan, Chaudhuri and Dasgupta 2020 (arXiv 2004.05675) it takes images of the same distribution that were not
    trained on as the yardstick, and as Carlini et al. 2023 (arXiv 2301.13188, section 5) it divides by what is usual
    around the sample, so that a sample of a crowded place is not taken for a copy. The more images, the nearer the
    nearest: for the balanced ratio the larger of the two sets is thinned to the size of the smaller, so that its median
    is 1 for a model that memorised nothing, whatever the sizes. The whole ratio misses no copy, but is below 1 anyhow
    where there are more training than held-out images.

    Args:
        generated: (N, D). training: (T, D), T ≥ 1. held_out: (H, D), H ≥ 1, never trained on.
        seed: of the thinning.
    """
    size = min(len(training), len(held_out))
    thinned = [
        nearest(generated, part[torch.randperm(len(part), generator=generator("thinned", seed, name))[:size]]).distance
        for name, part in (("training", training), ("held out", held_out))
    ]
    found, unseen = nearest(generated, training), nearest(generated, held_out)
    return Memorisation(_ratio(thinned[0], thinned[1]), _ratio(found.distance, unseen.distance), found.row)


def _ratio(distance: Tensor, usual: Tensor) -> Tensor:
    """1 where both are 0, since the image is in both sets; finite where only the second is."""
    both = (distance == 0) & (usual == 0)
    return torch.where(both, 1.0, distance / usual.clamp(min=1e-12)).clamp(max=1e6)


def _reach(features: Tensor, k: int) -> Tensor:
    """Squared distance of each to its k-th nearest among the others, (N,)."""
    found = []
    for start, distances in _squared_distances(features, features):
        own = torch.arange(len(distances), device=distances.device)
        distances[own, start + own] = torch.inf
        found.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(found)


def _squared_distances(first: Tensor, second: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Rows of the matrix of squared distances in parts: number of the first row, and (n, M), which may be changed."""
    lengths = second.square().sum(dim=1)  # (M,)
    step = max(1, PART // len(second))
    for start in range(0, len(first), step):
        part = first[start : start + step]
        lengths_of_both = part.square().sum(dim=1)[:, None] + lengths  # (n, M)
        yield start, torch.addmm(lengths_of_both, part, second.T, alpha=-2).clamp_(min=0)
