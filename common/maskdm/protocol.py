"""What the coordinator and a site say to each other, and nothing else.

Down goes a `RoundPlan` with the weights (fp32). Up comes an update (delta, bfloat16 carried as uint16) and the numbers
of `Report`, or an `Outcome` code alone. No names, no paths, no text come from a site.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

from maskdm.checkpoint import CheckpointMetadata
from maskdm.config import Frozen

PROTOCOL_VERSION: Literal[1] = 1

Arrays = Mapping[str, NDArray[np.generic]]
Scalars = Mapping[str, int | float]


class Outcome(IntEnum):
    """How a site's work ended. The code is all that leaves; the words stay in the site's own log."""

    DONE = 0
    DATA_UNUSABLE = 1
    WRONG_CHANNELS = 2
    DIVERGED = 3
    GATE_REFUSED = 4
    PLAN_REFUSED = 5
    FAILED = 6


class RoundPlan(Frozen):
    """What a site is asked to do: train for one round, or take the final model and leave."""

    protocol: Literal[1] = PROTOCOL_VERSION
    federation: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    action: Literal["train", "finish"]
    round: Annotated[int, Field(ge=1)]
    rounds: Annotated[int, Field(ge=1, le=100_000)]
    local_images: Annotated[int, Field(ge=1, le=100_000_000)]
    batch_size: Annotated[int, Field(ge=1, le=65_536)]
    lr: Annotated[float, Field(gt=0, le=1)]
    seed: Annotated[int, Field(ge=0)]
    model: CheckpointMetadata


class Report(Frozen):
    """The fixed list of numbers that a site returns beside its update."""

    outcome: Outcome = Outcome.DONE
    round: Annotated[int, Field(ge=1)]
    examples: Annotated[int, Field(ge=1, le=2**40)]
    images_seen: Annotated[int, Field(ge=0, le=2**40)]
    loss_before: Annotated[float, Field(ge=0)]
    loss_after: Annotated[float, Field(ge=0)]
    seconds: Annotated[float, Field(ge=0)]
    skipped_steps: Annotated[int, Field(ge=0)]


REPORT_NAMES = tuple(Report.model_fields)


@dataclass(frozen=True)
class Parcel:
    """One message, free of any transport: arrays, numbers, and (only downwards) a document."""

    arrays: Arrays
    scalars: Scalars
    document: str = ""

    def size(self) -> int:
        """Payload in bytes."""
        return sum(array.nbytes for array in self.arrays.values()) + 8 * len(self.scalars) + len(self.document)


def to_arrays(weights: Mapping[str, Tensor]) -> dict[str, NDArray[np.generic]]:
    """Weights for the way down: fp32, because rounding the model to bf16 each round would lose small updates."""
    return {name: tensor.detach().cpu().float().contiguous().numpy() for name, tensor in weights.items()}


def from_arrays(arrays: Arrays) -> dict[str, Tensor]:
    """The inverse of `to_arrays`."""
    return {name: torch.from_numpy(np.array(array, dtype=np.float32)) for name, array in arrays.items()}


def pack(arrays: Arrays) -> NDArray[np.uint8]:
    """All arrays as the bytes of one safetensors document, (bytes,).

    Flower moves each array in several requests of its own, milliseconds each: a model of 150 weights took seconds of
    the server's time for every site and direction.
    """
    return np.frombuffer(save({name: np.asarray(array, order="C") for name, array in arrays.items()}), np.uint8)


def unpack(packed: NDArray[np.generic]) -> dict[str, NDArray[np.generic]]:
    """The inverse of `pack`; nothing in the bytes is executed.

    Raises:
        ValueError: not the bytes of a whole safetensors document.
    """
    if packed.dtype != np.uint8 or packed.ndim != 1:
        raise ValueError(f"packed arrays must be bytes, not {packed.dtype} {packed.shape}")
    try:
        return dict(load(packed.tobytes()))
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"not a whole safetensors document: {error}") from error


def encode_bfloat16(tensor: Tensor) -> NDArray[np.uint16]:
    """Round to bfloat16 and carry its bits as uint16, a type that every serialiser keeps as it is."""
    return tensor.detach().cpu().to(torch.bfloat16).contiguous().view(torch.uint16).numpy()


def decode_bfloat16(bits: NDArray[np.uint16]) -> Tensor:
    """uint16 bits of bfloat16 → fp32."""
    return torch.from_numpy(bits.copy()).view(torch.bfloat16).float()
