"""What a coordinator who chooses weights, metadata and plans gets out of a site: dB of the best picture, and questions.

    python benchmarks/leakage.py --json benchmarks/results/leakage.json

Each row is one attack of `benchmarks/attacks` at a site of drawn faces: PSNR of the best reconstruction beside the
site's nearest image, for a plan as short as the policy allows, with draws (rows, times, noise) that follow from the
plan, or that the site keeps to itself. First come rows of what is no leak: the mean image of a site, the nearest image
of a public corpus; with `--data FOLDER` also of real images (portraits64.zip, chestxray64.zip, bloodcells64.zip).
`--only TEXT` runs the rows whose name holds it.
"""

import argparse
import io
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.attacks import gates, gradients, labels, oracles
from benchmarks.attacks.site import (
    Coordinator,
    Images,
    Limits,
    best_psnr,
    fresh_weights,
    held_out_rows,
    make_site,
    prior_of,
    psnr,
)

from maskdm.config import ModelConfig
from maskdm.runfolder import write_json
from maskdm.wire import Encoding
from maskdm_server.demo import MODEL as DEMO
from maskdm_server.faces import draw_faces

SMALL = ModelConfig(image_size=16, channels=3, patch_size=4, dim=64, depth=2, heads=2)
ONE_TOKEN = ModelConfig(image_size=8, channels=1, patch_size=8, dim=128, depth=2, heads=2)
SITE, BLIND = 600, 8  # images of the site; questions where chance decides whether one image is alone
FLOORS = {"none": Limits(), "batch 16, 64 images, 8 steps": Limits(16, 64, 8)}
ENCODINGS: tuple[Encoding, ...] = ("fp32", "bf16", "int8", "topk")
USUAL: tuple[Encoding, ...] = ("bf16",)

Attack = Callable[[Coordinator], Iterable[Tensor]]


def attacks(public: Images) -> dict[str, tuple[ModelConfig, Attack]]:
    """Those that give pictures: name → network, and what it does."""

    def one_of(batch: int, train: Any) -> Attack:
        return lambda asker: gates.one_of_many(asker, batch, latest(asker, batch), train, tries(asker))

    def own(model: ModelConfig, loss_weight: dict[str, Any]) -> Attack:
        return lambda asker: gradients.single_image(asker, fresh_weights(model), loss_weight, tries(asker))

    return {
        "one image, honest weights, min_snr_gamma 1e-7": (SMALL, own(SMALL, gradients.TINY)),
        "one image, honest weights, p2_gamma 2": (SMALL, own(SMALL, gradients.EARLY_TINY)),
        "one image, honest weights of the demonstration's network": (DEMO, own(DEMO, gradients.TINY)),
        "one image of 512, gate by time": (SMALL, one_of(512, "all")),
        "one image of 512, gate by time, norm-bias": (SMALL, one_of(512, "norm-bias")),
        "one image of 512, gate by time, adapters": (SMALL, one_of(512, "adapters")),
        "the shortest plan, gate by time": (SMALL, one_of(1, "all")),
        "the shortest plan, gate by time, norm-bias": (SMALL, one_of(1, "norm-bias")),
        "the shortest plan, gate by time, adapters": (SMALL, one_of(1, "adapters")),
        "the shortest plan, gate by time after priming the moments": (
            SMALL,
            lambda asker: gates.after_priming(asker, 1, latest(asker, 1), tries(asker)),
        ),
        "512 images, gates by brightness": (SMALL, lambda asker: gates.by_brightness(asker, 512, 60, public)),
        "the shortest plan, gates by brightness": (SMALL, lambda asker: gates.by_brightness(asker, 1, 60, public)),
    }


