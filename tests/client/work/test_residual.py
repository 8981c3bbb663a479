"""What coarse encodings round away comes with a later round: nothing is lost, only late."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskdm.config import Encoding
from maskdm.federated.encoding import decode, encode
from maskdm.federated.parcel import Outcome
from maskdm.federated.plan import RoundPlan
from maskdm.run.tensorfile import Arrays
from maskdm_client.work.answer import answer
from maskdm_client.work.residual import Residual
from maskdm_client.work.weights import PlanWithWeights

Ask = Callable[..., tuple[str, bytes]]
MakePlan = Callable[..., RoundPlan]
MakeSite = Callable[..., Path]

COARSE = pytest.mark.parametrize("encoding", ["int8", "topk"])


def drawn(plan: RoundPlan, seed: int) -> dict[str, Tensor]:
    """An update as training might give it: some weights change a hundred times as much as others."""
    random = torch.Generator().manual_seed(seed)
    scales = {name: 10 ** (-2 * float(torch.rand((), generator=random))) for name in plan.shapes()}
    return {name: scales[name] * torch.randn(shape, generator=random) for name, shape in plan.shapes().items()}


def zeros(plan: RoundPlan) -> dict[str, Tensor]:
    return {name: torch.zeros(shape) for name, shape in plan.shapes().items()}


def send(folder: Path, plan: RoundPlan, update: dict[str, Tensor]) -> Arrays:
    """What a round does with an update."""
    residual = Residual(folder, plan)
    whole = residual.added_to(update)
    sent = encode(whole, plan.encoding, plan.topk_share)
    residual.keep(whole, sent)
    return sent


def decoded(sent: Arrays, plan: RoundPlan) -> dict[str, Tensor]:
    return {name: decode(sent, name, shape, plan.encoding) for name, shape in plan.shapes().items()}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*")}


def assert_equal_but_for_rounding(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)


@given(
    encoding=st.sampled_from(["int8", "topk"]),
    share=st.floats(0.01, 1),
    train=st.sampled_from(["all", "norm-bias"]),
    rounds=st.lists(st.integers(1, 20), min_size=1, max_size=4, unique=True).map(sorted),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=25)
def test_what_was_sent_in_all_rounds_and_the_last_residual_sum_up_to_the_true_updates(
    make_plan: MakePlan, encoding: Encoding, share: float, train: str, rounds: list[int], seed: int
) -> None:
    """Also where the site was not asked in some of the rounds."""
    changes = {"encoding": encoding, "topk_share": share, "train": train}
    true, sent = zeros(make_plan(train=train)), zeros(make_plan(train=train))
    with tempfile.TemporaryDirectory() as folder:
        for number in rounds:
            plan = make_plan(round=number, **changes)
            update = drawn(plan, seed + number)
            arrived = decoded(send(Path(folder), plan, update), plan)
            for name in true:
                true[name] += update[name]
                sent[name] += arrived[name]
        plan = make_plan(round=rounds[-1] + 1, **changes)
        left = Residual(Path(folder), plan).added_to(zeros(plan))
    assert_equal_but_for_rounding({name: sent[name] + left[name] for name in sent}, true)


@COARSE
def test_what_is_sent_without_any_residual_is_lost(make_plan: MakePlan, tmp_path: Path, encoding: str) -> None:
    """Or else the tests of this file say nothing."""
    plan = make_plan(encoding=encoding)
    update = drawn(plan, 0)
    arrived = decoded(send(tmp_path, plan, update), plan)
    assert any((arrived[name] - update[name]).abs().max() > 1e-3 for name in update)


@COARSE
def test_a_round_that_is_done_again_gives_the_same_reply_and_the_same_residual(
    make_plan: MakePlan, tmp_path: Path, encoding: str
) -> None:
    first, second = (make_plan(encoding=encoding, round=number) for number in (1, 2))
    send(tmp_path, first, drawn(first, 1))
    sent = send(tmp_path, second, drawn(second, 2))
    before = files(tmp_path)
    again = send(tmp_path, second, drawn(second, 2))
    assert all((sent[name] == again[name]).all() for name in sent)
    assert files(tmp_path) == before


@COARSE
def test_a_round_that_is_done_again_after_rounds_without_this_site_is_the_same_too(
    make_plan: MakePlan, tmp_path: Path, encoding: str
) -> None:
    first, fifth = (make_plan(encoding=encoding, round=number, rounds=9) for number in (1, 5))
    send(tmp_path, first, drawn(first, 1))
    sent = send(tmp_path, fifth, drawn(fifth, 2))
    left = Residual(tmp_path, make_plan(encoding=encoding, round=6, rounds=9)).added_to(zeros(fifth))
    again = send(tmp_path, fifth, drawn(fifth, 2))
    assert all((sent[name] == again[name]).all() for name in sent)
    left_again = Residual(tmp_path, make_plan(encoding=encoding, round=6, rounds=9)).added_to(zeros(fifth))
    assert all(torch.equal(left[name], left_again[name]) for name in left)


@COARSE
def test_the_first_round_sends_the_update_alone_whatever_lies_there(
    make_plan: MakePlan, tmp_path: Path, encoding: str
) -> None:
    """A federation that went back to its first round, e.g. from its server's backup."""
    first, second = (make_plan(encoding=encoding, round=number) for number in (1, 2))
    send(tmp_path, second, drawn(second, 2))
    update = Residual(tmp_path, first).added_to(drawn(first, 1))
    assert all(torch.equal(update[name], tensor) for name, tensor in drawn(first, 1).items())


