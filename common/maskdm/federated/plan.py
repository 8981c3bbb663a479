"""What the coordinator asks of a site, and the weights that go with it.

Who only reads a plan, as the ClientApp does for every message, does not import PyTorch, which takes seconds.
"""

import hashlib
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from ..config import Encoding, Frozen, Sampler, Trainable
from ..metadata import CheckpointMetadata
from .kit import Digest

PROTOCOL_VERSION: Literal[2] = 2
# Fields that are not sent where they ask for nothing: sites of an earlier version refuse keys that they do not know.
ADDED_LATER = ("quality", "keep_moments")
# Figures of fewer images say little of the model, and much of each image.
FEWEST_COMPARED = 10
MOST_IMAGES = 100_000_000

Action = Literal["train", "measure", "evaluate", "finish"]
RoundNumber = Annotated[int, Field(ge=1, le=100_000)]
Images = Annotated[int, Field(ge=1, le=MOST_IMAGES)]
Minutes = Annotated[float, Field(gt=0, le=100_000)]
BatchSize = Annotated[int, Field(ge=1, le=65_536)]
LearningRate = Annotated[float, Field(gt=0, le=1)]
AdapterRank = Annotated[int, Field(ge=1, le=4096)]
Share = Annotated[float, Field(gt=0, le=1)]
SamplingSteps = Annotated[int, Field(ge=1, le=10_000)]


class QualityPlan(Frozen):
    """How a model is to be evaluated: what to draw, and in whose features to compare it with the images held out."""

    images: Annotated[int, Field(ge=FEWEST_COMPARED, le=100_000)]
    features: Digest  # of the network that the site must have; none is ever sent
    sampler: Sampler = "dpmpp"
    steps: SamplingSteps | None = None  # None: the sampler's usual number


class RoundPlan(Frozen):
    """What a site is asked to do: train for a round, measure or evaluate a model, or take the final one and leave."""

    protocol: Literal[2] = PROTOCOL_VERSION
    federation: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    exchange: Annotated[int, Field(ge=0, lt=2**63)]  # of one question and its answers, never used twice
    action: Action
    round: RoundNumber
    rounds: RoundNumber
    local_images: Images
    local_minutes: Minutes | None = None  # whichever of the two comes first
    batch_size: BatchSize
    lr: LearningRate
    proximal: Annotated[float, Field(ge=0)] = 0.0  # μ of FedProx
    keep_moments: bool = False  # of the optimiser, from round to round; they stay at the site
    train: Trainable = "all"
    adapter_rank: AdapterRank = 8
    encoding: Encoding = "bf16"
    topk_share: Share = 0.01
    seed: Annotated[int, Field(ge=0)]
    model: CheckpointMetadata
    quality: QualityPlan | None = None  # of evaluate

    @model_validator(mode="after")
    def _can_be_done(self) -> Self:
        if (self.action == "evaluate") != (self.quality is not None):
            raise ValueError("action evaluate and quality belong together")
        diffusion, steps = self.model.diffusion, self.quality.steps if self.quality else None
        if steps is not None and diffusion.process == "ddpm" and steps > diffusion.timesteps:
            raise ValueError(f"quality.steps {steps} is more than the model's {diffusion.timesteps} timesteps")
        return self

    @model_serializer(mode="wrap")
    def _without_absent(self, usual: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Sites of an earlier version shall train all the same."""
        found: dict[str, Any] = usual(self)
        return {name: value for name, value in found.items() if value or name not in ADDED_LATER}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the update that is asked for."""
        from ..networks.trainable import update_shapes

        return update_shapes(self.model.model, self.train, self.adapter_rank) if self.action == "train" else {}

    def changed(self) -> tuple[str, ...]:
        """Names of the weights that the update changes."""
        from ..networks.trainable import changed_weights

        return changed_weights(self.model.model, self.train)

    def largest_images(self) -> int:
        """Most images that a site can see in the round, where the last batch is a whole one, or draw."""
        if self.quality:
            return self.quality.images
        return -(-self.local_images // self.batch_size) * self.batch_size


def work_key(plan: RoundPlan, weights: Iterable[bytes | memoryview]) -> str:
    """The same work asked for again, e.g. after a loss of the connection, has the same key; any other has another.

    How many rounds there will be in all makes no difference.

    Args:
        weights: pieces of what training starts from; where one ends and the next begins does not matter.
    """
    same = plan.model_copy(update={"exchange": 0, "rounds": 1}).model_dump_json().encode()
    digest = hashlib.sha256(hashlib.sha256(same).digest())
    for piece in weights:
        digest.update(piece)
    return digest.hexdigest()
