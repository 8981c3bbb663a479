"""Images that other libraries read: LSUN's LMDB folders, and torchvision's datasets by name."""

import hashlib
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...errors import DataError
from .source import SPLIT_FOLDERS, Entry, FolderSource, Split, of_file

LSUN_FOLDER = re.compile(r"(?:(.+)_(train|val)|(test))(?:_lmdb)?")
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

_only_arrays: ContextVar[bool] = ContextVar("only_arrays", default=False)
_environments: "WeakValueDictionary[Path, Any]" = WeakValueDictionary()  # LMDB opens a file once in a process


def scene_of(folder: str) -> tuple[str, Split] | None:
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
            label, split = scene_of(name) or (name, "train")
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
