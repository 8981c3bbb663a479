"""One policy for pixels: any picture or array becomes uint8 (C, S, S).

In this order: EXIF orientation, palette to colours, transparency over white, 16 bits to 8 by a window, then the short
side to S with the centre cropped (`fit="crop"`), or the long side to S on black (`fit="pad"`). Large JPEGs are decoded
at a half, a quarter or an eighth of their size where that leaves at least twice S. Imports no PyTorch: the processes
that decode a corpus start in a blink.
"""

import io
import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps, JpegImagePlugin
from pydantic import Field, model_validator

from ..config import Frozen
from ..errors import DataError
from . import dicom
from .dicom import MAX_PIXELS

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the stored picture; may reach beyond it
Fit = Literal["crop", "pad"]
Filter = Literal["lanczos", "area"]

# JPEG chroma of a grey picture stored as colour may be off by rounding.
GREY_TOLERANCE = 4

# Not all that Pillow knows: some formats start other programs (PostScript), others have no signature.
_FORMATS = ("BMP", "GIF", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_FILTERS = {"lanczos": Image.Resampling.LANCZOS, "area": Image.Resampling.BOX}
_WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "F")


class PixelPolicy(Frozen):
    """How pictures become pixels; written into a corpus, so that what was done is known."""

    image_size: Annotated[int, Field(ge=4, le=2048)]
    channels: Literal[1, 3]
    fit: Fit = "crop"
    filter: Filter = "lanczos"
    upscale: bool = False  # enlarge pictures smaller than the model instead of skipping them
    window: tuple[float, float] | None = None  # what is black and what is white in pictures of more than 8 bits

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.window and not self.window[0] < self.window[1]:
            raise ValueError(f"window {self.window[0]:g},{self.window[1]:g}: the first must be below the second")
        return self


class TooSmall(DataError):
    """The picture has fewer pixels than the model's image size."""


class IsColour(DataError):
    """A colour picture where the model has one channel."""


class Decoded(NamedTuple):
    """A picture as the model sees it, and what it was."""

    pixels: Pixels  # (C, S, S)
    width: int  # of the original, as it is meant to be seen
    height: int
    grey: bool


def decode(data: bytes, policy: PixelPolicy, box: Box | None = None) -> Decoded:
    """Decode one picture file.

    Args:
        box: the part of the picture to use; what lies outside of the picture is black.

    Raises:
        DataError: not a readable picture, or one too large; TooSmall or IsColour where the policy refuses it.
    """
    if not data:
        raise DataError("an empty file")
    try:
        if box is None and (plain := _plain_jpeg(data, policy)) is not None:
            return plain
        with _quiet():
            if dicom.is_dicom(data):
                return from_array(dicom.decode(data, policy.window), policy)
            with _open(data) as opened, _without_stderr() if opened.format == "TIFF" else nullcontext():
                width, height = opened.size
                # Shown lying on its side; a TIFF is turned already.
                if opened.format != "TIFF" and opened.getexif().get(0x0112) in (5, 6, 7, 8):
                    width, height = height, width
                picture = _flat(_load(opened, policy, box), policy.window)
            pixels, grey = _fit(picture, policy)
    except DataError:
        raise
    except (Image.DecompressionBombError, MemoryError) as error:
        raise DataError(f"more than {MAX_PIXELS:,} pixels") from error
    except Exception as error:  # decoders meet anything in damaged files; whatever they raise, the file is wrong
        raise DataError("not a readable picture") from error
    return Decoded(pixels, width, height, grey)


def to_pixels(content: bytes | Pixels, policy: PixelPolicy, box: Box | None = None) -> Decoded:
    """What an entry of a source holds, a file or an array, as the model sees it; raises as `decode` does."""
    return decode(content, policy, box) if isinstance(content, bytes) else from_array(content, policy)


def from_array(image: NDArray[Any], policy: PixelPolicy) -> Decoded:
    """The same policy for a decoded array, (H, W), (H, W, 1) or (H, W, 3), uint8 (or float in [0, 255] when grey)."""
    flat = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
    if flat.dtype != np.uint8:
        flat = flat.round().clip(0, 255).astype(np.uint8)
    height, width = flat.shape[:2]
    pixels, grey = _fit(flat, policy)
    return Decoded(pixels, width, height, grey)


