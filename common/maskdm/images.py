"""One policy for pixels: any picture or array becomes uint8 (C, S, S), and pictures go back to PNG.

EXIF orientation is applied; palettes are resolved; transparency is laid over white; 16-bit grey is scaled to 8 bits;
the short side is resized to S with an area-true filter and the centre is cropped.
"""

import io
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from maskdm.errors import DataError
from maskdm.runfolder import atomic_write

Pixels = NDArray[np.uint8]

# Decompression bombs: a file that claims more pixels than this is refused instead of filling the memory.
MAX_PIXELS = 200_000_000
# JPEG chroma of a grey picture stored as colour may be off by rounding.
GREY_TOLERANCE = 4


class TooSmall(DataError):
    """The picture has fewer pixels than the model's image size."""


class IsColour(DataError):
    """A colour picture where the model has one channel."""


def decode(data: bytes, size: int, channels: int, *, upscale: bool = False) -> Pixels:
    """Decode one picture file into uint8 (channels, size, size).

    Raises:
        DataError: not a readable picture; TooSmall or IsColour where the policy refuses it.
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise DataError(f"{opened.width}x{opened.height} pixels are more than the limit of {MAX_PIXELS}")
            opened.draft("RGB" if opened.mode == "YCbCr" else None, (2 * size, 2 * size))
            picture = ImageOps.exif_transpose(opened)
            picture.load()
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError("not a readable picture") from error
    return _fit(_flat(picture), size, channels, upscale)


def from_array(image: Pixels, size: int, channels: int, *, upscale: bool = False) -> Pixels:
    """The same policy for a decoded uint8 array, (H, W), (H, W, 1) or (H, W, 3)."""
    squeezed = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
    if squeezed.shape[:2] == (size, size) and squeezed.ndim == 2:
        return np.broadcast_to(squeezed, (channels, size, size))
    return _fit(Image.fromarray(squeezed), size, channels, upscale)


def _flat(picture: Image.Image) -> Image.Image:
    """Any mode → L or RGB."""
    if picture.mode in ("I", "I;16", "I;16B", "I;16L", "F"):
        values = np.asarray(picture, dtype=np.float64)
        top = 65535.0 if picture.mode != "F" and values.max(initial=0) > 255 else 255.0
        return Image.fromarray((values.clip(0, top) * (255.0 / top)).round().astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == "L" else picture.convert("L" if picture.mode == "1" else "RGB")


def _fit(picture: Image.Image, size: int, channels: int, upscale: bool) -> Pixels:
    if min(picture.size) < size and not upscale:
        raise TooSmall(f"{picture.width}x{picture.height} pixels, smaller than the model's {size}x{size}")
    if min(picture.size) != size or picture.width != picture.height:
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(picture)  # (S, S) or (S, S, 3)
    if pixels.ndim == 2:
        return np.broadcast_to(pixels, (channels, size, size))
    if channels == 1:
        if int(pixels.max(axis=2).astype(int).__sub__(pixels.min(axis=2)).max()) > GREY_TOLERANCE:
            raise IsColour("a colour picture, but the model has one channel")
        return pixels[None, :, :, 1]
    return np.moveaxis(pixels, 2, 0)


def grid_picture(images: Tensor, columns: int | None = None, scale: int | None = None, gap: int = 2) -> Image.Image:
    """uint8 (N, C, H, W) → one picture, row by row; small images are enlarged so that a person can see them."""
    array = np.moveaxis(images.cpu().numpy(), 1, 3)  # (N, H, W, C)
    count, height, width, channels = array.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    scale = scale or max(1, 96 // max(height, width))
    array = array.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = height * scale + gap, width * scale + gap
    sheet = np.full((rows * height + gap, columns * width + gap, channels), 255, dtype=np.uint8)
    for i, image in enumerate(array):
        top, left = gap + i // columns * height, gap + i % columns * width
        sheet[top : top + height - gap, left : left + width - gap] = image
    return Image.fromarray(sheet[..., 0] if channels == 1 else sheet)


def save_png(path: Path, picture: Image.Image) -> None:
    """Write a picture whole or not at all."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    atomic_write(path, buffer.getvalue())
