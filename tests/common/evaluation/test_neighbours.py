"""Precision, recall, density, coverage and memorisation against brute force and the papers' own cases."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskdm.evaluation import neighbours
from maskdm.evaluation.neighbours import memorisation, nearest, neighbourhoods


def drawn(seed: int, count: int, features: int = 4, shift: float = 0.0) -> Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed)) + shift


def scores(generated: Tensor, reference: Tensor, k: int = 5) -> dict[str, float]:
    return {name: float(v.mean()) for name, v in neighbourhoods(generated, reference, k)._asdict().items()}


@given(st.integers(0, 1000), st.integers(4, 20), st.integers(4, 20), st.integers(1, 3), st.floats(0, 2))
def test_each_score_is_that_of_its_definition(seed: int, n: int, m: int, k: int, shift: float) -> None:
    generated, reference = drawn(seed, n).numpy(), drawn(seed + 1, m, shift=shift).numpy()

    def reach(points: np.ndarray, i: int) -> float:
        others = [float(np.linalg.norm(points[i] - points[j])) for j in range(len(points)) if j != i]
        return sorted(others)[k - 1]

    def inside(point: np.ndarray, points: np.ndarray, i: int) -> bool:
        return float(np.linalg.norm(point - points[i])) <= reach(points, i)

    expected = {
        "precision": np.mean([any(inside(y, reference, i) for i in range(m)) for y in generated]),
        "recall": np.mean([any(inside(x, generated, j) for j in range(n)) for x in reference]),
        "density": np.sum([inside(y, reference, i) for y in generated for i in range(m)]) / (k * n),
        "coverage": np.mean([any(inside(y, reference, i) for y in generated) for i in range(m)]),
    }
    assert scores(torch.from_numpy(generated), torch.from_numpy(reference), k) == pytest.approx(expected)


def test_images_of_the_same_kind_score_high_and_others_nought() -> None:
    same = scores(drawn(0, 500), drawn(1, 500))
    assert min(same["precision"], same["recall"], same["coverage"]) > 0.9
    assert same["density"] == pytest.approx(1, abs=0.1)  # its expectation where both are alike, section 3.3
    assert set(scores(drawn(0, 500), drawn(1, 500, shift=50)).values()) == {0.0}


def test_one_outlier_among_real_images_lifts_precision_but_not_density() -> None:
    """Figure 2 of Naeem et al.: generated images around an outlier lie in its huge neighbourhood."""
    reference = torch.cat([drawn(0, 200), torch.full((1, 4), 12.0)])
    generated = drawn(1, 200, shift=8)
    found = scores(generated, reference)
    assert found["precision"] > 0.9
    assert found["density"] < 0.25


def test_a_mode_that_is_never_drawn_is_missing_from_coverage_and_recall() -> None:
    reference = torch.cat([drawn(0, 200), drawn(1, 200, shift=30)])
    found = scores(drawn(2, 400), reference)
    assert found["precision"] > 0.9
    assert found["coverage"] == pytest.approx(0.5, abs=0.05)
    assert found["recall"] == pytest.approx(0.5, abs=0.05)


def test_parts_of_any_size_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    generated, reference = drawn(0, 50), drawn(1, 60, shift=0.5)
    whole, near = scores(generated, reference), nearest(generated, reference)
    monkeypatch.setattr(neighbours, "PART", 130)
    assert scores(generated, reference) == whole
    assert nearest(generated, reference).row.equal(near.row)


def test_the_nearest_is_found_and_copies_have_distance_nought_however_long_their_features() -> None:
    others = drawn(0, 100) * 1e-3 + 1000
    features = torch.cat([others[[7, 93]], drawn(1, 20) * 1e-3 + 1000])
    found = nearest(features, others)
    assert found.row[:2].tolist() == [7, 93]
    assert found.distance[:2].tolist() == [0, 0]
    exact = (features[:, None].double() - others[None].double()).norm(dim=2).min(dim=1)
    assert torch.allclose(found.distance, exact.values, rtol=1e-6)


@pytest.mark.parametrize(("training", "held_out"), [(2000, 200), (200, 2000), (500, 500)])
def test_a_model_that_learned_nothing_by_heart_gets_one_whatever_the_sizes(training: int, held_out: int) -> None:
    found = memorisation(drawn(0, 4000), drawn(1, training), drawn(2, held_out))
    assert found.ratio == pytest.approx(1, abs=0.15)


def test_copies_of_training_images_are_all_found() -> None:
    training, held_out = drawn(1, 2000), drawn(2, 200)
    generated = torch.cat([training[:30] + 1e-4, drawn(3, 170)])
    found = memorisation(generated, training, held_out)
    assert float(found.copies[:30].mean()) == 1
    assert float(found.copies[30:].mean()) < 0.1
    assert found.row[:30].tolist() == list(range(30))
    assert found.distances.argsort()[:30].sort().values.tolist() == list(range(30))


@pytest.mark.parametrize("held_out", [37, 300, 2400])
def test_a_model_of_nothing_but_copies_gets_nought_whatever_the_sizes(held_out: int) -> None:
    training = drawn(1, 300)
    assert memorisation(training + 1e-4, training, drawn(2, held_out)).ratio == 0


@pytest.mark.parametrize("copied", [0.25, 0.5])
def test_copies_among_other_samples_lower_it_by_their_share(copied: float) -> None:
    training, count = drawn(1, 1600), round(2000 * copied)
    generated = torch.cat([training[torch.arange(count) % 1600] + 1e-4, drawn(3, 2000 - count)])
    assert memorisation(generated, training, drawn(2, 200)).ratio == pytest.approx(1 - copied, abs=0.15)


def test_images_that_are_in_both_sets_are_no_sign_of_memorisation() -> None:
    images = drawn(1, 50)
    found = memorisation(images, images, images)
    assert found.ratio == 1
    assert float(found.copies.sum()) == 0
    assert bool(memorisation(images, drawn(2, 50), images).distances.isfinite().all())
