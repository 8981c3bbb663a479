"""Hostile sites among honest ones, through whole federations: the model stays near what the honest ones agree on."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from maskdm.config import Trainable
from maskdm.federated.parcel import Parcel
from maskdm.federated.plan import RoundPlan
from maskdm.run.runfolder import read_lines
from maskdm.training.checkpoint import load_checkpoint
from maskdm_server.aggregation.robust import Rule, needed

from ..conftest import Answering, InProcess, Site, events, federate, learner, parcel

ROBUST = [rule for rule in get_args(Rule) if rule != "mean"]
HONEST, ROUNDS = 6, 3
NOISE = 0.3  # of an honest update, relative to what all of them have in common


def common(plan: RoundPlan) -> dict[str, Tensor]:
    """What every honest site would learn in a round."""
    randomness = torch.Generator().manual_seed(plan.round)
    return {name: 0.1 * torch.randn(shape, generator=randomness) for name, shape in plan.shapes().items()}


def honest(seed: int) -> Answering:
    def act(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel:
        randomness = torch.Generator().manual_seed(1000 * seed + plan.round)
        update = common(plan)
        for tensor in update.values():
            tensor += NOISE * 0.1 * torch.randn(tensor.shape, generator=randomness)
        return parcel(plan, update)

    return act


def sign_flip(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel:
    return parcel(plan, {name: -2.8 * tensor for name, tensor in common(plan).items()})


def hundredfold(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel:
    return parcel(plan, {name: 100 * tensor for name, tensor in common(plan).items()})


def not_finite(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel:
    update = common(plan)
    name = sorted(update)[0] if update else ""
    return parcel(plan, {**update, name: torch.full_like(update[name], math.nan)} if update else update)


def random(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel:
    randomness = torch.Generator().manual_seed(plan.round + 5)
    return parcel(plan, {n: 0.28 * torch.randn(s, generator=randomness) for n, s in plan.shapes().items()})


HOSTILE: dict[str, Site] = {"sign flip": sign_flip, "x100": hundredfold, "NaN": not_finite, "random": random}


def run(folder: Path, prior: Mapping[str, Tensor], hostile: Mapping[int, Site], **options: Any) -> float:
    """How far the model ends from where honest sites without noise would bring it, relative to the way there."""
    link = InProcess({site: honest(site) for site in range(1, HONEST + 1)} | dict(hostile))
    federate(link, folder, rounds=ROUNDS, **options)
    weights, _ = load_checkpoint(folder / "model.safetensors")
    updates = [common(plan) for plan, _ in link.sent if plan.action == "train"]
    way = {name: sum((update[name] for update in updates), torch.zeros(())) for name in prior}
    missed = sum(float((weights[name] - prior[name] - way[name]).square().sum()) for name in prior)
    return math.sqrt(missed / sum(float(tensor.square().sum()) for tensor in way.values()))


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("rule", ROBUST)
def test_a_robust_rule_keeps_the_model_near_the_honest_mean(
    folder: Path, prior: dict[str, Tensor], rule: Rule, kind: str
) -> None:
    options: dict[str, Any] = {"aggregation": rule, "byzantine": 1, "min_replies": needed(rule, 1)}
    assert run(folder, prior, {99: HOSTILE[kind]}, **options) < 1.2 * NOISE


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("rule", ROBUST)
def test_a_robust_rule_withstands_hostile_sites_of_all_kinds_at_once(
    folder: Path, prior: dict[str, Tensor], rule: Rule, place: str
) -> None:
    """Two are found when they arrive; two are left to the rule."""
    begin = -10 if place == "first" else 100
    options: dict[str, Any] = {"aggregation": rule, "byzantine": 2, "min_replies": needed(rule, 2)}
    assert run(folder, prior, dict(enumerate(HOSTILE.values(), start=begin)), **options) < 1.2 * NOISE
    reasons = [event["reason"] for event in events(folder, "rejected") if event["round"] == 1]
    assert sorted("finite" in reason for reason in reasons) == [False, True]


@pytest.mark.parametrize("kind", ["x100", "NaN"])
@pytest.mark.parametrize("place", [0, 3, 99])
def test_the_mean_is_kept_from_what_is_far_too_long_or_not_finite_wherever_it_comes(
    folder: Path, prior: dict[str, Tensor], kind: str, place: int
) -> None:
    hostile = {place: HOSTILE[kind]} if place != 3 else {3: HOSTILE[kind], 7: honest(7)}
    assert run(folder, prior, hostile) < NOISE
    lines = read_lines(folder / "rounds.jsonl")
    assert all(line["clients"] == HONEST for line in lines)
    assert [line["rejected"] for line in lines] == [1, 1, 0], "from the second time on it rests"


@pytest.mark.parametrize("kind", ["sign flip", "random"])
def test_the_mean_is_no_defence_against_the_others(folder: Path, prior: dict[str, Tensor], kind: str) -> None:
    """Otherwise nothing was shown above."""
    assert run(folder, prior, {99: HOSTILE[kind]}) > 1.2 * NOISE


def test_a_flipped_update_that_is_let_in_is_named_in_every_round_and_no_honest_one_is(
    folder: Path, prior: dict[str, Tensor]
) -> None:
    run(folder, prior, {99: sign_flip})
    assert [(event["round"], event["site"]) for event in events(folder, "against")] == [(1, "99"), (2, "99"), (3, "99")]
    for line in read_lines(folder / "rounds.jsonl"):
        found = line["updates"]
        assert found.keys() == {"99", *(str(site) for site in range(1, HONEST + 1))}
        assert found["99"]["cosine"] < -0.9
        assert all(about["cosine"] > 0.5 for site, about in found.items() if site != "99")
        assert found["99"]["norm_ratio"] == pytest.approx(2.8, rel=0.1)


def test_a_flipped_update_ten_times_as_long_as_others_is_kept_out(folder: Path, prior: dict[str, Tensor]) -> None:
    def tenfold(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel:
        return parcel(plan, {name: -9.9 * tensor for name, tensor in common(plan).items()})

    assert run(folder, prior, {99: tenfold}) < NOISE
    assert events(folder, "against") == []


def test_a_looser_limit_of_the_norm_lets_a_long_update_in(folder: Path, prior: dict[str, Tensor]) -> None:
    def twentyfold(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel:
        return parcel(plan, {name: 20 * tensor for name, tensor in common(plan).items()})

    assert run(folder, prior, {99: twentyfold}, max_norm_ratio=1000) > 2


@pytest.mark.parametrize("train", ["norm-bias", "adapters"])
@pytest.mark.parametrize("rule", ["median", "krum"])
def test_robust_rules_work_on_parts_of_the_network_too(
    folder: Path, prior: dict[str, Tensor], rule: Rule, train: Trainable
) -> None:
    link = InProcess({site: learner(0.01) for site in range(1, 7)} | {9: learner(-0.05)})
    federate(link, folder, rounds=1, train=train, adapter_rank=2, aggregation=rule, min_replies=5)
    weights, _ = load_checkpoint(folder / "model.safetensors")
    step = 0.01 if train == "norm-bias" else 2 * 0.01**2
    moved = [weights[name] - prior[name] for name in prior if not torch.equal(weights[name], prior[name])]
    assert moved
    assert all(torch.allclose(difference, torch.full_like(difference, step), rtol=0.01) for difference in moved)
