"""What a federation was asked to be; FED/config.json holds it, so that the same command continues it."""

import math
from collections.abc import Callable
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from maskdm import quantities
from maskdm.config import Encoding, Frozen, ModelConfig, Sampler, Trainable
from maskdm.federated.encoding import size
from maskdm.federated.kit import Digest
from maskdm.federated.plan import (
    FEWEST_COMPARED,
    MOST_IMAGES,
    Action,
    AdapterRank,
    BatchSize,
    Images,
    LearningRate,
    Minutes,
    QualityPlan,
    RoundNumber,
    RoundPlan,
    SamplingSteps,
    Share,
)
from maskdm.metadata import CheckpointMetadata
from maskdm.networks.trainable import changed_weights, expected_shapes, update_shapes

from ..aggregation.optimizers import Decay, ServerOptimizer, ServerStep
from ..aggregation.robust import Rule, needed

Seconds = Annotated[float, Field(gt=0)]
Bytes = Annotated[int, Field(ge=1)]
GRIDS = 8  # of samples through all rounds, unless --sample-every says otherwise


def written(read: Callable[[str, str], Any]) -> BeforeValidator:
    """A field that people write as text, which `read` understands; it is told the option's name for its complaints."""

    def parse(value: object, info: ValidationInfo) -> object:
        return read(f"--{info.field_name}".replace("_", "-"), value) if isinstance(value, str) else value

    return BeforeValidator(parse)


class FederationOptions(Frozen):
    """What a person may choose; the options of `serve` and `simulate` are made from these fields and their texts.

    Nothing of it goes to a site unless `round_plan` names it.
    """

    rounds: Annotated[RoundNumber, Field(description="Rounds of the federation.")] = 10
    min_clients: Annotated[int, Field(ge=1, description="Clients needed to begin.")] = 2
    min_replies: Annotated[int, Field(ge=1, description="Usable updates that close a round.")] = 1
    clients_per_round: Annotated[
        int | None, Field(ge=1, description="At most so many clients a round; default: all.")
    ] = None
    join_deadline: Annotated[Seconds, Field(description="Seconds to wait for clients, since the last one joined.")] = (
        3600
    )
    round_deadline: Annotated[
        Seconds, Field(description="Seconds without progress after which a client is left out.")
    ] = 3600
    round_limit: Annotated[Seconds, Field(description="Seconds that a round may take in all.")] = 86_400
    patience: Annotated[
        int, Field(ge=0, description="Stop after so many rounds without a better held-out loss; 0: never.")
    ] = 0
    keep_every: Annotated[int, Field(ge=0, description="Keep the model of every n-th round; 0: the last two.")] = 10
    sample_every: Annotated[
        int | None,
        Field(ge=0, description="Draw samples every n-th round; 0: never; default: about eight times in all."),
    ] = None

    local_images: Annotated[
        Images,
        written(quantities.count),
        Field(description="Images a client sees in a round, counting repetitions, e.g. 2K."),
    ] = 2048
    local_minutes: Annotated[
        Minutes | None,
        Field(description="Minutes a client trains in a round; then --local-images has no default."),
    ] = None
    batch_size: Annotated[BatchSize, Field(description="Batch size at the clients.")] = 32
    lr: Annotated[LearningRate, Field(description="Learning rate at the clients.")] = 5e-5
    proximal: Annotated[float, Field(ge=0, description="FedProx: pull of the clients towards the round's model.")] = 0.0
    keep_moments: Annotated[bool, Field(description="Clients keep their optimiser's moments from round to round.")] = (
        False
    )
    train: Annotated[Trainable, Field(description="What clients train and send.")] = "all"
    adapter_rank: Annotated[AdapterRank, Field(description="Rank of --train adapters.")] = 8
    encoding: Annotated[Encoding, Field(description="Of updates on their way up.")] = "bf16"
    topk_share: Annotated[Share, Field(description="Share of the values that --encoding topk keeps.")] = 0.01
    max_upload: Annotated[
        Bytes | None,
        written(quantities.size),
        Field(description="Largest update that may be asked for, e.g. 50MB; default: any."),
    ] = None

    aggregation: Annotated[Rule, Field(description="How updates become one.")] = "mean"
    byzantine: Annotated[
        int, Field(ge=0, description="Hostile updates a round that the other rules than mean withstand.")
    ] = 1
    max_norm_ratio: Annotated[
        float, Field(gt=1, description="An update so many times longer than usual is rejected.")
    ] = 3.0
    server_optimizer: Annotated[ServerOptimizer, Field(description="What the coordinator does with the result.")] = (
        "fedavg"
    )
    server_lr: Annotated[float, Field(gt=0, description="Its learning rate.")] = 1.0
    server_betas: Annotated[tuple[Decay, Decay], written(quantities.pair), Field(description="Its decay rates.")] = (
        0.9,
        0.99,
    )
    server_epsilon: Annotated[float, Field(gt=0, description="τ of fedadam and fedyogi.")] = 1e-3
    server_ema: Annotated[
        float, Field(ge=0, lt=1, description="Longest decay of the average of the rounds' models; 0: none.")
    ] = 0.0

    evaluate: Annotated[
        int,
        Field(
            ge=0,
            le=100_000,
            description="Images that sites draw from prior and final model, to compare with held-out ones; 0: none.",
        ),
    ] = 0
    # Of the network; whoever gives the option names a file.
    evaluate_features: Annotated[
        Digest | None, Field(description="File of the feature network that sites have, too; default: random.")
    ] = None
    evaluate_sampler: Annotated[Sampler, Field(description="Sampler of --evaluate.")] = "dpmpp"
    evaluate_steps: Annotated[SamplingSteps | None, Field(description="Its steps; default: as usual for it.")] = None
    seed: Annotated[int, Field(ge=0, description="All randomness follows from it.")] = 0

    @model_validator(mode="before")
    @classmethod
    def _minutes_are_the_limit(cls, values: Any) -> Any:
        """Where minutes are given, images are none unless they are given too."""
        if isinstance(values, dict) and values.get("local_minutes") is not None:
            return {"local_images": MOST_IMAGES, **values}
        return values

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


class FederationConfig(FederationOptions):
    """A federation: what was chosen for it, and which one it is."""

    prior_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    federation: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]


def round_plan(
    config: FederationConfig, action: Action, number: int, model: CheckpointMetadata, exchange: int
) -> RoundPlan:
    """What goes to a site: all of it, by name.

    Args:
        number: of the round, from 1.
        model: of the weights that go with it.
    """
    return RoundPlan(
        federation=config.federation,
        exchange=exchange,
        action=action,
        round=number,
        rounds=config.rounds,
        local_images=config.local_images,
        local_minutes=config.local_minutes,
        batch_size=config.batch_size,
        lr=config.lr,
        proximal=config.proximal,
        keep_moments=config.keep_moments,
        train=config.train,
        adapter_rank=config.adapter_rank,
        encoding=config.encoding,
        topk_share=config.topk_share,
        seed=config.seed,
        model=model,
        quality=config.quality_plan() if action == "evaluate" else None,
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
