"""Pictures as they go into a page."""

import base64
import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

MOST_PIXELS = 100_000_000  # of a picture that is opened at all
LARGEST_FILE = 150_000  # bytes of a picture that goes into a page as it is
WIDEST = 900  # pixels of the others


@dataclass(frozen=True)
class Picture:
    """A picture for a page: a data: URI and its size in pixels."""

    source: str
    width: int
    height: int


def read_picture(path: Path) -> Picture | None:
    """A PNG, smaller where it is large; None where it is missing, damaged or none."""
    try:
        about = path.stat()
    except OSError:
        return None
    return _picture(path, about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=64)
def _picture(path: Path, size: int, changed: int) -> Picture | None:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                return None
            image.load()
            if size <= LARGEST_FILE and width <= 2 * WIDEST:
                return Picture(_data("png", path.read_bytes()), width, height)
            image.thumbnail((WIDEST, 4 * WIDEST))
            small = io.BytesIO()
            image.convert("RGB").save(small, format="WEBP", quality=85)
            return Picture(_data("webp", small.getvalue()), *image.size)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _data(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
