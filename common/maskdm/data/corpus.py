"""A packed corpus: a folder with every image as uint8 pixels in one file that is mapped into memory, not read.

    images.npy      uint8 (N, C, S, S); NumPy opens it too
    index.npy       one record an image: sha256 of its file, label, group, split, original size
    manifest.json   pixel policy, labels, counts, statistics, hashes; written last, so without it there is no corpus
    skipped.jsonl   what could not be used, by name, and why

Imports no PyTorch: the processes that pack are meant to start in a blink.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, ValidationError

from ..config import Frozen
from ..errors import DataError
from ..metadata import BINS, Statistics
from ..run.runfolder import write_json
from .pixels import PixelPolicy, Pixels

IMAGES, INDEX, MANIFEST, SKIPPED, VERIFIED = "images.npy", "index.npy", "manifest.json", "skipped.jsonl", ".verified"
SPLITS: tuple[Literal["train", "validation", "test"], ...] = ("train", "validation", "test")

# 54 bytes an image.
RECORD = np.dtype(
    [
        ("sha256", "u1", (32,)),
        ("label", "<i4"),  # row of the manifest's labels; −1: none
        ("group", "<u8"),  # 0: none
        ("split", "u1"),  # row of SPLITS
        ("grey", "u1"),
        ("width", "<u4"),  # of the original
        ("height", "<u4"),
    ]
)
Index = NDArray[np.void]


class Manifest(Frozen):
    """What a corpus is."""

    schema_version: Literal[1] = 1
    images: Annotated[int, Field(ge=1)]
    policy: PixelPolicy
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # the corpus's name in configurations and checkpoints
    images_sha256: str  # of the pixels
    index_sha256: str  # of the records
    labels: tuple[str, ...] = ()
    splits: dict[str, int] = Field(default_factory=dict)
    groups: Annotated[int, Field(ge=0)] = 0
    skipped: dict[str, int] = Field(default_factory=dict)  # reason → files
    duplicates: Annotated[int, Field(ge=0)] = 0  # files that another file repeats byte by byte
    statistics: Statistics
    source: str = ""  # fingerprint of what was packed
    created: datetime = Field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))


@dataclass(frozen=True)
class Corpus:
    """Images as the model sees them, and what is known of each."""

    pixels: Pixels  # (N, C, S, S), perhaps mapped from a file
    index: Index  # (N,) of RECORD
    manifest: Manifest
    path: Path | None = field(default=None, compare=False)

    @classmethod
    def open(cls, path: Path | str, option: str = "--data") -> "Corpus":
        """Open a packed corpus, as `pack` leaves it; its pixels are mapped, not read.

        Files that were copied or touched since they were last verified are hashed once.

        Raises:
            DataError: damaged, changed since it was packed, or from a newer version.
        """
        path = Path(path)
        manifest = _read_manifest(path, option)
        try:
            # Copy on write: PyTorch wants memory that could be written, and the file must never be.
            pixels = np.load(path / IMAGES, mmap_mode="c", allow_pickle=False)
            index = np.load(path / INDEX, mmap_mode="c", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{option} {path} is damaged ({error}): pack it again with prepare") from error
        size, channels = manifest.policy.image_size, manifest.policy.channels
        shape = (manifest.images, channels, size, size)
        if pixels.shape != shape or pixels.dtype != np.uint8 or index.shape != shape[:1] or index.dtype != RECORD:
            raise DataError(f"{option} {path} does not hold what its manifest says: pack it again with prepare")
        corpus = cls(pixels, index, manifest, path)
        if _stamp(path) != _verified(path):
            verify(corpus, option)
        return corpus

    def __len__(self) -> int:
        return len(self.index)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels that the index counts."""
        return self.manifest.labels

    def label(self, row: int) -> str:
        """Label of one image, or ""."""
        number = int(self.index["label"][row])
        return self.labels[number] if number >= 0 else ""

    def split(self, row: int) -> Literal["train", "validation", "test"]:
        """Part of the benchmark that the image belongs to."""
        return SPLITS[int(self.index["split"][row])]

    def image(self, row: int) -> Pixels:
        """One image (C, S, S); of a packed corpus it is read, not mapped, so that a look at many takes no memory."""
        image: Pixels = self.pixels[row]
        if self.path is None:
            return image
        with (self.path / IMAGES).open("rb") as file:
            offset = len(self.pixels) * image.nbytes
            file.seek(row * image.nbytes - offset, 2)  # from the end: NumPy's header stands before the images
            return np.frombuffer(file.read(image.nbytes), np.uint8).reshape(image.shape)

    @cached_property
    def training_rows(self) -> NDArray[np.int64]:
        """Rows that may be trained on: those of no benchmark's validation or test part.

        Raises:
            DataError: there is none.
        """
        rows = np.flatnonzero(self.index["split"] == 0)
        if not len(rows):
            raise DataError("--data: every image lies in a folder named test or validation: give the training images")
        return rows

    def summary(self) -> str:
        """One line for a person: counts, and why files were skipped."""
        policy = self.manifest.policy
        parts = [f"{len(self):,} images of {policy.image_size}x{policy.image_size} pixels"]
        parts += [f"{count:,} skipped: {reason}" for reason, count in self.manifest.skipped.items()]
        others = [(split, count) for split, count in self.manifest.splits.items() if count and split != "train"]
        parts += [f"{count:,} left out: {split}" for split, count in others]
        grey = round(self.manifest.statistics.grey * len(self))
        if grey and policy.channels > 1:
            parts.append(f"{grey:,} grey ones repeated over {policy.channels} channels")
        return "; ".join(parts)


