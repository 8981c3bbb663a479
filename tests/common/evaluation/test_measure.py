"""All numbers of one evaluation together."""

import pytest
import torch
from torch import Tensor

from maskdm.evaluation.cached import RealFeatures
from maskdm.evaluation.distances import kernel_distance, moments
from maskdm.evaluation.measure import Comparison, headline, notes
from maskdm.evaluation.neighbours import memorisation
from maskdm.evaluation.uncertainty import halves


def drawn(seed: int, count: int, shift: float = 0.0) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)) + shift


def real(seed: int, count: int) -> RealFeatures:
    features = drawn(seed, count)
    return RealFeatures(features, moments(features))


def test_every_number_lies_in_its_interval_and_says_what_it_was_made_of() -> None:
    comparison = Comparison(drawn(0, 120, shift=1), real(1, 100), resamples=100)
    metrics = comparison.distances("FD-x", "KD-x", extrapolate=True) | comparison.neighbours(5)
    found = memorisation(comparison.generated, drawn(2, 90), comparison.reference.features)
    metrics |= comparison.memorisation(found, drawn(2, 90))
    assert list(metrics) == [
        *("FD-x", "KD-x", "FD∞-x", "precision", "recall", "density", "coverage", "memorisation", "copies"),
    ]
    for name, number in metrics.items():
        assert (number.images, number.reference_images, number.floor_images) == (120, 100, 50), name
        if name == "FD∞-x":
            assert number.low is None
        else:
            assert number.low is not None
            assert number.high is not None
            assert number.low <= number.value <= number.high, name
    assert metrics["FD-x"].value > 2 * (metrics["FD-x"].floor or 0)
    assert metrics["memorisation"].floor == pytest.approx(1, abs=0.5)


def test_floors_are_the_numbers_of_disjoint_halves_of_the_reference() -> None:
    reference = real(1, 61)
    comparison = Comparison(drawn(0, 50), reference, resamples=10, seed=3)
    number = comparison.distances("FD-x", "KD-x")["KD-x"]
    assert number.floor == kernel_distance(*halves(reference.features, 3))
    assert number.floor_images == 30


def test_without_resamples_there_are_no_intervals_and_tiny_references_have_no_floors() -> None:
    comparison = Comparison(drawn(0, 12), real(1, 3), resamples=0)
    metrics = comparison.distances("FD-x", "KD-x")
    found = memorisation(comparison.generated, drawn(2, 9), comparison.reference.features)
    assert all(number.low is None for number in comparison.memorisation(found, drawn(2, 9)).values())
    assert all(number.low is number.high is number.floor is None for number in metrics.values())
    metrics = Comparison(drawn(0, 12), real(1, 8), resamples=5).neighbours(5)
    assert all(number.floor is None and number.low is not None for number in metrics.values())


def test_with_fewer_images_than_features_the_kernel_distance_is_the_one_to_look_at() -> None:
    assert headline("FD", "KD", drawn(0, 9), drawn(1, 50)) == "FD"
    assert headline("FD", "KD", drawn(0, 8), drawn(1, 50)) == "KD"
    assert headline("FD", "KD", drawn(0, 50), drawn(1, 8)) == "KD"
    (first, second) = notes("FD", "KD", drawn(0, 8), drawn(1, 50))
    assert "there are 8 features: go by KD" in first
    assert "look at the intervals" in second
    assert notes("FD", "KD", drawn(0, 100), drawn(1, 100)) == []


def test_two_images_of_each_kind_are_enough_for_distances() -> None:
    metrics = Comparison(drawn(0, 2), real(1, 2), resamples=50).distances("FD-x", "KD-x", extrapolate=True)
    low, high = metrics["KD-x"].low, metrics["KD-x"].high
    assert low is not None
    assert high is not None
    assert low <= metrics["KD-x"].value <= high


def test_an_interval_holds_nothing_that_the_number_cannot_be() -> None:
    far = Comparison(drawn(0, 40, shift=0.6), real(1, 40), resamples=200)
    for name, number in (far.distances("FD-x", "KD-x") | far.neighbours(3)).items():
        assert number.low is not None
        assert number.high is not None
        assert name == "KD-x" or number.low >= 0, name
        assert name in ("FD-x", "KD-x", "density") or number.high <= 1, name
    same = drawn(1, 40)
    copied = Comparison(same, RealFeatures(same, moments(same)), resamples=200).distances("FD-x", "KD-x")
    assert copied["FD-x"].low == 0
    assert (copied["KD-x"].low or 0) < 0
