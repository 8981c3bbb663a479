"""The round loop over a link in one process: averaging, quorum, bad replies, patience, and going on after a stop."""

import errno
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from maskdm.config import Trainable
from maskdm.errors import FederationError, Interrupted
from maskdm.federated import auditlog
from maskdm.federated.auditlog import verify
from maskdm.federated.encoding import decode
from maskdm.federated.parcel import REPORT_NAMES, Outcome, Parcel
from maskdm.federated.plan import RoundPlan, work_key
from maskdm.metadata import CheckpointMetadata
from maskdm.networks.trainable import changed_weights
from maskdm.run import runfolder
from maskdm.run.runfolder import atomic_write, read_lines, sha256_of
from maskdm.training.checkpoint import load_checkpoint
from maskdm_server.aggregation import updates as aggregation
from maskdm_server.federation import journal as journalling
from maskdm_server.federation.journal import Known
from maskdm_server.federation.rounds import PAUSES, Rounds
from maskdm_server.federation.selection import Standing
from maskdm_server.federation.transport import Question, Reply
from maskdm_server.federation.writing import DISK_SECONDS

from ..conftest import (
    Answering,
    InProcess,
    Site,
    Time,
    config,
    drawing,
    events,
    federate,
    learner,
    numbers,
    parcel,
    silent,
    weights_of,
)

NewFolder = Callable[[str], Path]


def poisoned(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel:
    return parcel(plan, {name: torch.full(shape, float("nan")) for name, shape in plan.shapes().items()})


def lost(plan: RoundPlan, weights: dict[str, Tensor]) -> None:
    return None


def failing(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel:
    numbers = {"outcome": int(Outcome.DATA_UNUSABLE), "round": plan.round, "exchange": plan.exchange}
    return Parcel({}, numbers)


def measuring(losses: list[float]) -> Answering:
    """Measures, before it trains, losses[n] on the model of round n."""

    def act(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel:
        number = plan.round - 1 if plan.action == "train" else plan.model.rounds
        return learner(0.5, loss_before=losses[number])(plan, weights)

    return act


def result_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "result.json").read_text()))


def assert_moved(folder: Path, prior: dict[str, Tensor], step: float) -> None:
    weights, _ = load_checkpoint(folder / "model.safetensors")
    assert all(np.allclose(weights[name], prior[name] + step, atol=1e-6) for name in prior)


def assert_same_model(first: Path, second: Path) -> None:
    weights, _ = load_checkpoint(first / "model.safetensors")
    others, _ = load_checkpoint(second / "model.safetensors")
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []


def test_the_model_becomes_the_prior_and_the_mean_of_every_round_weighted_by_images_seen(
    folder: Path, prior: dict[str, Tensor]
) -> None:
    sites = {1: learner(0.5, images_seen=16, examples=900), 2: learner(-0.25, images_seen=48, examples=1)}
    federate(InProcess(sites), folder)
    assert_moved(folder, prior, (0.5 * 16 - 0.25 * 48) / 64 * (1 + 2 + 3))


def test_every_round_starts_from_the_model_of_the_round_before(folder: Path) -> None:
    sites = {1: drawing(10, images_seen=16), 2: drawing(30, images_seen=48)}
    link = InProcess(sites)
    federate(link, folder)
    expected = [("train", 1), ("train", 2), ("train", 3), ("finish", 3)]
    assert [(plan.action, plan.round) for plan, _ in link.sent] == expected
    for (plan, weights), (_, following) in zip(link.sent[:3], link.sent[1:], strict=True):
        updates = []
        for site in sites.values():
            reply = site(plan, weights)
            assert reply is not None
            shapes = plan.shapes()
            updates.append({name: decode(reply.arrays, name, shapes[name], "bf16").double() for name in shapes})
        for name in weights:
            moved = weights[name].double() + (16 * updates[0][name] + 48 * updates[1][name]) / 64
            assert following[name].double() == pytest.approx(moved, abs=1e-6)


def test_the_final_model_says_where_it_comes_from(folder: Path, small: CheckpointMetadata) -> None:
    federate(InProcess({1: learner(0.1), 2: learner(0.1)}), folder)
    _, description = load_checkpoint(folder / "model.safetensors")
    assert description.prior_sha256 == sha256_of(folder / "prior.safetensors")
    assert description.rounds == 3
    assert description.images_seen == small.images_seen + 3 * 2 * 64
    assert (description.mask.kind, description.effective_mask_ratio) == ("none", 0.0)
    assert description.model == small.model


