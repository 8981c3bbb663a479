"""What a disk may have damaged in a site's work folder: nothing there is worth a round, so it is dropped."""

from pathlib import Path

from torch import Tensor

from maskdm.run.tensorfile import Stored
from maskdm.training.checkpoint import tensors_in

from .events import LeftoverDropped, note


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file that this site wrote, in memory of their own.

    Raises:
        ValueError: it is not whole, or holds what is no number.
        OSError: it cannot be read.
    """
    found = tensors_in(Stored(path))
    if not all(bool(tensor.isfinite().all()) for tensor in found.values()):
        raise ValueError("it holds what is no number")
    return found


def read_or_drop(path: Path) -> dict[str, Tensor] | None:
    """The same; None where it is damaged: then it is gone, and its owner told."""
    try:
        return read_tensors(path)
    except (OSError, ValueError) as error:
        path.unlink(missing_ok=True)
        say_dropped(path, error)
        return None


def say_dropped(path: Path, error: BaseException) -> None:
    """Tell the site's owner of a file in the work folder that is gone."""
    reason = f"{path} cannot be used ({type(error).__name__}: {error}); it was dropped, and the work goes on without it"
    note(path.parent.parent, LeftoverDropped(reason=reason))
