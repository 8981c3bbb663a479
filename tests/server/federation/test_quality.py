"""Evaluations through whole federations: when sites are asked, what becomes of their figures, and of hostile ones."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from maskdm.errors import Interrupted
from maskdm.federated.parcel import Outcome, Parcel
from maskdm.federated.plan import QualityPlan, RoundPlan
from maskdm.run.runfolder import read_lines
from maskdm.training.checkpoint import load_checkpoint
from maskdm_server.federation.events import known
from maskdm_server.federation.quality import known_line

from ..conftest import Answering, InProcess, Site, events, federate, learner, parcel

FEATURES = "a" * 64
OPTIONS: dict[str, Any] = {"evaluate": 20, "evaluate_features": FEATURES, "evaluate_steps": 5}
GOOD = {"quality_images": 10, "kernel": 0.5, "coverage": 0.25}


def evaluator(**figures: float) -> Answering:
    """Learns, and gives figures where it is asked to evaluate: a tenth of the prior's after rounds."""

    def act(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel:
        if plan.action != "evaluate":
            return learner(0.1)(plan, weights)
        changed = {"kernel": figures["kernel"] / 10} if plan.model.rounds and "kernel" in figures else {}
        return parcel(plan, {}, **{**figures, **changed})

    return act


def without_knowledge(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel:
    """A site of a version that knows no evaluation."""
    if plan.action != "evaluate":
        return learner(0.1)(plan, weights)
    code = {"outcome": int(Outcome.PLAN_REFUSED), "round": 1, "exchange": plan.exchange}
    return Parcel({}, code)


def result_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "result.json").read_text()))


def test_prior_and_final_model_are_evaluated_and_compared(folder: Path) -> None:
    link = InProcess({1: evaluator(**GOOD), 2: evaluator(**GOOD | {"quality_images": 30, "kernel": 0.1})})
    federate(link, folder, **OPTIONS)
    actions = [plan.action for plan, _ in link.sent]
    assert actions == ["evaluate", "train", "train", "train", "evaluate", "finish"]
    wanted = QualityPlan(images=20, features=FEATURES, steps=5)
    assert [plan.quality for plan, _ in link.sent if plan.action == "evaluate"] == [wanted, wanted]
    (first, sent), (last, final) = [asked for asked in link.sent if asked[0].action == "evaluate"]
    assert first.seed == last.seed
    assert all(sent[name].equal(load_checkpoint(folder / "prior.safetensors")[0][name]) for name in sent)
    assert all(final[name].equal(load_checkpoint(folder / "model.safetensors")[0][name]) for name in final)
    prior, model = read_lines(folder / "quality.jsonl")
    assert (prior["round"], model["round"]) == (0, 3)
    assert (prior["sites"], prior["quality_images"], prior["images"], prior["features"]) == (2, 40, 20, FEATURES)
    assert prior["quality"] == pytest.approx({"kernel": (10 * 0.5 + 30 * 0.1) / 40, "coverage": 0.25})
    assert model["quality"]["kernel"] == pytest.approx(prior["quality"]["kernel"] / 10)
    assert prior["by_site"]["2"] == {"quality_images": 30, "kernel": 0.1, "coverage": 0.25}
    result = result_of(folder)
    assert (result["quality_prior"], result["quality_final"]) == (prior, model)
    assert result["bytes_up"] > sum(line["bytes_up"] for line in read_lines(folder / "rounds.jsonl")) + 2 * 9 * 8
    told = [event.words() for event in known(events(folder, "quality"))]
    assert told[0] == "the prior: kernel distance 0.2, coverage 0.25 between 20 drawn images and 40 held out at 2 sites"
    assert told[1].startswith("the model of round 3: kernel distance 0.02, ")


def test_without_the_option_nobody_is_asked(folder: Path) -> None:
    link = InProcess({1: evaluator(**GOOD), 2: evaluator(**GOOD)})
    federate(link, folder)
    assert [plan.action for plan, _ in link.sent] == ["train", "train", "train", "finish"]
    assert not (folder / "quality.jsonl").exists()
    assert (result_of(folder)["quality_prior"], result_of(folder)["quality_final"]) == (None, None)


def test_sites_that_refuse_or_know_no_evaluation_train_all_the_same(folder: Path) -> None:
    federate(InProcess({1: evaluator(), 2: without_knowledge, 3: evaluator(**GOOD)}), folder, **OPTIONS)
    assert [line["clients"] for line in read_lines(folder / "rounds.jsonl")] == [3, 3, 3]
    prior, _ = read_lines(folder / "quality.jsonl")
    assert (prior["sites"], list(prior["by_site"])) == (1, ["3"])
    assert {event["site"] for event in events(folder, "rejected")} == {"2"}
    assert result_of(folder)["clients"] == 3


