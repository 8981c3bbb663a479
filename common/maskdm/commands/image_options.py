"""Options about images that several commands share."""

from typing import Annotated

import typer

from .. import quantities
from ..data.pixels import PixelPolicy
from ..errors import UsageError
from .command_line import configure

Upscale = Annotated[bool, typer.Option(help="Enlarge images smaller than the model instead of skipping them.")]
Window = Annotated[
    str | None, typer.Option(help="Values that are black and white in images of more than 8 bits, e.g. 0,4095.")
]
Channels = Annotated[str, typer.Option(help="1, 3, or auto: grey where all images are grey.")]
GroupRegex = Annotated[
    str | None,
    typer.Option(help="Part of an image's path that names its patient, identity or slide, never on both sides."),
]
GroupCsv = Annotated[
    str | None, typer.Option(help="The same from a table, FILE.csv:COLUMN; its first column names the images.")
]


def window_of(text: str | None) -> tuple[float, float] | None:
    """The two values of --window."""
    return quantities.pair("--window", text) if text else None


def pixel_policy(
    image_size: int, channels: int, upscale: bool, window: tuple[float, float] | None = None
) -> PixelPolicy:
    """How images become pixels, from options."""
    values = {"image_size": image_size, "channels": channels, "upscale": upscale, "window": window}
    return configure(PixelPolicy, values)


def channels_of(text: str) -> int | None:
    """The number of --channels; None for auto."""
    if text not in ("auto", "1", "3"):
        raise UsageError(f"--channels {text}: give 1, 3 or auto")
    return None if text == "auto" else int(text)
