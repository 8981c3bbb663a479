"""One run of an arm: a seed and a learning rate, from its prior to the end of its budget, measured on the way.

Resumable: what is measured already is not done again.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskdm.config import MaskConfig, Stage, TrainingConfig
from maskdm.data.batches import batches
from maskdm.data.corpus import Corpus
from maskdm.data.pixels import Pixels
from maskdm.diffusion.sampling import sample
from maskdm.metadata import CheckpointMetadata
from maskdm.networks.masking import effective_ratio
from maskdm.networks.model import build_model
from maskdm.networks.precision import pick_precision
from maskdm.run.pictures import grid_picture, save_png
from maskdm.run.reporting import say
from maskdm.run.runfolder import append_line, keep_lines, read_lines, sha256_of
from maskdm.seeding import derive_seed
from maskdm.training.checkpoint import (
    describe_checkpoint,
    load_checkpoint,
    load_state,
    model_from,
    save_checkpoint,
    save_state,
)
from maskdm.training.loop import TrainingState, train
from maskdm.training.pretrain import Run, pretrain

from ...federation.folder import federation_config
from ...federation.journal import ROUNDS, published_after
from ...federation.settings import FederationOptions
from ..in_process import simulate_inline
from .arms import UNMASKED, Arm
from .budget import ExperimentConfig, rounds_of, spending
from .quality import Judge

BETAS = (0.9, 0.95)  # runs are short beside the published ones
CURVE, PICTURE, MODEL = "curve.jsonl", "samples.png", "model.safetensors"


@dataclass(frozen=True)
class Place:
    """Where a run lies and what it works with."""

    folder: Path  # of the experiment
    config: ExperimentConfig
    judge: Judge
    device: torch.device
    check: Callable[[], None]  # raises where the user wants to stop

    def prior(self, arm: Arm, seed: int) -> Path:
        """Folder of the prior of an arm; arms with the same masks share it."""
        assert arm.prior
        name = "-".join(f"{m.kind}{m.ratio:g}x{m.block_size}" for m in arm.prior)
        return self.folder / "priors" / f"{name}-seed{seed}"

    def run(self, arm: Arm, seed: int, lr: float) -> Path:
        """Folder of a run."""
        return self.folder / "runs" / arm.name.replace(":", "_") / f"seed{seed}-lr{lr:g}"


def make_prior(place: Place, arm: Arm, corpus: Corpus, seed: int) -> Path:
    """The checkpoint that the arm starts from, made once: pre-trained, or random weights."""
    config = place.config
    if arm.prior is None:
        path = place.folder / "priors" / f"random-seed{seed}.safetensors"
        if not path.exists():
            model = build_model(config.model, seed=derive_seed("weights", seed))
            metadata = CheckpointMetadata(
                model=config.model,
                diffusion=config.diffusion,
                mask=UNMASKED,
                effective_mask_ratio=0,
                images_seen=0,
                seed=seed,
            )
            save_checkpoint(path, {name: p.detach() for name, p in model.named_parameters()}, metadata)
        return path
    spent = spending(config, arm)
    out = place.prior(arm, seed)
    if not (out / "prior.safetensors").exists() or not (out / ".done").exists():
        out.mkdir(parents=True, exist_ok=True)
        stages = []
        for mask, images, batch in zip(arm.prior, spent.prior, spent.prior_batches, strict=True):
            stages.append(Stage(mask=mask, training=_training(config, images, batch, config.prior_lr, seed)))
        parts = [f"{stage.images():,} images, {_hidden(config, stage.mask)}" for stage in stages]
        say(f"prior {out.name}: {'; '.join(parts)}")
        pretrain(corpus, out, Run(config.model, config.diffusion, tuple(stages)), device=place.device)
        (out / ".done").touch()
    return out / "prior.safetensors"


def run_pooled(place: Place, arm: Arm, prior: Path, pixels: Pixels, seed: int, lr: float) -> None:
    """Train on pooled images and measure at each point of the budget."""
    folder, spent, config = place.run(arm, seed, lr), spending(place.config, arm), place.config
    measured = _measured(folder)
    training = _training(config, spent.local, config.batch_size, lr, seed)
    model = model_from(load_checkpoint(prior)[0], config.model, place.device)
    state = TrainingState.fresh(model, training)
    kept = folder / "state.safetensors"
    if kept.exists():
        load_state(kept, state)
    order = batches(pixels, training.batch_size, state.images_seen, seed, device=place.device)
    say(f"{arm.name}, seed {seed}, rate {lr:g}: {spent.local:,} images from {len(pixels):,}")
    for number, point in enumerate(spent.points):
        if state.images_seen < point:
            until = training.model_copy(update={"images": point})
            train(state, order, until, config.diffusion, UNMASKED, on_progress=lambda progress: place.check())
            save_state(kept, state, training)
        if number >= len(measured):
            _measure(place, folder, state.average, seed, point, spent.flops(point))
            place.check()
    _keep(place, folder, state.average, prior, seed)
    kept.unlink()


def run_federated(place: Place, arm: Arm, prior: Path, sites: list[Path], seed: int, lr: float) -> None:
    """Run a whole federation, with the real code of server and client, and measure its rounds."""
    folder, spent, config = place.run(arm, seed, lr), spending(place.config, arm), place.config
    rounds, marks = rounds_of(config, spent)
    measured = _measured(folder)
    federation = folder / "federation"
    federation.mkdir(parents=True, exist_ok=True)
    options = FederationOptions(
        rounds=rounds,
        min_clients=config.clients,
        min_replies=config.clients,
        local_images=config.round_images(),
        batch_size=config.site_batch(),
        lr=lr,
        seed=seed,
        keep_every=1,
        keep_moments=config.keep_moments,
        server_ema=config.server_ema,
        sample_every=0,
    )
    wanted = federation_config(prior, options)
    say(f"{arm.name}, seed {seed}, rate {lr:g}: {rounds} rounds at {config.clients} sites")
    simulate_inline(prior, federation, wanted, lambda: sites, {"sites": [str(site) for site in sites]})
    a_round = config.round_images() * config.clients
    for mark in marks[len(measured) :]:
        weights = published_after(federation, mark)
        _measure(place, folder, weights, seed, mark * a_round, spent.flops(mark * a_round))
        place.check()
    _keep(place, folder, published_after(federation, marks[-1]), prior, seed)
    shutil.rmtree(federation / ROUNDS)


def _training(config: ExperimentConfig, images: int, batch: int, lr: float, seed: int) -> TrainingConfig:
    return TrainingConfig(
        images=images,
        batch_size=batch,
        lr=lr,
        betas=BETAS,
        warmup_images=config.warmup_images * batch // config.batch_size,
        precision=config.precision,
        seed=seed,
    )


def _hidden(config: ExperimentConfig, mask: MaskConfig) -> str:
    return f"{effective_ratio(mask, config.model.grid):.1%} hidden"


def _measured(folder: Path) -> list[dict[str, Any]]:
    """Lines that are whole; a torn last one, of a run that was killed, is dropped."""
    lines = read_lines(folder / CURVE)
    if lines:
        keep_lines(folder / CURVE, lines)
    return lines


def _measure(place: Place, folder: Path, weights: Mapping[str, Tensor], seed: int, images: int, flops: int) -> None:
    line = {"images": images, "flops": flops, **place.judge.judge(weights, seed)}
    folder.mkdir(parents=True, exist_ok=True)
    append_line(folder / CURVE, line)
    say(f"  {images:>9,} images: distance {line['fd']:.2f}, held-out loss {line['loss']:.4f}")


def _keep(place: Place, folder: Path, weights: dict[str, Tensor], prior: Path, seed: int) -> None:
    """The model at the end of the budget, for whatever else one wants to know of it, and a look at its samples."""
    config, metadata = place.config, describe_checkpoint(prior, "--out")
    about = {"prior_sha256": sha256_of(prior), "mask": UNMASKED, "effective_mask_ratio": 0.0}
    save_checkpoint(folder / MODEL, weights, metadata.model_copy(update=about))
    model = model_from(dict(weights), config.model, place.device)
    precision = pick_precision(config.precision, place.device)
    drawn = sample(model, config.diffusion, 32, steps=config.sampling_steps, seed=seed, precision=precision)
    save_png(folder / PICTURE, grid_picture(np.asarray(drawn), columns=8))