def test_rounds_and_result_say_what_happened(folder: Path, prior: dict[str, Tensor]) -> None:
    sites = {1: learner(0.1, images_seen=16, loss_before=1.0), 2: learner(0.1, images_seen=48, loss_before=2.0)}
    federate(InProcess(sites), folder)
    lines = read_lines(folder / "rounds.jsonl")
    parameters = sum(tensor.numel() for tensor in prior.values())
    report = 8 * len(REPORT_NAMES)
    assert [line["round"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert (line["clients"], line["examples"], line["images_seen"]) == (2, 20, 64)
        assert (line["rejected"], line["silent"], line["late"], line["attempts"]) == (0, 0, 0, 1)
        assert line["loss_before"] == pytest.approx(1.5), "by images held, which are equal, not by images seen"
        assert line["loss_after"] == pytest.approx(0.25)
        assert line["bytes_up"] == 2 * (2 * parameters + report)
        assert line["bytes_down"] > 2 * 4 * parameters
    result = result_of(folder)
    assert (result["rounds"], result["clients"], result["model_of_round"]) == (3, 2, 3)
    assert result["loss_prior"] == pytest.approx(1.5)
    assert result["loss_final"] == pytest.approx(1.5)  # of numbers alone every site's examples count
    assert result["bytes_up"] == sum(line["bytes_up"] for line in lines) + 2 * report
    assert result["bytes_down"] > sum(line["bytes_down"] for line in lines)
    (start,) = events(folder, "start")
    assert start["bytes_up"] == 2 * parameters
    assert start["bytes_down"] == (folder / "prior.safetensors").stat().st_size


@pytest.mark.parametrize("stopped_in", [1, 2, 4, 5])
def test_a_federation_that_was_stopped_goes_on_to_the_same_model(new_folder: NewFolder, stopped_in: int) -> None:
    sites: dict[int, Site] = {1: drawing(10), 2: drawing(30)}
    whole, stopped = new_folder("whole"), new_folder("stopped")
    federate(InProcess(sites), whole, rounds=5)

    def stop(number: int) -> None:
        if number == stopped_in:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        federate(InProcess(sites, before_round=stop), stopped, rounds=5)
    assert not (stopped / "result.json").exists()
    link = InProcess(sites)
    federate(link, stopped, rounds=5)
    assert [plan.round for plan, _ in link.sent] == [*range(stopped_in, 6), 5]
    assert_same_model(stopped, whole)
    assert [line["round"] for line in read_lines(stopped / "rounds.jsonl")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("optimizer", ["fedavgm", "fedadam", "fedyogi"])
def test_moments_average_and_what_is_known_of_clients_survive_a_restart_after_every_round(
    new_folder: NewFolder, optimizer: str
) -> None:
    """One of the sites fails in the first two rounds, so that standings matter too."""

    def late_riser(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel:
        return failing(plan, weights) if plan.round <= 2 and plan.action == "train" else drawing(3)(plan, weights)

    sites: dict[int, Site] = {1: drawing(1, images_seen=8), 2: drawing(2), 3: late_riser, 4: drawing(4)}
    options: dict[str, Any] = {
        "server_optimizer": optimizer,
        "server_lr": 0.05,
        "server_ema": 0.9,
        "rounds": 4,
        "clients_per_round": 3,
    }
    whole, stopped = new_folder("whole"), new_folder("stopped")
    link = InProcess(sites)
    federate(link, whole, **options)

    def stop(number: int) -> None:
        if last is not None and number > last:
            raise Interrupted("stopped")

    asked: list[tuple[int, list[int]]] = []
    for last in (1, 2, 3, None):
        again = InProcess(sites, before_round=stop)
        try:
            federate(again, stopped, **options)
        except Interrupted:
            assert last is not None
        asked += again.asked
    assert asked == link.asked
    assert_same_model(stopped, whole)
    raw = "rounds/000004.safetensors"
    assert all(
        torch.equal(tensor, load_checkpoint(stopped / raw)[0][name])
        for name, tensor in load_checkpoint(whole / raw)[0].items()
    )
    first, second = (
        [{k: v for k, v in line.items() if k != "seconds"} for line in read_lines(path / "rounds.jsonl")]
        for path in (whole, stopped)
    )
    assert [line["rejected"] for line in first] != [0, 0, 0, 0]
    assert first == second


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_same_work_is_asked_for_after_a_restart_in_the_middle_of_a_round(new_folder: NewFolder, ema: float) -> None:
    """A site that has begun it must not begin anew."""
    folder = new_folder("fed")
    keys: list[str] = []

    def stop(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel:
        if plan.round == 2:
            keys.append(work_key(plan, []))
            if len(keys) == 1:
                raise Interrupted("stopped")
        return learner(0.5)(plan, weights)

    with pytest.raises(Interrupted):
        federate(InProcess({1: stop, 2: learner(0.5)}), folder, rounds=2, server_ema=ema)
    federate(InProcess({1: stop, 2: learner(0.5)}), folder, rounds=2, server_ema=ema)
    assert keys[0] == keys[1]


def test_a_finished_federation_goes_on_with_more_rounds_as_if_it_had_never_ended(new_folder: NewFolder) -> None:
    sites: dict[int, Site] = {1: drawing(10), 2: drawing(30)}
    once, twice = new_folder("once"), new_folder("twice")
    federate(InProcess(sites), once, rounds=4)
    federate(InProcess(sites), twice, rounds=2)
    federate(InProcess(sites), twice, rounds=4)
    assert_same_model(once, twice)


def test_a_round_whose_model_is_gone_is_done_again(folder: Path) -> None:
    sites: dict[int, Site] = {1: drawing(10), 2: drawing(30)}
    federate(InProcess(sites), folder, rounds=2)
    before, _ = load_checkpoint(folder / "model.safetensors")
    (folder / "rounds" / "000002.safetensors").unlink()
    link = InProcess(sites)
    federate(link, folder, rounds=2)
    assert [plan.round for plan, _ in link.sent] == [2, 2]
    assert [line["round"] for line in read_lines(folder / "rounds.jsonl")] == [1, 2]
    after, _ = load_checkpoint(folder / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (poisoned, "is not finite"),
        (lost, "the site was lost"),
        (failing, "the site reports DATA_UNUSABLE"),
    ],
)
def test_a_bad_reply_is_counted_and_explained_and_does_not_touch_the_model(
    folder: Path, prior: dict[str, Tensor], bad: Site, reason: str
) -> None:
    federate(InProcess({1: learner(0.5, examples=100), 7: bad}), folder, rounds=1)
    (line,) = read_lines(folder / "rounds.jsonl")
    assert (line["clients"], line["rejected"], line["examples"]) == (1, 1, 100)
    rejected = events(folder, "rejected")[0]
    assert (rejected["site"], rejected["round"]) == ("7", 1)
    assert reason in rejected["reason"]
    assert_moved(folder, prior, 0.5)


def test_a_round_ends_at_its_deadline_without_the_silent_sites(folder: Path, prior: dict[str, Tensor]) -> None:
    time = Time()
    federate(InProcess({1: learner(0.5), 2: silent}), folder, time, rounds=1, round_deadline=50)
    (line,) = read_lines(folder / "rounds.jsonl")
    assert (line["clients"], line["silent"], line["rejected"]) == (1, 1, 0)
    assert 50 < line["seconds"] < 52
    assert_moved(folder, prior, 0.5)


def test_too_few_good_replies_end_the_run_and_the_last_good_model_stays(folder: Path, prior: dict[str, Tensor]) -> None:
    def good_once(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel:
        return learner(0.5)(plan, weights) if plan.round == 1 else poisoned(plan, weights)

    link = InProcess({1: learner(0.5), 2: good_once})
    with pytest.raises(FederationError, match=r"round 2: fewer than 2 usable updates came in 3 attempts"):
        federate(link, folder, min_replies=2)
    assert [plan.round for plan, _ in link.sent] == [1] + [2] * len(PAUSES)
    retries = [(event["round"], event["accepted"], event["needed"]) for event in events(folder, "retry")]
    assert retries == [(2, 1, 2)] * len(PAUSES)
    assert_moved(folder, prior, 0.5)
    assert load_checkpoint(folder / "model.safetensors")[1].rounds == 1
    assert not (folder / "result.json").exists()


def test_an_attempt_below_quorum_leaves_nothing_behind_in_the_next_one(folder: Path, prior: dict[str, Tensor]) -> None:
    calls: list[int] = []

    def late(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel | None:
        calls.append(plan.exchange)
        return poisoned(plan, weights) if len(calls) == 1 else learner(0.25)(plan, weights)

    federate(InProcess({1: learner(0.5), 2: late}), folder, rounds=1, min_replies=2)
    assert_moved(folder, prior, 0.375)
    (line,) = read_lines(folder / "rounds.jsonl")
    assert (line["attempts"], line["clients"], line["rejected"]) == (2, 2, 1)
    assert len(set(calls)) == len(calls), "every attempt is an exchange of its own"
    assert not (folder / ".updates").exists()


def test_between_attempts_there_is_time_for_a_short_trouble_to_pass(folder: Path) -> None:
    time, begun = Time(), list[float]()

    def troubled(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel:
        begun.append(time.now)
        return poisoned(plan, weights)

    with pytest.raises(FederationError):
        federate(InProcess({1: troubled, 2: troubled}), folder, time)
    first, second, third = begun[::2]
    assert second - first >= 10
    assert third - second >= 30


def test_another_attempt_asks_another_sample_and_the_last_one_also_those_that_rest(folder: Path) -> None:
    def broken(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel:
        return learner(0.5)(plan, weights) if plan.round == 1 else poisoned(plan, weights)

    link = InProcess(dict.fromkeys(range(1, 9), broken))
    with pytest.raises(FederationError):
        federate(link, folder, clients_per_round=3, min_replies=3)
    first, second, third = (set(asked) for number, asked in link.asked if number == 2)
    assert len({frozenset(sample) for sample in (first, second, third)}) == 3
    assert all(len(sample) == 3 for sample in (first, second, third))

    resting = InProcess({1: lost, 2: learner(0.5)})
    known = Known(standings={2: Standing(failures=3, rests_until=9)})
    rounds = Rounds(resting, folder, config(folder, min_replies=1), lambda seconds: None, Time().clock)
    rounds.journal.known = known
    rounds._began = True
    rounds.next_round()
    assert [asked for _, asked in resting.asked if 2 in asked] == [[1, 2]]


def test_what_all_attempts_cost_is_counted(folder: Path) -> None:
    calls: list[int] = []

    def late(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel:
        calls.append(plan.exchange)
        return poisoned(plan, weights) if len(calls) == 1 else learner(0.25)(plan, weights)

    federate(InProcess({1: learner(0.5), 2: late}), folder, rounds=2, min_replies=2)
    twice, once = read_lines(folder / "rounds.jsonl")
    assert (twice["attempts"], once["attempts"]) == (2, 1)
    for cost in ("bytes_down", "bytes_up"):
        assert twice[cost] == pytest.approx(2 * once[cost], rel=0.1)


def test_a_federation_does_not_start_with_too_few_clients(folder: Path) -> None:
    link = InProcess({1: learner(0.5)})
    time = Time()
    with pytest.raises(FederationError, match=r"only 1 of 2 clients joined in 60 s \(--join-deadline\)"):
        federate(link, folder, time)
    assert link.sent == []
    assert [(event["clients"], event["needed"]) for event in events(folder, "waiting")] == [(1, 2)]
    assert 1060 < time.now < 1062


def test_each_client_that_joins_starts_the_wait_for_the_others_anew(folder: Path) -> None:
    """Four clients, one every 50 seconds; the deadline of 60 seconds never passes without one."""
    time = Time()

    class Joining(InProcess):
        def sites(self) -> list[int]:
            return [site for site in (1, 2, 3, 4) if time.now >= 1000 + 50 * (site - 1)]

    federate(Joining({site: learner(0.5) for site in (1, 2, 3, 4)}), folder, time, min_clients=4, rounds=1)
    assert [event["clients"] for event in events(folder, "waiting")] == [1, 2, 3]
    assert read_lines(folder / "rounds.jsonl")[0]["clients"] == 4


def test_a_client_that_comes_and_goes_does_not_make_the_others_wait_for_ever(folder: Path) -> None:
    time = Time()

    class Flapping(InProcess):
        def sites(self) -> list[int]:
            return [1] if int(time.now / 20) % 2 else []

    with pytest.raises(FederationError, match="clients joined in 60 s"):
        federate(Flapping({1: learner(0.5)}), folder, time)
    assert time.now < 1000 + 200


def test_a_federation_that_goes_on_waits_for_all_but_needs_only_as_many_as_close_a_round(folder: Path) -> None:
    sites: dict[int, Site] = {site: learner(0.5) for site in (1, 2, 3)}
    federate(InProcess(sites), folder, rounds=1, min_clients=3)
    time = Time()

    class Returning(InProcess):
        def sites(self) -> list[int]:
            return [site for site in (1, 2) if time.now >= 1000 + 40 * (site - 1)]

    federate(Returning(sites), folder, time, rounds=2, min_clients=3, min_replies=1)
    line = read_lines(folder / "rounds.jsonl")[-1]
    assert (line["round"], line["clients"]) == (2, 2), "the second one was waited for, the third one left for good"


def test_a_federation_that_is_started_again_after_its_last_round_waits_for_its_sites(folder: Path) -> None:
    sites: dict[int, Site] = {1: learner(0.5), 2: learner(0.5)}
    federate(InProcess(sites), folder)
    (folder / "result.json").unlink()
    time = Time()

    class Returning(InProcess):
        def sites(self) -> list[int]:
            return [site for site in (1, 2) if time.now >= 1000 + 40 * site]

    federate(Returning(sites), folder, time)
    assert (result_of(folder)["clients"], result_of(folder)["rounds"]) == (2, 3)
    assert result_of(folder)["loss_final"] is not None


def test_sites_that_are_away_for_a_moment_when_the_last_round_is_done_get_the_final_model_too(folder: Path) -> None:
    """As when the SuperLink has to be started again just then."""
    time, away_until = Time(), [0.0]

    class Away(InProcess):
        def sites(self) -> list[int]:
            if len(read_lines(folder / "rounds.jsonl")) == 3 and not away_until[0]:
                away_until[0] = time.now + 20
            return super().sites() if time.now >= away_until[0] else []

    federate(Away({1: learner(0.5), 2: learner(0.5)}), folder, time, min_replies=2)
    assert (result_of(folder)["clients"], result_of(folder)["loss_final"]) == (2, 0.5)


def test_an_older_model_is_not_published_because_nobody_measured_the_last_one(folder: Path) -> None:
    def unwilling(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel:
        return learner(0.5)(plan, weights) if plan.action == "train" else failing(plan, weights)

    federate(InProcess({1: unwilling, 2: unwilling}), folder, patience=2)
    assert (result_of(folder)["model_of_round"], result_of(folder)["loss_final"]) == (3, None)
    assert load_checkpoint(folder / "model.safetensors")[1].rounds == 3


def test_losses_are_averaged_alike_before_and_after_whatever_sites_have_and_see(folder: Path) -> None:
    """Both sites improve in every round, so does their average, and the last model is the best."""

    def site(examples: int, images: int, losses: list[float]) -> Answering:
        def act(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel:
            place = plan.round - (plan.action == "train")
            return learner(0.5, examples=examples, loss_before=losses[place])(plan, weights)

        return act

    sites = {1: site(10_000, 64, [0.9, 0.88, 0.86, 0.84]), 2: site(100, 64, [0.1, 0.09, 0.08, 0.07])}
    federate(InProcess(sites), folder, patience=2)
    result = result_of(folder)
    assert result["model_of_round"] == 3
    assert result["loss_final"] < result["loss_prior"]


def test_with_a_robust_rule_one_site_does_not_decide_when_to_stop_and_which_model_is_best(folder: Path) -> None:
    def lying(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel:
        loss = 0.0 if plan.round == 1 and plan.action == "train" else 4.0
        return learner(0.5, loss_before=loss, examples=2**40)(plan, weights)

    honest = measuring([3.5, 3.2, 3.0, 2.0, 1.0, 0.5])
    link = InProcess({1: honest, 2: honest, 3: honest, 4: lying})
    federate(link, folder, rounds=5, patience=2, aggregation="median", min_replies=3)
    result = result_of(folder)
    assert (result["rounds"], result["model_of_round"], result["loss_final"]) == (5, 5, 0.5)


def test_no_report_that_is_let_in_ends_a_federation(folder: Path) -> None:
    largest: dict[str, Any] = {"loss_before": 4.0, "loss_after": 4.0, "seconds": 1e9, "skipped_steps": 2**40}
    huge = learner(0.5, loss_before=1e308, loss_after=1e308)
    federate(InProcess({1: learner(0.5), 2: learner(0.5, examples=2**40, **largest), 3: huge}), folder)
    assert [line["rejected"] for line in read_lines(folder / "rounds.jsonl")] == [1, 1, 0]
    assert result_of(folder)["rounds"] == 3


def test_later_rounds_wait_only_for_as_many_sites_as_close_a_round(folder: Path) -> None:
    left: list[int] = []

    class Leaving(InProcess):
        def sites(self) -> list[int]:
            return [site for site in super().sites() if site not in left]

    def stop(number: int) -> None:
        if number == 2:
            left[:] = [1, 2]

    time = Time()
    sites = {site: learner(0.5) for site in (1, 2, 3)}
    federate(Leaving(sites, before_round=stop), folder, time, min_clients=3, min_replies=1, round_deadline=3000)
    assert [line["clients"] for line in read_lines(folder / "rounds.jsonl")] == [3, 3, 1]


def test_every_site_is_offered_the_final_model_even_if_none_answers(folder: Path) -> None:
    def leaves(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel | None:
        return learner(0.5)(plan, weights) if plan.action == "train" else None

    link = InProcess({1: leaves, 2: leaves})
    federate(link, folder, rounds=1)
    plan, weights = link.sent[-1]
    assert plan.action == "finish"
    assert plan.model.rounds == 1
    final, _ = load_checkpoint(folder / "model.safetensors")
    assert all(torch.equal(weights[name], final[name]) for name in final)
    assert result_of(folder)["loss_final"] is None
    assert result_of(folder)["clients"] == 0


class Wire(InProcess):
    """Keeps what would go over a wire: site and names of the weights."""

    def __init__(self, sites: dict[int, Site]) -> None:
        super().__init__(sites)
        self.carries: list[tuple[int, set[str]]] = []

    def ask(self, sites: Sequence[int], question: Question, seconds: float) -> None:
        super().ask(sites, question, seconds)
        sent = question.changes or question.weights
        assert sent is not None
        whole = weights_of(sent)
        assert all(torch.equal(tensor, self.sent[-1][1][name]) for name, tensor in whole.items())
        self.carries += [(site, set(whole)) for site in sites]


@pytest.mark.parametrize("train", ["all", "norm-bias", "adapters"])
def test_weights_that_are_never_trained_go_down_once_to_each_site_and_at_the_end(
    folder: Path, prior: dict[str, Tensor], train: Trainable
) -> None:
    link = Wire({1: drawing(1), 2: drawing(2), 3: poisoned})
    federate(link, folder, rounds=3, train=train, adapter_rank=2)
    _, description = load_checkpoint(folder / "model.safetensors")
    names, changed = set(prior), set(changed_weights(description.model, train))
    assert [carried for site, carried in link.carries if site == 1] == [names, changed, changed, names]
    assert all(carried == names for site, carried in link.carries if site == 3), "it never answered well"
    (start,) = events(folder, "start")
    assert start["bytes_down_later"] <= start["bytes_down"]
    lines = read_lines(folder / "rounds.jsonl")
    assert (lines[1]["bytes_down"] < lines[0]["bytes_down"] * 2 / 3) == (train == "norm-bias")


@pytest.mark.parametrize("train", ["norm-bias", "adapters"])
def test_only_what_is_trained_changes(folder: Path, prior: dict[str, Tensor], train: Trainable) -> None:
    link = InProcess({site: drawing(site) for site in (1, 2, 3)})
    federate(link, folder, rounds=2, train=train, adapter_rank=2, encoding="int8")
    weights, description = load_checkpoint(folder / "model.safetensors")
    moved = {name for name in prior if not torch.equal(weights[name], prior[name])}
    assert moved == set(changed_weights(description.model, train))
    assert read_lines(folder / "rounds.jsonl")[0]["rejected"] == 0


def test_the_average_of_the_rounds_models_is_published_and_handed_out_and_the_raw_one_is_trained_on(
    folder: Path, prior: dict[str, Tensor]
) -> None:
    link = InProcess({1: learner(1.0), 2: learner(1.0)})
    federate(link, folder, rounds=2, server_ema=0.99)
    first, second = 1 - 2 ** (-2 / 3), 1 - 3 ** (-2 / 3)
    expected = second * (1 - first) * 1 + (1 - second) * 3
    assert_moved(folder, prior, expected)
    published, description = load_checkpoint(folder / "model.safetensors")
    assert description.weights == "ema"
    raw, description = load_checkpoint(folder / "rounds" / "000002.safetensors")
    assert description.weights == "raw"
    assert all(np.allclose(raw[name], prior[name] + 3, atol=1e-5) for name in prior)
    plan, weights = link.sent[-1]
    assert (plan.action, plan.model.weights) == ("finish", "ema")
    assert all(torch.equal(weights[name], published[name]) for name in published)
    assert np.allclose(link.sent[1][1]["head.weight"], prior["head.weight"] + 1, atol=1e-6)


@pytest.mark.parametrize(
    ("losses", "patience", "rounds", "best"),
    [
        ([3.5, 3.2, 3.0, 2.0, 1.0, 0.5], 2, 5, 5),  # always better: all rounds, and the last model is measured too
        ([3.5, 1.0, 2.0, 2.0, 2.0, 2.0], 2, 4, 1),  # models 2 and 3 are no better than model 1: enough after round 4
        ([3.5, 1.0, 2.0, 2.0, 2.0, 2.0], 1, 3, 1),
        ([3.5, 3.0, 3.2, 2.0, 2.5, 2.5], 2, 5, 3),  # one worse model is forgiven
        ([1.0, 2.0, 2.0, 2.0, 2.0, 2.0], 3, 4, 0),  # nothing is better than the prior
        ([3.5, 3.2, 3.0, 2.0, 2.5, 1.0], 4, 5, 5),  # the last one, never trained on, is the best
        ([3.5, 3.2, 3.0, 2.0, 2.5, 2.0], 4, 5, 3),  # of equal ones the earlier
    ],
)
def test_patience_stops_after_so_many_models_that_are_no_better_and_the_best_is_published_and_handed_out(
    folder: Path, prior: dict[str, Tensor], losses: list[float], patience: int, rounds: int, best: int
) -> None:
    link = InProcess({1: measuring(losses), 2: measuring(losses)})
    federate(link, folder, rounds=5, patience=patience)
    result = result_of(folder)
    assert (result["rounds"], result["model_of_round"]) == (rounds, best)
    assert result["stopped_by_patience"] == (patience if rounds < 5 or best < 5 - patience else 0)
    assert result["loss_final"] == losses[best]
    assert_moved(folder, prior, 0.5 * sum(range(best + 1)))
    final, description = load_checkpoint(folder / "model.safetensors")
    assert description.rounds == best
    plan, weights = link.sent[-1]
    assert plan.action == "finish"
    assert plan.model.rounds == best
    assert all(torch.equal(weights[name], final[name]) for name in final)


def test_a_federation_that_patience_ended_goes_on_from_its_last_round_when_it_is_given_more_patience(
    new_folder: NewFolder,
) -> None:
    losses = [3.5, 1.0, 2.0, 2.0, 2.0, 0.5]
    sites = {1: measuring(losses), 2: measuring(losses)}
    whole, folder = new_folder("whole"), new_folder("fed")
    federate(InProcess(sites), whole, rounds=5, patience=4)
    federate(InProcess(sites), folder, rounds=5, patience=1)
    assert result_of(folder)["rounds"] == 3
    federate(InProcess(sites), folder, rounds=5, patience=4)
    assert result_of(folder)["model_of_round"] == 5
    assert_same_model(whole, folder)


class Disk:
    """Refuses writes while it is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, is_full: Callable[[str], bool], code: int) -> None:
        self._write, self._is_full, self._code = atomic_write, is_full, code
        self.refused = 0
        for module in (journalling, aggregation, runfolder):
            monkeypatch.setattr(module, "atomic_write", self.write)

    def write(self, path: Path, content: Any) -> None:
        if self._is_full(path.name):
            self.refused += 1
            raise OSError(self._code, "there is no room")
        self._write(path, content)


@pytest.mark.parametrize(
    "name",
    [
        *("000002.state.safetensors", "000002.safetensors", "model.safetensors", "result.json"),
        "waiting-1.safetensors",  # of the first round, when there is nothing to compare an update with
    ],
)
def test_a_full_disk_is_waited_for_and_the_round_counts_once(
    new_folder: NewFolder, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whichever file there is no room for, during 100 seconds."""
    sites: dict[int, Site] = {1: drawing(1), 2: drawing(2)}
    options: dict[str, Any] = {"server_optimizer": "fedadam", "server_lr": 0.05, "server_ema": 0.9}
    whole, folder = new_folder("whole"), new_folder("fed")
    federate(InProcess(sites), whole, **options)
    time = Time()
    since: list[float] = []

    def is_full(found: str) -> bool:
        if found == name:
            since.append(time.now)
        return found == name and time.now < since[0] + 100

    disk = Disk(monkeypatch, is_full, errno.ENOSPC)
    federate(InProcess(sites), folder, time, **options)
    assert disk.refused > 1
    assert len(events(folder, "disk full")) == disk.refused
    assert_same_model(folder, whole)
    assert [line["round"] for line in read_lines(folder / "rounds.jsonl")] == [1, 2, 3]
    assert sorted(path.name for path in (folder / "rounds").iterdir()) == sorted(
        path.name for path in (whole / "rounds").iterdir()
    )


def test_every_message_of_a_federation_is_in_its_audit_log(folder: Path, prior: dict[str, Tensor]) -> None:
    federate(InProcess({1: learner(0.5), 2: failing}), folder, rounds=1)
    lines = read_lines(folder / "audit.jsonl")
    assert [(line["peer"], line["direction"], line["round"], line["verdict"].split(":")[0]) for line in lines] == [
        *(("1", "out", 1, "sent"), ("2", "out", 1, "sent"), ("1", "in", 1, "accepted"), ("2", "in", 1, "rejected")),
        *(("1", "out", 1, "sent"), ("2", "out", 1, "sent"), ("1", "in", 1, "accepted"), ("2", "in", 1, "rejected")),
    ]
    assert [line["verdict"] for line in lines if line["direction"] == "out"] == 2 * ["sent: train"] + 2 * [
        "sent: finish"
    ]
    assert set(lines[0]["arrays"]) == set(lines[2]["arrays"]) == set(prior)
    assert (lines[2]["scalars"]["examples"], lines[3]["scalars"]["outcome"]) == (10, Outcome.DATA_UNUSABLE)
    assert "DATA_UNUSABLE: its images cannot be used" in lines[3]["verdict"]
    size = sum(line["bytes"] for line in lines if line["direction"] == "in")
    assert size == result_of(folder)["bytes_up"]
    assert not verify(folder / "audit.jsonl").problem


def test_an_update_that_is_rejected_after_it_had_to_wait_is_recorded_as_such(folder: Path) -> None:
    federate(InProcess({1: learner(0.1), 2: learner(0.1 * 20)}), folder, rounds=1)
    verdicts = [line["verdict"] for line in read_lines(folder / "audit.jsonl") if line["peer"] == "2"]
    assert verdicts[:2] == ["sent: train", "accepted"]
    assert verdicts[2].startswith("rejected: its norm")


def test_a_continued_federation_goes_on_in_the_same_log(folder: Path) -> None:
    sites: dict[int, Site] = {1: learner(0.5), 2: learner(0.5)}
    federate(InProcess(sites), folder, rounds=1)
    lines = len(read_lines(folder / "audit.jsonl"))
    federate(InProcess(sites), folder, rounds=2)
    assert len(read_lines(folder / "audit.jsonl")) == 2 * lines
    assert not verify(folder / "audit.jsonl").problem


@pytest.mark.parametrize(
    ("code", "seconds"), [(errno.ENOSPC, 100), (errno.ENOSPC, 10 * DISK_SECONDS), (errno.EROFS, 0)]
)
def test_room_for_a_line_of_the_audit_log_is_waited_for_as_for_the_journal(
    folder: Path, prior: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, code: int, seconds: float
) -> None:
    time, append = Time(), auditlog.append
    since: list[float] = []

    def refuse(path: Path, entry: Any) -> None:
        if entry["verdict"] == "accepted":
            since.append(time.now)
            if code == errno.EROFS or time.now < since[0] + seconds:
                raise OSError(code, "there is no room")
        append(path, entry)

    monkeypatch.setattr(auditlog, "append", refuse)
    sites: dict[int, Site] = {1: learner(0.5), 2: learner(0.5)}
    if seconds == 100:
        federate(InProcess(sites), folder, time, rounds=1, round_deadline=2000)
        assert_moved(folder, prior, 0.5)
        verdicts = [line["verdict"] for line in read_lines(folder / "audit.jsonl") if line["round"] == 1]
        assert verdicts.count("accepted") == 4, "of the round and of the farewell, each once"
    else:
        with pytest.raises(FederationError, match=r"there is no room.*run the same command again"):
            federate(InProcess(sites), folder, time, rounds=1, round_deadline=2000)


class NoRoom(InProcess):
    """Replies of which each finds the disk full for a while, when it arrives."""

    def __init__(self, sites: dict[int, Site], time: Time, code: int, seconds: float) -> None:
        super().__init__(sites)
        self._time, self._code, self._seconds = time, code, seconds
        self._until: dict[int, float] = {}  # by exchange

    def receive(self) -> Iterator[Reply]:
        exchange = len(self.asked)
        if self._time.now < self._until.setdefault(exchange, self._time.now + self._seconds):
            raise OSError(self._code, "there is no room")
        yield from super().receive()


def test_replies_that_find_no_room_are_waited_for(folder: Path, prior: dict[str, Tensor]) -> None:
    time = Time()
    sites: dict[int, Site] = {1: learner(0.5), 2: learner(0.5)}
    federate(NoRoom(sites, time, errno.ENOSPC, DISK_SECONDS - 10), folder, time, rounds=2, round_deadline=2000)
    assert {event["round"] for event in events(folder, "disk full")} == {1, 2}
    assert [line["attempts"] for line in read_lines(folder / "rounds.jsonl")] == [1, 1]
    assert_moved(folder, prior, 1.5)


@pytest.mark.parametrize(("code", "waited"), [(errno.ENOSPC, DISK_SECONDS), (errno.EROFS, 0)])
def test_replies_that_never_find_room_end_the_run(folder: Path, code: int, waited: float) -> None:
    time = Time()
    with pytest.raises(FederationError, match=r"there is no room.*run the same command again"):
        federate(NoRoom({1: learner(0.5), 2: learner(0.5)}, time, code, 10 * DISK_SECONDS), folder, time)
    assert waited <= time.now - 1000 <= waited + 10


@pytest.mark.parametrize(
    ("code", "waited"), [(errno.ENOSPC, DISK_SECONDS), (errno.EDQUOT, DISK_SECONDS), (errno.EIO, 0)]
)
def test_a_disk_that_stays_full_ends_the_run_and_another_error_at_once_and_the_journal_is_unchanged(
    folder: Path, prior: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, code: int, waited: float
) -> None:
    sites: dict[int, Site] = {1: learner(0.5), 2: learner(0.5)}
    federate(InProcess(sites), folder, rounds=1)
    before = {path.name: sha256_of(path) for path in (folder / "rounds").iterdir()}
    time = Time()
    Disk(monkeypatch, lambda name: name == "000002.safetensors", code)
    with pytest.raises(FederationError, match=r"there is no room.*run the same command again"):
        federate(InProcess(sites), folder, time, rounds=2)
    assert waited <= time.now - 1000 <= waited + 10
    assert {name: sha256_of(folder / "rounds" / name) for name in before} == before
    assert_moved(folder, prior, 0.5)
    monkeypatch.undo()
    federate(InProcess(sites), folder, rounds=2)
    assert_moved(folder, prior, 1.5)
    assert [line["round"] for line in read_lines(folder / "rounds.jsonl")] == [1, 2]


def test_an_event_that_cannot_be_written_does_not_end_the_federation(folder: Path, prior: dict[str, Tensor]) -> None:
    (folder / "events.jsonl").mkdir()
    federate(InProcess({1: learner(0.5), 2: learner(0.5)}), folder, rounds=1)
    assert_moved(folder, prior, 0.5)


def test_a_site_that_fails_again_and_again_rests_and_is_asked_again_later(folder: Path) -> None:
    link = InProcess({1: learner(0.001), 2: learner(0.001), 3: failing})
    federate(link, folder, rounds=8)
    asked = [number for (number, sites), (plan, _) in zip(link.asked, link.sent, strict=True) if 3 in sites]
    assert asked == [1, 2, 4, 7, 8]  # rests in 3, in 5 and 6; the last one is the farewell
    assert [(event["site"], event["until"]) for event in events(folder, "rests")] == [("3", 4), ("3", 7), ("3", 12)]


def test_a_resting_site_is_asked_where_it_takes_it_to_close_a_round(folder: Path) -> None:
    def improves(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel:
        return learner(0.01)(plan, weights) if plan.round > 3 else failing(plan, weights)

    link = InProcess({1: learner(0.01), 2: learner(0.01), 3: improves})
    left: list[int] = []
    link.sites = lambda: [site for site in (1, 2, 3) if site not in left]  # type: ignore[method-assign]

    def leave(number: int) -> None:
        if number == 3:
            left.append(2)

    link._before_round = leave
    federate(link, folder, rounds=4, min_replies=2, round_deadline=5)
    assert next(sites for number, sites in link.asked if number == 4) == [1, 3]
    assert [line["clients"] for line in read_lines(folder / "rounds.jsonl")] == [2, 2, 2, 2]


@pytest.mark.parametrize("at_most", [None, 3])
def test_a_resting_site_is_left_alone_however_long_the_others_take(folder: Path, at_most: int | None) -> None:
    time = Time()

    class Slow(InProcess):
        """Everybody answers ten seconds after the round began."""

        began = 0.0

        def ask(self, sites: Sequence[int], question: Question, seconds: float) -> None:
            self.began = self.began if self._asked else time.now
            super().ask(sites, question, seconds)

        def receive(self) -> Iterator[Reply]:
            return super().receive() if time.now >= self.began + 10 else iter(())

    link = Slow({1: learner(0.001), 2: learner(0.001), 3: failing})
    federate(link, folder, time, rounds=6, clients_per_round=at_most)
    asked = {plan.round for (_, sites), (plan, _) in zip(link.asked, link.sent, strict=True) if 3 in sites}
    assert asked == {1, 2, 4, 6}  # the last one is the farewell


def test_a_round_asks_a_sample_of_the_clients_and_no_more_of_them(folder: Path) -> None:
    link = InProcess({site: learner(0.001) for site in range(1, 31)})
    federate(link, folder, rounds=6, clients_per_round=5)
    rounds = [sites for (_, sites), (plan, _) in zip(link.asked, link.sent, strict=True) if plan.action == "train"]
    assert [len(sites) for sites in rounds] == [5] * 6
    assert len({tuple(sites) for sites in rounds}) == 6
    assert [line["clients"] for line in read_lines(folder / "rounds.jsonl")] == [5] * 6
    assert link.asked[-1][1] == list(range(1, 31)), "everybody gets the final model"


def test_a_client_that_joins_in_the_middle_does_not_make_a_sampled_round_larger(folder: Path) -> None:
    class Joining(InProcess):
        def sites(self) -> list[int]:
            return [site for site in super().sites() if site <= 20 + (time.now - 1000) / 5]

    time = Time()
    sites: dict[int, Site] = {site: learner(0.001) for site in range(1, 31)} | dict.fromkeys((3, 7, 11, 15), silent)
    link = Joining(sites)
    federate(link, folder, time, rounds=1, clients_per_round=15)
    training = [sites for (_, sites), (plan, _) in zip(link.asked, link.sent, strict=True) if plan.action == "train"]
    assert len({site for sites in training for site in sites}) == 15


def test_options_reach_the_plan(folder: Path) -> None:
    wanted: dict[str, Any] = {
        "local_images": 128,
        "local_minutes": 2.5,
        "batch_size": 16,
        "lr": 1e-3,
        "proximal": 0.25,
        "keep_moments": True,
        "train": "adapters",
        "adapter_rank": 3,
        "encoding": "int8",
        "topk_share": 0.5,
        "seed": 9,
        "federation": "00000000000000aa",
    }
    link = InProcess({1: drawing(1), 2: drawing(2)})
    federate(link, folder, rounds=1, **wanted)
    plan, _ = link.sent[0]
    assert {name: getattr(plan, name) for name in wanted} == wanted
    assert config(folder, **wanted).rounds == plan.rounds + 2
    assert numbers(plan)["exchange"] == plan.exchange
