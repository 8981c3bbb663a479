"""A round's training at a site: what it learns, what ends it, and that no interruption changes what comes out."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from maskdm.errors import GateRefused, TrainingDiverged
from maskdm.federated.encoding import check, decode
from maskdm.federated.parcel import LARGEST_LOSS, rounded
from maskdm.federated.plan import RoundPlan, work_key
from maskdm.networks.trainable import delta
from maskdm.run.events import Event
from maskdm.run.runfolder import read_lines
from maskdm.run.tensorfile import bytes_of
from maskdm.training import loop as training
from maskdm.training.checkpoint import model_from, save_state
from maskdm.training.loop import TrainingState
from maskdm_client.folder import unfinished as saved
from maskdm_client.folder.carried_over import CarriedOver
from maskdm_client.folder.events import LossMeasured, TrainingGoesOn
from maskdm_client.folder.job import Job
from maskdm_client.folder.settings import SiteSettings, load_settings
from maskdm_client.folder.unfinished import UnfinishedWork
from maskdm_client.refusals import Superseded
from maskdm_client.work import fine_tuning
from maskdm_client.work.answer import answer
from maskdm_client.work.fine_tuning import Done, fine_tune, held_out_loss
from maskdm_client.work.local_data import LocalImages, local_images
from maskdm_client.work.weights import PlanWithWeights

MakePlan = Callable[..., RoundPlan]
MakeSite = Callable[..., Path]
Say = Callable[[Event], None]
Asked = Callable[[], bool]

TRAIN = ("all", "norm-bias", "adapters")
ENCODINGS = ("bf16", "fp32", "int8", "topk")


class Killed(BaseException):
    """What a crash is to the code that it ends."""


class Site:
    """Runs `fine_tune` on the pictures of a site, and remembers what it said."""

    def __init__(self, folder: Path, weights: dict[str, Tensor]) -> None:
        self.folder, self.weights = folder, weights
        self.settings: SiteSettings = load_settings(folder)
        self.images: LocalImages = local_images(self.settings, folder, 8, 1)
        self.said: list[Event] = []

    def loss(self, plan: RoundPlan, weights: dict[str, Tensor], key: str) -> float:
        return held_out_loss(model_from(weights, plan.model.model), self.job(plan, key), self.images).loss

    def job(self, plan: RoundPlan, key: str, say: Say = lambda event: None, superseded: Asked = lambda: False) -> Job:
        return Job(plan, key, self.settings, self.folder, say, superseded)

    def train(
        self,
        plan: RoundPlan,
        on: Say = lambda event: None,
        superseded: Asked = lambda: False,
        key: str = "key",
        folder: str = "work",
    ) -> Done:
        """One start of the work; `on` hears what it says."""
        work = self.folder / folder
        work.mkdir(exist_ok=True)
        self.said = []

        def say(event: Event) -> None:
            self.said.append(event)
            on(event)

        model = model_from(self.weights, plan.model.model)
        unfinished = UnfinishedWork(work, key)
        moments = CarriedOver(work, "moments", plan, wanted=True)
        done = fine_tune(model, self.job(plan, key, say, superseded), self.weights, self.images, unfinished, moments)
        unfinished.forget()
        return done

    def images_at_start(self) -> int:
        return next(event.images for event in self.said if isinstance(event, LossMeasured))

    def left(self) -> list[str]:
        """What was saved, each state with what its halves showed."""
        left = sorted(path.name for path in (self.folder / "work").glob("training*"))
        states = [name for name in left if not name.endswith("-halves.safetensors")]
        assert len(left) == len(states) + sum(name.endswith(".safetensors") for name in states)
        return states


@pytest.fixture
def site(make_site: MakeSite, weights: dict[str, Tensor]) -> Site:
    return Site(make_site(), weights)


@pytest.fixture
def saves_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(saved, "SAVE_SHARE", 0)
    monkeypatch.setattr(fine_tuning, "REPORT_SECONDS", 0.0)


def dies_at(images: int) -> Say:
    def on(event: Event) -> None:
        if isinstance(event, TrainingGoesOn) and event.images == images:
            raise Killed

    return on


def assert_same(found: Done, expected: Done) -> None:
    """In all but the seconds."""
    assert found.update.keys() == expected.update.keys()
    assert all(torch.equal(found.update[name], expected.update[name]) for name in expected.update)
    assert found.moments.keys() == expected.moments.keys()
    assert all(torch.equal(found.moments[name], tensor) for name, tensor in expected.moments.items())
    rest: dict[str, Any] = {"update": {}, "moments": {}, "seconds": 0}
    assert replace(found, **rest) == replace(expected, **rest)


def length(update: dict[str, Tensor]) -> float:
    return float(sum(tensor.square().sum() for tensor in update.values()) ** 0.5)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("train", TRAIN)
def test_what_goes_up_is_what_was_asked_for_and_improves_the_model_of_who_adds_it(
    site: Site, make_plan: MakePlan, ask: Callable[..., tuple[str, bytes]], train: str, encoding: str
) -> None:
    changes = {"train": train, "adapter_rank": 2, "encoding": encoding, "topk_share": 0.5}
    changes |= {"local_images": 480, "lr": 3e-3 if train == "all" else 2e-2}
    plan = make_plan(**changes)
    sent = answer(PlanWithWeights(*ask(**changes)), site.folder)
    check(sent.arrays, plan.shapes(), plan.encoding, plan.topk_share)
    key = work_key(plan, (bytes_of(site.weights[name].numpy()) for name in sorted(site.weights)))
    before = site.loss(plan, site.weights, key)
    (found,) = [line for line in read_lines(site.folder / "events.jsonl") if line["event"] == "round"]
    assert found["loss_after"] < found["loss_before"] == before
    told = [sent.scalars[name] for name in ("loss_before", "loss_after")]
    assert told == [rounded(before), rounded(found["loss_after"])]
    shapes, improved = plan.shapes(), dict(site.weights)
    for name in plan.changed():
        improved[name] = improved[name] + delta(
            lambda part: decode(sent.arrays, part, shapes[part], plan.encoding), name, plan.train
        )
    after = site.loss(plan, improved, key)
    gained, real = (before - loss for loss in (found["loss_after"], after))
    if encoding != "topk":  # which leaves half of the values for later, and the others alone need not help
        assert real > 0.95 * gained
    if encoding == "fp32":
        assert after == pytest.approx(found["loss_after"], rel=1e-6)


@pytest.mark.parametrize("train", TRAIN)
def test_training_leaves_the_weights_that_came_as_they_were(
    site: Site, make_plan: MakePlan, weights: dict[str, Tensor], train: str
) -> None:
    before = {name: tensor.clone() for name, tensor in weights.items()}
    done = site.train(make_plan(train=train, lr=1e-2))
    assert length(done.update) > 0
    assert all(torch.equal(weights[name], before[name]) for name in weights)


@pytest.mark.usefixtures("saves_each_step")
@pytest.mark.parametrize("proximal", [0.0, 1.0])
@pytest.mark.parametrize("train", TRAIN)
def test_training_that_was_interrupted_ends_with_exactly_the_update_of_one_that_was_not(
    site: Site, make_plan: MakePlan, train: str, proximal: float
) -> None:
    plan = make_plan(train=train, proximal=proximal)
    whole = site.train(plan, folder="elsewhere")
    for images, begun in ((16, 0), (88, 8), (160, 80)):  # what was said last was not saved yet
        with pytest.raises(Killed):
            site.train(plan, on=dies_at(images))
        assert site.images_at_start() == begun
        assert site.left() == [f"training-{max(images - 8, 8)}.safetensors", "training.json"]
    assert_same(site.train(plan), whole)
    assert site.images_at_start() == 152
    assert site.left() == []


@pytest.mark.usefixtures("saves_each_step")
@pytest.mark.parametrize("error", [Killed, OSError], ids=["a crash", "a full disk"])
@pytest.mark.parametrize("failing", ["save_state", "write_json"])
def test_a_save_that_fails_leaves_the_one_before_it(
    site: Site, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch, failing: str, error: type[BaseException]
) -> None:
    whole = site.train(make_plan(), folder="elsewhere")
    write: Callable[..., None] = getattr(saved, failing)
    written: list[None] = []

    def fails(*arguments: Any) -> None:
        if len(written) >= 10:
            raise error
        written.append(None)
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(saved, failing, fails)
        with pytest.raises(Killed):
            site.train(make_plan(), on=dies_at(96))
    assert_same(site.train(make_plan()), whole)
    assert site.images_at_start() == 80
    assert site.left() == []


@pytest.mark.usefixtures("saves_each_step")
def test_other_work_does_not_take_up_what_was_saved(site: Site, make_plan: MakePlan) -> None:
    other = site.train(make_plan(round=2), key="other", folder="elsewhere")
    with pytest.raises(Killed):
        site.train(make_plan(), on=dies_at(88), key="this")
    assert_same(site.train(make_plan(round=2), key="other"), other)
    assert site.images_at_start() == 0
    assert site.left() == []


@pytest.mark.usefixtures("saves_each_step")
def test_a_newer_request_ends_the_work_between_two_steps_and_what_was_saved_can_be_gone_on_from(
    site: Site, make_plan: MakePlan
) -> None:
    whole = site.train(make_plan(), folder="elsewhere")

    def steps() -> int:
        return sum(isinstance(event, TrainingGoesOn) for event in site.said)

    with pytest.raises(Superseded):
        site.train(make_plan(), superseded=lambda: steps() >= 5)
    assert steps() == 5
    assert_same(site.train(make_plan()), whole)
    assert site.images_at_start() == 40


def test_a_request_that_comes_with_the_last_step_supersedes_the_work_too(site: Site, make_plan: MakePlan) -> None:
    def done() -> bool:
        return any(isinstance(event, TrainingGoesOn) and event.images == 160 for event in site.said)

    with pytest.raises(Superseded):
        site.train(make_plan(), superseded=done)


class Clock:
    """Time that passes only where the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    for module in (fine_tuning, saved):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=found.monotonic))
    monkeypatch.setattr(fine_tuning, "REPORT_SECONDS", 0.0)
    return found


