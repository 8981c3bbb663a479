"""Arrays of images → pictures for people."""

import io
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .runfolder import atomic_write


def grid_picture(
    images: NDArray[np.uint8], columns: int | None = None, scale: int | None = None, gap: int = 2
) -> Image.Image:
    """uint8 (N, C, H, W) → one picture, row by row; small images are enlarged so that a person can see them."""
    array = np.moveaxis(images, 1, 3)  # (N, H, W, C)
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
