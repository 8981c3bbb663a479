"""How an update, fp32 differences of weights by name, is encoded for the way up, and decoded by who trusts nothing.

- `bf16`: every value rounded to bfloat16, 2 bytes.
- `fp32`: every value as it is, 4 bytes.
- `int8`: whole steps of a scale for each block of values, 1 byte and 2 bytes a block (block-wise absmax quantisation:
  Dettmers et al. 2022, arXiv 2110.02861, here with even steps).
- `topk`: the values of largest magnitude of each weight, 6 bytes for each (Aji and Heafield 2017, arXiv 1704.05021).

Bits of bfloat16 travel as uint16, a type that every serialiser keeps as it is. What encoding loses is the caller's to
keep and add to the next update (error feedback: Karimireddy et al. 2019, arXiv 1901.09847).
"""

import math
import warnings
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ..config import Encoding
from ..run.tensorfile import Arrays, Layout, layout_of, size_of

Shapes = Mapping[str, tuple[int, ...]]

BLOCK = 256  # values under one scale: 0.8 % of the bytes, and an outlier coarsens few neighbours
LARGEST_STEP = 127  # of int8, the same on both sides of zero


def layout(shapes: Shapes, encoding: Encoding, share: float) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every array of an encoded update: name → (NumPy dtype, shape).

    `share` in (0, 1] is what topk keeps of each weight, rounded up; the other encodings ignore it.

    Raises:
        ValueError: `share` is out of its range, or two arrays would have one name.
    """
    arrays: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        for key, kind in _arrays_of(name, shape, encoding, share).items():
            if key in arrays:
                raise ValueError(f"two arrays of the update would be named {key!r}")
            arrays[key] = kind
    return arrays


def size(shapes: Shapes, encoding: Encoding, share: float) -> int:
    """Payload of an encoded update in bytes; raises as `layout` does."""
    return size_of(layout(shapes, encoding, share))


def encode(update: Mapping[str, Tensor], encoding: Encoding, share: float) -> dict[str, NDArray[np.generic]]:
    """The arrays of `layout`; those of fp32 may share memory with the update.

    Values that are not finite do not raise: each of them, or the whole block around it in int8, decodes to values that
    are not finite either; topk keeps them first.

    Raises:
        ValueError: as `layout` does.
    """
    layout({name: tuple(tensor.shape) for name, tensor in update.items()}, encoding, share)  # refuses what has none
    arrays: dict[str, NDArray[np.generic]] = {}
    for name, tensor in update.items():
        values = tensor.detach().cpu().float()
        match encoding:
            case "bf16":
                arrays[name] = encode_bfloat16(values)
            case "fp32":
                arrays[name] = values.contiguous().numpy()
            case "int8":
                arrays[name], arrays[_scale(name)] = _encode_int8(values.flatten())
            case "topk":
                kept = _kept(values.numel(), share)
                arrays[name], arrays[_index(name)] = _encode_topk(values.flatten(), kept)
    return arrays


def check(arrays: Arrays, shapes: Shapes, encoding: Encoding, share: float) -> None:
    """Makes sure that the arrays are exactly those of `layout`, whoever sent them; no value is looked at.

    Raises:
        ValueError: names the first array that is missing, foreign, or of another type, byte order or shape; or as
            `layout` does.
    """
    expected, found = layout(shapes, encoding, share), layout_of(arrays)
    for name, (dtype, shape) in expected.items():
        if name not in found:
            raise ValueError(f"array {name!r} is missing")
        if found[name][0] != dtype:
            raise ValueError(f"array {name!r} must be {dtype}, not {found[name][0]}")
        if found[name][1] != shape:
            raise ValueError(f"array {name!r} must have shape {shape}, not {found[name][1]}")
    if found.keys() - expected.keys():
        raise ValueError("it holds an array that was not asked for")  # whose name a stranger chose


def decode(arrays: Arrays, name: str, shape: tuple[int, ...], encoding: Encoding) -> Tensor:
    """One weight's difference, fp32 of `shape`, in memory of its own.

    The arrays must have passed `check`. Values may still be anything, not finite included.

    Raises:
        ValueError: indices are not strictly increasing, or lead out of the weight.
    """
    array = arrays[name]
    match encoding:
        case "bf16":
            return decode_bfloat16(array)  # type: ignore[arg-type]
        case "fp32":
            return torch.from_numpy(np.array(array, dtype=np.float32))
        case "int8":
            return _decode_int8(array, arrays[_scale(name)]).view(shape)
        case "topk":
            return _decode_topk(name, array, arrays[_index(name)], math.prod(shape)).view(shape)


def encode_bfloat16(tensor: Tensor) -> NDArray[np.uint16]:
    """Round to bfloat16 and carry its bits as uint16."""
    return tensor.detach().cpu().to(torch.bfloat16).contiguous().view(torch.uint16).numpy()


def decode_bfloat16(bits: NDArray[np.uint16]) -> Tensor:
    """uint16 bits of bfloat16 → fp32, in memory of its own."""
    return as_bfloat16(bits).float()


def as_bfloat16(bits: NDArray[np.uint16]) -> Tensor:
    """uint16 bits of bfloat16 as such a tensor, which shares their memory and is only to be read."""
    return as_tensor(bits).view(torch.bfloat16)


def as_tensor(array: NDArray[np.generic]) -> Tensor:
    """A tensor that shares an array's memory and is only to be read."""
    return torch.from_numpy(array)


