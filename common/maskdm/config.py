"""Frozen configuration of a model, its diffusion process, its mask and its training.

Every object refuses unknown keys and is written into checkpoints and `config.json` as it is.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Size = Literal["tiny", "S", "B", "L"]
Precision = Literal["auto", "fp32", "bf16"]
MaskKind = Literal["block", "patch", "crop", "none"]
NetworkKind = Literal["uvit", "dit"]
ProcessKind = Literal["ddpm", "edm", "flow"]
Schedule = Literal["linear", "cosine"]
Prediction = Literal["epsilon", "x0", "v", "velocity"]
Ema = Literal["ramp", "power"]
LossWeight = Literal["uniform", "min-snr", "p2"]

FINGERPRINT = "^[0-9a-f]{4}(-[0-9a-f]{4}){7}$"  # of the terms of a federation

# What the papers of each process predict.
USUAL_PREDICTION: dict[ProcessKind, Prediction] = {"ddpm": "epsilon", "edm": "v", "flow": "velocity"}

# Published sizes (Lei et al. 2023, arXiv 2306.11363, appendix); `tiny` is ours, for CPUs and demonstrations.
# "Depth" counts as published: depth // 2 blocks in, 1 in the middle, depth // 2 out.
SIZES: dict[Size, dict[str, int | bool]] = {
    "tiny": {"dim": 128, "depth": 4, "heads": 4},
    "S": {"dim": 512, "depth": 13, "heads": 8},
    "B": {"dim": 768, "depth": 12, "heads": 12},
    "L": {"dim": 1024, "depth": 16, "heads": 16, "qkv_bias": True},
}


class Frozen(BaseModel):
    """Base of all configuration: immutable, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(Frozen):
    """Shape of the network and of the square images it is made for."""

    network: NetworkKind = "uvit"
    image_size: Annotated[int, Field(ge=4, le=2048)] = 64
    channels: Annotated[int, Field(ge=1, le=12)] = 3
    patch_size: Annotated[int, Field(ge=1, le=64)] = 4
    dim: Annotated[int, Field(ge=8, le=4096)] = 512
    depth: Annotated[int, Field(ge=1, le=64)] = 13
    heads: Annotated[int, Field(ge=1, le=64)] = 8
    mlp_ratio: Annotated[float, Field(gt=0, le=16)] = 4.0
    qkv_bias: bool = False
    classes: Annotated[int, Field(ge=0, le=1_000_000)] = 0  # 0: unconditional

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(f"patch size {self.patch_size} does not divide image size {self.image_size}")
        if self.dim % self.heads or self.dim % 2:
            raise ValueError(f"dim {self.dim} must be even and divisible by heads {self.heads}")
        return self

    @classmethod
    def preset(cls, size: Size, *, image_size: int, channels: int, patch_size: int = 4) -> Self:
        """The published (or tiny) network for images of `image_size` pixels a side."""
        return cls.model_validate(
            {"image_size": image_size, "channels": channels, "patch_size": patch_size, **SIZES[size]}
        )

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch."""
        return self.patch_size**2 * self.channels


class DiffusionConfig(Frozen):
    """Forward process, what the network predicts, and how errors are weighted. Every combination is allowed."""

    process: ProcessKind = "ddpm"
    schedule: Schedule = "cosine"  # of ddpm
    timesteps: Annotated[int, Field(ge=2, le=10_000)] = 1000  # of ddpm
    sigma_data: Annotated[float, Field(gt=0, le=10)] = 0.5  # of edm: standard deviation of the images in [−1, 1]
    prediction: Prediction = "epsilon"
    loss_weight: LossWeight = "uniform"
    # Bounded: a weight that is next to nothing leaves the optimiser's ε as the measure of a step, which then shows the
    # gradient itself instead of its sign, and one that is steep leaves one timestep of a batch.
    min_snr_gamma: Annotated[float, Field(ge=0.1, le=1000)] = 5.0
    p2_gamma: Annotated[float, Field(ge=0, le=2)] = 1.0


class MaskConfig(Frozen):
    """Which patches a training step sees. `ratio` is what was asked for, not what whole blocks allow."""

    kind: MaskKind = "block"
    ratio: Annotated[float, Field(ge=0, le=1)] = 0.9
    block_size: Annotated[int, Field(ge=1, le=64)] = 4


class TrainingConfig(Frozen):
    """One training stage; lengths are counted in images. Defaults are the published recipe."""

    images: Annotated[int, Field(ge=1)] = 200_000
    batch_size: Annotated[int, Field(ge=1)] = 256
    lr: Annotated[float, Field(gt=0, le=1)] = 2e-4
    warmup_images: Annotated[int, Field(ge=0)] = 0
    betas: tuple[float, float] = (0.99, 0.99)
    weight_decay: Annotated[float, Field(ge=0)] = 0.03
    ema: Ema = "ramp"
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999  # of ramp
    ema_length: Annotated[float, Field(gt=0, lt=0.28)] = 0.05  # of power: standard deviation over the run's length
    epsilon: Annotated[float, Field(gt=0, le=1e-3)] = 1e-8  # of the optimiser
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    proximal: Annotated[float, Field(ge=0)] = 0.0  # μ of FedProx: pull towards the weights at the start
    horizontal_flip: Annotated[float, Field(ge=0, le=1)] = 0.0
    class_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1  # share of steps that see no class, for guidance
    accumulate: Annotated[int, Field(ge=1)] = 1  # parts of a batch, one after another
    recompute: bool = False  # activations in the backward pass instead of keeping them
    precision: Precision = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class Stage(Frozen):
    """One part of a curriculum: what is hidden, and how long and how fast it is trained."""

    mask: MaskConfig
    training: TrainingConfig

    def images(self) -> int:
        """Images that the stage really sees: whole batches."""
        return -(-self.training.images // self.training.batch_size) * self.training.batch_size


Sampler = Literal["dpmpp", "ddim", "ddpm", "heun", "euler"]
DEFAULT_STEPS: dict[Sampler, int] = {"dpmpp": 25, "ddim": 100, "ddpm": 1000, "heun": 20, "euler": 50}
Trainable = Literal["all", "norm-bias", "adapters"]
Encoding = Literal["bf16", "fp32", "int8", "topk"]