def _plain_jpeg(data: bytes, policy: PixelPolicy) -> Decoded | None:
    """A JPEG that needs no turning, decoded without Pillow's detour: the same library and the same pixels in a third
    of the time for small pictures. None for everything else, damaged files among them."""
    if data[:3] != b"\xff\xd8\xff" or _may_be_turned(data):
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        if space not in ("Gray", "YCbCr", "RGB") or width * height > MAX_PIXELS:
            return None
        factor = _reduction(width, height, 2 * policy.image_size)
        found = simplejpeg.decode_jpeg(
            data,
            "GRAY" if space == "Gray" else "RGB",
            min_height=-(-height // factor),
            min_width=-(-width // factor),
        )
    except ValueError:  # whether it can be read after all, Pillow decides
        return None
    pixels, grey = _fit(found[..., 0] if space == "Gray" else found, policy)
    return Decoded(pixels, width, height, grey)


def _may_be_turned(data: bytes) -> bool:
    """Whether a JPEG holds EXIF or XMP (APP1), or cannot be followed up to its scan."""
    place = 2
    while data[place : place + 1] == b"\xff" and len(data) > place + 4:
        marker = data[place + 1]
        if marker == 0xDA:
            return False
        if marker == 0xE1:
            return True
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return True


def _reduction(width: int, height: int, needed: int) -> int:
    """How far a JPEG may be reduced while it is decoded: by 8, 4, 2 or 1, as Pillow's `draft` does."""
    possible = min(width // needed, height // needed)
    return next((factor for factor in (8, 4, 2) if possible >= factor), 1)


def _open(data: bytes) -> Image.Image:
    if data[:3] == b"\xff\xd8\xff":  # past Pillow's own limit: a huge JPEG is decoded at an eighth of its size
        return JpegImagePlugin.JpegImageFile(io.BytesIO(data))
    return Image.open(io.BytesIO(data), formats=_FORMATS)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without decoders' remarks on damaged files."""
    logger = logging.getLogger("PIL")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _without_stderr() -> Iterator[None]:
    """libtiff itself writes to stderr what is wrong with a file."""
    stderr = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _load(opened: Image.Image, policy: PixelPolicy, box: Box | None) -> Image.Image:
    """Pixels of an opened file: reduced while decoding where that is possible, cropped, turned upright."""
    width, height = opened.size
    needed = 2 * policy.image_size  # twice, so that the filter has something to work with
    if box:
        if not (box[0] < box[2] and box[1] < box[3]):
            raise DataError("an empty box")
        needed = math.ceil(needed * max(width, height) / min(box[2] - box[0], box[3] - box[1]))
    if opened.info.get("progressive") and width * height > MAX_PIXELS:  # holds every coefficient, however reduced
        raise DataError(f"more than {MAX_PIXELS:,} pixels")
    opened.draft(None, (needed, needed))
    if opened.width * opened.height > MAX_PIXELS:
        raise DataError(f"more than {MAX_PIXELS:,} pixels")
    opened.load()
    if box:
        across, down = opened.width / width, opened.height / height
        left, top, right, bottom = box
        if right <= 0 or bottom <= 0 or left >= width or top >= height:
            raise DataError("a box outside of the picture")
        opened = opened.crop((round(left * across), round(top * down), round(right * across), round(bottom * down)))
    return ImageOps.exif_transpose(opened)


def _flat(picture: Image.Image, window: tuple[float, float] | None) -> Image.Image:
    """Any mode → L or RGB."""
    if picture.mode in _WIDE_MODES:
        values = np.asarray(picture, dtype=np.float64)
        # Without a window: 16 bits are the full range, unless nothing is beyond 8.
        low, high = window or (0.0, 65535.0 if picture.mode != "F" and values.max(initial=0) > 255 else 255.0)
        values = np.nan_to_num(values, copy=False, nan=low)
        return Image.fromarray(((values.clip(low, high) - low) * (255.0 / (high - low))).round().astype(np.uint8))
    kind = "L" if picture.mode in ("1", "L", "LA", "La") else "RGB"
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == kind else picture.convert(kind)


def _fit(image: Image.Image | Pixels, policy: PixelPolicy) -> tuple[Pixels, bool]:
    """L or RGB of any shape → (C, S, S), and whether it is grey."""
    size = policy.image_size
    width, height = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
    side = min(width, height) if policy.fit == "crop" else max(width, height)
    if side < size and not policy.upscale:
        raise TooSmall(f"smaller than {size}x{size}")
    if (width, height) == (size, size):
        pixels = np.asarray(image)  # (S, S) or (S, S, 3)
    else:
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        pixels = np.asarray(_resized(picture, policy, side))
    if pixels.ndim == 2:
        return np.broadcast_to(pixels, (policy.channels, size, size)), True
    # Colour mostly shows in a few of the pixels already.
    grey = not _has_colour(pixels[::8, ::8]) and not _has_colour(pixels)
    if policy.channels == 1 and not grey:
        raise IsColour("colour, but the model has one channel")
    planes = pixels.transpose(2, 0, 1)
    return (planes[1:2] if policy.channels == 1 else planes), grey


def _has_colour(pixels: Pixels) -> bool:
    return int((pixels.max(axis=2) - pixels.min(axis=2)).max()) > GREY_TOLERANCE


def _resized(picture: Image.Image, policy: PixelPolicy, side: int) -> Image.Image:
    """Crop or pad to a square of S.

    First by the whole factor that leaves at least S, by exact area averages (as ADM's preparation does, Dhariwal &
    Nichol 2021), then the rest of the way by the filter: Lanczos alone takes four times as long.
    """
    size, (width, height) = policy.image_size, picture.size
    factor = max(1, side // size)
    if policy.fit == "crop":
        edge = side // factor * factor
        left, top = (width - edge) // 2, (height - edge) // 2
        square = picture.reduce(factor, (left, top, left + edge, top + edge))
        return square if square.size == (size, size) else square.resize((size, size), _FILTERS[policy.filter])
    across, down = max(1, round(width * size / side)), max(1, round(height * size / side))
    inner = picture.reduce(factor).resize((across, down), _FILTERS[policy.filter])
    sheet = Image.new(picture.mode, (size, size))
    sheet.paste(inner, ((size - across) // 2, (size - down) // 2))
    return sheet
