"""Well-known corpora: what their folders and annotation files say of labels, identities, splits and crops."""

import csv
import hashlib
import inspect
import re
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskdm.archives import is_zip, zip_members
from maskdm.corpus import SPLITS
from maskdm.errors import DataError
from maskdm.groups import MappedSource
from maskdm.images import Box
from maskdm.sources import (
    SPLIT_FOLDERS,
    ArchiveSource,
    Entry,
    FolderSource,
    Source,
    Split,
    group_of,
    of_file,
    open_source,
)

LAYOUTS = ("auto", "vggface2", "celeba", "celebahq", "lsun", "torchvision:NAME")

CELEBA_FACE: Box = (25, 57, 153, 185)  # the usual 128x128 about the centre of an aligned picture of 178x218
VGGFACE2_MARGIN = 0.15  # on each side: the boxes were enlarged by 30 % for training
VGGFACE2_IDENTITY = re.compile(r"n\d+")
CELEBAHQ_NUMBER = re.compile(r"[0-9]{1,9}")
LSUN_FOLDER = re.compile(r"(?:(.+)_(train|val)|(test))(?:_lmdb)?")
# First fields of the lines that name columns; where files were joined they stand in the middle too.
HEADERS = ("NAME_ID", "image_id", "idx")
# Values of `split` by which torchvision's datasets call their parts; the first that one knows is used. Others have
# `train`, or just one part.
Choices = dict[Split, tuple[str | bool, ...]]
TORCHVISION_SPLITS: Choices = {
    "train": ("train", "trainval", "train-standard"),
    "validation": ("val", "valid", "validation"),
    "test": ("test",),
}
TRAIN_OR_TEST: Choices = {"train": (True,), "test": (False,)}
ONE_PART: Choices = {"train": ("",)}
# All that the pickle of an array names, of NumPy 1 and 2.
ARRAY_GLOBALS = frozenset(
    [("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")]
    + [(f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")]
    + [(f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")]
)

Parse = Callable[[Sequence[str]], tuple[str, Sequence[int]]]

_only_arrays: ContextVar[bool] = ContextVar("only_arrays", default=False)
_environments: "WeakValueDictionary[Path, Any]" = WeakValueDictionary()  # LMDB opens a file once in a process


def with_layout(path: Path, layout: str, boxes: Path | None = None) -> Source:
    """Open a corpus that is laid out in a well-known way, one of `LAYOUTS`.

    Args:
        boxes: VGGFace2's `loose_bb_….csv`; an image that is not in it is used whole.

    Raises:
        DataError: an unknown layout, images or annotations that do not fit it, or `boxes` with another layout.
    """
    if boxes is not None and layout != "vggface2":
        raise DataError(f"--boxes {boxes} goes with --layout vggface2, not with {layout}: leave it out")
    kind, _, name = layout.partition(":")
    if kind == "torchvision" and name:
        return TorchvisionSource(path, name)
    if layout == "auto":
        return open_source(path)
    if layout == "vggface2":
        return _vggface2(path, boxes)
    if layout in ("celeba", "celebahq"):
        return _celeba(path) if layout == "celeba" else _celebahq(path)
    if layout == "lsun":
        return _lsun(path)
    raise DataError(f"--layout {layout}: choose from {', '.join(LAYOUTS)}")


class Table:
    """Whole numbers for names, sorted by a hash of 8 bytes, where a dict takes 150 a name."""

    def __init__(self, keys: "array[int]", values: "array[int]") -> None:
        width = len(values) // max(1, len(keys))
        order = np.argsort(np.frombuffer(keys, np.uint64), kind="stable")
        self._keys = np.frombuffer(keys, np.uint64)[order]
        self._values: NDArray[Any] = np.frombuffer(values, values.typecode).reshape(len(keys), width)[order]

    def get(self, key: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The numbers for a name's `group_of`."""
        row = int(np.searchsorted(self._keys, np.uint64(key)))
        found = row < len(self._keys) and int(self._keys[row]) == key
        return tuple(self._values[row].tolist()) if found else default

    def digest(self) -> bytes:
        """Changes with the content."""
        return hashlib.sha256(self._keys.data).digest() + hashlib.sha256(self._values.data).digest()


def read_table(file: Path, option: str, code: str, columns: str, parse: Parse) -> Table:
    """Read a `.csv`, or a text with blanks between its columns, line by line.

    Args:
        option: what the user chose the file with.
        code: type of the numbers, as of `array`.
        columns: what a line holds, for the error.
        parse: a line's fields → name and numbers; ValueError where they are malformed.

    Raises:
        DataError: unreadable, or a malformed line.
    """
    keys, values, line = array("Q"), array(code), 0
    try:
        with file.open(newline="", encoding="utf-8-sig") as text:
            for fields in csv.reader(text) if file.suffix.lower() == ".csv" else map(str.split, text):
                line += 1
                if fields and fields[0] not in HEADERS:
                    name, numbers = parse(fields)
                    values.extend(numbers)
                    keys.append(group_of(name))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{option} {file} cannot be read: {error}") from error
    except (ValueError, OverflowError) as error:
        raise DataError(f"{option} {file}, line {line} is malformed: it needs {columns}; get the file again") from error
    return Table(keys, values)


def _open(path: Path, layout: str) -> Source:
    source = open_source(path)
    if not isinstance(source, FolderSource | ArchiveSource):
        raise DataError(f"--layout {layout}: {path} is not a folder, zip or tar of picture files: use --layout auto")
    return source


def _stem(entry: Entry) -> str:
    return PurePosixPath(entry.name).stem


def _vggface2(path: Path, boxes: Path | None) -> Source:
    source, table, key = _open(path, "vggface2"), Table(array("Q"), array("i")), b"vggface2"

    def identity(entry: Entry) -> str:
        folder = PurePosixPath(entry.name).parent.name
        return folder if VGGFACE2_IDENTITY.fullmatch(folder) else ""

    def box(entry: Entry) -> Box | None:
        found = table.get(group_of(f"{identity(entry)}/{_stem(entry)}"))
        return (found[0], found[1], found[2], found[3]) if found else None

    def rule(entry: Entry) -> Entry:
        if not (label := identity(entry)):
            return entry
        split = SPLIT_FOLDERS.get(PurePosixPath(entry.name).parent.parent.name.lower(), "train")
        return replace(entry, label=label, group=group_of(label), split=split, box=box(entry))

    if not any(identity(entry) for entry in source.entries()):
        raise DataError(
            f"--layout vggface2: no image of {path} lies in an identity's folder, such as train/n000001: use "
            f"--layout auto"
        )
    if boxes is not None:
        table = read_table(boxes, "--boxes", "i", '"NAME_ID",X,Y,W,H', _box)
        if not any(box(entry) for entry in source.entries()):
            raise DataError(f"--boxes {boxes} names none of the images of {path}: give the file that belongs to them")
        key += table.digest()
    return MappedSource(source, rule, key)


def _box(fields: Sequence[str]) -> tuple[str, Sequence[int]]:
    name, (left, top, width, height) = fields[0], map(int, fields[1:])
    if min(width, height) < 1:
        raise ValueError("an empty box")
    across, down = VGGFACE2_MARGIN * width, VGGFACE2_MARGIN * height
    return name, [round(v) for v in (left - across, top - down, left + width + across, top + height + down)]


class CelebAFiles:
    """Split and identity of CelebA's images, as far as the files that say so lie beside them."""

    def __init__(self, path: Path) -> None:
        self.splits = self.groups = Table(array("Q"), array("B"))
        self.found: list[tuple[Path, Table]] = []
        if file := _beside(path, "list_eval_partition.txt", "list_eval_partition.csv"):
            self.splits = read_table(file, "--data", "B", "an image's name and 0, 1 or 2", _partition)
            self.found.append((file, self.splits))
        if file := _beside(path, "identity_CelebA.txt", "identity_CelebA.csv"):
            self.groups = read_table(file, "--data", "Q", "an image's name and a number", _identity)
            self.found.append((file, self.groups))

    def place(self, entry: Entry, key: int) -> Entry:
        """The entry with split and group of the image whose name without suffix has this `group_of`."""
        (split,), (group,) = self.splits.get(key, (0,)), self.groups.get(key, (0,))
        return replace(entry, label="", group=group, split=SPLITS[split])

    def digest(self) -> bytes:
        """Changes with the files' content."""
        return self.splits.digest() + self.groups.digest()


def _partition(fields: Sequence[str]) -> tuple[str, Sequence[int]]:
    name, part = fields
    return PurePosixPath(name).stem, [("0", "1", "2").index(part)]


def _identity(fields: Sequence[str]) -> tuple[str, Sequence[int]]:
    name, identity = fields
    return PurePosixPath(name).stem, [group_of(str(int(identity)))]


def _original(fields: Sequence[str]) -> tuple[str, Sequence[int]]:
    number, _, name = fields
    return str(int(number)), [group_of(PurePosixPath(name).stem)]


def _beside(path: Path, *names: str) -> Path | None:
    """An annotation file in the folder of images, or where CelebA's own tree has it from that folder or archive."""
    above = path.absolute()
    folders = [folder / below for folder in (above, *above.parents[:2]) for below in ("", "Anno", "Eval")]
    return next((folder / name for folder in folders for name in names if (folder / name).is_file()), None)


def _celeba(path: Path) -> Source:
    source, known = _open(path, "celeba"), CelebAFiles(path)
    for file, table in known.found:
        if not any(table.get(group_of(_stem(entry))) for entry in source.entries()):
            raise DataError(
                f"--data {path}: {file} lists none of its images: give them their own names again, or move it away"
            )

    def rule(entry: Entry) -> Entry:
        folder = PurePosixPath(entry.name).parent.name or path.absolute().name
        box = CELEBA_FACE if "align" in folder.lower() else None
        return replace(known.place(entry, group_of(_stem(entry))), box=box)

    return MappedSource(source, rule, b"celeba" + known.digest())


def _celebahq(path: Path) -> Source:
    source, known = _open(path, "celebahq"), CelebAFiles(path)
    file = _beside(path, "CelebA-HQ-to-CelebA-mapping.txt") if known.found else None
    if file is None:
        return MappedSource(source, lambda entry: replace(entry, label="", split="train"), b"celebahq")
    table = read_table(file, "--data", "Q", "idx, orig_idx and orig_file", _original)
    first = _first_number(source, table, file)

    def rule(entry: Entry) -> Entry:
        stem = _stem(entry)
        number = int(stem) - first if CELEBAHQ_NUMBER.fullmatch(stem) else -1
        return known.place(entry, *table.get(group_of(str(number)), (0,)))

    return MappedSource(source, rule, b"celebahq" + bytes([first]) + table.digest() + known.digest())


def _first_number(source: Source, table: Table, file: Path) -> int:
    """0 or 1: `CelebA-HQ-img/0.jpg` and `data256x256/00001.jpg` are the same face, the first of the mapping."""
    stems = {stem for entry in source.entries() if CELEBAHQ_NUMBER.fullmatch(stem := _stem(entry))}
    if any(stem.strip("0") == "" or (len(stem) < 5 and stem[0] != "0") for stem in stems):
        return 0
    if any(not table.get(group_of(str(int(stem)))) and table.get(group_of(str(int(stem) - 1))) for stem in stems):
        return 1
    raise DataError(
        f"--data {source.path}: which of its images is which in {file} cannot be told, for neither the first nor the "
        f"last is there: give all images, or move that file away"
    )


def _lsun(path: Path) -> Source:
    folders = sorted(file.parent for file in (path / "data.mdb", *path.glob("*/data.mdb")) if file.is_file())
    if folders:
        return LmdbSource(path, folders)
    if path.is_file() and is_zip(path) and any(n.endswith("data.mdb") for n, _ in zip_members(path)):
        raise DataError(f"--data {path} holds an LMDB, which cannot be read inside of a zip: unpack it")
    source, own = _open(path, "lsun"), path.absolute().name.partition(".")[0]

    def scene(entry: Entry) -> tuple[str, Split] | None:
        return next(filter(None, map(_scene, (*PurePosixPath(entry.name).parts[:-1], own))), None)

    def rule(entry: Entry) -> Entry:
        label, split = scene(entry) or (entry.label, entry.split)
        return replace(entry, label=label, split=split)

    if not any(scene(entry) for entry in source.entries()):
        raise DataError(
            f"--layout lsun: {path} holds no data.mdb and no folder such as bedroom_train: use --layout auto"
        )
    return MappedSource(source, rule, b"lsun" + own.encode(errors="surrogateescape"))


def _scene(folder: str) -> tuple[str, Split] | None:
    """Category and split that LSUN's name of a folder says."""
    match = LSUN_FOLDER.fullmatch(folder)
    return (match[1] or "", SPLIT_FOLDERS[match[2] or match[3]]) if match else None


class LmdbSource:
    """LSUN's LMDB folders, whose values are picture files."""

    def __init__(self, path: Path, folders: list[Path]) -> None:
        self.path = path
        self._folders = folders
        self._count = sum(int(_environment(folder).stat()["entries"]) for folder in folders)
        if not self._count:
            raise DataError(f"--data {path} holds no images: its LMDB is empty; copy it again")

    def entries(self) -> Iterator[Entry]:
        import lmdb

        for folder in self._folders:
            environment, name = _environment(folder), folder.absolute().name
            label, split = _scene(name) or (name, "train")
            try:
                with environment.begin() as transaction:
                    for key, value in transaction.cursor():
                        text = key.decode() if key.isalnum() else key.hex()
                        yield Entry(f"{label or split}/{text}", value, label, split=split)
            except lmdb.Error as error:
                raise _damaged(folder) from error

    def count(self) -> int:
        return self._count

    def fingerprint(self) -> bytes:
        hasher = hashlib.sha256(b"lsun")
        for folder in self._folders:
            hasher.update(folder.absolute().name.encode(errors="surrogateescape") + of_file(folder / "data.mdb"))
        return hasher.digest()


def _environment(folder: Path) -> Any:
    """An LMDB opened for reading; closed when nobody uses it any more."""
    try:
        import lmdb
    except ImportError as error:
        raise DataError("--layout lsun needs the package lmdb: pip install 'maskdm[lsun]'") from error
    file = (folder / "data.mdb").resolve()
    environment = _environments.get(file)
    if environment is None:
        try:
            environment = lmdb.open(str(file), subdir=False, readonly=True, lock=False, readahead=False)
        except (lmdb.Error, OSError) as error:
            raise _damaged(folder) from error
        # A page beyond the end of the file would end this process when it is read.
        if file.stat().st_size < (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]:
            environment.close()
            raise _damaged(folder)
        _environments[file] = environment
    return environment


def _damaged(folder: Path) -> DataError:
    return DataError(f"--data {folder / 'data.mdb'} is not a whole LMDB, or cannot be read: copy it again")


class TorchvisionSource:
    """The pictures of one of torchvision's datasets, as it lies on this machine. Nothing is downloaded."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self._option = f"--layout torchvision:{name}"
        if not path.is_dir():
            raise DataError(f"--data {path} is not a folder: {self._option} needs the one that torchvision calls root")
        self._parts = list(self._opened(name))
        if not self.count():
            raise DataError(f"{self._option}: {path} holds no picture of a train, validation or test part")
        for _, dataset, length in self._parts:
            if length:
                self._item(dataset, 0)

    def entries(self) -> Iterator[Entry]:
        for split, dataset, length in self._parts:
            for row in range(length):
                pixels, label = self._item(dataset, row)
                yield Entry(f"{split}/{row}", pixels, label, split=split)

    def count(self) -> int:
        return sum(length for _, _, length in self._parts)

    def fingerprint(self) -> bytes:
        return hashlib.sha256(FolderSource(self.path).fingerprint() + self._option.encode()).digest()

    def _opened(self, name: str) -> Iterator[tuple[Split, Any, int]]:
        """Each part, and how many items it has."""
        from torchvision import datasets

        kind = getattr(datasets, name, None) if name in datasets.__all__ else None
        if not inspect.isclass(kind):
            raise DataError(f"{self._option}: torchvision has no dataset of that name; there is CIFAR10, for example")
        known = inspect.signature(kind).parameters
        required = {
            key for key, value in known.items() if value.default is value.empty and value.kind != value.VAR_KEYWORD
        }
        if "root" not in known or required - {"root", "train", "split"}:
            wanted = ", ".join(sorted(required - {"root"})) or "no folder"
            raise DataError(f"{self._option} cannot be used, for it takes {wanted}: export it as a folder of pictures")
        option, choices = "", ONE_PART
        if "train" in known:
            option, choices = "train", TRAIN_OR_TEST
        elif "split" in known:
            option, choices = "split", TORCHVISION_SPLITS
        fixed = {"root": str(self.path)} | ({"download": False} if "download" in known else {})
        for split, values in choices.items():
            for value in values:
                with self._guarded():
                    try:
                        dataset: Any = kind(**fixed, **({option: value} if option else {}))
                    except ValueError as error:
                        if "for argument split" in str(error):  # not a part of this dataset
                            continue
                        raise
                    length = len(dataset)
                yield split, dataset, length
                break

    def _item(self, dataset: Any, row: int) -> tuple[NDArray[np.uint8], str]:
        with self._guarded():
            item = dataset[row]
            picture, label = item if isinstance(item, tuple) and len(item) == 2 else (None, None)
            if not isinstance(picture, Image.Image) or not isinstance(label, int | np.integer | str):
                raise DataError("its items are not a picture and a label each; export it as a folder of pictures")
            pixels = np.asarray(picture if picture.mode in ("L", "RGB") else picture.convert("RGB"))
            classes = getattr(dataset, "classes", None)
            text = label if isinstance(label, str) or not classes else classes[label]
        return pixels, ", ".join(text) if isinstance(text, tuple) else str(text)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Run torchvision's code: no pickle may name anything but arrays, and whatever goes wrong is a DataError."""
        _add_pickle_hook()
        token = _only_arrays.set(True)
        try:
            yield
        # Whatever torchvision raises, the files are what is missing or wrong.
        except Exception as error:
            reason = " ".join(str(error).split()).partition(" You can use download=True")[0] or type(error).__name__
            raise DataError(f"{self._option} cannot be read from {self.path}: {reason}") from error
        finally:
            _only_arrays.reset(token)


@cache
def _add_pickle_hook() -> None:
    """Watch what pickles name, once for this process; it acts only while `_only_arrays` is set in this thread."""

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "pickle.find_class" and _only_arrays.get() and arguments not in ARRAY_GLOBALS:
            raise DataError(
                f"a pickle asks for {'.'.join(map(str, arguments))}, which no array needs: do not trust these files, "
                f"and get them from their authors"
            )

    sys.addaudithook(watch)
