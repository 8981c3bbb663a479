"""Documents of arrays: those that the `safetensors` package writes and reads too, and nothing else gets in."""

import json
import math
import mmap
import time
import tracemalloc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load, save

from maskdm.run.tensorfile import Arrays, Document, Hashed, Stored, chunks, digest_of, layout_of, pack, size_of, unpack

KINDS = ("float64", "float32", "uint32", "uint16", "int8", "uint8")
FOREIGN = ("BOOL", "F4", "F8_E4M3", "F8_E5M2", "F8_E8M0", "I16", "BF16", "F16", "I32", "I64", "U64", "C64")
LITTLE_MEMORY = 256 * 1024  # bytes, for reading a document of a few hundred

shapes = arrays_of.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
names = st.text(max_size=8).filter(lambda name: name != "__metadata__")
texts = st.dictionaries(st.text(max_size=4), st.text(max_size=8), max_size=3)
arrays_by_name = st.dictionaries(
    names, st.one_of(*(arrays_of.arrays(kind, shapes) for kind in KINDS)), max_size=6
)  # of every type; 0-d, empty, NaN

EXAMPLE: dict[str, NDArray[np.generic]] = {
    "wide": np.array([1, -2, 3], np.float32),
    "": np.array(7, np.uint32),
    "größe": np.arange(4, dtype=np.uint16).reshape(2, 2),
    "none": np.zeros((0, 3), np.float32),
    "narrow": np.arange(5, dtype=np.int8),
    "odd": np.array([[9]], np.uint8),
}
WHOLE = pack(EXAMPLE, {"key": "wört"})


