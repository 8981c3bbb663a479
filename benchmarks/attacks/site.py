"""A site to attack, and how an attacker asks it: a coordinator who chooses everything that travels down.

The attacker knows the source code, the prior and the plan, never the site's folder. What it asks is the strongest that
the site's policy lets through: `Limits` are the floors under every plan.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskdm.config import DiffusionConfig, Encoding, MaskConfig, ModelConfig
from maskdm.federated.encoding import decode
from maskdm.federated.parcel import Outcome, Parcel
from maskdm.federated.plan import RoundPlan, work_key
from maskdm.federated.policy import SIMULATED
from maskdm.metadata import CheckpointMetadata
from maskdm.networks.layers import unpatchify
from maskdm.networks.model import build_model
from maskdm.run.tensorfile import bytes_of, pack
from maskdm.seeding import derive_seed
from maskdm_client.folder.settings import SiteSettings
from maskdm_client.work import concentration, fine_tuning
from maskdm_client.work.virtual import answer

FEDERATION = "0123456789abcdef"
Images = NDArray[np.uint8]  # (N, S, S, C)


class Limits(NamedTuple):
    """The least that a plan may ask for: of images in a batch and in an update, and of steps."""

    batch: int = 1
    images: int = 1
    steps: int = 1

    def plan(self, batch: int = 1) -> dict[str, int]:
        """Batch size and images of the shortest plan with batches of at least `batch` images."""
        size = max(batch, self.batch)
        return {"batch_size": size, "local_images": size * max(self.steps, -(-self.images // size))}


NO_FLOORS, FLOORS = Limits(), Limits(16, 256, 8)  # of a policy that lets every plan in, and of the default one
OPEN: dict[str, Any] = {"policy": SIMULATED, "secret_seed": 0}  # settings of a site that has no secrets


def make_site(folder: Path, images: Images, labels: Iterable[str] = (), **changes: Any) -> Path:
    """The folder of a site, as `maskdm-client` leaves it, that uses all its images; keywords change its settings."""
    folder.mkdir(parents=True)
    data, names = folder / "images.npz", list(labels)
    arrays: dict[str, Any] = {"images": images} | ({"labels": np.array(names)} if names else {})
    np.savez(data, **arrays)
    values = {"data": data, "fraction": 1.0, "precision": "fp32", "device": "cpu", "threads": 1}
    settings = SiteSettings.model_validate(values | changes)
    (folder / "config.json").write_text(json.dumps({"site": settings.model_dump(mode="json")}))
    return folder


@contextmanager
def undefended() -> Iterator[None]:
    """Sites that train as they did before faint gradients were hidden, so that attacks can be seen to work at all."""
    with patch.object(fine_tuning, "LOCAL_EPSILON", 1e-8), patch.object(concentration, "FAINTEST", 0.0):
        yield


def held_out_rows(folder: Path) -> list[int]:
    """Which of its images a site holds out, once it was asked anything; for whoever judges an attack."""
    names = json.loads((folder / "slice.json").read_text())["held_out"].values()
    return [int(re.findall(r"\d+", name)[-1]) for name in names]


def prior_of(model: ModelConfig, **diffusion: Any) -> CheckpointMetadata:
    """What an honest prior of a network says about itself."""
    return CheckpointMetadata(
        model=model,
        diffusion=DiffusionConfig(**{"prediction": "x0", **diffusion}),
        mask=MaskConfig(kind="patch", ratio=0.5),
        effective_mask_ratio=0.5,
        images_seen=640,
        seed=3,
    )


def fresh_weights(model: ModelConfig, seed: int = 1) -> dict[str, Tensor]:
    """An honest network's, before training."""
    return {name: p.detach() for name, p in build_model(model, seed=seed).named_parameters()}


@dataclass
class Coordinator:
    """Asks one site, and counts how often."""

    folder: Path
    prior: CheckpointMetadata
    limits: Limits = NO_FLOORS
    encoding: Encoding = "fp32"
    secret_seed: int | None = None  # of the site, where the attacker was told: it knows rows, times and noise then
    questions: int = 0
    refusals: list[Outcome] = field(default_factory=list)

    @property
    def knows_draws(self) -> bool:
        return self.secret_seed is not None

    def local_seed(self, plan: RoundPlan, weights: Mapping[str, Tensor]) -> int:
        """Of the work that a plan gives the site, whose secret is known."""
        key = work_key(plan, (bytes_of(weights[name].numpy()) for name in sorted(weights)))
        return derive_seed(str(self.secret_seed), "local work", key)

    def plan(self, **changes: Any) -> RoundPlan:
        """The shortest plan that the limits allow; keywords change it."""
        values = {
            **{"federation": FEDERATION, "exchange": self.questions, "action": "train", "round": 1, "rounds": 1},
            **{"lr": 1e-3, "seed": 0, "encoding": self.encoding, "topk_share": 1.0, "model": self.prior},
            **self.limits.plan(),
        }
        return RoundPlan.model_validate(values | changes)

    def ask(self, plan: RoundPlan, weights: Mapping[str, Tensor]) -> Parcel | None:
        """The site's answer; None where it refused, whose code is kept."""
        self.questions += 1
        packed = pack({name: tensor.numpy() for name, tensor in weights.items()})
        parcel = answer(plan.model_dump_json(), packed, self.folder)
        outcome = Outcome(int(parcel.scalars["outcome"]))
        if outcome is Outcome.DONE:
            return parcel
        self.refusals.append(outcome)
        return None

    def update(self, plan: RoundPlan, weights: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The update that a training plan gives, decoded; None where it was refused."""
        parcel = self.ask(plan, weights)
        if parcel is None:
            return None
        return {name: decode(parcel.arrays, name, shape, plan.encoding) for name, shape in plan.shapes().items()}

    def loss(self, weights: Mapping[str, Tensor], model: CheckpointMetadata | None = None, **changes: Any) -> float:
        """The loss that a site says a model has on what it holds out; NaN where none left."""
        values = {"action": "measure", "model": model or self.prior} | changes
        parcel = self.ask(self.plan(**values), weights)
        return float(parcel.scalars.get("loss_before", math.nan)) if parcel else math.nan


def as_images(patches: Tensor, config: ModelConfig) -> Tensor:
    """Patches (B, N, P) in [−1, 1] → images (B, S, S, C) in grey levels 0 … 255."""
    images = unpatchify(patches, config.patch_size, config.channels)
    return ((images + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1)


def psnr(found: Tensor, images: Images) -> Tensor:
    """Peak signal-to-noise ratio in dB of one image (S, S, C) beside each of a site's, (N,); 99 where it is exact."""
    true = torch.from_numpy(images).float().reshape(len(images), *found.shape)
    error = (true - found).square().flatten(1).mean(dim=1)
    return (20 * math.log10(255) - 10 * error.clamp(min=1e-9).log10()).clamp(max=99)


def no_leak(images: Images, public: Images) -> float:
    """dB that come without asking anything: the best beside a site's images of their mean, or of public images."""
    guesses = [torch.from_numpy(images).float().mean(dim=0), *torch.from_numpy(public).float()]
    return best_psnr(guesses, images)


def best_psnr(found: Iterable[Tensor], images: Images) -> float:
    """Of the best of several reconstructions, beside whichever image it is nearest to; 0 where there is none."""
    return max((float(psnr(image, images).max()) for image in found if image.isfinite().all()), default=0.0)
