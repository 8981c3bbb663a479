"""What a coordinator who chooses weights, metadata and plans gets out of a site: dB of the best picture, and questions.

    python benchmarks/leakage.py --json benchmarks/results/leakage.json

Each row is one attack of `benchmarks/attacks` at a site of drawn faces: PSNR of the best reconstruction beside the
site's nearest image, by the shortest plans that the policy allows: an open one, whose secret the attacker was told too,
so that rows, times and noise follow from the plan as they once did; or the default one, at first contact. First come
rows of what is no leak: the mean image of a site, the nearest image of a public corpus; with `--data FOLDER` also of
real images (portraits64.zip, chestxray64.zip, bloodcells64.zip). `--only TEXT` runs the rows whose name holds it.
"""

import argparse
import io
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.attacks import background, gradients, labels, oracles, picks
from benchmarks.attacks.site import (
    FLOORS,
    NO_FLOORS,
    OPEN,
    Coordinator,
    Images,
    best_psnr,
    fresh_weights,
    held_out_rows,
    make_site,
    no_leak,
    prior_of,
    psnr,
    undefended,
)

from maskdm.config import Encoding, ModelConfig
from maskdm.federated.policy import SIMULATED
from maskdm.run.runfolder import write_json
from maskdm_server.lab.demo import MODEL as DEMO
from maskdm_server.lab.faces import draw_faces

SMALL = ModelConfig(image_size=16, channels=3, patch_size=4, dim=64, depth=2, heads=2)
SITE, BLIND = 600, 12  # images of the site; questions where chance decides whether one image is alone
ENCODINGS: tuple[Encoding, ...] = ("fp32", "bf16", "int8", "topk")
POLICIES: dict[str, dict[str, Any]] = {"open": OPEN, "default": {}}

Attack = Callable[[Coordinator], Iterable[Tensor]]


def asker(
    policy: str, site: Path, model: ModelConfig = SMALL, encoding: Encoding = "bf16", **diffusion: Any
) -> Coordinator:
    """Of a site with a policy, which asks for as little as that lets in."""
    opened = policy == "open"
    limits, secret = (NO_FLOORS, 0) if opened else (FLOORS, None)
    return Coordinator(site, prior_of(model, **diffusion), limits, encoding, secret)


def training_at(policy: str) -> AbstractContextManager[None]:
    """An open site trains as sites did before the default one's defences, so that attacks can be seen to work."""
    return undefended() if policy == "open" else nullcontext()


def attacks(public: Images) -> dict[str, tuple[ModelConfig, Attack]]:
    """Those that give pictures: name → network, and what it does."""

    def one_of(batch: int, train: Any, wide: bool = False) -> Attack:
        return lambda asker: picks.one_of_many(asker, batch, latest(asker, batch), train, tries(asker), wide)

    def own(model: ModelConfig) -> Attack:
        return lambda asker: gradients.single_image(asker, gradients.quiet(fresh_weights(model)), tries(asker))

    return {
        "one image, honest weights under a quiet head": (SMALL, own(SMALL)),
        "the same, of the demonstration's network": (DEMO, own(DEMO)),
        "gate by time": (SMALL, one_of(1, "all")),
        "gate by time, norm-bias": (SMALL, one_of(1, "norm-bias")),
        "gate by time, adapters": (SMALL, one_of(1, "adapters")),
        "gate by time, few weights next to zero": (SMALL, one_of(1, "all", wide=True)),
        "gate by time, few weights next to zero, adapters": (SMALL, one_of(1, "adapters", wide=True)),
        "gate by time, batch 512": (SMALL, one_of(512, "all")),
        "gates by brightness, batch 512": (SMALL, lambda asker: picks.by_brightness(asker, 512, 60, public)),
        "gate by time behind vectors, norm-bias": (SMALL, lambda asker: picks.behind_vectors(asker, 3, BLIND)),
        "gate beside a background": (SMALL, lambda asker: background.beside_a_background(asker, 3, BLIND, 16)),
    }


def latest(asker: Coordinator, batch: int) -> int:
    """Time until which a gate is open: for one image of a plan, known or by chance."""
    if asker.knows_draws:
        return 1
    images = asker.limits.plan(batch)["local_images"]
    return max(1, asker.prior.diffusion.timesteps // images)


def tries(asker: Coordinator) -> int:
    return 1 if asker.knows_draws else BLIND


def pictures(folder: Path, only: str) -> Iterator[dict[str, Any]]:
    """A row for each attack on training images, policy and encoding."""
    public = draw_faces(600, "public", size=16, seed=7)
    for number, (name, (model, attack)) in enumerate(attacks(public).items()):
        images = draw_faces(SITE, "clinic", size=model.image_size, seed=5)
        for policy, settings in POLICIES.items():
            if only not in name or (policy == "default" and model is DEMO):
                continue  # the latter takes minutes, and is the row above it
            if policy == "open" and ("beside" in name or "behind" in name):
                continue  # they are made for plans of many steps
            for encoding in ENCODINGS if "batch" not in name and model is SMALL else ("bf16",):
                site = make_site(folder / f"{number}-{policy}-{encoding}", images, **settings)
                coordinator = asker(policy, site, model, encoding)
                with training_at(policy):
                    best = best_psnr(attack(coordinator), images)
                yield row(name, policy, coordinator, dB=best, free=no_leak(images, public) if model is SMALL else None)


def numbers(folder: Path, only: str) -> Iterator[dict[str, Any]]:
    """A row for each attack that reads losses, codes or labels."""
    images = draw_faces(120, "clinic", size=16, seed=5)
    names = ["masked" if i % 3 else "bare" for i in range(len(images))]
    guesses = ["masked", "bare", "tumour", "healthy", "covid"]
    shared: dict[str, Any] = {
        "policy": SIMULATED.model_copy(update={"share_labels": ("bare", "masked")}),
        "secret_seed": 0,
    }
    settings_of: dict[str, dict[str, Any]] = {"open": shared, "default": {}}
    for policy, settings in settings_of.items():
        name = "held-out image by losses for 8 coarse patterns"
        if only in name:
            site = make_site(folder / f"losses-{policy}", images, **settings)
            coordinator = asker(policy, site)
            with training_at(policy):
                found = list(oracles.held_out_image(coordinator, oracles.coarse(SMALL, 8), 1, 3.0))
            yield row(name, policy, coordinator, dB=best_psnr(found, images[held_out_rows(site)]))
        for guess in (labels.by_loss, labels.by_code, labels.by_update):
            name = f"labels {guess.__name__.replace('_', ' ')}"
            if only in name:
                coordinator = asker(policy, make_site(folder / f"{name}-{policy}", images, names, **settings))
                with training_at(policy):
                    told = sorted(guess(coordinator, guesses))
                yield row(name, policy, coordinator, told=told)


def row(name: str, policy: str, asker: Coordinator, **found: Any) -> dict[str, Any]:
    return {
        "attack": name,
        "policy": policy,
        "encoding": asker.encoding,
        "questions": asker.questions,
        "refusals": dict(Counter(outcome.name for outcome in asker.refusals)),
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
