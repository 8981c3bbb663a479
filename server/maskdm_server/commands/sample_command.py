"""`maskdm-server sample`: draws images from a checkpoint."""

import io
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from maskdm.commands.image_options import pixel_policy
from maskdm.config import ModelConfig, Sampler
from maskdm.data.pixels import decode
from maskdm.diffusion.sampling import Options, check_steps, classes_in_turn, inpaint, interpolate
from maskdm.diffusion.sampling import sample as draw
from maskdm.errors import DataError, UsageError
from maskdm.networks.precision import pick_device, pick_precision
from maskdm.run.pictures import grid_picture, save_png
from maskdm.run.reporting import WorkBar, say
from maskdm.run.runfolder import atomic_write
from maskdm.training.checkpoint import load_checkpoint, model_from

from .options import Device, PrecisionOption, Seed

SamplerOption = Annotated[
    Sampler, typer.Option(help="dpmpp is DPM-Solver++(2M), ddpm ancestral, euler for --process flow.")
]
Steps = Annotated[int | None, typer.Option(min=1, help="Steps; heun evaluates the network twice in each.")]
Eta = Annotated[float, typer.Option(min=0, max=1, help="DDIM: 0 deterministic, 1 ancestral.")]
Guidance = Annotated[float, typer.Option(min=0, help="Classifier-free guidance; 1 is none.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time.")]


def sample(
    model: Annotated[Path, typer.Option(help="Checkpoint.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("grid.png"),
    count: Annotated[int, typer.Option(min=1, help="Images to draw.")] = 16,
    sampler: SamplerOption = "dpmpp",
    steps: Steps = None,
    eta: Eta = 0.0,
    class_name: Annotated[
        list[str] | None, typer.Option("--class", help="Class to draw, by name; several take turns; default: all.")
    ] = None,
    guidance: Guidance = 1.0,
    between: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two pictures: draw what lies between them.")
    ] = None,
    fill: Annotated[Path | None, typer.Option(help="Picture with a hole: draw what fits into --hole.")] = None,
    hole: Annotated[Path | None, typer.Option(help="Picture of the hole of --fill, white where to draw.")] = None,
    npz: Annotated[Path | None, typer.Option(help="Also write the images as uint8 (N, H, W, C).")] = None,
    batch_size: BatchSize = 64,
    precision: PrecisionOption = "auto",
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Draw images; process, noise schedule and prediction target come from the checkpoint."""
    weights, metadata = load_checkpoint(model)
    check_steps(steps, metadata.diffusion)
    if (fill is None) != (hole is None) or (fill and between):
        raise UsageError("--fill and --hole belong together, and --between excludes them")
    picked = pick_device(device)
    network = model_from(weights, metadata.model, picked)
    with WorkBar("sample", count) as bar:
        options: Options = {
            "sampler": sampler,
            "steps": steps,
            "eta": eta,
            "seed": seed,
            "classes": classes_in_turn(class_name, metadata.class_names, count),
            "guidance": guidance,
            "batch_size": batch_size,
            "precision": pick_precision(precision, picked),
            "progress": bar.update,
        }
        if between:
            first, second = (_picture(path, metadata.model, "--between") for path in between)
            images = interpolate(network, metadata.diffusion, first, second, count, **options)
        elif fill and hole:
            picture = _picture(fill, metadata.model, "--fill")
            where = _picture(hole, metadata.model.model_copy(update={"channels": 3}), "--hole").float().mean(0) > 127
            images = inpaint(network, metadata.diffusion, picture, where, count, **options)
        else:
            images = draw(network, metadata.diffusion, count, **options)
    save_png(out, grid_picture(images.numpy()))
    if npz:
        _write_npz(npz, images.permute(0, 2, 3, 1).numpy())
    say(f"{count} samples: {out}")


def _picture(path: Path, shape: ModelConfig, option: str) -> torch.Tensor:
    """One picture as the model sees it, uint8 (C, S, S)."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{option} {path} cannot be read ({error.strerror})") from error
    try:
        return torch.from_numpy(decode(data, pixel_policy(shape.image_size, shape.channels, True)).pixels.copy())
    except DataError as error:
        raise UsageError(f"{option} {path}: {error}") from error


def _write_npz(path: Path, images: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, images=images)
    atomic_write(path, buffer.getvalue())
