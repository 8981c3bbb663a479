"""The demonstration: draws its own images, pre-trains a prior, federates three institutions, shows what came of it."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maskdm.config import DiffusionConfig, MaskConfig, ModelConfig, Stage, TrainingConfig
from maskdm.data.pixels import PixelPolicy
from maskdm.data.preparation.cache import load_corpus
from maskdm.data.sources.source import open_source
from maskdm.networks.precision import pick_device
from maskdm.run.pictures import grid_picture, save_png
from maskdm.run.processes import free_port
from maskdm.run.reporting import readable_size, say
from maskdm.run.runfolder import atomic_write
from maskdm.training.pretrain import Run, pretrain

from ..federation.folder import federation_config
from ..federation.settings import FederationOptions
from ..flower.serve import serve
from ..report.costs import costs
from ..report.gather import FederationFolder
from ..report.page.blocks import colophon, page, picture, row_of, section, tiles
from ..report.page.markup import tag
from ..report.page.pictures import read_picture
from ..report.page.units import count, figure
from .faces import SITES, Domain, draw_faces
from .simulate import start_clients


@dataclass(frozen=True)
class Budget:
    """How much the demonstration does; the default takes about five minutes on two CPU cores."""

    public: int = 6000
    private: int = 1600
    pretrain_images: int = 100_000
    rounds: int = 5
    local_images: int = 1024
    samples: int = 36


# Small enough to learn in minutes on a CPU. x_0 as the target gives coherent pictures long before ε does, and shorter
# memories of the optimiser suit a run of few steps.
MODEL = ModelConfig.preset("tiny", image_size=32, channels=3)
DIFFUSION = DiffusionConfig(schedule="cosine", prediction="x0")
MASK = MaskConfig(kind="block", ratio=0.75, block_size=2)


def demo(out: Path, seed: int = 0, budget: Budget | None = None) -> Path:
    """Run it all in `out` and return the page; steps that are done already are not done again."""
    budget = budget or Budget()
    started = time.monotonic()
    say(f"1/4  drawing {budget.public:,} public faces, and {budget.private:,} of its own kind for each institution")
    corpus = _drawn(out / "images" / "public.npz", budget.public, "public", seed)
    sites = [_drawn(out / "images" / f"{domain}.npz", budget.private, domain, seed) for domain in SITES]
    say("2/4  pre-training the prior on the public faces, 75 % of each hidden")
    policy = PixelPolicy(image_size=MODEL.image_size, channels=3)
    images = load_corpus(open_source(corpus), policy, cache=out / "images")
    training = TrainingConfig(
        images=budget.pretrain_images, batch_size=64, lr=1e-3, betas=(0.9, 0.95), warmup_images=2000, seed=seed
    )
    (out / "run").mkdir(exist_ok=True)
    run = Run(MODEL, DIFFUSION, (Stage(mask=MASK, training=training),))
    prior = pretrain(images, out / "run", run, device=pick_device())
    say("3/4  federation: a Flower server and three institutions, each using about 10 % of its images")
    options = FederationOptions(
        rounds=budget.rounds,
        min_clients=len(sites),
        min_replies=len(sites),
        local_images=budget.local_images,
        batch_size=32,
        lr=5e-4,
        seed=seed,
    )
    federation, port = out / "federation", free_port()
    federation.mkdir(exist_ok=True)
    serve(
        prior,
        federation,
        federation_config(prior, options),
        host="127.0.0.1",
        port=port,
        tls=None,
        start_sites=lambda: start_clients(sites, federation / "sites", f"127.0.0.1:{port}", ["--seed", str(seed)]),
        sample_count=budget.samples,
    )
    say("4/4  writing the page: samples of the prior and of the federated model, from the same noise")
    written = _report(out, [corpus, *sites], budget)
    say(f"done in {time.monotonic() - started:.0f} s; open {written}")
    return written


def _drawn(path: Path, count: int, domain: Domain, seed: int) -> Path:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.stem}.tmp.npz")
        np.savez(temporary, images=draw_faces(count, domain, size=MODEL.image_size, seed=seed))
        temporary.replace(path)
    return path


def _report(out: Path, corpora: list[Path], budget: Budget) -> Path:
    what = {
        "public": "the public corpus",
        "clinic": "the clinic: surgical masks",
        "laboratory": "the laboratory: safety glasses",
        "workshop": "the workshop: hard hats",
    }
    shown = []
    for path in corpora:
        pixels = np.moveaxis(np.load(path, allow_pickle=False)["images"][:10], 3, 1)
        drawn = out / "images" / f"{path.stem}.png"
        save_png(drawn, grid_picture(pixels, columns=10))
        images = what[path.stem]
        shown.append(picture(f"Images of {images}", read_picture(drawn), f"Ten training images of {images}", "wide"))
    federation = FederationFolder(out / "federation").look()
    assert federation is not None
    assert federation.result is not None
    result, rounds = federation.result, federation.rounds
    change = (
        "Held-out loss at the institutions: "
        f"{figure(result.loss_prior)} for the prior, {figure(result.loss_final)} for the federated model."
    )
    before, after = (read_picture(out / "federation" / "samples" / name) for name in ("before.png", "after.png"))
    pair = row_of(
        picture("The prior", before, "Faces drawn by the prior: bare heads only"),
        picture(
            "After the federation, from the same noise",
            after,
            "Glasses, hard hats and the pale lower faces of masks begin to appear",
        ),
        class_="pair",
    )
    lead = [
        tag("p", f"Three institutions taught one model what their images show; no image left any of them. {change}"),
        tiles(
            [
                ("Prior", f"{budget.pretrain_images:,}", "masked images seen, 75 % of each hidden"),
                ("Rounds", count(result.rounds), f"with {rounds[-1].clients} institutions"),
                ("Trained on", count(rounds[-1].examples), "images of theirs"),
                ("Sent up in all", readable_size(result.bytes_up), "updates, and nine numbers a round"),
            ]
        ),
    ]
    sections = [
        section("What was learned", pair),
        section("Round by round", costs(rounds)),
        section("What each of them has", *shown),
    ]
    written = colophon(time.time())
    name = "One model, three institutions, no shared images"
    atomic_write(out / "index.html", page("MaskDM demonstration", name, lead, sections, written))
    return out / "index.html"
