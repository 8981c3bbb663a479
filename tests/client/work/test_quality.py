"""An evaluation at a site: which numbers leave, that they are what they are called, and when none does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from maskdm.commands import command_line as cli
from maskdm.evaluation.distances import frechet_distance, kernel_distance, moments
from maskdm.evaluation.extractors.feature_net import FeatureNet, FeatureNetConfig, save_feature_net
from maskdm.evaluation.extractors.features import open_extractor, random_extractor
from maskdm.evaluation.neighbours import neighbourhoods
from maskdm.evaluation.samples import drawn
from maskdm.federated.parcel import NUMBER_NAMES, QUALITY_NAMES, REPORT_NAMES, Outcome, Parcel, QualityReport, rounded
from maskdm.federated.plan import RoundPlan
from maskdm.federated.policy import SitePolicy
from maskdm.federated.terms import terms_of
from maskdm.metadata import CheckpointMetadata
from maskdm.run.runfolder import read_lines, write_json
from maskdm.seeding import derive_seed
from maskdm.training.checkpoint import model_from
from maskdm_client.commands.app import app
from maskdm_client.folder.events import known
from maskdm_client.folder.job import site_secret
from maskdm_client.folder.mailbox import Mailbox
from maskdm_client.folder.settings import load_settings
from maskdm_client.gate.approval import APPROVALS
from maskdm_client.gate.gate import problem_of
from maskdm_client.refusals import NotApproved, Superseded
from maskdm_client.work import answer as site_module
from maskdm_client.work import quality
from maskdm_client.work.answer import answer as answer_in_mailbox
from maskdm_client.work.local_data import local_images
from maskdm_client.work.virtual import answer
from maskdm_client.work.weights import PlanWithWeights

MakePlan = Callable[..., tuple[str, bytes]]
MakeSite = Callable[..., Path]
DRAWN = 12
ALL = SitePolicy(metrics=NUMBER_NAMES)
RANDOM = random_extractor()


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """60 of them, of which the site holds out every fifth."""
    return np.random.default_rng(3).integers(0, 256, (60, 8, 8), dtype=np.uint8)


@pytest.fixture
def site(make_site: MakeSite, pictures: np.ndarray) -> Callable[..., Path]:
    """A site that takes part in evaluations; keywords change its settings."""

    def make(**changes: Any) -> Path:
        return make_site(**{"images": pictures, "policy": ALL, "features": "random", **changes})

    return make


@pytest.fixture
def evaluation(ask: MakePlan) -> MakePlan:
    """A plan to evaluate, and its weights; keywords change the plan."""

    def make(exchange: int = 7, federation: str = "0123456789abcdef", **changes: Any) -> tuple[str, bytes]:
        wanted = {"images": DRAWN, "features": RANDOM.sha256, "steps": 2, **changes}
        return ask(action="evaluate", exchange=exchange, federation=federation, quality=wanted)

    return make


def reasons(folder: Path) -> list[str]:
    """Why the site did not evaluate, in its own log."""
    return [line["reason"] for line in read_lines(folder / "events.jsonl") if line["event"] == "not evaluated"]


def assert_only_the_nine_left(parcel: Parcel, folder: Path, reason: str) -> None:
    assert set(parcel.scalars) == set(REPORT_NAMES)
    assert parcel.scalars["outcome"] == Outcome.DONE
    assert read_lines(folder / "audit.jsonl")[-1]["scalars"] == dict(parcel.scalars)
    (found,) = reasons(folder)
    assert reason in found


def test_the_numbers_are_those_of_images_that_the_model_draws_and_of_the_ones_held_out(
    site: Callable[..., Path], evaluation: MakePlan, weights: dict[str, Tensor], metadata: CheckpointMetadata
) -> None:
    folder = site()
    parcel = answer(*evaluation(), folder)
    assert tuple(parcel.scalars) == NUMBER_NAMES
    assert parcel.arrays == {}
    report = QualityReport.model_validate(dict(parcel.scalars))
    assert report.quality_images == 12
    assert report.loss_before == report.loss_after
    assert report.loss_before is not None
    settings = load_settings(folder)
    images = local_images(settings, folder, 8, 1)
    model = model_from(weights, metadata.model)
    seed = derive_seed(site_secret(folder), "evaluation", "0123456789abcdef")
    generated = torch.cat(list(drawn(model, metadata.diffusion, DRAWN, steps=2, seed=seed, precision="fp32")))
    ours = RANDOM.features(generated)
    theirs = RANDOM.features(torch.from_numpy(images.corpus.pixels)[torch.from_numpy(images.held_out)])
    expected = {
        "kernel": kernel_distance(ours, theirs),
        "frechet": frechet_distance(moments(ours), moments(theirs)),
        **{name: float(v.mean()) for name, v in neighbourhoods(ours, theirs, 5)._asdict().items()},
    }
    found = report.quality()
    assert found.pop("memorisation") > 0
    assert found == {name: rounded(expected[name]) for name in found}
    assert all(value == float(f"{value:.3g}") for value in found.values()), "no more digits than mean anything"


def test_what_left_is_in_the_audit_log_and_what_was_done_in_the_events(
    site: Callable[..., Path], evaluation: MakePlan
) -> None:
    folder = site()
    parcel = answer(*evaluation(), folder)
    audit = read_lines(folder / "audit.jsonl")
    assert [(line["direction"], line["verdict"]) for line in audit] == [("in", "evaluate"), ("out", "released")]
    assert audit[1]["scalars"] == dict(parcel.scalars)
    (event,) = [line for line in read_lines(folder / "events.jsonl") if line["event"] == "evaluated"]
    assert event["quality"] == {name: parcel.scalars[name] for name in QUALITY_NAMES}
    (told,) = (event.words() for event in known([event]))
    assert f"evaluated with {DRAWN} images that it drew: quality_images 12, kernel" in told


def test_only_what_the_policy_lists_leaves(site: Callable[..., Path], evaluation: MakePlan) -> None:
    folder = site(policy=SitePolicy(metrics=(*REPORT_NAMES, "quality_images", "coverage", "kernel")))
    parcel = answer(*evaluation(), folder)
    assert set(parcel.scalars) == {*REPORT_NAMES, "quality_images", "coverage", "kernel"}


def test_images_that_the_model_learned_by_heart_are_told_from_others(
    site: Callable[..., Path], evaluation: MakePlan, pictures: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The place of images that were drawn is taken by those that the site trains on, and by those that it holds out."""
    found = {}
    folder = site()
    for name, rows in (("train", [i for i in range(60) if i % 5]), ("held out", list(range(0, 60, 5)))):
        chosen = torch.from_numpy(pictures[rows[:DRAWN]])[:, None]
        monkeypatch.setattr(quality, "drawn", lambda *_, chosen=chosen, **__: iter([chosen]))
        found[name] = answer(*evaluation(), folder).scalars
    assert found["held out"]["kernel"] < found["train"]["kernel"]
    assert found["held out"]["coverage"] == found["held out"]["recall"] == 1
    assert found["held out"]["memorisation"] > 1
    assert found["train"]["memorisation"] == 0  # more of them than are held out, and none is overlooked


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"policy": SitePolicy()}, "the policy lists none of the numbers"),
        ({"policy": SitePolicy(metrics=(*REPORT_NAMES, "kernel"))}, "or not quality_images with them"),
        ({"features": None}, f"no feature network; sha256 {RANDOM.sha256} is wanted"),
        ({"features": "/nowhere/features.safetensors"}, "does not exist"),
    ],
)
def test_a_site_that_does_not_want_to_or_cannot_answers_without_and_says_why_at_home(
    site: Callable[..., Path], evaluation: MakePlan, changes: dict[str, Any], reason: str
) -> None:
    folder = site(**changes)
    assert_only_the_nine_left(answer(*evaluation(), folder), folder, reason)
    assert not (folder / "evaluations.json").exists()