@COARSE
def test_a_federation_does_not_touch_what_another_left(make_plan: MakePlan, tmp_path: Path, encoding: str) -> None:
    other = make_plan(encoding=encoding, federation="f" * 16)
    send(tmp_path, other, drawn(other, 1))
    before = files(tmp_path)
    plan = make_plan(encoding=encoding, round=9)
    update = drawn(plan, 2)
    assert all(torch.equal(whole, update[name]) for name, whole in Residual(tmp_path, plan).added_to(update).items())
    send(tmp_path, plan, update)
    assert files(tmp_path).items() > before.items()


def test_files_that_look_like_residuals_but_are_none_are_left_alone(make_plan: MakePlan, tmp_path: Path) -> None:
    name = f"residual-{make_plan().federation}-1.safetensors"
    for foreign in (f".{name}.123.tmp", f"{name}.bak", name.replace("-1.", "-x."), name.replace("-1.", "-.")):
        (tmp_path / foreign).write_text("not whole")
    before = files(tmp_path)
    plan = make_plan(encoding="int8", round=4)
    send(tmp_path, plan, drawn(plan, 1))
    assert files(tmp_path).items() > before.items()


@COARSE
def test_only_the_residuals_of_the_last_two_rounds_are_kept(make_plan: MakePlan, tmp_path: Path, encoding: str) -> None:
    for number in range(1, 12):
        plan = make_plan(encoding=encoding, round=number, rounds=20)
        send(tmp_path, plan, drawn(plan, number))
        kept = {max(1, number - 1), number}
        assert files(tmp_path).keys() == {f"residual-{plan.federation}-{n}.safetensors" for n in kept}


@pytest.mark.parametrize("train", ["all", "adapters"])
@pytest.mark.parametrize("encoding", ["bf16", "fp32", "int8", "topk"])
def test_adapters_and_fine_encodings_keep_no_residual(
    make_plan: MakePlan, tmp_path: Path, encoding: str, train: str
) -> None:
    plan = make_plan(encoding=encoding, train=train)
    send(tmp_path, plan, drawn(plan, 1))
    assert bool(files(tmp_path)) == (train == "all" and encoding in ("int8", "topk"))


def test_a_residual_of_other_weights_is_not_added(make_plan: MakePlan, tmp_path: Path) -> None:
    """Of a federation that goes on with other options."""
    for train in ("norm-bias", "adapters"):
        everything = make_plan(encoding="int8", round=1)
        send(tmp_path, everything, drawn(everything, 1))
        plan = make_plan(encoding="int8", round=2, train=train)
        update = drawn(plan, 2)
        whole = Residual(tmp_path, plan).added_to(update)
        assert all(torch.equal(whole[name], update[name]) for name in update)


@COARSE
def test_at_a_site_a_round_done_again_is_the_same_and_builds_on_what_the_round_before_left(
    make_site: MakeSite, ask: Ask, encoding: str
) -> None:
    folder = make_site()
    answer(PlanWithWeights(*ask(encoding=encoding, round=1)), folder)
    second = answer(PlanWithWeights(*ask(encoding=encoding, round=2)), folder)
    left = {name: data for name, data in files(folder / "work").items() if name.startswith("residual-")}
    assert len(left) == 2
    again = answer(PlanWithWeights(*ask(encoding=encoding, round=2, exchange=8)), folder)
    assert all((second.arrays[name] == again.arrays[name]).all() for name in second.arrays)
    assert left.items() <= files(folder / "work").items()
    for name in left:
        (folder / "work" / name).unlink()
    without = answer(PlanWithWeights(*ask(encoding=encoding, round=2)), folder)
    assert any((second.arrays[name] != without.arrays[name]).any() for name in second.arrays)


@COARSE
def test_what_the_gate_stops_leaves_the_residual_of_earlier_rounds_as_it_is(
    make_site: MakeSite, ask: Ask, encoding: str
) -> None:
    folder = make_site()
    answer(PlanWithWeights(*ask(encoding=encoding, round=1)), folder)
    before = files(folder / "work")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"max_relative_norm": 1.0', '"max_relative_norm": 1e-9'))
    assert answer(PlanWithWeights(*ask(encoding=encoding, round=2)), folder).scalars["outcome"] == Outcome.GATE_REFUSED
    assert files(folder / "work") == before
