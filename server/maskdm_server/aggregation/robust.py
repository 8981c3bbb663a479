"""Aggregation rules that withstand hostile updates (Byzantine robustness); they must see every update of a round.

Rows are updates. All values must be finite: refuse others before, as no rule is defined for them. Updates count
alike: a weight that a site claims for itself would be one more way to attack.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Rule = Literal["mean", "median", "trimmed-mean", "krum", "multi-krum"]

# Coordinates handled at a time: bounds the extra memory; measured, smaller and larger parts were slower.
PART = 2**16


def needed(rule: Rule, byzantine: int) -> int:
    """The least number of updates with which a rule withstands `byzantine` ≥ 0 hostile ones.

    Mean: 1, and it withstands none. Median and trimmed mean: 2f + 1, an honest majority (Yin et al. 2018); the median
    at least 3, as that of two is their mean. Krum and multi-Krum: 2f + 3 (Blanchard et al. 2017).
    """
    match rule:
        case "mean":
            return 1
        case "median":
            return max(3, 2 * byzantine + 1)
        case "trimmed-mean":
            return 2 * byzantine + 1
        case "krum" | "multi-krum":
            return 2 * byzantine + 3


def robust_delta(
    rule: Rule, count: int, names: Iterable[str], delta: Callable[[int, str], Tensor], byzantine: int
) -> Iterator[tuple[str, Tensor]]:
    """The aggregated difference in fp32, one weight after another.

    Median and trimmed mean take each coordinate for itself; Krum takes the best update whole, multi-Krum the mean of
    the K − f best.

    Args:
        count: K, the number of updates.
        names: of the weights to aggregate.
        delta: (update from 0 to K − 1, name) → its difference, of any float type. Called once for each, and by the
            Krums once more for the chosen ones; K differences of one weight are in memory together.
        byzantine: f, how many of the updates may be hostile; what the trimmed mean drops on each side.

    Raises:
        ValueError: fewer updates than `needed`, or the rule is the mean, which needs no update but the present one
            (`StreamingMean`).
    """
    if rule == "mean":
        raise ValueError("the mean is no robust rule")
    if count < needed(rule, byzantine):
        raise ValueError(f"{rule} needs {needed(rule, byzantine)} updates to withstand {byzantine}, not {count}")
    names = list(names)

    def without_extremes(trim: int) -> Iterator[tuple[str, Tensor]]:
        return ((name, _trimmed_mean([delta(i, name) for i in range(count)], trim)) for name in names)

    def mean_of_best(best: int) -> Iterator[tuple[str, Tensor]]:
        chosen = krum_order(squared_distances(count, names, delta), byzantine)[:best]
        return ((name, _mean(delta(i, name) for i in chosen)) for name in names)

    match rule:
        case "median":
            return without_extremes(_median_trim(count))
        case "trimmed-mean":
            return without_extremes(byzantine)
        case "krum":
            return mean_of_best(1)
        case "multi-krum":
            return mean_of_best(count - byzantine)


def coordinate_median(stack: Tensor) -> Tensor:
    """Median of each coordinate, (K, ...) → (...) in fp32; for even K the mean of the two in the middle.

    Yin et al. 2018 (arXiv 1803.01498), option I of algorithm 1.
    """
    return _trimmed_mean(stack.unbind(), _median_trim(len(stack)))


def trimmed_mean(stack: Tensor, trim: int) -> Tensor:
    """Mean of each coordinate without its `trim` largest and `trim` smallest values, (K, ...) → (...) in fp32.

    Yin et al. 2018 (arXiv 1803.01498), option II of algorithm 1; 0 ≤ 2·trim < K.
    """
    return _trimmed_mean(stack.unbind(), trim)


def squared_distances(count: int, names: Iterable[str], delta: Callable[[int, str], Tensor]) -> Tensor:
    """Squared Euclidean distances between whole updates, (K, K) double; K differences of one weight in memory.

    Args:
        count, names, delta: as for `robust_delta`.
    """
    distances = torch.zeros(count, count, dtype=torch.double)
    for name in names:
        for part in _parts([delta(i, name) for i in range(count)]):
            rows = part.double()
            # Not |x|² + |y|² − 2·xy: that cancels where updates are near each other and far from zero.
            for i in range(count - 1):
                distances[i, i + 1 :] += (rows[i + 1 :] - rows[i]).square_().sum(1)
    return distances + distances.T


def krum_order(distances: Tensor, byzantine: int) -> list[int]:
    """Indices of the updates, best first; of equal ones the lower index.

    The score to be small is the sum of the squared distances to the K − f − 2 nearest others (Blanchard et al. 2017,
    arXiv 1703.02757).

    Args:
        distances: (K, K) squared distances, K ≥ 2f + 3.
        byzantine: f, how many of the updates may be hostile.
    """
    count = len(distances)
    assert byzantine >= 0
    assert count >= needed("krum", byzantine)
    others = distances.masked_fill(torch.eye(count, dtype=torch.bool), torch.inf)
    scores = others.sort(dim=1).values[:, : count - byzantine - 2].sum(1)
    order: list[int] = scores.argsort(stable=True).tolist()
    return order


def _median_trim(count: int) -> int:
    return (count - 1) // 2


def _trimmed_mean(updates: Sequence[Tensor], trim: int) -> Tensor:
    assert 0 <= 2 * trim < len(updates)
    out = torch.empty(updates[0].shape)
    flat, start = out.view(-1), 0
    for part in _parts(updates):
        # Dropped before the sum, not subtracted from it: beside a huge hostile value the others would be rounded away.
        first, *others = _sorted(part.float())[trim : len(updates) - trim]
        torch.div(sum(others, first), 1 + len(others), out=flat[start : start + len(first)])
        start += len(first)
    return out


def _mean(updates: Iterator[Tensor]) -> Tensor:
    total, count = next(updates).to(torch.float32, copy=True), 1
    for update in updates:
        total += update
        count += 1
    return total.div_(count)


def _parts(updates: Sequence[Tensor]) -> Iterator[Tensor]:
    """(K, n) with n ≤ PART: neighbouring coordinates of all updates, in the updates' own type."""
    rows = [update.reshape(-1) for update in updates]
    for start in range(0, len(rows[0]), PART):
        yield torch.stack([row[start : start + PART] for row in rows])


def _sorted(part: Tensor) -> list[Tensor]:
    """The rows of (K, n) with every coordinate sorted, smallest first.

    A network of comparisons works on whole rows: for ten updates some ten times as fast as torch.sort, which sorts
    ten values at a time.
    """
    rows = list(part.unbind())
    for low, high in _comparators(len(rows)):
        rows[low], rows[high] = torch.minimum(rows[low], rows[high]), torch.maximum(rows[low], rows[high])
    return rows


@lru_cache
def _comparators(count: int) -> tuple[tuple[int, int], ...]:
    """Pairs to compare in turn so that any `count` values end up sorted: Batcher's odd-even merge sort.

    Knuth, The Art of Computer Programming 3, section 5.2.2, algorithm M.
    """
    pairs = []
    length = 1  # of the runs that are sorted by now
    while length < count:
        distance = length
        while distance:
            for start in range(distance % length, count - distance, 2 * distance):
                pairs += [
                    (low, low + distance)
                    for low in range(start, min(start + distance, count - distance))
                    if low // (2 * length) == (low + distance) // (2 * length)
                ]
            distance //= 2
        length *= 2
    return tuple(pairs)
