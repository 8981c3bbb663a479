"""What a site decided about its own work: written by `maskdm-client`, read by every process of the site."""

import json
from pathlib import Path
from typing import Annotated

from pydantic import Field

from maskdm.config import FINGERPRINT, Frozen, Precision
from maskdm.federated.bundle import bundle_sha256
from maskdm.federated.kit import Digest
from maskdm.federated.policy import SitePolicy


class SiteSettings(Frozen):
    """The site's own options; nothing here is ever sent."""

    data: Path
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.1
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    seed: Annotated[int, Field(ge=0)] = 0
    max_images: Annotated[int, Field(ge=2)] | None = None
    stratify: bool = False
    group_regex: str | None = None
    group_csv: str | None = None
    upscale: bool = False
    window: tuple[float, float] | None = None
    device: str = "auto"
    precision: Precision = "auto"
    threads: Annotated[int, Field(ge=0)] = 0
    features: str | None = None  # file of a feature network, or "random"
    bundle: Digest = Field(default_factory=bundle_sha256)  # of the Flower app that may run here
    policy: SitePolicy = SitePolicy()
    # Fingerprint of the terms that the owner agrees to before they come.
    approve: Annotated[str, Field(pattern=FINGERPRINT)] | None = None
    secret_seed: int | None = None  # of simulations, whose draws are nobody's secret and shall be repeatable


def load_settings(folder: Path) -> SiteSettings:
    """The settings of a site folder."""
    return SiteSettings.model_validate(json.loads((folder / "config.json").read_text())["site"])
