"""What a coordinator gets out of a site with the default policy: nothing that it would not get without asking."""

from typing import Any

import pytest
from benchmarks.attacks import gates, gradients, labels, oracles
from benchmarks.attacks.site import Images, best_psnr, fresh_weights

from .conftest import SMALL, Make

# Strict: whoever closes one of them takes its mark away.
open_today = pytest.mark.xfail(reason="issue G: open until its defences are in", strict=True, raises=AssertionError)


@open_today
@pytest.mark.parametrize("train", ["all", "norm-bias", "adapters"])
def test_no_gate_by_time_gives_an_image(outsider: Make, images: Images, free: float, train: Any) -> None:
    assert best_psnr(gates.one_of_many(outsider(), 1, 7, train, questions=8), images) < free


@open_today
def test_no_gate_by_brightness_gives_an_image(outsider: Make, images: Images, public: Images, free: float) -> None:
    assert best_psnr(gates.by_brightness(outsider(), 1, 60, public), images) < free


@open_today
def test_no_update_of_a_single_image_is_made(outsider: Make, images: Images) -> None:
    asker = outsider()
    plan = asker.plan(batch_size=1, local_images=1)
    assert asker.update(plan, fresh_weights(SMALL)) is None


@open_today
def test_no_loss_weight_brings_gradients_below_what_the_optimiser_sees(outsider: Make) -> None:
    asker = outsider()
    diffusion = asker.prior.diffusion.model_copy(update=gradients.TINY)
    plan = asker.plan(model=asker.prior.model_copy(update={"diffusion": diffusion}))
    assert asker.update(plan, fresh_weights(SMALL)) is None


@open_today
def test_no_losses_are_a_held_out_image(outsider: Make) -> None:
    asker = outsider()
    found = list(oracles.held_out_image(asker, oracles.coarse(SMALL, 64), 1, 3.0))
    assert len(asker.refusals) > 40 or not found


@open_today
@pytest.mark.parametrize("guess", [labels.by_loss, labels.by_update])
def test_no_name_of_a_folder_is_told(outsider: Make, images: Images, guess: Any) -> None:
    asker = outsider(labels=["masked" if i % 3 else "bare" for i in range(len(images))])
    assert guess(asker, ["masked", "bare", "tumour"]) == set()
