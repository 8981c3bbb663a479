"""Masked pre-training of a prior on a public corpus, stage by stage, resumable by the same command."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import DiffusionConfig, ModelConfig, Stage
from ..data.batches import batches, class_numbers
from ..data.corpus import Corpus
from ..errors import UsageError
from ..metadata import CheckpointMetadata
from ..networks.masking import effective_ratio, visible_count
from ..networks.model import build_model, parameter_count
from ..networks.precision import pick_precision
from ..run.interruption import Interruption
from ..run.processes import is_first
from ..run.reporting import WorkBar, say
from ..run.runfolder import append_line, claim, keep_lines, read_lines, record_versions, sha256_of
from ..seeding import derive_seed
from .checkpoint import load_state, load_weights, save_checkpoint, save_state
from .distributed import agreed, check_batch, rank, shard, together, whole, world_size
from .grids import save_samples
from .loop import Progress, TrainingState, put_weights, train

GRIDS = 8  # of samples through a run
METRICS_EVERY = 1.0  # seconds between lines of metrics.jsonl, at least one step each
# What may differ when a run is continued: how it is computed, and how long its last stage is.
FREE = ("training.precision", "training.accumulate", "training.recompute")


@dataclass(frozen=True)
class Run:
    """What a run is, from its first step to its last."""

    model: ModelConfig
    diffusion: DiffusionConfig
    stages: tuple[Stage, ...]
    class_names: tuple[str, ...] = ()

    @property
    def seed(self) -> int:
        """All randomness follows from it."""
        return self.stages[0].training.seed

    def begins(self) -> list[int]:
        """Images seen before each stage, and at the end."""
        return [0, *accumulate(stage.images() for stage in self.stages)]

    def describe(self) -> dict[str, Any]:
        """The resolved configuration as it is echoed, checked on the way.

        Raises:
            UsageError: a mask does not fit the model's grid.
        """
        stages = {}
        for number, stage in enumerate(self.stages, start=1):
            ratio, visible = effective_ratio(stage.mask, self.model.grid), visible_count(stage.mask, self.model.grid)
            mask = stage.mask.model_dump(mode="json") | {"effective_ratio": ratio, "visible": visible}
            stages[str(number)] = {
                "mask": mask,
                "training": stage.training.model_dump(mode="json", exclude={"proximal"}),
            }
        return {
            "model": self.model.model_dump(mode="json"),
            "diffusion": self.diffusion.model_dump(mode="json"),
            "stages": stages,
            "classes": list(self.class_names),
        }


def pretrain(
    corpus: Corpus,
    out: Path,
    run: Run,
    *,
    device: torch.device,
    init: Path | None = None,
    resume: bool = True,
    save_every: float = 120.0,
    compiled: bool = False,
    sharded: bool = False,
    following: AbstractContextManager[Any] | None = None,
) -> Path:
    """Train a prior on a corpus and return the path of its checkpoint.

    A stage starts from the moving average of the one before, with a fresh optimiser. Where `torchrun` started several
    processes, each takes its share of every batch and the first one writes.

    Args:
        out: run folder, already owned by this process.
        init: checkpoint to start from instead of random weights; its positions are resized where the grid differs.
        save_every: seconds between saves of the full state, so what a crash may cost.
        compiled: let torch.compile have the network.
        sharded: spread the network over the processes instead of keeping it in each.
        following: what passes on the run's lines and samples, entered once no line will be taken back any more.

    Raises:
        UsageError: the folder holds another run.
        Interrupted: asked to stop; the state was saved.
        TrainingDiverged, OutOfMemory: see `train`; the last saved state stays.
    """
    for stage in run.stages:
        check_batch(stage.training.batch_size)
    if is_first():
        open_run(out, run, corpus, init, resume)
    model = build_model(run.model, seed=derive_seed("weights", run.seed), device=device)
    if init:
        load_weights(model, init, "--init")
    if sharded:
        shard(model)
    if compiled:
        model.compile()
    state = TrainingState.fresh(model, run.stages[0].training)
    if (out / "state" / "training.safetensors").exists():
        load_state(out / "state" / "training.safetensors", state)
        say(f"continuing at {state.images_seen:,} images")
    if is_first():
        metrics = out / "metrics.jsonl"
        keep_lines(metrics, [line for line in read_lines(metrics) if line["images"] <= state.images_seen])
    say(
        f"{parameter_count(model):,} parameters; {pick_precision(run.stages[0].training.precision, device)} on {device}"
    )
    with following or nullcontext():
        state = train_stages(state, run, corpus, out, device, save_every)
        draw(state, run, out, device)
    if state.skipped:
        say(f"{state.skipped} steps were skipped because their gradient was not finite")
    return out / "prior.safetensors"


def train_stages(
    state: TrainingState,
    run: Run,
    corpus: Corpus,
    out: Path,
    device: torch.device,
    save_every: float,
) -> TrainingState:
    """Train what is left of each stage, saving as it goes; returns the state after the last one."""
    begins, classes = run.begins(), class_numbers(corpus, run.class_names)
    marks = [begins[-1] * part / GRIDS for part in range(1, GRIDS + 1)]
    with Interruption() as interruption, WorkBar("pretrain", begins[-1], state.images_seen) as bar:

        def record(progress: Progress) -> None:
            if is_first():
                append_line(out / "metrics.jsonl", vars(progress))
                loss = "not finite" if progress.loss is None else f"{progress.loss:.4f}"
                bar.update(progress.images, f"loss {loss} {progress.images_per_s:,.0f} images/s")

        for begin, end, stage in zip(begins, begins[1:], run.stages, strict=False):
            if state.images_seen >= end:
                continue
            config = stage.training
            if state.images_seen == begin and begin:
                state = next_stage(state, stage)
            ratio, visible = effective_ratio(stage.mask, run.model.grid), visible_count(stage.mask, run.model.grid)
            say(
                f"mask {stage.mask.kind}, {visible} of {run.model.grid**2} patches visible ({ratio:.1%} hidden), "
                f"to {end:,} images"
            )
            denoiser = together(state.model)
            order = batches(
                corpus.pixels,
                config.batch_size,
                state.images_seen,
                run.seed,
                rows=corpus.training_rows,
                classes=classes,
                share=(rank(), world_size()),
                device=device,
            )
            while state.images_seen < end:
                mark = next(at for at in marks if at > state.images_seen)
                stop = agreed(_wish(interruption, time.monotonic() + save_every, state, mark), device)
                train(
                    state,
                    order,
                    config,
                    run.diffusion,
                    stage.mask,
                    begin=begin,
                    denoiser=denoiser,
                    on_progress=record,
                    report_seconds=METRICS_EVERY,
                    stop=stop,
                )
                save(state, run, stage, corpus, out)
                interruption.check()
                if mark <= state.images_seen < begins[-1]:
                    draw(state, run, out, device)
    return state


def draw(state: TrainingState, run: Run, out: Path, device: torch.device) -> None:
    """A grid of samples of the moving average, from the same noise each time; called by all processes together."""
    picture = out / "samples" / f"{state.images_seen:09d}.png"
    average = {name: whole(tensor) for name, tensor in state.average.items()}
    if is_first() and not picture.exists():
        precision, on = run.stages[-1].training.precision, str(device)
        save_samples(picture, average, run.model, run.diffusion, seed=run.seed, device=on, precision=precision)


def next_stage(state: TrainingState, stage: Stage) -> TrainingState:
    """The moving average becomes the weights, and the optimiser starts anew."""
    put_weights(state.model, state.average)
    following = TrainingState.fresh(state.model, stage.training)
    following.images_seen, following.skips = state.images_seen, state.skips
    return following


def save(state: TrainingState, run: Run, stage: Stage, corpus: Corpus, out: Path) -> None:
    """What resume needs, and the weights: averaged as the prior, raw ones beside it."""
    save_state(out / "state" / "training.safetensors", state, stage.training)
    metadata = CheckpointMetadata(
        model=run.model,
        diffusion=run.diffusion,
        mask=stage.mask,
        effective_mask_ratio=effective_ratio(stage.mask, run.model.grid),
        images_seen=state.images_seen,
        seed=run.seed,
        class_names=run.class_names,
        corpus=corpus.manifest.statistics,
    )
    raw: dict[str, Tensor] = {name: parameter.detach() for name, parameter in state.model.named_parameters()}
    save_checkpoint(out / "raw.safetensors", raw, metadata.model_copy(update={"weights": "raw"}))
    save_checkpoint(out / "prior.safetensors", state.average, metadata)


def open_run(out: Path, run: Run, corpus: Corpus, init: Path | None, resume: bool) -> None:
    """Claim the folder for this run, or find that it holds it already."""
    config = run.describe() | {"corpus_sha256": corpus.manifest.sha256, "images": len(corpus.training_rows)}
    if init:
        config["init_sha256"] = sha256_of(init)
    numbers = range(1, len(run.stages) + 1)
    may_change = [f"stages.{number}.{name}" for number in numbers for name in FREE]
    continued = claim(out, "pretrain", config, may_change=(*may_change, f"stages.{len(run.stages)}.training.images"))
    if continued and not resume:
        raise UsageError(f"--resume never, but --out {out} holds a run: choose another folder")
    record_versions(out, "torch")


def _wish(interruption: Interruption, due: float, state: TrainingState, mark: float) -> Callable[[], bool]:
    """To leave the training loop: the user asks for it, or it is time to save, or to draw."""
    return lambda: interruption.requested() or time.monotonic() > due or state.images_seen >= mark
