"""A site's whole answer to a plan, in one process: what it learns, what it sends, what it keeps to itself."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from maskdm.checkpoint import CheckpointMetadata, load_checkpoint
from maskdm.config import ModelConfig
from maskdm.errors import TrainingDiverged
from maskdm.model import build_model
from maskdm.protocol import REPORT_NAMES, Outcome, Parcel, Report, RoundPlan, decode_bfloat16, to_arrays
from maskdm.runfolder import read_lines
from maskdm_client import site
from maskdm_client.settings import SitePolicy, SiteSettings
from maskdm_client.site import answer

MakePlan = Callable[..., Parcel]
MakeSite = Callable[..., Path]


@pytest.fixture
def weights(tiny: ModelConfig) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in build_model(tiny, seed=1).named_parameters()}


@pytest.fixture
def plan(metadata: CheckpointMetadata, weights: dict[str, Tensor]) -> MakePlan:
    """A parcel from the coordinator; keywords change the plan."""

    def make(weights: dict[str, Tensor] = weights, **changes: Any) -> Parcel:
        values = {
            "federation": "0123456789abcdef",
            "action": "train",
            "round": 1,
            "rounds": 2,
            "local_images": 160,
            "batch_size": 8,
            "lr": 1e-3,
            "seed": 0,
            "model": metadata,
        }
        return Parcel(to_arrays(weights), {}, RoundPlan.model_validate(values | changes).model_dump_json())

    return make


@pytest.fixture
def make_site(tmp_path: Path) -> MakeSite:
    """The folder of a site with 40 small grey pictures, as `maskdm-client` leaves it; keywords change its settings."""

    def make(images: Any = None, **changes: Any) -> Path:
        if images is None:
            ramp = np.linspace(0, 200, 8).astype(np.uint8)
            images = np.stack([np.tile(ramp, (8, 1)) + np.uint8(i) for i in range(40)])
        folder = tmp_path / "site"
        folder.mkdir()
        np.savez(tmp_path / "hospital-data.npz", images=images)
        values = {"data": tmp_path / "hospital-data.npz", "precision": "fp32", "device": "cpu", "threads": 1}
        settings = SiteSettings.model_validate(values | changes)
        (folder / "config.json").write_text(json.dumps({"site": settings.model_dump(mode="json")}))
        names = {hashlib.sha256(image.tobytes()).hexdigest(): str(i) for i, image in enumerate(images)}
        chosen = [dict(part) for part in (list(names.items())[::5], list(names.items()))]
        train = {digest: name for digest, name in chosen[1].items() if digest not in chosen[0]}
        (folder / "slice.json").write_text(json.dumps({"train": train, "held_out": chosen[0]}))
        return folder

    return make


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_lines(folder / "events.jsonl") if event["event"] == kind]


def test_an_answer_holds_the_models_names_and_the_fixed_numbers_and_nothing_else(
    make_site: MakeSite, plan: MakePlan, weights: dict[str, Tensor]
) -> None:
    folder = make_site()
    parcel = answer(plan(), folder)
    assert {name: array.shape for name, array in parcel.arrays.items()} == {n: w.shape for n, w in weights.items()}
    assert set(parcel.scalars) == set(REPORT_NAMES)
    assert all(type(value) in (int, float) for value in parcel.scalars.values())
    assert parcel.document == ""
    report = Report.model_validate(dict(parcel.scalars))
    train = json.loads((folder / "slice.json").read_text())["train"]
    assert (report.outcome, report.round, report.examples) == (Outcome.DONE, 1, len(train))
    assert (report.images_seen, report.skipped_steps) == (160, 0)


def test_the_update_lowers_the_held_out_loss(make_site: MakeSite, plan: MakePlan) -> None:
    parcel = answer(plan(local_images=800, lr=3e-3), make_site())
    assert parcel.scalars["loss_after"] < parcel.scalars["loss_before"]
    assert all(np.isfinite(decode_bfloat16(a).numpy()).all() for a in parcel.arrays.values())  # type: ignore[arg-type]


def test_the_same_plan_gets_the_same_answer_and_another_round_another_one(make_site: MakeSite, plan: MakePlan) -> None:
    folder = make_site()
    first, again, later = (answer(plan(round=number), folder) for number in (1, 1, 2))
    assert all((first.arrays[name] == again.arrays[name]).all() for name in first.arrays)
    assert any((first.arrays[name] != later.arrays[name]).any() for name in first.arrays)
    assert first.scalars["loss_before"] == again.scalars["loss_before"] == later.scalars["loss_before"]


def test_the_images_held_out_do_not_change_the_update(make_site: MakeSite, plan: MakePlan) -> None:
    folder = make_site()
    first = answer(plan(), folder)
    chosen = json.loads((folder / "slice.json").read_text())
    fewer = dict(list(chosen["held_out"].items())[:1])
    (folder / "slice.json").write_text(json.dumps(chosen | {"held_out": fewer}))
    second = answer(plan(), folder)
    assert all((first.arrays[name] == second.arrays[name]).all() for name in first.arrays)
    assert first.scalars["loss_after"] != second.scalars["loss_after"]


def test_every_message_of_a_round_is_in_the_audit_log_and_the_events_say_how_it_went(
    make_site: MakeSite, plan: MakePlan
) -> None:
    folder = make_site()
    parcel = answer(plan(), folder)
    audit = read_lines(folder / "audit.jsonl")
    assert [(line["direction"], line["verdict"]) for line in audit] == [("in", "train"), ("out", "released")]
    assert audit[1]["bytes"] == parcel.size()
    assert events(folder, "measured")[0]["loss"] == parcel.scalars["loss_before"]
    assert events(folder, "round")[0]["loss_after"] == parcel.scalars["loss_after"]
    assert "images of 8x8" in events(folder, "data")[0]["summary"]


def test_the_final_model_is_kept_and_only_numbers_go_back(
    make_site: MakeSite, plan: MakePlan, weights: dict[str, Tensor], metadata: CheckpointMetadata
) -> None:
    folder = make_site()
    parcel = answer(plan(action="finish", round=2), folder)
    assert parcel.arrays == {}
    assert set(parcel.scalars) == set(REPORT_NAMES)
    assert parcel.scalars["images_seen"] == 0
    assert parcel.scalars["loss_before"] == parcel.scalars["loss_after"]
    kept, description = load_checkpoint(folder / "model.safetensors")
    assert description == metadata
    assert all(torch.equal(kept[name], weights[name]) for name in weights)
    assert len(events(folder, "finished")) == 1


def assert_only_a_code_left(parcel: Parcel, folder: Path, outcome: Outcome, reason: str, round_number: int = 1) -> None:
    assert parcel == Parcel({}, {"outcome": int(outcome), "round": round_number}, "")
    (failed,) = events(folder, "failed")
    assert failed["outcome"] == outcome.name
    assert reason in failed["reason"]
    last = read_lines(folder / "audit.jsonl")[-1]
    assert last["scalars"] == {"outcome": int(outcome), "round": round_number}


def test_missing_data_leaves_as_a_code_and_its_path_stays(make_site: MakeSite, plan: MakePlan, tmp_path: Path) -> None:
    folder = make_site()
    (tmp_path / "hospital-data.npz").unlink()
    parcel = answer(plan(round=2), folder)
    assert_only_a_code_left(parcel, folder, Outcome.DATA_UNUSABLE, "hospital-data.npz does not exist", 2)


def test_images_that_are_too_small_leave_as_a_code(make_site: MakeSite, plan: MakePlan) -> None:
    folder = make_site(images=np.arange(10 * 36, dtype=np.uint8).reshape(10, 6, 6))
    assert_only_a_code_left(answer(plan(), folder), folder, Outcome.DATA_UNUSABLE, "smaller than 8x8")


def test_colour_images_for_a_grey_model_leave_as_a_code(make_site: MakeSite, plan: MakePlan) -> None:
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
    folder = make_site(images=images)
    assert_only_a_code_left(answer(plan(), folder), folder, Outcome.WRONG_CHANNELS, "the model has one channel")


def test_an_update_that_the_sites_policy_forbids_leaves_as_a_code(make_site: MakeSite, plan: MakePlan) -> None:
    folder = make_site(policy=SitePolicy(max_relative_norm=1e-9))
    assert_only_a_code_left(answer(plan(), folder), folder, Outcome.GATE_REFUSED, "its norm")
    assert [line["direction"] for line in read_lines(folder / "audit.jsonl")] == ["in", "out", "out"]


def test_training_that_diverges_leaves_as_a_code(
    make_site: MakeSite, plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*_: object, **__: object) -> None:
        raise TrainingDiverged("the gradient was not finite")

    monkeypatch.setattr(site, "train", diverge)
    folder = make_site()
    assert_only_a_code_left(answer(plan(), folder), folder, Outcome.DIVERGED, "the gradient was not finite")


def test_an_unexpected_failure_leaves_as_a_code_and_is_explained_at_home(make_site: MakeSite, plan: MakePlan) -> None:
    folder = make_site()
    (folder / "config.json").unlink()
    assert_only_a_code_left(answer(plan(), folder), folder, Outcome.FAILED, "unexpected FileNotFoundError")


def test_a_slice_that_cannot_be_read_leaves_as_a_code(make_site: MakeSite, plan: MakePlan) -> None:
    folder = make_site()
    (folder / "slice.json").write_text("{")
    assert_only_a_code_left(answer(plan(), folder), folder, Outcome.DATA_UNUSABLE, "slice.json is damaged")


def test_the_decoded_images_are_removed_at_the_end_even_of_a_failure(
    make_site: MakeSite, plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_site()
    answer(plan(), folder)
    assert (folder / "corpus").exists()

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(site, "save_checkpoint", fail)
    assert answer(plan(action="finish", round=2), folder).scalars["outcome"] == Outcome.FAILED
    assert not (folder / "corpus").exists()


def test_the_images_are_decoded_once_and_mapped_in_later_rounds(make_site: MakeSite, plan: MakePlan) -> None:
    folder = make_site()
    answer(plan(), folder)
    (folder.parent / "hospital-data.npz").rename(folder.parent / "moved.npz")
    np.savez(folder.parent / "hospital-data.npz", images=np.zeros((1, 8, 8), np.uint8))
    assert answer(plan(round=2), folder).scalars["outcome"] == Outcome.DONE


@pytest.mark.parametrize("document", ["", "{}", '{"action": "upload"}', "[]"])
def test_a_plan_that_is_not_understood_is_refused(make_site: MakeSite, document: str) -> None:
    folder = make_site()
    assert_only_a_code_left(
        answer(Parcel({}, {}, document), folder), folder, Outcome.PLAN_REFUSED, "the coordinator's plan was refused"
    )


def test_weights_that_do_not_fit_the_plan_are_refused(
    make_site: MakeSite, plan: MakePlan, weights: dict[str, Tensor]
) -> None:
    folder = make_site()
    parcel = answer(plan({**weights, "more": torch.zeros(1)}), folder)
    assert_only_a_code_left(parcel, folder, Outcome.PLAN_REFUSED, "do not fit the model")


def test_weights_of_another_type_are_refused(make_site: MakeSite, plan: MakePlan) -> None:
    folder = make_site()
    good = plan()
    parcel = Parcel({name: array.astype(np.float64) for name, array in good.arrays.items()}, {}, good.document)
    assert_only_a_code_left(answer(parcel, folder), folder, Outcome.PLAN_REFUSED, "do not fit the model")


def test_weights_that_are_not_finite_are_refused(
    make_site: MakeSite, plan: MakePlan, weights: dict[str, Tensor]
) -> None:
    folder = make_site()
    parcel = answer(plan({**weights, "norm.bias": torch.full((16,), float("nan"))}), folder)
    assert_only_a_code_left(parcel, folder, Outcome.PLAN_REFUSED, "not finite")