def assert_same(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


def split(document: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and body."""
    end = 8 + int.from_bytes(document[:8], "little")
    return json.loads(document[8:end]), document[end:]


def join(header: object, body: bytes = b"") -> bytes:
    """A document with any header, as JSON or as its very bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


@contextmanager
def stored(document: Document) -> Iterator[Stored]:
    """The document in a file."""
    with NamedTemporaryFile() as file:
        file.write(np.frombuffer(document, np.uint8).tobytes())
        file.flush()
        yield Stored(Path(file.name))


def metadata_of(document: Document) -> dict[str, str]:
    with stored(document) as found:
        return found.metadata


def entry(kind: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": kind, "shape": shape, "data_offsets": offsets}


# What is written.


@given(arrays_by_name, texts)
def test_the_safetensors_package_reads_what_is_written_bit_for_bit(
    arrays: dict[str, NDArray[np.generic]], metadata: dict[str, str]
) -> None:
    document = pack(arrays, metadata)
    assert_same(load(document), arrays)
    with TemporaryDirectory() as folder:
        (Path(folder) / "a.safetensors").write_bytes(document)
        with safe_open(Path(folder) / "a.safetensors", framework="np") as file:
            assert (file.metadata() or {}) == metadata


@given(arrays_by_name, texts)
def test_what_is_written_is_read_again_bit_for_bit(
    arrays: dict[str, NDArray[np.generic]], metadata: dict[str, str]
) -> None:
    document = pack(arrays, metadata)
    assert_same(unpack(document), arrays)
    with stored(document) as found:
        assert_same(found, arrays)
        assert layout_of(found) == layout_of(arrays)
        assert found.metadata == metadata


@given(arrays_by_name)
def test_the_size_of_a_layout_is_that_of_the_arrays_and_known_without_them(
    arrays: dict[str, NDArray[np.generic]],
) -> None:
    layout = layout_of(arrays)
    assert layout == {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
    assert size_of(layout) == sum(array.nbytes for array in arrays.values()) == len(split(pack(arrays))[1])


@given(arrays_by_name, texts)
def test_every_array_lies_at_a_multiple_of_its_items_size(
    arrays: dict[str, NDArray[np.generic]], metadata: dict[str, str]
) -> None:
    document = pack(arrays, metadata)
    header, body = split(document)
    assert (len(document) - len(body)) % 8 == 0
    for name, array in arrays.items():
        assert header[name]["data_offsets"][0] % array.itemsize == 0


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3).T,
        np.arange(9, dtype=np.uint16)[::-2],
        np.broadcast_to(np.int8(3), (2, 2)),
        np.asfortranarray(np.arange(8, dtype=np.uint32).reshape(2, 2, 2)),
        np.zeros((3, 0), np.float32).T,
    ],
)
def test_a_view_is_written_in_its_own_order(array: NDArray[np.generic]) -> None:
    for found in (unpack(pack({"a": array}))["a"], load(pack({"a": array}))["a"]):
        assert np.array_equal(found, array)


def test_each_array_is_asked_for_when_its_piece_is_due_and_only_once() -> None:
    asked: list[str] = []

    def array(name: str) -> NDArray[np.generic]:
        asked.append(name)
        return EXAMPLE[name]

    pieces = chunks(layout_of(EXAMPLE), array, {"key": "wört"})
    assert asked == []
    document = bytes(next(pieces))
    assert asked == [], "the header needs no array"
    for number in range(1, len(EXAMPLE) + 1):
        document += next(pieces)
        assert len(asked) == number
    assert next(pieces, None) is None
    assert sorted(asked) == sorted(EXAMPLE)
    assert document == WHOLE


def test_an_array_in_its_own_order_is_written_without_a_copy() -> None:
    array = np.arange(4, dtype=np.float32)
    _, piece = chunks(layout_of({"a": array}), lambda _: array)
    assert np.shares_memory(np.frombuffer(piece, np.uint8), array)


def test_an_array_is_let_go_before_the_next_one_is_asked_for() -> None:
    last: list[weakref.ref[NDArray[np.float32]]] = []

    def array(_: str) -> NDArray[np.float32]:
        assert not last or last[-1]() is None
        made = np.zeros(3, np.float32)
        last.append(weakref.ref(made))
        return made

    for piece in chunks(dict.fromkeys("abc", ("float32", (3,))), array):
        del piece


@pytest.mark.parametrize("wrong", [np.zeros(3, np.float32), np.zeros((2, 1), np.float32), np.zeros(2, np.uint32)])
def test_an_array_that_is_not_what_was_announced_is_not_written(wrong: NDArray[np.generic]) -> None:
    with pytest.raises(AssertionError):
        list(chunks({"a": ("float32", (2,))}, lambda _: wrong))


# What is read.


@given(arrays_by_name, texts)
def test_what_the_safetensors_package_writes_is_read_bit_for_bit(
    arrays: dict[str, NDArray[np.generic]], metadata: dict[str, str]
) -> None:
    document = save(arrays, metadata or None)  # of no arrays and {}, version 0.8 makes what it cannot read either
    assert_same(unpack(document), arrays)
    assert metadata_of(document) == metadata


def mapped(folder: Path) -> mmap.mmap:
    (folder / "a").write_bytes(WHOLE)
    with (folder / "a").open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def memory_mapped(folder: Path) -> NDArray[np.uint8]:
    (folder / "a").write_bytes(WHOLE)
    return np.memmap(folder / "a", np.uint8, "r")


DOCUMENTS: dict[str, Callable[[Path], Document]] = {
    "bytes": lambda _: WHOLE,
    "bytearray": lambda _: bytearray(WHOLE),
    "memoryview": lambda _: memoryview(WHOLE),
    "part of another": lambda _: memoryview(b"x" + WHOLE + b"y")[1:-1],  # at an odd address
    "array": lambda _: np.frombuffer(bytearray(WHOLE), np.uint8),
    "mmap": mapped,
    "memmap": memory_mapped,
}


@pytest.mark.parametrize("document_in", DOCUMENTS.values(), ids=DOCUMENTS)
def test_arrays_are_views_into_the_document_that_nobody_can_write_through(
    tmp_path: Path, document_in: Callable[[Path], Document]
) -> None:
    document = document_in(tmp_path)
    found = unpack(document)
    assert_same(found, EXAMPLE)
    assert metadata_of(document) == {"key": "wört"}
    memory = np.frombuffer(document, np.uint8)
    for array in found.values():
        assert np.shares_memory(array, memory) == (array.size > 0)
        assert not array.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        found["wide"][0] = 5


def test_reading_a_large_document_takes_next_to_no_memory() -> None:
    document = pack({"a": np.zeros((1024, 1024), np.float32), "b": np.zeros(1024**2, np.uint16)})
    assert peak_of(unpack, document) < LITTLE_MEMORY < len(document) // 20


def test_arrays_of_a_file_are_in_memory_one_at_a_time_and_belong_to_whoever_asked(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(pack({name: np.zeros((256, 1024), np.float32) for name in "abcdefgh"}))

    def look_at_all(_: bytes) -> None:
        for array in Stored(path).values():
            array[:] = 1

    one = 2**20
    assert one < peak_of(look_at_all, b"") < 2 * one + 2 * LITTLE_MEMORY
    assert not Stored(path)["a"].any()


def test_whether_an_array_is_there_and_what_it_is_needs_no_reading_of_it(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(WHOLE)
    stored = Stored(path)
    path.unlink()
    assert "wide" in stored
    assert "other" not in stored
    assert stored.keys() == EXAMPLE.keys()
    assert layout_of(stored) == layout_of(EXAMPLE)


def test_a_digest_is_that_of_names_and_values_in_whatever_order_they_were_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(WHOLE)
    for order in (sorted(EXAMPLE), sorted(EXAMPLE, reverse=True), [*EXAMPLE, *EXAMPLE], ["wide"], []):
        hashed = Hashed(tmp_path / "a")
        for name in order:
            assert hashed[name].tobytes() == EXAMPLE[name].tobytes()
        assert digest_of(hashed) == digest_of(EXAMPLE) == digest_of(hashed)


# What is refused: documents come from strangers.


def peak_of(read: Callable[[bytes], object], document: bytes) -> int:
    """Most bytes that were allocated at a time, whether or not the document is refused."""
    tracemalloc.start()
    try:
        read(document)
    except ValueError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return peak


def accepted(document: bytes) -> bool:
    """Whether a document is read; makes sure of what may be relied on in either case."""
    assert peak_of(unpack, document) < LITTLE_MEMORY + 64 * len(document)
    try:
        found = unpack(document)
    except ValueError:
        with pytest.raises(ValueError, match=r".+"):
            metadata_of(document)
        return False
    with stored(document) as same:
        assert_same(same, found)
        assert all(isinstance(part, str) for pair in same.metadata.items() for part in pair)
    memory = np.frombuffer(document, np.uint8)
    start = memory.ctypes.data
    for array in found.values():
        assert array.dtype.name in KINDS
        assert array.nbytes == array.itemsize * math.prod(array.shape)
        assert array.flags.c_contiguous
        assert not array.flags.writeable
        assert not array.size or start <= array.ctypes.data <= start + len(document) - array.nbytes
    assert sum(array.nbytes for array in found.values()) == len(split(document)[1]), "gaps or overlaps"
    assert_same(found, load(document))
    return True


@st.composite
def scribbled(draw: st.DrawFn) -> bytes:
    """A good document after a few edits of single bytes; the header's length follows, or does not."""
    document = bytearray(draw(st.sampled_from([WHOLE, pack(EXAMPLE), save(EXAMPLE, {"a": "b"}), pack({})])))
    for _ in range(draw(st.integers(1, 3))):
        length = 8 + int.from_bytes(document[:8], "little")
        place = draw(st.integers(0, max(0, min(length, len(document)) - 1)))
        byte = draw(st.one_of(st.sampled_from(b'{}[]",:0123456789-.eEtn\\ FIU_\x00'), st.integers(0, 255)))
        kept = draw(st.booleans())
        match draw(st.sampled_from(["flip", "replace", "insert", "delete"])):
            case "flip":
                document[place] ^= 1 << byte % 8
            case "replace":
                document[place] = byte
            case "insert":
                document.insert(place, byte)
                document[:8] = (length - 8 + (kept and place >= 8)).to_bytes(8, "little")
            case "delete" if place >= 8:
                del document[place]
                document[:8] = (length - 8 - kept).to_bytes(8, "little")
    return bytes(document)


@settings(max_examples=400)
@given(scribbled())
def test_a_damaged_document_is_refused_or_read_as_the_safetensors_package_reads_it(document: bytes) -> None:
    accepted(document)


numbers = st.one_of(
    st.integers(-2, 40),
    st.integers(-(2**70), 2**70),
    st.sampled_from([2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 4, 2**64, 10**30, 10**1000]),
)
anything = st.one_of(
    numbers,
    st.sampled_from([None, True, False, 1.0, 1e300, "4", "F32", "U8", "U16", "I8", "F64", "__proto__", math.inf]),
    st.lists(st.one_of(numbers, st.booleans(), st.none()), max_size=4),
    st.just({"dtype": "F32"}),
)


@st.composite
def forged(draw: st.DrawFn) -> bytes:
    """A good document after a few changes of what its header means."""
    header, body = split(WHOLE)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(header)))
        found = header[name]
        change = draw(st.sampled_from(["replace", "shift", "reshape", "swap", "rename", "drop", "add", "body"]))
        if change == "body":
            body = draw(st.sampled_from([body[:-1], body + b"\0", body + b"\0" * 8, body[: len(body) // 2], b""]))
        elif change == "drop":
            header.pop(name)
        elif change == "rename":
            header[draw(st.text(max_size=3))] = header.pop(name)
        elif change == "swap":
            other = draw(st.sampled_from(sorted(header)))
            header[name], header[other] = header[other], header[name]
        elif change == "add":
            header[draw(st.text(max_size=3))] = entry(
                draw(st.sampled_from(["F32", "U8", "I8", "F64"])),
                draw(st.lists(numbers, max_size=70)),
                [draw(numbers), draw(numbers)],
            )
        elif not isinstance(found, dict) or "shape" not in found or (change == "replace" and draw(st.booleans())):
            header[name] = draw(anything)
        elif change == "replace":
            header[name] = found | {draw(st.sampled_from([*found, "more"])): draw(anything)}
        elif change == "reshape":
            header[name] = found | {"shape": draw(st.lists(st.one_of(numbers, st.just(1)), max_size=4))}
        elif isinstance(found.get("data_offsets"), list):
            moved = [n + draw(st.integers(-8, 8)) if isinstance(n, int) else n for n in found["data_offsets"]]
            header[name] = found | {"data_offsets": moved}
        if not header:
            break
    return join(header, body)


@settings(max_examples=400)
@given(forged())
def test_a_forged_document_is_refused_or_read_as_the_safetensors_package_reads_it(document: bytes) -> None:
    accepted(document)


@given(st.binary(max_size=64))
def test_bytes_that_nobody_packed_are_refused(garbage: bytes) -> None:
    assert not accepted(garbage)
    assert not accepted(join(garbage))
    assert not accepted(WHOLE + b"." + garbage)
    assert not accepted(garbage + b"." + WHOLE)


def test_a_document_cut_off_anywhere_is_refused() -> None:
    for length in range(len(WHOLE)):
        for read in (unpack, metadata_of):
            with pytest.raises(ValueError, match=r"not a (whole )?safetensors document"):
                read(WHOLE[:length])


HALF = entry("U8", [2], [0, 2])

REFUSED: dict[str, bytes] = {
    "something follows": join({"a": entry()}, b"\0" * 5),
    "something precedes": join({"a": entry(offsets=[4, 8])}, b"\0" * 8),
    "a gap": join({"a": HALF, "b": entry("U8", [2], [3, 5])}, b"\0" * 5),
    "an overlap": join({"a": HALF, "b": entry("U8", [2], [1, 3])}, b"\0" * 3),
    "the same place twice": join({"a": HALF, "b": HALF}, b"\0" * 2),
    "an end before the start": join({"a": entry(offsets=[4, 0])}, b"\0" * 4),
    "a negative start": join({"a": entry("U8", [5], [-1, 4])}, b"\0" * 4),
    "two negative sides": join({"a": entry("U8", [-2, -2])}, b"\0" * 4),
    "an end that is cut off": join({"a": entry(shape=[2], offsets=[0, 8])}, b"\0" * 4),
    "an end far away": join({"a": entry("U8", [2**63 - 1], [0, 2**63 - 1])}, b"\0" * 4),
    "a size that overflows to the right one": join({"a": entry("U8", [2**32, 2**32 + 1], [0, 2**32])}, b"\0" * 4),
    "a size that overflows to nothing": join({"a": entry("U8", [2**32, 2**32], [0, 0])}),
    "sides that overflow, times nothing": join({"a": entry("U8", [2**62, 2**62, 0], [0, 0])}),
    "a huge side of nothing": join({"a": entry("U8", [0, 2**63], [0, 0])}),
    "a number of 5000 digits": join(
        b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', b"...."
    ),
    "more sides than an array can have": join({"a": entry(shape=[1] * 65)}, b"\0" * 4),
    "a shape of another size": join({"a": entry(shape=[2])}, b"\0" * 4),
    "a type of another size": join({"a": entry("U16")}, b"\0" * 4),
    "true for 1": join({"a": entry(shape=[True])}, b"\0" * 4),
    "false for 0": join({"a": entry(offsets=[False, 4])}, b"\0" * 4),
    "1.0 for 1": join({"a": entry(shape=[1.0])}, b"\0" * 4),
    "NaN": join({"a": entry(shape=[math.nan])}, b"\0" * 4),
    "text for a number": join({"a": entry(offsets=["0", "4"])}, b"\0" * 4),
    "a shape that is no list": join({"a": entry(shape=1)}, b"\0" * 4),
    "a type that is no text": join({"a": entry(["F32"])}, b"\0" * 4),
    "three offsets": join({"a": entry(offsets=[0, 4, 4])}, b"\0" * 4),
    "offsets that are none": join({"a": entry(offsets=None)}, b"\0" * 4),
    "a key too few": join({"a": {"dtype": "F32", "shape": [1]}}, b"\0" * 4),
    "a key too many": join({"a": entry() | {"more": 1}}, b"\0" * 4),
    "an array that is no object": join({"a": 4}, b"\0" * 4),
    "an array in the place of metadata": join({"__metadata__": entry()}, b"\0" * 4),
    "metadata that is no object": join({"__metadata__": ["a"]}),
    "metadata that is none": join({"__metadata__": None}),
    "metadata that is no text": join({"__metadata__": {"a": 1}}),
    "two places for one name": join(
        b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}',
        b"\0" * 4,
    ),
    "a header that is a list": join([]),
    "a header that is text": join("a"),
    "a header that is null": join(None),
    "no header": join(b""),
    "two headers": join(b"{}{}"),
    "half a header": join(b'{"a":'),
    "bytes that are no text": join(b'{"\xff":1}'),
    "another encoding of text": join('{"a":1}'.encode("utf-16-le")),
    "zeros after the header": join(b"{}\0\0\0\0\0\0"),
    "nesting without end": join(b"[" * 100_000),
    "a nested array": join(b'{"a":' * 100_000),
    "nested metadata": join(b'{"__metadata__":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    "a header of 2⁶⁴ − 1 bytes": b"\xff" * 8 + b"{}",
    "a header of a terabyte": (2**40).to_bytes(8, "little") + b"{}",
    "a header longer by a byte than the document": (3).to_bytes(8, "little") + b"{}",
    "nothing": b"",
}


@pytest.mark.parametrize("document", REFUSED.values(), ids=REFUSED)
def test_what_is_no_whole_document_is_refused(document: bytes) -> None:
    assert not accepted(document)


def test_a_header_longer_than_the_format_allows_is_refused_though_it_is_all_there() -> None:
    longest = 100_000_000
    document = np.zeros(8 + longest + 1, np.uint8)  # pages of zeros are nobody's memory
    document[:8] = np.frombuffer((longest + 1).to_bytes(8, "little"), np.uint8)
    assert peak_of(lambda _: unpack(document), b"") < LITTLE_MEMORY


@pytest.mark.parametrize("code", FOREIGN)
def test_types_that_we_never_send_are_refused(code: str) -> None:
    with pytest.raises(ValueError, match="unknown type"):
        unpack(join({"a": entry(code, [2], [0, 2 * 8])}, b"\0" * 16))
    with pytest.raises(ValueError, match="unknown type"):
        unpack(join({"a": entry(code, [0], [0, 0])}))


@pytest.mark.parametrize("kind", ["float32", "uint32", "uint16"])
def test_an_array_that_does_not_lie_at_a_multiple_of_its_items_size_is_refused(kind: str) -> None:
    size = np.dtype(kind).itemsize
    code = {"float32": "F32", "uint32": "U32", "uint16": "U16"}[kind]
    document = join({"a": entry("U8", [1], [0, 1]), "b": entry(code, [1], [1, 1 + size])}, b"\0" * (1 + size))
    assert load(document)["b"].dtype == kind, "the format's own reader takes it"
    with pytest.raises(ValueError, match="does not lie where it should"):
        unpack(document)


def test_the_order_of_the_header_does_not_matter() -> None:
    header, body = split(WHOLE)
    assert_same(unpack(join(dict(reversed(header.items())), body)), EXAMPLE)


LENIENT: dict[str, tuple[Iterable[bytes], bytes]] = {
    # Headers, and the bytes of the array.
    "a shape that is empty text": ([b'{"a":{"dtype":"F32","shape":"","data_offsets":[0,4]}}'], b"...."),
    "a shape that is an empty object": ([b'{"a":{"dtype":"F32","shape":{},"data_offsets":[0,4]}}'], b"...."),
    "minus zero": ([b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}'], b"...."),
    "a key twice": ([b'{"a":{"dtype":"U8","dtype":"F32","shape":[1],"data_offsets":[0,4]}}'], b"...."),
    "metadata twice": ([b'{"__metadata__":{},"__metadata__":{"a":"b"}}'], b""),
    "a name twice": ([b'{"a":0,"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'], b"...."),
    "a byte order mark": (["\ufeff{}".encode()], b""),
    "utf-32": (["{}".encode("utf-32-le"), "{}".encode("utf-32-be")], b""),
    "half a pair in a name": (
        [
            b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            b'{"\xed\xa0\x80":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        ],
        b"....",
    ),
    "half a pair in metadata": ([b'{"__metadata__":{"a":"\\ud800"}}'], b""),
}


@pytest.mark.parametrize(("headers", "body"), LENIENT.values(), ids=LENIENT)
def test_what_the_safetensors_package_refuses_is_refused(headers: Iterable[bytes], body: bytes) -> None:
    for header in headers:
        assert not accepted(join(header, body))


def test_a_header_of_huge_numbers_is_refused_in_no_time() -> None:
    header = b'{"a":{"dtype":"U8","shape":[' + (b"9" * 4299 + b",") * 200 + b'1],"data_offsets":[0,1]}}'
    document = join(header, b".")
    started = time.thread_time()
    with pytest.raises(ValueError, match="safetensors"):
        unpack(document)
    assert time.thread_time() - started < 0.3


@given(st.lists(st.integers(0, 2**63), max_size=66))
@example([0, 2**40])
def test_an_empty_array_of_any_shape_is_refused_or_has_that_shape(shape: list[int]) -> None:
    document = join({"a": entry("U8", [*shape, 0], [0, 0])})
    if accepted(document):
        assert unpack(document)["a"].shape == (*shape, 0)
