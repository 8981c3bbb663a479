"""What holds images: a folder of any depth, a zip, a tar, an `.npz`/`.npy`, or a packed corpus, as a stream of entries.

Listing is cheap, in a fixed order, and in flat memory; nothing is decoded here. Names and labels stay on this machine.
"""

import hashlib
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ...errors import DataError
from ..archives import MAX_FILE_BYTES, Part, is_tar, is_zip, read, tar_members, zip_members
from ..corpus import Corpus, is_corpus
from ..pixels import Box

PICTURE_SUFFIXES = frozenset(
    f".{kind}"
    for kind in ["bmp", "dcm", "dicom", "gif", "jfif", "jp2", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp"]
)
Split = Literal["train", "validation", "test"]
# First folder of a path that says to which part of a benchmark the image belongs.
SPLIT_FOLDERS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of a source, not yet read."""

    name: str  # inside the source; stays on this machine
    content: Part | bytes | NDArray[np.uint8]  # where the file lies, the file itself, or pixels (H, W[, C])
    label: str = ""
    group: int = 0  # images of one group (a patient, an identity) never stand on both sides of a split; 0: none
    split: Split = "train"
    box: Box | None = None  # the part of the picture to use
    sha256: bytes | None = None  # of the original file, where that is known already

    def read(self) -> tuple[bytes, bytes | NDArray[np.uint8]]:
        """sha256 of the original file (or of the pixels), and the file or the pixels.

        Raises:
            DataError: it cannot be read.
        """
        content = read(self.content) if isinstance(self.content, Part) else self.content
        raw = content if isinstance(content, bytes) else np.ascontiguousarray(content).data
        return self.sha256 or hashlib.sha256(raw).digest(), content

    def digest(self) -> bytes:
        """sha256 as of `read`, which is not needed where it is known; raises as that does."""
        return self.sha256 or self.read()[0]


class Source(Protocol):
    """A collection of images."""

    path: Path

    def entries(self) -> Iterator[Entry]:
        """Every image, always in the same order."""

    def count(self) -> int | None:
        """How many entries there are, where that is cheap to know."""

    def fingerprint(self) -> bytes:
        """Changes when the source does: over names, sizes and times of its files, without reading them."""


class FolderSource:
    """Pictures in a folder of any depth. Links to folders are followed, each folder once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self) -> Iterator[Entry]:
        for name, file in _walk(self.path):
            yield _entry(name, Part(file))

    def count(self) -> int:
        return sum(1 for _ in _walk(self.path))

    def fingerprint(self) -> bytes:
        hasher = hashlib.sha256()
        for name, file in _walk(self.path):
            try:
                status = Path(file).stat()
                hasher.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
            except OSError:
                hasher.update(f"{name}\n".encode())
        return hasher.digest()


