"""A site of 40 small pictures, and what a coordinator asks of it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from maskdm.config import ModelConfig
from maskdm.federated.plan import RoundPlan
from maskdm.federated.policy import SitePolicy
from maskdm.metadata import CheckpointMetadata
from maskdm.networks.model import build_model
from maskdm.run.tensorfile import pack
from maskdm_client.folder.job import SECRET
from maskdm_client.folder.settings import SiteSettings

# Floors that the smallest work passes; what a test says of a policy comes on top.
LENIENT = SitePolicy(
    min_images=1, min_images_per_update=1, min_batch=1, min_steps=1, min_held_out=1, max_failures=100, kept_moments=True
)


@pytest.fixture(scope="session")
def weights(tiny: ModelConfig) -> dict[str, Tensor]:
    """Those that come down; nobody may change them."""
    return {name: p.detach() for name, p in build_model(tiny, seed=1).named_parameters()}


@pytest.fixture(scope="session")
def make_plan(metadata: CheckpointMetadata) -> Callable[..., RoundPlan]:
    """A plan of 20 steps; keywords change it."""

    def make(**changes: Any) -> RoundPlan:
        values = {
            "federation": "0123456789abcdef",
            "exchange": 7,
            "action": "train",
            "round": 1,
            "rounds": 2,
            "local_images": 160,
            "batch_size": 8,
            "lr": 1e-3,
            "seed": 0,
            "model": metadata,
        }
        return RoundPlan.model_validate(values | changes)

    return make


@pytest.fixture(scope="session")
def ask(make_plan: Callable[..., RoundPlan], weights: dict[str, Tensor]) -> Callable[..., tuple[str, bytes]]:
    """A plan and its weights as they travel; keywords change the plan."""

    def make(sent: dict[str, Tensor] = weights, **changes: Any) -> tuple[str, bytes]:
        packed = pack({name: tensor.numpy() for name, tensor in sent.items()})
        return make_plan(**changes).model_dump_json(), packed

    return make


@pytest.fixture
def make_site(tmp_path: Path) -> Callable[..., Path]:
    """The folder of a site with 40 small grey pictures, as `maskdm-client` leaves it; keywords change its settings.

    Its policy has no floors but those that a test gives; `strict` makes it the default one.
    """

    def make(images: Any = None, name: str = "site", strict: bool = False, **changes: Any) -> Path:
        if images is None:
            ramp = np.linspace(0, 200, 8).astype(np.uint8)
            images = np.stack([np.tile(ramp, (8, 1)) + np.uint8(i) for i in range(40)])
        folder = tmp_path / name
        folder.mkdir()
        (folder / SECRET).write_bytes(hashlib.sha256(name.encode()).digest())  # else what a test sees is by chance
        np.savez(tmp_path / "hospital-data.npz", images=images)
        values = {"data": tmp_path / "hospital-data.npz", "precision": "fp32", "device": "cpu", "threads": 1}
        given = changes.pop("policy", SitePolicy())
        wanted = {name: getattr(given, name) for name in given.model_fields_set}
        policy = given if strict else LENIENT.model_copy(update=wanted)
        settings = SiteSettings.model_validate(values | changes | {"policy": policy})
        (folder / "config.json").write_text(json.dumps({"site": settings.model_dump(mode="json")}))
        names = {hashlib.sha256(image.tobytes()).hexdigest(): str(i) for i, image in enumerate(images)}
        held_out = dict(list(names.items())[::5])
        train = {digest: name for digest, name in names.items() if digest not in held_out}
        (folder / "slice.json").write_text(json.dumps({"train": train, "held_out": held_out}))
        return folder

    return make
