"""What may leave a site. Only the site can change it: what is not listed stays, and nothing in a plan can loosen it."""

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from .. import quantities
from ..config import Frozen
from ..errors import UsageError
from .kit import Digest
from .parcel import NUMBER_NAMES, QUALITY_NAMES, REPORT_NAMES

DAY = 86_400.0  # seconds
MOST_ASKED = 100_000  # a day, or in a federation; bounds what a site remembers


def _known(name: str) -> str:
    if name not in NUMBER_NAMES:
        raise ValueError(f"{name!r} is none of {', '.join(NUMBER_NAMES)}")
    return name


def _bytes(value: object) -> object:
    try:
        return quantities.size("", value) if isinstance(value, str) else value
    except UsageError as error:
        raise ValueError("give a number of bytes, or text such as 500KB, 50MB or 1.5GB") from error


Metric = Annotated[str, AfterValidator(_known)]
Norm = Annotated[float, Field(gt=0, strict=True)]
Switch = Annotated[bool, Field(strict=True)]
Least = Annotated[int, Field(ge=1, strict=True)]
Times = Annotated[int, Field(ge=1, le=MOST_ASKED, strict=True)]


class SitePolicy(Frozen):
    """`policy.toml`, with underscores for dashes."""

    metrics: tuple[Metric, ...] = REPORT_NAMES
    share_loss: Switch = True
    share_labels: tuple[str, ...] = ()  # names of classes that a model may be told of
    max_relative_norm: Norm = 1.0  # of the model's own norm: more is no fine-tuning
    max_norm: Norm | None = None
    max_bytes_per_round: Annotated[int, BeforeValidator(_bytes), Field(ge=1, strict=True)] | None = None
    max_rounds_per_day: Times = 50
    max_rounds: Times = 200  # of a federation
    max_measurements_per_day: Times = 10
    max_measurements: Times = 30  # of a federation
    max_failures: Times = 3  # of a federation, of work on the images
    max_evaluations_per_day: Times = 10
    min_images: Least = 16  # to train on
    min_images_per_update: Least = 256  # seen, counting repetitions
    min_batch: Least = 16
    min_steps: Least = 8
    min_held_out: Least = 8  # behind a loss that leaves
    max_weight_change: Annotated[float, Field(gt=0, strict=True)] = 1.0
    max_zero_share: Annotated[float, Field(ge=0, le=1, strict=True)] = 0.5
    kept_moments: Switch = False
    require_dp: Switch = False
    approve_first_round: Switch = False
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

    def problem_of_work(self, images: int, batch: int) -> str | None:
        """What keeps an update from leaving that is made of so many images, seen in batches of so many."""
        found = {
            "min_batch": (batch, "images in a step"),
            "min_images_per_update": (images, "images seen in an update"),
            "min_steps": (-(-images // batch), "steps in an update"),
        }
        for name, (asked, noun) in found.items():
            if asked < (least := getattr(self, name)):
                key = name.replace("_", "-")
                return f"{asked:,} {noun} are fewer than the {least:,} of the site's policy ({key})"
        return None


# Of sites that somebody makes up on one machine: there is nobody to be protected from whom.
SIMULATED = SitePolicy(
    max_rounds_per_day=MOST_ASKED,
    max_rounds=MOST_ASKED,
    max_measurements_per_day=MOST_ASKED,
    max_measurements=MOST_ASKED,
    max_failures=MOST_ASKED,
    max_evaluations_per_day=MOST_ASKED,
    min_images=1,
    min_images_per_update=1,
    min_batch=1,
    min_steps=1,
    min_held_out=1,
    max_weight_change=1e6,
    max_zero_share=1.0,
    kept_moments=True,
)

POLICY_KEYS = tuple(f"site.policy.{name}" for name in SitePolicy.model_fields)

TEMPLATE = """\
# What may leave this site. This file is yours: the coordinator only proposes it, and nothing that the coordinator sends
# can change it. It is read each time maskdm-client starts. What is not listed here stays.

# Numbers that may go with an update. An answer holds all nine of them: without one of them only codes such as DONE or
# FAILED leave, and signs of life. They are rounded to three digits. A coordinator may also ask how near images of its
# model are to those that this site holds out. Whoever chooses the model can learn from that whether an image that they
# already have is among those here, so none of these numbers leaves unless it is added to the list, "quality_images"
# with the others:
# "quality_images", "kernel", "frechet", "precision", "recall", "density", "coverage", "memorisation".
metrics = [
    "outcome", "round", "exchange", "examples", "images_seen", "loss_before", "loss_after", "seconds", "skipped_steps",
]

# false keeps loss_before and loss_after here. Whoever chooses the model can make its loss say something else, a few
# bits in each answer; without it the coordinator does not see whether the model fits this site.
share-loss = true

# Names of classes (folders, labels) that a model may be told of, for priors that have classes. Any other label counts
# as none: else the coordinator could put names into a model, and its loss would show which of them exist here.
share-labels = []

# Longest update: a share of the norm of the model that came, and, where it is given, an absolute norm (L2). The
# coordinator chooses the model, so max-norm is the limit that it cannot move.
max-relative-norm = 1.0
# max-norm = 10.0

# Largest update in bytes, or as text such as "50MB"; of this and --max-upload the smaller one counts.
# max-bytes-per-round = "50MB"

# How often a coordinator may ask: for updates, and for measurements of any kind (a loss, an evaluation, that of the
# final model), in 24 hours whatever federation asks, and in one federation. Each answer tells a little; what can be
# told in all is bounded by how many there are. What is begun counts, however it ends.
max-rounds-per-day = 50
max-rounds = 200
max-measurements-per-day = 10
max-measurements = 30

# Work on the images that may fail in a federation (training that diverged, an update that the gate stopped): whoever
# chooses the model can make it fail for some images and not for others, and learns from the code which it was.
max-failures = 3

# Evaluations whose numbers may leave in 24 hours.
max-evaluations-per-day = 10

# Fewest images to train on; with fewer this site takes no part. The fewer there are, the more an update tells of each.
min-images = 16

# Fewest images that an update is made of, counting repetitions; fewest in one step, whose gradient is their mean; and
# fewest steps, so that an update is a sum of several. An update of one image in one step is that image.
min-images-per-update = 256
min-batch = 16
min-steps = 8

# Fewest held-out images behind a loss; with fewer the update leaves without its losses.
min-held-out = 8

# What a model may look like: how far a layer's weights may have moved since the first model of the federation that this
# site trained, as a share of their length then, and which share of a layer may be zero or next to it (a tenth of the
# root mean square of the layer). Weights that were made to read images break such bounds unless they are made with
# care.
max-weight-change = 1.0
max-zero-share = 0.5

# true lets a coordinator have the optimiser's moments kept here from round to round. Moments of gradients that a
# crafted model made large let later, smaller ones through as they are.
kept-moments = false

# true takes part only in training with differential privacy. This version has none, so every plan is refused.
require-dp = false

# true holds everything about the images until somebody here has looked at the terms and runs maskdm-client approve,
# once for each federation, and again whenever the coordinator changes the terms. false takes the first terms that come.
approve-first-round = true

# sha256 of Flower apps that may run here besides the one that the kit names.
bundles = []
"""

# The default of a policy, and of `provision --no-approval`.
UNATTENDED = TEMPLATE.replace("approve-first-round = true", "approve-first-round = false")


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


def as_toml(policy: SitePolicy) -> str:
    """A policy as a file that `load_policy` reads."""
    values = policy.model_dump(mode="json", exclude_none=True)
    return "".join(f"{name.replace('_', '-')} = {json.dumps(value)}\n" for name, value in values.items())


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
