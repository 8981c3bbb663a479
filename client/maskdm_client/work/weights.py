"""Weights that come down with a plan: the whole model, or only what training changes where the rest is here already.

A federation that trains biases, or adapters, never changes the other weights. They come once and stay in the site's
folder until another federation needs the room.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from maskdm.errors import plain
from maskdm.federated.encoding import as_tensor
from maskdm.federated.plan import RoundPlan, work_key
from maskdm.metadata import first_problem
from maskdm.networks.trainable import expected_shapes
from maskdm.run.runfolder import atomic_write
from maskdm.run.tensorfile import Arrays, Document, bytes_of, chunks, layout_of, unpack

from ..folder.damage import read_or_drop
from ..refusals import PlanRefused, RestMissing


class PlanWithWeights:
    """A plan and weights as they came; each is read, and hashed, once, when it is asked for first."""

    def __init__(self, document: str, packed: Document) -> None:
        self.packed = packed
        self._document = document

    @cached_property
    def plan(self) -> RoundPlan:
        """Raises PlanRefused where it is none."""
        try:
            return RoundPlan.model_validate_json(self._document)
        except ValidationError as error:
            raise PlanRefused(f"the coordinator's plan was refused: {plain(first_problem(error))}") from error

    @cached_property
    def arrays(self) -> Arrays:
        """Of the weights, which need not fit the plan; raises PlanRefused where they are none."""
        try:
            return unpack(self.packed)
        except ValueError as error:
            raise PlanRefused(f"the coordinator's weights were refused: {plain(str(error))}") from error

    @cached_property
    def key(self) -> str:
        """The same work, asked for again under another number, has the same one; "" where it is none that can be done.

        Whether the weights came whole or in part makes no difference.
        """
        try:
            return work_key(self.plan, (bytes_of(self.arrays[name]) for name in self._keyed()))
        except PlanRefused:
            return ""

    def key_of(self, weights: Mapping[str, Tensor]) -> str:
        """Of all weights, those that were here already among them: of those alone that training changes, others could
        be sent under one key, to be counted once and to meet the same draws."""
        if self._keyed() == sorted(weights):  # they came whole, and all were hashed
            return self.key
        return work_key(self.plan, (bytes_of(weights[name].numpy()) for name in sorted(weights)))

    def _keyed(self) -> list[str]:
        changed = set(self.plan.changed())
        return sorted(name for name in self.arrays if name in changed or self.plan.action != "train")


def read_weights(asked: PlanWithWeights, folder: Path | None) -> dict[str, Tensor]:
    """All weights, fp32 and only to be read, since they lie in what came.

    Args:
        folder: where weights that never change are kept; None keeps none and completes none.

    Raises:
        PlanRefused: what came does not fit the model of the plan.
        RestMissing: it has to come whole.
    """
    plan, came = asked.plan, asked.arrays
    expected, changed = expected_shapes(plan.model.model), set(plan.changed())
    arrays = came
    if plan.action == "train" and came.keys() == changed != expected.keys():
        arrays = {**came, **_rest(plan, folder)}
    if _shapes(arrays) != expected or any(array.dtype != "float32" for array in arrays.values()):
        raise PlanRefused("the coordinator's weights do not fit the model that the plan describes")
    weights = {name: as_tensor(array) for name, array in arrays.items()}
    if not all(torch.isfinite(tensor).all() for tensor in weights.values()):
        raise PlanRefused("the coordinator's weights are not finite")
    if folder and plan.action == "train" and arrays is came and changed != expected.keys():
        _keep({name: array for name, array in came.items() if name not in changed}, plan, folder)
    return weights


def _keep(rest: Arrays, plan: RoundPlan, folder: Path) -> None:
    atomic_write(_path(plan, folder), chunks(layout_of(rest), rest.__getitem__))


def _rest(plan: RoundPlan, folder: Path | None) -> Arrays:
    path = _path(plan, folder) if folder else None
    found = read_or_drop(path) if path and path.exists() else None
    if found is None:
        raise RestMissing("only the weights that change came, and the others are not here; asking for them")
    return {name: tensor.numpy() for name, tensor in found.items()}


def _path(plan: RoundPlan, folder: Path) -> Path:
    return folder / f"rest-{plan.federation}-{plan.train}.safetensors"


def _shapes(arrays: Arrays) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}
