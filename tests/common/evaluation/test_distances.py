"""Fréchet and kernel distances against closed forms, and against torchmetrics."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchmetrics.image.kid import poly_mmd

from maskdm.evaluation.distances import Moments, frechet_distance, kernel_distance, moments


def drawn(seed: int, count: int, features: int = 6, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed)).double() * scale + shift


def gaussian(mean: list[float], variances: list[float]) -> Moments:
    return Moments(torch.tensor(mean).double(), torch.diag(torch.tensor(variances)).double())


def test_the_distance_of_gaussians_with_the_same_axes_is_that_of_means_and_deviations() -> None:
    one, other = gaussian([0, 1, 2], [1, 4, 9]), gaussian([1, 1, 4], [4, 4, 0])
    assert frechet_distance(one, other) == pytest.approx((1 + 4) + (1 - 2) ** 2 + 0 + 3**2)


@given(st.integers(0, 1000), st.integers(2, 30), st.integers(2, 30))
def test_the_frechet_distance_is_symmetric_and_nought_to_itself_however_few_the_images(
    seed: int, first: int, second: int
) -> None:
    one, other = moments(drawn(seed, first)), moments(drawn(seed + 1, second, scale=2, shift=1))
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one), rel=1e-5, abs=1e-6)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-5)


@given(st.integers(0, 1000), st.floats(-3, 3))
def test_rotating_both_sets_changes_nothing_and_moving_one_adds_the_square(seed: int, shift: float) -> None:
    first, second = drawn(seed, 40), drawn(seed + 1, 50, scale=1.5)
    rotation = torch.linalg.qr(drawn(seed + 2, 6)).Q
    before = frechet_distance(moments(first), moments(second))
    assert frechet_distance(moments(first @ rotation), moments(second @ rotation)) == pytest.approx(before, rel=1e-6)
    centred = first - first.mean(0), second - second.mean(0)
    apart = frechet_distance(moments(centred[0]), moments(centred[1] + shift))
    level = frechet_distance(moments(centred[0]), moments(centred[1]))
    assert apart == pytest.approx(level + 6 * shift**2, rel=1e-6)


class Passing(nn.Module):
    """Features instead of images, for torchmetrics."""

    num_features = 6

    def forward(self, features: Tensor) -> Tensor:
        return features


def test_the_frechet_distance_is_that_of_torchmetrics() -> None:
    fid = pytest.importorskip("torchmetrics.image.fid")
    first, second = drawn(0, 60), drawn(1, 80, scale=1.3, shift=0.2)
    metric = fid.FrechetInceptionDistance(feature=Passing(), normalize=True).set_dtype(torch.float64)
    metric.update(first, real=True)
    metric.update(second, real=False)
    assert frechet_distance(moments(first), moments(second)) == pytest.approx(float(metric.compute()), rel=1e-9)


def test_the_kernel_distance_is_that_of_torchmetrics_over_all_pairs() -> None:
    first, second = drawn(2, 50), drawn(3, 50, scale=1.3)
    assert kernel_distance(first, second) == pytest.approx(float(poly_mmd(first, second)), rel=1e-9)


def test_the_kernel_distance_leaves_out_pairs_of_an_image_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = drawn(4, 7), drawn(5, 9)

    def kernel(x: Tensor, y: Tensor) -> float:
        return float((x @ y / 6 + 1) ** 3)

    within = sum(kernel(x, y) for i, x in enumerate(first) for j, y in enumerate(first) if i != j) / (7 * 6)
    within += sum(kernel(x, y) for i, x in enumerate(second) for j, y in enumerate(second) if i != j) / (9 * 8)
    between = sum(kernel(x, y) for x in first for y in second) / (7 * 9)
    assert kernel_distance(first, second) == pytest.approx(within - 2 * between)


def test_the_kernel_distance_is_unbiased_where_the_frechet_distance_is_not() -> None:
    pairs = [(drawn(2 * seed, 20), drawn(2 * seed + 1, 20)) for seed in range(200)]
    kernel = torch.tensor([kernel_distance(*pair) for pair in pairs])
    assert abs(float(kernel.mean())) < 3 * float(kernel.std()) / len(pairs) ** 0.5
    assert min(frechet_distance(moments(one), moments(other)) for one, other in pairs) > 0.2