def test_a_network_that_is_another_one_than_the_coordinators_is_not_used(
    site: Callable[..., Path], evaluation: MakePlan, tmp_path: Path
) -> None:
    config = FeatureNetConfig(name="ours", image_size=8, channels=1, classes=2)
    path = tmp_path / "ours.safetensors"
    save_feature_net(path, FeatureNet(config), config)
    folder = site(features=str(path))
    assert_only_the_nine_left(answer(*evaluation(), folder), folder, f"{RANDOM.sha256} is wanted")
    parcel = answer(*evaluation(features=open_extractor(path).sha256), folder)
    assert set(QUALITY_NAMES) <= set(parcel.scalars)


def test_too_few_images_held_out_say_nothing(make_site: MakeSite, evaluation: MakePlan) -> None:
    folder = make_site(policy=ALL, features="random")  # 8 of 40
    assert_only_the_nine_left(answer(*evaluation(), folder), folder, "8 images are held out, fewer than the 10")


def test_a_person_who_approved_the_federation_approved_its_evaluations(
    site: Callable[..., Path], evaluation: MakePlan
) -> None:
    folder = site(policy=ALL.model_copy(update={"approve_first_round": True}))
    asked = evaluation()
    terms = terms_of(RoundPlan.model_validate_json(asked[0])).model_dump(mode="json")
    write_json(folder / APPROVALS, {"0123456789abcdef": {"approved": True, "terms": terms}})
    assert set(QUALITY_NAMES) <= set(answer(*asked, folder).scalars)


