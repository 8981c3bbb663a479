"""Weights that come must look like a model, and stay near the first one."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from maskdm.federated.parcel import Outcome
from maskdm.federated.policy import SIMULATED, SitePolicy
from maskdm.metadata import CheckpointMetadata
from maskdm.run.runfolder import read_lines
from maskdm_client.work.plausible import problem_of_weights
from maskdm_client.work.virtual import answer

Ask = Callable[..., tuple[str, bytes]]


def refused(weights: dict[str, Tensor], first: dict[str, Tensor], policy: SitePolicy) -> str:
    return problem_of_weights(weights, {name: tensor.numpy() for name, tensor in first.items()}, policy) or ""


def test_a_model_and_what_training_makes_of_it_are_plausible(weights: dict[str, Tensor]) -> None:
    assert refused(weights, {}, SitePolicy()) == ""
    trained = {name: 1.5 * tensor + (0.05 if tensor.dim() == 1 else 0) for name, tensor in weights.items()}
    assert refused(trained, weights, SitePolicy()) == ""


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("norm.weight", 11.0, r"norm\.weight is 11 long"),
        ("head.weight", 0.0, r"100% of head\.weight is zero or next to it, more than 50% \(max-zero-share\)"),
    ],
)
def test_a_first_model_that_drowns_everything_or_is_mostly_zero_is_none(
    weights: dict[str, Tensor], name: str, value: float, reason: str
) -> None:
    crafted = {**weights, name: torch.full_like(weights[name], value)}
    assert re.search(reason, refused(crafted, {}, SitePolicy()))


def test_faint_noise_instead_of_zeros_is_next_to_them(weights: dict[str, Tensor]) -> None:
    table = torch.eye(64) + 1e-3 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    assert "98% of head.weight is zero or next to it" in refused({**weights, "head.weight": table}, {}, SitePolicy())


def test_one_value_that_outweighs_all_others_is_found() -> None:
    table = torch.full((1000, 100), 0.01)
    table[0, 0] = 1001.0
    assert "with values to 1e+03" in refused({"position.table": table}, {}, SIMULATED)


def test_later_models_stay_near_the_first_one(weights: dict[str, Tensor]) -> None:
    name = "patch_embedding.weight"
    moved = {**weights, name: -0.2 * weights[name]}
    assert f"{name} moved by" in refused(moved, weights, SitePolicy())
    assert refused(moved, {}, SitePolicy()) == ""
    assert refused(moved, weights, SIMULATED) == ""


def test_the_first_round_has_the_prior_that_the_terms_name_and_later_ones_what_is_near_it(
    make_site: Callable[..., Path], ask: Ask, metadata: CheckpointMetadata, weights: dict[str, Tensor]
) -> None:
    folder, prior = make_site(), ask()[1]
    named = metadata.model_copy(update={"prior_sha256": hashlib.sha256(prior).hexdigest()})
    crafted = {name: -tensor for name, tensor in weights.items()}

    def outcome(sent: dict[str, Tensor], number: int) -> int:
        return int(answer(*ask(sent, model=named, local_images=8, round=number), folder).scalars["outcome"])

    assert outcome(crafted, 1) == Outcome.PLAN_REFUSED
    assert "not the prior that the terms name" in read_lines(folder / "events.jsonl")[-1]["reason"]
    assert outcome(weights, 1) == Outcome.DONE
    assert outcome(crafted, 2) == Outcome.PLAN_REFUSED
    assert "max-weight-change" in read_lines(folder / "events.jsonl")[-1]["reason"]
    assert outcome({name: 1.1 * tensor for name, tensor in weights.items()}, 2) == Outcome.DONE


def test_a_site_that_joins_late_says_that_it_has_not_seen_the_prior(make_site: Callable[..., Path], ask: Ask) -> None:
    folder = make_site()
    for number in (2, 3):
        assert answer(*ask(local_images=8, round=number), folder).scalars["outcome"] == Outcome.DONE
    assert [line["round"] for line in read_lines(folder / "events.jsonl") if line["event"] == "joined late"] == [2]


def test_weights_that_are_only_measured_must_be_the_prior_or_near_what_was_trained(
    make_site: Callable[..., Path], ask: Ask, metadata: CheckpointMetadata, weights: dict[str, Tensor]
) -> None:
    folder, prior = make_site(), ask()[1]
    named = metadata.model_copy(update={"prior_sha256": hashlib.sha256(prior).hexdigest()})
    crafted = {name: -tensor for name, tensor in weights.items()}

    def outcome(sent: dict[str, Tensor], action: str, number: int) -> int:
        asked = ask(sent, model=named, local_images=8, round=number, action=action)
        return int(answer(*asked, folder).scalars["outcome"])

    assert outcome(weights, "finish", 2) == Outcome.POLICY, "it trained in no round"
    for number in (1, 3):
        assert outcome(crafted, "measure", number) == Outcome.PLAN_REFUSED
    assert outcome(weights, "measure", 1) == Outcome.DONE
    assert outcome(weights, "train", 1) == Outcome.DONE
    for action in ("measure", "finish"):
        assert outcome(crafted, action, 2) == Outcome.PLAN_REFUSED
        assert outcome(weights, action, 2) == Outcome.DONE


def test_frozen_weights_that_change_are_other_work_which_counts_and_has_other_draws(
    make_site: Callable[..., Path], ask: Ask, weights: dict[str, Tensor]
) -> None:
    folder = make_site(policy=SitePolicy(max_rounds_per_day=2))
    codes = []
    for number in range(3):
        other = {name: (1 + 0.01 * number) * tensor if tensor.dim() > 1 else tensor for name, tensor in weights.items()}
        codes.append(answer(*ask(other, local_images=8, train="norm-bias"), folder).scalars["outcome"])
    assert codes == [Outcome.DONE, Outcome.DONE, Outcome.POLICY]


def test_the_first_model_is_kept_as_it_came_and_a_damaged_one_is_named(
    make_site: Callable[..., Path], ask: Ask
) -> None:
    folder = make_site()
    answer(*ask(local_images=8), folder)
    (kept,) = (folder / "work").glob("first-*")
    assert kept.read_bytes() == ask()[1]
    kept.write_bytes(b"damaged")
    assert answer(*ask(local_images=8, round=2), folder).scalars["outcome"] == Outcome.POLICY
    assert f"{kept} is damaged" in read_lines(folder / "events.jsonl")[-1]["reason"]
    assert not (folder / "failures.json").exists()


def test_another_federation_does_not_make_a_site_forget_the_first_model(
    make_site: Callable[..., Path], ask: Ask, weights: dict[str, Tensor]
) -> None:
    folder = make_site()
    for federation in ("a" * 16, "b" * 16):
        answer(*ask(local_images=8, federation=federation), folder)
    crafted = {name: -tensor for name, tensor in weights.items()}
    code = answer(*ask(crafted, local_images=8, federation="a" * 16, round=2), folder).scalars["outcome"]
    assert code == Outcome.PLAN_REFUSED
