"""Safetensors documents, written piece by piece, and read in place or array by array.

The `safetensors` package makes a second copy of every tensor on the way out and on the way in. A coordinator that holds
a model of 100 million weights cannot afford either; files written here are read by that package, and the other way
round.
"""

import hashlib
import json
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from mmap import mmap
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[np.generic]]
Document = bytes | bytearray | memoryview | mmap | NDArray[np.uint8]
Layout = Mapping[str, tuple[str, tuple[int, ...]]]  # name → NumPy's name of the type, shape

_CODES = {"float64": "F64", "float32": "F32", "uint32": "U32", "uint16": "U16", "int8": "I8", "uint8": "U8"}
_TYPES = {code: np.dtype(name) for name, code in _CODES.items()}
_METADATA = "__metadata__"
_MAX_HEADER = 10_000_000  # a hundred thousand weights; JSON of hostile form takes twenty times its size in memory
_MOST_SIDES = 64  # as NumPy


def layout_of(arrays: Arrays) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The layout of given arrays."""
    if isinstance(arrays, Stored):
        return arrays.layout
    return {name: (str(array.dtype), array.shape) for name, array in arrays.items()}


def fp32(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The layout of weights in a file."""
    return {name: ("float32", tuple(shape)) for name, shape in shapes.items()}


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
        yield _checked(array(name), layout[name])  # held by nobody while the next one is asked for


def _checked(array: NDArray[np.generic], kind: tuple[str, tuple[int, ...]]) -> memoryview:
    assert (str(array.dtype), array.shape) == kind
    return bytes_of(array)


def bytes_of(array: NDArray[np.generic]) -> memoryview:
    """The values of an array, row by row; not a copy where they lie so."""
    return np.asarray(array, order="C").reshape(-1).view(np.uint8).data


def pack(arrays: Arrays, metadata: Mapping[str, str] | None = None) -> bytes:
    """All arrays as one document."""
    return b"".join(chunks(layout_of(arrays), arrays.__getitem__, metadata))


def unpack(document: Document) -> dict[str, NDArray[np.generic]]:
    """The arrays of a document, as read-only views into it; nothing in it is executed.

    Raises:
        ValueError: not a whole document of known types whose arrays fill it without gaps or overlaps.
    """
    data = np.frombuffer(document, np.uint8)
    data.flags.writeable = False
    places, _ = _read(lambda start, size: data[start : start + size].tobytes(), len(data))
    return {
        name: data[place.start : place.end].view(place.dtype).reshape(place.shape) for name, place in places.items()
    }


