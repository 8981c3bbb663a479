"""Frozen configuration of a model, its diffusion process, its mask and its training.

Every object refuses unknown keys and is written into checkpoints and `config.json` as it is.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Size = Literal["tiny", "S", "B", "L"]
Precision = Literal["auto", "fp32", "bf16"]
MaskKind = Literal["block", "patch", "crop", "none"]

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
    """Shape of the masked U-ViT and of the square images it is made for."""

    image_size: Annotated[int, Field(ge=4, le=2048)] = 64
    channels: Annotated[int, Field(ge=1, le=12)] = 3
    patch_size: Annotated[int, Field(ge=1, le=64)] = 4
    dim: Annotated[int, Field(ge=8, le=4096)] = 512
    depth: Annotated[int, Field(ge=1, le=64)] = 13
    heads: Annotated[int, Field(ge=1, le=64)] = 8
    mlp_ratio: Annotated[float, Field(gt=0, le=16)] = 4.0
    qkv_bias: bool = False

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
    """Forward process and what the network predicts."""

    schedule: Literal["linear", "cosine"] = "cosine"
    timesteps: Annotated[int, Field(ge=2, le=10_000)] = 1000
    prediction: Literal["epsilon", "x0", "v"] = "epsilon"


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
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    horizontal_flip: Annotated[float, Field(ge=0, le=1)] = 0.0
    precision: Precision = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
