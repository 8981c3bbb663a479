"""What may leave a site. Only the site can change it: what is not listed stays, and nothing in a plan can loosen it."""

import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from maskdm import cli
from maskdm.config import Frozen
from maskdm.errors import UsageError
from maskdm.kit import Digest
from maskdm.parcel import NUMBER_NAMES, QUALITY_NAMES, REPORT_NAMES

DAY = 86_400.0  # seconds
MOST_ROUNDS = 1000  # a day; bounds what a site remembers


def _known(name: str) -> str:
    if name not in NUMBER_NAMES:
        raise ValueError(f"{name!r} is none of {', '.join(NUMBER_NAMES)}")
    return name


def _bytes(value: object) -> object:
    try:
        return cli.size("", value) if isinstance(value, str) else value
    except UsageError as error:
        raise ValueError("give a number of bytes, or text such as 500KB, 50MB or 1.5GB") from error


Metric = Annotated[str, AfterValidator(_known)]
Norm = Annotated[float, Field(gt=0, strict=True)]


class SitePolicy(Frozen):
    """`policy.toml`, with underscores for dashes."""

    metrics: tuple[Metric, ...] = REPORT_NAMES
    max_relative_norm: Norm = 1.0  # of the model's own norm: more is no fine-tuning
    max_norm: Norm | None = None
    max_bytes_per_round: Annotated[int, BeforeValidator(_bytes), Field(ge=1, strict=True)] | None = None
    max_rounds_per_day: Annotated[int, Field(ge=1, le=MOST_ROUNDS, strict=True)] | None = None
    max_evaluations_per_day: Annotated[int, Field(ge=1, le=MOST_ROUNDS, strict=True)] = 10
    min_images: Annotated[int, Field(ge=1, strict=True)] = 2  # to train on
    require_dp: Annotated[bool, Field(strict=True)] = False
    approve_first_round: Annotated[bool, Field(strict=True)] = False
    bundles: tuple[Digest, ...] = ()  # of Flower apps that may run here besides the kit's

    def quality_names(self) -> tuple[str, ...]:
        """Numbers of an evaluation that may leave; none without the count of the images behind them."""
        listed = tuple(name for name in QUALITY_NAMES if name in self.metrics)
        return listed if "quality_images" in listed and len(listed) > 1 else ()

    def problem_of_slice(self, images: int) -> str | None:
        """What keeps a site with so many images to train on from taking part."""
        if images >= self.min_images:
            return None
        return f"{images:,} images to train on are fewer than the {self.min_images:,} of the site's policy (min-images)"


POLICY_KEYS = tuple(f"site.policy.{name}" for name in SitePolicy.model_fields)

TEMPLATE = """\
# What may leave this site. This file is yours: the coordinator only proposes it, and nothing that the coordinator sends
# can change it. It is read each time maskdm-client starts. What is not listed here stays.

# Numbers that may go with an update. An answer holds all nine of them: without one of them only codes such as DONE or
# FAILED leave, and signs of life. A coordinator may also ask how near images of its model are to those that this site
# holds out. Whoever chooses the model can learn from that whether an image that they already have is among those here,
# so none of these numbers leaves unless it is added to the list, "quality_images" with the others:
# "quality_images", "kernel", "frechet", "precision", "recall", "density", "coverage", "memorisation".
metrics = [
    "outcome", "round", "exchange", "examples", "images_seen", "loss_before", "loss_after", "seconds", "skipped_steps",
]

# Longest update: a share of the norm of the model that came, and, where it is given, an absolute norm (L2). The
# coordinator chooses the model, so max-norm is the limit that it cannot move.
max-relative-norm = 1.0
# max-norm = 10.0

# Largest update in bytes, or as text such as "50MB"; of this and --max-upload the smaller one counts.
# max-bytes-per-round = "50MB"

# Updates that may leave in 24 hours, whatever federation asks for them.
# max-rounds-per-day = 24

# Evaluations whose numbers may leave in 24 hours.
max-evaluations-per-day = 10

# Fewest images to train on; with fewer this site takes no part. The fewer there are, the more an update tells of each:
# 2 only keeps a single image from being all of it. No number makes an update anonymous.
min-images = 2

# true takes part only in training with differential privacy. This version has none, so every plan is refused.
require-dp = false

# true holds the first update of each federation until somebody here runs maskdm-client approve.
approve-first-round = false

# sha256 of Flower apps that may run here besides the one that the kit names.
bundles = []
"""


def load_policy(path: Path | None) -> SitePolicy:
    """The policy in a TOML file; the default one where there is none.

    Raises:
        UsageError: it cannot be read, or a key or value is wrong.
    """
    if path is None:
        return SitePolicy()
    try:
        document = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"policy {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"policy {path} is not TOML: {error}") from error
    return policy_of(document, f"policy {path}")


def policy_of(document: dict[str, Any], origin: str) -> SitePolicy:
    """A policy from its keys, which have dashes.

    Raises:
        UsageError: names `origin`, the key, and what is wrong.
    """
    known = [name.replace("_", "-") for name in SitePolicy.model_fields]
    for key in document:
        if key not in known:
            raise UsageError(f"{origin}: unknown key {key!r}: the keys are {', '.join(known)}")
    try:
        return SitePolicy.model_validate({key.replace("-", "_"): value for key, value in document.items()})
    except ValidationError as error:
        problem = error.errors()[0]
        key = str(problem["loc"][0]).replace("_", "-")
        message = str(problem["msg"]).removeprefix("Value error, ").replace("valid tuple", "list")
        raise UsageError(f"{origin}: {key} = {document[key]!r}: {message}") from error