class Stored(Mapping[str, NDArray[np.generic]]):
    """The arrays of a file, each read when it is asked for, into memory of its own.

    What is mapped instead stays in a process's memory once it was looked at, as much as if it had been read.
    """

    def __init__(self, path: Path, file: BinaryIO | None = None) -> None:
        """Read the header; the file must stay as it is. Of one that is replaced now and then, see `opened`.

        Args:
            file: the same, open, which all is read from.

        Raises:
            ValueError: as `unpack` does.
            OSError: it cannot be read.
        """
        self._path, self._file = path, file
        with self._reading() as reading:
            self._places, self.metadata = _header(reading)

    def _reading(self) -> AbstractContextManager[BinaryIO]:
        return nullcontext(self._file) if self._file else self._path.open("rb")

    @property
    def layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Types and shapes by name."""
        return {name: (str(place.dtype), place.shape) for name, place in self._places.items()}

    def move(self, path: Path) -> None:
        """Put the file elsewhere."""
        self._path = Path(shutil.move(self._path, path))

    def __getitem__(self, name: str) -> NDArray[np.generic]:
        with self._reading() as reading:
            return _array(reading, self._places[name])

    def __contains__(self, name: object) -> bool:
        return name in self._places  # a mapping would read the array to know

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


@contextmanager
def opened(path: Path) -> Iterator[Stored]:
    """A file of which all is read as it is now, also where another one is put in its place meanwhile.

    Raises:
        ValueError, OSError: as of `Stored`.
    """
    with path.open("rb") as file:
        yield Stored(path, file)


class Hashed(Stored):
    """The same, whose digest is made on the way while the arrays are read, the first time, in the order of their names:
    whoever reads them so reads the file once for both."""

    def __init__(self, path: Path) -> None:
        """As of `Stored`."""
        super().__init__(path)
        self._digest, self._left = hashlib.sha256(), deque(sorted(self))

    def __getitem__(self, name: str) -> NDArray[np.generic]:
        array = super().__getitem__(name)
        if self._left and name == self._left[0]:
            self._left.popleft()
            _add(self._digest, name, array)
        return array

    def digest(self) -> str:
        """As `digest_of`; what was not read yet is read now."""
        while self._left:
            self[self._left[0]]
        return self._digest.hexdigest()


def digest_of(arrays: Arrays) -> str:
    """sha256 of names and values, the same on both sides for the same arrays; one array is in memory at a time."""
    if isinstance(arrays, Hashed):
        return arrays.digest()
    digest = hashlib.sha256()
    for name in sorted(arrays):
        _add(digest, name, arrays[name])
    return digest.hexdigest()


def _add(digest: "hashlib._Hash", name: str, array: NDArray[np.generic]) -> None:
    digest.update(name.encode())
    digest.update(bytes_of(array))


class _Place(NamedTuple):
    """Where an array lies in its document, in bytes, and what it is."""

    start: int
    end: int
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]


def _header(file: BinaryIO) -> tuple[dict[str, _Place], dict[str, str]]:
    def read(start: int, size: int) -> bytes:
        file.seek(start)
        return file.read(size)

    return _read(read, os.fstat(file.fileno()).st_size)


def _array(file: BinaryIO, place: _Place) -> NDArray[np.generic]:
    count = math.prod(place.shape)
    file.seek(place.start)
    array = np.fromfile(file, place.dtype, count)
    if array.size != count:
        raise ValueError("the file became shorter while it was read")
    return array.reshape(place.shape)


def _read(read: Callable[[int, int], bytes], size: int) -> tuple[dict[str, _Place], dict[str, str]]:
    """Places of the arrays of a document of so many bytes, of which `read` gives any part, and its metadata."""
    length = int.from_bytes(read(0, 8), "little")
    if size < 8 or length > min(_MAX_HEADER, size - 8):
        raise ValueError("not a whole safetensors document: its header is cut off")
    try:
        text = read(8, length).decode()
        header = json.loads(text, object_pairs_hook=_unique, parse_int=_natural, parse_constant=_natural)
        metadata = header.pop(_METADATA, {})
        "".join((*header, *metadata, *metadata.values())).encode()  # refuses half of a pair
        if not all(isinstance(part, str) for pair in metadata.items() for part in pair):
            raise TypeError("its metadata is no text")
        entries = sorted((*_entry(entry), name) for name, entry in header.items())
    except (UnicodeDecodeError, RecursionError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"not a safetensors document: {error}") from error
    body = position = 8 + length
    places = {}
    for begin, stop, kind, shape, name in entries:
        place = _Place(body + begin, body + stop, _TYPES[kind], shape)
        itemsize = place.dtype.itemsize
        if place.start != position or stop - begin != itemsize * math.prod(shape) or place.start % itemsize:
            raise ValueError(f"not a safetensors document: {name!r} does not lie where it should")
        if place.end > size:
            raise ValueError(f"not a whole safetensors document: {name!r} is cut off")
        places[name] = place
        position = place.end
    if position != size:
        raise ValueError("not a safetensors document: something follows its arrays")
    return places, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name twice")
    return found


def _natural(digits: str) -> int:
    if not digits.isdecimal() or len(digits) > 19:
        raise ValueError("a number that is no size")
    return int(digits)


def _entry(entry: Mapping[str, Any]) -> tuple[int, int, str, tuple[int, ...]]:
    """Where an array begins and ends, its type and its shape."""
    start, end = entry["data_offsets"]
    kind, shape = entry["dtype"], entry["shape"]
    if type(shape) is not list or len(shape) > _MOST_SIDES or any(type(n) is not int for n in (start, end, *shape)):
        raise ValueError("an array of unknown form")
    if math.prod(side or 1 for side in shape) >= 2**60:  # which NumPy refuses to make even of no values
        raise ValueError("an array of too many values")
    if kind not in _TYPES or len(entry) != 3:
        raise ValueError(f"an array of unknown type ({', '.join(_TYPES)} are known)")
    return start, end, kind, tuple(shape)
