"""Distances between two sets of features: Fréchet (of Gaussians) and kernel (MMD)."""

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Mean and covariance of features, in fp64."""

    mean: Tensor  # (D,)
    covariance: Tensor  # (D, D), with the divisor N − 1


def moments(features: Tensor) -> Moments:
    """Moments of features (N, D), N ≥ 2."""
    assert len(features) > 1
    values = features.double()
    mean = values.mean(dim=0)
    centred = values - mean
    return Moments(mean, centred.T @ centred / (len(values) - 1))


def frechet_distance(first: Moments, second: Moments) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½) (Dowson & Landau 1982; on Inception's features: Heusel et al. 2017,
    arXiv 1706.08500). Biased upwards by about 1/N, so that numbers of different N are not comparable.

    tr (Σ₁Σ₂)^½ is the sum of the singular values of √Σ₁ √Σ₂, which needs no root of a matrix that is not symmetric.
    """
    roots = _root(first.covariance) @ _root(second.covariance)  # (D, D)
    overlap = torch.linalg.svdvals(roots).sum()
    spread = first.covariance.trace() + second.covariance.trace() - 2 * overlap
    return max(0.0, float((first.mean - second.mean).square().sum() + spread))


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """Unbiased squared MMD of features (N, D) and (M, D) with the kernel (x·y/D + 1)³ (Bińkowski et al. 2018, arXiv
    1801.01401, eq. 4). It may be negative where both are alike.

    Over all pairs, of which subsets, as usual, are a noisy estimate.
    """
    n, m = len(first), len(second)
    assert n > 1
    assert m > 1
    within = _kernel_sum(first, first, diagonal=False) / (n * (n - 1))
    within += _kernel_sum(second, second, diagonal=False) / (m * (m - 1))
    return within - 2 * _kernel_sum(first, second) / (n * m)


def polynomial_kernel(first: Tensor, second: Tensor) -> Tensor:
    """(x·y/D + 1)³ for every pair, (N, M) fp64."""
    kernel: Tensor = (first.double() @ second.double().T / first.shape[1] + 1) ** 3
    return kernel


def _kernel_sum(first: Tensor, second: Tensor, *, diagonal: bool = True) -> float:
    total = 0.0
    for start in range(0, len(first), 1024):  # bounded memory
        kernel = polynomial_kernel(first[start : start + 1024], second)
        total += float(kernel.sum())
        if not diagonal:
            total -= float(kernel.diagonal(start).sum())
    return total


def _root(covariance: Tensor) -> Tensor:
    """Symmetric root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root
