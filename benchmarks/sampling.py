"""What each sampler costs and how close it comes.

    python benchmarks/sampling.py [--threads 1] [--count 4] [--json FILE]
    python benchmarks/sampling.py --model FILE --reference IMAGES --features FILE [--samples 2000] …

Cost: seconds an image of the published S network at 64 pixels, random weights, and evaluations of the network.
Closeness: with the exact denoiser of a mixture of two Gaussians in the network's place, the Wasserstein-1 distance
between 4,000 samples and the mixture's quantiles; the floor is what 4,000 true samples give. With a trained model
instead: the Fréchet distance of its samples to real images.
"""

import argparse
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskdm.config import DiffusionConfig, ModelConfig, ProcessKind, Sampler
from maskdm.data.pixels import PixelPolicy
from maskdm.data.preparation.cache import load_corpus
from maskdm.data.sources.source import open_source
from maskdm.diffusion.forward_process import forward_process
from maskdm.diffusion.sampling import Levels, X0At, levels_at, run_sampler, sample, sampling_times
from maskdm.evaluation.distances import frechet_distance, moments
from maskdm.evaluation.extractors.features import open_extractor
from maskdm.networks.model import build_model
from maskdm.networks.precision import pick_device, pick_precision
from maskdm.run.runfolder import write_json
from maskdm.training.checkpoint import load_checkpoint, model_from

DDPM: tuple[Sampler, ...] = ("dpmpp", "heun", "ddim")
EDM: tuple[Sampler, ...] = ("heun", "dpmpp")
FLOW: tuple[Sampler, ...] = ("euler", "heun", "dpmpp")
CASES: tuple[tuple[ProcessKind, Sampler, int], ...] = (
    *(("ddpm", sampler, steps) for sampler in DDPM for steps in (10, 20, 25, 50, 100)),
    *(("ddpm", "ddpm", steps) for steps in (250, 1000)),
    *(("edm", sampler, steps) for sampler in EDM for steps in (10, 20, 50)),
    *(("flow", sampler, steps) for sampler in FLOW for steps in (10, 20, 50)),
)
# Samplers that evaluate the network once a step. The research code takes 250 with η = 1.
REAL_CASES: tuple[tuple[Sampler, int, float], ...] = (
    *(("dpmpp", steps, 0.0) for steps in (5, 10, 15, 20, 25, 50)),
    *(("ddim", steps, 0.0) for steps in (25, 50, 100, 250)),
    *(("ddim", steps, 1.0) for steps in (25, 50, 100, 250)),
)
SAMPLES = 4000
WEIGHTS, CENTRES, WIDTH = torch.tensor([0.7, 0.3]).double(), torch.tensor([-0.6, 0.5]).double(), 0.1


def exact(levels: Levels) -> X0At:
    """E[x_0 | x_t] of the mixture."""

    def x0_at(x: Tensor, i: int) -> Tensor:
        alpha, sigma = levels[i]
        spread = alpha**2 * WIDTH**2 + sigma**2
        distance = x[..., None] - alpha * CENTRES
        chance = (WEIGHTS.log() - distance**2 / (2 * spread)).softmax(dim=-1)
        return (chance * (CENTRES + alpha * WIDTH**2 / spread * distance)).sum(dim=-1)

    return x0_at


def quantiles() -> Tensor:
    """Values that the mixture stays below with probability (i + ½)/SAMPLES, (SAMPLES,)."""
    grid = torch.linspace(-1.5, 1.5, 200_001, dtype=torch.float64)
    below = (WEIGHTS * (0.5 + 0.5 * torch.erf((grid[:, None] - CENTRES) / (WIDTH * math.sqrt(2))))).sum(dim=1)
    wanted = (torch.arange(SAMPLES, dtype=torch.float64) + 0.5) / SAMPLES
    return grid[torch.searchsorted(below, wanted).clamp(max=len(grid) - 1)]


def distance(process: ProcessKind, sampler: Sampler, steps: int) -> tuple[float, int]:
    """Wasserstein-1 distance to the mixture, and evaluations."""
    forward = forward_process(DiffusionConfig(process=process))
    levels = levels_at(forward, sampling_times(forward, sampler, steps))
    calls = 0

    def counted(x: Tensor, i: int) -> Tensor:
        nonlocal calls
        calls += 1
        return exact(levels)(x, i)

    noise = torch.randn(1, SAMPLES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own = [torch.Generator().manual_seed(1)]
    drawn = run_sampler(sampler, counted, levels, noise * levels[0][1], eta=0.0, randomness=own)
    return float((drawn.flatten().sort().values - quantiles()).abs().mean()), calls


def floor() -> float:
    """Distance of as many true samples."""
    randomness = torch.Generator().manual_seed(2)
    which = (torch.rand(SAMPLES, generator=randomness) > WEIGHTS[0]).long()
    drawn = CENTRES[which] + WIDTH * torch.randn(SAMPLES, generator=randomness, dtype=torch.float64)
    return float((drawn.sort().values - quantiles()).abs().mean())


def real_distances(options: argparse.Namespace, device: torch.device, precision: Any) -> Iterator[dict[str, Any]]:
    """Fréchet distance of a trained model's samples to real images, for each sampler and number of evaluations."""
    weights, metadata = load_checkpoint(options.model)
    model, shape = model_from(weights, metadata.model, device), metadata.model
    policy = PixelPolicy.model_validate({"image_size": shape.image_size, "channels": shape.channels})
    corpus = load_corpus(open_source(options.reference, "--reference"), policy)
    extractor = open_extractor(options.features, device=device)
    real = moments(extractor.features(torch.from_numpy(np.ascontiguousarray(corpus.pixels))))
    for sampler, steps, eta in REAL_CASES:
        drawn = sample(
            model,
            metadata.diffusion,
            options.samples,
            sampler=sampler,
            steps=steps,
            eta=eta,
            batch_size=256,
            precision=precision,
        )
        found = frechet_distance(moments(extractor.features(drawn)), real)
        yield {
            **{"what": f"FD-{extractor.name}", "sampler": sampler, "evaluations": steps, "eta": eta},
            **{"samples": options.samples, "reference": len(corpus), "distance": found},
        }


def costs(count: int, device: torch.device, precision: Any) -> Iterator[dict[str, Any]]:
    """Seconds and closeness of each process, sampler and number of steps."""
    model = build_model(ModelConfig.preset("S", image_size=64, channels=3), device=device)
    sample(model, DiffusionConfig(), count, steps=1, precision=precision)
    started = time.perf_counter()
    sample(model, DiffusionConfig(), count, steps=10, precision=precision)
    evaluation = (time.perf_counter() - started) / 10 / count  # the same for every sampler
    yield {"what": "floor: true samples", "distance": floor()}
    for process, sampler, steps in CASES:
        off, calls = distance(process, sampler, steps)
        row = {"process": process, "sampler": sampler, "steps": steps, "evaluations": calls}
        yield row | {"seconds an image": evaluation * calls, "distance": off}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", type=Path, help="a trained model, with --reference and --features")
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--features", type=Path)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    precision = pick_precision("auto", device)
    machine = {"cpu": platform.machine(), "device": str(device), "threads": options.threads, "precision": precision}
    rows = []
    for row in real_distances(options, device, precision) if options.model else costs(options.count, device, precision):
        rows.append(row)
        print(
            "  ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()), flush=True
        )
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if options.json:
        write_json(options.json, [{**row, "machine": machine, "versions": versions} for row in rows])


if __name__ == "__main__":
    main()
