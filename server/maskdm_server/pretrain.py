"""Masked pre-training of a prior on a public corpus, resumable by the same command."""

import time
from pathlib import Path
from typing import Any

import torch

from maskdm import __version__
from maskdm.checkpoint import CheckpointMetadata, load_state, save_checkpoint, save_state
from maskdm.config import DiffusionConfig, MaskConfig, ModelConfig, TrainingConfig
from maskdm.data import Images, batches
from maskdm.errors import UsageError
from maskdm.interruption import Interruption
from maskdm.masking import effective_ratio, visible_count
from maskdm.model import build_model, parameter_count
from maskdm.precision import pick_precision
from maskdm.reporting import WorkBar, say
from maskdm.runfolder import append_line, claim, keep_lines, read_lines
from maskdm.seeding import derive_seed
from maskdm.training import Progress, TrainingState, train
from maskdm_server.pictures import save_samples

METRICS_EVERY = 1.0  # seconds between lines of metrics.jsonl, at least one step each


def plan(model: ModelConfig, diffusion: DiffusionConfig, mask: MaskConfig, training: TrainingConfig) -> dict[str, Any]:
    """The resolved configuration as it is echoed, checked on the way.

    Raises:
        UsageError: the mask does not fit the model's grid.
    """
    ratio = effective_ratio(mask, model.grid)
    return {
        "model": model.model_dump(mode="json"),
        "diffusion": diffusion.model_dump(mode="json"),
        "mask": mask.model_dump(mode="json") | {"effective_ratio": ratio, "visible": visible_count(mask, model.grid)},
        "training": training.model_dump(mode="json"),
    }


def pretrain(
    images: Images,
    out: Path,
    model_config: ModelConfig,
    diffusion: DiffusionConfig,
    mask: MaskConfig,
    training: TrainingConfig,
    *,
    device: torch.device,
    resume: bool = True,
    save_every: float = 120.0,
) -> Path:
    """Train a prior on `images` and return the path of its checkpoint.

    Args:
        out: run folder, already owned by this process.
        save_every: seconds between saves of the full state, so what a crash may cost.

    Raises:
        UsageError: the folder holds another run.
        Interrupted: asked to stop; the state was saved.
        TrainingDiverged: see `train`; the last saved state stays.
    """
    config = plan(model_config, diffusion, mask, training) | {"corpus_sha256": images.digest(), "images": len(images)}
    continued = claim(out, "pretrain", config, may_change=("training.images", "training.precision"))
    if continued and not resume:
        raise UsageError(f"--resume never, but --out {out} holds a run: choose another folder")
    write_versions(out)
    state_path, metrics_path = out / "state" / "training.safetensors", out / "metrics.jsonl"
    model = build_model(model_config, seed=derive_seed("weights", training.seed), device=device)
    state = TrainingState.fresh(model, training)
    if state_path.exists():
        load_state(state_path, state)
        say(f"continuing at {state.images_seen:,} images")
    keep_lines(metrics_path, [line for line in read_lines(metrics_path) if line["images"] <= state.images_seen])

    def save_prior() -> Path:
        metadata = CheckpointMetadata(
            model=model_config,
            diffusion=diffusion,
            mask=mask,
            effective_mask_ratio=effective_ratio(mask, model_config.grid),
            images_seen=state.images_seen,
            seed=training.seed,
        )
        save_checkpoint(out / "prior.safetensors", state.average, metadata)
        return out / "prior.safetensors"

    say(
        f"{parameter_count(model):,} parameters; mask {mask.kind}, {config['mask']['visible']} of "
        f"{model_config.grid**2} patches visible ({config['mask']['effective_ratio']:.1%} hidden); "
        f"{pick_precision(training.precision, device)} on {device}"
    )
    last_line = last_save = time.monotonic()
    window: list[Progress] = []
    with Interruption() as interruption, WorkBar("pretrain", training.images, state.images_seen) as bar:

        def on_step(progress: Progress) -> None:
            nonlocal last_line, last_save
            window.append(progress)
            now = time.monotonic()
            if now - last_line >= METRICS_EVERY or progress.images >= training.images:
                line = summarise(window)
                append_line(metrics_path, line)
                bar.update(progress.images, f"loss {line['loss']:.4f} {line['images_per_s']:,.0f} images/s")
                window.clear()
                last_line = now
            if now - last_save >= save_every:
                save_state(state_path, state, training)
                save_prior()
                last_save = time.monotonic()

        order = batches(images.pixels, training.batch_size, state.images_seen, training.seed)
        train(state, order, training, diffusion, mask, on_step=on_step, stop=interruption.requested)
        save_state(state_path, state, training)
        prior = save_prior()
        interruption.check()
    picture = out / "samples" / f"{state.images_seen:09d}.png"
    if not picture.exists():
        save_samples(
            picture,
            state.average,
            model_config,
            diffusion,
            seed=training.seed,
            device=str(device),
            precision=training.precision,
        )
    if state.skipped:
        say(f"{state.skipped} steps were skipped because their gradient was not finite")
    return prior


def summarise(window: list[Progress]) -> dict[str, float | int]:
    """One line of metrics.jsonl out of the steps since the last one; a non-finite loss is left out of the mean."""
    seconds = sum(1 / step.images_per_s for step in window)
    losses = [step.loss for step in window if step.loss == step.loss and abs(step.loss) != float("inf")]
    return {
        "images": window[-1].images,
        "loss": sum(losses) / len(losses) if losses else -1.0,
        "lr": window[-1].lr,
        "images_per_s": len(window) / seconds,
        "data_wait": sum(step.data_wait / step.images_per_s for step in window) / seconds,
        "skipped": window[-1].skipped,
    }


def write_versions(out: Path) -> None:
    """What made the run, beside its configuration; appended each time it is continued."""
    append_line(out / "versions.jsonl", {"time": time.time(), "maskdm": __version__, "torch": torch.__version__})
