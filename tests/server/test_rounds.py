"""The round loop over a link in one process: averaging, quorum, bad replies, and going on after a stop."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from maskdm.checkpoint import CheckpointMetadata, load_checkpoint, save_checkpoint, sha256_of
from maskdm.config import ModelConfig
from maskdm.errors import FederationError, Interrupted
from maskdm.model import build_model
from maskdm.protocol import Outcome, Parcel, RoundPlan, decode_bfloat16, encode_bfloat16, from_arrays
from maskdm.runfolder import read_lines
from maskdm_server.rounds import ATTEMPTS, FederationConfig, Reply, run_federation

# What a site does with a plan and weights; None stands for a site or a transport that failed.
Site = Callable[[RoundPlan, dict[str, Tensor]], Parcel | None]


class InProcess:
    """A link to functions; `before_round` may raise, as an interruption does. A silent site never answers."""

    def __init__(self, sites: dict[int, Site], before_round: Callable[[int], None] = lambda number: None) -> None:
        self._sites = sites
        self._before_round = before_round
        self._arrived: list[Reply] = []
        self.sent: list[tuple[RoundPlan, dict[str, Tensor]]] = []

    def sites(self) -> list[int]:
        return sorted(self._sites)

    def send(self, sites: list[int], parcel: Parcel, seconds: float) -> None:
        plan = RoundPlan.model_validate_json(parcel.document)
        self._before_round(plan.round)
        weights = from_arrays(parcel.arrays)
        self.sent.append((plan, weights))
        chosen = {site: self._sites[site] for site in sites if self._sites[site] is not silent}
        self._arrived = [Reply(site, act(plan, weights)) for site, act in chosen.items()]

    def receive(self) -> Iterable[Reply]:
        arrived, self._arrived = self._arrived, []
        return arrived


def numbers(plan: RoundPlan, examples: int, loss: float = 0.5) -> dict[str, float]:
    return {
        "outcome": 0,
        "round": plan.round,
        "examples": examples,
        "images_seen": plan.local_images if plan.action == "train" else 0,
        "loss_before": loss,
        "loss_after": loss / 2,
        "seconds": 0.1,
        "skipped_steps": 0,
    }


def learner(step: float, examples: int, loss: float = 0.5) -> Site:
    """Moves every weight by `step` times the number of the round."""

    def act(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel:
        if plan.action == "finish":
            return Parcel({}, numbers(plan, examples, loss))
        update = {n: encode_bfloat16(torch.full_like(w, step * plan.round)) for n, w in weights.items()}
        return Parcel(update, numbers(plan, examples, loss))

    return act


def randomly(examples: int) -> Site:
    """An update that depends on the round and on the weights that came."""

    def act(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel:
        if plan.action == "finish":
            return Parcel({}, numbers(plan, examples))
        randomness = torch.Generator().manual_seed(plan.round * 1000 + examples)
        update = {n: 0.1 * torch.randn(w.shape, generator=randomness) - 0.1 * w for n, w in weights.items()}
        return Parcel({n: encode_bfloat16(u) for n, u in update.items()}, numbers(plan, examples))

    return act


def poisoned(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel:
    update = {name: encode_bfloat16(torch.full_like(w, float("nan"))) for name, w in weights.items()}
    return Parcel(update, numbers(plan, 1000))


def lost(plan: RoundPlan, weights: dict[str, Tensor]) -> None:
    return None


def failing(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel:
    return Parcel({}, {"outcome": int(Outcome.DATA_UNUSABLE), "round": plan.round})


def silent(plan: RoundPlan, weights: dict[str, Tensor]) -> None:
    raise AssertionError("never asked")


@pytest.fixture
def prior(tiny: ModelConfig) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in build_model(tiny, seed=1).named_parameters()}


@pytest.fixture
def folder(tmp_path: Path, prior: dict[str, Tensor], metadata: CheckpointMetadata) -> Path:
    """FED with a masked prior."""
    save_checkpoint(tmp_path / "fed" / "prior.safetensors", prior, metadata)
    return tmp_path / "fed"


def config(folder: Path, **changes: Any) -> FederationConfig:
    values = {
        "prior_sha256": sha256_of(folder / "prior.safetensors"),
        "federation": "0123456789abcdef",
        "rounds": 3,
        "local_images": 64,
        "batch_size": 8,
        "join_deadline": 0.01,
        "round_deadline": 30.0,
    }
    return FederationConfig.model_validate(values | changes)


def federate(link: InProcess, folder: Path, **changes: Any) -> None:
    run_federation(link, folder, config(folder, **changes), pause=lambda seconds: None)


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_lines(folder / "events.jsonl") if event["event"] == kind]


def test_the_model_becomes_the_prior_and_the_weighted_mean_of_every_round(
    folder: Path, prior: dict[str, Tensor]
) -> None:
    federate(InProcess({1: learner(0.5, 100), 2: learner(-0.25, 300)}), folder)
    moved = (0.5 * 100 - 0.25 * 300) / 400 * (1 + 2 + 3)
    weights, _ = load_checkpoint(folder / "model.safetensors")
    for name in prior:
        assert weights[name] == pytest.approx(prior[name] + moved, abs=1e-6)


def test_every_round_starts_from_the_model_of_the_round_before(folder: Path) -> None:
    link = InProcess({1: randomly(10), 2: randomly(30)})
    federate(link, folder)
    assert [(plan.action, plan.round) for plan, _ in link.sent] == [
        ("train", 1),
        ("train", 2),
        ("train", 3),
        ("finish", 3),
    ]
    for (plan, weights), (_, following) in zip(link.sent[:3], link.sent[1:], strict=True):
        updates = []
        for examples in (10, 30):
            parcel = randomly(examples)(plan, weights)
            assert parcel is not None
            updates.append({n: decode_bfloat16(a).double() for n, a in parcel.arrays.items()})  # type: ignore[arg-type]
        for name in weights:
            expected = weights[name].double() + (10 * updates[0][name] + 30 * updates[1][name]) / 40
            assert following[name].double() == pytest.approx(expected, abs=1e-6)


def test_the_final_model_says_where_it_comes_from(folder: Path, metadata: CheckpointMetadata) -> None:
    federate(InProcess({1: learner(0.1, 10), 2: learner(0.1, 10)}), folder)
    _, description = load_checkpoint(folder / "model.safetensors")
    assert description.prior_sha256 == sha256_of(folder / "prior.safetensors")
    assert description.rounds == 3
    assert description.images_seen == metadata.images_seen + 3 * 2 * 64
    assert (description.mask.kind, description.effective_mask_ratio) == ("none", 0.0)
    assert description.model == metadata.model


def test_the_journal_and_the_result_hold_what_happened(folder: Path, prior: dict[str, Tensor]) -> None:
    federate(InProcess({1: learner(0.1, 100, loss=1.0), 2: learner(0.1, 300, loss=2.0)}), folder)
    lines = read_lines(folder / "rounds.jsonl")
    parameters = sum(tensor.numel() for tensor in prior.values())
    assert [line["round"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert (line["clients"], line["examples"], line["images_seen"]) == (2, 400, 128)
        assert (line["rejected"], line["silent"]) == (0, 0)
        assert line["loss_before"] == pytest.approx(1.75)
        assert line["loss_after"] == pytest.approx(0.875)
        assert line["bytes_up"] == 2 * (2 * parameters + 8 * 8)
        assert line["bytes_down"] >= 2 * 4 * parameters
    result = json.loads((folder / "result.json").read_text())
    assert (result["rounds"], result["clients"]) == (3, 2)
    assert result["loss_prior"] == result["loss_final"] == pytest.approx(1.75)
    assert result["bytes_up"] == sum(line["bytes_up"] for line in lines) + 2 * 8 * 8


def test_a_federation_that_was_stopped_goes_on_to_the_same_model(
    folder: Path, tmp_path: Path, prior: dict[str, Tensor], metadata: CheckpointMetadata
) -> None:
    sites: dict[int, Site] = {1: randomly(10), 2: randomly(30)}
    save_checkpoint(tmp_path / "whole" / "prior.safetensors", prior, metadata)
    federate(InProcess(sites), tmp_path / "whole", rounds=5)

    def stop(number: int) -> None:
        if number == 4:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        federate(InProcess(sites, before_round=stop), folder, rounds=5)
    assert load_checkpoint(folder / "model.safetensors")[1].rounds == 3
    link = InProcess(sites)
    federate(link, folder, rounds=5)
    assert [plan.round for plan, _ in link.sent] == [4, 5, 5]
    stopped, whole = (load_checkpoint(path / "model.safetensors")[0] for path in (folder, tmp_path / "whole"))
    assert all(torch.equal(stopped[name], whole[name]) for name in whole)
    assert [line["round"] for line in read_lines(folder / "rounds.jsonl")] == [1, 2, 3, 4, 5]


def test_a_line_of_a_round_whose_model_was_never_saved_is_dropped(folder: Path) -> None:
    sites: dict[int, Site] = {1: randomly(10), 2: randomly(30)}
    federate(InProcess(sites), folder, rounds=2)
    (folder / "rounds" / "00002.safetensors").unlink()
    federate(InProcess(sites), folder, rounds=2)
    assert [line["round"] for line in read_lines(folder / "rounds.jsonl")] == [1, 2]


def test_the_journal_of_models_keeps_the_last_two_rounds(folder: Path) -> None:
    federate(InProcess({1: learner(0.1, 10), 2: learner(0.1, 10)}), folder, rounds=4)
    assert sorted(p.name for p in (folder / "rounds").iterdir()) == ["00003.safetensors", "00004.safetensors"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (poisoned, "is not finite"),
        (lost, "the site was lost or its work failed"),
        (failing, "the site reports DATA_UNUSABLE"),
    ],
)
def test_a_bad_reply_is_counted_and_explained_and_does_not_touch_the_model(
    folder: Path, prior: dict[str, Tensor], bad: Site, reason: str
) -> None:
    federate(InProcess({1: learner(0.5, 100), 7: bad}), folder, rounds=1)
    (line,) = read_lines(folder / "rounds.jsonl")
    assert (line["clients"], line["rejected"], line["examples"]) == (1, 1, 100)
    rejected = events(folder, "rejected")[0]
    assert (rejected["site"], rejected["round"]) == ("7", 1)
    assert reason in rejected["reason"]
    weights, _ = load_checkpoint(folder / "model.safetensors")
    assert all(np.allclose(weights[name], prior[name] + 0.5, atol=1e-6) for name in prior)


def test_a_round_ends_at_its_deadline_without_the_silent_sites(folder: Path, prior: dict[str, Tensor]) -> None:
    federate(InProcess({1: learner(0.5, 100), 2: silent}), folder, rounds=1, round_deadline=0.05)
    (line,) = read_lines(folder / "rounds.jsonl")
    assert (line["clients"], line["silent"], line["rejected"]) == (1, 1, 0)
    weights, _ = load_checkpoint(folder / "model.safetensors")
    assert all(np.allclose(weights[name], prior[name] + 0.5, atol=1e-6) for name in prior)


def test_too_few_good_replies_end_the_run_and_the_last_good_model_stays(folder: Path, prior: dict[str, Tensor]) -> None:
    def good_once(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel | None:
        return learner(0.5, 100)(plan, weights) if plan.round == 1 else poisoned(plan, weights)

    link = InProcess({1: learner(0.5, 100), 2: good_once})
    with pytest.raises(FederationError, match=r"round 2: fewer than 2 usable updates came in 3 attempts"):
        federate(link, folder, min_replies=2)
    assert [plan.round for plan, _ in link.sent] == [1] + [2] * ATTEMPTS
    assert [(event["round"], event["accepted"], event["needed"]) for event in events(folder, "retry")] == [
        (2, 1, 2)
    ] * ATTEMPTS
    weights, description = load_checkpoint(folder / "model.safetensors")
    assert description.rounds == 1
    assert all(np.allclose(weights[name], prior[name] + 0.5, atol=1e-6) for name in prior)
    assert not (folder / "result.json").exists()


def test_an_attempt_below_quorum_leaves_nothing_behind_in_the_next_one(folder: Path, prior: dict[str, Tensor]) -> None:
    calls: list[int] = []

    def late(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel | None:
        calls.append(plan.round)
        return None if len(calls) == 1 else learner(0.25, 100)(plan, weights)

    federate(InProcess({1: learner(0.5, 100), 2: late}), folder, rounds=1, min_replies=2)
    weights, _ = load_checkpoint(folder / "model.safetensors")
    assert all(np.allclose(weights[name], prior[name] + 0.375, atol=1e-6) for name in prior)
    assert len(read_lines(folder / "rounds.jsonl")) == 1


def test_a_federation_does_not_start_with_too_few_clients(folder: Path) -> None:
    link = InProcess({1: learner(0.5, 100)})
    with pytest.raises(FederationError, match=r"only 1 of 2 clients joined"):
        federate(link, folder)
    assert link.sent == []
    assert [(event["clients"], event["needed"]) for event in events(folder, "waiting")] == [(1, 2)]


def test_every_site_is_offered_the_final_model_even_if_none_answers(folder: Path) -> None:
    def leaves(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel | None:
        return learner(0.5, 100)(plan, weights) if plan.action == "train" else None

    link = InProcess({1: leaves, 2: leaves})
    federate(link, folder, rounds=1)
    plan, weights = link.sent[-1]
    assert plan.action == "finish"
    final, _ = load_checkpoint(folder / "model.safetensors")
    assert all(torch.equal(weights[name], final[name]) for name in final)
    assert json.loads((folder / "result.json").read_text())["loss_final"] is None
