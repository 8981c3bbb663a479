"""Prior → federation → model on real images, beside training from scratch on as many local images.

    python benchmarks/transfer_real.py fashion --data DIR --out WORK [--seeds 3] [--json FILE]
    python benchmarks/transfer_real.py xray    --data DIR --out WORK [--seeds 1] [--json FILE]

`fashion`: tops (classes 0, 2, 3, 4, 6) as the public corpus, footwear (5, 7, 9) over three institutions, 32x32 grey.
`xray`: blood cells as the public corpus, chest X-rays over two hospitals with label skew, 64x64 grey.

Both arms are measured on the same images that no arm trains on, with the same timesteps and noise. "Scratch" sees as
many local images as all institutions together did, pooled and with its own learning rate, the best of a grid on a
separate validation set: a stronger opponent than any institution alone could train. Everything goes through the
command line; finished steps are not repeated.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from maskdm.checkpoint import load_checkpoint, model_from
from maskdm.config import DiffusionConfig, MaskConfig, TrainingConfig
from maskdm.data.batches import batches
from maskdm.data.cache import load_corpus
from maskdm.data.pixels import PixelPolicy
from maskdm.data.sources import open_source
from maskdm.diffusion import denoising_loss
from maskdm.layers import patchify
from maskdm.model import build_model
from maskdm.pictures import save_png
from maskdm.precision import arithmetic, pick_precision
from maskdm.runfolder import read_lines, write_json
from maskdm.training import TrainingState, train
from maskdm_client.local_data import read_slice
from maskdm_server.pictures import save_samples

CPU = torch.device("cpu")
SCRATCH_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
Array = NDArray[np.uint8]

# One setting for all arms: a small network, x_0 as the target, short optimiser memory (runs are short).
SETTINGS: dict[str, dict[str, Any]] = {
    "fashion": {"size": 32, "clients": 3, "images": 100_000, "split": []},
    "xray": {"size": 64, "clients": 2, "images": 80_000, "split": ["--split", "label", "--alpha", "0.5"]},
}
ROUNDS, LOCAL_IMAGES, LOCAL_BATCH, LOCAL_RATE = 5, 256, 16, 1e-3


def fashion(data: Path) -> dict[str, tuple[Array, Array]]:
    """Public, local, validation and test images with labels, padded from 28 to 32 pixels."""
    with np.load(data / "fashion_mnist_25k.npz", allow_pickle=False) as packed:
        arrays = {name: packed[name] for name in packed.files}
    pad = ((0, 0), (2, 2), (2, 2))
    train_x, test_x = np.pad(arrays["x_train"], pad), np.pad(arrays["x_test"], pad)
    public, shoes = np.isin(arrays["y_train"], (0, 2, 3, 4, 6)), np.isin(arrays["y_train"], (5, 7, 9))
    test_rows = np.flatnonzero(np.isin(arrays["y_test"], (5, 7, 9)))
    half = len(test_rows) // 2
    return {
        "public": (train_x[public], arrays["y_train"][public]),
        "local": (train_x[shoes], arrays["y_train"][shoes]),
        "validation": (test_x[test_rows[:half]], arrays["y_test"][test_rows[:half]]),
        "test": (test_x[test_rows[half:]], arrays["y_test"][test_rows[half:]]),
    }


def xray(data: Path) -> dict[str, tuple[Array, Array]]:
    """Blood cells in grey; chest X-rays by their own train/test split, the test half for validation."""

    def read(path: Path) -> tuple[list[Array], list[str], list[str]]:
        with zipfile.ZipFile(path) as packed:
            names = sorted(name for name in packed.namelist() if name.lower().endswith((".jpg", ".jpeg")))
            pictures = [np.asarray(Image.open(packed.open(name)).convert("L")) for name in names]
        return pictures, [Path(name).parent.name for name in names], names

    cells, kinds, _ = read(data / "bloodcells64.zip")
    chests, labels, names = read(data / "chestxray64.zip")
    pixels, tags = np.stack(chests), np.array(labels)
    is_test = np.array([Path(name).parts[-3] == "test" for name in names])
    test_rows = np.random.default_rng(0).permutation(np.flatnonzero(is_test))
    half = len(test_rows) // 2
    return {
        "public": (np.stack(cells), np.array(kinds)),
        "local": (pixels[~is_test], tags[~is_test]),
        "validation": (pixels[test_rows[:half]], tags[test_rows[:half]]),
        "test": (pixels[test_rows[half:]], tags[test_rows[half:]]),
    }


def command(*arguments: str) -> str:
    """Run `maskdm-server` and return the command line as a person would type it."""
    subprocess.run([str(Path(sys.executable).with_name("maskdm-server")), *arguments], check=True)
    return " ".join(("maskdm-server", *arguments))


def held_out(model_path: Path, pixels: torch.Tensor) -> float:
    """Held-out denoising loss of a checkpoint."""
    weights, metadata = load_checkpoint(model_path)
    return loss_of(weights, metadata.model, metadata.diffusion, pixels)


def loss_of(weights: dict[str, torch.Tensor], shape: Any, diffusion: DiffusionConfig, pixels: torch.Tensor) -> float:
    """Held-out denoising loss of weights: four draws an image, the same ones for every model."""
    model = model_from(weights, shape)
    with arithmetic(CPU, pick_precision("auto", CPU)):
        return denoising_loss(model, diffusion, patchify(pixels, shape.patch_size), draws=4, seed=7)


def scratch(
    prior: Path, sites: list[Path], images: int, lr: float, seed: int, validation: torch.Tensor
) -> tuple[float, dict[str, torch.Tensor]]:
    """Train from random weights on the pooled slices of all sites; validation loss and weights."""
    _, metadata = load_checkpoint(prior)
    shape = metadata.model
    policy = PixelPolicy.model_validate({"image_size": shape.image_size, "channels": shape.channels})
    pools = []
    for site in sites:
        corpus = load_corpus(open_source(site), policy, cache=site.parent)
        trained = read_slice(site.parent / "client").train
        digests = [bytes(digest).hex() for digest in corpus.index["sha256"]]
        pools.append(corpus.pixels[[row for row, digest in enumerate(digests) if digest in trained]])
    config = TrainingConfig(
        images=images, batch_size=LOCAL_BATCH, lr=lr, warmup_images=500, betas=(0.9, 0.95), seed=seed
    )
    state = TrainingState.fresh(build_model(shape, seed=seed), config)
    order = batches(np.concatenate(pools), config.batch_size, 0, seed)
    train(state, order, config, metadata.diffusion, MaskConfig(kind="none"))
    return loss_of(state.average, shape, metadata.diffusion, validation), state.average


def one_seed(task: str, parts: dict[str, tuple[Array, Array]], out: Path, seed: int) -> dict[str, Any]:
    """Both arms for one seed."""
    setting = SETTINGS[task]
    out.mkdir(parents=True, exist_ok=True)
    for name in ("public", "local"):
        if not (out / f"{name}.npz").exists():
            np.savez(out / f"{name}.npz", images=parts[name][0], labels=parts[name][1])
    pixels = {name: torch.from_numpy(parts[name][0])[:, None] for name in ("validation", "test")}
    started = time.monotonic()
    lines = [
        command(
            *("pretrain", "--data", str(out / "public.npz"), "--out", str(out / "run"), "--size", "tiny"),
            *("--image-size", str(setting["size"]), "--mask-ratio", "0.75", "--block-size", "2", "--prediction", "x0"),
            *("--images", str(setting["images"]), "--batch-size", "64", "--lr", "1e-3", "--betas", "0.9,0.95"),
            *("--warmup-images", "2000", "--patch-size", str(setting["size"] // 8), "--seed", str(seed)),
        ),
        command(
            *("simulate", "--prior", str(out / "run/prior.safetensors"), "--data", str(out / "local.npz")),
            *("--out", str(out / "fed"), "--clients", str(setting["clients"]), "--rounds", str(ROUNDS)),
            *("--local-images", str(LOCAL_IMAGES), "--batch-size", str(LOCAL_BATCH), "--lr", str(LOCAL_RATE)),
            *("--seed", str(seed), *setting["split"]),
        ),
    ]
    prior, model = out / "run/prior.safetensors", out / "fed/model.safetensors"
    rounds = read_lines(out / "fed/rounds.jsonl")
    sites = sorted((out / "fed/sites").glob("*/images.npz"))
    seen = sum(line["images_seen"] for line in rounds)
    tried = {lr: scratch(prior, sites, seen, lr, seed, pixels["validation"]) for lr in SCRATCH_RATES}
    best = min(tried, key=lambda lr: tried[lr][0])
    _, metadata = load_checkpoint(prior)
    save_samples(out / "scratch.png", tried[best][1], metadata.model, metadata.diffusion, seed=seed)
    return {
        "task": task,
        "seed": seed,
        "prior": held_out(prior, pixels["test"]),
        "federated": held_out(model, pixels["test"]),
        "scratch": loss_of(tried[best][1], metadata.model, metadata.diffusion, pixels["test"]),
        "scratch_lr": best,
        "scratch_validation": {str(lr): value for lr, (value, _) in tried.items()},
        "rounds_at_sites": [line["loss_before"] for line in rounds]
        + [json.loads((out / "fed/result.json").read_text())["loss_final"]],
        "local_images_seen": seen,
        "examples": rounds[-1]["examples"],
        "seconds": round(time.monotonic() - started),
        "commands": [line.replace(f"{out}/", "") for line in lines],
    }


def side_by_side(pictures: list[Path]) -> Image.Image:
    """Grids in one row."""
    opened = [Image.open(path).convert("L") for path in pictures]
    sheet = Image.new("L", (sum(p.width for p in opened) + 16 * (len(opened) - 1), opened[0].height), 255)
    left = 0
    for picture in opened:
        sheet.paste(picture, (left, 0))
        left += picture.width + 16
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(SETTINGS))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    parts = {"fashion": fashion, "xray": xray}[options.task](options.data)
    machine = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    results = []
    print(f"{'seed':>4} {'prior':>8} {'federated':>10} {'scratch':>8} (lr)")
    for seed in range(options.seeds):
        out = options.out / f"{options.task}-{seed}"
        row = one_seed(options.task, parts, out, seed)
        results.append({**row, "machine": machine, "versions": versions})
        print(f"{seed:>4} {row['prior']:8.4f} {row['federated']:10.4f} {row['scratch']:8.4f} ({row['scratch_lr']})")
        if options.json:
            write_json(options.json, results)
            if seed == 0:  # prior, federated, scratch, from the same noise
                grids = [out / "fed/samples/before.png", out / "fed/samples/after.png", out / "scratch.png"]
                save_png(options.json.with_suffix(".png"), side_by_side(grids))


if __name__ == "__main__":
    main()
