"""Image files → uint8 images in memory, and the site's slice of them.

A source is a folder of any depth, a zip, or an `.npz`/`.npy` of uint8 images. Names, labels and digests stay in this
process: nothing here is ever sent. What cannot be used is skipped and counted, never silently.
"""

import hashlib
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskdm.errors import DataError
from maskdm.images import IsColour, Pixels, TooSmall, decode, from_array
from maskdm.seeding import derive_seed

PICTURE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})


Batch = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Images:
    """Decoded images with what identifies them locally."""

    pixels: Tensor  # uint8 (N, C, S, S)
    names: list[str]
    labels: list[str]  # folder name or label array; "" where there is none
    skipped: dict[str, str] = field(default_factory=dict)  # name → reason
    repeated_grey: int = 0  # grey images repeated over the channels of a colour model

    def __len__(self) -> int:
        return len(self.pixels)

    def summary(self) -> str:
        """One line for a person: counts, and why files were skipped."""
        reasons = Counter(self.skipped.values())
        parts = [f"{len(self)} images of {self.pixels.shape[-1]}x{self.pixels.shape[-1]} pixels"]
        parts += [f"{count} skipped: {reason}" for reason, count in reasons.most_common()]
        if self.repeated_grey:
            parts.append(f"{self.repeated_grey} grey ones repeated over {self.pixels.shape[1]} channels")
        return "; ".join(parts)

    def digest(self) -> str:
        """sha256 over shape and pixels: the corpus's own name in configurations and checkpoints."""
        hasher = hashlib.sha256(repr(tuple(self.pixels.shape)).encode())
        hasher.update(self.pixels.contiguous().numpy().data)
        return hasher.hexdigest()


class Source(Protocol):
    """A collection of images that can be listed cheaply and read one by one."""

    names: list[str]

    def label(self, name: str) -> str:
        """Label of one image, or ""."""

    def content(self, name: str) -> bytes:
        """What identifies the image: the bytes of the file or of its pixels."""

    def pixels(self, name: str, size: int, channels: int, upscale: bool) -> tuple[Pixels, bool]:
        """uint8 (channels, size, size), and whether the original was grey."""

    def channels(self) -> int:
        """1 if the first images are all grey, else 3."""


class FileSource:
    """Pictures in a folder of any depth, or in a zip."""

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path) if path.is_file() else None
        self._root = path
        listed = (
            self._zip.namelist()
            if self._zip
            else (p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
        )
        self.names = sorted(n for n in listed if _is_picture(n))

    def label(self, name: str) -> str:
        return PurePosixPath(name).parent.name

    def content(self, name: str) -> bytes:
        try:
            return self._zip.read(name) if self._zip else (self._root / name).read_bytes()
        except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
            raise DataError("not readable") from error

    def pixels(self, name: str, size: int, channels: int, upscale: bool) -> tuple[Pixels, bool]:
        pixels = decode(self.content(name), size, channels, upscale=upscale)
        return pixels, channels > 1 and pixels.strides[0] == 0  # broadcast over the channels

    def channels(self) -> int:
        for name in self.names[:64]:
            try:
                decode(self.content(name), 8, 1, upscale=True)
            except IsColour:
                return 3
            except DataError:
                continue
        return 1


class ArraySource:
    """uint8 images (N, H, W), (N, H, W, 1|3) or (N, 1|3, H, W) in an `.npy`, or an `.npz` with labels beside them.

    An `.npz` holds `images` and perhaps `labels`, or `x_train`/`y_train`, or one single array.
    """

    def __init__(self, path: Path) -> None:
        images, labels = _load_arrays(path)
        if images.dtype != np.uint8 or images.ndim not in (3, 4):
            raise DataError(f"--data {path}: needs uint8 images (N, H, W[, C]), found {images.dtype} {images.shape}")
        if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3):
            images = np.moveaxis(images, 1, 3)
        if images.ndim == 4 and images.shape[3] not in (1, 3):
            raise DataError(f"--data {path}: images have {images.shape[3]} channels; give 1 or 3")
        if labels is not None and labels.shape != (len(images),):
            raise DataError(f"--data {path}: {len(images)} images but labels of shape {labels.shape}")
        self._images, self._labels = images, labels
        self.names = [str(i) for i in range(len(images))]

    def label(self, name: str) -> str:
        return "" if self._labels is None else str(self._labels[int(name)])

    def content(self, name: str) -> bytes:
        return bytes(self._images[int(name)].tobytes())

    def pixels(self, name: str, size: int, channels: int, upscale: bool) -> tuple[Pixels, bool]:
        pixels = from_array(self._images[int(name)], size, channels, upscale=upscale)
        return pixels, channels > 1 and pixels.strides[0] == 0

    def channels(self) -> int:
        return self._images.shape[3] if self._images.ndim == 4 else 1


