"""A site's whole answer to a plan, in one process: what it learns, what it sends, what it keeps to itself."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from maskdm.data.sources.source import open_source
from maskdm.errors import DataError, TrainingDiverged
from maskdm.federated.encoding import decode_bfloat16
from maskdm.federated.parcel import REPORT_NAMES, Outcome, Parcel, Report, rounded
from maskdm.federated.policy import SitePolicy
from maskdm.metadata import CheckpointMetadata
from maskdm.run.runfolder import read_lines
from maskdm.run.tensorfile import pack, unpack
from maskdm.training.checkpoint import load_checkpoint
from maskdm_client.folder import unfinished as saved
from maskdm_client.folder.failures import LOG
from maskdm_client.folder.mailbox import Mailbox
from maskdm_client.folder.settings import load_settings
from maskdm_client.folder.unfinished import UnfinishedWork
from maskdm_client.work import answer as site
from maskdm_client.work import fine_tuning
from maskdm_client.work.local_data import choose_slice
from maskdm_client.work.virtual import answer
from maskdm_client.work.weights import PlanWithWeights

MakePlan = Callable[..., tuple[str, bytes]]
MakeSite = Callable[..., Path]


@pytest.fixture
def plan(ask: MakePlan) -> MakePlan:
    """A plan and its weights as they travel; keywords change the plan."""
    return ask


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_lines(folder / "events.jsonl") if event["event"] == kind]


def test_an_answer_holds_the_models_names_and_the_fixed_numbers_and_nothing_else(
    make_site: MakeSite, plan: MakePlan, weights: dict[str, Tensor]
) -> None:
    folder = make_site()
    parcel = answer(*plan(), folder)
    assert {name: array.shape for name, array in parcel.arrays.items()} == {n: w.shape for n, w in weights.items()}
    assert set(parcel.scalars) == set(REPORT_NAMES)
    assert all(type(value) in (int, float) for value in parcel.scalars.values())
    assert parcel.document == ""
    report = Report.model_validate(dict(parcel.scalars))
    train = json.loads((folder / "slice.json").read_text())["train"]
    assert (report.outcome, report.round, report.examples) == (Outcome.DONE, 1, len(train))
    assert (report.images_seen, report.skipped_steps) == (160, 0)


def test_the_update_lowers_the_held_out_loss(make_site: MakeSite, plan: MakePlan) -> None:
    parcel = answer(*plan(local_images=800, lr=3e-3), make_site())
    assert parcel.scalars["loss_after"] < parcel.scalars["loss_before"]
    assert all(np.isfinite(decode_bfloat16(a).numpy()).all() for a in parcel.arrays.values())  # type: ignore[arg-type]


def test_the_same_plan_gets_the_same_answer_and_another_round_another_one(make_site: MakeSite, plan: MakePlan) -> None:
    folder = make_site()
    first, again, later = (answer(*plan(round=number), folder) for number in (1, 1, 2))
    assert all((first.arrays[name] == again.arrays[name]).all() for name in first.arrays)
    assert any((first.arrays[name] != later.arrays[name]).any() for name in first.arrays)
    assert first.scalars["loss_before"] == again.scalars["loss_before"]


def test_a_loss_is_of_draws_that_no_other_question_has_and_before_and_after_training_are_of_the_same(
    make_site: MakeSite, plan: MakePlan
) -> None:
    folder = make_site()
    for number in (1, 2, 2):
        answer(*plan(action="measure", round=number), folder)
    first, second, again = (event["loss"] for event in events(folder, "measured"))
    assert first != second == again
    assert first == pytest.approx(second, rel=0.1)
    answer(*plan(lr=1e-12), folder)
    (trained,) = events(folder, "round")
    assert trained["loss_after"] == pytest.approx(trained["loss_before"], rel=1e-6)


def test_numbers_leave_with_three_digits_and_no_loss_of_few_images_or_where_it_is_not_shared(
    make_site: MakeSite, plan: MakePlan
) -> None:
    told = answer(*plan(), make_site(name="a")).scalars
    for name in ("loss_before", "loss_after", "seconds"):
        assert told[name] == float(f"{told[name]:.3g}")
    for name, policy in (("b", SitePolicy(share_loss=False)), ("c", SitePolicy(min_held_out=9))):
        folder = make_site(name=name, policy=policy)
        for action in ("train", "measure", "finish"):
            numbers = answer(*plan(action=action), folder).scalars
            assert set(numbers) == set(REPORT_NAMES) - {"loss_before", "loss_after"}
        assert "loss" in events(folder, "measured")[0], "the site's own log has it"


def test_the_images_held_out_do_not_change_the_update(make_site: MakeSite, plan: MakePlan) -> None:
    folder = make_site()
    first = answer(*plan(), folder)
    measured = events(folder, "measured")[-1]["loss"]
    chosen = json.loads((folder / "slice.json").read_text())
    fewer = dict(list(chosen["held_out"].items())[:1])
    (folder / "slice.json").write_text(json.dumps(chosen | {"held_out": fewer}))
    second = answer(*plan(), folder)
    assert all((first.arrays[name] == second.arrays[name]).all() for name in first.arrays)
    assert measured != events(folder, "measured")[-1]["loss"]


def test_every_message_of_a_round_is_in_the_audit_log_and_the_events_say_how_it_went(
    make_site: MakeSite, plan: MakePlan
) -> None:
    folder = make_site()
    parcel = answer(*plan(), folder)
    audit = read_lines(folder / "audit.jsonl")
    assert [(line["direction"], line["verdict"]) for line in audit] == [("in", "train"), ("out", "released")]
    assert audit[1]["bytes"] == parcel.size()
    assert rounded(events(folder, "measured")[0]["loss"]) == parcel.scalars["loss_before"]
    assert rounded(events(folder, "round")[0]["loss_after"]) == parcel.scalars["loss_after"]
    assert "images of 8x8" in events(folder, "data")[0]["summary"]


def test_the_final_model_is_kept_and_only_numbers_go_back(
    make_site: MakeSite, plan: MakePlan, weights: dict[str, Tensor], metadata: CheckpointMetadata
) -> None:
    folder = make_site()
    parcel = answer(*plan(action="finish", round=2), folder)
    assert parcel.arrays == {}
    assert set(parcel.scalars) == set(REPORT_NAMES)
    assert parcel.scalars["images_seen"] == 0
    assert parcel.scalars["loss_before"] == parcel.scalars["loss_after"]
    kept, description = load_checkpoint(folder / "model.safetensors")
    assert description == metadata
    assert all(torch.equal(kept[name], weights[name]) for name in weights)
    assert len(events(folder, "finished")) == 1


def assert_only_a_code_left(
    parcel: Parcel, folder: Path, outcome: Outcome, reason: str, round_number: int = 1, exchange: int = 7
) -> None:
    numbers = {"outcome": int(outcome), "round": round_number, "exchange": exchange}
    assert parcel == Parcel({}, numbers, "")
    (failed,) = events(folder, "failed")
    assert failed["outcome"] == outcome.name
    assert reason in failed["reason"]
    last = read_lines(folder / "audit.jsonl")[-1]
    assert last["scalars"] == numbers


def test_missing_data_leaves_as_a_code_and_its_path_stays(make_site: MakeSite, plan: MakePlan, tmp_path: Path) -> None:
    folder = make_site()
    (tmp_path / "hospital-data.npz").unlink()
    parcel = answer(*plan(round=2), folder)
    assert_only_a_code_left(parcel, folder, Outcome.DATA_UNUSABLE, "hospital-data.npz does not exist", 2)


def test_images_that_are_too_small_leave_as_a_code(make_site: MakeSite, plan: MakePlan) -> None:
    folder = make_site(images=np.arange(10 * 36, dtype=np.uint8).reshape(10, 6, 6))
    assert_only_a_code_left(answer(*plan(), folder), folder, Outcome.DATA_UNUSABLE, "smaller than 8x8")


def test_colour_images_for_a_grey_model_leave_as_a_code(make_site: MakeSite, plan: MakePlan) -> None:
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
    folder = make_site(images=images)
    assert_only_a_code_left(answer(*plan(), folder), folder, Outcome.WRONG_CHANNELS, "the model has one channel")


def test_an_update_that_the_sites_policy_forbids_leaves_as_a_code(make_site: MakeSite, plan: MakePlan) -> None:
    folder = make_site(policy=SitePolicy(max_relative_norm=1e-9))
    assert_only_a_code_left(answer(*plan(), folder), folder, Outcome.GATE_REFUSED, "its norm")
    assert [line["direction"] for line in read_lines(folder / "audit.jsonl")] == ["in", "out", "out"]


def test_training_that_diverges_leaves_as_a_code(
    make_site: MakeSite, plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*_: object, **__: object) -> None:
        raise TrainingDiverged("the gradient was not finite")

    monkeypatch.setattr(fine_tuning, "train", diverge)
    folder = make_site()
    assert_only_a_code_left(answer(*plan(), folder), folder, Outcome.DIVERGED, "the gradient was not finite")


def test_an_unexpected_failure_leaves_as_a_code_and_is_explained_at_home(make_site: MakeSite, plan: MakePlan) -> None:
    folder = make_site()
    (folder / "config.json").unlink()
    parcel = answer(*plan(), folder)
    assert_only_a_code_left(parcel, folder, Outcome.FAILED, "unexpected FileNotFoundError")
    assert str(LOG) in events(folder, "failed")[0]["reason"]
    assert "in load_settings" in (folder / LOG).read_text()


def test_a_refusal_is_no_surprise_and_leaves_no_traceback(make_site: MakeSite, plan: MakePlan) -> None:
    folder = make_site(policy=SitePolicy(max_bytes_per_round=1000))
    assert answer(*plan(), folder).scalars["outcome"] == Outcome.TOO_LARGE
    assert not (folder / LOG).exists()


def test_a_slice_that_cannot_be_read_leaves_as_a_code(make_site: MakeSite, plan: MakePlan) -> None:
    folder = make_site()
    (folder / "slice.json").write_text("{")
    assert_only_a_code_left(answer(*plan(), folder), folder, Outcome.DATA_UNUSABLE, "slice.json is damaged")


def test_the_decoded_images_are_removed_at_the_end_even_of_a_failure(
    make_site: MakeSite, plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_site()
    answer(*plan(), folder)
    assert (folder / "corpus").exists()

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(site, "save_checkpoint", fail)
    assert answer(*plan(action="finish", round=2), folder).scalars["outcome"] == Outcome.FAILED
    assert not (folder / "corpus").exists()


def test_a_disk_that_is_full_at_the_end_costs_no_decoded_images_and_it_is_tried_again(
    make_site: MakeSite, plan: MakePlan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = make_site()
    answer(*plan(), folder)
    (tmp_path / "hospital-data.npz").unlink()
    finish = plan(action="finish", round=2)
    box = Mailbox(folder)
    box.ask(7, *finish)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr(site, "save_checkpoint", full)
        with pytest.raises(OSError, match="no space left"):
            site.answer(PlanWithWeights(*finish), folder, box, 7)
    assert box.replied() is None
    assert site.answer(PlanWithWeights(*finish), folder, box, 7).scalars["outcome"] == Outcome.DONE
    assert not (folder / "corpus").exists()


def test_the_images_are_decoded_once_and_mapped_in_later_rounds(make_site: MakeSite, plan: MakePlan) -> None:
    folder = make_site()
    answer(*plan(), folder)
    (folder.parent / "hospital-data.npz").rename(folder.parent / "moved.npz")
    np.savez(folder.parent / "hospital-data.npz", images=np.zeros((1, 8, 8), np.uint8))
    assert answer(*plan(round=2), folder).scalars["outcome"] == Outcome.DONE


@pytest.mark.parametrize("document", ["", "{}", '{"action": "upload"}', "[]"])
def test_a_plan_that_is_not_understood_is_refused(make_site: MakeSite, document: str) -> None:
    folder = make_site()
    assert_only_a_code_left(
        answer(document, b"", folder), folder, Outcome.PLAN_REFUSED, "the coordinator's plan was refused", exchange=0
    )


def test_what_the_coordinator_wrote_reaches_no_terminal_as_it_is(make_site: MakeSite) -> None:
    folder = make_site()
    answer(json.dumps({"\x1b[2J" + 500 * "x": 1}), b"", folder)
    (reason,) = (event["reason"] for event in events(folder, "failed"))
    assert reason.isprintable()
    assert len(reason) < 300


def test_weights_that_do_not_fit_the_plan_are_refused(
    make_site: MakeSite, plan: MakePlan, weights: dict[str, Tensor]
) -> None:
    folder = make_site()
    parcel = answer(*plan({**weights, "more": torch.zeros(1)}), folder)
    assert_only_a_code_left(parcel, folder, Outcome.PLAN_REFUSED, "do not fit the model")


def test_weights_of_another_type_are_refused(make_site: MakeSite, plan: MakePlan) -> None:
    folder = make_site()
    document, packed = plan()
    other = pack({name: array.view(np.uint32) for name, array in unpack(packed).items()})
    assert_only_a_code_left(answer(document, other, folder), folder, Outcome.PLAN_REFUSED, "do not fit the model")


def test_weights_that_are_not_finite_are_refused(
    make_site: MakeSite, plan: MakePlan, weights: dict[str, Tensor]
) -> None:
    folder = make_site()
    parcel = answer(*plan({**weights, "norm.bias": torch.full((16,), float("nan"))}), folder)
    assert_only_a_code_left(parcel, folder, Outcome.PLAN_REFUSED, "not finite")


def test_work_that_was_interrupted_goes_on_where_it_was_saved_and_ends_the_same(
    make_site: MakeSite, plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(saved, "SAVE_SHARE", 0)
    monkeypatch.setattr(fine_tuning, "REPORT_SECONDS", 0.0)
    folder = make_site()
    whole = answer(*plan(), folder)

    keep = UnfinishedWork.keep

    def killed(self: Any, state: Any, *rest: Any) -> None:
        keep(self, state, *rest)
        if state.images_seen == 80:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(UnfinishedWork, "keep", killed)
        with pytest.raises(KeyboardInterrupt):
            answer(*plan(exchange=8), folder)
    again = answer(*plan(exchange=9), folder)
    assert [event["images"] for event in events(folder, "measured")][-1] == 80, "it began anew"
    assert all((whole.arrays[name] == again.arrays[name]).all() for name in whole.arrays)
    assert again.scalars["loss_before"] == whole.scalars["loss_before"]
    assert not list((folder / "work").glob("training*"))


def test_other_work_does_not_take_up_what_was_saved(
    make_site: MakeSite, plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(saved, "SAVE_SHARE", 0)
    monkeypatch.setattr(fine_tuning, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(UnfinishedWork, "forget", lambda self: None)
    folder = make_site()
    answer(*plan(), folder)
    answer(*plan(round=2), folder)
    assert [event["images"] for event in events(folder, "measured")] == [0, 0]


def test_a_site_refuses_before_it_trains_what_its_link_may_not_carry(make_site: MakeSite, plan: MakePlan) -> None:
    folder = make_site(policy=SitePolicy(max_bytes_per_round=1000))
    assert_only_a_code_left(answer(*plan(), folder), folder, Outcome.TOO_LARGE, "max-bytes-per-round allows 1,000")
    assert not events(folder, "measured")


def test_the_size_that_may_leave_is_that_of_the_update_to_the_byte(make_site: MakeSite, plan: MakePlan) -> None:
    folder = make_site()
    sent = answer(*plan(local_images=8), folder)
    needed = sum(array.nbytes for array in sent.arrays.values())
    config = json.loads((folder / "config.json").read_text())
    for allowed, outcome in ((needed, Outcome.DONE), (needed - 1, Outcome.TOO_LARGE)):
        config["site"]["policy"]["max_bytes_per_round"] = allowed
        (folder / "config.json").write_text(json.dumps(config))
        assert answer(*plan(local_images=8), folder).scalars["outcome"] == outcome


def test_a_model_that_is_only_measured_is_neither_trained_nor_kept(
    make_site: MakeSite, plan: MakePlan, weights: dict[str, Tensor]
) -> None:
    folder = make_site(policy=SitePolicy(max_bytes_per_round=1))  # numbers are no update
    first = answer(*plan(action="measure"), folder)
    other = answer(*plan({name: 3 * tensor for name, tensor in weights.items()}, action="measure"), folder)
    for parcel in (first, other):
        assert parcel.arrays == {}
        assert set(parcel.scalars) == set(REPORT_NAMES)
        assert parcel.scalars["loss_before"] == parcel.scalars["loss_after"]
        assert parcel.scalars["images_seen"] == 0
    assert first.scalars["loss_after"] != other.scalars["loss_after"]
    finished = answer(*plan(action="finish"), folder).scalars
    assert finished["loss_after"] == pytest.approx(first.scalars["loss_after"], rel=0.1)
    assert (folder / "model.safetensors").exists()
    assert len(events(folder, "training")) == 0


@pytest.mark.parametrize("cut", [0, 4, -1])
def test_weights_that_are_cut_off_are_refused(make_site: MakeSite, plan: MakePlan, cut: int) -> None:
    folder = make_site()
    document, packed = plan()
    parcel = answer(document, packed[:cut], folder)
    assert_only_a_code_left(parcel, folder, Outcome.PLAN_REFUSED, "the coordinator's weights were refused")


def test_while_it_trains_a_site_says_in_its_mailbox_how_far_it_is(
    make_site: MakeSite, plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fine_tuning, "REPORT_SECONDS", 0.0)
    said: list[tuple[int, int, int]] = []
    progressed = Mailbox.progressed

    def heard(self: Mailbox, *numbers: int) -> None:
        progressed(self, *numbers)
        said.append((numbers[0], *self.progress(numbers[0])))

    monkeypatch.setattr(Mailbox, "progressed", heard)
    folder = make_site()
    box = Mailbox(folder)
    box.ask(7, *plan(round=2, local_images=24))
    site.answer(PlanWithWeights(*plan(round=2, local_images=24)), folder, box, 7)
    assert said == [(7, 2, 8), (7, 2, 16), (7, 2, 24)]


@pytest.mark.parametrize("action", ["train", "measure", "finish"])
@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (SitePolicy(min_images=33), "32 images to train on are fewer than the 33 of the site's policy"),
        (SitePolicy(require_dp=True), "require-dp), which this version does not have"),
    ],
)
def test_a_site_that_its_policy_keeps_out_answers_every_plan_with_a_code(
    make_site: MakeSite, plan: MakePlan, action: str, policy: SitePolicy, reason: str
) -> None:
    folder = make_site(policy=policy)
    parcel = answer(*plan(action=action, round=2), folder)
    assert parcel == Parcel({}, {"outcome": int(Outcome.POLICY), "round": 2, "exchange": 7})
    (event,) = events(folder, "finished" if action == "finish" else "failed")
    assert reason in event["reason"]
    assert not events(folder, "measured")
    assert (folder / "model.safetensors").exists() == (action == "finish"), "what comes in may stay"


def test_as_many_images_as_the_policy_wants_are_enough(make_site: MakeSite, plan: MakePlan) -> None:
    folder = make_site(policy=SitePolicy(min_images=32))
    assert answer(*plan(local_images=8), folder).scalars["outcome"] == Outcome.DONE


def test_updates_are_counted_before_they_leave_and_one_too_many_is_not_even_made(
    make_site: MakeSite, plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_site(policy=SitePolicy(max_rounds_per_day=2))
    counted: list[int] = []
    reply = Mailbox.reply

    def replied(self: Mailbox, exchange: int, key: str, parcel: Parcel) -> None:
        counted.append(len(json.loads((folder / "updates.json").read_text())))
        reply(self, exchange, key, parcel)

    monkeypatch.setattr(Mailbox, "reply", replied)
    box = Mailbox(folder)
    outcomes = []
    for number, action in ((1, "train"), (2, "measure"), (3, "train"), (4, "train"), (5, "finish")):
        asked = plan(local_images=8, exchange=number, round=number, action=action)
        box.ask(number, *asked)
        outcomes.append(site.answer(PlanWithWeights(*asked), folder, box, number).scalars["outcome"])
    assert counted == [1, 1, 2, 2, 2]
    assert outcomes == [Outcome.DONE, Outcome.DONE, Outcome.DONE, Outcome.POLICY, Outcome.DONE], (
        "numbers are no updates"
    )
    assert len(events(folder, "measured")) == 3
    (failed,) = events(folder, "failed")
    assert "max-rounds-per-day" in failed["reason"]


def test_a_site_with_too_few_images_for_its_policy_does_not_join(make_site: MakeSite) -> None:
    different = np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8)
    folder = make_site(different, policy=SitePolicy(min_images=39), fraction=1)
    (folder / "slice.json").unlink()
    with pytest.raises(DataError, match=r"fewer than the 39 .*\(min-images\): give more images"):
        choose_slice(open_source(load_settings(folder).data), load_settings(folder), folder)
    assert not (folder / "slice.json").exists()


def nothing_to_measure(folder: Path, _: pytest.MonkeyPatch) -> None:
    (folder.parent / "hospital-data.npz").unlink()


def measures_no_number(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fine_tuning, "denoising_losses", lambda *_, **__: torch.full((8,), torch.nan))


def has_no_room(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(site, "local_images", full)


@pytest.mark.parametrize(
    ("spoil", "outcome"),
    [
        (nothing_to_measure, Outcome.DATA_UNUSABLE),
        (measures_no_number, Outcome.DIVERGED),
        (has_no_room, Outcome.FAILED),
    ],
)
def test_once_the_final_model_is_there_the_federation_has_ended_whatever_measuring_it_gives(
    make_site: MakeSite,
    plan: MakePlan,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Path, pytest.MonkeyPatch], None],
    outcome: Outcome,
) -> None:
    folder = make_site()
    spoil(folder, monkeypatch)
    box = Mailbox(folder)
    box.ask(7, *plan(action="finish", round=2))
    assert site.answer(PlanWithWeights(*plan(action="finish", round=2)), folder, box, 7).scalars["outcome"] == outcome
    assert (folder / "model.safetensors").exists()
    (finished,) = events(folder, "finished")
    assert finished["reason"]
    assert not events(folder, "failed")


def test_where_nothing_can_be_said_the_work_is_done_all_the_same(
    make_site: MakeSite, plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    folder = make_site()
    (folder / "events.jsonl").mkdir()
    monkeypatch.setattr(Mailbox, "progressed", full)
    box = Mailbox(folder)
    box.ask(7, *plan())
    assert site.answer(PlanWithWeights(*plan()), folder, box, 7).scalars["outcome"] == Outcome.DONE
