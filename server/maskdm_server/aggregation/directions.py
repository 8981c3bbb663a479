"""Whether the updates of a round point the same way: a short sketch of each stands for it, so that none must be kept.

A count sketch (Charikar et al. 2002, "Finding frequent items in data streams"): each coordinate is added, with a random
sign, to one of COORDINATES places. Scalar products stay right in expectation; cosines between sketches have a standard
error of at most 1/√COORDINATES, 0.016, and that of an update and its multiple is exactly ±1. The signs are secret:
whoever knew them could add next to nothing to an update and choose what its sketch looks like.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

COORDINATES = 4093  # a prime: no length of a weight's rows puts a whole column into one place
BLOCK = 64 * COORDINATES  # coordinates handled at a time, which fit into a cache
# Honest updates can be as good as perpendicular; a cosine below this one is no error of the sketch (six of them).
AGAINST = -0.1


class Sketch:
    """Of one update, whose weights are added in turn, for all updates of a round in the same order."""

    def __init__(self, seed: int) -> None:
        """All updates that are compared have the same seed, which no site knows."""
        self._randomness, self._position = np.random.default_rng(seed), 0
        self.values = torch.zeros(COORDINATES)

    def add(self, difference: Tensor) -> None:
        """Add the difference of one more weight, of any float type; its values are finite."""
        for part in torch.split(difference.reshape(-1), BLOCK):
            start = self._position % COORDINATES
            padded = torch.zeros(-(-(start + len(part)) // COORDINATES) * COORDINATES)
            torch.mul(part, self._signs(len(part)), out=padded[start : start + len(part)])
            self.values += padded.view(-1, COORDINATES).sum(0)
            self._position += len(part)

    def _signs(self, count: int) -> Tensor:
        """(count,) of ±1."""
        bits = np.unpackbits(np.frombuffer(self._randomness.bytes(-(-count // 8)), np.uint8), count=count)
        return torch.from_numpy(bits).float().mul_(2).sub_(1)


def cosines(sketches: Mapping[int, Tensor]) -> dict[int, float | None]:
    """Cosine of each update to the mean direction of the others; None where there is no other, or they cancel.

    The mean is of unit vectors: weighed by length, one long hostile update would be the mean that honest ones are
    compared with.
    """
    units = {site: sketch.double() / max(float(sketch.double().norm()), 1e-300) for site, sketch in sketches.items()}
    total = sum(units.values(), torch.zeros(COORDINATES, dtype=torch.double))
    found: dict[int, float | None] = {}
    for site, unit in units.items():
        others = total - unit
        length = float(others.norm())
        # What rounding leaves of unit vectors that cancel has no direction.
        found[site] = max(-1.0, min(1.0, float(unit @ others) / length)) if length > 1e-6 else None
    return found