def latest(asker: Coordinator, batch: int) -> int:
    """Time until which a gate is open: for one image of a plan, known or by chance."""
    if asker.knows_draws:
        return 1
    images = asker.limits.plan(batch)["local_images"]
    return min(100, max(1, asker.prior.diffusion.timesteps // images))


def tries(asker: Coordinator) -> int:
    return 1 if asker.knows_draws else BLIND


def pictures(folder: Path, only: str) -> Iterator[dict[str, Any]]:
    """A row for each attack on training images, floor, knowledge and encoding."""
    public = draw_faces(600, "public", size=16, seed=7)
    for number, (name, (model, attack)) in enumerate(attacks(public).items()):
        if only not in name:
            continue
        images = draw_faces(SITE, "clinic", size=model.image_size, seed=5)
        site = make_site(folder / f"site-{number}", images)
        for floors, limits in FLOORS.items():
            for known in (True, False):
                if limits.batch > 1 and (model is DEMO or ("512" in name and not known)):
                    continue  # minutes, and it says nothing new: the shortest plan tells more
                for encoding in ENCODINGS if model is SMALL and known else USUAL:
                    asker = Coordinator(site, prior_of(model), limits, encoding, known)
                    yield row(name, asker, floors, dB=best_psnr(attack(asker), images))


def numbers(folder: Path, only: str) -> Iterator[dict[str, Any]]:
    """A row for each attack that reads numbers, codes or labels."""
    grey = draw_faces(40, "clinic", size=8, seed=5).mean(axis=3, keepdims=True).astype(np.uint8)
    site = make_site(folder / "grey", grey)
    asker = Coordinator(site, prior_of(ONE_TOKEN, timesteps=500))
    name = "held-out pixels by loss, one-token network"
    if only in name:
        found = list(oracles.held_out_image(asker, oracles.single_pixels(ONE_TOKEN), 0))
        best = min(found, key=lambda image: -float(psnr(image, grey).max()))
        nearest = grey[int(psnr(best, grey).argmax())]
        exact = float((best.round() == torch.from_numpy(nearest)).float().mean())
        yield row(name, asker, "none", dB=best_psnr(found, grey), exact_pixels=exact)
    images = draw_faces(120, "clinic", size=16, seed=5)
    site = make_site(folder / "labelled", images, ["masked" if i % 3 else "bare" for i in range(len(images))])
    for count in (4, 16):
        name = f"held-out image by {count} coarse patterns, the prior's network"
        if only in name:
            asker = Coordinator(site, prior_of(SMALL))
            found = list(oracles.held_out_image(asker, oracles.coarse(SMALL, count), 1, 3.0))
            yield row(name, asker, "none", dB=best_psnr(found, images))
    name = "brightness of the brightest held-out image, from outcome codes"
    if only in name:
        asker = Coordinator(site, prior_of(SMALL))
        told = oracles.brightest_held_out(asker, draw_faces(600, "public", size=16, seed=7), 100, 10)
        true = float(images[held_out_rows(site)].reshape(-1, images[0].size).mean(axis=1).max())
        yield row(name, asker, "none", told=told, true=true)
    guesses = ["masked", "bare", "tumour", "healthy", "covid"]
    for name, guess in (("labels by loss", labels.by_loss), ("labels by update", labels.by_update)):
        if only in name:
            asker = Coordinator(site, prior_of(SMALL))
            yield row(name, asker, "none", right=guess(asker, guesses) == {"masked", "bare"})


def row(name: str, asker: Coordinator, floors: str, **found: Any) -> dict[str, Any]:
    return {
        "attack": name,
        "floors": floors,
        "draws": "follow from the plan" if asker.knows_draws else "the site's secret",
        "encoding": asker.encoding,
        "questions": asker.questions,
        "refusals": [outcome.name for outcome in asker.refusals],
        **found,
    }


def calibration(data: Path | None) -> Iterator[dict[str, Any]]:
    """PSNR of what is no leak: half of the images is a site, the other half is public."""
    sets = {f"faces {size} px": draw_faces(1200, "clinic", size=size, seed=5) for size in (16, 32)}
    for name in ("portraits64", "chestxray64", "bloodcells64") if data else ():
        assert data
        sets[name] = from_zip(data / f"{name}.zip", 1200)
    for name, images in sets.items():
        order = np.random.default_rng(0).permutation(len(images))
        site, public = (images[part].astype(np.float32) for part in np.array_split(order, 2))
        mean = torch.from_numpy(site.mean(axis=0))
        beside_mean = psnr(mean, site.astype(np.uint8))
        nearest = [float(psnr(torch.from_numpy(image), public.astype(np.uint8)).max()) for image in site[:200]]
        random = [float(psnr(torch.from_numpy(image), site.astype(np.uint8)).max()) for image in public[:200]]
        yield {
            "what is no leak": name,
            "mean image, median dB": float(beside_mean.median()),
            "mean image, best dB": float(beside_mean.max()),
            "nearest public image, median dB": float(np.median(nearest)),
            "nearest public image, best dB": max(nearest),
            "a public image at random, median of the best dB": float(np.median(random)),
        }


def from_zip(path: Path, count: int) -> Images:
    """Some of a zip's pictures, evenly from everywhere, (N, S, S, C)."""
    with zipfile.ZipFile(path) as file:
        names = sorted(name for name in file.namelist() if name.lower().endswith((".jpg", ".jpeg", ".png")))
        chosen = names[:: max(1, len(names) // count)][:count]
        pictures = [np.asarray(Image.open(io.BytesIO(file.read(name)))) for name in chosen]
    return np.stack([picture.reshape(*picture.shape[:2], -1) for picture in pictures])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--commit", default="", help="of the code that is attacked, for the record")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for found in (*([] if options.only else calibration(options.data)),):
            rows.append(found)
            print(found, flush=True)
        for source in (pictures, numbers):
            started = time.monotonic()
            for found in source(folder, options.only):
                seconds, started = time.monotonic() - started, time.monotonic()
                rows.append({**found, "seconds": round(seconds, 1), "commit": options.commit})
                print({k: v for k, v in rows[-1].items() if k != "commit"}, flush=True)
                if options.json:
                    write_json(options.json, rows)


if __name__ == "__main__":
    main()
