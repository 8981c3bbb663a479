"""The optimiser's moments that a site keeps from round to round, where the coordinator asks for it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from maskdm.federated.parcel import Outcome, Parcel
from maskdm.federated.plan import RoundPlan
from maskdm.run.runfolder import read_lines
from maskdm.seeding import derive_seed
from maskdm_client.folder.job import Job
from maskdm_client.work.answer import answer
from maskdm_client.work.weights import PlanWithWeights

Ask = Callable[..., tuple[str, bytes]]
MakePlan = Callable[..., RoundPlan]
MakeSite = Callable[..., Path]


def moments(folder: Path) -> dict[int, dict[str, Tensor]]:
    """Those that lie at the site, by round."""
    paths = (folder / "work").glob("moments-*.safetensors")
    return {int(path.stem.rpartition("-")[2]): load_file(path) for path in paths}


@pytest.fixture
def draws_of_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites whose randomness follows from the round alone, so that their updates can be compared."""
    monkeypatch.setattr(Job, "seed", lambda job, purpose, *_: derive_seed(purpose, job.plan.round))


def same(one: Parcel, other: Parcel) -> bool:
    return all((one.arrays[name] == other.arrays[name]).all() for name in one.arrays)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], tensor) for name, tensor in other.items())


def steps(found: dict[str, Tensor]) -> set[float]:
    return {float(tensor) for name, tensor in found.items() if name.startswith("step.")}


def test_the_optimiser_counts_its_steps_and_goes_on_through_the_rounds(make_site: MakeSite, ask: Ask) -> None:
    folder = make_site()
    for number in (1, 2, 4):  # it was not asked in the third
        answer(PlanWithWeights(*ask(round=number, rounds=5, local_images=32, batch_size=8, keep_moments=True)), folder)
    found = moments(folder)
    assert found.keys() == {2, 4}  # what the last round began with, and what it left
    assert steps(found[2]) == {8.0}
    assert steps(found[4]) == {12.0}


@pytest.mark.usefixtures("draws_of_the_round")
def test_moments_change_what_the_next_round_gives_and_without_them_nothing_is_kept(
    make_site: MakeSite, ask: Ask
) -> None:
    kept, anew = make_site(name="kept"), make_site(name="anew")
    replies = {}
    for folder, keep in ((kept, True), (anew, False)):
        replies[folder] = [answer(PlanWithWeights(*ask(round=number, keep_moments=keep)), folder) for number in (1, 2)]
    assert same(replies[kept][0], replies[anew][0])
    assert not same(replies[kept][1], replies[anew][1])
    assert not moments(anew)


def test_a_round_done_again_is_the_same_and_leaves_the_same(make_site: MakeSite, ask: Ask) -> None:
    folder = make_site()
    answer(PlanWithWeights(*ask(round=1, keep_moments=True)), folder)
    second = answer(PlanWithWeights(*ask(round=2, keep_moments=True)), folder)
    left = moments(folder)
    again = answer(PlanWithWeights(*ask(round=2, keep_moments=True, exchange=8)), folder)
    assert same(second, again)
    assert all(equal(moments(folder)[number], found) for number, found in left.items())


def test_what_the_gate_stops_leaves_the_moments_of_earlier_rounds_as_they_are(make_site: MakeSite, ask: Ask) -> None:
    folder = make_site()
    answer(PlanWithWeights(*ask(round=1, keep_moments=True)), folder)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"max_relative_norm": 1.0', '"max_relative_norm": 1e-9'))
    assert answer(PlanWithWeights(*ask(round=2, keep_moments=True)), folder).scalars["outcome"] == Outcome.GATE_REFUSED
    assert moments(folder).keys() == {1}


@pytest.mark.usefixtures("draws_of_the_round")
@pytest.mark.parametrize("train", ["norm-bias", "adapters"])
def test_moments_of_other_parameters_are_not_taken(make_site: MakeSite, ask: Ask, train: str) -> None:
    folder = make_site()
    answer(PlanWithWeights(*ask(round=1, keep_moments=True)), folder)
    (folder / "approvals.json").unlink()  # other terms
    changed = answer(PlanWithWeights(*ask(round=2, keep_moments=True, train=train)), folder)
    assert changed.scalars["outcome"] == Outcome.DONE
    fresh = answer(PlanWithWeights(*ask(round=2, train=train)), make_site(name="fresh"))
    assert same(changed, fresh)


def test_another_federation_removes_them(make_site: MakeSite, ask: Ask) -> None:
    folder = make_site()
    answer(PlanWithWeights(*ask(round=1, keep_moments=True)), folder)
    answer(PlanWithWeights(*ask(round=1, federation="f" * 16)), folder)
    assert not moments(folder)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def another_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 100)


def no_numbers(path: Path) -> None:
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize("kind", ["moments", "residual"])
@pytest.mark.parametrize("damage", [empty, cut_off, another_header, no_numbers])
def test_what_is_damaged_is_dropped_with_a_word_and_the_rounds_go_on(
    make_site: MakeSite, ask: Ask, damage: Callable[[Path], None], kind: str
) -> None:
    folder = make_site()
    wanted = {"keep_moments": True} if kind == "moments" else {"encoding": "int8"}
    answer(PlanWithWeights(*ask(round=1, rounds=3, local_images=8, **wanted)), folder)
    (path,) = (folder / "work").glob(f"{kind}-*")
    damage(path)
    more = [PlanWithWeights(*ask(round=n, rounds=3, local_images=8, **wanted)) for n in (2, 3)]
    outcomes = [answer(came, folder).scalars["outcome"] for came in more]
    assert outcomes == [Outcome.DONE, Outcome.DONE]
    assert not path.exists()
    (dropped,) = [event for event in read_lines(folder / "events.jsonl") if event["event"] == "dropped"]
    assert path.name in dropped["reason"]