def test_where_no_site_gives_figures_that_is_said_and_asked_again_when_it_goes_on(folder: Path) -> None:
    federate(InProcess({1: evaluator(), 2: evaluator()}), folder, **OPTIONS)
    assert not (folder / "quality.jsonl").exists()
    told = [event.words() for event in known(events(folder, "quality"))]
    assert told[0].startswith("WARNING: no site evaluated the prior")
    link = InProcess({1: evaluator(**GOOD), 2: evaluator(**GOOD)})
    federate(link, folder, rounds=4, **OPTIONS)
    assert [plan.action for plan, _ in link.sent] == ["evaluate", "train", "evaluate", "finish"]
    assert [line["round"] for line in read_lines(folder / "quality.jsonl")] == [0, 4]


def test_a_federation_that_goes_on_evaluates_nothing_twice(folder: Path) -> None:
    def stop(number: int) -> None:
        if number == 2:
            raise Interrupted("stopped")

    sites: dict[int, Site] = {1: evaluator(**GOOD), 2: evaluator(**GOOD)}
    with pytest.raises(Interrupted):
        federate(InProcess(sites, stop), folder, **OPTIONS)
    link = InProcess(sites)
    federate(link, folder, **OPTIONS)
    assert [plan.action for plan, _ in link.sent] == ["train", "train", "evaluate", "finish"]
    assert [line["round"] for line in read_lines(folder / "quality.jsonl")] == [0, 3]
    assert result_of(folder)["quality_prior"] is not None


@pytest.mark.parametrize(
    "figures",
    [
        GOOD | {"kernel": float("nan")},
        GOOD | {"kernel": 1e12},
        GOOD | {"coverage": 1.5},
        GOOD | {"coverage": True},
        GOOD | {"quality_images": 2**62},
        GOOD | {"quality_images": 0},
        GOOD | {"accuracy": 1.0},
        {"kernel": 0.5},
    ],
)
def test_a_hostile_figure_is_rejected_with_all_that_came_with_it(folder: Path, figures: dict[str, float]) -> None:
    def hostile(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel:
        return parcel(plan, {}, **figures) if plan.action == "evaluate" else learner(0.1)(plan, weights)

    federate(InProcess({1: evaluator(**GOOD), 2: hostile}), folder, **OPTIONS)
    for line in read_lines(folder / "quality.jsonl"):
        assert list(line["by_site"]) == ["1"]
    assert {event["site"] for event in events(folder, "rejected")} == {"2"}
    assert result_of(folder)["clients"] == 2, "it may do its work all the same"


def test_a_site_that_claims_many_images_does_not_outweigh_the_others(folder: Path) -> None:
    sites: dict[int, Site] = {number: evaluator(**GOOD) for number in (1, 2, 3)}
    federate(InProcess({**sites, 4: evaluator(quality_images=2**40, kernel=-1e9)}), folder, **OPTIONS)
    assert read_lines(folder / "quality.jsonl")[0]["quality"]["kernel"] >= -1e9 * 4 / 7


def test_with_a_robust_rule_one_site_moves_no_figure_far(folder: Path) -> None:
    sites: dict[int, Site] = {number: evaluator(**GOOD) for number in (1, 2, 3)}
    options = OPTIONS | {"aggregation": "median", "min_replies": 3}
    federate(InProcess({**sites, 4: evaluator(quality_images=10, kernel=-1e9)}), folder, **options)
    assert read_lines(folder / "quality.jsonl")[0]["quality"]["kernel"] == 0.5


def test_a_federation_whose_rounds_are_done_ends_also_where_nobody_comes_back(folder: Path) -> None:
    federate(InProcess({1: evaluator(), 2: evaluator()}), folder, **OPTIONS)
    (folder / "result.json").unlink()
    federate(InProcess({}), folder, **OPTIONS)
    assert (result_of(folder)["clients"], result_of(folder)["quality_final"]) == (0, None)


def test_figures_that_nobody_asked_for_make_an_update_unusable(folder: Path) -> None:
    def talkative(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel:
        reply = learner(0.1)(plan, weights)
        return Parcel(reply.arrays, {**reply.scalars, **GOOD})

    federate(InProcess({1: learner(0.1), 2: talkative}), folder)
    assert read_lines(folder / "rounds.jsonl")[0]["rejected"] == 1
    assert "a number that was not asked for" in events(folder, "rejected")[0]["reason"]


def test_figures_of_another_way_to_evaluate_are_not_taken_for_these() -> None:
    plan = QualityPlan(images=20, features=FEATURES)
    line = {"round": 0, **plan.model_dump(mode="json"), "sites": 1}
    assert known_line([line], 0, plan) == line
    assert known_line([line, {**line, "sites": 2}], 0, plan) == {**line, "sites": 2}
    others = [QualityPlan(images=21, features=FEATURES), QualityPlan(images=20, features="b" * 64)]
    assert [known_line([line], number, other) for number, other in ((1, plan), (0, others[0]), (0, others[1]))] == [
        None
    ] * 3
