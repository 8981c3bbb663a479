"""Safetensors documents, written piece by piece and read in place.

The `safetensors` package makes a second copy of every tensor on the way out and on the way in. A coordinator that holds
a model of 100 million weights cannot afford either; files written here are read by that package, and the other way
round.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from mmap import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[np.generic]]
Document = bytes | bytearray | memoryview | mmap | NDArray[np.uint8]
Layout = Mapping[str, tuple[str, tuple[int, ...]]]  # name → NumPy's name of the type, shape

_CODES = {"float32": "F32", "uint32": "U32", "uint16": "U16", "int8": "I8", "uint8": "U8"}
_TYPES = {code: np.dtype(name) for name, code in _CODES.items()}
_METADATA = "__metadata__"
_MAX_HEADER = 10_000_000  # a hundred thousand weights; JSON of hostile form takes twenty times its size in memory
_MOST_SIDES = 64  # as NumPy


def layout_of(arrays: Arrays) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The layout of given arrays."""
    return {name: (str(array.dtype), array.shape) for name, array in arrays.items()}


def size_of(layout: Layout) -> int:
    """Bytes of the arrays themselves."""
    return sum(np.dtype(kind).itemsize * math.prod(shape) for kind, shape in layout.values())


def chunks(
    layout: Layout, array: Callable[[str], NDArray[np.generic]], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """The document in pieces, one for the header and one for each array, which is asked for only then.

    Widest types first, so that every array lies at a multiple of its item's size, as the format asks.
    """
    order = sorted(layout, key=lambda name: -np.dtype(layout[name][0]).itemsize)
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        kind, shape = layout[name]
        start, end = end, end + np.dtype(kind).itemsize * math.prod(shape)
        header[name] = {"dtype": _CODES[kind], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield _bytes(array(name), layout[name])  # held by nobody while the next one is asked for


def _bytes(array: NDArray[np.generic], kind: tuple[str, tuple[int, ...]]) -> memoryview:
    found = np.asarray(array, order="C")
    assert (str(found.dtype), found.shape) == kind
    return found.reshape(-1).view(np.uint8).data


def pack(arrays: Arrays, metadata: Mapping[str, str] | None = None) -> bytes:
    """All arrays as one document."""
    return b"".join(chunks(layout_of(arrays), arrays.__getitem__, metadata))


def unpack(document: Document) -> dict[str, NDArray[np.generic]]:
    """The arrays of a document, as read-only views into it; nothing in it is executed.

    Raises:
        ValueError: not a whole document of known types whose arrays fill it without gaps or overlaps.
    """
    return _read(document)[0]


def metadata_of(document: Document) -> dict[str, str]:
    """What a document says about itself.

    Raises:
        ValueError: not a whole document.
    """
    return _read(document)[1]


def _read(document: Document) -> tuple[dict[str, NDArray[np.generic]], dict[str, str]]:
    data = np.frombuffer(document, np.uint8)
    data.flags.writeable = False
    length = int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 or length > min(_MAX_HEADER, len(data) - 8):
        raise ValueError("not a whole safetensors document: its header is cut off")
    try:
        text = data[8 : 8 + length].tobytes().decode()
        header = json.loads(text, object_pairs_hook=_unique, parse_int=_natural, parse_constant=_natural)
        metadata = header.pop(_METADATA, {})
        "".join((*header, *metadata, *metadata.values())).encode()  # refuses half of a pair
        if not all(isinstance(part, str) for pair in metadata.items() for part in pair):
            raise TypeError("its metadata is no text")
        entries = sorted((*_place(entry), name) for name, entry in header.items())
    except (UnicodeDecodeError, RecursionError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"not a safetensors document: {error}") from error
    body, position = data[8 + length :], 0
    arrays = {}
    for start, end, kind, shape, name in entries:
        itemsize = _TYPES[kind].itemsize
        if start != position or end - start != itemsize * math.prod(shape) or (8 + length + start) % itemsize:
            raise ValueError(f"not a safetensors document: {name!r} does not lie where it should")
        if end > len(body):
            raise ValueError(f"not a whole safetensors document: {name!r} is cut off")
        arrays[name] = body[start:end].view(_TYPES[kind]).reshape(shape)
        position = end
    if position != len(body):
        raise ValueError("not a safetensors document: something follows its arrays")
    return arrays, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name twice")
    return found


def _natural(digits: str) -> int:
    if not digits.isdecimal() or len(digits) > 19:
        raise ValueError("a number that is no size")
    return int(digits)


def _place(entry: Mapping[str, Any]) -> tuple[int, int, str, tuple[int, ...]]:
    """Where an array begins and ends, its type and its shape."""
    start, end = entry["data_offsets"]
    kind, shape = entry["dtype"], entry["shape"]
    if type(shape) is not list or len(shape) > _MOST_SIDES or any(type(n) is not int for n in (start, end, *shape)):
        raise ValueError("an array of unknown form")
    if kind not in _TYPES or len(entry) != 3:
        raise ValueError("an array of unknown type")
    return start, end, kind, tuple(shape)
