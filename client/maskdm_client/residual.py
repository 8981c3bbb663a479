"""What coarse encodings round away is kept at the site and added to its next update: nothing is lost, only late.

Error feedback: Seide et al. 2014; Karimireddy et al. 2019, arXiv 1901.09847, algorithm 1.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from maskdm.protocol import RoundPlan
from maskdm.runfolder import atomic_write
from maskdm.tensorfile import Arrays, chunks
from maskdm.wire import decode


class Residual:
    """One file a round, so that a round that is done again starts from what the round before it left."""

    def __init__(self, folder: Path, plan: RoundPlan) -> None:
        self._plan, self._folder = plan, folder
        # Factors of adapters are drawn anew each round: a rest of them means nothing in the next.
        self._wanted = plan.encoding in ("int8", "topk") and plan.train != "adapters"

    def added_to(self, update: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The update and what earlier rounds rounded away."""
        earlier = [number for number in self._rounds() if number < self._plan.round]
        if not self._wanted or not earlier:
            return dict(update)
        left = load_file(self._path(max(earlier)))
        if {name: tensor.shape for name, tensor in left.items()} != {n: t.shape for n, t in update.items()}:
            return dict(update)
        return {name: tensor + left[name] for name, tensor in update.items()}

    def keep(self, update: Mapping[str, Tensor], sent: Arrays) -> None:
        """Remember what of `update` is not in what was sent."""
        if not self._wanted:
            return
        layout = {name: ("float32", tuple(tensor.shape)) for name, tensor in update.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in update.items()}

        def left(name: str) -> torch.Tensor:
            return update[name] - decode(sent, name, shapes[name], self._plan.encoding)

        atomic_write(self._path(self._plan.round), chunks(layout, lambda name: left(name).numpy()))
        begun_with = max((number for number in self._rounds() if number < self._plan.round), default=0)
        for number in self._rounds():
            if number < begun_with:
                self._path(number).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self._folder / f"residual-{self._plan.federation}-{number}.safetensors"

    def _rounds(self) -> list[int]:
        name = re.compile(rf"residual-{self._plan.federation}-(\d+)\.safetensors")
        return [int(found[1]) for path in self._folder.glob("residual-*") if (found := name.fullmatch(path.name))]