class ArchiveSource:
    """Pictures in a zip or a tar, which may be compressed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self) -> Iterator[Entry]:
        members = zip_members(self.path) if is_zip(self.path) else tar_members(self.path)
        for name, content in members:
            if is_picture(name):
                yield _entry(name, content)

    def count(self) -> int | None:
        if not is_zip(self.path):
            return None
        return sum(is_picture(name) for name, _ in zip_members(self.path))

    def fingerprint(self) -> bytes:
        return of_file(self.path)


class ArraySource:
    """uint8 images (N, H, W), (N, H, W, 1|3) or (N, 1|3, H, W) in an `.npy`, or an `.npz` with labels beside them.

    An `.npz` holds `images` and perhaps `labels`, or `x_train`/`y_train` and perhaps `x_test`/`y_test`, or one array.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._parts: list[tuple[str, Split, NDArray[Any] | None]] = [("", "train", None)]
        with _named_in_errors(path):
            if path.suffix.lower() == ".npz":
                with zipfile.ZipFile(path) as archive:
                    self._parts = self._named({Path(n).stem for n in archive.namelist() if n.endswith(".npy")})
            for key, _, labels in self._parts:
                with self._opened(key) as file:
                    shape, _, _ = self._header(file)
                if labels is not None and labels.shape != shape[:1]:
                    raise DataError(f"--data {path}: {shape[0]} images but labels of shape {labels.shape}")

    def entries(self) -> Iterator[Entry]:
        number = 0
        for key, split, labels in self._parts:
            with _named_in_errors(self.path), self._opened(key) as file:
                shape, channels_first, stride = self._header(file)
                for row in range(shape[0]):
                    data = file.read(stride)
                    if len(data) != stride:
                        raise DataError(f"--data {self.path} is cut off: copy it again")
                    pixels = np.frombuffer(data, np.uint8).reshape(shape[1:])
                    label = "" if labels is None else str(labels[row])
                    yield Entry(
                        str(number), np.moveaxis(pixels, 0, 2) if channels_first else pixels, label, split=split
                    )
                    number += 1

    def count(self) -> int:
        return sum(self._count(key) for key, _, _ in self._parts)

    def _count(self, key: str) -> int:
        with self._opened(key) as file:
            return self._header(file)[0][0]

    def fingerprint(self) -> bytes:
        return of_file(self.path)

    def _named(self, names: set[str]) -> list[tuple[str, Split, NDArray[Any] | None]]:
        found: list[tuple[str, Split, NDArray[Any] | None]] = []
        for images, labels, split in (
            ("images", "labels", "train"),
            ("x_train", "y_train", "train"),
            ("x_test", "y_test", "test"),
        ):
            if images in names and (split != "test" or found):
                found.append((images, split, self._array(labels) if labels in names else None))  # type: ignore[arg-type]
        if not found and len(names) == 1:
            found = [(names.pop(), "train", None)]
        if not found:
            listed = ", ".join(sorted(names))
            raise DataError(f"--data {self.path} holds {listed}: name the array of images 'images'")
        return found

    def _array(self, name: str) -> NDArray[Any]:
        with self._opened(name) as file:
            return np.asarray(np.lib.format.read_array(file, allow_pickle=False))

    def _opened(self, name: str) -> IO[bytes]:
        if self.path.suffix.lower() != ".npz":
            return self.path.open("rb")
        with zipfile.ZipFile(self.path) as archive:  # the member keeps the file open
            return archive.open(f"{name}.npy")

    def _header(self, file: IO[bytes]) -> tuple[tuple[int, ...], bool, int]:
        """Shape of the images, whether channels stand first, and bytes an image."""
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(file)
        where = f"--data {self.path}"
        if dtype.hasobject:
            raise DataError(f"{where} cannot be read: it holds Python objects, not pixels")
        if dtype != np.uint8 or len(shape) not in (3, 4):
            raise DataError(f"{where}: needs uint8 images (N, H, W[, C]), found {dtype} {shape}")
        if fortran:
            raise DataError(f"{where} is in Fortran order: save np.ascontiguousarray(images)")
        channels_first = len(shape) == 4 and shape[1] in (1, 3) and shape[3] not in (1, 3)
        if len(shape) == 4 and not channels_first and shape[3] not in (1, 3):
            raise DataError(f"{where}: images have {shape[3]} channels; give 1 or 3")
        if min(shape) < 1:
            raise DataError(f"{where} holds no images")
        if math.prod(shape[1:]) > MAX_FILE_BYTES:
            raise DataError(f"{where}: images of {shape[1:]} are larger than a picture can be")
        return shape, channels_first, math.prod(shape[1:])


