"""`maskdm-server pretrain`: a prior from a public corpus."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import typer
from click.core import ParameterSource

from maskdm import quantities
from maskdm.commands import command_line as cli
from maskdm.commands.image_options import Channels, Upscale, channels_of, pixel_policy
from maskdm.config import (
    SIZES,
    USUAL_PREDICTION,
    DiffusionConfig,
    Ema,
    LossWeight,
    MaskKind,
    ModelConfig,
    NetworkKind,
    Prediction,
    ProcessKind,
    Schedule,
    Size,
)
from maskdm.data.pixels import PixelPolicy
from maskdm.data.preparation.cache import load_corpus
from maskdm.data.preparation.pack import check_apart, guess_channels
from maskdm.data.sources.source import PackedSource, Source, open_source
from maskdm.errors import UsageError
from maskdm.networks.precision import pick_device
from maskdm.run.processes import is_first
from maskdm.run.reporting import say
from maskdm.run.runfolder import owned
from maskdm.training.distributed import local_device, process_group
from maskdm.training.pretrain import Run
from maskdm.training.pretrain import pretrain as train_prior

from ..tracking.follow import PRETRAINING, follow
from .curriculum import recipe_names, stages_from, use_recipe
from .options import Device, LogOption, Out, PrecisionOption, Seed

Data = Annotated[Path, typer.Option(help="Images: a folder of any depth, a zip, tar, .npz, .npy or packed corpus.")]


def pretrain(
    context: typer.Context,
    data: Data,
    out: Out,
    recipe: Annotated[
        str | None,
        typer.Option(help=f"Published settings: {', '.join(recipe_names())}.", is_eager=True, callback=use_recipe),
    ] = None,
    init: Annotated[Path | None, typer.Option(help="Checkpoint to start from (prior or raw.safetensors).")] = None,
    network: Annotated[NetworkKind, typer.Option(help="Masked U-ViT, or a masked DiT.")] = "uvit",
    size: Annotated[Size, typer.Option(help="tiny (ours), or S, B, L as published.")] = "S",
    image_size: Annotated[int, typer.Option(help="Pixels along a side.")] = 64,
    channels: Channels = "auto",
    patch_size: Annotated[int, typer.Option(help="Pixels along a patch.")] = 4,
    conditional: Annotated[
        bool, typer.Option(help="Learn the classes: folder names, or the labels of an .npz.")
    ] = False,
    class_dropout: Annotated[float, typer.Option(help="Share of images shown without their class.")] = 0.1,
    mask: Annotated[MaskKind, typer.Option(help="What is hidden from a training step.")] = "block",
    mask_ratio: Annotated[float, typer.Option(help="Share that is hidden.")] = 0.9,
    block_size: Annotated[int, typer.Option(help="Patches along a block of --mask block.")] = 4,
    process: Annotated[ProcessKind, typer.Option(help="Forward process.")] = "ddpm",
    schedule: Annotated[Schedule, typer.Option(help="Noise schedule of --process ddpm.")] = "cosine",
    prediction: Annotated[
        Prediction | None, typer.Option(help="Prediction target; default: as usual for the process.")
    ] = None,
    loss_weight: Annotated[LossWeight, typer.Option(help="Weight of noise levels in the loss.")] = "uniform",
    images: Annotated[str, typer.Option(help="How many images to see, e.g. 200K or 1.5M.")] = "200K",
    steps: Annotated[int | None, typer.Option(help="Length in steps, instead of --images.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 256,
    accumulate: Annotated[int, typer.Option(help="Parts that a step computes one after another.")] = 1,
    recompute: Annotated[bool, typer.Option(help="Less memory, a third more time.")] = False,
    compile: Annotated[bool, typer.Option(help="torch.compile; pays on GPUs.")] = False,
    shard: Annotated[bool, typer.Option(help="Under torchrun: spread a large network over the processes.")] = False,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 2e-4,
    warmup_images: Annotated[int, typer.Option(help="Images of linear warm-up.")] = 0,
    betas: Annotated[str, typer.Option(help="AdamW's two decay rates.")] = "0.99,0.99",
    weight_decay: Annotated[float, typer.Option(help="AdamW's decoupled weight decay.")] = 0.03,
    ema: Annotated[Ema, typer.Option(help="Average of the weights: published ramp, or power function.")] = "ramp",
    ema_decay: Annotated[float, typer.Option(help="Longest decay of --ema ramp.")] = 0.999,
    ema_length: Annotated[float, typer.Option(help="Width of --ema power, as a share of the run.")] = 0.05,
    clip_norm: Annotated[float, typer.Option(help="Largest gradient norm.")] = 1.0,
    horizontal_flip: Annotated[float, typer.Option(help="Probability of mirroring an image.")] = 0.0,
    precision: PrecisionOption = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    upscale: Upscale = False,
    resume: Annotated[Literal["auto", "never"], typer.Option(help="Continue what --out holds, or refuse to.")] = "auto",
    save_every: Annotated[float, typer.Option(help="Seconds between saves: what a crash may cost.")] = 120.0,
    log: LogOption = "off",
    dry_run: Annotated[bool, typer.Option(help="Print the resolved configuration and stop.")] = False,
) -> None:
    """Pre-train a prior on a public corpus with most of each image masked."""
    source = open_source(data)
    policy = _policy(context, source, image_size, channels, upscale)
    class_names = _class_names(source) if conditional else ()
    shape = {"image_size": policy.image_size, "channels": policy.channels, "patch_size": patch_size, "network": network}
    model = cli.configure(ModelConfig, shape | SIZES[size] | {"classes": len(class_names)})
    diffusion = DiffusionConfig(
        process=process,
        schedule=schedule,
        prediction=prediction or USUAL_PREDICTION[process],
        loss_weight=loss_weight,
    )
    values = {
        "mask": mask,
        "mask_ratio": mask_ratio,
        "block_size": block_size,
        "images": images if steps is None else steps * batch_size,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "recompute": recompute,
        "lr": lr,
        "warmup_images": warmup_images,
        "betas": quantities.pair("--betas", betas),
        "weight_decay": weight_decay,
        "ema": ema,
        "ema_decay": ema_decay,
        "ema_length": ema_length,
        "clip_norm": clip_norm,
        "horizontal_flip": horizontal_flip,
        "class_dropout": class_dropout,
        "precision": precision,
        "seed": seed,
    }
    given = cli.given(context) | ({"images"} if steps is not None else set())
    stages = stages_from(values, context.meta.get(cli.STAGES, ()), given)
    run = Run(model, diffusion, stages, class_names)
    if dry_run:
        print(json.dumps(run.describe(), indent=2))
        return
    check_apart(data, out)
    picked = local_device(pick_device(device))
    with process_group(picked), owned(out) if is_first() else nullcontext():
        corpus = load_corpus(source, policy)
        say(f"corpus: {corpus.summary()}")
        prior = train_prior(
            corpus,
            out,
            run,
            device=picked,
            init=init,
            resume=resume == "auto",
            save_every=save_every,
            compiled=compile,
            sharded=shard,
            following=follow(out, PRETRAINING, log),
        )
    say(f"prior: {prior}; samples: {out / 'samples'}")


def _policy(context: typer.Context, source: Source, image_size: int, channels: str, upscale: bool) -> PixelPolicy:
    """How images become pixels: as was asked for, else as those of a packed corpus did."""
    packed = source.corpus.manifest.policy if isinstance(source, PackedSource) else None
    if packed and context.get_parameter_source("image_size") is ParameterSource.DEFAULT:
        image_size = packed.image_size
    found = channels_of(channels) or (packed.channels if packed else guess_channels(source))
    return pixel_policy(image_size, found, upscale)


def _class_names(source: Source) -> tuple[str, ...]:
    names = tuple(sorted({entry.label for entry in source.entries() if entry.split == "train"} - {""}))
    if len(names) < 2:
        raise UsageError("--conditional needs at least two classes: sub-folders, or an .npz with an array 'labels'")
    return names