def open_source(path: Path, option: str = "--data") -> Source:
    """Open a folder, zip, `.npz` or `.npy`.

    Raises:
        DataError: missing, empty, unreadable, or of no known kind.
    """
    if not path.exists():
        raise DataError(f"{option} {path} does not exist: give a folder, a zip, an .npz or an .npy of images")
    try:
        if path.suffix.lower() in (".npz", ".npy"):
            source: Source = ArraySource(path)
        elif path.is_dir() or zipfile.is_zipfile(path):
            source = FileSource(path)
        else:
            raise DataError(f"{option} {path} is neither a folder, a zip, an .npz nor an .npy")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{option} {path} cannot be read: {error}") from error
    if not source.names:
        raise DataError(f"{option} {path} holds no images ({', '.join(sorted(PICTURE_SUFFIXES))}, .npz or .npy)")
    return source


def load_images(
    source: Source, size: int, channels: int, *, names: Sequence[str] | None = None, upscale: bool = False
) -> Images:
    """Decode images (all, or those named) into memory; what cannot be used is skipped with its reason.

    Raises:
        IsColour: most images are colour and the model has one channel.
        DataError: nothing usable is left.
    """
    wanted = source.names if names is None else names
    pixels = np.empty((len(wanted), channels, size, size), np.uint8)
    kept: list[str] = []
    skipped: dict[str, str] = {}
    grey = 0
    for name in wanted:
        try:
            pixels[len(kept)], was_grey = source.pixels(name, size, channels, upscale)
        except TooSmall:
            skipped[name] = f"smaller than {size}x{size}"
        except IsColour:
            skipped[name] = "colour, but the model has one channel"
        except DataError as error:
            skipped[name] = str(error)
        else:
            kept.append(name)
            grey += was_grey
    colour = sum(reason.startswith("colour") for reason in skipped.values())
    if colour > len(kept):  # a stray colour picture is bad data; a colour folder is the wrong prior
        raise IsColour(
            f"--data holds {colour} colour images, but the model has one channel: convert them to grey, or use a prior "
            f"of three channels"
        )
    if not kept:
        raise DataError(_nothing_left(skipped, size))
    return Images(
        pixels=torch.from_numpy(pixels[: len(kept)]),
        names=kept,
        labels=[source.label(name) for name in kept],
        skipped=skipped,
        repeated_grey=grey,
    )


@dataclass(frozen=True)
class Slice:
    """The images a site uses, by local name: trained on, and held out to measure."""

    train: list[str]
    held_out: list[str]
    unreadable: list[str]
    total: int


