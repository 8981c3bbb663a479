"""`maskdm-server evaluate`: how near a model's images are to real ones, with all that belongs to such numbers."""

import inspect
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from maskdm.commands.image_options import Upscale, pixel_policy
from maskdm.config import DEFAULT_STEPS
from maskdm.diffusion.sampling import Options, check_steps, classes_in_turn
from maskdm.errors import UsageError
from maskdm.evaluation.evaluate import Evaluated
from maskdm.evaluation.evaluate import evaluate as measure
from maskdm.evaluation.extractors.features import RANDOM, open_extractor
from maskdm.evaluation.real import load_real
from maskdm.evaluation.record import FOLDER, lines, write_record
from maskdm.evaluation.samples import DrawnSamples, StoredSamples
from maskdm.networks.precision import pick_device, pick_precision
from maskdm.run.pictures import save_png
from maskdm.run.reporting import say
from maskdm.training.checkpoint import load_checkpoint, model_from

from .options import Device, PrecisionOption, Seed
from .sample_command import BatchSize, Eta, Guidance, SamplerOption, Steps


def evaluate(
    reference: Annotated[
        Path, typer.Option(help="Real images to compare with, never trained on: whatever --data takes elsewhere.")
    ],
    model: Annotated[Path | None, typer.Option(help="Checkpoint to draw images from.")] = None,
    samples: Annotated[
        Path | None, typer.Option(help="Instead of a model: an .npz or .npy of images, as sample --npz writes.")
    ] = None,
    features: Annotated[
        str,
        typer.Option(help="File of a feature network: Inception's weights (FID), MobileNetV2, your own; or random."),
    ] = RANDOM,
    split: Annotated[
        Literal["auto", "validation", "test", "train", "all"],
        typer.Option(
            envvar="MASKDM_REFERENCE_SPLIT", help="Part of --reference; auto: test, else validation, else all."
        ),
    ] = "auto",
    train: Annotated[
        Path | None, typer.Option(envvar="MASKDM_TRAINING_IMAGES", help="The model's training images: memorisation.")
    ] = None,
    count: Annotated[int, typer.Option(min=2, help="Images to draw.")] = 2000,
    sampler: SamplerOption = "dpmpp",
    steps: Steps = None,
    eta: Eta = 0.0,
    class_name: Annotated[
        list[str] | None,
        typer.Option("--class", help="Only this class, several take turns; default: in the reference's proportions."),
    ] = None,
    guidance: Guidance = 1.0,
    neighbours: Annotated[int, typer.Option(min=1, help="k of precision, recall, density and coverage.")] = 5,
    resamples: Annotated[int, typer.Option(min=0, help="Of the bootstrap; 0: no intervals.")] = 1000,
    extrapolate: Annotated[bool, typer.Option(help="Also the Fréchet distance of infinitely many images.")] = False,
    json: Annotated[
        Path | None, typer.Option(help="File of the record; default: in evaluations/ beside the model.")
    ] = None,
    batch_size: BatchSize = 64,
    precision: PrecisionOption = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    upscale: Upscale = False,
) -> None:
    """Measure generated images against real ones: Fréchet and kernel distance, precision and recall, memorisation."""
    wanted, picked = tuple(class_name or ()), pick_device(device)
    if (model is None) == (samples is None):
        raise UsageError("give either --model, or --samples with images made elsewhere")
    if samples:
        refuse_drawing(
            count=count, sampler=sampler, steps=steps, eta=eta, guidance=guidance, class_name=class_name or None
        )
    extractor = open_extractor(features, device=picked)
    source: DrawnSamples | StoredSamples
    if model:
        options: Options = {
            "sampler": sampler,
            "steps": steps,
            "eta": eta,
            "seed": seed,
            "guidance": guidance,
            "batch_size": batch_size,
            "precision": pick_precision(precision, picked),
        }
        source = from_model(model, count, wanted, options, picked)
    else:
        assert samples
        source = StoredSamples(samples)
    policy = pixel_policy(source.image_size, source.channels, upscale)
    shared: dict[str, Any] = {"labels": wanted, "batch_size": batch_size}
    real = load_real(reference, policy, extractor, option="--reference", part=split, **shared)
    training = load_real(train, policy, extractor, option="--train", part="train", **shared) if train else None
    evaluated = measure(
        source,
        real,
        training,
        extractor,
        neighbours=neighbours,
        resamples=resamples,
        extrapolate=extrapolate,
        seed=seed,
        **shared,
    )
    record = evaluated.record
    print("\n".join(lines(record)))
    write(evaluated, json or source.path.parent / FOLDER / f"{record.name()}.json")


def from_model(path: Path, count: int, wanted: tuple[str, ...], options: Options, device: torch.device) -> DrawnSamples:
    """Images that a checkpoint will draw.

    Raises:
        UsageError: no checkpoint; more steps than its process has; a class that it does not know.
    """
    weights, metadata = load_checkpoint(path)
    check_steps(options["steps"], metadata.diffusion)
    chosen: Options = {
        **options,
        "steps": options["steps"] or DEFAULT_STEPS[options["sampler"]],
        "classes": classes_in_turn(wanted, metadata.class_names, count),
    }
    return DrawnSamples(path, metadata, model_from(weights, metadata.model, device), count, chosen)


def write(evaluated: Evaluated, path: Path) -> None:
    """The record, and beside it the picture.

    Raises:
        UsageError: they cannot be written there.
    """
    try:
        if evaluated.picture:
            save_png(path.with_suffix(".png"), evaluated.picture)
        write_record(path, evaluated.record)
    except OSError as error:
        raise UsageError(f"--json {path} cannot be written ({error.strerror}): choose another file") from error
    say(f"record: {path}")


def refuse_drawing(**given: object) -> None:
    """With images made elsewhere, what decides how a model draws would be overlooked.

    Raises:
        UsageError: one of them differs from what it is if nobody gives it.
    """
    usual = inspect.signature(evaluate).parameters
    for name, value in given.items():
        if value != usual[name].default:
            option = name.removesuffix("_name")
            raise UsageError(f"--{option} is for --model: the images of --samples are drawn already; leave it out")
