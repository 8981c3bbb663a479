"""What a coordinator gets out of a site with the default policy: nothing better than what it has without asking."""

from collections.abc import Iterable
from typing import Any

import pytest
from benchmarks.attacks import background, gradients, labels, oracles, picks
from benchmarks.attacks.site import Coordinator, Images, best_psnr, fresh_weights, held_out_rows
from torch import Tensor

from maskdm.federated.parcel import Outcome

from .conftest import SMALL, Make

# Strict: whoever closes it takes the mark away.
open_today = pytest.mark.xfail(
    reason="a prior that the attacker made, at first contact: stopped by differential privacy or secure aggregation, "
    "or where the site approves only a prior whose origin it knows; no look at weights or gradients stops it",
    strict=True,
    raises=AssertionError,
)


def leaks(found: Iterable[Tensor], images: Images, free: float) -> bool:
    """Whether one of several reconstructions is clearly better than what comes free; asks no more than it takes."""
    return any(best_psnr([image], images) > free + 1 for image in found)


def was_refused(asker: Coordinator) -> bool:
    """Whether every question was: for what the weights look like, for gradients of a few images, or as one too many."""
    looked_at = {Outcome.PLAN_REFUSED, Outcome.GATE_REFUSED}
    codes = set(asker.refusals)
    return asker.questions == len(asker.refusals) and bool(codes & looked_at) and codes <= looked_at | {Outcome.POLICY}


@pytest.mark.parametrize("train", ["all", "norm-bias", "adapters"])
@pytest.mark.parametrize("batch", [1, pytest.param(512, marks=pytest.mark.slow)])
def test_no_gate_by_time_gives_an_image(outsider: Make, images: Images, free: float, train: Any, batch: int) -> None:
    asker = outsider()
    assert not leaks(picks.one_of_many(asker, batch, 3, train, questions=2), images, free)
    assert batch > 1 or was_refused(asker)


@pytest.mark.parametrize("train", ["all", pytest.param("adapters", marks=pytest.mark.slow)])
def test_no_gate_by_time_gives_an_image_where_few_weights_are_next_to_zero(
    outsider: Make, images: Images, free: float, train: Any
) -> None:
    """They pass the look at weights; the look at gradients finds the rows that one image moved."""
    asker = outsider()
    assert not leaks(picks.one_of_many(asker, 1, 3, train, questions=8, wide=True), images, free)
    assert Outcome.GATE_REFUSED in asker.refusals


def test_no_gate_by_brightness_gives_an_image(outsider: Make, images: Images, public: Images, free: float) -> None:
    asker = outsider()
    assert not leaks(picks.by_brightness(asker, 1, 60, public), images, free)
    assert was_refused(asker)


def test_no_quiet_head_gives_an_image(outsider: Make, images: Images, free: float) -> None:
    asker = outsider()
    assert not leaks(gradients.single_image(asker, gradients.quiet(fresh_weights(SMALL)), questions=2), images, free)
    assert not asker.refusals


@pytest.mark.parametrize("size", [(1, 1), (1, 256), (16, 64), (256, 256), (16, 240)])
def test_no_update_of_few_images_or_steps_is_made(outsider: Make, size: tuple[int, int]) -> None:
    asker = outsider()
    plan = asker.plan(batch_size=size[0], local_images=size[1])
    assert asker.update(plan, fresh_weights(SMALL)) is None
    assert asker.refusals == [Outcome.POLICY]


@open_today
@pytest.mark.parametrize(
    "encoding",
    ["bf16", *(pytest.param(other, marks=pytest.mark.slow) for other in ("fp32", "topk"))],
)
def test_no_gate_beside_a_background_gives_an_image(outsider: Make, images: Images, free: float, encoding: Any) -> None:
    assert not leaks(background.beside_a_background(outsider(encoding=encoding), 3, 16), images, free)


def test_no_gate_behind_vectors_gives_an_image(outsider: Make, images: Images, free: float) -> None:
    """As it was before weights next to zero were counted. Nobody filled its weights yet, as those of the attack above
    were, nor read what comes another way: that it is refused proves nothing of the next one."""
    asker = outsider()
    assert not leaks(picks.behind_vectors(asker, 3, 16), images, free)
    assert was_refused(asker)


def test_no_losses_are_a_held_out_image(outsider: Make, images: Images, free: float) -> None:
    asker = outsider()
    found = list(oracles.held_out_image(asker, oracles.coarse(SMALL, 8), 1, 3.0))
    assert not leaks(found, images[held_out_rows(asker.folder)], free)


@pytest.mark.parametrize("last", ["measure", "finish"])
def test_questions_of_any_kind_end_after_ten_a_day(outsider: Make, last: str) -> None:
    asker, weights = outsider(), fresh_weights(SMALL)
    told = [asker.loss(weights, federation=f"{number:016x}") for number in range(10)]
    assert all(loss == loss for loss in told)
    assert asker.ask(asker.plan(action=last), weights) is None
    assert asker.refusals == [Outcome.POLICY]


def test_codes_of_work_on_the_images_end_after_three(outsider: Make) -> None:
    asker = outsider()
    deep = asker.prior.model_copy(update={"model": SMALL.model_copy(update={"depth": 50})})
    weights = fresh_weights(deep.model)
    for name, tensor in weights.items():
        if "skip" in name and tensor.dim() > 1:
            tensor.mul_(9.0 / tensor.square().mean().sqrt())  # within bounds, and so many blocks of it overflow
    for seed in range(5):
        asker.loss(weights, deep, seed=seed)
    assert asker.refusals == [Outcome.DIVERGED] * 3 + [Outcome.POLICY] * 2


@pytest.mark.parametrize("guess", [labels.by_loss, labels.by_code, labels.by_update])
def test_no_name_of_a_folder_is_told(outsider: Make, images: Images, guess: Any) -> None:
    asker = outsider(labels=["masked" if i % 3 else "bare" for i in range(len(images))])
    assert guess(asker, ["masked", "bare", "tumour"]) == set()