class PackedSource:
    """The images of a packed corpus, under the hashes of their original files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.corpus: Corpus = Corpus.open(path)

    def entries(self) -> Iterator[Entry]:
        corpus = self.corpus
        for row, record in enumerate(corpus.index):
            yield Entry(
                str(row),
                np.moveaxis(np.asarray(corpus.pixels[row]), 0, 2),
                corpus.label(row),
                int(record["group"]),
                corpus.split(row),
                sha256=record["sha256"].tobytes(),
            )

    def count(self) -> int:
        return len(self.corpus)

    def fingerprint(self) -> bytes:
        return bytes.fromhex(self.corpus.manifest.sha256)


class ListedSource:
    """A source as it was when it was listed."""

    def __init__(self, source: Source, entries: Sequence[Entry]) -> None:
        self.path = source.path
        self._source, self._entries = source, entries

    def entries(self) -> Iterator[Entry]:
        return iter(self._entries)

    def count(self) -> int:
        return len(self._entries)

    def fingerprint(self) -> bytes:
        return self._source.fingerprint()


def listed(source: Source) -> Source:
    """The source, listed once however often it is gone through; as it is where entries carry their images, which would
    all stay in memory."""
    entries = source.entries()
    first = next(entries, None)
    if first is None or not isinstance(first.content, Part):
        return source
    return ListedSource(source, [first, *entries])


class MappedSource:
    """A source whose entries are changed, or left out, by a rule."""

    def __init__(self, source: Source, rule: Callable[[Entry], Entry | None], key: bytes) -> None:
        self.path = source.path
        self._source, self._rule, self._key = source, rule, key

    def entries(self) -> Iterator[Entry]:
        return (changed for entry in self._source.entries() if (changed := self._rule(entry)))

    def count(self) -> int | None:
        return self._source.count()

    def fingerprint(self) -> bytes:
        return hashlib.sha256(self._source.fingerprint() + self._key).digest()


def open_source(path: Path, option: str = "--data") -> Source:
    """Open a folder, zip, tar, `.npz`, `.npy` or packed corpus.

    Raises:
        DataError: missing, empty, unreadable, or of no known kind.
    """
    source: Source
    try:
        if not path.exists():
            raise DataError(
                f"{option} {path} does not exist: give a folder, zip, tar, .npz, .npy or packed corpus of images"
            )
        if is_corpus(path):
            source = PackedSource(path)
        elif path.is_dir():
            source = FolderSource(path)
        elif not path.is_file():  # a pipe, which would never end
            raise DataError(f"{option} {path} is no file and no folder")
        elif path.suffix.lower() in (".npz", ".npy"):
            source = ArraySource(path)
        elif is_zip(path) or is_tar(path):
            source = ArchiveSource(path)
        elif path.suffix.lower() in (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz"):
            raise DataError(f"{option} {path} is not a whole archive: copy it again")
        else:
            raise DataError(f"{option} {path} is neither a folder, a zip, a tar, an .npz, an .npy nor a packed corpus")
        if next(iter(source.entries()), None) is None:
            raise DataError(f"{option} {path} holds no images ({', '.join(sorted(PICTURE_SUFFIXES))}, .npz or .npy)")
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{option} {path} cannot be read: {error}") from error
    except DataError as error:
        raise DataError(str(error).replace("--data", option, 1)) from error
    return source


def is_picture(name: str) -> bool:
    """Whether a file is worth reading, by its name: DICOM files often have none but numbers."""
    path = PurePosixPath(name)
    suffix = path.suffix.lower()
    return not any(map(_is_hidden, path.parts)) and (suffix in PICTURE_SUFFIXES or not suffix or suffix[1:].isdecimal())


def _is_hidden(part: str) -> bool:
    return part.startswith((".", "__MACOSX"))


def of_file(path: Path) -> bytes:
    """Fingerprint of one file by its size and time."""
    status = path.stat()
    return hashlib.sha256(f"{status.st_size}\0{status.st_mtime_ns}".encode()).digest()


def group_of(text: str) -> int:
    """A group's number, the same for equal texts. Whoever guesses a text can test it: as private as the text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") | 1


def _entry(name: str, content: Part | bytes) -> Entry:
    """The label is the folder's name; `train/LABEL/…` and `ANY/test/LABEL/…` say the split too."""
    path = PurePosixPath(name)  # without the leading ./ of many tars
    folders = path.parts[:-1]
    splits = [SPLIT_FOLDERS[f.lower()] for f in folders[:2][: len(folders) - 1] if f.lower() in SPLIT_FOLDERS]
    return Entry(str(path), content, folders[-1] if folders else "", split=splits[0] if splits else "train")


@contextmanager
def _named_in_errors(path: Path) -> Iterator[None]:
    """Whatever a damaged array makes NumPy or the standard library raise becomes one line with the file's name."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"--data {path} cannot be read: {error}") from error


def _walk(root: Path) -> Iterator[tuple[str, str]]:
    """Names relative to the root and paths of all pictures, folder by folder in alphabetical order; folders and links
    that lead nowhere too, so that they are counted as unreadable."""
    seen = set()
    waiting: list[tuple[str, str, bool | None]] = [("", str(root), True)]
    while waiting:
        name, path, is_folder = waiting.pop()
        if not is_folder:
            yield name, path
            continue
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in seen:  # a link to where we have been
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(path) as found:
                items = sorted(
                    ((item.name, _is_folder(item)) for item in found if not _is_hidden(item.name)), reverse=True
                )
        except OSError as error:
            if not name:
                raise DataError(f"--data {root} cannot be read: {error.strerror}") from error
            yield name, path
            continue
        for item, kind in items:
            shown = f"{name}/{item}" if name else item
            if kind or (kind is not None and is_picture(item)):
                waiting.append((shown.encode(errors="backslashreplace").decode(), f"{path}/{item}", kind))


def _is_folder(item: "os.DirEntry[str]") -> bool | None:
    """True for a folder, False for a file or a link that leads nowhere, None for pipes and the like."""
    try:
        if item.is_dir():
            return True
        if item.is_file():
            return False
    except OSError:  # a link to itself, or into a folder that is closed to us
        return False
    return False if item.is_symlink() and not os.path.exists(item.path) else None
