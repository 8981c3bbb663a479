"""Well-known corpora: what their folders and annotation files say of labels, identities, splits and crops."""

import csv
import hashlib
import inspect
import re
import sys
import zipfile
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

from maskdm.archives import zip_members
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
LSUN_FOLDER = re.compile(r"(?:(.+)_(train|val)|(test))(?:_lmdb)?")
# First fields of the lines that name columns; where files were joined they stand in the middle too.
HEADERS = ("NAME_ID", "image_id", "idx")
# How torchvision's datasets call their parts; the first that one accepts is used.
TORCHVISION_SPLITS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "trainval", "train-standard"),
    "validation": ("val", "valid", "validation"),
    "test": ("test",),
}
# All that the pickle of an array names, of NumPy 1 and 2.
ARRAY_GLOBALS = frozenset(
    [("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")]
    + [(f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")]
    + [(f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")]
)

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
    """Whole numbers for names, of a file with a line for each: 8 bytes a name, where a dict takes 150."""

    def __init__(self, keys: "array[int]", values: "array[int]") -> None:
        order = np.argsort(np.frombuffer(keys, np.uint64), kind="stable")
        self._keys = np.frombuffer(keys, np.uint64)[order]
        self._values: NDArray[Any] = np.frombuffer(values, values.typecode).reshape(len(keys), -1)[order]

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self._keys.nbytes + self._values.nbytes

    def get(self, key: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The numbers for a name's `group_of`."""
        row = int(np.searchsorted(self._keys, np.uint64(key)))
        found = row < len(self._keys) and int(self._keys[row]) == key
        return tuple(self._values[row].tolist()) if found else default

    def digest(self) -> bytes:
        """Changes with the content."""
        hasher = hashlib.sha256(self._keys.data)
        hasher.update(self._values.data)
        return hasher.digest()


def read_table(
    file: Path, option: str, code: str, columns: str, parse: Callable[[Sequence[str]], tuple[str, Sequence[int]]]
) -> Table:
    """Read a `.csv`, or a text with columns between blanks, line by line.

    Args:
        option: what the user chose the file with.
        code: type of the numbers, as of `array`.
        columns: what a line holds, for the error.
        parse: fields of a line → name and numbers; ValueError where it is malformed.

    Raises:
        DataError: unreadable, or a malformed line.
    """
    keys, values, number = array("Q"), array(code), 0
    try:
        with file.open(newline="", encoding="utf-8-sig") as text:
            rows = csv.reader(text) if file.suffix.lower() == ".csv" else (line.split() for line in text)
            for number, row in enumerate(rows, 1):
                if row and row[0] not in HEADERS:
                    name, numbers = parse(row)
                    values.extend(numbers)
                    keys.append(group_of(name))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{option} {file} cannot be read: {error}") from error
    except (ValueError, OverflowError) as error:
        raise DataError(f"{option} {file}, line {number} is malformed: each needs {columns}; get it again") from error
    return Table(keys, values)


def _open(path: Path, layout: str) -> Source:
    source = open_source(path)
    if not isinstance(source, FolderSource | ArchiveSource):
        raise DataError(f"--layout {layout}: {path} is not a folder, zip or tar of picture files: use --layout auto")
    return source


def _check(source: Source, fits: Callable[[Entry], object], complaint: str) -> None:
    """Whether at least one image is as the layout or an annotation file says."""
    if not any(fits(entry) for entry in source.entries()):
        raise DataError(complaint)


def _vggface2(path: Path, boxes: Path | None) -> Source:
    source, table, key = _open(path, "vggface2"), Table(array("Q"), array("i")), b"vggface2"

    def identity(entry: Entry) -> str:
        folder = PurePosixPath(entry.name).parent.name
        return folder if VGGFACE2_IDENTITY.fullmatch(folder) else ""

    def box(entry: Entry) -> Box | None:
        found = table.get(group_of(f"{identity(entry)}/{PurePosixPath(entry.name).stem}"))
        return (found[0], found[1], found[2], found[3]) if found else None

    def rule(entry: Entry) -> Entry:
        if not (label := identity(entry)):
            return entry
        above = PurePosixPath(entry.name).parent.parent.name.lower()
        split = SPLIT_FOLDERS.get(above, "train")
        return replace(entry, label=label, group=group_of(label), split=split, box=box(entry))

    _check(
        source,
        identity,
        f"--layout vggface2: no image of {path} lies in the folder of an identity, such as train/n000001: use "
        f"--layout auto",
    )
    if boxes is not None:
        table = read_table(boxes, "--boxes", "i", '"NAME_ID",X,Y,W,H', _box)
        _check(
            source,
            box,
            f"--boxes {boxes}: none of its {len(table):,} names is an image of {path}: give the file for it",
        )
        key += table.digest()
    return MappedSource(source, rule, key)


def _box(row: Sequence[str]) -> tuple[str, Sequence[int]]:
    name, left, top, width, height = row[0], *(int(value) for value in row[1:])
    if min(width, height) < 1:
        raise ValueError("an empty box")
    across, down = VGGFACE2_MARGIN * width, VGGFACE2_MARGIN * height
    return name, [round(v) for v in (left - across, top - down, left + width + across, top + height + down)]


class CelebAFiles:
    """Split and identity of CelebA's images, where the files that say so lie beside them."""

    def __init__(self, path: Path) -> None:
        self.splits = self.groups = Table(array("Q"), array("B"))
        self.files: list[tuple[Path, Table]] = []
        if file := _beside(path, "list_eval_partition.txt", "list_eval_partition.csv"):
            self.splits = read_table(file, "--data", "B", "an image's name and 0, 1 or 2", self._split)
            self.files.append((file, self.splits))
        if file := _beside(path, "identity_CelebA.txt", "identity_CelebA.csv"):
            self.groups = read_table(file, "--data", "Q", "an image's name and a number", self._identity)
            self.files.append((file, self.groups))

    def place(self, entry: Entry, key: int) -> Entry:
        """The entry as that of the image of which the name's stem has this `group_of`."""
        (split,), (group,) = self.splits.get(key, (0,)), self.groups.get(key, (0,))
        return replace(entry, label="", group=group, split=SPLITS[split])

    def digest(self) -> bytes:
        """Changes with the files' content."""
        return self.splits.digest() + self.groups.digest()

    @staticmethod
    def _split(row: Sequence[str]) -> tuple[str, Sequence[int]]:
        name, part = row
        return PurePosixPath(name).stem, [("0", "1", "2").index(part.strip())]

    @staticmethod
    def _identity(row: Sequence[str]) -> tuple[str, Sequence[int]]:
        name, identity = row
        return PurePosixPath(name).stem, [group_of(str(int(identity)))]


def _beside(path: Path, *names: str) -> Path | None:
    """An annotation file in the folder of images, or near the folder or archive as CelebA's own tree has it."""
    above = path.absolute()
    folders = [folder / below for folder in (above, *above.parents[:2]) for below in ("", "Anno", "Eval")]
    return next((folder / name for folder in folders for name in names if (folder / name).is_file()), None)


def _celeba(path: Path) -> Source:
    source, known = _open(path, "celeba"), CelebAFiles(path)

    def key(entry: Entry) -> int:
        return group_of(PurePosixPath(entry.name).stem)

    def rule(entry: Entry) -> Entry:
        folder = PurePosixPath(entry.name).parent.name or path.absolute().name
        return replace(known.place(entry, key(entry)), box=CELEBA_FACE if "align" in folder.lower() else None)

    for file, table in known.files:
        complaint = f"--data {path}: {file} lists none of its images: give them their original names, or take it away"
        _check(source, lambda entry, table=table: table.get(key(entry)), complaint)  # type: ignore[misc]
    return MappedSource(source, rule, b"celeba" + known.digest())


def _celebahq(path: Path) -> Source:
    source, known = _open(path, "celebahq"), CelebAFiles(path)
    file = _beside(path, "CelebA-HQ-to-CelebA-mapping.txt") if known.files else None
    if file is None:
        return MappedSource(source, lambda entry: replace(entry, label="", split="train"), b"celebahq")

    def original(row: Sequence[str]) -> tuple[str, Sequence[int]]:
        number, _, name = row
        return str(int(number)), [group_of(PurePosixPath(name).stem)]

    table = read_table(file, "--data", "Q", "idx, orig_idx and orig_file", original)
    first = _first_number(source, len(table), file)

    def rule(entry: Entry) -> Entry:
        stem = PurePosixPath(entry.name).stem
        (key,) = table.get(group_of(str(int(stem) - first)), (0,)) if stem.isdecimal() else (0,)
        return known.place(entry, key)

    return MappedSource(source, rule, b"celebahq" + bytes([first]) + table.digest() + known.digest())


def _first_number(source: Source, count: int, file: Path) -> int:
    """0 or 1: `CelebA-HQ-img/0.jpg` and `data256x256/00001.jpg` are the same face, the first of the mapping."""
    stems = {stem for entry in source.entries() if (stem := PurePosixPath(entry.name).stem).isdecimal()}
    if any(int(stem) == 0 or (len(stem) < 5 and stem[0] != "0") for stem in stems):
        return 0
    if any(int(stem) == count for stem in stems):
        return 1
    raise DataError(
        f"--data {source.path}: no image is numbered 0 or {count}, so which is which in {file} cannot be told: give "
        f"all images, or take that file away"
    )


def _lsun(path: Path) -> Source:
    folders = sorted(file.parent for file in (path / "data.mdb", *path.glob("*/data.mdb")) if file.is_file())
    if folders:
        return LmdbSource(path, folders)
    if path.is_file() and zipfile.is_zipfile(path) and any(n.endswith("data.mdb") for n, _ in zip_members(path)):
        raise DataError(f"--data {path} holds an LMDB, which cannot be read inside of a zip: unpack it")
    source = _open(path, "lsun")

    def scene(entry: Entry) -> tuple[str, Split] | None:
        names = (*PurePosixPath(entry.name).parts[:-1], PurePosixPath(path.absolute().name.partition(".")[0]).name)
        return next((found for name in names if (found := _scene(name))), None)

    def rule(entry: Entry) -> Entry:
        label, split = scene(entry) or (entry.label, entry.split)
        return replace(entry, label=label, split=split)

    _check(
        source, scene, f"--layout lsun: {path} holds neither a folder such as bedroom_train nor a data.mdb: use auto"
    )
    return MappedSource(source, rule, b"lsun")


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
            raise DataError(f"--data {path} holds no images: its LMDB is empty")

    def entries(self) -> Iterator[Entry]:
        import lmdb

        for folder in self._folders:
            name = folder.absolute().name
            label, split = _scene(name) or (name, "train")
            try:
                with _environment(folder).begin() as transaction:
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
            environment = lmdb.open(str(file.parent), readonly=True, lock=False, readahead=False)
        except (lmdb.Error, OSError) as error:
            raise _damaged(folder) from error
        # Reading a page beyond the end of the file would end this process.
        if file.stat().st_size < (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]:
            environment.close()
            raise _damaged(folder)
        _environments[file] = environment
    return environment


def _damaged(folder: Path) -> DataError:
    return DataError(f"--data {folder / 'data.mdb'} is not a whole LMDB: copy it again")


class TorchvisionSource:
    """The pictures of one of torchvision's datasets, as it lies on this machine. Nothing is downloaded."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self._option = f"--layout torchvision:{name}"
        if not path.is_dir():
            raise DataError(f"--data {path} is not a folder: {self._option} needs the one that torchvision calls root")
        self._parts = list(self._opened(name))
        for _, dataset, length in self._parts:
            if length:
                self._item(dataset, 0)
        if not self.count():
            raise DataError(f"{self._option}: {path} holds no images")

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
        """Each part with its length."""
        from torchvision import datasets

        kind = getattr(datasets, name, None) if name in datasets.__all__ else None
        if not inspect.isclass(kind):
            raise DataError(f"{self._option}: torchvision has no dataset of that name, such as CIFAR10")
        known = inspect.signature(kind).parameters
        needed = {
            key for key, value in known.items() if value.default is value.empty and value.kind != value.VAR_KEYWORD
        }
        if "root" not in known or needed - {"root", "train", "split"}:
            wanted = ", ".join(sorted(needed - {"root"})) or "no folder"
            raise DataError(f"{self._option} cannot be read: it takes {wanted}; export it as a folder of pictures")
        fixed: dict[str, Any] = {"root": str(self.path)} | ({"download": False} if "download" in known else {})
        choices: list[tuple[Split, list[dict[str, Any]]]] = [("train", [{}])]
        if "train" in known:
            choices = [("train", [{"train": True}]), ("test", [{"train": False}])]
        elif "split" in known:
            choices = [(split, [{"split": n} for n in names]) for split, names in TORCHVISION_SPLITS.items()]
        found = False
        for split, alternatives in choices:
            for chosen in alternatives:
                with self._guarded():
                    try:
                        dataset = kind(**fixed, **chosen)
                    except ValueError as error:
                        if "for argument split" not in str(error):
                            raise
                        continue
                    length = len(dataset)
                found = True
                yield split, dataset, length
                break
        if not found:
            raise DataError(f"{self._option} has no train, validation or test part: export it as a folder of pictures")

    def _item(self, dataset: Any, row: int) -> tuple[NDArray[np.uint8], str]:
        with self._guarded():
            item = dataset[row]
            picture, label = item if isinstance(item, tuple) and len(item) == 2 else (None, None)
            if not isinstance(picture, Image.Image) or not isinstance(label, int | np.integer | str):
                raise DataError("its items are not a picture and a label; export it as a folder of pictures")
            pixels = np.asarray(picture if picture.mode in ("L", "RGB") else picture.convert("RGB"))
            classes = getattr(dataset, "classes", None)
            if classes and not isinstance(label, str):
                label = classes[label]
        return pixels, ", ".join(label) if isinstance(label, tuple) else str(label)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Run torchvision's code: no pickle may name anything but arrays, and whatever goes wrong is a DataError."""
        _add_pickle_hook()
        token = _only_arrays.set(True)
        try:
            yield
        # torchvision raises anything for files that are missing or damaged.
        except Exception as error:
            reason = " ".join(str(error).split()).partition(" You can use download=True")[0]
            raise DataError(
                f"{self._option} cannot be read from {self.path}: {reason or type(error).__name__}"
            ) from error
        finally:
            _only_arrays.reset(token)


@cache
def _add_pickle_hook() -> None:
    """Watch what pickles name, once for this process; it acts only while `_only_arrays` is set in this thread."""

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "pickle.find_class" and _only_arrays.get() and arguments not in ARRAY_GLOBALS:
            raise DataError(
                f"a pickle asks for {'.'.join(arguments)}, which no array needs; do not trust these files, and get "
                f"them from their authors"
            )

    sys.addaudithook(watch)