def test_before_somebody_approved_the_federation_nothing_is_computed_for_it(
    site: Callable[..., Path], evaluation: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = site(policy=ALL.model_copy(update={"approve_first_round": True}))
    waited: list[None] = []

    def denies(*_: Any) -> bool:
        waited.append(None)
        raise NotApproved("somebody denied it")

    monkeypatch.setattr(site_module, "wait_for_decision", denies)
    monkeypatch.setattr(site_module, "held_out_loss", lambda *_: pytest.fail("it was computed"))
    assert answer(*evaluation(), folder).scalars["outcome"] == Outcome.NOT_APPROVED
    assert waited == [None]


def test_so_many_evaluations_leave_in_a_day_whatever_federation_asks(
    site: Callable[..., Path], evaluation: MakePlan
) -> None:
    folder = site(policy=ALL.model_copy(update={"max_evaluations_per_day": 2}))
    for asked in (evaluation(federation="0" * 16), evaluation(federation="1" * 16)):
        assert "kernel" in answer(*asked, folder).scalars
    parcel = answer(*evaluation(federation="2" * 16), folder)
    assert_only_the_nine_left(parcel, folder, "allows 2 evaluations in 24 hours")
    assert "loss_after" in answer(*evaluation(federation="2" * 16), folder).scalars
    assert not (folder / "updates.json").exists(), "updates are counted apart"


def test_while_images_are_drawn_the_coordinator_can_be_told_how_far_it_is(
    site: Callable[..., Path], evaluation: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "REPORT_SECONDS", 0.0)
    folder = site()
    box = Mailbox(folder)
    document, packed = evaluation()
    box.ask(7, document, packed)
    answer_in_mailbox(PlanWithWeights(document, packed), folder, box, 7)
    assert box.progress(7) == (1, DRAWN)


def test_a_newer_question_ends_it(
    site: Callable[..., Path], evaluation: MakePlan, ask: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = site()
    box = Mailbox(folder)
    document, packed = evaluation()
    box.ask(7, document, packed)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        box.ask(8, *ask(exchange=8))
        return drawn(*arguments, **options)

    monkeypatch.setattr(quality, "drawn", interrupted)
    with pytest.raises(Superseded):
        answer_in_mailbox(PlanWithWeights(document, packed), folder, box, 7)
    assert box.replied() is None
    assert (folder / "evaluations.json").exists(), "what was begun counts"


@pytest.mark.parametrize("name", QUALITY_NAMES)
def test_the_gate_knows_the_numbers_and_lets_out_those_that_are_listed_and_in_their_range(name: str) -> None:
    good = {
        "outcome": 0,
        "round": 1,
        "exchange": 7,
        "quality_images": 20,
        name: 20 if name == "quality_images" else 0.5,
    }
    assert problem_of(Parcel({}, good), ALL) is None
    assert problem_of(Parcel({}, good), SitePolicy()) is not None
    for bad in (float("nan"), -3e9, 1e300, "0.5", True):
        assert problem_of(Parcel({}, {**good, name: bad}), ALL) is not None  # type: ignore[dict-item]
    arrays = {"head.weight": np.zeros((2, 3), np.uint16)}
    assert problem_of(Parcel(arrays, good), ALL) == "it holds arrays, and the numbers of an evaluation"
    failure = {"outcome": int(Outcome.FAILED), "round": 1, "exchange": 7, name: good[name]}
    assert problem_of(Parcel({}, failure), ALL) is not None, "of a failure a code leaves and nothing else"


def test_a_file_that_is_no_feature_network_is_a_mistake_before_the_site_joins(
    tmp_path: Path, pictures: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "data.npz", images=pictures)
    (tmp_path / "network.bin").write_bytes(b"no network")
    arguments = ["--data", str(tmp_path / "data.npz"), "--out", str(tmp_path / "site"), "--features"]
    assert cli.run(app, "maskdm-client", [*arguments, str(tmp_path / "network.bin")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--features" in line
    assert "no feature network" in line
