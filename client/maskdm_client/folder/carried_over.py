"""Tensors that a site keeps from one round to the next, in its work folder; none of them ever leaves it."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from maskdm.federated.plan import RoundPlan
from maskdm.run.runfolder import atomic_write
from maskdm.run.tensorfile import chunks, fp32

from .damage import read_or_drop

KINDS = ("rest", "residual", "moments")  # files are named KIND-FEDERATION-…


class CarriedOver:
    """One file a round, so that a round that is done again starts from what the round before it left.

    Args:
        wanted: by the plan; else nothing is read or written. Nor is it for adapters: their factors are drawn anew each
            round, and what is kept of one would mean nothing in the next.
    """

    def __init__(self, folder: Path, kind: str, plan: RoundPlan, wanted: bool) -> None:
        assert kind in KINDS
        self._folder, self._stem, self._round = folder, f"{kind}-{plan.federation}", plan.round
        self.wanted = wanted and plan.train != "adapters"

    def before(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """What the last round before this one left; nothing where there was none, it has other shapes or names, or it
        is damaged: then it is dropped.
        """
        earlier = self._earlier() if self.wanted else []
        found = (read_or_drop(self._path(max(earlier))) if earlier else None) or {}
        return found if {name: tuple(tensor.shape) for name, tensor in found.items()} == shapes else {}

    def keep(self, shapes: Mapping[str, tuple[int, ...]], tensor: Callable[[str], Tensor]) -> None:
        """Write what this round leaves, fp32, one tensor at a time."""
        if not self.wanted:
            return
        atomic_write(self._path(self._round), chunks(fp32(shapes), lambda name: tensor(name).numpy()))
        earlier = self._earlier()
        for number in earlier:
            if number < max(earlier):
                self._path(number).unlink(missing_ok=True)

    def _earlier(self) -> list[int]:
        name = re.compile(rf"{self._stem}-(\d+)\.safetensors")
        found = (name.fullmatch(path.name) for path in self._folder.glob(f"{self._stem}-*"))
        return [number for match in found if match and (number := int(match[1])) < self._round]

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._stem}-{number}.safetensors"


def forget_others(plan: RoundPlan, folder: Path) -> None:
    """Remove what earlier federations left in a site's work folder."""
    for kind in KINDS:
        for path in folder.glob(f"{kind}-*.safetensors"):
            if path.name.split("-")[1] != plan.federation:
                path.unlink(missing_ok=True)
