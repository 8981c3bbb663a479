"""Directions by sketches: near the exact cosines, whatever the shape of the weights."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity

from maskdm_server.aggregation.directions import AGAINST, BLOCK, COORDINATES, Sketch, cosines

ERROR = 1 / math.sqrt(COORDINATES)


def sketched(seed: int, *differences: Tensor) -> Tensor:
    sketch = Sketch(seed)
    for difference in differences:
        sketch.add(difference)
    return sketch.values


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_what_fits_is_kept_whole() -> None:
    values = drawn(0, 3, 1000)
    assert torch.equal(sketched(5, values).abs()[:3000], values.view(-1).abs())
    assert float(sketched(5, values).norm()) == pytest.approx(float(values.norm()))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_an_update_and_its_negative_are_exactly_opposite(kind: torch.dtype) -> None:
    parts = [drawn(1, 300, 700).to(kind), drawn(2, 5).to(kind)]
    first, second = sketched(3, *parts), sketched(3, *(-2 * part for part in parts))
    assert cosines({1: first, 2: second}) == pytest.approx({1: -1, 2: -1})


@pytest.mark.parametrize("exact", [-0.9, -0.3, 0.0, 0.2, 0.99])
@pytest.mark.parametrize("shape", [(BLOCK + 4321,), (1500, 1024), (4000, 256), (64, 4 * COORDINATES)])
def test_sketches_have_the_cosine_of_what_they_stand_for(shape: tuple[int, ...], exact: float) -> None:
    first, noise = drawn(1, *shape), drawn(2, *shape)
    noise -= first * (first * noise).sum() / first.square().sum()
    second = exact * first / first.norm() + math.sqrt(1 - exact**2) * noise / noise.norm()
    assert cosines({1: sketched(9, first), 2: sketched(9, second)})[1] == pytest.approx(exact, abs=5 * ERROR)


def test_energy_in_one_column_of_a_weight_is_spread_too() -> None:
    """With places by column these two would be read from a hundred numbers, an error of 0.1."""
    first, second = torch.zeros(20_000, 1024), torch.zeros(20_000, 1024)
    first[:, 7], second[:, 7] = drawn(1, 20_000), drawn(2, 20_000)
    exact = float(cosine_similarity(first[:, 7], second[:, 7], dim=0))
    assert cosines({1: sketched(4, first), 2: sketched(4, second)})[1] == pytest.approx(exact, abs=5 * ERROR)


def test_many_small_weights_do_not_share_their_places() -> None:
    first, second = [drawn(i, 8) for i in range(4000)], [drawn(10_000 + i, 8) for i in range(4000)]
    exact = float(cosine_similarity(torch.cat(first), torch.cat(second), dim=0))
    assert cosines({1: sketched(4, *first), 2: sketched(4, *second)})[1] == pytest.approx(exact, abs=5 * ERROR)


def test_the_error_is_what_is_said_of_it() -> None:
    first, second = drawn(1, 100_000), drawn(2, 100_000)
    exact = float(cosine_similarity(first, second, dim=0))
    found = [cosines({1: sketched(seed, first), 2: sketched(seed, second)})[1] for seed in range(200)]
    errors = torch.tensor([value - exact for value in found if value is not None])
    assert float(errors.square().mean().sqrt()) == pytest.approx(ERROR, rel=0.25)
    assert abs(float(errors.mean())) < 4 * ERROR / math.sqrt(200)
    assert float(errors.abs().max()) < abs(AGAINST), "honest updates that are perpendicular raise no alarm"


def test_who_knows_the_signs_of_another_round_hides_nothing() -> None:
    """With the right ones a vector of a hundredth of the length turns what the sketch says; with others it does not."""
    honest = drawn(1, 100 * COORDINATES * COORDINATES // COORDINATES)
    signs = Sketch(7)._signs(len(honest))
    wanted = -2 * sketched(7, -honest)  # to be added to the sketch of the flipped update
    addition = signs * wanted.repeat(100)[: len(honest)] / 100
    flipped = addition - honest
    assert float(addition.norm()) < 0.3 * float(honest.norm())
    assert cosines({1: sketched(7, honest), 2: sketched(7, flipped)})[2] == pytest.approx(1, abs=1e-3)
    assert (cosines({1: sketched(8, honest), 2: sketched(8, flipped)})[2] or 0) < -0.9


def test_others_that_cancel_have_no_direction_and_one_alone_has_no_others() -> None:
    first = drawn(1, 500)
    sketches = {1: sketched(0, first), 2: sketched(0, -first), 3: sketched(0, drawn(2, 500))}
    assert cosines(sketches)[3] is None
    assert cosines({1: sketches[1]}) == {1: None}
    assert cosines({}) == {}


@settings(max_examples=20)
@given(honest=st.integers(2, 8), length=st.floats(0.1, 1000), seed=st.integers(0, 2**31))
def test_however_long_a_flipped_update_is_it_is_the_one_that_is_named(honest: int, length: float, seed: int) -> None:
    """From three honest sites on; with two, one of them and the flipped one cancel."""
    common = drawn(seed, 2000)
    sketches = {i: sketched(1, common + 0.5 * drawn(seed + i, 2000)) for i in range(1, honest + 2)}
    found = cosines(sketches | {0: sketched(1, -length * common)})
    assert found[0] is not None
    assert found[0] < -0.8
    assert all(value is not None and value > 0.3 for site, value in found.items() if site)
