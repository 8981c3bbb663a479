"""The attacks work: at a site that lets every plan in they bring out images, pixels and names. Else nothing that the
tests of a defended site say would mean anything."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.attacks import gradients, labels, oracles, picks
from benchmarks.attacks.site import Coordinator, Images, Limits, best_psnr, fresh_weights, make_site, prior_of
from torch import Tensor

from maskdm.diffusion.targets import denoising_loss
from maskdm.networks.layers import patchify
from maskdm.training.checkpoint import model_from
from maskdm_server.lab.faces import draw_faces

from .conftest import ONE_TOKEN, SMALL, Make


@pytest.mark.parametrize(("encoding", "least"), [("fp32", 55), ("bf16", 40), ("int8", 30), ("topk", 40)])
def test_an_update_of_one_image_is_the_image_with_honest_weights_and_a_quiet_head(
    attacker: Make, images: Images, encoding: Any, least: float
) -> None:
    found = gradients.single_image(attacker(encoding=encoding), gradients.quiet(fresh_weights(SMALL)))
    assert best_psnr(found, images) > least


@pytest.mark.parametrize(("train", "least"), [("all", 55), ("adapters", 55), ("norm-bias", 25)])
def test_a_gate_by_time_takes_one_image_out_of_512(attacker: Make, images: Images, train: Any, least: float) -> None:
    assert best_psnr(picks.one_of_many(attacker(), 512, 1, train), images) > least


@pytest.mark.parametrize("train", ["all", "adapters"])
def test_so_does_one_in_a_network_with_few_weights_next_to_zero(attacker: Make, images: Images, train: Any) -> None:
    assert best_psnr(picks.one_of_many(attacker(), 16, 1, train, wide=True), images) > 55


def test_some_steps_of_batches_are_no_defence(attacker: Make, images: Images) -> None:
    assert best_psnr(picks.one_of_many(attacker(limits=Limits(16, 48, 3)), 16, 1), images) > 55


def test_gates_by_brightness_take_several_images_out_of_one_update(
    attacker: Make, images: Images, public: Images, free: float
) -> None:
    found = [best_psnr([image], images) for image in picks.by_brightness(attacker(), 512, 60, public)]
    assert sum(decibels > free + 1 for decibels in found) >= 2


class Exact(Coordinator):
    """Told the whole loss, with all its digits, by the same draws for each question."""

    def loss(self, weights: Mapping[str, Tensor], model: Any = None, **changes: Any) -> float:
        images = torch.from_numpy(np.load(self.folder / "images.npz")["images"]).permute(0, 3, 1, 2)
        config, patches = self.prior.model, patchify(images, self.prior.model.patch_size)
        self.questions += 1
        return denoising_loss(model_from(dict(weights), config), self.prior.diffusion, patches, draws=1, batch_size=200)


def test_losses_with_all_digits_by_the_same_draws_are_the_image(tmp_path: Path) -> None:
    grey = draw_faces(200, "clinic", size=8, seed=5).mean(axis=3, keepdims=True).astype(np.uint8)
    asker = Exact(make_site(tmp_path / "site", grey), prior_of(ONE_TOKEN, timesteps=200))
    found = list(oracles.held_out_image(asker, oracles.single_pixels(ONE_TOKEN), 0))
    assert best_psnr(found, grey) > 45
    assert asker.questions == 66


@pytest.mark.parametrize("guess", [labels.by_loss, labels.by_code, labels.by_update])
def test_names_of_folders_are_told(attacker: Make, images: Images, guess: Any) -> None:
    asker = attacker(labels=["masked" if i % 3 else "bare" for i in range(len(images))])
    assert guess(asker, ["masked", "bare", "tumour"]) == {"masked", "bare"}
