"""`maskdm-server experiment`."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from maskdm import quantities
from maskdm.commands import command_line as cli
from maskdm.commands.image_options import Channels, Upscale, channels_of, pixel_policy
from maskdm.config import SIZES, DiffusionConfig, LossWeight, MaskConfig, MaskKind, ModelConfig, Prediction, Size
from maskdm.data.corpus import Corpus
from maskdm.data.preparation.cache import load_corpus
from maskdm.data.preparation.pack import check_apart, guess_channels
from maskdm.data.sources.source import open_source
from maskdm.networks.precision import pick_device
from maskdm.run.interruption import Interruption
from maskdm.run.reporting import say
from maskdm.run.runfolder import atomic_write, claim, owned, read_lines, write_json

from ..lab.experiment.arms import Arm, arms_named, known_arms
from ..lab.experiment.budget import ExperimentConfig, spending
from ..lab.experiment.images import PartedImages, check, make_sites, part, pool
from ..lab.experiment.page import curves_file, experiment_page
from ..lab.experiment.quality import Judge
from ..lab.experiment.summary import ArmRun, sentences, table
from ..lab.experiment.training import CURVE, PICTURE, Place, make_prior, run_federated, run_pooled
from .options import Device, Out, PrecisionOption

USUAL_ARMS = ",".join(name for name in known_arms(MaskConfig()) if name != "curriculum")


def experiment(
    public: Annotated[Path, typer.Option(help="Images of the public corpus.")],
    local: Annotated[Path, typer.Option(help="Images that the sites have, all together.")],
    features: Annotated[Path, typer.Option(help="Feature network that distances are measured with.")],
    out: Out,
    arms: Annotated[str, typer.Option(help=f"Of {', '.join(known_arms(MaskConfig()))}, mask=KIND:RATIO:BLOCK.")] = (
        USUAL_ARMS
    ),
    size: Annotated[Size, typer.Option(help="Network.")] = "tiny",
    image_size: Annotated[int, typer.Option(help="Pixels along a side.")] = 32,
    channels: Channels = "auto",
    patch_size: Annotated[int, typer.Option(help="Pixels along a patch.")] = 4,
    prediction: Annotated[Prediction, typer.Option(help="Prediction target.")] = "x0",
    loss_weight: Annotated[LossWeight, typer.Option(help="Weight of noise levels in the loss.")] = "uniform",
    mask: Annotated[MaskKind, typer.Option(help="Of the masked prior.")] = "block",
    mask_ratio: Annotated[float, typer.Option(help="Share that is hidden.")] = 0.75,
    block_size: Annotated[int, typer.Option(help="Patches along a block.")] = 2,
    prior_images: Annotated[str, typer.Option(help="Images that the masked prior sees: the budget of all priors.")] = (
        "200K"
    ),
    local_images: Annotated[str, typer.Option(help="Images seen after it, at all sites together.")] = "50K",
    batch_size: Annotated[int, typer.Option(help="Whole images a step, of all sites together.")] = 64,
    prior_lr: Annotated[float, typer.Option(help="Learning rate of priors.")] = 1e-3,
    rates: Annotated[str, typer.Option(help="Learning rates after it, of which each arm takes its best.")] = (
        "0.0005,0.001,0.002"
    ),
    fraction: Annotated[float, typer.Option(help="Share of its images that each site uses.")] = 0.1,
    clients: Annotated[int, typer.Option(help="Sites.")] = 4,
    rounds: Annotated[int, typer.Option(help="Rounds in which the local images are seen.")] = 20,
    site_batch_size: Annotated[
        int | None, typer.Option(help="Images a step at a site; without it --batch-size is shared out.")
    ] = None,
    keep_moments: Annotated[
        bool, typer.Option(help="Sites keep their optimiser's moments from round to round.")
    ] = True,
    server_ema: Annotated[float, typer.Option(help="Decay of the average of the rounds' models; 0: none.")] = 0.6,
    alpha: Annotated[float, typer.Option(help="Dirichlet concentration of the label skew.")] = 0.1,
    references: Annotated[
        int, typer.Option(min=16, help="Images held out to choose by, and as many to report.")
    ] = 1000,
    samples: Annotated[int, typer.Option(help="Images drawn for each measurement.")] = 1000,
    sampling_steps: Annotated[int, typer.Option(help="Evaluations of the network for an image.")] = 20,
    seeds: Annotated[int, typer.Option(help="Repetitions with other randomness.")] = 3,
    precision: PrecisionOption = "auto",
    device: Device = "auto",
    upscale: Upscale = False,
) -> None:
    """Find out on your own images whether a prior and a federation pay: arms of equal compute, several seeds."""
    sources = {"--public": open_source(public, "--public"), "--local": open_source(local, "--local")}
    found = channels_of(channels) or guess_channels(sources["--local"])
    shape = {"image_size": image_size, "channels": found, "patch_size": patch_size, **SIZES[size]}
    config = cli.configure(
        ExperimentConfig,
        {
            "model": cli.configure(ModelConfig, shape),
            "diffusion": DiffusionConfig(prediction=prediction, loss_weight=loss_weight),
            "mask": cli.configure(MaskConfig, {"kind": mask, "ratio": mask_ratio, "block_size": block_size}),
            "prior_images": quantities.count("--prior-images", prior_images),
            "local_images": quantities.count("--local-images", local_images),
            "batch_size": batch_size,
            "prior_lr": prior_lr,
            "rates": quantities.numbers("--rates", rates),
            "fraction": fraction,
            "clients": clients,
            "rounds": rounds,
            "site_batch_size": site_batch_size,
            "keep_moments": keep_moments,
            "server_ema": server_ema,
            "alpha": alpha,
            "samples": samples,
            "sampling_steps": sampling_steps,
            "precision": precision,
            "seeds": seeds,
        },
    )
    chosen = arms_named(arms.split(","), config.mask)
    for arm in chosen:
        spending(config, arm)  # a mask that does not fit is said at once
    check_apart(public, out)
    check_apart(local, out)
    with owned(out), Interruption() as interruption:
        policy = pixel_policy(image_size, found, upscale)
        corpora = {option: load_corpus(source, policy) for option, source in sources.items()}
        identity = {
            "config": config.model_dump(mode="json", exclude={"seeds"}),
            "references": references,
            **{option: corpus.manifest.sha256 for option, corpus in corpora.items()},
        }
        images = part(corpora["--local"], references)
        check(images, corpora["--public"], config, chosen)
        judge = Judge(images, features, config, pick_device(device))
        claim(out, "experiment", identity | {"features": judge.extractor.sha256}, may_change=())
        place = Place(out, config, judge, pick_device(device), interruption.check)
        results = {}
        for arm in chosen:
            results[arm.name] = run_arm(place, arm, corpora["--public"], images)
            write_results(place, {arm.name: arm for arm in chosen}, results)
    print((out / "results.md").read_text(), end="")


def run_arm(place: Place, arm: Arm, public: Corpus, images: PartedImages) -> list[ArmRun]:
    """All seeds of an arm: the first one tries every rate, the others take the best of them."""
    config, found = place.config, []
    best: float | None = None
    for seed in range(config.seeds):
        prior = make_prior(place, arm, public, seed)
        tried = []
        for lr in config.rates if best is None else (best,):
            _train(place, arm, prior, images, seed, lr)
            curve = tuple(read_lines(place.run(arm, seed, lr) / CURVE))
            tried.append(ArmRun(arm.name, seed, lr, spending(config, arm).prior_flops, curve))
        run = min(tried, key=lambda run: run.last["fd_validation"])
        best = run.lr
        found.append(run)
    return found


def _train(place: Place, arm: Arm, prior: Path, images: PartedImages, seed: int, lr: float) -> None:
    if (place.run(arm, seed, lr) / PICTURE).exists():  # what a run writes last
        return
    kind = "skewed" if arm.sites == "skewed" else "iid"
    folder = place.folder / "sites" / f"{kind}-seed{seed}"
    if arm.everything:
        run_pooled(place, arm, prior, np.ascontiguousarray(images.corpus.pixels[images.local]), seed, lr)
        return
    sites = make_sites(images, place.config, kind, folder, seed)  # type: ignore[arg-type]
    if arm.sites == "pooled":
        run_pooled(place, arm, prior, pool(sites), seed, lr)
    else:
        run_federated(place, arm, prior, sites, seed, lr)


def write_results(place: Place, arms: Mapping[str, Arm], results: dict[str, list[ArmRun]]) -> None:
    """results.json for programs, results.md, results.html and curves.svg for people: of the arms that are done."""
    floor, extractor = place.judge.floor(), place.judge.extractor
    about: dict[str, Any] = {
        "config": place.config.model_dump(mode="json"),
        "extractor": {"name": extractor.name, "sha256": extractor.sha256, "resize": extractor.resize},
        "floor": floor,
        "runs": {arm: [vars(run) for run in runs] for arm, runs in results.items()},
        "sentences": sentences(results, place.config),
        "torch": torch.__version__,
    }
    write_json(place.folder / "results.json", json.loads(json.dumps(about, default=str)))
    lines = "\n".join(f"- {sentence}" for sentence in about["sentences"])
    name = extractor.name
    title = f"Fréchet distance in the features of {name} (FD-{name}), {place.config.samples:,} samples"
    atomic_write(place.folder / "results.md", f"{title}\n\n{table(results, floor)}\n\n{lines}\n")
    facts = {"Feature network": f"{name}, {extractor.resize}", "sha256 of the feature network": extractor.sha256}
    pictures = {arm: place.run(arms[arm], runs[0].seed, runs[0].lr) / PICTURE for arm, runs in results.items()}
    page = experiment_page(
        place.folder.resolve().name,
        results,
        arms,
        about["sentences"],
        place.config,
        floor,
        facts,
        pictures,
        time.time(),
    )
    atomic_write(place.folder / "results.html", page)
    if curves := curves_file(results):
        atomic_write(place.folder / "curves.svg", curves)
    say(f"results so far: {place.folder / 'results.html'}")
