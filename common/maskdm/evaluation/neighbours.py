"""What nearest neighbours among features tell: fidelity, diversity, and whether training images were memorised.

All distances are Euclidean, in fp64, computed in parts of bounded size.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

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

    unseen: Tensor  # (N,) (T + H)/H where a held-out image is the nearest of all, 0 where a training image is
    distances: Tensor  # (N,) distance to the nearest training image over that to the nearest held-out one
    row: Tensor  # (N,) int64, the nearest training image

    @property
    def ratio(self) -> float:
        """Samples that a held-out image is nearest to, over how many chance would give: 1 where training images are no
        nearer than others, 0 where one of them is always the nearest."""
        return float(self.unseen.mean())

    @property
    def copies(self) -> Tensor:
        """(N,) 1 where the nearest training image is less than a third as far as the nearest held-out one, else 0."""
        return (self.distances < COPY).double()


def memorisation(generated: Tensor, training: Tensor, held_out: Tensor) -> Memorisation:
    """Whether samples are nearer to training images than to images of the same distribution that were not trained on.

    As Meehan, Chaudhuri and Dasgupta 2020 (arXiv 2004.05675) it takes held-out images as the yardstick, and as Carlini
    et al. 2023 (arXiv 2301.13188, section 5) it divides distances by what is usual around the sample, so that a sample
    of a crowded place is not taken for a copy. The more images, the nearer the nearest: a model that learned nothing
    by heart has a training image nearest with probability T/(T + H), since all images are alike to it, which the ratio
    divides by. No image is left out: a copy of any of them is seen. The distances are below 1 anyhow where there are
    more training than held-out images.

    Args:
        generated: (N, D). training: (T, D), T ≥ 1. held_out: (H, D), H ≥ 1, never trained on.
    """
    found, usual = nearest(generated, training), nearest(generated, held_out)
    chance = len(held_out) / (len(training) + len(held_out))
    unseen = (usual.distance < found.distance).double() / chance
    unseen[usual.distance == found.distance] = 1.0  # the image is in both sets
    return Memorisation(unseen, _ratio(found.distance, usual.distance), found.row)


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
