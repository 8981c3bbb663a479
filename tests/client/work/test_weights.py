"""Weights that come down in part: the rest stays at the site, and the work is the same as with whole ones."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maskdm.config import Trainable
from maskdm.federated.parcel import Outcome, Parcel
from maskdm.federated.plan import RoundPlan
from maskdm.run.tensorfile import pack
from maskdm_client.folder.mailbox import Mailbox
from maskdm_client.refusals import RestMissing
from maskdm_client.work import weights as under_test
from maskdm_client.work.answer import answer
from maskdm_client.work.weights import PlanWithWeights, read_weights

Ask = Callable[..., tuple[str, bytes]]
MakePlan = Callable[..., RoundPlan]
MakeSite = Callable[..., Path]

PARTS = pytest.mark.parametrize("train", ["norm-bias", "adapters"])


@pytest.fixture
def part_of(make_plan: MakePlan, weights: dict[str, Tensor]) -> Callable[..., tuple[str, bytes]]:
    """A plan with only those weights that it changes."""

    def make(**changes: Any) -> tuple[str, bytes]:
        plan = make_plan(**changes)
        return plan.model_dump_json(), pack({name: weights[name].numpy() for name in plan.changed()})

    return make


def at(folder: Path, question: tuple[str, bytes], exchange: int) -> Parcel:
    """What the worker of a site answers."""
    box = Mailbox(folder)
    box.ask(exchange, *question)
    request = box.request()
    assert request is not None  # of which weights lie in a file that nobody may write to
    return answer(PlanWithWeights(request.document, request.weights), folder, box, exchange)


def outcome(parcel: Parcel) -> Outcome:
    return Outcome(int(parcel.scalars["outcome"]))


@PARTS
def test_the_rest_is_kept_so_that_the_part_that_changes_is_enough(
    make_site: MakeSite, ask: Ask, part_of: Ask, train: Trainable
) -> None:
    folder = make_site()
    assert outcome(at(folder, ask(train=train, exchange=1), 1)) == Outcome.DONE
    part = at(folder, part_of(train=train, exchange=2, round=2), 2)
    whole = at(folder, ask(train=train, exchange=3, round=2), 3)
    assert outcome(part) == outcome(whole) == Outcome.DONE
    assert part.arrays.keys() == whole.arrays.keys()
    assert all((part.arrays[name] == whole.arrays[name]).all() for name in part.arrays)


@PARTS
def test_a_site_without_the_rest_asks_for_the_whole(make_site: MakeSite, part_of: Ask, train: Trainable) -> None:
    folder = make_site()
    assert outcome(at(folder, part_of(train=train, exchange=1), 1)) == Outcome.UNKNOWN


@pytest.mark.parametrize("damaged", [lambda content: content[:-5], lambda content: content[:-4] + b"\xff" * 4])
def test_so_does_one_whose_copy_was_damaged(
    make_site: MakeSite, ask: Ask, part_of: Ask, damaged: Callable[[bytes], bytes]
) -> None:
    folder = make_site()
    at(folder, ask(train="norm-bias", exchange=1), 1)
    (kept,) = (folder / "work").glob("rest-*")
    kept.write_bytes(damaged(kept.read_bytes()))
    question = part_of(train="norm-bias", exchange=2, round=2)
    assert outcome(at(folder, question, 2)) == Outcome.UNKNOWN
    assert outcome(at(folder, ask(train="norm-bias", exchange=3, round=2), 3)) == Outcome.DONE
    assert outcome(at(folder, part_of(train="norm-bias", exchange=4, round=3), 4)) == Outcome.DONE


def test_where_all_weights_are_trained_a_part_is_refused_and_nothing_is_kept(
    make_site: MakeSite, ask: Ask, part_of: Ask
) -> None:
    folder = make_site()
    assert outcome(at(folder, ask(exchange=1), 1)) == Outcome.DONE
    assert not list((folder / "work").glob("rest-*"))
    document, _ = ask(exchange=2)
    _, part = part_of(train="norm-bias")
    assert outcome(at(folder, (document, part), 2)) == Outcome.PLAN_REFUSED


def test_another_federation_makes_room_for_itself(make_site: MakeSite, ask: Ask) -> None:
    folder = make_site()
    at(folder, ask(train="norm-bias", encoding="int8", exchange=1), 1)
    before = {path.name for path in (folder / "work").glob("re[s]*-*")}
    assert {name.split("-")[0] for name in before} == {"rest", "residual"}
    at(folder, ask(train="norm-bias", encoding="int8", federation="f" * 16, exchange=2), 2)
    after = {path.name for path in (folder / "work").glob("re[s]*-*")}
    assert after == {name.replace("0123456789abcdef", "f" * 16) for name in before}


@PARTS
def test_the_same_work_has_the_same_key_whether_its_weights_come_whole_or_in_part(
    ask: Ask, part_of: Ask, weights: dict[str, Tensor], make_plan: MakePlan, train: Trainable
) -> None:
    assert PlanWithWeights(*ask(train=train)).key == PlanWithWeights(*part_of(train=train, exchange=9)).key != ""
    changed = make_plan(train=train).changed()[-1]
    other = {**weights, changed: weights[changed] + 1}
    assert PlanWithWeights(*ask(other, train=train)).key != PlanWithWeights(*ask(train=train)).key


@pytest.mark.parametrize(("train", "hashed"), [("all", 1), ("norm-bias", 2), ("adapters", 2)])
def test_a_plan_and_its_weights_are_parsed_once_and_all_of_them_hashed_once(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, train: Trainable, hashed: int
) -> None:
    """Where only some are trained, these have a key of their own."""
    done: Counter[str] = Counter()

    def counted(name: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any) -> Any:
            done[name] += 1
            return act(*arguments)

        return counting

    for name in ("unpack", "work_key"):
        monkeypatch.setattr(under_test, name, counted(name, getattr(under_test, name)))
    monkeypatch.setattr(RoundPlan, "model_validate_json", counted("parsed", RoundPlan.model_validate_json))
    came = PlanWithWeights(*ask(train=train))
    key, weights = came.key, read_weights(came, None)
    whole = came.key_of(weights)
    assert came.key == key
    assert (whole == key) == (train == "all")
    assert done == {"unpack": 1, "parsed": 1, "work_key": hashed}


def test_a_virtual_site_neither_keeps_nor_completes(
    tmp_path: Path, ask: Ask, part_of: Ask, weights: dict[str, Tensor]
) -> None:
    found = read_weights(PlanWithWeights(*ask(train="norm-bias")), None)
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    with pytest.raises(RestMissing):
        read_weights(PlanWithWeights(*part_of(train="norm-bias")), tmp_path)
