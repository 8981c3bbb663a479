"""Weights that come must look like a model."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from maskdm.policy import SIMULATED, SitePolicy
from maskdm_client.plausible import first_lengths, lengths, problem_of_weights, remember_first


def test_a_model_and_what_training_makes_of_it_are_plausible(weights: dict[str, Tensor]) -> None:
    assert problem_of_weights(weights, None, SitePolicy()) is None
    trained = {name: 3 * tensor + 0.3 for name, tensor in weights.items()}
    assert problem_of_weights(trained, lengths(weights), SitePolicy()) is None


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("norm.weight", 11.0, r"norm\.weight is 11 long .* more than 10 \(max-weight-growth\)"),
        ("head.weight", 0.0, r"100% of head\.weight is zero, more than 50% \(max-zero-share\)"),
    ],
)
def test_a_first_model_that_drowns_everything_or_is_mostly_zero_is_none(
    weights: dict[str, Tensor], name: str, value: float, reason: str
) -> None:
    crafted = {**weights, name: torch.full_like(weights[name], value)}
    problem = problem_of_weights(crafted, None, SitePolicy())
    assert problem is not None
    assert re.search(reason, problem)
    assert name == "norm.weight" or problem_of_weights(crafted, None, SIMULATED) is None


def test_one_value_that_outweighs_all_others_is_found(weights: dict[str, Tensor]) -> None:
    table = weights["position.table"].clone()
    table[0, 0] = 1001.0
    many = {**weights, "position.table": table.repeat(1000, 1) * torch.eye(1)}
    many["position.table"][1:, 0] = 0.01
    assert "beyond 1000" in (problem_of_weights(many, None, SIMULATED) or "")


def test_later_models_are_held_against_the_first_one_of_their_federation(
    tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    assert first_lengths(tmp_path, "a") is None
    remember_first(tmp_path, "a", weights)
    remember_first(tmp_path, "b", {"other": torch.ones(3)})
    first = first_lengths(tmp_path, "a")
    assert first == pytest.approx(lengths(weights))
    grown = {**weights, "patch_embedding.weight": 100 * weights["patch_embedding.weight"]}
    assert "patch_embedding.weight is" in (problem_of_weights(grown, first, SitePolicy()) or "")
    assert problem_of_weights(grown, None, SitePolicy()) is None