def passing(clock: Clock, seconds: float, event_kind: str = "training") -> Say:
    def on(event: Event) -> None:
        if event.event == event_kind:
            clock.now += seconds

    return on


def test_minutes_end_the_work_and_the_images_really_seen_are_reported(
    site: Site, make_plan: MakePlan, clock: Clock
) -> None:
    done = site.train(make_plan(local_minutes=1), on=passing(clock, 10))
    assert (done.images_seen, done.seconds) == (48, 60)
    assert [event.images for event in site.said if isinstance(event, TrainingGoesOn)] == [8, 16, 24, 32, 40, 48]
    short = site.train(make_plan(local_images=48), folder="elsewhere")
    assert length(short.update) > 0
    assert all(torch.equal(done.update[name], short.update[name]) for name in short.update)


def test_images_end_the_work_where_they_come_first(site: Site, make_plan: MakePlan, clock: Clock) -> None:
    done = site.train(make_plan(local_minutes=1), on=passing(clock, 1))
    assert (done.images_seen, done.seconds) == (160, 20)


def test_a_site_whose_time_is_over_before_it_began_takes_one_step(
    site: Site, make_plan: MakePlan, clock: Clock
) -> None:
    done = site.train(make_plan(local_minutes=1), on=passing(clock, 3600, "measured"))
    assert done.images_seen == 8
    assert length(done.update) > 0