def _encode_int8(values: Tensor) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    """(N,) fp32 → steps (N,) int8, bits of the blocks' scales (N / BLOCK,) uint16."""
    blocks = functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)  # a copy, which becomes the steps
    largest = torch.maximum(blocks.amax(dim=1), -blocks.amin(dim=1))  # (blocks,), without the copy that abs() makes
    scale = _round_up(largest)
    steps = blocks.div_(torch.where(scale == 0, 1, scale)[:, None]).round_()  # 0 / 0 would not be zero
    return steps.view(-1)[: len(values)].to(torch.int8).numpy(), encode_bfloat16(scale)


def _round_up(largest: Tensor) -> Tensor:
    """The smallest bfloat16, as fp32, of which LARGEST_STEP steps reach `largest`: what is rounded down would clip.

    bfloat16 rather than fp16: differences of weights are about 1e-6, their 127th part underflows there.
    """
    scale = (largest / LARGEST_STEP).bfloat16()
    above = torch.nextafter(scale, torch.tensor(math.inf, dtype=torch.bfloat16))
    # The product is exact, 8 bits times 7; zero is below whatever underflowed; NaN is below nothing and stays.
    return torch.where(scale.float() * LARGEST_STEP < largest, above, scale).float()


def _decode_int8(steps: NDArray[np.generic], scale: NDArray[np.generic]) -> Tensor:
    """The inverse of `_encode_int8`, (N,)."""
    blocks = torch.zeros(len(scale), BLOCK)
    values = blocks.view(-1)[: len(steps)]
    values.numpy()[:] = steps  # NumPy converts as it copies, and may read what torch may not share
    blocks.mul_(decode_bfloat16(scale)[:, None])  # type: ignore[arg-type]
    return values


def _encode_topk(values: Tensor, kept: int) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    """(N,) fp32 → bits of the largest (K,) uint16, where they were (K,) uint32, ascending."""
    index = values.abs().topk(kept, sorted=False).indices.sort().values
    return encode_bfloat16(values[index]), index.numpy().astype(np.uint32)


def _decode_topk(name: str, bits: NDArray[np.generic], index: NDArray[np.generic], count: int) -> Tensor:
    """The inverse of `_encode_topk`, zero elsewhere, (count,)."""
    places = index.astype(np.int64)  # (K,)
    if (np.diff(places) <= 0).any():
        raise ValueError(f"array {_index(name)!r} must be strictly increasing")
    if places.size and places[-1] >= count:
        raise ValueError(f"array {_index(name)!r} leads out of a weight of {count} values")
    values = torch.zeros(count)
    values[torch.from_numpy(places)] = decode_bfloat16(bits)  # type: ignore[arg-type]
    return values


def _arrays_of(name: str, shape: tuple[int, ...], encoding: Encoding, share: float) -> Layout:
    count = math.prod(shape)
    match encoding:
        case "bf16":
            return {name: ("uint16", shape)}
        case "fp32":
            return {name: ("float32", shape)}
        case "int8":
            return {name: ("int8", (count,)), _scale(name): ("uint16", (-(-count // BLOCK),))}
        case "topk":
            kept = _kept(count, share)
            return {name: ("uint16", (kept,)), _index(name): ("uint32", (kept,))}


def _kept(count: int, share: float) -> int:
    """How many of `count` values topk keeps: at least one, where there is one."""
    if not 0 < share <= 1:
        raise ValueError(f"the share that topk keeps must be in (0, 1], not {share}")
    return math.ceil(share * count)  # at least 1 for any count above 0


def _scale(name: str) -> str:
    return f"{name}.scale"


def _index(name: str) -> str:
    return f"{name}.index"


with warnings.catch_warnings():  # PyTorch warns once in a process of memory that may not be written to
    warnings.simplefilter("ignore", UserWarning)
    as_tensor(np.frombuffer(b"\0", np.uint8))
