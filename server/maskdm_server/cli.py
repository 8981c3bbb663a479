"""`maskdm-server`: the coordinator's command line."""

import io
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import typer
from click.core import ParameterSource

from maskdm import cli
from maskdm.checkpoint import load_checkpoint, model_from
from maskdm.config import (
    SIZES,
    USUAL_PREDICTION,
    DiffusionConfig,
    Ema,
    LossWeight,
    MaskKind,
    ModelConfig,
    NetworkKind,
    Precision,
    Prediction,
    ProcessKind,
    Schedule,
    Size,
)
from maskdm.data.cache import load_corpus
from maskdm.data.corpus import Corpus
from maskdm.data.options import Channels, Upscale, channels_of
from maskdm.data.packing import check_apart, guess_channels
from maskdm.data.pixels import PixelPolicy, decode
from maskdm.data.prepare import prepare
from maskdm.data.sources import PackedSource, Source, open_source
from maskdm.distributed import local_device, process_group
from maskdm.errors import DataError, UsageError
from maskdm.pictures import grid_picture, save_png
from maskdm.precision import pick_device, pick_precision
from maskdm.processes import Child, free_port, is_first
from maskdm.reporting import WorkBar, say
from maskdm.runfolder import atomic_write, owned
from maskdm.sampling import Options, Sampler, inpaint, interpolate, sample
from maskdm_server.curriculum import recipe_names, stages_from, use_recipe
from maskdm_server.pretrain import Run
from maskdm_server.pretrain import pretrain as train_prior
from maskdm_server.rounds import FederationConfig
from maskdm_server.serve import check_address, federation_config, serve
from maskdm_server.simulate import split_by_label, split_iid, start_clients, write_shares

app = typer.Typer(add_completion=False, no_args_is_help=True, help="The coordinator of a MaskDM federation.")

# Options that several commands share.
Out = Annotated[Path, typer.Option(help="Folder of this run; the same command again continues it.")]
Data = Annotated[Path, typer.Option(help="Images: a folder of any depth, a zip, tar, .npz, .npy or packed corpus.")]
Prior = Annotated[Path, typer.Option(help="Checkpoint to start from.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")]
PrecisionOption = Annotated[Precision, typer.Option(help="Arithmetic of matrix products.")]
Seed = Annotated[int, typer.Option(help="All randomness follows from it.")]
Rounds = Annotated[int, typer.Option(help="Rounds of the federation.")]
LocalImages = Annotated[int, typer.Option(help="Images each client sees in a round, counting repetitions.")]
LocalBatch = Annotated[int, typer.Option(help="Batch size at the clients.")]
LocalRate = Annotated[float, typer.Option(help="Learning rate at the clients.")]


@app.command()
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
    dry_run: Annotated[bool, typer.Option(help="Print the resolved configuration and stop.")] = False,
) -> None:
    """Pre-train a prior on a public corpus with most of each image masked."""
    source = open_source(data)
    packed = source.corpus.manifest.policy if isinstance(source, PackedSource) else None
    found = channels_of(channels) or (packed.channels if packed else guess_channels(source))
    if packed and context.get_parameter_source("image_size") is ParameterSource.DEFAULT:
        image_size = packed.image_size
    class_names = _labels(source) if conditional else ()
    if conditional and len(class_names) < 2:
        raise UsageError("--conditional needs at least two classes: sub-folders, or an .npz with an array 'labels'")
    shape = {"image_size": image_size, "channels": found, "patch_size": patch_size, "network": network}
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
        "betas": cli.pair("--betas", betas),
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
    resolved = run.describe()
    if dry_run:
        print(json.dumps(resolved, indent=2))
        return
    check_apart(data, out)
    picked = local_device(pick_device(device))
    with process_group(picked), owned(out) if is_first() else nullcontext():
        corpus = load_corpus(source, _policy(image_size, found, upscale))
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
        )
    say(f"prior: {prior}; samples: {out / 'samples'}")


app.command("prepare")(prepare)


