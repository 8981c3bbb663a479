"""Intervals against explicit resampling and fresh draws, floors, and the limit of infinitely many images."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskdm.evaluation import uncertainty
from maskdm.evaluation.distances import Moments, frechet_distance, kernel_distance, moments
from maskdm.evaluation.uncertainty import (
    counts,
    extrapolated_frechet,
    frechet_influence,
    frechet_resamples,
    halves,
    kernel_resamples,
    mean_resamples,
    percentiles,
)


def drawn(seed: int, count: int, features: int = 6, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed)).double() * scale + shift


def test_resamples_have_as_many_images_and_follow_from_the_seed() -> None:
    drawn_twice = [counts(20, 50, 3, "generated") for _ in range(2)]
    assert drawn_twice[0].equal(drawn_twice[1])
    assert (drawn_twice[0].sum(dim=1) == 20).all()
    assert not drawn_twice[0].equal(counts(20, 50, 3, "reference"))
    assert not drawn_twice[0].equal(counts(20, 50, 4, "generated"))


@given(st.floats(-5, 5), st.floats(0, 5))
def test_an_interval_holds_its_value_even_where_resamples_are_biased(value: float, bias: float) -> None:
    low, high = percentiles(value, value + bias + drawn(0, 1000, 1)[:, 0])
    assert low <= value <= high
    assert (low, high) == pytest.approx((value - 1.96, value + 1.96), abs=0.25)


def test_means_spread_as_they_should() -> None:
    values = drawn(1, 400, 1)[:, 0]
    assert float(mean_resamples(values, 2000, 0, "a").std()) == pytest.approx(float(values.std()) / 20, rel=0.1)


def test_resampled_kernel_distances_are_those_of_repeated_images_without_pairs_of_repetitions() -> None:
    first, second = drawn(2, 9), drawn(3, 7, shift=0.5)
    found = kernel_resamples(first, second, 5, seed=1)
    left, right = counts(9, 5, 1, "generated"), counts(7, 5, 1, "reference")

    def within(features: Tensor, weights: Tensor) -> float:
        rows = torch.arange(len(features)).repeat_interleave(weights.long())
        pairs = [(int(a), int(b)) for a in rows for b in rows if a != b]
        return sum(float((features[a] @ features[b] / 6 + 1) ** 3) for a, b in pairs) / len(pairs)

    for number in range(5):
        between = float(((first @ second.T / 6 + 1) ** 3 * torch.outer(left[number], right[number])).sum()) / 63
        expected = within(first, left[number]) + within(second, right[number]) - 2 * between
        assert float(found[number]) == pytest.approx(expected)


def test_parts_of_any_size_give_the_same_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = drawn(2, 30), drawn(3, 20)
    whole = kernel_resamples(first, second, 5, seed=0)
    monkeypatch.setattr(uncertainty, "PART", 7)
    assert torch.allclose(kernel_resamples(first, second, 5, seed=0), whole)


def test_an_influence_is_the_derivative_by_the_weight_of_an_image() -> None:
    first, second = drawn(4, 60, scale=1.4, shift=0.3), drawn(5, 50)

    def weighted(features: Tensor, weights: Tensor) -> Moments:
        shares = weights / weights.sum()
        mean = shares @ features
        return Moments(mean, ((features - mean).T * shares) @ (features - mean))

    of_first, of_second = frechet_influence(first, second)
    for features, influence, own_is_first in ((first, of_first, True), (second, of_second, False)):
        for row in (0, 17, 41):
            distances = []
            for step in (-1e-4, 1e-4):
                weights = torch.ones(len(features)).double()
                weights[row] += step * len(features)
                changed, plain = (
                    weighted(features, weights),
                    weighted(
                        second if own_is_first else first, torch.ones(len(second if own_is_first else first)).double()
                    ),
                )
                distances.append(frechet_distance(changed, plain))
            derivative = (distances[1] - distances[0]) / 2e-4
            assert float(influence[row]) == pytest.approx(derivative, rel=0.05, abs=0.02)


@pytest.mark.parametrize(("images", "scale"), [(150, 1.5), (30, 1.5), (300, 1.2)])
def test_the_interval_is_as_wide_as_the_spread_over_fresh_images(images: int, scale: float) -> None:
    sets = [(drawn(2 * i, images, 20, scale), drawn(2 * i + 1, images, 20)) for i in range(80)]
    spread = float(torch.tensor([frechet_distance(moments(a), moments(b)) for a, b in sets]).std())
    told = torch.stack([frechet_resamples(*pair, resamples=300, seed=0).std() for pair in sets[:15]]).mean()
    assert float(told) == pytest.approx(spread, rel=0.3)


def test_kernel_intervals_are_as_wide_as_the_spread_over_fresh_images() -> None:
    sets = [(drawn(2 * i, 100, scale=1.5), drawn(2 * i + 1, 100)) for i in range(80)]
    spread = float(torch.tensor([kernel_distance(*pair) for pair in sets]).std())
    told = torch.stack([kernel_resamples(*pair, 200, 0).std() for pair in sets[:15]]).mean()
    assert float(told) == pytest.approx(spread, rel=0.3)


def test_halves_share_no_image() -> None:
    first, second = halves(torch.arange(11)[:, None], seed=1)
    assert len(first) == len(second) == 5
    assert not set(first.flatten().tolist()) & set(second.flatten().tolist())


def test_the_limit_of_infinitely_many_images_is_without_the_bias_of_few() -> None:
    truth = 24 * 0.3**2
    sets = [(drawn(2 * i, 600, 24), drawn(2 * i + 1, 500, 24, shift=0.3)) for i in range(24)]
    plain = torch.tensor([frechet_distance(moments(a), moments(b)) for a, b in sets]).mean()
    limit = torch.tensor([extrapolated_frechet(a, b) for a, b in sets]).mean()
    assert float(plain) - truth > 0.5
    assert abs(float(limit) - truth) < 0.2
