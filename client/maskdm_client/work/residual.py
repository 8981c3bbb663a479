"""What coarse encodings round away is kept at the site and added to its next update: nothing is lost, only late.

Error feedback: Seide et al. 2014; Karimireddy et al. 2019, arXiv 1901.09847, algorithm 1.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from maskdm.federated.encoding import decode
from maskdm.federated.plan import RoundPlan
from maskdm.run.tensorfile import Arrays

from ..folder.carried_over import CarriedOver


class Residual:
    """What is left over of the updates of a federation."""

    def __init__(self, folder: Path, plan: RoundPlan) -> None:
        self._plan, self._kept = plan, CarriedOver(folder, "residual", plan, wanted=plan.encoding in ("int8", "topk"))

    def added_to(self, update: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The update and what earlier rounds rounded away."""
        left = self._kept.before(_shapes(update))
        return {name: tensor + left[name] if left else tensor for name, tensor in update.items()}

    def keep(self, update: Mapping[str, Tensor], sent: Arrays) -> None:
        """Remember what of `update` is not in what was sent."""
        shapes = _shapes(update)
        self._kept.keep(shapes, lambda name: update[name] - decode(sent, name, shapes[name], self._plan.encoding))


def _shapes(update: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in update.items()}