@app.command("sample")
def sample_command(
    model: Annotated[Path, typer.Option(help="Checkpoint.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("grid.png"),
    count: Annotated[int, typer.Option(min=1, help="Images to draw.")] = 16,
    sampler: Annotated[
        Sampler, typer.Option(help="dpmpp is DPM-Solver++(2M), ddpm ancestral, euler for --process flow.")
    ] = "dpmpp",
    steps: Annotated[int | None, typer.Option(min=1, help="Steps; heun evaluates the network twice in each.")] = None,
    eta: Annotated[float, typer.Option(min=0, max=1, help="DDIM: 0 deterministic, 1 ancestral.")] = 0.0,
    class_name: Annotated[
        list[str] | None, typer.Option("--class", help="Class to draw, by name; several take turns; default: all.")
    ] = None,
    guidance: Annotated[float, typer.Option(min=0, help="Classifier-free guidance; 1 is none.")] = 1.0,
    between: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two pictures: draw what lies between them.")
    ] = None,
    fill: Annotated[Path | None, typer.Option(help="Picture with a hole: draw what fits into --hole.")] = None,
    hole: Annotated[Path | None, typer.Option(help="Picture of the hole of --fill, white where to draw.")] = None,
    npz: Annotated[Path | None, typer.Option(help="Also write the images as uint8 (N, H, W, C).")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 64,
    precision: PrecisionOption = "auto",
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Draw images; process, noise schedule and prediction target come from the checkpoint."""
    weights, metadata = load_checkpoint(model)
    if steps is not None and metadata.diffusion.process == "ddpm" and steps > metadata.diffusion.timesteps:
        raise UsageError(f"--steps {steps} is more than the checkpoint's {metadata.diffusion.timesteps} timesteps")
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
            "classes": _classes(class_name, metadata.class_names, count),
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
            images = sample(network, metadata.diffusion, count, **options)
    save_png(out, grid_picture(images.numpy()))
    if npz:
        _write_npz(npz, images.permute(0, 2, 3, 1).numpy())
    say(f"{count} samples: {out}")


@app.command("serve")
def serve_command(
    prior: Prior,
    out: Out,
    rounds: Rounds = 10,
    min_clients: Annotated[int, typer.Option(help="Clients needed to begin.")] = 2,
    min_replies: Annotated[int, typer.Option(help="Usable updates that close a round.")] = 1,
    local_images: LocalImages = 2048,
    batch_size: LocalBatch = 32,
    lr: LocalRate = 5e-5,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    tls: Annotated[Path | None, typer.Option(help="Folder with ca.crt, server.crt, server.key.")] = None,
    insecure: Annotated[bool, typer.Option(help="Listen without TLS where others can reach it.")] = False,
    join_deadline: Annotated[float, typer.Option(help="Seconds to wait for clients.")] = 3600.0,
    round_deadline: Annotated[float, typer.Option(help="Seconds for one round.")] = 3600.0,
    seed: Seed = 0,
) -> None:
    """Hand a prior to institutions, gather their updates round by round, and keep the federated model."""
    check_address(host, tls, insecure)
    load_checkpoint(prior, "--prior")
    values = {
        "rounds": rounds,
        "min_clients": min_clients,
        "min_replies": min_replies,
        "local_images": local_images,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
        "join_deadline": join_deadline,
        "round_deadline": round_deadline,
    }
    config = cli.configure(FederationConfig, federation_config(prior, values))
    with owned(out):
        model = serve(prior, out, config, host=host, port=port, tls=tls)
    say(f"model: {model}; samples before and after: {out / 'samples'}")


@app.command()
def simulate(
    prior: Prior,
    data: Annotated[list[Path], typer.Option(help="Images to share out, or one --data for each client.")],
    out: Out,
    clients: Annotated[int, typer.Option(min=1, help="Institutions.")] = 3,
    rounds: Rounds = 5,
    split: Annotated[Literal["iid", "label"], typer.Option(help="Equal shares, or Dirichlet label skew.")] = "iid",
    alpha: Annotated[float, typer.Option(min=1e-3, help="Dirichlet concentration of --split label.")] = 0.5,
    fraction: Annotated[float, typer.Option(help="Share of its images that each client uses.")] = 0.1,
    local_images: LocalImages = 2048,
    batch_size: LocalBatch = 32,
    lr: LocalRate = 5e-5,
    upscale: Upscale = False,
    seed: Seed = 0,
) -> None:
    """Run a whole federation on this machine: a real Flower server and real clients on loopback."""
    _, metadata = load_checkpoint(prior, "--prior")
    if len(data) not in (1, clients):
        raise UsageError(f"--data is given {len(data)} times for --clients {clients}: give it once, or once a client")
    values = {
        "rounds": rounds,
        "min_clients": clients,
        "min_replies": clients,
        "local_images": local_images,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
    }
    config = cli.configure(FederationConfig, federation_config(prior, values))
    options = ["--fraction", str(fraction), "--seed", str(seed), *(["--upscale"] if upscale else [])]
    for path in data:
        check_apart(path, out)
    with owned(out):
        shares = None
        if len(data) == 1:
            shape = metadata.model
            corpus = load_corpus(open_source(data[0]), _policy(shape.image_size, shape.channels, upscale))
            say(f"data: {corpus.summary()}")
            shares = _shares(corpus, clients, split, alpha, seed)
        server = f"127.0.0.1:{(port := free_port())}"

        def start_sites() -> list[Child]:
            paths = data if shares is None else write_shares(corpus, shares, out / "sites")
            return start_clients(paths, out / "sites", server, options)

        model = serve(
            prior,
            out,
            config,
            host="127.0.0.1",
            port=port,
            tls=None,
            start_sites=start_sites,
            simulation={"clients": clients, "split": split, "alpha": alpha, "fraction": fraction, "upscale": upscale},
        )
    say(f"model: {model}; samples before and after: {out / 'samples'}")


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="Folder of the demonstration.")] = Path("maskdm-demo"),
    seed: Seed = 0,
) -> None:
    """The whole story in minutes: draw faces, pre-train a prior, federate three institutions, show the result."""
    from maskdm_server.demo import demo

    with owned(out):
        page = demo(out, seed)
    print(page)


def _shares(corpus: Corpus, clients: int, split: str, alpha: float, seed: int) -> list[np.ndarray]:
    rows = corpus.training_rows
    if split == "iid":
        if len(rows) < 2 * clients:
            raise UsageError(f"--data holds {len(rows)} images, too few for --clients {clients}")
        return split_iid(len(rows), clients, seed)
    labels = [corpus.label(row) for row in rows]
    if len(set(labels)) < 2:
        raise UsageError("--split label needs labels: sub-folders, or an .npz with an array 'labels'")
    return split_by_label(labels, clients, alpha, seed)


def _labels(source: Source) -> tuple[str, ...]:
    return tuple(sorted({entry.label for entry in source.entries() if entry.split == "train"} - {""}))


def _policy(image_size: int, channels: int, upscale: bool) -> PixelPolicy:
    return cli.configure(PixelPolicy, {"image_size": image_size, "channels": channels, "upscale": upscale})


def _classes(wanted: list[str] | None, names: tuple[str, ...], count: int) -> torch.Tensor | None:
    for name in wanted or ():
        if name not in names:
            known = f"choose from {', '.join(names)}" if names else "the model has no classes"
            raise UsageError(f"--class {name}: {known}")
    chosen = wanted or names
    return torch.tensor([names.index(chosen[i % len(chosen)]) for i in range(count)]) if chosen else None


def _picture(path: Path, shape: ModelConfig, option: str) -> torch.Tensor:
    """One picture as the model sees it, uint8 (C, S, S)."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{option} {path} cannot be read ({error.strerror})") from error
    try:
        return torch.from_numpy(decode(data, _policy(shape.image_size, shape.channels, True)).pixels.copy())
    except DataError as error:
        raise UsageError(f"{option} {path}: {error}") from error


def _write_npz(path: Path, images: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, images=images)
    atomic_write(path, buffer.getvalue())
