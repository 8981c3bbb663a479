"""The attacks work: at a site that lets every plan in they bring out images, pixels and names. Else nothing that the
tests of a defended site say would mean anything."""

from typing import Any

import pytest
from benchmarks.attacks import gates, gradients, labels, oracles
from benchmarks.attacks.site import Images, Limits, best_psnr, fresh_weights, held_out_rows

from .conftest import SMALL, Make


@pytest.mark.parametrize(("encoding", "least"), [("fp32", 55), ("bf16", 40), ("int8", 30), ("topk", 40)])
def test_an_update_of_one_image_is_the_image_with_honest_weights_and_a_small_loss_weight(
    attacker: Make, images: Images, encoding: Any, least: float
) -> None:
    found = gradients.single_image(attacker(encoding=encoding), fresh_weights(SMALL), gradients.TINY)
    assert best_psnr(found, images) > least


@pytest.mark.parametrize(("train", "least"), [("all", 55), ("adapters", 55), ("norm-bias", 30)])
def test_a_gate_by_time_takes_one_image_out_of_512(attacker: Make, images: Images, train: Any, least: float) -> None:
    assert best_psnr(gates.one_of_many(attacker(), 512, 1, train), images) > least


def test_many_steps_of_batches_are_no_defence(attacker: Make, images: Images) -> None:
    assert best_psnr(gates.one_of_many(attacker(limits=Limits(16, 64, 8)), 16, 1), images) > 55


def test_gates_by_brightness_take_several_images_out_of_one_update(
    attacker: Make, images: Images, public: Images, free: float
) -> None:
    found = [best_psnr([image], images) for image in gates.by_brightness(attacker(), 512, 60, public)]
    assert sum(decibels > free + 1 for decibels in found) >= 2


def test_losses_of_a_crafted_network_are_a_held_out_image(attacker: Make, images: Images, free: float) -> None:
    asker = attacker()
    found = list(oracles.held_out_image(asker, oracles.coarse(SMALL, 8), 1, 3.0))
    assert best_psnr(found, images[held_out_rows(asker.folder)]) > 15
    assert asker.questions == 10


def test_outcome_codes_say_how_bright_the_brightest_held_out_image_is(
    attacker: Make, images: Images, public: Images
) -> None:
    asker = attacker()
    found = oracles.brightest_held_out(asker, public, 100, 8)
    true = images[held_out_rows(asker.folder)].reshape(-1, images[0].size).mean(axis=1).max()
    assert abs(found - true) < 8


@pytest.mark.parametrize("guess", [labels.by_loss, labels.by_update])
def test_names_of_folders_are_told(attacker: Make, images: Images, guess: Any) -> None:
    asker = attacker(labels=["masked" if i % 3 else "bare" for i in range(len(images))])
    assert guess(asker, ["masked", "bare", "tumour"]) == {"masked", "bare"}