def in_memory(pixels: Pixels, labels: Sequence[str] | None = None) -> Corpus:
    """A corpus of images that are at hand, uint8 (N, C, S, S)."""
    count, channels, size, _ = pixels.shape
    index = np.zeros(count, RECORD)
    for row, image in enumerate(pixels):
        index["sha256"][row] = np.frombuffer(hashlib.sha256(np.ascontiguousarray(image).data).digest(), np.uint8)
    names = tuple(sorted(set(labels or ())))
    index["label"] = -1 if labels is None else [names.index(label) for label in labels]
    index["width"] = index["height"] = size
    tally = Tally(channels)
    tally.add(pixels)
    images_sha256 = hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()
    index_sha256 = hashlib.sha256(index.tobytes()).hexdigest()
    manifest = Manifest(
        images=count,
        policy=PixelPolicy(image_size=size, channels=channels),
        sha256=corpus_sha256(pixels.shape, images_sha256, index_sha256, names),
        images_sha256=images_sha256,
        index_sha256=index_sha256,
        labels=names,
        splits={"train": count},
        duplicates=repeated(index),
        statistics=tally.statistics(index),
    )
    return Corpus(pixels, index, manifest)


def content_keys(index: Index) -> NDArray[np.uint64]:
    """A number for each image, the same for equal files: 8 bytes of their hash, (N,)."""
    keys: NDArray[np.uint64] = index["sha256"][:, :8].copy().view("<u8")[:, 0]
    return keys


def in_both(first: Index, second: Index) -> int:
    """How many images of the first the second has too, byte by byte."""
    return int(np.isin(content_keys(first), content_keys(second)).sum())


def repeated(index: Index) -> int:
    """Images whose file repeats that of another one byte by byte."""
    keys = np.sort(content_keys(index))
    return int(np.sum(keys[1:] == keys[:-1]))


def corpus_sha256(shape: Sequence[int], images_sha256: str, index_sha256: str, labels: Sequence[str]) -> str:
    """One hash over everything that training sees."""
    document = [list(shape), images_sha256, index_sha256, list(labels)]
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()


class Tally:
    """Running intensity statistics, exact in integers whatever the order of the parts."""

    def __init__(self, channels: int) -> None:
        self.counts = np.zeros((channels, 256), np.int64)

    def add(self, pixels: Pixels) -> None:
        """Count the pixels of some images (n, C, S, S)."""
        if not len(pixels):
            return
        for channel, counts in enumerate(self.counts):
            plane = np.ascontiguousarray(pixels[:, channel]).reshape(len(pixels), -1)
            counts += np.array(Image.fromarray(plane).histogram(), np.int64)  # five times as fast as np.bincount

    def statistics(self, index: Index) -> Statistics:
        """Of everything counted; `index` holds all of its records."""
        levels = np.arange(256)
        shares = self.counts / self.counts.sum(axis=1, keepdims=True)
        mean = shares @ levels
        std = np.sqrt(np.maximum(shares @ levels**2 - mean**2, 0))
        histogram = shares.mean(axis=0).reshape(BINS, -1).sum(axis=1)
        return Statistics(
            mean=tuple(round(float(value), 3) for value in mean),
            std=tuple(round(float(value), 3) for value in std),
            histogram=tuple(round(float(value), 6) for value in histogram),
            grey=round(float(index["grey"].mean()), 4),
            median_size=(int(np.median(index["width"])), int(np.median(index["height"]))),
        )


def is_corpus(path: Path) -> bool:
    """Whether a folder is a packed corpus."""
    return (path / MANIFEST).is_file() and (path / IMAGES).exists()


def verify(corpus: Corpus, option: str = "--data") -> None:
    """Hash a corpus's files in full.

    Raises:
        DataError: they changed since they were packed.
    """
    assert corpus.path
    manifest = corpus.manifest
    for array, wanted, name in (
        (corpus.pixels, manifest.images_sha256, IMAGES),
        (corpus.index, manifest.index_sha256, INDEX),
    ):
        with (corpus.path / name).open("rb") as file:
            file.seek(-array.nbytes, 2)
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != wanted:
            raise DataError(
                f"{option} {corpus.path}: {name} changed after it was packed: pack the corpus again with prepare, or "
                f"restore the file"
            )
    labels = np.asarray(corpus.index["label"])
    if labels.min() < -1 or labels.max() >= len(manifest.labels) or corpus.index["split"].max() >= len(SPLITS):
        raise DataError(f"{option} {corpus.path}: {INDEX} does not fit its manifest: pack it again with prepare")
    if manifest.sha256 != corpus_sha256(
        corpus.pixels.shape, manifest.images_sha256, manifest.index_sha256, manifest.labels
    ):
        raise DataError(f"{option} {corpus.path}: {MANIFEST} was changed: pack the corpus again with prepare")
    mark_verified(corpus.path)


def mark_verified(path: Path) -> None:
    """Remember that the files, as they are now, are whole; a folder that cannot be written is verified every time."""
    try:
        write_json(path / VERIFIED, _stamp(path))
    except OSError:
        return


def _stamp(path: Path) -> list[list[int]]:
    """Sizes and times of the files."""
    return [[(status := (path / name).stat()).st_size, status.st_mtime_ns] for name in (IMAGES, INDEX, MANIFEST)]


def _verified(path: Path) -> Any:
    try:
        return json.loads((path / VERIFIED).read_text())
    except (OSError, ValueError):
        return None


def _read_manifest(path: Path, option: str) -> Manifest:
    try:
        document = json.loads((path / MANIFEST).read_text())
        version = document.get("schema_version")
        if version != 1:
            raise DataError(f"{option} {path} has schema version {version}, this MaskDM reads 1: pack it again")
        return Manifest.model_validate(document)
    except (OSError, ValueError, AttributeError, ValidationError) as error:
        raise DataError(f"{option} {path}: {MANIFEST} is damaged: pack the corpus again with prepare") from error
