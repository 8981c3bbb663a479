"""What a federation was asked to be; FED/config.json holds it, so that the same command continues it."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from maskdm.config import Encoding, Frozen, ModelConfig, Sampler, Trainable
from maskdm.federated.encoding import size
from maskdm.federated.kit import Digest
from maskdm.federated.plan import FEWEST_COMPARED, QualityPlan, RoundPlan
from maskdm.metadata import CheckpointMetadata
from maskdm.networks.trainable import changed_weights, expected_shapes, update_shapes

from ..aggregation.optimizers import Decay, ServerOptimizer, ServerStep
from ..aggregation.robust import Rule, needed

Seconds = Annotated[float, Field(gt=0)]
GRIDS = 8  # of samples through all rounds, unless --sample-every says otherwise


class FederationConfig(Frozen):
    """All of it. What a site is asked to do, how its answer is judged, and how the answers become the next model."""

    prior_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    federation: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    seed: Annotated[int, Field(ge=0)] = 0

    rounds: Annotated[int, Field(ge=1, le=100_000)] = 10
    min_clients: Annotated[int, Field(ge=1)] = 2  # to begin
    min_replies: Annotated[int, Field(ge=1)] = 1  # to close a round
    clients_per_round: Annotated[int, Field(ge=1)] | None = None  # None: all that are there
    join_deadline: Seconds = 3600.0  # since the last client joined
    round_deadline: Seconds = 3600.0  # since a client's last progress
    round_limit: Seconds = 86400.0  # of a round in all, whatever progress there is
    patience: Annotated[int, Field(ge=0)] = 0  # rounds without a better held-out loss; 0: all rounds
    keep_every: Annotated[int, Field(ge=0)] = 10
    sample_every: Annotated[int, Field(ge=0)] | None = None  # None: about GRIDS grids in all; 0: none

    local_images: Annotated[int, Field(ge=1, le=100_000_000)] = 2048
    local_minutes: Annotated[float, Field(gt=0, le=100_000)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 32
    lr: Annotated[float, Field(gt=0, le=1)] = 5e-5
    proximal: Annotated[float, Field(ge=0)] = 0.0
    keep_moments: bool = False
    train: Trainable = "all"
    adapter_rank: Annotated[int, Field(ge=1, le=4096)] = 8
    encoding: Encoding = "bf16"
    topk_share: Annotated[float, Field(gt=0, le=1)] = 0.01
    max_upload: Annotated[int, Field(ge=1)] | None = None

    aggregation: Rule = "mean"
    byzantine: Annotated[int, Field(ge=0)] = 1  # hostile updates in a round that the robust rules withstand
    max_norm_ratio: Annotated[float, Field(gt=1)] = 3.0
    server_optimizer: ServerOptimizer = "fedavg"
    server_lr: Annotated[float, Field(gt=0)] = 1.0
    server_betas: tuple[Decay, Decay] = (0.9, 0.99)
    server_epsilon: Annotated[float, Field(gt=0)] = 1e-3
    server_ema: Annotated[float, Field(ge=0, lt=1)] = 0.0

    evaluate: Annotated[int, Field(ge=0, le=100_000)] = 0  # images that each site draws from prior and final model
    evaluate_features: Digest | None = None  # of the feature network
    evaluate_sampler: Sampler = "dpmpp"
    evaluate_steps: Annotated[int, Field(ge=1, le=10_000)] | None = None

    @model_validator(mode="after")
    def _can_work(self) -> Self:
        least = needed(self.aggregation, self.byzantine)
        if self.min_replies < least:
            raise ValueError(
                f"--aggregation {self.aggregation}, --byzantine {self.byzantine}: needs --min-replies {least} or more"
            )
        if self.clients_per_round is not None and self.clients_per_round < self.min_replies:
            raise ValueError(f"--clients-per-round {self.clients_per_round} is less than --min-replies")
        if self.patience and self.server_ema:
            raise ValueError("--patience and --server-ema exclude each other: what sites measure is no average")
        if 0 < self.evaluate < FEWEST_COMPARED:
            raise ValueError(f"--evaluate {self.evaluate}: {FEWEST_COMPARED} images are the fewest that tell anything")
        if self.evaluate and self.evaluate_features is None:
            raise ValueError("--evaluate needs --evaluate-features")
        return self

    def quality_plan(self) -> QualityPlan | None:
        """How sites evaluate a model; None where they do not."""
        if not self.evaluate or self.evaluate_features is None:
            return None
        return QualityPlan(
            images=self.evaluate,
            features=self.evaluate_features,
            sampler=self.evaluate_sampler,
            steps=self.evaluate_steps,
        )

    def rounds_between_grids(self) -> int:
        """0 for no grids between the first and the last."""
        return -(-self.rounds // GRIDS) if self.sample_every is None else self.sample_every

    def server_step(self) -> ServerStep:
        """How the aggregated difference becomes the next model."""
        return ServerStep(
            optimizer=self.server_optimizer, lr=self.server_lr, betas=self.server_betas, epsilon=self.server_epsilon
        )


def round_plan(
    config: FederationConfig,
    action: Literal["train", "measure", "evaluate", "finish"],
    number: int,
    model: CheckpointMetadata,
    exchange: int,
) -> RoundPlan:
    """What sites are asked to do in a round, with a model."""
    shared = RoundPlan.model_fields.keys() & FederationConfig.model_fields.keys()
    return RoundPlan.model_validate(
        {
            **{name: getattr(config, name) for name in shared},
            "exchange": exchange,
            "action": action,
            "round": number,
            "model": model,
            "quality": config.quality_plan() if action == "evaluate" else None,
        }
    )


def update_size(config: FederationConfig, model: ModelConfig) -> int:
    """Bytes of an update of a client."""
    return size(update_shapes(model, config.train, config.adapter_rank), config.encoding, config.topk_share)


def changes_size(config: FederationConfig, model: ModelConfig) -> int:
    """Bytes that go down to a client that has the weights which are never trained; 0 where all are."""
    if config.train == "all":
        return 0
    shapes = expected_shapes(model)
    return 4 * sum(math.prod(shapes[name]) for name in changed_weights(model, config.train))


def largest_update(config: FederationConfig, model: ModelConfig) -> int:
    """Bytes that an update may have with everything around it."""
    return update_size(config, model) + 1_000_000


# Continuing with more rounds, other patience, other clocks or another limit of norms is the same federation.
MAY_CHANGE = tuple(
    f"federation.{name}"
    for name in (
        *("rounds", "min_clients", "min_replies", "clients_per_round", "join_deadline", "round_deadline"),
        *("round_limit", "patience", "keep_every", "sample_every", "max_upload", "max_norm_ratio"),
        *("evaluate", "evaluate_features", "evaluate_sampler", "evaluate_steps"),
    )
)