def test_minutes_count_what_was_spent_before_an_interruption(
    site: Site, make_plan: MakePlan, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved, "SAVE_SECONDS", 0.0)
    plan = make_plan(local_minutes=1)

    def dies(event: Event) -> None:
        passing(clock, 10)(event)
        dies_at(40)(event)

    with pytest.raises(Killed):
        site.train(plan, on=dies)  # 32 images and 40 s were saved
    clock.now += 7200
    done = site.train(plan, on=passing(clock, 10))
    assert site.images_at_start() == 32
    assert (done.images_seen, done.seconds) == (48, 60)


def test_saving_takes_at_most_a_twentieth_of_the_time(
    site: Site, make_plan: MakePlan, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves: list[int] = []

    def slow(path: Path, state: Any, training: Any) -> None:
        saves.append(state.images_seen)
        save_state(path, state, training)
        clock.now += 6

    monkeypatch.setattr(saved, "save_state", slow)
    site.train(make_plan(local_images=320), on=passing(clock, 10))
    # The first after SAVE_SECONDS = 60 s; each took 6 s, so that the next waits for 120 s.
    assert saves == [48, 144, 240]


def test_a_proximal_term_keeps_the_model_near_the_one_that_came(site: Site, make_plan: MakePlan) -> None:
    free, tied, bound = (length(site.train(make_plan(proximal=mu, lr=1e-2)).update) for mu in (0.0, 1.0, 100.0))
    assert bound < tied < free
    assert bound < 0.5 * free


def test_other_work_and_other_sites_draw_other_batches_and_noise_and_the_same_work_the_same(
    site: Site, make_plan: MakePlan
) -> None:
    plan = make_plan(local_images=8)
    first, again, other = (site.train(plan, key=key).update for key in ("key", "key", "other"))
    assert length(first) > 0
    assert all(torch.equal(first[name], again[name]) for name in first)
    (site.folder / ".secret").write_bytes(bytes(32))
    elsewhere = site.train(plan).update
    for update in (other, elsewhere):
        assert any(not torch.equal(first[name], update[name]) for name in first)


def test_a_site_that_took_no_step_has_no_update(
    site: Site, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = [0]

    def spoil(state: TrainingState, _: float) -> None:
        if state.steps >= good[0]:
            for parameter in state.model.parameters():
                parameter.grad = torch.full_like(parameter, math.nan)

    monkeypatch.setattr(training, "add_proximal_gradients", spoil)
    with pytest.raises(TrainingDiverged, match="in any of 5 steps"):
        site.train(make_plan(local_images=40))
    good[0] = 1
    done = site.train(make_plan(local_images=40))
    assert (done.skipped_steps, length(done.update) > 0) == (4, True)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize("measured", [0, 1], ids=["before", "after"])
def test_a_loss_that_is_no_number_is_divergence(
    site: Site, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch, measured: int, loss: float
) -> None:
    losses = [1.0, 1.0]
    losses[measured] = loss
    monkeypatch.setattr(fine_tuning, "denoising_losses", lambda *_, **__: torch.full((8,), losses.pop(0)))
    with pytest.raises(TrainingDiverged, match="the held-out loss is no number"):
        site.train(make_plan(local_images=8))


@pytest.mark.parametrize(
    ("losses", "stands_out"),
    [
        ([0.1] * 7 + [0.5], True),
        ([0.1, 0.11, 0.09, 0.1, 0.12, 0.1, 0.11, 0.5], True),
        ([0.1, 0.2, 0.05, 0.3, 0.15, 0.1, 0.25, 0.5], False),
        ([0.1, 0.11, 0.09, 0.1, 0.12, 0.1, 0.11, 0.13], False),
        ([0.1], True),
        ([0.1 + 0.001 * i for i in range(62)] + [3.0, 3.0], True),  # two that hide behind each other
    ],
)
def test_a_loss_that_is_one_images_affair_is_told_from_that_of_all(losses: list[float], stands_out: bool) -> None:
    assert fine_tuning.one_stands_out(torch.tensor(losses, dtype=torch.float64)) == stands_out


def test_losses_of_honest_models_are_those_of_all_images() -> None:
    """However few draws an image has; lognormal times, as ε-losses of few draws look."""
    for seed in range(200):
        randomness = torch.Generator().manual_seed(seed)
        for images in (8, 32, 512):
            draws = torch.randn(images, -(-1024 // images), generator=randomness, dtype=torch.float64).exp()
            assert not fine_tuning.one_stands_out(draws.clamp(max=LARGEST_LOSS).mean(dim=1))


def rewritten(change: Callable[[str, Tensor], tuple[str, Tensor]], which: str) -> Callable[[Path], None]:
    """Damage to the tensors of one of the two files of a state, as of a disk that kept all else."""

    def damage(folder: Path) -> None:
        files = sorted(folder.glob("training-*.safetensors"), key=lambda path: path.stem.endswith("halves"))
        path = files[which == "halves"]
        with safe_open(path, framework="pt") as file:
            about = file.metadata()
        save_file(dict(change(name, tensor) for name, tensor in load_file(path).items()), path, about)

    return damage


def cut_off(pattern: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for path in folder.glob(pattern):
            path.write_bytes(path.read_bytes()[:-5])

    return damage


def described(**changes: Any) -> Callable[[Path], None]:
    """Damage to the description; None takes an entry away."""

    def damage(folder: Path) -> None:
        about = json.loads((folder / "training.json").read_text()) | changes
        kept = {name: value for name, value in about.items() if value is not None}
        (folder / "training.json").write_text(json.dumps(kept))

    return damage


def listed(folder: Path) -> None:
    (folder / "training.json").write_text("[1, 2]")


def last_renamed(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    return (name.replace("norm.bias", "norm.bios"), tensor)


DAMAGE = {
    "no JSON": cut_off("training.json"),
    "a list": listed,
    "no state named": described(state=None),
    "a state that is gone": described(state="training-1.safetensors"),
    "a loss that is text": described(loss_before="low"),
    "no seconds": described(seconds=None),
    "a state cut off": cut_off("training-??.safetensors"),
    "halves cut off": cut_off("training-*-halves.safetensors"),
    "another weight": rewritten(last_renamed, "state"),
    "weights of another shape": rewritten(lambda name, tensor: (name, tensor[None]), "state"),
    "weights that are no numbers": rewritten(lambda name, tensor: (name, tensor * math.nan), "state"),
    "halves of another weight": rewritten(last_renamed, "halves"),
    "halves that are no numbers": rewritten(lambda name, tensor: (name, tensor * math.nan), "halves"),
}


@pytest.mark.usefixtures("saves_each_step")
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_unfinished_work_that_is_damaged_is_dropped_with_a_word_and_begun_anew(
    site: Site, make_plan: MakePlan, damage: Callable[[Path], None]
) -> None:
    plan = make_plan(local_images=80)
    whole = site.train(plan, folder="elsewhere")
    with pytest.raises(Killed):
        site.train(plan, on=dies_at(64))
    damage(site.folder / "work")
    done = site.train(plan)
    assert site.images_at_start() == 0
    assert_same(done, whole)
    (dropped,) = [event for event in read_lines(site.folder / "events.jsonl") if event["event"] == "dropped"]
    assert "--resume" not in dropped["reason"]
    assert site.left() == []


@pytest.mark.usefixtures("saves_each_step")
def test_what_was_seen_before_an_interruption_counts_after_it(
    site: Site, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that was one image's affair, and a gate that was open."""
    monkeypatch.setattr(fine_tuning, "one_stands_out", lambda losses: True)
    with pytest.raises(Killed):
        site.train(make_plan(), on=dies_at(88))
    monkeypatch.setattr(fine_tuning, "one_stands_out", lambda losses: False)
    assert site.train(make_plan()).before.one_stands_out
    with pytest.raises(Killed):
        site.train(make_plan(), on=dies_at(88))
    (halves,) = (site.folder / "work").glob("training-*-halves.safetensors")
    sums = load_file(halves)
    assert float(sums["steps"]) == 10
    save_file({name: 1e6 * tensor if name.endswith("longer") else tensor for name, tensor in sums.items()}, halves)
    with pytest.raises(GateRefused, match="a few images alone"):
        site.train(make_plan())