def choose_slice(source: Source, fraction: float, *, held_out: float = 0.2, seed: int = 0) -> Slice:
    """About `fraction` of the images, chosen by a keyed hash of their content.

    The choice does not depend on file names, their order, or what else is in the folder: an image that is in stays in,
    and equal images fall on the same side. At least two images are taken, one for each side.

    Raises:
        DataError: fewer than two images can be read.
    """
    assert 0 < fraction <= 1
    assert 0 < held_out < 1
    ranked: list[tuple[int, str, bytes]] = []
    unreadable = []
    for name in source.names:
        try:
            content = source.content(name)
        except DataError:
            unreadable.append(name)
            continue
        digest = hashlib.sha256(content).digest()
        ranked.append((derive_seed("slice", seed, digest), name, digest))
    if len({digest for _, _, digest in ranked}) < 2:
        raise DataError(f"--data holds {len(ranked)} readable different images: at least two are needed")
    ranked.sort()
    limit = fraction * 2**63
    chosen = [entry for entry in ranked if entry[0] < limit]
    while len({digest for _, _, digest in chosen}) < 2:
        chosen = ranked[: len(chosen) + 1]
    side = {digest: derive_seed("held out", seed, digest) for _, _, digest in chosen}
    edge = sorted(side.values())
    cut = min(max(held_out * 2**63, edge[0]), edge[-1] - 1)  # at least one on each side
    return Slice(
        train=[name for _, name, digest in chosen if side[digest] > cut],
        held_out=[name for _, name, digest in chosen if side[digest] <= cut],
        unreadable=unreadable,
        total=len(source.names),
    )


def class_numbers(labels: Sequence[str], names: Sequence[str]) -> Tensor | None:
    """Labels as numbers of the model's classes, (N,) int64, −1 for any other; None for an unconditional model."""
    if not names:
        return None
    number = {name: i for i, name in enumerate(names)}
    return torch.tensor([number.get(label, -1) for label in labels])


def batch_rows(count: int, batch_size: int, images_seen: int, seed: int) -> NDArray[np.int64]:
    """Rows of the next batch in an endless sequence of seeded permutations (epochs), from `images_seen` on.

    A pure function of its arguments, so that a resumed run sees what an uninterrupted one sees. (batch_size,)
    """
    rows = []
    position = images_seen
    while (missing := images_seen + batch_size - position) > 0:
        epoch, start = divmod(position, count)
        rows.append(_permutation(count, seed, epoch)[start : start + missing])
        position += len(rows[-1])
    return np.concatenate(rows)


def batches(
    pixels: Tensor,
    batch_size: int,
    images_seen: int,
    seed: int,
    *,
    classes: Tensor | None = None,
    share: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Endless batches after `images_seen`: uint8 images (batch, C, S, S) and classes (batch,) or None.

    Args:
        share: this process's number and how many there are; each gets its part of every batch.
    """
    number, processes = share
    while True:
        rows = torch.from_numpy(batch_rows(len(pixels), batch_size, images_seen, seed)[number::processes])
        yield pixels[rows], None if classes is None else classes[rows]
        images_seen += batch_size


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of one epoch; kept, since a run asks for the same one again and again."""
    return np.random.default_rng(derive_seed("epoch", seed, epoch)).permutation(count)


def _is_picture(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return not hidden and path.suffix.lower() in PICTURE_SUFFIXES


def _load_arrays(path: Path) -> tuple[NDArray[np.generic], NDArray[np.generic] | None]:
    with path.open("rb") as file:  # opened here: NumPy leaves it open when the archive is damaged
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded, None
        for images, labels in (("images", "labels"), ("x_train", "y_train")):
            if images in loaded.files:
                return loaded[images], loaded[labels] if labels in loaded.files else None
        if len(loaded.files) == 1:
            return loaded[loaded.files[0]], None
        raise DataError(f"--data {path} holds {', '.join(loaded.files)}: name the array of images 'images'")


def _nothing_left(skipped: dict[str, str], size: int) -> str:
    reason, count = Counter(skipped.values()).most_common(1)[0]
    remedy = (
        "give images of that size, allow --upscale, or use a smaller --image-size"
        if "smaller" in reason
        else "check the files"
    )
    return f"--data: none of {len(skipped)} images can be used ({count}: {reason}): {remedy}"
